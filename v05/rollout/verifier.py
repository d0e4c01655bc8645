"""Verifying completions: in this process, or in a pool of processes, where a hang or a crash affects only one item.

The policy writes the completions, and learns whatever is rewarded. A completion must therefore gain nothing from disturbing its
verifier:

- The verifier returns a finite number: that is the reward.
- The verifier raises, or returns something else: reward WRONG.
- The process exceeds the time limit, dies or runs out of memory on the completion (pool only): reward WRONG, unless the same
  happens with the reference answer.

A `Failure` says nothing about the completion: the item cannot be sent to a process, the process is also lost with the reference
answer, or a helper process of the verifier does not run (ChildProcessError). The scheduler then tries the rollout again, and
finally leaves it out. If this happens RUN_OF_LOSSES times in a row, the pool raises RuntimeError.

Verifying a sum takes 8 microseconds, and 60 through the pool. An answer of a JSONL task takes 0.2 milliseconds, or 10 if formulas
are compared; the pool's processes do this in parallel.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from v05.rollout import ATTEMPTS, Failure

if TYPE_CHECKING:
    from v05.tasks import Prompt, Scorer

WRONG = 0.0  # reward of a wrong completion
LARGEST_CHUNK = 64  # most items sent to a process at once; each item is timed and answered separately
RUN_OF_LOSSES = 3  # processes lost in a row, not because of a completion, before the pool raises
MEMORY_GIB = 2.0
PRELOAD = [__name__, "reasoning_gym", "v05.tasks.jsonl"]  # modules that tasks import, so that a new process starts in milliseconds


class Item(NamedTuple):
    """A completion to verify. Its key must differ from those of all other items being verified."""

    key: int
    prompt: Prompt
    completion: str


class Verifier(Protocol):
    """Scores completions.

    Attributes:
        timed_out: number of items so far that counted as wrong because they exceeded the time limit.
        crashed: number of items so far that counted as wrong because they crashed the process.
    """

    timed_out: int
    crashed: int

    def submit(self, items: Sequence[Item]) -> None:
        """Start verifying these items."""
        ...

    def poll(self, *, wait: bool) -> list[tuple[int, float | Failure]]:
        """Keys and rewards of the items verified since the last call. With `wait`, waits for at least one, if any item is under
        way."""
        ...

    def close(self) -> None:
        """Stop the processes."""
        ...


class InlineVerifier:
    """Verifies in this process, as items are submitted. `task.verify` must not hang, and must not execute code of a completion."""

    timed_out = crashed = 0

    def __init__(self, task: Scorer) -> None:
        self._task = task
        self._results: list[tuple[int, float | Failure]] = []

    def submit(self, items: Sequence[Item]) -> None:
        self._results += [(item.key, _verify(self._task, item.prompt, item.completion)) for item in items]

    def poll(self, *, wait: bool) -> list[tuple[int, float | Failure]]:
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        pass


class VerifierPool:
    """Verifies in separate processes. A process that hangs or dies is replaced, and the rest of its items go to another.

    A process may use `memory_gib` of memory, and can write no file and leave no core dump. Its output is discarded. (A limit on the
    number of processes would not apply to root, and would forbid threads to other users.)

    Args:
        make_task: makes the task inside a process; must be picklable.
        workers: number of processes.
        time_limit: seconds that an item may take. Time is checked when this process polls, so an item may get more, but never less.
        memory_gib: GiB that a process may use beyond its use after making the task; on Linux only.

    Any method may raise RuntimeError: a process cannot be started or cannot make its task, or processes are lost repeatedly, not
    because of completions.
    """

    def __init__(self, make_task: Callable[[], Scorer], *, workers: int, time_limit: float, memory_gib: float = MEMORY_GIB) -> None:
        self.timed_out = self.crashed = 0
        self._make_worker = functools.partial(_Worker, make_task, int(memory_gib * 2**30))
        self._time_limit = time_limit
        self._waiting: deque[Item] = deque()
        # Items that lost a process, and whose reference answer is verified before they count as wrong.
        self._suspects: dict[int, _Loss] = {}
        self._losses = 0
        self._results: list[tuple[int, float | Failure]] = []
        self._workers = [self._make_worker() for _ in range(workers)]

    def submit(self, items: Sequence[Item]) -> None:
        self._waiting.extend(items)
        self._receive(timeout=0)
        self._send()

    def poll(self, *, wait: bool) -> list[tuple[int, float | Failure]]:
        self._receive(timeout=0)
        self._send()
        while wait and not self._results and (self._waiting or any(worker.items for worker in self._workers)):
            deadlines = [worker.since + self._time_limit for worker in self._workers if worker.items]
            self._receive(timeout=max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)
            self._send()
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _send(self) -> None:
        """Divide the waiting items among the free processes."""
        free = [worker for worker in self._workers if worker.ready and not worker.items]
        for i, worker in enumerate(free):
            size = min(LARGEST_CHUNK, math.ceil(len(self._waiting) / (len(free) - i)))
            chunk = []
            for item in (self._waiting.popleft() for _ in range(size)):
                try:
                    chunk.append(pickle.dumps((item.prompt, item.completion)))
                except Exception as error:
                    self._results.append((item.key, Failure(f"the item cannot be sent to a verifier process: {error!r}")))
                else:
                    worker.items.append(item)
            if chunk:
                worker.begun = False
                worker.since = time.monotonic()
                with contextlib.suppress(OSError):  # a dead process is noticed when its answers are read
                    worker.connection.send(chunk)

    def _receive(self, timeout: float | None) -> None:
        """Read the available answers, waiting up to `timeout` seconds for a first one, and replace processes that died or hang."""
        answered = connection.wait([worker.connection for worker in self._workers], timeout)
        for i, worker in enumerate(self._workers):
            if worker.connection in answered and not self._read(worker):
                code = worker.stop()
                if not worker.ready:
                    raise RuntimeError(f"a verifier process could not make its task (exit code {code}); see its error above")
                self._replace(i, _Loss(f"died (exit code {code})", timed_out=False))
            elif worker.items and time.monotonic() - worker.since > self._time_limit and not worker.connection.poll():
                worker.stop()
                self._replace(i, _Loss(f"took longer than {self._time_limit:g} s", timed_out=True))

    def _read(self, worker: _Worker) -> bool:
        """Read all available answers of a process. Returns False if it has died."""
        try:
            while worker.connection.poll():
                answer = worker.connection.recv()
                if answer is None:
                    worker.begun = worker.ready
                    worker.ready = True
                else:
                    self._losses = 0
                    self._conclude(worker.items.popleft().key, answer)
                worker.since = time.monotonic()
        except (EOFError, OSError):
            return False
        return True

    def _conclude(self, key: int, result: float | Failure) -> None:
        """Note the result of an item. For a suspect, this is the result of its reference answer: if that could be verified, the
        completion is wrong."""
        loss = self._suspects.pop(key, None)
        if loss is not None and not isinstance(result, Failure):
            self.timed_out += loss.timed_out
            self.crashed += not loss.timed_out
            result = WRONG
        self._results.append((key, result))

    def _replace(self, index: int, loss: _Loss) -> None:
        """Replace a lost process. Its current item becomes a suspect, and its other items wait again."""
        lost = self._workers[index]
        item = lost.items.popleft() if lost.begun and lost.items else None
        self._waiting.extendleft(reversed(lost.items))
        if item is not None and item.key not in self._suspects:
            self._suspects[item.key] = loss
            self._waiting.appendleft(item._replace(completion=item.prompt.answer))
        else:
            self._losses += 1
            if self._losses == RUN_OF_LOSSES:
                raise RuntimeError(
                    f"verifier processes were lost {RUN_OF_LOSSES} times in a row while idle or with reference answers; "
                    f"the last one {loss.what}: check the machine's memory, verifier.memory_gib and verifier.time_limit"
                )
            if item is not None:
                self._conclude(item.key, Failure(f"the verifier's process {loss.what} with the reference answer too"))
        self._workers[index] = self._make_worker()


class _Loss(NamedTuple):
    """How a process was lost: `what` is text for a message."""

    what: str
    timed_out: bool


class _Worker:
    """A process of the pool.

    `items` were sent to it and are not answered yet. `begun` is True once the process has received them. Its first item has been
    under way since the time `since`, or a little longer.
    """

    def __init__(self, make_task: Callable[[], Scorer], memory: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(make_task, memory, theirs), daemon=True, name="verifier")
        try:
            self.process.start()
        except (OSError, EOFError) as error:
            raise RuntimeError(f"a verifier process could not be started: {error!r}; free memory or processes") from error
        theirs.close()
        self.ready = False
        self.begun = False
        self.items: deque[Item] = deque()
        self.since = 0.0

    def stop(self) -> int | None:
        """Kill the process and wait for its end. Returns the exit code."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def verify_all(verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """Rewards of completions, one per prompt, by a verifier that has nothing under way.

    Raises RuntimeError if an item fails `ATTEMPTS` times, because it may be right or wrong.
    """
    items = [Item(i, *pair) for i, pair in enumerate(zip(prompts, completions, strict=True))]
    rewards: dict[int, float] = {}
    failures: Counter[int] = Counter()
    verifier.submit(items)
    while len(rewards) < len(items):
        for key, result in verifier.poll(wait=True):
            if not isinstance(result, Failure):
                rewards[key] = result
                continue
            failures[key] += 1
            if failures[key] == ATTEMPTS:
                raise RuntimeError(f"a completion could not be verified in {ATTEMPTS} attempts; the last error: {result.error}")
            verifier.submit([items[key]])
    return [rewards[i] for i in range(len(items))]


def _verify(task: Scorer, prompt: Prompt, completion: str) -> float | Failure:
    """The reward of a completion, or a Failure, whatever the verifier raises or returns. Only KeyboardInterrupt passes through."""
    try:
        score = task.verify(prompt, completion)
        reward = WRONG if isinstance(score, str) else float(score)
    except KeyboardInterrupt:
        raise
    except ChildProcessError as error:
        return Failure(f"the verifier does not run: {error}")
    except BaseException:  # includes SystemExit: a completion must not end the run
        return WRONG
    return reward if math.isfinite(reward) else WRONG


def _work(make_task: Callable[[], Scorer], memory: int, answers: Any) -> None:
    """The main function of a process of the pool: reports that it is ready, then answers chunks item by item until its parent is
    gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()
    task = make_task()
    _confine(memory)
    answers.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = answers.recv()
            answers.send(None)
            for item in chunk:
                answers.send(_verify_pickled(task, item))


def _verify_pickled(task: Scorer, item: bytes) -> float | Failure:
    try:
        prompt, completion = pickle.loads(item)
    except Exception as error:
        return Failure(f"the item cannot be read by a verifier process: {error!r}")
    return _verify(task, prompt, completion)


def _confine(memory: int) -> None:
    """Limit this process's use of the machine, as far as the system allows, and discard its output."""
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    with contextlib.suppress(OSError):  # only Linux has this file and enforces the limit
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + memory
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # output could fail at the file size limit, and completions' text must not reach a terminal
        os.dup2(nowhere, stream)


def _die_with_parent() -> None:
    """End this process with its parent, because a hanging verifier would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
