"""Rollouts of a policy with the exact energy of each, kept in a folder, and what baselines make of the gradient on them.

The energy of a rollout is the squared norm of the gradient of its log-probability in all parameters: a backward pass each. With a
baseline that does not look at a rollout, (r - b) times that gradient is unbiased, and E[(r - b)^2 E] is its second moment: the
noise of a rollout's gradient and, the same for all such baselines and far smaller, its squared mean.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
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
from v05.tasks import Prompt, make_task
from v05.train.config import PRESETS, RunConfig, read_config, run_config
from v05.train.policy import load_policy, policy_folder

FIRST_PROMPT = 1_500_000_000  # training prompts that no run with a small seed has read
BLOCK, GRADIENTS = 256, 32  # prompts a forward pass, rollouts a backward pass
RESAMPLES = 2000
LEAST_RATE = 0.005
RESTRAINT = 1e-4  # what the pull to no shift weighs, where all rollouts weigh 1

Array = NDArray[np.float64]
Shift = Callable[[Array], Array]  # of log-odds, by success rate


@dataclass(frozen=True)
class Sample:
    """k rollouts of each of P prompts.

    Attributes:
        texts: (P,) of the prompts.
        rates: (P,) success rates, exact: the probability of the one right answer.
        rewards, lengths: (P, k), of 0 and 1, and tokens.
        exact, full, proxy: (P, k) energies: by backward passes, from the whole distributions, and from sampled tokens alone.
        signal: (), the squared norm of the policy's gradient, as the product of two independent estimates, of the even prompts and
            of the odd ones.
    """

    texts: NDArray[np.str_]
    rates: Array
    rewards: Array
    lengths: Array
    exact: Array
    full: Array
    proxy: Array
    signal: Array


def sampled(policy: str, prompts: int, rollouts: int, cache: Path) -> Sample:
    """Of the warm start of a preset, or of a run's last policy, by its directory; read from `cache` where it is there."""
    if policy in PRESETS:
        config = run_config(policy, "none")
        folder = policy_folder(config.policy, config.task, make_task(config.task), print)
    else:
        config, folder = read_config(Path(policy) / "config.json"), Path(policy) / "policy"
    weights = hashlib.blake2b((folder / "model.safetensors").read_bytes(), digest_size=8).hexdigest()
    path = cache / f"gradients-{weights}-{prompts}x{rollouts}.npz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial.npz")
        np.savez(scratch, **asdict(_sample(config, folder, prompts, rollouts)))
        scratch.replace(path)
    with np.load(path) as columns:
        return Sample(**columns)


def default_cache() -> Path:
    return cache_root() / "energies"


def _sample(config: RunConfig, folder: Path, prompts: int, rollouts: int) -> Sample:
    task = make_task(config.task)
    model, tokenizer = load_policy(folder)
    drawn = [prompt for _, prompt in itertools.islice(task.prompts("train", start=FIRST_PROMPT), prompts)]
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
    rates = answer_probabilities(model, tokenizer, drawn, asked)
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
    """(N,) squared norms of the gradient of each whole completion's log-probability, in all parameters; and (2, parameters) sums of
    the gradients times (N,) factors, over the rows of each half.

    The gradient of a weight is a sum of outer products, one a position, of what came into its layer and the gradient of what left
    it. One backward pass has both for a whole batch, and the squared norm of such a sum needs only their inner products."""
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    kept: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.requires_grad_()
        output.retain_grad()
        kept.append((layer, inputs[0], output))

    model.requires_grad_(False)
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    found = []
    sums = [torch.zeros(2, parameter.numel(), dtype=torch.float64) for parameter in model.parameters()]
    for first in track(range(0, len(prompts), GRADIENTS), "exact energies"):
        rows = [(*p, *c.tokens.tolist()) for p, c in zip(prompts[first:][:GRADIENTS], completions[first:], strict=False)]
        width = max(map(len, rows))  # what follows a completion is never seen by it: attention is causal
        tokens = torch.tensor([(*row, *[0] * (width - len(row))) for row in rows], device=model.device)
        mask = torch.zeros(len(rows), width - 1, device=model.device)
        for row, (prompt, whole) in enumerate(zip(prompts[first:], rows, strict=False)):
            mask[row, len(prompt) - 1 : len(whole) - 1] = 1
        kept.clear()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        (torch.log_softmax(logits, dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2) * mask).sum().backward()
        here = slice(first, first + len(rows))
        scaled = torch.from_numpy(factors[here]).to(logits)[:, None, None]
        halves_here = [torch.from_numpy(half_of[here] == half).to(model.device) for half in (0, 1)]
        energies = torch.zeros(len(rows), dtype=torch.float64)
        for parameter, total in zip(model.parameters(), sums, strict=True):
            pairs = [_outer_products(*layer) for layer in kept if layer[0].weight is parameter]  # two of a tied embedding
            left, right = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
            energies += ((left @ left.mT) * (right @ right.mT)).sum((1, 2)).double().cpu()
            left = left * scaled
            for half, chosen in zip(total, halves_here, strict=True):
                half += (left[chosen].flatten(0, 1).T @ right[chosen].flatten(0, 1)).flatten().double().cpu()
        found.append(energies.clamp(min=0).numpy())  # rounding may leave less
    for hook in hooks:
        hook.remove()
    return np.concatenate(found), torch.cat(sums, dim=1).numpy()


def _outer_products(layer: torch.nn.Module, came: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, O) and (B, S, I), whose outer products, summed over S, are each row's gradient of the (O, I) weight of a layer."""
    if getattr(layer, "bias", None) is not None:
        raise NotImplementedError(f"{layer} has a bias, whose gradient is not counted")
    gradient = left.grad
    assert gradient is not None
    if isinstance(layer, torch.nn.Embedding):
        return torch.nn.functional.one_hot(came, layer.num_embeddings).to(gradient.dtype), gradient
    if isinstance(layer, torch.nn.Linear):
        return gradient, came.detach()
    scaled = (gradient * left.detach() / layer.weight).flatten(1, -2).sum(1)  # a norm, which multiplies by its weight
    return scaled[:, None], torch.ones_like(scaled[:, None, :1])


@torch.no_grad()
def answer_probabilities(model: Any, tokenizer: Any, prompts: list[Prompt], asked: list[tuple[int, ...]]) -> Array:
    """(P,) of the reference answers and the token that ends them."""
    answers = [[*tokenizer(p.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for p in prompts]
    rates = []
    for first in range(0, len(prompts), BLOCK):
        block = [Completion(np.array(a), np.zeros(len(a), dtype=np.float32), True) for a in answers[first : first + BLOCK]]
        logprobs = completion_logprobs(model, asked[first : first + BLOCK], block, tokenizer.pad_token_id).double()
        rates += [float(row[: len(c.tokens)].sum().exp()) for row, c in zip(logprobs, block, strict=True)]
    return np.clip(rates, 0.0, 1.0)


def shift_weighted(rates: Array, rewards: Array, energies: Array) -> Shift:
    """By logistic regression of rewards on (1, log(1 - rate)) beside the log-odds of the rate, rollouts weighed by energy: a
    baseline with the least E[(r - b)^2 E] is the mean reward of rollouts weighed so."""
    weights = energies / energies.sum()

    def loss(theta: Array) -> float:
        log_odds = logit(rates) + theta[0] + theta[1] * np.log1p(-rates)
        return float(weights @ (np.logaddexp(0.0, log_odds) - rewards * log_odds) + RESTRAINT * theta @ theta)

    level, slope = minimize(loss, np.zeros(2)).x
    return lambda rates: level + slope * np.log1p(-rates)


def optimal_baselines(sample: Sample, energies: Array, fit: Callable[[Array, Array, Array], Shift] = shift_weighted) -> Array:
    """(P, 1) the exact success rates, their log-odds shifted; the shift of each half of the prompts is fitted to the other."""
    rates = np.clip(sample.rates, LEAST_RATE, 1 - LEAST_RATE)
    each = np.broadcast_to(rates[:, None], energies.shape)
    found = np.zeros_like(rates)
    for mine, others in halves(len(rates)):
        shift = fit(each[others].ravel(), sample.rewards[others].ravel(), energies[others].ravel())
        found[mine] = expit(logit(rates[mine]) + shift(rates[mine]))
    return found[:, None]


def halves(prompts: int) -> tuple[tuple[NDArray[np.bool_], NDArray[np.bool_]], ...]:
    """(P,) one half and the other, then the other way round."""
    even = np.arange(prompts) % 2 == 0
    return (even, ~even), (~even, even)


def ratio(terms: Array, reference: Array, rng: np.random.Generator) -> tuple[float, float, float]:
    """Sum of (P,) terms over that of the reference's, and its 95 % interval by bootstrap over prompts."""
    rows = rng.integers(len(terms), size=(RESAMPLES, len(terms)))
    low, high = np.percentile(terms[rows].sum(axis=1) / reference[rows].sum(axis=1), (2.5, 97.5))
    return float(terms.sum() / reference.sum()), float(low), float(high)
