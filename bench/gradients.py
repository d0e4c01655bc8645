"""Samples rollouts of a policy, computes the exact energy of each, and caches both. Also measures baselines on them.

The energy E of a rollout is the squared norm of the gradient of its log-probability with respect to all parameters; each needs a
backward pass. If a baseline b does not depend on the rollout, (r - b) times that gradient is an unbiased estimate, and its second
moment is E[(r - b)^2 E]. This is the variance of a rollout's gradient plus its squared mean, which is the same for all such
baselines and far smaller.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy.optimize import minimize
from scipy.special import expit, logit

from v05.energy import completion_energy
from v05.machine import cache_root
from v05.rollout import Completion, Request, generate
from v05.rollout.scoring import completion_logprobs
from v05.rollout.transformers_engine import TransformersEngine
from v05.tasks import JsonlConfig, Prompt, Split, make_task
from v05.train.config import RunConfig, read_config
from v05.train.policy import load_policy, policy_folder
from v05.train.presets import PRESETS, given_policy, run_config

FIRST_PROMPT, FIRST_PAST = 1_500_000_000, 1_600_000_000  # numbers of training prompts that no run with a small seed reaches
PAST = 4096  # past rollouts for priors and calibrations to learn from
BEGUN_SUM = "<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n{a} + {b} ="
BLOCK, GRADIENTS = 256, 32  # prompts per forward pass, rollouts per backward pass
RESAMPLES = 2000
LEAST_RATE = 0.005
RESTRAINT = 1e-4  # weight of the penalty on the shift; all rollouts together have weight 1

Array = NDArray[np.float64]
Shift = Callable[[Array], Array]  # the shift of the log-odds as a function of the success rate
Layer = tuple[Any, torch.Tensor, torch.Tensor]  # a module with a weight, its input and its output


@dataclass(frozen=True)
class Sample:
    """k rollouts of each of P prompts.

    Attributes:
        texts: (P,) texts of the prompts.
        rates: (P,) exact success rates, the probabilities of the single right answers.
        rewards: (P, k), 0 or 1.
        lengths: (P, k) numbers of tokens.
        exact, full, proxy: (P, k) energies from backward passes, from the whole distributions, and from the sampled tokens only.
        signal: () squared norm of the policy's gradient, estimated by the product of two independent gradient estimates, one from
            the even prompts and one from the odd prompts.
    """

    texts: NDArray[np.str_]
    rates: Array
    rewards: Array
    lengths: Array
    exact: Array
    full: Array
    proxy: Array
    signal: Array


@dataclass(frozen=True)
class Tokens:
    """k rollouts of each of P prompts, token by token; T is the longest length.

    Attributes:
        rates, rewards, lengths: as in `Sample`.
        products: (P, k, T, T) inner products of the gradients of two tokens' log-probabilities; 0 past the end.
        full: (P, k, T) energies of tokens from the whole distributions.
    """

    rates: Array
    rewards: Array
    lengths: Array
    products: Array
    full: Array


@dataclass(frozen=True)
class Past:
    """Past rollouts of a policy on other prompts, for priors and calibrations to learn from.

    Attributes:
        texts: (P,) texts of the prompts.
        rates: (P,) exact success rates.
        rewards: (P, K), 0 or 1. For each group size k, the first PAST / k prompts have at least k rollouts; missing rollouts are
            NaN.
        energies: (P, K) energies from the whole distributions, likewise NaN where missing.
    """

    texts: NDArray[np.str_]
    rates: Array
    rewards: Array
    energies: Array


def sampled(policy: str, prompts: int, rollouts: int, cache: Path) -> Sample:
    """A sample of a policy, read from `cache` if it is there.

    `policy` names a preset (its warm start), the directory of a run (its last policy), or the folder of an instruct model (on
    `begun_sums`).
    """
    return Sample(**_cached(policy, f"gradients-{{}}-{prompts}x{rollouts}", cache, lambda *of: _sample(*of, prompts, rollouts)))


def rollouts_before(policy: str, sizes: tuple[int, ...], cache: Path, count: int = PAST) -> Past:
    """`count` past rollouts in groups of each of the sizes, with shared prompts; `policy` and `cache` are as in `sampled`."""
    name = f"past-{{}}-{'-'.join(map(str, sizes))}{'' if count == PAST else f'-{count}'}"
    return Past(**_cached(policy, name, cache, lambda *of: _past(*of, sizes, count)))


def sampled_tokens(policy: str, prompts: int, rollouts: int, cache: Path) -> Tokens:
    """Rollouts of a policy token by token; `policy` and `cache` are as in `sampled`."""
    return Tokens(**_cached(policy, f"tokens-{{}}-{prompts}x{rollouts}", cache, lambda *of: _tokens(*of, prompts, rollouts)))


def default_cache() -> Path:
    return cache_root() / "energies"


def _cached(policy: str, name: str, cache: Path, found: Callable[[RunConfig, Path], Sample | Tokens | Past]) -> dict[str, Any]:
    """The cached fields of the dataclass that `found` returns for a policy. `name` has a placeholder for the weights' hash."""
    if policy in PRESETS:
        config = run_config(policy, "none")
        folder = policy_folder(config.policy, config.task, make_task(config.task), print)
    elif (Path(policy) / "policy").is_dir():
        config, folder = read_config(Path(policy) / "config.json"), Path(policy) / "policy"
    else:
        config, folder = begun_sums(Path(policy), cache), Path(policy)
    weights = hashlib.blake2b((folder / "model.safetensors").read_bytes(), digest_size=8).hexdigest()
    path = cache / f"{name.format(weights)}.npz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial.npz")
        np.savez(scratch, **asdict(found(config, folder)))
        scratch.replace(path)
    with np.load(path) as columns:
        return dict(columns)


def begun_sums(model: Path, cache: Path) -> RunConfig:
    """Sums of two digits whose answer is begun, in the chat format of SmolLM2.

    A completion has three tokens. It counts as right if it is the reference answer, a space and two digits. Other right
    completions, such as a line break and the digits, are rare.
    """
    numbers = itertools.product(range(10, 50), range(10, 50))
    rows = [{"prompt": BEGUN_SUM.format(a=a, b=b), "answer": f" {a + b}"} for a, b in numbers]
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "begun_sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = JsonlConfig(path=cache / "begun_sums.jsonl")
    return run_config("smoke", "none", task=task, policy=given_policy("smoke", model, max_new_tokens=3))


def _tokens(config: RunConfig, folder: Path, prompts: int, rollouts: int) -> Tokens:
    task = make_task(config.task)
    model, tokenizer = load_policy(folder)
    drawn = [prompt for _, prompt in itertools.islice(task.prompts("train", start=FIRST_PROMPT), prompts)]
    asked = [tuple(tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in drawn]
    engine = TransformersEngine(model, tokenizer, max_new_tokens=config.policy.max_new_tokens)
    requests = [Request(tokens, i * rollouts + j) for i, tokens in enumerate(asked) for j in range(rollouts)]
    completions = generate(engine, requests)
    rewards = np.array([task.verify(drawn[i // rollouts], engine.decode(c)) for i, c in enumerate(completions)], dtype=np.float64)
    lengths = np.array([len(c.tokens) for c in completions])
    width = int(lengths.max())
    full, products = np.zeros((len(completions), width)), np.zeros((len(completions), width, width))
    for row, completion in enumerate(completions):
        assert completion.sum_pi_squared is not None
        of_tokens = zip(completion.logprobs, completion.sum_pi_squared, strict=True)
        full[row, : lengths[row]] = [completion_energy([logprob], np.array([squares])) for logprob, squares in of_tokens]
    for row, found in enumerate(token_products(model, [r.prompt for r in requests], completions)):
        products[row, : lengths[row], : lengths[row]] = found
    by_prompt = (values.reshape(prompts, rollouts, *values.shape[1:]) for values in (rewards, lengths, products, full))
    return Tokens(answer_probabilities(model, tokenizer, drawn, asked, config.policy.max_new_tokens), *by_prompt)


def _past(config: RunConfig, folder: Path, sizes: tuple[int, ...], count: int) -> Past:
    task = make_task(config.task)
    model, tokenizer = load_policy(folder)
    drawn = [prompt for _, prompt in itertools.islice(task.prompts("train", start=FIRST_PAST), count // min(sizes))]
    asked = [tuple(tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in drawn]
    engine = TransformersEngine(model, tokenizer, max_new_tokens=config.policy.max_new_tokens)
    places = [(i, j) for i in range(len(drawn)) for j in range(max(k for k in sizes if i < count // k))]
    completions = generate(engine, [Request(asked[i], i * max(sizes) + j) for i, j in places])
    rewards, energies = np.full((2, len(drawn), max(sizes)), np.nan)
    for (i, j), completion in zip(places, completions, strict=True):
        rewards[i, j] = task.verify(drawn[i], engine.decode(completion))
        energies[i, j] = completion.energy
    rates = answer_probabilities(model, tokenizer, drawn, asked, config.policy.max_new_tokens)
    return Past(np.array([p.text for p in drawn]), rates, rewards, energies)


def _sample(config: RunConfig, folder: Path, prompts: int, rollouts: int) -> Sample:
    task = make_task(config.task)
    model, tokenizer = load_policy(folder)
    # A file's training prompts may be among the past rollouts.
    split: Split = "heldout" if isinstance(config.task, JsonlConfig) else "train"
    drawn = [prompt for _, prompt in itertools.islice(task.prompts(split, start=FIRST_PROMPT), prompts)]
    asked = [tuple(tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in drawn]
    engine = TransformersEngine(model, tokenizer, max_new_tokens=config.policy.max_new_tokens)
    requests = [Request(tokens, i * rollouts + j) for i, tokens in enumerate(asked) for j in range(rollouts)]
    completions = generate(engine, requests)
    columns: dict[str, Any] = {
        "rewards": [task.verify(drawn[i // rollouts], engine.decode(c)) for i, c in enumerate(completions)],
        "lengths": [len(c.tokens) for c in completions],
        "full": [c.energy for c in completions],
        "proxy": [completion_energy(c.logprobs) for c in completions],
    }
    rates = answer_probabilities(model, tokenizer, drawn, asked, config.policy.max_new_tokens)
    surprise = np.array(columns["rewards"]) - np.repeat(rates, rollouts)
    half_of = np.repeat(np.arange(prompts) % 2, rollouts)
    columns["exact"], sums = squared_gradients(model, [r.prompt for r in requests], completions, surprise, half_of)
    signal = np.array(sums[0] @ sums[1] * (2 / len(requests)) ** 2)
    matrices = {name: np.array(values, dtype=np.float64).reshape(-1, rollouts) for name, values in columns.items()}
    error = np.sqrt((rates * (1 - rates)).sum() / rollouts) / prompts
    off = matrices["rewards"].mean() - rates.mean()
    if abs(off) > 4 * error:
        raise RuntimeError(f"{folder}: rewards are {off:+.4f} off the probability of the answers; some prompt has several")
    return Sample(texts=np.array([p.text for p in drawn]), rates=rates, signal=signal, **matrices)


def squared_gradients(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Completion],
    factors: Array,
    half_of: NDArray[np.int64],
) -> tuple[Array, Array]:
    """Squared norms and weighted sums of the gradients of completions' log-probabilities with respect to all parameters.

    Returns (N,) squared norms of N completions, and (2, parameters) sums of the gradients times (N,) factors over the rows of each
    half. The gradient of a weight is a sum over positions of outer products of the layer's input and the gradient of the layer's
    output. One backward pass gives both for a whole batch, and the squared norm of such a sum needs only inner products.
    """
    found = []
    sums = [torch.zeros(2, parameter.numel(), dtype=torch.float64) for parameter in model.parameters()]
    with _kept_layers(model) as kept:
        for first in track(range(0, len(prompts), GRADIENTS), "exact energies"):
            rows = [(*p, *c.tokens.tolist()) for p, c in zip(prompts[first:][:GRADIENTS], completions[first:], strict=False)]
            width = max(map(len, rows))  # padding on the right is harmless because attention is causal
            tokens = torch.tensor([(*row, *[0] * (width - len(row))) for row in rows], device=model.device)
            mask = torch.zeros(len(rows), width - 1, device=model.device)
            for row, (prompt, whole) in enumerate(zip(prompts[first:], rows, strict=False)):
                mask[row, len(prompt) - 1 : len(whole) - 1] = 1
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            (torch.log_softmax(logits, dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2) * mask).sum().backward()
            here = slice(first, first + len(rows))
            scaled = torch.from_numpy(factors[here]).to(logits)[:, None, None]
            halves_here = [torch.from_numpy(half_of[here] == half).to(model.device) for half in (0, 1)]
            energies = torch.zeros(len(rows), dtype=torch.float64)
            for parameter, total in zip(model.parameters(), sums, strict=True):
                left, right = _outer_products(parameter, kept)
                energies += ((left @ left.mT) * (right @ right.mT)).sum((1, 2)).double().cpu()
                left = left * scaled
                for half, chosen in zip(total, halves_here, strict=True):
                    half += (left[chosen].flatten(0, 1).T @ right[chosen].flatten(0, 1)).flatten().double().cpu()
            found.append(energies.clamp(min=0).numpy())  # rounding may give small negative values
    return np.concatenate(found), torch.cat(sums, dim=1).numpy()


def token_products(model: Any, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion]) -> Iterator[Array]:
    """(L, L) inner products of the gradients of the L tokens' log-probabilities, for each completion, in all parameters."""
    with _kept_layers(model) as kept:
        for prompt, completion in track(list(zip(prompts, completions, strict=True)), "products of tokens' gradients"):
            length = len(completion.tokens)
            tokens = torch.tensor([(*prompt, *completion.tokens.tolist())] * length, device=model.device)
            places = torch.arange(length, device=model.device)
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[:, len(prompt) - 1 :]
            logprobs = torch.log_softmax(logits, dim=-1).gather(2, tokens[:, len(prompt) :, None]).squeeze(2)
            logprobs[places, places].sum().backward()  # one token in each row
            products = torch.zeros(length, length, dtype=torch.float64)
            for parameter in model.parameters():
                left, right = (side.flatten(0, 1) for side in _outer_products(parameter, kept))
                both = (left @ left.T) * (right @ right.T)
                products += both.reshape(length, len(both) // length, length, -1).sum((1, 3)).double().cpu()
            yield products.numpy()


@contextmanager
def _kept_layers(model: Any) -> Iterator[list[Layer]]:
    """Yields a list that every forward pass fills with the layers that have weights, their inputs and their outputs.

    A backward pass then computes the gradients of the outputs, but not of the weights.
    """
    kept: list[Layer] = []

    def keep(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.requires_grad_()
        output.retain_grad()
        kept.append((layer, inputs[0], output))

    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    hooks.append(model.register_forward_pre_hook(lambda *_: kept.clear()))
    model.requires_grad_(False)
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _outer_products(parameter: torch.Tensor, kept: list[Layer]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, O) and (B, S, I) factors. Their outer products, summed over S, are each row's gradient of an (O, I) weight."""
    lefts, rights = [], []
    for layer, came, left in kept:
        if layer.weight is not parameter:
            continue
        if getattr(layer, "bias", None) is not None:
            raise ValueError(f"{layer} has a bias, whose gradient is not computed here; give a policy without biases")
        gradient = left.grad
        assert gradient is not None
        if isinstance(layer, torch.nn.Embedding):
            lefts.append(torch.nn.functional.one_hot(came, layer.num_embeddings).to(gradient.dtype))
            rights.append(gradient)
        elif isinstance(layer, torch.nn.Linear):
            lefts.append(gradient)
            rights.append(came.detach())
        else:  # a norm layer multiplies by its weight
            lefts.append((gradient * left.detach() / parameter).flatten(1, -2).sum(1, keepdim=True))
            rights.append(torch.ones_like(lefts[-1][..., :1]))
    return torch.cat(lefts, dim=1), torch.cat(rights, dim=1)  # a tied embedding has two parts


@torch.no_grad()
def answer_probabilities(model: Any, tokenizer: Any, prompts: list[Prompt], asked: list[tuple[int, ...]], longest: int) -> Array:
    """(P,) probabilities of the reference answers, with the end token if it fits into the `longest` tokens of a completion."""
    answers = [[*tokenizer(p.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:longest] for p in prompts]
    rates = []
    for first in range(0, len(prompts), BLOCK):
        block = [Completion(np.array(a), np.zeros(len(a), dtype=np.float32), True) for a in answers[first : first + BLOCK]]
        logprobs = completion_logprobs(model, asked[first : first + BLOCK], block, tokenizer.pad_token_id).double()
        rates += [float(row[: len(c.tokens)].sum().exp()) for row, c in zip(logprobs, block, strict=True)]
    return np.clip(rates, 0.0, 1.0)


def shift_weighted(rates: Array, rewards: Array, energies: Array) -> Shift:
    """The shift from a logistic regression of rewards on (1, log(1 - rate)), with the log-odds of the rate as offset.

    Rollouts are weighted by energy, because the energy-weighted mean reward is the baseline with the least E[(r - b)^2 E].
    """
    weights = energies / energies.sum()

    def loss(theta: Array) -> float:
        log_odds = logit(rates) + theta[0] + theta[1] * np.log1p(-rates)
        return float(weights @ (np.logaddexp(0.0, log_odds) - rewards * log_odds) + RESTRAINT * theta @ theta)

    level, slope = minimize(loss, np.zeros(2)).x
    return lambda rates: level + slope * np.log1p(-rates)


def optimal_baselines(sample: Sample, energies: Array, fit: Callable[[Array, Array, Array], Shift] = shift_weighted) -> Array:
    """(P, 1) exact success rates with shifted log-odds. The shift of each half of the prompts is fitted to the other half."""
    rates = np.clip(sample.rates, LEAST_RATE, 1 - LEAST_RATE)
    each = np.broadcast_to(rates[:, None], energies.shape)
    found = np.zeros_like(rates)
    for mine, others in halves(len(rates)):
        shift = fit(each[others].ravel(), sample.rewards[others].ravel(), energies[others].ravel())
        found[mine] = expit(logit(rates[mine]) + shift(rates[mine]))
    return found[:, None]


def halves(prompts: int) -> tuple[tuple[NDArray[np.bool_], NDArray[np.bool_]], ...]:
    """Two pairs of (P,) bool masks: one half of the prompts and the other, then the same in reverse."""
    even = np.arange(prompts) % 2 == 0
    return (even, ~even), (~even, even)


def ratio(terms: Array, reference: Array, rng: np.random.Generator) -> tuple[float, float, float]:
    """The sum of (P,) terms divided by that of the reference, and its 95 % bootstrap interval over prompts."""
    rows = rng.integers(len(terms), size=(RESAMPLES, len(terms)))
    low, high = np.percentile(terms[rows].sum(axis=1) / reference[rows].sum(axis=1), (2.5, 97.5))
    return float(terms.sum() / reference.sum()), float(low), float(high)
