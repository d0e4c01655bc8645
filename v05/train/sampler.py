"""The rollouts of a step: draw prompts, predict their priors, and sample until the allocator has closed every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.estimator import Estimator
from v05.rollout import Completion, RolloutEngine
from v05.rollout.limits import positions_of, refuse_prompt
from v05.rollout.scheduler import RolloutBatch, collect, join, select
from v05.rollout.verifier import Verifier
from v05.tasks import Prompt, Task
from v05.train.config import RunConfig
from v05.train.dapo import has_signal
from v05.train.distributed import World
from v05.train.learner import Learner
from v05.train.oracle import answer_probability
from v05.train.overlap import PromptQueue, places, requests_ahead
from v05.train.policy import chat_tokens
from v05.train.state import TrainerState

GROUP_SIZE_MEMORY = 0.5  # weight of the past in the running mean of group sizes, which turns rollouts_per_step into prompts


class Sampler:
    """Samples the rollouts of each step, and keeps count of them in the run's state.

    Attributes:
        allocator: decides how many rollouts each group gets.
        ahead: with `overlap`, the first rollouts of the coming step, `initial` for each of its prompts; None for a rollout that
            failed.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        task: Task,
        learner: Learner,
        engine: RolloutEngine,
        verifier: Verifier,
        estimator: Estimator,
        state: TrainerState,
        allocator: RolloutAllocator | None,
        ahead: list[Completion | None],
    ) -> None:
        self._config = config
        self._world = world
        self._learner = learner
        self._engine = engine
        self._verifier = verifier
        self._estimator = estimator
        self._state = state
        self._prompts = PromptQueue(task.prompts("train", start=state.next_prompt))
        self.allocator = self._new_allocator(0) if allocator is None else allocator
        self.ahead = ahead

    def remaining(self) -> int:
        """How many rollouts the coming step is to sample; 0 when the run is over.

        A run ends within half a step of its total. If it went on to the last rollout, methods whose groups differ in size would
        take additional optimiser steps of only a few prompts each.
        """
        step = self._config.rollouts_per_step
        left = self._config.total_rollouts - self._state.rollouts
        return min(step, left) if 2 * left >= step or self._state.steps == 0 else 0

    def sample(self) -> tuple[RolloutBatch, int]:
        """The rollouts of a step, and how many were thrown away because their group gives no signal (DAPO's dynamic sampling)."""
        config = self._config
        missing = len(self.ahead) // config.budget.initial or max(1, round(self.remaining() / self._state.group_size))
        parts: list[RolloutBatch] = []
        thrown_away = 0
        while missing and len(parts) <= config.max_refills:
            part = self.collect(missing)
            if config.max_refills:
                signal = has_signal(part)
                thrown_away += int(np.diff(part.offsets)[~signal].sum())
                part = select(part, signal)
            parts.append(part)
            missing -= len(part.prompts)
        return join(parts), thrown_away

    def collect(self, count: int) -> RolloutBatch:
        """The rollouts of the next `count` prompts. Each rank samples a block of the prompts."""
        config, state = self._config, self._state
        initial = config.budget.initial
        drawn = self._prompts.draw(count)
        prompts = [prompt for _, prompt in drawn]
        mine = self._world.block(count)
        coming = self._prompts_ahead()
        share = self._world.block(len(coming))
        priors = self.predict(prompts)
        if config.budget.rule not in ("uniform", "osla"):  # these rules read the calibration, which was fitted after the last step
            self.allocator = self._new_allocator(len(prompts[mine]))
        part = collect(
            self.allocator,
            self._engine,
            self._verifier,
            prompts[mine],
            [self.tokens_of(p) for p in prompts[mine]],
            priors[mine],
            first_group=state.groups + mine.start,
            ready=places(self.ahead[mine.start * initial : mine.stop * initial], initial),
            ahead=requests_ahead(
                [self.tokens_of(p) for p in coming[share]], state.groups + count + share.start, initial, config.seed
            ),
        )
        parts = self._world.gather(part)
        batch = replace(
            join(parts),
            in_flight=sum(p.in_flight for p in parts if p.prompts),
            # Ranks work side by side, so a step takes as long as its slowest rank.
            generate_seconds=max(p.generate_seconds for p in parts),
            verify_seconds=max(p.verify_seconds for p in parts),
        )
        self.ahead = batch.ahead
        state.next_prompt = drawn[-1][0] + 1
        state.groups += count
        state.rollouts += len(batch.rewards)
        state.generated_tokens += sum(len(c.tokens) for c in batch.completions)
        state.group_size += (1 - GROUP_SIZE_MEMORY) * (len(batch.rewards) / count - state.group_size)
        return batch

    def _prompts_ahead(self) -> list[Prompt]:
        """The prompts of the coming step whose first rollouts are sampled in the present step; none without `overlap`."""
        config, state = self._config, self._state
        left = config.total_rollouts - state.rollouts - config.rollouts_per_step
        if not config.overlap or left < 2 * config.rollouts_per_step:  # the coming step may turn out not to be needed
            return []
        return [prompt for _, prompt in self._prompts.look(max(1, round(config.rollouts_per_step / state.group_size)))]

    def _new_allocator(self, prompts: int) -> RolloutAllocator:
        """An allocator with the newest calibration and, under a budget of a fixed mean, the total that `prompts` groups share."""
        budget = self._config.budget
        total = None if budget.mean is None else max(budget.initial, round(budget.mean * prompts))
        return self._estimator.allocator(total=total, seed=self._config.seed)

    def predict(self, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """(P,) success rates that the prior predicts; NaN for a method without a prior."""
        if self._config.prior == "oracle":
            learner = self._learner
            tokens, answers = [self.tokens_of(p) for p in prompts], [p.answer for p in prompts]
            return answer_probability(learner.sampled, learner.tokenizer, tokens, answers, self._config.policy.max_new_tokens)
        return self._estimator.open([prompt.text for prompt in prompts])

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids. ValueError if they leave the model no room for a completion."""
        tokenizer = self._learner.tokenizer
        if self._config.chat or prompt.messages is not None:
            tokens = chat_tokens(tokenizer, prompt)
        else:
            tokens = tuple(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
        refuse_prompt(len(tokens), self._config.policy.max_new_tokens, positions_of(self._learner.model.config), prompt.text)
        return tokens
