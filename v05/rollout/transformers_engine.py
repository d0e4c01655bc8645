"""The embedded engine: continuous batched sampling with a key-value cache from a transformers model in this process.

Finished rollouts leave the batch after every token and waiting ones join it every few, so none waits for the longest. A prompt is
read once for all its rollouts that join together. Random numbers are a function of the rollout's seed and the position in its
completion, so that what a rollout is batched with changes it only through rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper

from v05.rollout import Completion, Failure, NotFiniteError, Request, decode, refuse_update_in_flight
from v05.rollout.limits import positions_of, refuse_prompt, stop_tokens
from v05.rollout.rows import Rows, read_prompts
from v05.rollout.scoring import completion_logprobs
from v05.rollout.time_steps import bounded_mixers, bounded_time_steps

# A join costs about what a token does, however few join: prompts are read and caches copied. So there is one every so many tokens
# at most, unless nothing is under way: short completions are then sampled batch by batch, and long ones wait little.
JOIN_EVERY = 16
CHECKED_PROMPTS = (4, 2, 7)  # tokens of the prompts of a self-check: two start, the third joins them, twice
CHECKED_TOKENS = 4  # of the completions that start
# Relative differences of log-probabilities that count as rounding in the self-check: ten times what right models show or more.
ROUNDING = {torch.float32: 3e-4, torch.float16: 0.1, torch.bfloat16: 0.25}
ROUNDING_TF32 = 0.03


class TransformersEngine:
    """Samples from `model`, whose weights it reads at every call: a trainer of the same model has nothing to copy.

    Args:
        model: a causal language model. Completions end where its `generate` ends them.
        tokenizer: its tokenizer.
        max_new_tokens: length limit of a completion, its end-of-sequence token included.
        capacity: rollouts sampled at once.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: share of the probability that is sampled from, the likeliest tokens first.

    Raises:
        ValueError: no token ends a completion, or `check_sampling` refuses the model. From `submit`: a prompt does not fit.
        NotFiniteError: from `poll` too.
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
        self._stops = torch.tensor(stop_tokens(tokenizer, model.generation_config), device=model.device)
        self._pad = int(self._stops[0]) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._max_new_tokens = max_new_tokens
        self._positions = positions_of(model.config)
        self._greedy = temperature == 0
        self._warp = LogitsProcessorList()
        if temperature not in (0, 1):
            self._warp.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warp.append(TopPLogitsWarper(top_p))
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rollouts: _Rollouts | None = None
        self._since_join = 0  # tokens
        self._some_greedy = False  # of the rollouts under way
        self._bounded_mixers = bounded_mixers(model)
        with self._reading():
            check_sampling(model, self._pad)

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
            while not finished and (self._waiting or self._rollouts):
                if self._rollouts:
                    self._rollouts.advance(self._model)
                self._join()
                finished += self._sample()
        return finished

    @torch.no_grad()
    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        refuse_update_in_flight(bool(self._rollouts or self._waiting))
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
        """Within, the model is in evaluation mode, and reads a token as it reads several."""
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
        """Let waiting rollouts join the batch, if it is time."""
        self._since_join += 1
        joining = min(len(self._waiting), self.capacity - (len(self._rollouts) if self._rollouts else 0))
        if joining == 0 or (self._rollouts and self._since_join < JOIN_EVERY):
            return
        self._since_join = 0
        keys, requests = zip(*(self._waiting.popleft() for _ in range(joining)), strict=True)
        read = read_prompts(self._model, [r.prompt for r in requests], self._pad)
        self._some_greedy = any(r.greedy for r in requests) or (self._some_greedy and self._rollouts is not None)
        uniforms = _uniforms(np.array([r.seed for r in requests], dtype=np.uint64), self._max_new_tokens)
        device = read.mask.device
        rollouts = _Rollouts(
            keys=torch.tensor(keys, device=device),
            greedy=torch.tensor([r.greedy for r in requests], device=device),
            uniforms=torch.from_numpy(uniforms).to(device),
            tokens=torch.zeros(uniforms.shape, dtype=torch.int64, device=device),
            logprobs=torch.zeros(uniforms.shape, device=device),
            sum_pi_squared=torch.zeros(uniforms.shape, dtype=torch.float64, device=device),
            lengths=torch.zeros(joining, dtype=torch.int64, device=device),
            read=read,
        )
        if self._rollouts:
            self._rollouts.append(rollouts)
        else:
            self._rollouts = rollouts

    def _sample(self) -> list[tuple[int, Completion | Failure]]:
        """Draw every rollout's next token; those that end leave the batch."""
        rollouts = self._rollouts
        assert rollouts is not None
        # transformers annotates its arguments as LongTensor and FloatTensor, which no torch function returns.
        logits: torch.Tensor = self._warp(rollouts.tokens, rollouts.read.logits.float())  # type: ignore[arg-type]
        if self._greedy:
            largest, likeliest = logits.max(-1, keepdim=True)
            # The difference is 0, or NaN where the largest is not finite.
            logits = torch.full_like(logits, -torch.inf).scatter_(1, likeliest, largest - largest)
        log_p = torch.log_softmax(logits, dim=-1)
        at = rollouts.lengths[:, None]
        pi = log_p.double().exp()
        token = _inverse_cdf(pi, rollouts.uniforms.gather(1, at).squeeze(1))
        if self._some_greedy:
            token = torch.where(rollouts.greedy, log_p.argmax(-1), token)
        token = token[:, None]
        logprob = log_p.gather(1, token)
        rollouts.tokens.scatter_(1, at, token)
        rollouts.logprobs.scatter_(1, at, logprob)
        rollouts.sum_pi_squared.scatter_(1, at, _sum_of_squares(pi)[:, None])
        rollouts.lengths += 1
        ended = torch.isin(token, self._stops).squeeze(1)
        broken = ~logprob.isfinite().squeeze(1)
        leaving = ended | broken | (rollouts.lengths == self._max_new_tokens)
        if not leaving.any():
            return []
        columns = (rollouts.keys, rollouts.tokens, rollouts.logprobs, rollouts.sum_pi_squared, rollouts.lengths, ended, broken)
        keys, tokens, logprobs, squares, lengths, ends, breaks = (column[leaving].cpu().numpy() for column in columns)
        if breaks.any():
            raise NotFiniteError(
                f"the policy is not finite: token {lengths[breaks][0]} of a completion has no log-probability; its weights have "
                f"diverged, are damaged, or overflow in {self._model.dtype}"
            )
        self._rollouts = None if leaving.all() else rollouts.keep(torch.nonzero(~leaving).squeeze(1))
        return [
            (int(keys[i]), Completion(tokens[i, :n].copy(), logprobs[i, :n].copy(), bool(ends[i]), squares[i, :n].copy()))
            for i, n in enumerate(lengths)
        ]


@dataclass
class _Rollouts:
    """B rollouts under way, T the length limit.

    Attributes:
        keys: (B,) int64.
        greedy: (B,) bool.
        uniforms: (B, T) float64, what the tokens are drawn with.
        tokens, logprobs, sum_pi_squared: (B, T); lengths (B,): how many of them are drawn.
        read: prompts and drawn tokens as the model has read them.
    """

    keys: torch.Tensor
    greedy: torch.Tensor
    uniforms: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    sum_pi_squared: torch.Tensor
    lengths: torch.Tensor
    read: Rows

    def __len__(self) -> int:
        return len(self.keys)

    def advance(self, model: PreTrainedModel) -> None:
        """Read the last drawn token of every rollout."""
        self.read.advance(model, self.tokens.gather(1, self.lengths[:, None] - 1))

    def keep(self, rows: torch.Tensor) -> _Rollouts:
        """Only these rollouts."""
        self.read.select(rows)
        return _Rollouts(**{name: getattr(self, name)[rows] for name in self._columns()}, read=self.read)

    def append(self, other: _Rollouts) -> None:
        """Add the rollouts of `other` below."""
        for name in self._columns():
            setattr(self, name, torch.cat((getattr(self, name), getattr(other, name))))
        self.read.append(other.read)

    def _columns(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "read"]


@torch.no_grad()
def check_sampling(model: PreTrainedModel, pad: int) -> None:
    """Compare log-probabilities of a few random prompts' completions, as they are sampled and as they are trained on, with those of
    a plain forward pass: nothing tells in advance whether a new architecture's state is kept as the engine keeps it.

    Raises:
        ValueError: they differ by more than rounding; names the architecture.
        NotFiniteError: the plain pass gives no finite log-probability.
    """
    text = model.config.get_text_config(decoder=True)
    if (positions_of(text) or sys.maxsize) < max(CHECKED_PROMPTS) + CHECKED_TOKENS:
        return  # a toy, which a check would not fit
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(text.vocab_size, size=n).tolist()) for n in CHECKED_PROMPTS]
    prompts.append(prompts[-1])
    refusal = f"model_type={text.model_type!r}: the embedded engine cannot keep this architecture's state from token to token"
    try:
        completions = _probes(model, prompts, pad, random)
        trained = completion_logprobs(model, prompts, completions, pad)
    except Exception as error:
        raise ValueError(f"{refusal} ({error!r}); give a policy of another") from error
    largest = 0.0
    for prompt, completion, row in zip(prompts, completions, trained, strict=True):
        tokens = torch.from_numpy(completion.tokens).to(model.device)[:, None]
        ids = torch.tensor([[*prompt, *completion.tokens.tolist()]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        expected = torch.log_softmax(logits, dim=-1).gather(-1, tokens).squeeze(-1)
        if not expected.isfinite().all():
            raise NotFiniteError(
                "the policy is not finite: a pass over random tokens gives no log-probabilities; its weights have diverged, are "
                f"damaged, or overflow in {model.dtype}"
            )
        both = torch.stack((torch.from_numpy(completion.logprobs).to(row), row[: len(expected)]))
        difference = float(((both - expected).abs() / (1 + expected.abs())).max())
        largest = difference if not difference <= largest else largest  # NaN is the largest
    if not largest <= _rounding(model):
        raise ValueError(
            f"{refusal}: log-probabilities differ from a plain forward pass by up to {largest:.2g}; give a policy of another"
        )


def _probes(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], pad: int, random: np.random.Generator) -> list[Completion]:
    """A completion a prompt, sampled as the engine does: two start, the others join halfway, the first leaves before the end."""
    rows, sampling = read_prompts(model, prompts[:2], pad), [0, 1]
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for step in range(CHECKED_TOKENS):
        log_p = torch.log_softmax(rows.logits.float(), dim=-1)
        drawn = _inverse_cdf(log_p.double().exp(), torch.from_numpy(random.random(len(sampling))).to(model.device))[:, None]
        for i, token, logprob in zip(sampling, drawn.flatten().tolist(), log_p.gather(1, drawn).flatten().tolist(), strict=True):
            tokens[i].append(token)
            logprobs[i].append(logprob)
        rows.advance(model, drawn)
        if step == CHECKED_TOKENS - 3:
            rows.append(read_prompts(model, prompts[2:], pad))
            sampling = list(range(len(prompts)))
        if step == CHECKED_TOKENS - 2:
            rows.select(torch.arange(1, len(prompts), device=model.device))
            sampling = sampling[1:]
    return [Completion(np.array(t), np.array(p, dtype=np.float32), False) for t, p in zip(tokens, logprobs, strict=True)]


def _rounding(model: PreTrainedModel) -> float:
    """Relative difference of log-probabilities that the order of summation may explain."""
    if model.dtype == torch.float32 and model.device.type == "cuda" and torch.backends.cudnn.allow_tf32:  # convolutions then use it
        return ROUNDING_TF32
    return ROUNDING.get(model.dtype, ROUNDING[torch.float32])


def _sum_of_squares(pi: torch.Tensor) -> torch.Tensor:
    """(B, V) -> (B,), without a second (B, V)."""
    norm: torch.Tensor = torch.linalg.vector_norm(pi, dim=-1)
    return norm.square()


def _inverse_cdf(pi: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token whose slice of the unit interval holds `uniform`: (B, V), (B,) float64 -> (B,)."""
    cdf = pi.cumsum(-1)
    # Scaled by the last entry, so that rounding never leaves the interval's end uncovered.
    token = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True).squeeze(-1)
    return token.clamp(max=pi.shape[-1] - 1)  # where nothing is finite, no slice holds anything


def _uniforms(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """(B, count) numbers in [0, 1), a function of seed and position alone."""
    with np.errstate(over="ignore"):
        positions = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(_mix(seeds + _GOLDEN)[:, None] + positions[None, :])
    uniforms: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea & Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
