"""A run resumes only with the settings and data that it began with. Its files are recognised by content, wherever they lie."""

import gc
import json
import shutil

import pytest

from helpers.kill_and_resume import smoke
from v05.tasks import JsonlConfig, make_task
from v05.train.checkpoint import find_checkpoints
from v05.train.compare import is_finished, run_all
from v05.train.config import PolicyConfig
from v05.train.distributed import World
from v05.train.identity import identity_of, inputs_of
from v05.train.metrics import changed_settings, read_metrics
from v05.train.policy import policy_folder
from v05.train.presets import run_config
from v05.train.trainer import Trainer


def write_sums(path, addend):
    path.write_text("".join(json.dumps({"prompt": f"{i}+{addend}=", "answer": i + addend}) + "\n" for i in range(150)))
    return path


def run_of(prompts, policy, **settings):
    return run_config(
        "smoke",
        "v05",
        total_rollouts=256,
        checkpoint_seconds=0,
        task={"kind": "jsonl", "path": prompts},
        policy={"path": policy, "max_new_tokens": 4},
        **settings,
    )


def ignored(line):
    pass


def train(config, directory, until=None):
    for done, _ in enumerate(Trainer(config, directory, ignored).run()):
        if done == until:
            break
    gc.collect()  # releases the directory


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a policy that can read sums."""
    config = smoke(1)
    return policy_folder(config.policy, config.task, make_task(config.task), ignored)


@pytest.fixture
def begun(policy, tmp_path):
    """The configuration and directory of an interrupted run. Its prompts and its policy are files that a test may change."""
    shutil.copytree(policy, tmp_path / "policy")
    config = run_of(write_sums(tmp_path / "sums.jsonl", 1), tmp_path / "policy")
    train(config, tmp_path / "run", until=2)
    return config, tmp_path / "run"


def test_settings_are_known_by_the_content_of_what_they_name(begun, tmp_path):
    config, directory = begun
    inputs = json.loads((directory / "inputs.json").read_text())
    assert inputs == inputs_of(config)
    assert list(inputs) == ["task.path", "policy.path"]
    assert identity_of(config)["task"]["path"] == inputs["task.path"]
    assert identity_of(config)["policy"]["max_new_tokens"] == 4
    assert str(tmp_path) not in json.dumps(identity_of(config))


def test_other_prompts_are_refused_by_the_name_of_their_file(begun):
    config, directory = begun
    records = read_metrics(directory)
    write_sums(config.task.path, 2)
    with pytest.raises(ValueError, match=r"run holds a run that differs in the content of .*sums\.jsonl; give another directory"):
        Trainer(config, directory, ignored)
    with pytest.raises(ValueError, match=r"differs in the content of .*sums\.jsonl"):
        run_all({"run": config}, directory.parent, 1, lambda states: None)
    assert read_metrics(directory) == records
    assert find_checkpoints(directory)
    write_sums(config.task.path, 1)
    assert changed_settings(config, directory) == []


def test_another_policy_is_refused_by_the_name_of_its_folder(begun):
    config, directory = begun
    (config.policy.path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    with pytest.raises(ValueError, match=r"differs in the content of .*policy; give another directory"):
        Trainer(config, directory, ignored)


def test_what_was_moved_is_the_same(begun, tmp_path):
    config, directory = begun
    config.task.path.rename(tmp_path / "moved.jsonl")
    config.policy.path.rename(tmp_path / "elsewhere")
    moved = run_of(tmp_path / "moved.jsonl", tmp_path / "elsewhere")
    train(moved, directory)
    assert len({record["step"] for record in read_metrics(directory, "step")}) == len(read_metrics(directory, "step"))
    assert is_finished(moved, directory)
    assert changed_settings(moved.model_copy(update={"total_rollouts": 64}), directory) == ["total_rollouts"]
    write_sums(tmp_path / "moved.jsonl", 3)
    assert not is_finished(moved, directory)
    with pytest.raises(ValueError, match=r"holds a finished run; .* differs in the content of .*moved\.jsonl"):
        run_all({"run": moved}, tmp_path, 1, lambda states: None)


def test_a_checkpoint_of_other_prompts_is_refused_without_its_records(begun):
    config, directory = begun
    (directory / "metrics.jsonl").write_text("")
    write_sums(config.task.path, 2)
    with pytest.raises(ValueError, match="checkpoint-00000002 belongs to another configuration"):
        Trainer(config, directory, ignored)


def test_a_run_of_an_earlier_version_is_known_by_its_paths(begun):
    config, directory = begun
    (directory / "inputs.json").unlink()
    assert changed_settings(config, directory) == []
    other = run_of(config.policy.path, config.policy.path)
    assert changed_settings(other, directory) == ["task"]


def test_ranks_that_read_other_files_are_refused(policy, tmp_path, monkeypatch):
    config = run_of(write_sums(tmp_path / "sums.jsonl", 1), policy)
    monkeypatch.setattr("v05.train.trainer.join_world", World)
    monkeypatch.setattr(World, "gather", lambda self, value: [value, "of another rank"])
    with pytest.raises(ValueError, match=r"the ranks read different contents of .*sums\.jsonl, "):
        Trainer(config, tmp_path / "run", ignored)


def test_a_warm_start_is_kept_by_the_content_of_its_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("V05_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("v05.train.policy.warm_start", lambda config, task, report: (Saved("model"), Saved("tokenizer")))
    folders = []
    for name, addend in (("one", 1), ("same", 1), ("other", 2)):
        task = JsonlConfig(path=write_sums(tmp_path / f"{name}.jsonl", addend))
        folders.append(policy_folder(PolicyConfig(), task, make_task(task), ignored))
    assert folders[0] == folders[1] != folders[2]
    readable = folders[0].stat().st_mode & 0o777
    (tmp_path / "plain").mkdir()
    assert readable == (tmp_path / "plain").stat().st_mode & 0o777  # users may share a cache
    assert {file.stat().st_mode & 0o777 for file in folders[0].iterdir()} == {readable & 0o666}
    assert len(list((tmp_path / "cache").iterdir())) == 2


class Saved:
    """Saves a file that only its owner may read, as safetensors does."""

    def __init__(self, name):
        self.name = name

    def save_pretrained(self, folder):
        (folder / self.name).touch(mode=0o600)


@pytest.mark.parametrize("name", ["config.json", "policy"])
def test_what_no_run_wrote_is_not_replaced(name, tmp_path):
    """A run replaces config.json and policy/. It must not do so in the folder of a model, or beside a user's own configuration."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name} of something else, which the run would replace; give another directory"):
        Trainer(smoke(1), tmp_path, ignored)
    assert (tmp_path / name).read_text() == "mine"


def test_a_configuration_may_lie_where_its_run_goes(tmp_path):
    (tmp_path / "config.json").write_text(smoke(1).model_dump_json())
    Trainer(smoke(1), tmp_path, ignored)
    gc.collect()
    assert (tmp_path / "metrics.jsonl").exists()
