"""Trains the residual query adapter on histories of policies. Backbone and head are frozen.

A training task is one version of a policy, with some rows of its context to infer from. The queries are its training prompts and
other rows of its context. The loss is 0.25 times a Bradley-Terry loss over pairs of queries, in which any bias of the context
cancels, plus 0.75 times the cross-entropy (arXiv 2602.03584). A share of the prompts, chosen by a hash of their text, is never
trained on but used for validation. The adapter with the best validation loss is kept, or none if the backbone's own features are as
good.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v05.files import replacing
from v05.prior.v0.adapter import Adapter, joined, save_adapter
from v05.prior.v0.backbone import BATCH, Backbone
from v05.prior.v0.context import Context, Past
from v05.prior.v0.head import InContextHead
from v05.prior.v0.logs import Queries, share
from v05.prior.v0.surface import surface_features

PAIRWISE, POINTWISE = 0.25, 0.75  # weights of the loss terms
CONTEXT, QUERIES = 128, 48  # most context rows of a task, and most queries drawn from the context
VALIDATION_SHARE = 0.25  # share of the prompts used for validation
LEARNING_RATE = 1e-3
STEPS_BETWEEN_VALIDATIONS = 20
LEAST_GAIN = 1e-3  # an adapter is kept if its loss is this far (nats) below that of the backbone's own features

Track = Callable[[Sequence[int], str], Iterable[int]]


def v0_loss(logits: Tensor, rates: Tensor) -> Tensor:
    """0.25 pairwise loss + 0.75 soft cross-entropy of (Q,) log-odds against (Q,) success rates.

    The pairwise loss is the mean of -log sigmoid of the difference of log-odds over pairs whose rates differ, weighted by the
    difference of their rates.
    """
    pointwise = torch.nn.functional.binary_cross_entropy_with_logits(logits, rates)
    margins = (rates[:, None] - rates[None]).clamp(min=0)
    losses = margins * torch.nn.functional.softplus(logits[None] - logits[:, None])
    return PAIRWISE * losses.sum() / margins.sum().clamp(min=1e-9) + POINTWISE * pointwise


class _TokenStates:
    """Token states of all prompts, computed once and kept in half precision."""

    def __init__(self, backbone: Backbone, prompts: Sequence[str], track: Track) -> None:
        ordered = sorted(set(prompts), key=len)
        self._states: dict[str, Tensor] = {}
        for start in track(range(0, len(ordered), BATCH), "reading prompts"):
            part = ordered[start : start + BATCH]
            states, mask = backbone.token_states(part)
            self._states |= {p: s[m].half() for p, s, m in zip(part, states, mask, strict=True)}
        self.pooled = dict(zip(ordered, torch.from_numpy(backbone.features(ordered)), strict=True))
        self.surface = dict(zip(ordered, torch.from_numpy(surface_features(ordered)), strict=True))

    def views(self, prompts: Sequence[str], adapter: Adapter | None) -> tuple[Tensor, Tensor]:
        """The (G, D1) meaning and (G, D2) surface features of G prompts that the head reads."""
        meaning = torch.stack([self.pooled[prompt] for prompt in prompts])
        if adapter is not None:
            kept = [self._states[prompt] for prompt in prompts]
            states = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True).float()
            mask = torch.arange(states.shape[1], device="cpu") < torch.tensor([len(s) for s in kept], device="cpu")[:, None]
            meaning = joined(meaning, adapter(states, mask))
        return meaning.double(), torch.stack([self.surface[prompt] for prompt in prompts])


class _Sample(NamedTuple):
    """Some rows of a context, and Q prompts to predict with their success rates and pasts."""

    context: Context
    prompts: list[str]
    rates: NDArray[np.float64]
    past: Past


def _draw(task: Queries, rng: np.random.Generator, *, validation: bool) -> _Sample | None:
    """A random part of a version. None if it has too few context rows or no queries.

    The queries are all validation prompts or all training prompts. Context rows are never validation prompts.
    """
    context = task.context
    held_out = np.array([share(f"validation {prompt}") < VALIDATION_SHARE for prompt in context.prompts])
    order = rng.permutation(np.flatnonzero(~held_out))
    if validation:
        rows, asked = order[:CONTEXT], np.flatnonzero(held_out)[:CONTEXT]
    else:
        asked, rows = order[:QUERIES], order[QUERIES : QUERIES + CONTEXT]
    if len(rows) < 2 or not len(asked):
        return None
    trained_on = [] if validation or task.setting != "train" else task.rows
    pasts = [
        (getattr(context.past, name)[asked], getattr(task.past, name)[: len(trained_on)]) for name in ("surplus", "trials", "age")
    ]
    return _Sample(
        context[rows],
        [context.prompts[i] for i in asked] + [row.prompt for row in trained_on],
        np.concatenate((context.rate[asked], [row.rate for row in trained_on])),
        Past(*(np.concatenate(parts) for parts in pasts)),
    )


def train_adapter(
    backbone: Backbone, head: InContextHead, tasks: Sequence[Queries], path: Path, *, steps: int, seed: int, track: Track
) -> dict[str, Any]:
    """Train an adapter for `steps` updates and write the best to `path`. Nothing is written if none is better than no adapter.

    The state of the training is kept beside `path` in a .training file. After an interruption, the same call resumes from it. The
    folder of `path` is created if it is missing.

    Returns:
        `before` and `after`: the validation loss in nats without an adapter and with the best one. `kept`: whether an adapter was
        written.

    Raises:
        ValueError: the histories hold too few prompts to train and validate on, or the .training file is damaged or of another run.
        OSError: `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = [task for task in tasks if len(task.context) >= 8]
    states = _TokenStates(
        backbone, [p for task in versions for p in (*task.context.prompts, *(row.prompt for row in task.rows))], track
    )
    rng = np.random.default_rng(seed)
    drawn = [_draw(task, rng, validation=True) for task in versions]
    held_out = [sample for sample in drawn if sample is not None]
    trained_on = [task for task in versions if _draw(task, np.random.default_rng(seed), validation=False) is not None]
    if not held_out or not trained_on:
        needed = round((QUERIES + 2) / (1 - VALIDATION_SHARE))
        raise ValueError(
            f"no version of a policy in the logs holds enough context prompts to train an adapter on (about {needed}); give more"
        )

    def loss_of(sample: _Sample, adapter: Adapter | None) -> Tensor:
        context, rows, rates, past = sample
        views = states.views([*context.prompts, *rows], adapter)
        logits = head.infer(views, context, past, np.full(len(rows), -1))
        return v0_loss(logits, torch.from_numpy(rates).float())

    @torch.no_grad()
    def validate(adapter: Adapter | None) -> float:
        return float(np.mean([loss_of(sample, adapter).item() for sample in held_out]))

    torch.manual_seed(seed)
    adapter = Adapter(backbone.width, backbone.key)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    before = validate(None)
    best, first = before, 0
    resume = path.with_suffix(".training")
    run = [seed, backbone.key, _digest(versions)]
    if resume.is_file():
        try:
            state: dict[str, Any] = torch.load(resume, weights_only=True)
            if state["run"] != run:
                raise ValueError("of another run")
            adapter.load_state_dict(state["adapter"])
            optimizer.load_state_dict(state["optimizer"])
            best, first = float(state["best"]), int(state["step"])
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, UnpicklingError) as error:
            raise ValueError(
                f"{resume} belongs to another training or other logs, or is damaged; delete it, or give another file"
            ) from error
    for step in track(range(first, steps), "adapter"):
        draws = np.random.default_rng((seed, step))
        sample = _draw(trained_on[draws.integers(len(trained_on))], draws, validation=False)
        assert sample is not None  # whether there is a sample depends on the version, not on the draw
        optimizer.zero_grad()
        loss_of(sample, adapter).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % STEPS_BETWEEN_VALIDATIONS == 0 or step + 1 == steps:
            now = validate(adapter)
            if now < min(best, before - LEAST_GAIN):
                best = now
                save_adapter(adapter, path)
            state = {
                "adapter": adapter.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best": best,
                "step": step + 1,
                "run": run,
            }
            _write(state, resume)
    resume.unlink(missing_ok=True)
    return {"before": before, "after": best, "kept": best < before}


def _digest(tasks: Sequence[Queries]) -> str:
    """A hash of the training data: the prompts and rates of all versions."""
    digest = hashlib.sha256()
    for task in tasks:
        rows = [(row.prompt, row.rate, row.trials) for row in task.rows]
        digest.update(repr((task.policy, task.setting, task.context.prompts, rows)).encode())
        digest.update(task.context.rate.tobytes() + task.context.trials.tobytes())
    return digest.hexdigest()


def _write(state: dict[str, Any], path: Path) -> None:
    """Write the file atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as scratch:
        scratch.write_bytes(buffer.getvalue())
