"""Two ranks under torchrun train as one process does.

The rollouts are the same to the last token: their seeds depend on the prompt's number in the run, and a token changes only if a
uniform number falls within rounding of the border between two tokens. Gradients are the same up to the order in which float32
numbers are added. Adam turns that into relative differences of 1e-6 a step in the weights. In the first ten steps, the gradient
norm differed by 3e-6 and the loss by 2e-8. In the long run the difference grows until a token does change, and then the runs
diverge.
"""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import rank_script, warm
from helpers.kill_and_resume import untimed
from v05.train.checkpoint import find_checkpoints
from v05.train.distributed import World, join_world
from v05.train.metrics import read_metrics
from v05.train.presets import run_config
from v05.train.trainer import Trainer

FEW = {"tokens_per_backward": 120}  # so few that a step takes several passes
CONFIGS = {
    "ddp": run_config("smoke", "v05", optimizer=FEW),
    "fsdp2": run_config("smoke", "v05", distributed="fsdp2", loss={"importance_cap": 2.0}, optimizer=FEW),
    "refills": run_config(  # two prompts per step, and often one of them is replaced
        "smoke",
        "dapo",
        rollouts_per_step=32,
        optimizer={"updates_per_step": 2, **FEW},
        loss={"kl_coefficient": 0.1, "importance_cap": 2.0},
    ),
    "idle": run_config(  # one rollout for two ranks
        "smoke", "prior@1", distributed="fsdp2", rollouts_per_step=1, total_rollouts=6, loss={"importance_cap": 2.0}
    ),
    "calibrated": run_config("smoke", "calibrated@1..4", rollouts_per_step=128, total_rollouts=640, optimizer=FEW),
    "overlap": run_config("smoke", "v05", overlap=True, total_rollouts=384, optimizer=FEW),
    "lora": run_config(
        "smoke",
        "v05",
        ["policy.lora.rank=4", "optimizer.gradient_checkpointing=true"],
        distributed="fsdp2",
        loss={"kl_coefficient": 0.1, "importance_cap": 2.0},
        optimizer=FEW,
    ),
    "bfloat16": run_config("smoke", "v05", ["policy.dtype=bfloat16"], optimizer=FEW),
    "bfloat16-fsdp2": run_config(
        "smoke", "v05", ["policy.dtype=bfloat16"], distributed="fsdp2", loss={"importance_cap": 2.0}, optimizer=FEW
    ),
    "torn": run_config("smoke", "v05", distributed="fsdp2", total_rollouts=512, checkpoint_seconds=0),
}
# Relative tolerances. All other values must be equal.
ROUNDED = {
    "grad_norm": 1e-4,
    "gradient_noise": 1e-4,
    "loss": 1e-4,
    "kl": 1e-3,
    "entropy": 1e-4,
    "mismatch": 1e-4,
    "mismatch_ratio": 1e-4,
}


def torchrun(*arguments):
    command = [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def train(folder, name, out):
    """Run `v05 train` in two ranks. They must not shut down their interpreters in the end: gloo's threads sometimes abort that."""
    command = folder / "command.py"
    command.write_text("import atexit, os, runpy; atexit.register(os.abort); runpy.run_module('v05', run_name='__main__')")
    return torchrun(command, "train", "--config", folder / f"{name}.json", "--out", out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of two ranks in FOLDER/NAME, the runs of one process in FOLDER/NAME-alone, and the output and exit status of the two
    ranks.
    """
    folder = tmp_path_factory.mktemp("ranks")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(config.model_dump_json())
        list(Trainer(config, folder / f"{name}-alone", lambda line: None).run())
    result = torchrun(Path(rank_script.__file__), folder)
    (folder / "output").write_text(result.stdout + result.stderr)
    (folder / "status").write_text(str(result.returncode))
    return folder


def comparable(directory):
    """Records without times and without the engine's load: with two ranks, each engine has fewer rollouts in flight."""
    return [{k: v for k, v in record.items() if k != "in_flight"} for record in untimed(directory)]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key in ROUNDED and a[key] is not None:
                assert math.isclose(a[key], b[key], rel_tol=ROUNDED[key], abs_tol=1e-6), (a, b)
            else:
                assert a[key] == b[key], (a, b)


def steps(directory):
    return [record for record in untimed(directory) if record["kind"] == "step"]


@pytest.mark.parametrize("name", [name for name in rank_script.NAMES if not name.startswith("bfloat16")])
def test_two_ranks_train_as_one_process(name, folder):
    assert (folder / name / "result.json").exists(), (folder / "output").read_text()
    assert_same(comparable(folder / name), comparable(folder / f"{name}-alone"))
    assert len(steps(folder / name)) >= 4
    if name == "refills":
        assert any(record["thrown_away"] for record in steps(folder / name))
        assert any(record["spent"] % 32 for record in steps(folder / name))  # some steps have one prompt for two ranks
    if name == "calibrated":
        assert len({record["calibration_alpha"] for record in steps(folder / name)}) > 2  # the fit changes, and equally on both
    results = [json.loads((folder / run / "result.json").read_text()) for run in (name, f"{name}-alone")]
    assert results[0]["heldout_successes"] == results[1]["heldout_successes"]


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-fsdp2"])
def test_two_ranks_in_bfloat16_train_as_one_process_within_its_rounding(name, folder):
    """Matrix products of other shapes round differently, and soon a token changes."""
    ranks, alone = steps(folder / name), steps(folder / f"{name}-alone")
    assert ranks[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=2e-3)
    assert ranks[0]["loss"] == pytest.approx(alone[0]["loss"], rel=2e-3)
    for a, b in zip(ranks[:4], alone[:4], strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)
    assert (folder / name / "result.json").exists()


def test_a_rank_that_raises_ends_the_job(folder):
    assert int((folder / "status").read_text()) != 0
    assert "rank 1 has had enough" in (folder / "output").read_text()
    assert not (folder / "torn" / "result.json").exists()
    assert find_checkpoints(folder / "torn")


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_two_ranks_began_goes_on(ranks, folder):
    torn = folder / f"torn-{ranks}"
    shutil.copytree(folder / "torn", torn)
    taken = int(find_checkpoints(torn)[-1].name.removeprefix("checkpoint-"))
    assert 0 < taken < len(steps(folder / "torn-alone"))
    if ranks == 2:
        result = train(folder, "torn", torn)
        assert result.returncode == 0, result.stderr
        output = result.stdout + result.stderr
        assert output.count("held-out accuracy") >= 1
        assert output.count("; written to") == 1  # only one rank reports it
    else:
        lines = []
        list(Trainer(CONFIGS["torn"], torn, lines.append).run())
        output = lines[0]
    assert f"resuming from step {taken}, " in output
    assert_same(comparable(torn), comparable(folder / "torn-alone"))
    assert len(read_metrics(torn, "step")) == json.loads((torn / "result.json").read_text())["steps"]


def test_ranks_that_fail_say_how(tmp_path):
    config = run_config("smoke", "v05", engine={"kind": "ray"})
    (tmp_path / "ray.json").write_text(config.model_dump_json())
    result = train(tmp_path, "ray", tmp_path / "out")
    assert "under torchrun use 'transformers'" in result.stdout + result.stderr
    assert "exitcode  : 2" in result.stderr
    assert "SIGABRT" not in result.stderr


def test_other_engines_serve_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("v05.train.trainer.join_world", lambda: World(rank=1, size=2))
    with pytest.raises(ValueError, match=r"engine\.kind='ray' samples for one process; under torchrun use 'transformers'"):
        Trainer(run_config("smoke", "v05", engine={"kind": "ray"}), tmp_path, lambda line: None)


@pytest.mark.parametrize(
    ("ranks", "devices", "backend", "device"),
    [(2, 0, "gloo", None), (2, 2, "cpu:gloo,cuda:nccl", 1), (2, 1, "cpu:gloo,cuda:gloo", 0), (4, 8, "cpu:gloo,cuda:nccl", 1)],
)
def test_ranks_that_share_a_gpu_do_without_nccl(ranks, devices, backend, device, monkeypatch):
    taken, begun = [], []
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: begun.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert join_world() == World(1, ranks)
    assert begun == [backend]
    assert taken == ([] if device is None else [device])
