"""The verifier pool: rewards come back under their keys whatever hangs, dies or raises."""

import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from rollout_fakes import BrokenTask, TroubleTask

from v05.rollout import Failure
from v05.rollout.verifier import InlineVerifier, Item, VerifierPool, verify_all
from v05.tasks import Prompt, make_task
from v05.train.config import PRESETS

PROMPT = Prompt("", "", None)


@pytest.fixture
def pool():
    pool = VerifierPool(TroubleTask, workers=2, time_limit=1.5)
    yield pool
    pool.close()


def results_of(verifier, completions):
    verifier.submit([Item(key, PROMPT, completion) for key, completion in enumerate(completions)])
    results = []
    while len(results) < len(completions):
        results += verifier.poll(wait=True)
    assert verifier.poll(wait=True) == []
    assert sorted(key for key, _ in results) == list(range(len(completions)))
    return dict(results)


def test_trouble_costs_its_items_and_no_others(pool):
    completions = [str(i % 2) for i in range(300)]
    completions[5] = completions[170] = completions[171] = "hang"
    completions[40] = completions[41] = "die"
    completions[60] = completions[299] = "raise"
    results = results_of(pool, completions)
    assert pool.timed_out == 3
    for key, completion in enumerate(completions):
        if completion == "hang":
            assert results[key] == 0.0
        elif completion == "die":
            assert results[key] == Failure("the verifier's process died (exit code -9)")
        elif completion == "raise":
            assert results[key] == Failure("the verifier raised RuntimeError('not a completion I know')")
        else:
            assert results[key] == float(completion)
    assert results_of(pool, ["1", "0"]) == {0: 1.0, 1: 0.0}  # and it goes on


def test_nothing_is_waited_for_unasked(pool):
    results_of(pool, ["1"])  # a process is ready
    pool.submit([Item(0, PROMPT, "hang")])
    assert pool.poll(wait=False) == []
    assert pool.poll(wait=True) == [(0, 0.0)]


def test_lost_processes_are_reaped(pool):
    results_of(pool, ["hang", "die", "1"] * 3)
    assert len([p for p in multiprocessing.active_children() if p.name == "verifier"]) == 2
    pool.close()
    assert not [p for p in multiprocessing.active_children() if p.name == "verifier"]


def test_a_task_that_cannot_be_made_is_an_error():
    pool = VerifierPool(BrokenTask, workers=1, time_limit=1.0)
    pool.submit([Item(0, PROMPT, "1")])
    with pytest.raises(RuntimeError, match=r"could not make its task \(exit code 1\)"):
        pool.poll(wait=True)
    pool.close()


def test_a_process_that_hangs_ends_with_its_parent(tmp_path):
    script = f"""
import sys
sys.path[:] = {sys.path!r}
from rollout_fakes import TroubleTask
from v05.rollout.verifier import Item, VerifierPool
if __name__ == "__main__":
    pool = VerifierPool(TroubleTask, workers=1, time_limit=600)
    pool.submit([Item(0, None, "1")])
    pool.poll(wait=True)
    pool.submit([Item(1, None, "hang")])
    print(pool._workers[0].process.pid, flush=True)
    pool.poll(wait=True)
"""
    (tmp_path / "parent.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while alive(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not alive(worker)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_pool_agrees_with_this_process_on_a_real_task():
    config = PRESETS["smoke"]["task"]
    task = make_task(config)
    prompts = [prompt for _, prompt in itertools.islice(task.prompts("train"), 50)]
    completions = [p.answer if i % 3 else p.answer + "1" for i, p in enumerate(prompts)]
    pool = VerifierPool(functools.partial(make_task, config), workers=1, time_limit=30.0)
    try:
        rewards = verify_all(pool, prompts, completions)
    finally:
        pool.close()
    assert rewards == verify_all(InlineVerifier(task), prompts, completions)
    assert rewards == [float(bool(i % 3)) for i in range(50)]


def test_what_fails_counts_as_wrong_in_an_evaluation():
    assert verify_all(InlineVerifier(TroubleTask()), [PROMPT] * 3, ["1", "raise", "0.5"]) == [1.0, 0.0, 0.5]
    assert verify_all(InlineVerifier(TroubleTask()), [], []) == []
