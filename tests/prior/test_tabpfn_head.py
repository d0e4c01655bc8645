"""TabPFN as a head, with a checkpoint of the right shape and random weights. Needs the package tabpfn."""

import numpy as np
import pytest
import torch

from v05.prior.v0.context import History, Past
from v05.prior.v0.tabpfn_head import TabPFNHead

pytestmark = [pytest.mark.tabpfn, pytest.mark.filterwarnings("default")]
pytest.importorskip("tabpfn", reason="make test-tabpfn installs it")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tabpfn.architectures import ARCHITECTURES

    torch.manual_seed(0)
    settings = {"emsize": 24, "nlayers": 2, "nhead": 2, "max_num_classes": 10, "num_buckets": 10, "features_per_group": 2}
    config, _ = ARCHITECTURES["tabpfn_v2"].parse_config(settings)
    model = ARCHITECTURES["tabpfn_v2"].get_architecture(config)
    path = tmp_path_factory.mktemp("tabpfn") / "tabpfn-v2-classifier.ckpt"
    torch.save({"state_dict": model.state_dict(), "config": settings}, path)
    return path


def task(rates):
    count = len(rates)
    history = History()
    history.add([str(i) for i in range(count)], np.asarray(rates, dtype=float), np.full(count, 8.0))
    views = (torch.randn(count + 5, 12, dtype=torch.float64), torch.zeros(count + 5, 1, dtype=torch.float64))
    return views, history.context(count), Past(*np.zeros((3, 5))), np.full(5, -1)


def test_it_predicts_from_a_local_checkpoint(checkpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(1)
    logits = TabPFNHead(checkpoint, estimators=1).infer(*task(np.linspace(0, 1, 40)))
    assert logits.shape == (5,)
    assert torch.isfinite(logits).all()


def test_what_does_not_fit_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no such file; download a TabPFN classifier checkpoint"):
        TabPFNHead(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="context holds 8 prompts of one class, TabPFN needs both"):
        TabPFNHead(checkpoint).infer(*task(np.ones(8)))
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["emsize"] = 48
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"cannot be used .* give a classifier checkpoint"):
        TabPFNHead(tmp_path / "other.ckpt").infer(*task(np.linspace(0, 1, 40)))
