"""`make bench-gpu` without its clock: cases and their gate, floors, results, targets, verl's wheel, and the core built in place."""

import importlib
import os
import runpy
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from v05 import _core, reference
from v05.kernels.advantage import launch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
GROUPWISE = """
import torch
from verl.nowhere import get_device_name
UNREAD = get_device_name
def _resolve_device(explicit: Optional[torch.device]): return torch.device(explicit)
def _to_1d_numpy_object_array(x): return np.asarray(x)
def as_torch_index(index: Any, device: Missing = None):
    return torch.from_numpy(np.unique(_to_1d_numpy_object_array(index), return_inverse=True)[1]).to(_resolve_device(device))
@torch.no_grad()
def group_mean_std(scores, gidx, eps=1e-6, device=None):
    groups = [scores[gidx == g] for g in range(int(gidx.max()) + 1)]
    return torch.stack([x.mean() for x in groups]), torch.stack([x.std() for x in groups]), None
"""
CORE_ALGOS = """
from omegaconf.nowhere import AlgoConfig
@register_adv_est(AdvantageEstimator.GRPO)
def compute_grpo_outcome_advantage(token_level_rewards, response_mask, index: Missing, epsilon=1e-6, config: AlgoConfig = None):
    return compute_grpo_vectorized_outcome_advantage(token_level_rewards, response_mask, index, epsilon)
@register_adv_est(AdvantageEstimator.GRPO_VECTORIZED)
def compute_grpo_vectorized_outcome_advantage(token_level_rewards, response_mask, index, epsilon=1e-6):
    scores, g = token_level_rewards.sum(-1), as_torch_index(index, device=token_level_rewards.device)
    mean, std, _ = group_mean_std(scores, g)
    advantages = ((scores - mean[g]) / (std[g] + epsilon))[:, None] * response_mask
    return advantages, advantages
"""


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/on_gpu, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        names = ("batch", "cases", "clock", "results", "run", "targets")
        yield SimpleNamespace(
            **{name: importlib.import_module(f"on_gpu.{name}") for name in names},
            verl_wheel=importlib.import_module("peers.verl_wheel"),
        )


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "verl-0.9.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("verl/utils/groupwise.py", GROUPWISE)
        archive.writestr("verl/trainer/ppo/core_algos.py", CORE_ALGOS)
    return path


@pytest.fixture
def tiny(bench, monkeypatch):
    """A shape of two groups of four rollouts. With fewer programs the interpreter is faster."""
    monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", 2)
    return bench.batch.Shape(8, 21, 4)


class Timer:
    """Reports that every case took 4 microseconds on the device, and the copy 2."""

    device = torch.device("cpu")

    def __init__(self, copy):
        self.copy, self.calls = copy, 0

    def batches(self, shape):
        return 2

    def measure(self, call, batches, graphed):
        assert len(batches) == 2
        self.calls += 1
        device = [2.0 if call is self.copy else 4.0] * 3 if graphed else []
        return Times(device, [9.0, 30.0, 10.0] if graphed else [], [50.0])


class Times(SimpleNamespace):
    def __init__(self, device, host, whole):
        super().__init__(device=device, host=host, whole=whole)


def test_every_case_is_right_and_timed(bench, tiny, wheel):
    every = bench.cases.cases(lambda function: function) + bench.cases.verl_cases(bench.verl_wheel.estimators(wheel))
    (copy,) = (case.call for case in every if case.name == bench.cases.COPY)
    timer = Timer(copy)
    rows, failures = bench.run.measure_all([(tiny, every)], timer, "some GPU")
    assert failures == []
    assert [row.case for row in rows] == [case.name for case in every]
    assert timer.calls == len(every) == 22
    by_case = {row.case: row for row in rows}
    padded, on_verls = by_case[bench.cases.PADDED], by_case[bench.cases.ON_VERLS]
    assert (padded.device_us, padded.host_us, padded.whole_us, padded.shape) == (4.0, 10.0, 50.0, tiny)
    assert padded.of_copy == pytest.approx(padded.floor_bytes / 4 / (8 * 21 * 8 / 2))
    assert by_case[bench.cases.COPY].of_copy == 1.0
    assert (on_verls.device_us, on_verls.host_us, on_verls.of_copy, on_verls.whole_us) == (None, None, None, 50.0)
    assert padded.device == "some GPU"
    assert padded.torch == torch.__version__


def test_a_case_that_is_wrong_is_not_timed(bench, tiny):
    def copied(batch):
        return batch.out.copy_(batch.source)

    def unwritten(batch):
        batch.out[:-1] = batch.source[:-1]
        return batch.out

    def raises(batch):
        raise RuntimeError("out of memory")

    def wrong(batch):
        return batch.mask * 1.0

    good = bench.cases.Case("good", copied, ("source",), ("out",), None, wanted=lambda b: b.source)
    others = [replace(good, name=call.__name__, call=call) for call in (unwritten, raises, wrong)]
    no_grpo = replace(good, name="no grpo", call=wrong, method="grpo", wanted=None)
    timer = Timer(copied)
    rows, failures = bench.run.measure_all([(tiny, [others[0], others[1], good, others[2], no_grpo])], timer, "some GPU")
    assert [row.case for row in rows] == ["good"]
    assert timer.calls == 1
    assert [line.partition(",")[0] for line in failures] == ["unwritten", "raises", "wrong", "no grpo"]
    assert failures[1] == "raises, 8 x 21, groups of 4: RuntimeError: out of memory"


def test_wrong_statistics_are_noticed(bench, tiny):
    case = bench.cases.cases(lambda function: function)[0]
    truth = bench.cases.Truth(bench.batch.make_batch(tiny, 0, torch.device("cpu")))
    truth.of(case)[1][1] = replace(truth.of(case)[1][1], baseline=0.123)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        bench.cases.refuse_wrong(case, truth)


def test_a_floor_is_what_is_read_and_written_at_least(bench):
    n, t, k = shape = bench.batch.Shape(64, 32, 16)
    batch = bench.batch.make_batch(shape, 0, torch.device("cpu"))
    floors = {case.name: case.floor_bytes(batch) for case in bench.cases.cases(lambda function: function)}
    groups, tokens, packed = n // k, n * t, batch.packed_out.numel()
    small = 4 * n + 8 * (groups + 1) + 8 * groups  # rewards, offsets, prior
    table = 8 * len(_core.STATISTICS) * groups
    assert floors[bench.cases.COPY] == 8 * tokens
    assert floors[bench.cases.FILL] == 4 * tokens
    assert floors[bench.cases.PADDED] == 5 * tokens + small + table
    assert floors[bench.cases.HALF] == 3 * tokens + small + table
    assert floors[bench.cases.PACKED] == 4 * packed + 8 * (n + 1) + small + table
    assert floors[bench.cases.LONG_MASK] == 16 * tokens + small - 4 * n + table
    assert floors[bench.cases.ROLLOUTS] == 4 * n + small + table


def test_a_batch_is_one_batch_in_every_form(bench):
    b = bench.batch.make_batch(bench.batch.Shape(24, 9, 8), 3, torch.device("cpu"))
    assert torch.equal((b.token_rewards * b.mask).sum(1), b.rewards)
    assert torch.equal(b.long_mask, b.mask.long())
    assert torch.equal(b.cu_seqlens.diff(), b.mask.sum(1))
    assert torch.equal(torch.bincount(b.any_ids), b.offsets.diff())
    assert not torch.equal(b.any_ids, b.ids)
    assert len(set(b.uid)) == 3
    assert np.array_equal(np.unique(b.uid, return_inverse=True)[1], b.ids)


def test_batches_do_not_fit_the_cache_together(bench):
    small, large = bench.batch.SHAPES[0], bench.batch.SHAPES[-1]
    cache = 60 << 20
    assert bench.batch.batches_beyond(cache, small) * 5 * small.rollouts * small.tokens >= 4 * cache
    assert bench.batch.batches_beyond(cache, large) == 2


def test_rounds_are_dropped_where_time_is_short(bench):
    assert bench.clock.rounds(25, 1e9, float) == [float(i) for i in range(25)]
    assert bench.clock.rounds(25, 0.0, float) == [0.0, 1.0, 2.0]


def test_times_are_summed_up(bench):
    assert bench.results.summary([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert bench.results.summary([7.0]) == (7.0, 7.0, 7.0)
    assert bench.results.summary([]) == (None, None, None)


def row(bench, case, shape, device_us=10.0, host_us=20.0, whole_us=30.0, of_copy=0.5):
    return bench.results.Row(
        case, *shape, device_us, device_us, device_us, host_us, whole_us, 1, of_copy, "H200", "abc", "2.11", "3.6"
    )


def test_results_are_read_as_they_were_written(bench, tmp_path):
    first, second = bench.batch.SHAPES[:2]
    rows = [row(bench, "a", first), row(bench, "b", second, device_us=None, host_us=None, of_copy=None), row(bench, "a", second)]
    path = tmp_path / "results" / "gpu.csv"
    bench.results.write(rows, path)
    assert bench.results.read(path) == rows
    assert path.read_text().splitlines()[0].endswith(",device,commit,torch,triton")
    assert bench.results.read(tmp_path / "none.csv") == []


def test_the_table(bench):
    first, second = bench.batch.SHAPES[:2]
    rows = [
        row(bench, "padded", first, 16.94, 29.6, of_copy=0.684),
        row(bench, "padded", second, 5.04, 91.2, of_copy=0.951),
        row(bench, "copy", second, 18.4, 11.0, of_copy=1.0),
        row(bench, "verl loop", second, None, None, 225_000.0, None),
    ]
    assert bench.results.table(rows).splitlines() == [
        "| case | 512 x 1024, groups of 8 | 4096 x 2048, groups of 16 |",
        "|---|---|---|",
        "| padded | 16.9 (68%, 30) | 5.0 (95%, 91) |",
        "| copy |  | 18.4 (11) |",
        "",
        "| whole call on 4096 x 2048 of verl's tensors | milliseconds |",
        "|---|---|",
        "| verl loop | 225 |",
        "",
        "`make bench-gpu` at commit abc; H200; torch 2.11, triton 3.6.",
    ]
    page = f"before\n{bench.results.BEGIN}old\n{bench.results.END}after\n"
    replaced = bench.results.replaced(page, rows)
    assert replaced == f"before\n{bench.results.BEGIN}{bench.results.table(rows)}{bench.results.END}after\n"
    with pytest.raises(ValueError, match="gpu begins"):
        bench.results.replaced("before\nafter\n", rows)


def test_the_page_shows_the_results_that_there_are(bench):
    page = (ROOT / "docs" / "speed.md").read_text()
    assert bench.results.replaced(page, bench.results.read()) == page


def measured(bench):
    """Rows a little better than the bounds of the targets, by case and shape."""
    c, targets = bench.cases, bench.targets
    rows = {}
    for shape in bench.batch.SHAPES:
        rows[c.PADDED, shape] = row(bench, c.PADDED, shape, host_us=29.9, of_copy=0.94)
        rows[c.IDS, shape] = row(bench, c.IDS, shape, device_us=14.9, host_us=59.9)
        rows[c.CALIBRATED, shape] = row(bench, c.CALIBRATED, shape, device_us=11.9)
    for case in (c.HALF, c.PACKED):
        rows[case, targets.MIDDLE] = row(bench, case, targets.MIDDLE, of_copy=0.76)
    rows[c.LONG_MASK, targets.MIDDLE] = row(bench, c.LONG_MASK, targets.MIDDLE, device_us=41.9)
    rows[c.ON_VERLS, targets.MIDDLE] = row(bench, c.ON_VERLS, targets.MIDDLE, None, None, 100.0, None)
    rows[c.VERL_VECTORIZED, targets.MIDDLE] = row(bench, c.VERL_VECTORIZED, targets.MIDDLE, None, None, 801.0, None)
    return rows


def test_targets_that_are_met(bench):
    verdicts = bench.targets.verdicts(list(measured(bench).values()))
    assert [met for met, _ in verdicts] == [True] * 11
    assert verdicts[0][1] == "met           v05 padded out=, host's microseconds, worst shape: 29.9, <= 30.0 wanted"


@pytest.mark.parametrize(
    ("case", "shape", "change", "missed"),
    [
        ("PADDED", 3, {"host_us": 30.1}, [0]),
        ("IDS", 4, {"host_us": 60.1}, [1]),
        ("PADDED", 1, {"of_copy": 0.87}, [2]),
        ("PADDED", 3, {"of_copy": 0.92}, [3]),
        ("PADDED", 4, {"of_copy": 0.92}, [4]),
        ("HALF", 1, {"of_copy": 0.74}, [5]),
        ("PACKED", 1, {"of_copy": 0.74}, [6]),
        ("IDS", 1, {"device_us": 15.1}, [7]),
        ("CALIBRATED", 0, {"device_us": 12.1}, [8]),
        ("LONG_MASK", 1, {"device_us": 42.1}, [9]),
        ("VERL_VECTORIZED", 1, {"whole_us": 799.0}, [10]),
    ],
)
def test_a_target_that_is_missed_is_named(bench, case, shape, change, missed):
    rows = measured(bench)
    key = (getattr(bench.cases, case), bench.batch.SHAPES[shape])
    rows[key] = replace(rows[key], **change)
    verdicts = bench.targets.verdicts(list(rows.values()))
    assert [i for i, (met, _) in enumerate(verdicts) if met is not True] == missed
    assert verdicts[missed[0]][1].startswith("NOT met ")
    del rows[key]
    verdicts = bench.targets.verdicts(list(rows.values()))
    assert verdicts[missed[0]][0] is None
    assert verdicts[missed[0]][1].startswith("not measured ")


def test_verl_is_read_out_of_its_wheel(bench, wheel):
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    mask, uid = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]]), np.array(["b", "b", "a", "a"], dtype=object)
    wanted = torch.from_numpy(reference.advantages([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], method="grpo")[0])[:, None] * mask
    for place in (wheel, wheel.parent):
        functions = bench.verl_wheel.estimators(place)
        assert list(functions) == [bench.cases.VERL_VECTORIZED, bench.cases.VERL_LOOP]
        for function in functions.values():
            seen = function(token_level_rewards=rewards, response_mask=mask, index=uid)[0]
            torch.testing.assert_close(seen.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_wheel_that_is_not_verls_is_named(bench, tmp_path):
    with pytest.raises(ValueError, match=r"no wheel verl-\*\.whl; get one with: pip download"):
        bench.verl_wheel.estimators(tmp_path)
    path = tmp_path / "verl-9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("verl/utils/groupwise.py", "def as_torch_index(): pass\n")
    with pytest.raises(ValueError, match="has no function _resolve_device, _to_1d_numpy_object_array, group_mean_std; "):
        bench.verl_wheel.estimators(path)


def test_without_a_gpu_nothing_is_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu_advantage.py", "--write", str(page)])
    runpy.run_path(str(BENCH / "gpu_advantage.py"), run_name="__main__")
    assert capsys.readouterr().out == "no GPU: nothing was timed\n"
    assert not page.exists()


@pytest.fixture
def in_place(monkeypatch, tmp_path):
    """packaging/in_place.py with a fake compiler: its objects are empty, and it links v05's installed core."""
    monkeypatch.syspath_prepend(str(ROOT / "packaging"))
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nfor word; do [ "$before" = -o ] && target="$word"; before="$word"; done\n'
        f'case " $* " in *" -c "*) : > "$target";; *" -shared "*) cp {_core.__file__} "$target";; esac\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return SimpleNamespace(module=importlib.import_module("in_place"), log=log)


def test_the_tree_is_importable_in_place(in_place, tmp_path):
    package = tmp_path / "place" / "v05"
    package.mkdir(parents=True)
    core = package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    (package / "gone.py").symlink_to(ROOT / "v05" / "gone.py")  # left from an earlier tree
    in_place.module.link_sources(package)
    in_place.module.build_core(core, tmp_path / "objects")
    assert not (package / "gone.py").is_symlink()
    path = os.pathsep.join((str(package.parent), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    use = "import v05._core, v05.kernels; from v05.ops import fused_advantage; print(v05.__file__)"
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-S", "-c", use], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{package / '__init__.py'}\n", done.stderr
    words = in_place.log.read_text()
    assert {path.name for path in (ROOT / "csrc").glob("*/*.cpp")} <= {Path(word).name for word in words.split()}
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert all(flag in cmake for flag in ("-ffp-contract=off", "-fno-math-errno", "cxx_std_20"))
    assert all(flag in words for flag in ("-ffp-contract=off", "-fno-math-errno", "-std=c++20", "-fopenmp"))


def test_the_core_is_built_again_when_it_is_out_of_date(in_place, tmp_path, monkeypatch):
    core, objects = tmp_path / "core.so", tmp_path / "objects"

    def compiled():
        before = in_place.log.read_text().count(" -c ") if in_place.log.exists() else 0
        in_place.module.build_core(core, objects)
        return in_place.log.read_text().count(" -c ") - before

    sources = len(list((ROOT / "csrc").glob("*/*.cpp")))
    assert compiled() == sources
    assert compiled() == 0
    monkeypatch.setattr(in_place.module, "FLAGS", (*in_place.module.FLAGS, "-g"))
    assert compiled() == sources


def test_what_a_build_lacks_is_named(in_place, tmp_path, monkeypatch):
    def complaint():
        with pytest.raises(SystemExit) as raised:
            in_place.module.build_core(tmp_path / "core.so", tmp_path / "objects")
        return str(raised.value)

    with monkeypatch.context() as patch:
        patch.setattr(in_place.module.importlib.util, "find_spec", lambda name: None)
        assert complaint().startswith("pybind11's headers were found neither in a package pybind11 nor in torch")
    with monkeypatch.context() as patch:
        patch.setattr(in_place.module.sysconfig, "get_path", lambda name: str(tmp_path))
        assert complaint() == f"no Python.h in {tmp_path}: install the headers of this Python, such as the package python3-dev"
    monkeypatch.setenv("CXX", "false")
    assert complaint().startswith("the C++ core does not build; this command failed:\nfalse -O3")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(in_place.module.shutil, "which", lambda name: None)
    assert complaint() == "no C++ compiler found: install g++ or clang++, or name a compiler in the variable CXX"
