"""Verifying completions: in this process, or in a pool of processes where a hang or a crash costs no more than its item.

A completion is written by the policy, which learns whatever pays. So nothing that a completion does to its verifier pays:

- The verifier scores it: that is its reward.
- The verifier raises, or returns what is no finite number: reward WRONG.
- The process takes longer than the time limit, dies, or runs out of memory over it (pool only): reward WRONG, unless the reference
  answer fares no better.

A Failure tells nothing about the completion: the item cannot be sent to a process, a process is lost over the reference answer
too, or one that the verifier needs does not run (ChildProcessError). The scheduler has such a rollout tried again and at last
leaves it out. A pool that is at fault RUN_OF_LOSSES times in a row raises.

A sum is verified in 8 microseconds, which the pool makes 60; answers to JSONL tasks take 0.2 milliseconds, and 10 where a formula
is compared, which the pool spreads.
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

WRONG = 0.0  # reward
LARGEST_CHUNK = 64  # items sent to a process at once; each is timed, and answered, on its own
RUN_OF_LOSSES = 3  # processes lost through no completion's fault, with nothing verified in between, before the pool gives up
MEMORY_GIB = 2.0
PRELOAD = [__name__, "reasoning_gym", "v05.tasks.jsonl"]  # what tasks import, so that a process is made in milliseconds


class Item(NamedTuple):
    """A completion to verify, under a key that no other item being verified has."""

    key: int
    prompt: Prompt
    completion: str


class Verifier(Protocol):
    """Scores completions.

    Attributes:
        timed_out: items so far that were wrong because they took longer than the time limit.
        crashed: items so far that were wrong because they ended the process.
    """

    timed_out: int
    crashed: int

    def submit(self, items: Sequence[Item]) -> None:
        """Start verifying."""
        ...

    def poll(self, *, wait: bool) -> list[tuple[int, float | Failure]]:
        """Keys and rewards of the items verified since the last call; with `wait` at least one, if any is under way."""
        ...

    def close(self) -> None:
        """Stop the processes."""
        ...


class InlineVerifier:
    """Verifies in this process, as items are submitted. `task.verify` must not stall, nor evaluate what a completion says."""

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
    """Verifies in processes of their own. One that stalls or dies is replaced, and the rest of its chunk goes to another.

    A process may use `memory_gib`, write no file and leave no core dump; what it prints is dropped. (A limit of processes would
    not bind root, and would forbid threads to others.)

    Args:
        make_task: makes the task in a process; picklable.
        workers: processes.
        time_limit: seconds an item may take. Time is taken when this process polls, so an item may get more, never less.
        memory_gib: that a process may use beyond what it has once its task is made; on Linux only.

    Raises RuntimeError, from any method: a process cannot be started or cannot make its task, or processes are lost time and again
    through no completion's fault.
    """

    def __init__(self, make_task: Callable[[], Scorer], *, workers: int, time_limit: float, memory_gib: float = MEMORY_GIB) -> None:
        self.timed_out = self.crashed = 0
        self._make_worker = functools.partial(_Worker, make_task, int(memory_gib * 2**30))
        self._time_limit = time_limit
        self._waiting: deque[Item] = deque()
        self._suspects: dict[int, _Loss] = {}  # keys whose reference answers are verified before they are found wrong
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
        """Share what is waiting among the processes that are free."""
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
                with contextlib.suppress(OSError):  # a process that died is met when its answers are read
                    worker.connection.send(chunk)

    def _receive(self, timeout: float | None) -> None:
        """Take the answers that are there, waiting `timeout` seconds for a first one; replace processes that died or stall."""
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
        """Take all answers of a process; False if it has died."""
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
        """Note the result of an item. A suspect's is that of its reference answer, which clears the verifier."""
        loss = self._suspects.pop(key, None)
        if loss is not None and not isinstance(result, Failure):
            self.timed_out += loss.timed_out
            self.crashed += not loss.timed_out
            result = WRONG
        self._results.append((key, result))

    def _replace(self, index: int, loss: _Loss) -> None:
        """Put a new process in a lost one's place. The item it was at is suspected; the others wait again."""
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
                    f"verifier processes were lost {RUN_OF_LOSSES} times in a row over no completion, but reference answers or "
                    f"nothing; the last one {loss.what}: look at the machine's memory, verifier.memory_gib and verifier.time_limit"
                )
            if item is not None:
                self._conclude(item.key, Failure(f"the verifier's process {loss.what} over the reference answer too"))
        self._workers[index] = self._make_worker()


class _Loss(NamedTuple):
    """How a process was lost."""

    what: str
    timed_out: bool


class _Worker:
    """A process.

    `items` are what it was sent and has not answered; it is `begun` once the process has them, and the first is under way `since`
    that time at the latest.
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
        """Kill and reap; the exit code."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def verify_all(verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """Rewards of completions, one a prompt, by a verifier that has nothing under way.

    RuntimeError if an item fails `ATTEMPTS` times: it is not known to be wrong.
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
    """The reward, whatever the verifier raises or returns. Only Ctrl-C passes."""
    try:
        score = task.verify(prompt, completion)
        reward = WRONG if isinstance(score, str) else float(score)
    except KeyboardInterrupt:
        raise
    except ChildProcessError as error:
        return Failure(f"the verifier does not run: {error}")
    except BaseException:  # SystemExit too: a completion ends no run
        return WRONG
    return reward if math.isfinite(reward) else WRONG


def _work(make_task: Callable[[], Scorer], memory: int, answers: Any) -> None:
    """A process of the pool: says when it is ready, then answers chunks item by item until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
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
    """Limit what this process may do to the machine, as far as the system lets it; what it prints is dropped."""
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    with contextlib.suppress(OSError):  # only Linux says, and only there is the limit kept
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + memory
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # a file's end could not be written to, and a completion's text is not for a terminal
        os.dup2(nowhere, stream)


def _die_with_parent() -> None:
    """A verifier that stalls would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
