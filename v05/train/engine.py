"""The engine and the verifier of a run, and the check that the engine samples from the trainer's policy."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from v05.rollout import NotFiniteError, Request, RolloutEngine, generate
from v05.rollout.rows import read_prompts
from v05.rollout.scoring import completion_logprobs
from v05.rollout.transformers_engine import TransformersEngine
from v05.rollout.verifier import InlineVerifier, Verifier, VerifierPool
from v05.tasks import Task, make_scorer
from v05.train.config import OptimizerConfig, RunConfig
from v05.train.lora import merged_weights
from v05.train.policy import load_policy, load_tokenizer

WORKERS = 2  # verifier processes by default; verifying a formula takes 10 ms, less than sampling the completion


def make_engine(config: RunConfig, folder: Path, directory: Path, model: PreTrainedModel, tokenizer: Any) -> RolloutEngine:
    """The engine of a run.

    The embedded engine samples from `model` itself; the others load a copy from `folder`. A vLLM server receives new weights
    through a folder in the run's `directory`.
    """
    settings = config.engine
    limits = {"max_new_tokens": config.policy.max_new_tokens, "capacity": config.sampling_batch}
    if settings.kind == "transformers":
        return TransformersEngine(model, tokenizer, **limits)
    if settings.kind == "vllm_server":
        from v05.rollout.vllm_engine import VllmServerEngine

        weights = directory / "engine_weights"
        embedding: Any = model.get_input_embeddings()
        limits["vocabulary"] = len(embedding.weight)  # embeddings may be padded beyond the tokenizer's size
        return VllmServerEngine(
            settings.url,
            weights,
            tokenizer,
            generation_config=model.generation_config,
            time_limit=settings.time_limit,
            **limits,
        )
    if settings.kind == "ray":
        from v05.rollout.ray_engine import RayEngine

        in_actor = functools.partial(engine_of_folder, settings.actor_engine, config, folder.resolve(), limits)
        options = {"num_gpus": settings.actor_gpus}
        return RayEngine(in_actor, tokenizer, actors=settings.actors, options=options, time_limit=settings.time_limit)
    return engine_of_folder("vllm", config, folder, limits)


def engine_of_folder(kind: str, config: RunConfig, folder: Path, limits: dict[str, int]) -> RolloutEngine:
    """An engine of `kind` "transformers" or "vllm", with a copy of the policy in `folder`."""
    if kind == "transformers":
        model, tokenizer = load_policy(folder, getattr(torch, config.policy.dtype))
        return TransformersEngine(model, tokenizer, **limits)
    from v05.rollout.vllm_engine import VllmEngine

    settings = config.engine
    return VllmEngine(
        folder,
        load_tokenizer(folder),
        dtype=settings.dtype,
        kv_cache_gib=settings.kv_cache_gib,
        sleep=settings.sleep,
        **limits,
    )


def make_verifier(config: RunConfig, task: Task) -> Verifier:
    """The verifier of a run: inline, or a pool of processes.

    The default is inline for tasks whose verification cannot hang: it takes microseconds, less than the overhead of a pool.
    """
    settings = config.verifier
    workers = settings.workers if settings.workers is not None else WORKERS if task.may_stall else 0
    if workers == 0:
        return InlineVerifier(task)
    make = functools.partial(make_scorer, config.task)
    return VerifierPool(make, workers=workers, time_limit=settings.time_limit, memory_gib=settings.memory_gib)


@torch.no_grad()
def require_finite(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], pad: int) -> None:
    """Raise NotFiniteError unless the largest logit after every prompt is finite."""
    if not read_prompts(model, prompts, pad).logits.amax(-1).isfinite().all():
        raise NotFiniteError("the policy is not finite: the token after a prompt has no log-probability")


@contextlib.contextmanager
def explaining_divergence(optimizer: OptimizerConfig, step: Callable[[], int]) -> Iterator[None]:
    """Add the step and the settings to lower to a NotFiniteError from inside."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(
            f"step {step()}: {error}; start the run over with a lower optimizer.learning_rate ({optimizer.learning_rate:g}) or "
            f"optimizer.max_grad_norm ({optimizer.max_grad_norm:g})"
        ) from error


def sync_weights(engine: RolloutEngine, model: PreTrainedModel, probe: Sequence[Request], pad: int, tolerance: float) -> float:
    """Give `engine` the weights of `model`, sample `probe`, and compare the engine's log-probabilities with the model's own.

    Returns the largest difference, in nats.

    Raises:
        RuntimeError: the difference is above `tolerance`, so the engine samples from another policy.
        NotFiniteError: the model gives no finite log-probabilities.
    """
    require_finite(model, [request.prompt for request in probe], pad)
    engine.update_weights(merged_weights(model))
    completions = generate(engine, probe)
    with torch.no_grad():
        expected = completion_logprobs(model, [request.prompt for request in probe], completions, pad).cpu()
    differences = [
        (row[: len(c.logprobs)] - torch.tensor(c.logprobs, device="cpu")).abs().max()
        for row, c in zip(expected, completions, strict=True)
    ]
    largest = float(torch.stack(differences).max())
    if not largest <= tolerance:
        raise RuntimeError(
            f"engine.tolerance={tolerance}: after a sync, log-probabilities of engine and trainer differ by up to {largest:.3g}; "
            "check that both use the same model; if only their precision differs, raise the tolerance and set loss.importance_cap"
        )
    return largest
