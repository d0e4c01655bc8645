"""Verifying completions: in this process, or in a pool of processes where neither a hang nor a crash costs more than its item.

What becomes of an item:

- The verifier scores it: that is its reward.
- It takes longer than the time limit (pool only): reward TIMED_OUT. What cannot be verified in time is a wrong answer, and leaving
  it out instead would spare the policy what it wrote.
- The verifier raises, or its process dies (pool only): a Failure. That tells nothing about the answer, so the scheduler has the
  rollout tried again and at last leaves it out.

A sum is verified in 2 microseconds, which the pool makes 50; math-verify takes 2 milliseconds, which it spreads. Neither hangs.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from v05.rollout import Failure

if TYPE_CHECKING:
    from v05.tasks import Prompt

TIMED_OUT = 0.0  # reward
LARGEST_CHUNK = 64  # items sent to a process at once; each is timed, and answered, on its own


class Item(NamedTuple):
    """A completion to verify, under a key that no other item being verified has."""

    key: int
    prompt: Prompt
    completion: str


class Scorer(Protocol):
    """What a verifier needs of a task."""

    def verify(self, prompt: Prompt, completion: str) -> float:
        """As `v05.tasks.Task.verify`."""
        ...


class Verifier(Protocol):
    """Scores completions.

    Attributes:
        timed_out: items so far that took longer than the time limit.
    """

    timed_out: int

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
    """Verifies in this process, as items are submitted. `task.verify` must not hang."""

    timed_out = 0

    def __init__(self, task: Scorer) -> None:
        self._task = task
        self._results: list[tuple[int, float | Failure]] = []

    def submit(self, items: Sequence[Item]) -> None:
        self._results += [(item.key, _verify(self._task, item)) for item in items]

    def poll(self, *, wait: bool) -> list[tuple[int, float | Failure]]:
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        pass


class VerifierPool:
    """Verifies in processes of their own. One that hangs or dies is replaced, and the rest of its chunk goes to another.

    Args:
        make_task: makes the task in a process; picklable.
        workers: processes.
        time_limit: seconds an item may take. Time is taken when this process polls, so an item may get more, never less.

    Raises RuntimeError, from any method, if a process cannot make its task.
    """

    def __init__(self, make_task: Callable[[], Scorer], *, workers: int, time_limit: float) -> None:
        self.timed_out = 0
        self._make_task = make_task
        self._time_limit = time_limit
        self._waiting: deque[Item] = deque()
        self._results: list[tuple[int, float | Failure]] = []
        self._workers = [_Worker(make_task) for _ in range(workers)]

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
            worker.items.extend(self._waiting.popleft() for _ in range(size))
            if worker.items:
                worker.since = time.monotonic()
                with contextlib.suppress(OSError):  # a process that died is met when its answers are read
                    worker.connection.send(list(worker.items))

    def _receive(self, timeout: float | None) -> None:
        """Take the answers that are there, waiting `timeout` seconds for a first one; replace processes that died or hang."""
        answered = connection.wait([worker.connection for worker in self._workers], timeout)
        for i, worker in enumerate(self._workers):
            if worker.connection in answered and not self._read(worker):
                if not worker.ready:
                    raise RuntimeError(
                        f"a verifier process could not make its task (exit code {worker.stop()}); see its error above"
                    )
                self._replace(i, Failure(f"the verifier's process died (exit code {worker.stop()})"))
            elif worker.items and time.monotonic() - worker.since > self._time_limit and not worker.connection.poll():
                self.timed_out += 1
                self._replace(i, TIMED_OUT)

    def _read(self, worker: _Worker) -> bool:
        """Take all answers of a process; False if it has died."""
        try:
            while worker.connection.poll():
                answer = worker.connection.recv()
                if worker.ready:
                    self._results.append((worker.items.popleft().key, answer))
                worker.ready = True
                worker.since = time.monotonic()
        except (EOFError, OSError):
            return False
        return True

    def _replace(self, index: int, result: float | Failure) -> None:
        """Put a new process in a lost one's place. `result` is that of the item it was at; the others wait again."""
        lost = self._workers[index]
        lost.stop()
        if lost.items:
            self._results.append((lost.items.popleft().key, result))
            self._waiting.extendleft(reversed(lost.items))
        self._workers[index] = _Worker(self._make_task)


class _Worker:
    """A process; `items` are what it was sent and has not answered, the first under way `since` that time at the latest."""

    def __init__(self, make_task: Callable[[], Scorer]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "reasoning_gym"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(make_task, theirs), daemon=True, name="verifier")
        self.process.start()
        theirs.close()
        self.ready = False
        self.items: deque[Item] = deque()
        self.since = 0.0

    def stop(self) -> int | None:
        """Kill and reap; the exit code."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def verify_all(verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """Rewards of completions, one a prompt, by a verifier that has nothing under way. A Failure counts as wrong."""
    verifier.submit([Item(i, *pair) for i, pair in enumerate(zip(prompts, completions, strict=True))])
    rewards: dict[int, float] = {}
    while len(rewards) < len(prompts):
        rewards.update((key, 0.0 if isinstance(result, Failure) else result) for key, result in verifier.poll(wait=True))
    return [rewards[i] for i in range(len(prompts))]


def _verify(task: Scorer, item: Item) -> float | Failure:
    try:
        return task.verify(item.prompt, item.completion)
    except Exception as error:
        return Failure(f"the verifier raised {error!r}")


def _work(make_task: Callable[[], Scorer], answers: Any) -> None:
    """A process of the pool: says when it is ready, then answers chunks item by item until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    task = make_task()
    answers.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            for item in answers.recv():
                answers.send(_verify(task, item))


def _die_with_parent() -> None:
    """A verifier that hangs would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
