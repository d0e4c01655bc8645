"""V_0.5 in TRL's asynchronous trainer: a rollout worker for `AsyncGRPOTrainer`. Tested with TRL 1.16.0 and a fake vLLM server.

    worker = V05RolloutWorker(settings=Settings(initial=4), reward_funcs=[...], num_generations=16, ...)
    trainer = AsyncGRPOTrainer(..., rollout_worker=worker)

A prompt starts with `settings.initial` conversations, and more follow while the test asks for them. Each conversation is scored
when it ends. Each sample carries its own advantage to the trainer, so groups may differ in size and nothing is padded. A
conversation that waits for its group's test occupies one of `max_inflight_tasks`: multiply that number by num_generations /
initial. The prior lives in the worker's process and learns whenever the policy's version has changed. Its state is lost with that
process unless `settings.learnt` names a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, RolloutGroup, RolloutSample, _AsyncRolloutLoop
from trl.trainer.utils import get_callable_name, is_async_callable

from v05.budget import RolloutAllocator
from v05.energy import completion_energy
from v05.integrations.groups import prompt_text
from v05.integrations.learnt import LearntFile
from v05.integrations.settings import Settings, prior_of
from v05.methods import Calibration, find_method
from v05.prior import ValuePrior
from v05.prior.calibration import Calibrator

PER_CONVERSATION = (  # fields of a RolloutGroup that are lists with one entry per conversation, or empty
    "prompts",
    "completions",
    "completions_ids",
    "completions_sequences",
    "tool_call_counts",
    "tool_failure_counts",
    "env_rewards",
    "rollout_rewards",
)
NOT_NEEDED: tuple[Any, ...] = (None, [], [], 0, 0, None)  # result of a conversation that never ran because its group had stopped


class _Outcome(NamedTuple):
    """The outcome of one group. Arrays are (1,) unless noted."""

    text: str
    rate: NDArray[np.float64]
    successes: NDArray[np.float64]
    trials: NDArray[np.float64]
    energies: NDArray[np.float64]  # (2, 1)


@dataclass
class _Group:
    """A prompt whose conversations are running."""

    row: dict[str, Any]
    text: str
    rate: NDArray[np.float64]  # (1,) predicted success rate
    calibration: Calibration | None  # the calibration that the group is tested with
    allocator: RolloutAllocator
    started: int = 0
    leases: dict[int, int] = field(default_factory=dict)  # index of a conversation that may run -> its lease
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def lease(self) -> None:
        leases = self.allocator.lease(2**31)
        self.leases.update(zip(leases.index.tolist(), leases.lease_id.tolist(), strict=True))


class V05RolloutLoop(_AsyncRolloutLoop):  # type: ignore[misc]
    """TRL's rollout loop in the worker's process, with conversations that wait for their group's test and are scored one by one.

    Args:
        settings: the settings of v05, with a method that has a prior.
        reward_funcs: reward functions. Each is called with one conversation at a time, as soon as it ends.
        prior: a picklable prior, as in `V05Trainer`. None takes the prior of the settings.
        num_generations: the most conversations of a prompt.

    Raises:
        ValueError: there is no reward function; the method has no prior; or an environment computes rewards itself, which TRL would
            ask for only after the test.
    """

    _provides_rollout_reward = True

    def __init__(
        self,
        *,
        settings: Settings,
        reward_funcs: list[Callable[..., Any]],
        prior: ValuePrior | None = None,
        num_generations: int = 16,
        **kwargs: Any,
    ) -> None:
        if not reward_funcs:
            raise ValueError(f"reward_funcs={reward_funcs!r}: V_0.5 tests rewards while it samples; give functions that score")
        if not find_method(settings.method).needs_prior:
            raise ValueError(f"settings: method={settings.method!r} has no test of its own; choose a method with a prior")
        super().__init__(reward_funcs=[], num_generations=num_generations, **kwargs)
        if self._env_reward_types:
            self._loop.close()  # opened by super().__init__, and not needed
            self._tool_pool.shutdown()
            names = ", ".join(kind.__name__ for kind in self._env_reward_types)
            raise ValueError(
                f"environment_factory: {names} has a get_reward, which TRL calls only after V_0.5's test; remove it and "
                "score the conversation in reward_funcs"
            )
        self.reward_func_names.append("+".join(get_callable_name(function) for function in reward_funcs))
        self._judges = reward_funcs
        prior, calibrator = prior_of(settings) if prior is None else prior, Calibrator()
        self._estimator = settings.estimator(prior, calibrator, maximum=num_generations)
        self._learnt: LearntFile | None = None
        if settings.learnt is not None:
            self._learnt = LearntFile(Path(settings.learnt), {"prior": prior, "calibrator": calibrator})
        self._groups: dict[int, _Group] = {}
        self._scored: list[_Outcome] = []  # outcomes that the prior has not learnt yet
        self._learnt_version = self.model_version

    def _repeat_iterator(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """TRL's rows, `num_generations` times each. A group is opened at its first row."""
        for group_id, row in super()._repeat_iterator():
            if group_id not in self._groups:
                self._groups[group_id] = self._open(row)
            yield group_id, row

    def _open(self, row: dict[str, Any]) -> _Group:
        self._learn()
        estimator, text = self._estimator, prompt_text(row["prompt"])
        group = _Group(row, text, estimator.open([text]), estimator.calibration, estimator.allocator())
        group.allocator.open([0], estimator.in_reward_units(group.rate))
        group.lease()
        return group

    def _learn(self) -> None:
        """Let the prior learn, in one step, the outcomes since the policy's version last changed. A prior forgets at every step."""
        if self.model_version == self._learnt_version:
            return
        self._learnt_version = self.model_version
        if self._scored:
            texts, *columns = zip(*self._scored, strict=True)
            rates, successes, trials, energies = (np.concatenate(column, axis=-1) for column in columns)
            self._estimator.close(texts, rates, successes, trials, energies)
            self._scored.clear()
            if self._learnt is not None:
                self._learnt.keep()

    async def _generate_one(self, prompt: Any, tool_dict: Any, tools: Any, group_id: int = 0) -> tuple[Any, ...]:
        """Run a conversation and score it once its group asks for it. Returns NOT_NEEDED if the group stops first."""
        group = self._groups[group_id]
        index = group.started
        group.started += 1
        async with group.changed:
            await group.changed.wait_for(lambda: index in group.leases or group.allocator.done)
        if index not in group.leases:
            return NOT_NEEDED
        result = await super()._generate_one(prompt, tool_dict, tools, group_id)
        reward = await self._judge(group.row, prompt, result[0], result[1])
        async with group.changed:
            group.allocator.report([group.leases[index]], [reward if reward is not None and _trains(result[2]) else np.nan])
            group.lease()
            group.changed.notify_all()
        return (*result[:-1], reward)

    async def _judge(self, row: dict[str, Any], prompt: Any, completion: Any, completion_ids: list[int]) -> float | None:
        """The sum of the reward functions' values. None if no function returns a value."""
        columns = {name: [value] for name, value in row.items() if name not in ("prompt", "completion", "completion_ids")}
        given = dict(prompts=[prompt], completions=[completion], completion_ids=[completion_ids], **columns)
        rewards = [
            (await judge(**given) if is_async_callable(judge) else await asyncio.to_thread(judge, **given))[0]
            for judge in self._judges
        ]
        known = [reward for reward in rewards if reward is not None and not np.isnan(reward)]
        return float(sum(known)) if known else None

    async def _score_group(self, group: RolloutGroup) -> list[RolloutSample]:
        """TRL's samples of the conversations that ran, with V_0.5's advantages."""
        state = self._groups.pop(group.group_id)
        held = [i for i, completion in enumerate(group.completions) if completion is not None]
        group = replace(
            group,
            reward_kwargs={name: [values[i] for i in held] for name, values in group.reward_kwargs.items()},
            **{name: [values[i] for i in held] for name in PER_CONVERSATION if (values := getattr(group, name))},
        )
        samples: list[RolloutSample] = await super()._score_group(group)
        estimator = self._estimator
        estimate = estimator.advantages(
            np.array([np.nan if reward is None else reward for reward in group.rollout_rewards], dtype=np.float64),
            state.rate,
            group_offsets=[0, len(held)],
            valid=np.array([_trains(sequences) for sequences in group.completions_sequences], dtype=bool),
            energy=np.array([_energy(sequences) for sequences in group.completions_sequences]),
            calibrations=[state.calibration],
        )
        energies = np.zeros((2, 1)) if estimate.energies is None else estimate.energies
        self._scored.append(_Outcome(state.text, state.rate, *estimator.outcomes(estimate.stats), energies))
        rows = [len(sequences) for sequences in group.completions_sequences]
        for sample, advantage in zip(samples, np.repeat(estimate.advantages.numpy(), rows).tolist(), strict=True):
            sample.advantage = advantage
        return samples


def _trains(sequences: list[Any]) -> bool:
    """Whether any token of a conversation's sequences is trained on."""
    return any(any(sequence.completion_mask) for sequence in sequences)


def _energy(sequences: list[Any]) -> float:
    """The energy of a conversation, from the log-probabilities of its trained tokens."""
    trained = [p for s in sequences for p, trains in zip(s.old_log_probs, s.completion_mask, strict=True) if trains]
    return completion_energy(trained)


class V05RolloutWorker(AsyncRolloutWorker):  # type: ignore[misc]
    """TRL's worker with a `V05RolloutLoop` in its process. It takes the loop's arguments."""

    _loop_cls = V05RolloutLoop
