"""Figures outside the run directory appear once, even after an interruption. The live view shows a run's progress."""

import gc
import io
import json
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.kill_and_resume import smoke
from v05.train.live import LiveView, sparkline
from v05.train.metrics import read_metrics
from v05.train.sinks import TensorBoard, WeightsAndBiases, figures_of, interrupted_later
from v05.train.state import Progress
from v05.train.trainer import Trainer

# The only checkpoint is after the first step, so that all later steps are repeated after an interruption.
CONFIG = smoke(5).model_copy(update={"checkpoint_seconds": 1e6})


def train(directory, sinks, until=None):
    for done, _ in enumerate(Trainer(CONFIG, directory, lambda line: None, sinks).run()):
        if done == until:
            break
    gc.collect()  # releases the directory


def test_tensorboard_shows_every_figure_once(tmp_path):
    train(tmp_path, [TensorBoard(tmp_path)], until=4)
    train(tmp_path, [TensorBoard(tmp_path)])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    compared = 0
    for kind, key in (("step", "accuracy"), ("step", "group_size"), ("evaluation", "entropy"), ("probe", "baseline_mse")):
        points = [(event.step, event.value) for event in shown.Scalars(f"{kind}/{key}")]
        recorded = [(record["rollouts"], record[key]) for record in read_metrics(tmp_path, kind)]
        assert [step for step, _ in points] == [rollouts for rollouts, _ in recorded]
        assert [value for _, value in points] == pytest.approx([value for _, value in recorded])
        compared += len(points)
    assert compared >= 5 + 5 + 3 + 3
    assert {name.partition("/")[0] for name in shown.Tags()["scalars"]} == {"step", "evaluation", "probe", "final"}
    assert not any(name.endswith("/rollouts") for name in shown.Tags()["scalars"])


@pytest.fixture
def heeded():
    """Restores Ctrl-C, which a shell that runs the tests in the background makes them ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_an_interrupt_waits_until_a_figure_has_been_handed_over():
    steps = []
    with pytest.raises(KeyboardInterrupt), interrupted_later():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        steps.append("handed over")
    assert steps == ["handed over"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_figure_may_come_from_any_thread():
    came = []

    def show():
        with interrupted_later():
            came.append(True)

    thread = threading.Thread(target=show)
    thread.start()
    thread.join()
    assert came == [True]


class FakeWandb:
    """Accepts runs and figures as wandb does: figures of the last step are merged, and figures of an earlier step are dropped."""

    def __init__(self):
        self.starts, self.logged, self.finished = [], {}, 0

    def init(self, **settings):
        self.starts.append(settings)
        name = settings["id"] or f"run{len(self.starts)}"
        taken = self.logged.setdefault(name, {})

        def log(figures, step):
            assert all(isinstance(value, float) for value in figures.values())
            if step >= max(taken, default=0):
                taken.setdefault(step, {}).update(figures)

        def finish():
            self.finished += 1

        return SimpleNamespace(id=name, log=log, finish=finish)


def test_weights_and_biases_go_on_under_one_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path, [WeightsAndBiases(tmp_path, "mine", CONFIG)], until=4)
    assert fake.finished == 1  # an interrupted run is finished too
    train(tmp_path, [WeightsAndBiases(tmp_path, "mine", CONFIG)])
    assert fake.finished == 2
    assert [start["id"] for start in fake.starts] == [None, "run1"]
    assert all(start["resume"] == "allow" and start["project"] == "mine" for start in fake.starts)
    assert json.loads(json.dumps(fake.starts[0]["config"]))["method"] == "v05"
    (points,) = fake.logged.values()
    steps = {step: figures["step/accuracy"] for step, figures in points.items() if "step/accuracy" in figures}
    assert steps == {record["rollouts"]: record["accuracy"] for record in read_metrics(tmp_path, "step")}


def test_without_wandb_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb needs the package 'wandb'; install it with: pip install wandb"):
        WeightsAndBiases(tmp_path, "mine", CONFIG)


def test_only_finite_numbers_are_figures():
    values = {"rollouts": 3, "step": 1, "loss": 0.5, "kl": float("nan"), "failure": None, "weights": [1, 2], "unbiased": True}
    assert figures_of("step", values) == {"step/loss": 0.5, "step/unbiased": 1.0}


STATES = [
    Progress(0, 1000, 0, 0.45, float("nan"), 16.0, float("nan")),
    Progress(250, 1000, 0, 0.45, 123.4, 6.25, 0.31),
    Progress(500, 1000, 1, 0.5, 125.0, 5.5, 0.25),
    Progress(1000, 1000, 2, 0.625, 125.0, 5.0, 0.125),
]


def shown(terminal):
    text = io.StringIO()
    with LiveView("v05@4..16, seed 3", Console(file=text, force_terminal=terminal, width=120)) as view:
        for state in STATES:
            view.show(state)
    return text.getvalue()


def test_a_terminal_sees_a_panel():
    text = shown(terminal=True)
    for part in ("v05@4..16, seed 3", "1,000 of 1,000 rollouts", "0.625", "▁▃█", "125", "5.0", "12%"):
        assert part in text, part
    assert "nan" not in text


def test_a_log_sees_a_line_an_evaluation():
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[0] == "0 of 1,000 rollouts: held-out accuracy 0.450, rollouts per prompt 16.0"
    assert lines[1].startswith(
        "500 of 1,000 rollouts: held-out accuracy 0.500, rollouts/s 125, rollouts per prompt 5.5, priors rejected 25%"
    )
    assert lines[2].startswith("1,000 of 1,000 rollouts: held-out accuracy 0.625")


def test_sparkline():
    assert sparkline([0.1]) == sparkline([0.2, 0.2]) == ""
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
