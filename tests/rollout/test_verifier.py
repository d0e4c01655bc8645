"""The verifier pool: rewards come back under their keys, whatever hangs, dies or raises."""

import functools
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.rollout_fakes import BrokenTask, DoomedTask, StuckTask, TroubleTask, Unreadable
from v05.rollout import Failure
from v05.rollout.verifier import InlineVerifier, Item, VerifierPool, verify_all
from v05.tasks import JsonlConfig, Prompt, ReasoningGymConfig, Source, make_task
from v05.train.engine import make_verifier
from v05.train.presets import PRESETS, run_config

PROMPT = Prompt("", "1", None)


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
    assert (pool.timed_out, pool.crashed) == (3, 2)
    for key, completion in enumerate(completions):
        assert results[key] == (float(completion) if completion.isdigit() else 0.0)
    assert results_of(pool, ["1", "0"]) == {0: 1.0, 1: 0.0}  # the pool still works


@pytest.mark.parametrize(
    "completion",
    [
        *("hang", "die", "abort", "leave", "raise", "fill memory", "write", "dump", "x", ""),
        *("SystemExit", "KeyboardInterrupt", "GeneratorExit", "MemoryError", "RecursionError"),
        *("return none", "return nan", "return infinity", "return text"),
    ],
)
def test_what_a_completion_does_to_its_verifier_is_wrong(completion, tmp_path):
    pool = VerifierPool(TroubleTask, workers=1, time_limit=1.5, memory_gib=0.25)
    prompt = Prompt(str(tmp_path / "written"), "1", None)
    try:
        assert verify_all(pool, [prompt] * 3, ["1", completion, "1"]) == [1.0, 0.0, 1.0]
    finally:
        pool.close()
    assert not (tmp_path / "written").exists() or (tmp_path / "written").read_text() == ""
    assert pool.timed_out == (completion == "hang")
    assert pool.crashed == (completion in ("die", "abort", "leave", "KeyboardInterrupt"))


@pytest.mark.parametrize(
    "completion", ["raise", "x", "SystemExit", "GeneratorExit", "MemoryError", "RecursionError", "return none", "return nan"]
)
def test_what_a_completion_does_in_this_process_is_wrong(completion):
    assert verify_all(InlineVerifier(TroubleTask()), [PROMPT] * 3, ["1", completion, "0.5"]) == [1.0, 0.0, 0.5]


def test_a_process_that_the_verifier_misses_is_a_failure(pool):
    pool.submit([Item(0, PROMPT, "miss a process")])
    inline = InlineVerifier(TroubleTask())
    inline.submit([Item(0, PROMPT, "miss a process")])
    for verifier in (pool, inline):
        assert verifier.poll(wait=True) == [(0, Failure("the verifier does not run: out of processes"))]
    with pytest.raises(RuntimeError, match=r"could not be verified in 3 attempts; the last error: .* out of processes"):
        verify_all(pool, [PROMPT], ["miss a process"])


def test_ctrl_c_ends_verifying_in_this_process():
    with pytest.raises(KeyboardInterrupt):
        InlineVerifier(TroubleTask()).submit([Item(0, PROMPT, "KeyboardInterrupt")])


def test_what_a_process_prints_is_dropped(pool, capfd):
    assert results_of(pool, ["print", "return true"]) == {0: 1.0, 1: 1.0}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("task", "loss"), [(DoomedTask, r"died \(exit code 1\)"), (StuckTask, "took longer than 1 s")])
def test_a_pool_that_loses_reference_answers_too_gives_up(task, loss):
    pool = VerifierPool(task, workers=2, time_limit=1.0)
    with pytest.raises(RuntimeError, match=f"lost 3 times in a row .*; the last one {loss}: check the machine's memory"):
        results_of(pool, ["1"] * 5)
    pool.close()


@pytest.mark.parametrize("answer", ["die", "hang"])
def test_a_prompt_whose_reference_answer_is_lost_too_is_a_failure(answer):
    pool = VerifierPool(TroubleTask, workers=1, time_limit=1.0)
    items = [Item(0, PROMPT, "1"), Item(1, Prompt("", answer, None), answer), Item(2, PROMPT, "0")]
    try:
        results = {}
        pool.submit(items)
        while len(results) < 3:
            results |= dict(pool.poll(wait=True))
        with pytest.raises(RuntimeError, match=r"could not be verified in 3 attempts; .* with the reference answer too"):
            verify_all(pool, [items[1].prompt, PROMPT], [answer, "1"])
    finally:
        pool.close()
    assert results[0] == 1.0
    assert "with the reference answer too" in results[1].error
    assert results[2] == 0.0
    assert (pool.timed_out, pool.crashed) == (0, 0)


def test_an_item_that_cannot_be_sent_is_a_failure(pool):
    pool.submit([Item(0, Prompt("", "1", lambda: None), "1"), Item(1, Prompt("", "1", Unreadable()), "1"), Item(2, PROMPT, "1")])
    results = {}
    while len(results) < 3:
        results |= dict(pool.poll(wait=True))
    assert "cannot be sent to a verifier process" in results[0].error
    assert "cannot be read by a verifier process: ValueError('made for one process')" in results[1].error
    assert results[2] == 1.0


def test_a_process_that_is_lost_before_its_items_costs_none(pool):
    while not all(worker.ready for worker in pool._workers):
        pool.poll(wait=False)
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGSTOP)  # stopped before they begin
    pool.submit([Item(key, PROMPT, "1") for key in range(4)])
    assert all(worker.items for worker in pool._workers)
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    results = {}
    while len(results) < 4:
        results |= dict(pool.poll(wait=True))
    assert results == dict.fromkeys(range(4), 1.0)
    assert pool.crashed == 0


def test_nothing_is_waited_for_unasked(pool):
    results_of(pool, ["1"])  # now a process is ready
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
from helpers.rollout_fakes import TroubleTask
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


def run_of(task, **verifier):
    return run_config("smoke", "grpo", task=task, verifier=verifier)


@pytest.mark.parametrize(
    ("dataset", "workers", "processes"), [("chain_sum", None, 0), ("sudoku", None, 2), ("sudoku", 0, 0), ("chain_sum", 3, 3)]
)
def test_verifiers_that_may_stall_have_processes_by_default(dataset, workers, processes):
    config = run_of(ReasoningGymConfig(mix=(Source(dataset=dataset),)), workers=workers)
    verifier = make_verifier(config, make_task(config.task))
    try:
        assert len(getattr(verifier, "_workers", [])) == processes
    finally:
        verifier.close()


def test_math_is_verified_in_processes_that_do_not_read_the_file_again(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": f"x+{i}"}) + "\n" for i in range(40)))
    config = run_of(JsonlConfig(path=path), memory_gib=0.5)  # the process that compares formulas has a limit of its own
    task = make_task(config.task)
    prompts = [prompt for _, prompt in itertools.islice(task.prompts("train"), 4)]
    path.unlink()
    verifier = make_verifier(config, task)
    try:
        assert isinstance(verifier, VerifierPool)
        answers = [f"So it is $\\boxed{{{prompt.answer[2:]}+x}}$" for prompt in prompts]
        assert (
            verify_all(verifier, prompts * 2, [*answers, "$9^{9^{9^{9}}}$", "exit()", "8", "\\boxed{8}"]) == [1.0] * 4 + [0.0] * 4
        )
    finally:
        verifier.close()


def test_nothing_to_verify():
    assert verify_all(InlineVerifier(TroubleTask()), [], []) == []
