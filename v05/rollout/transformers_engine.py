"""The embedded engine: continuous batched sampling, with a key-value cache, from a transformers model in this process.

Finished rollouts leave the batch, and waiting ones join it every few tokens, so no rollout waits for the longest to finish. A
prompt is read once for all of its rollouts that join together. Random numbers are a function of the rollout's seed and the position
in its completion, so the other rollouts in a batch affect a rollout only through rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from v05.rollout import Completion, Failure, NotFiniteError, Request, decode, refuse_update_in_flight
from v05.rollout.batch import Batch, Ends, RowBatch
from v05.rollout.limits import positions_of, refuse_prompt, stop_tokens
from v05.rollout.sampling import Sampler
from v05.rollout.scoring import completion_logprobs
from v05.rollout.slots import SlotBatch, fits_slots
from v05.rollout.time_steps import bounded_mixers, bounded_time_steps

# A join reads prompts and copies caches, and costs about as much as a token, however few rollouts join. Joins are therefore at
# least
# this many tokens apart, unless the batch is empty. Short completions are then sampled batch by batch, and long ones wait little.
JOIN_EVERY = 16
CHECKED_PROMPTS = (4, 2, 7)  # prompt lengths of the self-check: two start, and two copies of the third join them
CHECKED_TOKENS = 4  # completion length of the self-check
# Relative differences of log-probabilities that count as rounding in the self-check: at least ten times those of correct models.
ROUNDING = {torch.float32: 3e-4, torch.float16: 0.1, torch.bfloat16: 0.25}
ROUNDING_TF32 = 0.03


class TransformersEngine:
    """Samples from `model`. The engine reads its weights at every call, so a trainer of the same model need not copy them.

    Args:
        model: a causal language model. Completions end at the same tokens as with its `generate`.
        tokenizer: its tokenizer.
        max_new_tokens: longest completion in tokens, including its end-of-sequence token.
        capacity: rollouts sampled at the same time.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample only from the likeliest tokens that together have this probability.

    Raises:
        ValueError: no token ends a completion, or `check_sampling` refuses the model. `submit` raises it for a prompt that does not
            fit.
        NotFiniteError: the model's log-probabilities are not finite. `poll` raises it too.
    """

    reproducible = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        capacity: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        self.capacity = capacity
        self._model = model
        self._tokenizer = tokenizer
        self._pad: int = tokenizer.pad_token_id
        ends = Ends(stop_tokens(tokenizer, model.generation_config), max_new_tokens)
        if self._pad is None:
            self._pad = ends.stops[0]
        self._max_new_tokens = max_new_tokens
        self._positions = positions_of(model.config)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._since_join = 0  # tokens
        self._bounded_mixers = bounded_mixers(model)
        with self._reading():
            kind = check_sampling(model, self._pad)
        self._make_batch = partial(kind, model, self._pad, ends, Sampler(temperature, top_p))
        self._batch = self._make_batch()

    def decode(self, completion: Completion) -> str:
        return decode(self._tokenizer, completion)

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        for request in requests:
            refuse_prompt(len(request.prompt), self._max_new_tokens, self._positions)
        self._waiting.extend(zip(keys, requests, strict=True))

    @torch.no_grad()
    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        finished: list[tuple[int, Completion | Failure]] = []
        with self._reading():
            while not finished and (self._waiting or len(self._batch)):
                self._join()
                try:
                    finished += self._batch.step()
                except NotFiniteError:
                    self._batch = self._make_batch()  # the rest of this batch may not be finite either
                    raise
        return finished

    @torch.no_grad()
    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        refuse_update_in_flight(bool(len(self._batch) or self._waiting))
        mine = self._model.state_dict()
        for name, tensor in state:
            if name not in mine or mine[name].shape != tensor.shape:
                raise ValueError(
                    f"update_weights: {name} of shape {tuple(tensor.shape)} does not fit the engine's model; give its own"
                )
            mine[name].copy_(tensor)

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Inside the block, the model is in evaluation mode, and time steps are bounded as in passes over several tokens."""
        was_training = self._model.training
        if was_training:
            self._model.eval()
        try:
            with bounded_time_steps(self._bounded_mixers):
                yield
        finally:
            if was_training:
                self._model.train()

    def _join(self) -> None:
        """Let waiting rollouts join the batch, if there is room and the last join is `JOIN_EVERY` tokens ago or the batch is
        empty."""
        joining = min(len(self._waiting), self.capacity - len(self._batch))
        if joining and (len(self._batch) == 0 or self._since_join >= JOIN_EVERY):
            self._since_join = 0
            self._batch.join(*zip(*(self._waiting.popleft() for _ in range(joining)), strict=True))
        self._since_join += self._batch.look_every


@torch.no_grad()
def check_sampling(model: PreTrainedModel, pad: int) -> type[Batch]:
    """The kind of batch that samples correctly from the model: `SlotBatch` if possible, else `RowBatch`.

    It is not known in advance whether the engine keeps the state of a new architecture correctly. Completions of a few random
    prompts are therefore sampled, and their log-probabilities, both as sampled and as computed in training, are compared with those
    of a plain forward pass.

    Raises:
        ValueError: the log-probabilities differ by more than rounding; the message names the architecture.
        NotFiniteError: the plain pass gives log-probabilities that are not finite.
    """
    text = model.config.get_text_config(decoder=True)
    if (positions_of(text) or sys.maxsize) < max(CHECKED_PROMPTS) + CHECKED_TOKENS:
        return RowBatch  # a toy model, too short for the check
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(text.vocab_size, size=n).tolist()) for n in CHECKED_PROMPTS]
    prompts.append(prompts[-1])
    if not all(_plain_logits(model, prompt).isfinite().all() for prompt in prompts):
        raise NotFiniteError(
            "the policy is not finite: a pass over random tokens gives no log-probabilities; its weights have diverged, are "
            f"damaged, or overflow in {model.dtype}"
        )
    if fits_slots(model) and _fault(SlotBatch, model, pad, prompts) is None:
        return SlotBatch
    fault = _fault(RowBatch, model, pad, prompts)
    if fault is not None:
        raise ValueError(
            f"model_type={text.model_type!r}: the embedded engine cannot keep this architecture's state from token to token "
            f"({fault}); give a policy with another architecture"
        )
    return RowBatch


def _fault(kind: type[Batch], model: PreTrainedModel, pad: int, prompts: Sequence[tuple[int, ...]]) -> str | None:
    """What is wrong with the log-probabilities of completions that this kind of batch samples, as text; None if they are
    correct."""
    try:
        completions = _probes(kind(model, pad, Ends((), CHECKED_TOKENS), Sampler()), prompts)
        trained = completion_logprobs(model, prompts, completions, pad)
    except Exception as error:
        return repr(error)
    largest = 0.0
    for prompt, completion, row in zip(prompts, completions, trained, strict=True):
        logits = _plain_logits(model, (*prompt, *completion.tokens.tolist()))[len(prompt) - 1 : -1]
        tokens = torch.from_numpy(completion.tokens).to(model.device)[:, None]
        expected = torch.log_softmax(logits, dim=-1).gather(-1, tokens).squeeze(-1)
        both = torch.stack((torch.from_numpy(completion.logprobs).to(row), row[: len(expected)]))
        difference = float(((both - expected).abs() / (1 + expected.abs())).max())
        largest = difference if not difference <= largest else largest  # so that NaN counts as the largest
    if largest <= _rounding(model):
        return None
    return f"log-probabilities differ from a plain forward pass by up to {largest:.2g}"


def _plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """(L, V) float32 logits of one sequence, computed without a cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
    return logits.float()


def _probes(batch: Batch, prompts: Sequence[tuple[int, ...]]) -> list[Completion]:
    """One completion per prompt, sampled as the engine does: two start, the others join halfway and continue when the first have
    ended."""
    batch.look_every = 1
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    found: dict[int, Completion] = {}
    batch.join([0, 1], requests[:2])
    for _ in range(CHECKED_TOKENS // 2):
        batch.step()
    batch.join(range(2, len(prompts)), requests[2:])
    while len(batch):
        found |= batch.step()
    return [found[key] for key in range(len(prompts))]


def _rounding(model: PreTrainedModel) -> float:
    """Largest relative difference of log-probabilities that counts as rounding."""
    if model.dtype == torch.float32 and model.device.type == "cuda" and torch.backends.cudnn.allow_tf32:  # convolutions then use it
        return ROUNDING_TF32
    return ROUNDING.get(model.dtype, ROUNDING[torch.float32])
