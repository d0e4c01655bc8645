"""Decides with math-verify whether two formulas are equal, in a separate process with limits on time and memory.

A formula may ask for more than a machine can compute (`(10^8)!`), inside a C function that no signal handler can interrupt. So
math-verify runs in a separate process, which sets an alarm before every verdict. At the limit the operating system kills the
process, whatever it is doing, and a new process replaces it. This works in every thread and in the workers of a pool.

math-verify rounds decimals to six places and tests whether the difference is nearly 0, so it calls all tiny numbers equal. Formulas
without variables are therefore compared here by their relative difference. Other formulas must also agree, relatively, at a few
values of their variables.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from typing import IO, Any

TIME_LIMIT = 4.0  # seconds per verdict
MEMORY_LIMIT = 2 << 30  # bytes of the process
TOLERANCE = 1e-6  # relative, if either formula contains a decimal
EXACT_TOLERANCE = 1e-12  # relative, between exact numbers such as roots
DIGITS = 30  # precision of evaluated numbers
POINTS = (0.0, 0.37, 1.83, -2.71)  # values of variables
LONGEST_FORMULA = 1000  # characters
MOST_PROCESSES = 8


def equal(reference: str, answer: str, time_limit: float = TIME_LIMIT) -> bool:
    """Whether two formulas (LaTeX without dollar signs) are equal. False if one cannot be read, or time or memory runs out."""
    return _JUDGES.ask(["equal", reference, answer], time_limit)


def readable(formula: str) -> bool:
    """Whether math-verify can read a formula."""
    return _JUDGES.ask(["readable", formula], TIME_LIMIT)


class _Judges:
    """A pool of at most `MOST_PROCESSES` processes, so that a formula that takes long in one thread does not block the others."""

    def __init__(self) -> None:
        self._free: list[_JudgeProcess] = []
        self._made = 0
        self._changed = threading.Condition()

    def ask(self, question: list[str], time_limit: float) -> bool:
        if any(len(text) > LONGEST_FORMULA for text in question):
            return False
        deadline = time.monotonic() + time_limit
        with self._changed:
            if not self._changed.wait_for(lambda: self._free or self._made < MOST_PROCESSES, max(time_limit, 0.0)):
                return False
            self._made += not self._free
            judge = self._free.pop() if self._free else _JudgeProcess()
        try:
            return judge.ask(question, deadline - time.monotonic())
        finally:
            with self._changed:
                self._free.append(judge)
                self._changed.notify()

    def close(self) -> None:
        for judge in self._free:
            judge.close()


class _JudgeProcess:
    """One process. It is started at the first question, and again after a question has killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ready = False

    def ask(self, question: list[str], time_limit: float) -> bool:
        if time_limit <= 0:
            return False
        process = self._running()
        try:
            _pipe(process.stdin).write(json.dumps([time_limit, *question]) + "\n")
            _pipe(process.stdin).flush()
            verdict = _pipe(process.stdout).readline()
        except BrokenPipeError:
            verdict = ""
        if not verdict:
            self.close()
            self._start()  # the new process gets ready in the background
        return verdict == "1\n"

    def _running(self) -> subprocess.Popen[str]:
        """The process, ready for a question. Waiting for its start does not count towards a verdict's time."""
        if self._process is None:
            self._start()
        assert self._process is not None
        if not self._ready:
            if _pipe(self._process.stdout).readline() != "ready\n":
                code = self.close()
                raise ChildProcessError(f"the process that compares formulas did not start (exit code {code}); see its error above")
            self._ready = True
        return self._process

    def _start(self) -> None:
        command = [sys.executable, "-m", "v05.tasks.formulas"]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        except OSError as error:
            raise ChildProcessError(f"the process that compares formulas did not start: {error}") from error
        self._ready = False

    def close(self) -> int | None:
        """Kill the process, close its pipes, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # the process died before it read the question
                _pipe(pipe).close()
        return process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


_JUDGES = _Judges()
atexit.register(lambda: _JUDGES.close())


def _forget_judges() -> None:
    """Drop the processes after a fork, because a child must not share their pipes with its parent."""
    global _JUDGES
    _JUDGES = _Judges()


os.register_at_fork(after_in_child=_forget_judges)


def _serve() -> None:
    """Answer questions from standard input until it ends. The operating system kills this process at a question's time limit."""
    import resource

    import math_verify  # noqa: F401  imported here so that it does not count towards the first question's time

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)  # unreadable formulas are common
    print("ready", flush=True)
    for line in sys.stdin:
        time_limit, kind, *formulas = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        try:
            verdict = all(map(_parsed, formulas)) if kind == "readable" else _equal(*formulas)
        except (Exception, RecursionError, MemoryError):  # formulas that cannot be compared are not equal
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(verdict), flush=True)


@lru_cache(maxsize=4096)
def _parsed(formula: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # math-verify's own removal of units would delete variables, as in 3 m g. `v05.tasks.units` has already handled units.
    normalization = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    parsed: list[Any] = parse(f"${formula}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return parsed


def _equal(reference: str, answer: str) -> bool:
    import sympy
    from math_verify import verify

    left, right = _parsed(reference), _parsed(answer)
    if not left or not right:
        return False
    left, right = left[0], right[0]
    expressions = isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)
    if expressions and not left.free_symbols and not right.free_symbols:
        return _close(left, right)
    return verify([left], [right], timeout_seconds=None) and _agree(left, right)


def _close(left: Any, right: Any) -> bool:
    """Whether two expressions without variables are equal as numbers."""
    import sympy

    if left == right:
        return True
    a, b = (sympy.N(side.doit(), DIGITS) for side in (left, right))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return bool(a == b)
    tolerance = TOLERANCE if left.has(sympy.Float) or right.has(sympy.Float) else EXACT_TOLERANCE
    return bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))


def _agree(left: Any, right: Any) -> bool:
    """Whether two formulas that math-verify calls equal agree at the POINTS. Values that cannot be computed are skipped."""
    import sympy

    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return all(_agree(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, sympy.core.relational.Relational) and isinstance(right, sympy.core.relational.Relational):
        values = [(_value(left.lhs - left.rhs, point), _value(right.lhs - right.rhs, point)) for point in POINTS]
        ratios = [a / b for a, b in values if a is not None and b]
        zeros = all((a == 0) == (b == 0) for a, b in values if a is not None and b is not None)
        return zeros and all(abs(ratio - ratios[0]) <= TOLERANCE * abs(ratios[0]) for ratio in ratios)
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return True
    for point in POINTS:
        a, b = _value(left, point), _value(right, point)
        if a is not None and b is not None and abs(a - b) > TOLERANCE * max(abs(a), abs(b)) + 1e-25 * (a != 0 and b != 0):
            return False
    return True


def _value(expression: Any, point: float) -> Any:
    """The value of an expression with each variable at a different value near `point`, or None if it is not a finite number."""
    import sympy

    symbols = sorted(expression.free_symbols, key=str)
    values = {symbol: sympy.Float(point * (1 + 0.13 * i), DIGITS) for i, symbol in enumerate(symbols)}
    try:
        value = sympy.N(expression.subs(values), DIGITS)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError):
        return None
    return value if value.is_number and value.is_finite else None


if __name__ == "__main__":
    _serve()
