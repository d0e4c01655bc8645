"""Ranks of a job on the device: over NCCL if each has a GPU of its own, over gloo if two share one."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pydantic")

from v05.train.metrics import read_metrics
from v05.train.presets import run_config

pytestmark = pytest.mark.gpu
SEEN_STEPS = 3  # later, rounding has grown enough to change a token
STRATEGIES = ["ddp", "fsdp2"] if torch.cuda.device_count() > 1 else ["ddp"]  # gloo cannot scatter FSDP2's tensors on a GPU
ROUNDED = {"grad_norm": 1e-3, "entropy": 1e-3}  # relative tolerances


def train(folder, name, config, *torchrun):
    (folder / f"{name}.json").write_text(config.model_dump_json())
    command = [sys.executable, *torchrun, "-m", "v05", "train", "--config", f"{folder}/{name}.json", "--out", f"{folder}/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(folder / name, "step"), json.loads((folder / name / "result.json").read_text())


@pytest.mark.parametrize("distributed", STRATEGIES)
def test_two_ranks_train_as_one_process(distributed, cuda, tmp_path):
    config = run_config("smoke", "v05", distributed=distributed)
    alone, result = train(tmp_path, "alone", config)
    two, result_of_two = train(tmp_path, "two", config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert result_of_two["steps"] == result["steps"]
    for one, other in zip(alone[:SEEN_STEPS], two[:SEEN_STEPS], strict=True):
        assert one["spent"] == other["spent"]
        for name, tolerance in ROUNDED.items():
            assert other[name] == pytest.approx(one[name], rel=tolerance)
