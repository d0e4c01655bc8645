"""A checkpoint is complete or absent, and a resumed run equals an uninterrupted one."""

import errno
import gc
import itertools
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from helpers.kill_and_resume import Runner, lost, policy_digest, smoke, untimed
from v05.train import checkpoint as module
from v05.train.checkpoint import (
    FORMAT,
    KEPT,
    Checkpoint,
    CheckpointSchedule,
    delete_checkpoints,
    find_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from v05.train.metrics import read_metrics
from v05.train.trainer import Trainer

TENSORS = {"policy": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}, "random": {"torch": torch.get_rng_state()}}


def made_up(step, numbers=6):
    return Checkpoint(
        {"step": step, "mean": 0.1 + 0.2}, {**TENSORS, "big": {"x": torch.full((numbers,), float(step))}}, b"\x00\xff"
    )


def ignored(line):
    pass


def steps_of(directory):
    return [read_checkpoint(path).state["step"] for path in find_checkpoints(directory)]


def test_what_is_written_is_read(tmp_path):
    write_checkpoint(tmp_path, 7, made_up(7))
    found = read_checkpoint(newest_checkpoint(tmp_path, ignored))
    assert found.state == {"step": 7, "mean": 0.1 + 0.2}
    assert found.allocator == b"\x00\xff"
    for name, tensors in made_up(7).tensors.items():
        assert found.tensors[name].keys() == tensors.keys()
        for key, value in tensors.items():
            assert found.tensors[name][key].dtype == value.dtype
            assert torch.equal(found.tensors[name][key], value)


def test_the_newest_and_its_predecessor_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        write_checkpoint(tmp_path, step, made_up(step))
    assert steps_of(tmp_path) == [10, 11]
    assert len(list(tmp_path.iterdir())) == KEPT
    assert newest_checkpoint(tmp_path / "absent", ignored) is None


def cut(path):
    os.truncate(path / "policy.safetensors", 20)


def flip(path):
    file = path / "policy.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": (cut, "policy.safetensors has {'bytes': 20"),
    "flipped bit": (flip, "its manifest says"),
    "lost file": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "lost manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
    "cut manifest": (lambda path: os.truncate(path / "manifest.json", 30), "manifest.json is missing or unreadable"),
    "foreign manifest": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is missing or unreadable"),
    "listless manifest": (lambda path: rewrite(path, files=["state.json"]), "manifest.json is missing or unreadable"),
    "manifest without files": (lambda path: rewrite(path, files={}), "manifest.json does not list state.json"),
    "manifest of files elsewhere": (lambda path: rewrite(path, files={"../config.json": {}}), "names '../config.json'"),
    "manifest without a number": (lambda path: rewrite(path, format="1"), "manifest.json is missing or unreadable"),
}


def rewrite(path, **changes):
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_its_place(damage, tmp_path):
    inflict, message = DAMAGES[damage]
    for step in (1, 2):
        write_checkpoint(tmp_path, step, made_up(step))
    inflict(tmp_path / "checkpoint-00000002")
    lines = []
    assert newest_checkpoint(tmp_path, lines.append) == tmp_path / "checkpoint-00000001"
    assert len(lines) == 1
    assert "checkpoint-00000002: " in lines[0]
    assert message in lines[0]
    write_checkpoint(tmp_path, 2, made_up(2))  # the deleted checkpoint may be written again
    assert steps_of(tmp_path) == [1, 2]


def test_only_what_was_written_here_is_read_or_deleted(tmp_path):
    """Other trainers and people put files and folders with similar names into a run's directory."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    write_checkpoint(run_of(elsewhere), 9, made_up(9))
    run_of(run)
    foreign = ["checkpoint-00000003-backup", "checkpoint-best", "checkpoint-500", "checkpoint-000000007", "checkpoint-best.partial"]
    for name in foreign:
        (run / name).mkdir()
        (run / name / "kept").touch()
    (run / "checkpoint-notes.txt").write_text("the best so far: 3")
    (run / "checkpoint-00000006").write_text("a file")
    (run / "checkpoint-00000008").symlink_to(elsewhere / "checkpoint-00000009")
    (run / "checkpoint-00000009.partial").symlink_to(elsewhere)
    before = {path.name for path in run.iterdir()}
    for step in (1, 2, 3):
        write_checkpoint(run, step, made_up(step))
    assert steps_of(run) == [2, 3]
    (run / "checkpoint-00000004.partial").mkdir()
    assert newest_checkpoint(run, pytest.fail) == run / "checkpoint-00000003"
    assert not (run / "checkpoint-00000004.partial").exists()
    (run / "checkpoint-00000003" / "foreign.safetensors").write_bytes(b"no tensors")
    assert read_checkpoint(run / "checkpoint-00000003").tensors.keys() == made_up(3).tensors.keys()
    delete_checkpoints(run)
    assert {path.name for path in run.iterdir()} == before
    assert all((run / name / "kept").is_file() for name in foreign)
    assert steps_of(elsewhere) == [9]


def run_of(directory):
    directory.mkdir()
    return directory


def test_a_directory_in_the_way_is_not_deleted(tmp_path):
    (tmp_path / "checkpoint-00000001.partial").mkdir()
    (tmp_path / "checkpoint-00000001.partial" / "kept").touch()
    with pytest.raises(OSError, match=r"checkpoint-00000001 cannot be written \(.*File exists"):
        write_checkpoint(tmp_path, 1, made_up(1))
    assert (tmp_path / "checkpoint-00000001.partial" / "kept").is_file()


def test_steps_of_more_digits_come_last(tmp_path):
    for step in (99_999_999, 100_000_000):
        write_checkpoint(tmp_path, step, made_up(step))
    assert steps_of(tmp_path) == [99_999_999, 100_000_000]


def test_a_checkpoint_is_as_readable_as_its_directory(tmp_path):
    write_checkpoint(tmp_path, 1, made_up(1))
    path = tmp_path / "checkpoint-00000001"
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}


def test_nothing_sound_is_an_error_that_deletes_nothing(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, made_up(step))
        cut(tmp_path / f"checkpoint-0000000{step}")
    with pytest.raises(ValueError, match=r"no intact checkpoint: .*00000002: policy.*00000001: policy.*; delete them to start"):
        newest_checkpoint(tmp_path, ignored)
    assert len(find_checkpoints(tmp_path)) == 2


def test_a_newer_format_is_refused(tmp_path):
    write_checkpoint(tmp_path, 1, made_up(1))
    manifest = tmp_path / "checkpoint-00000001" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": FORMAT + 1, "v05": "9.0"}))
    with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}, this v05 reads format {FORMAT}; resume with v05 9.0"):
        newest_checkpoint(tmp_path, ignored)


class DeathError(BaseException):
    """Stands for the end of the process, which no handler catches."""


@pytest.fixture
def fail_at(monkeypatch):
    """Write checkpoint 3, and let the n-th call that writes to disk raise an error."""

    def fail_at(n, error, directory):
        calls = itertools.count()

        def wrap(function):
            def call(*arguments, **named):
                if next(calls) == n:
                    raise error
                return function(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(module, "save_file", wrap(module.save_file))
            for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "write_bytes"), (Path, "write_text")):
                patch.setattr(owner, name, wrap(getattr(owner, name)))
            write_checkpoint(directory, 3, made_up(3))

    return fail_at


def test_death_at_any_point_of_writing_leaves_a_sound_checkpoint(fail_at, tmp_path):
    found = []
    for n in itertools.count():
        directory = tmp_path / str(n)
        directory.mkdir()
        for step in (1, 2):
            write_checkpoint(directory, step, made_up(step))
        try:
            fail_at(n, DeathError(), directory)
        except DeathError:
            path = newest_checkpoint(directory, pytest.fail)
            assert not list(directory.glob("*.partial"))
            found.append(read_checkpoint(path).state["step"])
        else:
            break
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert len(found) > 15


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "denied")])
def test_an_error_at_any_point_of_writing_is_explained(error, fail_at, tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, made_up(step))
    for n in range(12):  # the calls up to the rename
        with pytest.raises(
            OSError, match=rf"00000003 cannot be written .*{error.strerror}.*00000002 is intact and the run resumes"
        ):
            fail_at(n, error, tmp_path)
        assert steps_of(tmp_path) == [1, 2]
        assert not list(tmp_path.glob("*.partial"))  # no partial checkpoint takes up space


def test_a_full_disk(tmp_path):
    # A limit on the size of files gives safetensors and Python the errors of a full disk.
    write_checkpoint(tmp_path, 1, made_up(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"00000002 cannot be written \(.*too large.*make room .*00000001 is intact"):
            write_checkpoint(tmp_path, 2, made_up(2, numbers=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert read_checkpoint(newest_checkpoint(tmp_path, pytest.fail)).state["step"] == 1


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"00000001 cannot be written .*Not a directory.*: the run starts over"):
        write_checkpoint(tmp_path / "file", 1, made_up(1))


def test_checkpoints_stay_below_their_share_of_the_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    schedule = CheckpointSchedule(10)
    assert schedule.due()  # the first checkpoint is due at once
    schedule.written(cost=0.05)
    now = 9.9
    assert not schedule.due()
    now = 10.0
    assert schedule.due()
    schedule.written(cost=3.0)
    now = 309.0
    assert not schedule.due()
    now = 310.0
    assert schedule.due()
    always = CheckpointSchedule(0)
    always.written(cost=3.0)
    assert always.due()


def train(config, directory, until=None):
    """Run to the end, or to step `until`. Returns the lines that were reported."""
    lines = []
    for done, _ in enumerate(Trainer(config, directory, lines.append).run()):
        if done == until:
            break
    gc.collect()  # releases the directory
    return lines


@pytest.mark.parametrize(("method", "settings"), [("v05", {"overlap": True}), ("v05", {"prior": "v0"}), ("dapo", {}), ("v05", {})])
def test_an_interrupted_run_goes_on(method, settings, tmp_path):
    config = smoke(8, method).model_copy(update=settings)
    train(config, tmp_path / "whole")
    assert train(config, tmp_path / "halves", until=3) == []
    recorded = read_metrics(tmp_path / "halves")
    with (tmp_path / "halves" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3')  # an interrupted step left half a record
    rollouts = max(record["rollouts"] for record in recorded)
    assert train(config, tmp_path / "halves") == [f"resuming from step 3, rollout {rollouts} of 512"]
    assert read_metrics(tmp_path / "halves")[: len(recorded)] == recorded
    assert untimed(tmp_path / "halves") == untimed(tmp_path / "whole")
    assert policy_digest(tmp_path / "halves") == policy_digest(tmp_path / "whole")
    seconds = [record["seconds"] for record in read_metrics(tmp_path / "halves", "step")]
    assert seconds == sorted(seconds)  # the resumed run goes on counting
    assert not find_checkpoints(tmp_path / "halves")


def test_a_run_that_had_nothing_left_to_do_but_its_result(tmp_path):
    config = smoke(2)
    train(config, tmp_path, until=2)
    train(config, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["heldout_successes"] is not None


def test_a_damaged_checkpoint_costs_a_run_one_step(tmp_path):
    config = smoke(4)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "damaged", until=3)
    flip(tmp_path / "damaged" / "checkpoint-00000003")
    lines = train(config, tmp_path / "damaged")
    assert "deleted this checkpoint, an earlier one takes its place" in lines[0]
    assert "resuming from step 2" in lines[1]
    assert untimed(tmp_path / "damaged") == untimed(tmp_path / "whole")


def test_foreign_checkpoints_and_metrics_are_refused(tmp_path):
    train(smoke(4), tmp_path / "one", until=2)
    train(smoke(4, "grpo"), tmp_path / "two", until=1)
    shutil.copytree(tmp_path / "one" / "checkpoint-00000002", tmp_path / "two" / "checkpoint-00000002")
    with pytest.raises(ValueError, match="two/checkpoint-00000002 belongs to another configuration; give another directory"):
        Trainer(smoke(4, "grpo"), tmp_path / "two", ignored)
    (tmp_path / "one" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 bytes, fewer than the \d+ of the checkpoint"):
        Trainer(smoke(4), tmp_path / "one", ignored)


def test_two_processes_do_not_write_one_run(tmp_path):
    first = Trainer(smoke(2), tmp_path, ignored)
    for other in (smoke(2), smoke(2, "grpo")):
        with pytest.raises(ValueError, match="is being written by another process; wait for it or stop it"):
            Trainer(other, tmp_path, ignored)
    assert json.loads((tmp_path / "config.json").read_text())["method"] == "v05"  # the second trainer did not change it
    assert list(first.run())[-1].rollouts > 128 - 64 / 2


def test_a_disk_that_fills_up_under_the_metrics(tmp_path, monkeypatch):
    trainer = Trainer(smoke(2), tmp_path, ignored)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=r"metrics.jsonl cannot be written .*make room .*the run resumes"):
            trainer.evaluate_heldout()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_six_kills_lose_nothing(tmp_path):
    """`make soak` and tests/helpers/kill_and_resume.py kill more often."""
    runner, config = Runner(), smoke(40)
    runner.finish(config, tmp_path / "whole")
    injected = runner.kill_and_resume(config, tmp_path / "killed", kills=6)
    assert injected.exit_codes == [-9] * 6
    assert injected.in_checkpoint >= 2  # one kill in three is aimed at a checkpoint
    assert injected.resumed >= 3
    assert not any(lost(tmp_path / "whole", tmp_path / "killed").values())
