"""V_0.5's sequential rollouts in verl: an agent loop manager that samples each prompt until the test stops it.

Tested with verl 0.9.1, its TransferQueue and a fake LLM server, but not with its trainer on GPUs.

    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=v05.integrations.verl_rollout.SequentialAgentLoopManager
    actor_rollout_ref.rollout.n=16          the most rollouts of a prompt
    +algorithm.v05.initial=4                rollouts before its first test

A prompt's sessions start in rounds: first `initial` sessions, then `chunk` more as long as the test asks for them. The group is
published when its last session has been scored. So verl sees groups of different sizes; it pads batches with rows that the
estimators exclude. The manager also predicts the priors, for the test and for `v05.integrations.verl`. Validation is unchanged.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import astuple
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from v05.estimator import Estimator
from v05.integrations.groups import ESTIMATORS
from v05.integrations.settings import Settings
from v05.integrations.verl import PRIORS
from v05.methods import Calibration, find_method

logger = logging.getLogger(__name__)
# Fields that the manager sends to a worker: a prompt's prior in reward units, and the numbers of the calibration for its test.
PRIOR_FIELD, CALIBRATION_FIELD = "__v05_prior__", "__v05_calibration__"
_Worker = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__  # Ray's actor classes cannot be subclassed


class SequentialAgentLoopWorker(_Worker):  # type: ignore[misc, valid-type]
    """verl's worker, but with the sessions of a prompt run in rounds and a test after each round."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Needed because Ray pickles an actor's methods by value. An inherited __init__ would bring a copy of verl's class, in which
        # `super()` fails.
        super().__init__(*args, **kwargs)

    async def _run_prompt(
        self, prompt: dict[str, Any], sampling_params: dict[str, Any], trajectory: Any, trace: bool = False
    ) -> None:
        """Run the sessions of one prompt and publish it as "finished", or as "failure" if a session raised, as verl does."""
        if trajectory["validate"]:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        prior, uid = float(prompt.pop(PRIOR_FIELD)), prompt["uid"]
        fitted = prompt.pop(CALIBRATION_FIELD, None)
        maximum = int(prompt.pop("__rollout_n__", self.config.actor_rollout_ref.rollout.n))
        prompt.pop("__do_sample__", None)  # only an estimator with greedy rollouts uses it
        estimator = _settings(self.config).estimator(maximum=maximum)
        allocator = estimator.allocator(calibration=None if fitted is None else Calibration(*fitted.tolist()))
        allocator.open([0], [prior])
        await tq.async_kv_put(key=uid, partition_id="train", tag={"status": "running"})
        status = "finished"
        while status == "finished" and not allocator.done:
            leases = allocator.lease(maximum)
            sessions = [
                self._run_agent_loop(dict(sampling_params), trajectory=trajectory, trace=trace, session_id=index, **prompt)
                for index in leases.index.tolist()
            ]
            rewards = await asyncio.gather(*sessions, return_exceptions=True)
            try:
                for reward in rewards:
                    if isinstance(reward, BaseException):
                        raise reward
                allocator.report(leases.lease_id, np.array(rewards, dtype=np.float64))
            except Exception:
                logger.exception("uid=%s: a session or its reward failed", uid)
                status = "failure"
        await tq.async_kv_put(key=uid, partition_id="train", tag={"status": status})

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> float:
        """Publish a session as verl does, and return its reward. NaN if it has no reward or no trained token."""
        await super()._agent_loop_postprocess(output, validate, **kwargs)
        outputs = output if isinstance(output, list) else [output]
        trains = any(any(part.response_mask) for part in outputs)
        return float(outputs[-1].reward_score) if trains and outputs[-1].reward_score is not None else float("nan")


def _settings(config: Any) -> Settings:
    """The settings in verl's configuration.

    Rounds are tested by the rule of the estimator's method, or by V_0.5's rule if the method has no prior or the estimator is not
    one of v05's.
    """
    method = ESTIMATORS.get(config.algorithm.adv_estimator, "v05")
    return Settings.read(config.algorithm.get("v05"), method if find_method(method).needs_prior else "v05")


class SequentialAgentLoopManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's agent loop manager whose workers are `SequentialAgentLoopWorker`. It takes verl's arguments.

    Raises:
        ValueError: a setting is unknown or out of bounds; the prior's model or outcomes cannot be read; or rewards come from a
            model on the rollouts' GPUs, which computes them only after all rollouts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._estimator: Estimator = PRIORS.settle(_settings(self.config), maximum=self.config.actor_rollout_ref.rollout.n)
        self._estimator.allocator()  # raises for invalid settings here, because verl would hang if a worker raised
        if self.reward_loop_worker_handles is None:
            raise ValueError(
                "reward.reward_model.enable_resource_pool=False: V_0.5 tests rewards while it samples, but a reward model on the "
                "rollouts' GPUs computes them only afterwards; set it to True, or use a reward function"
            )
        self.agent_loop_workers_class = ray.remote(SequentialAgentLoopWorker)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Predict the priors of the prompts and pass them to the workers, without waiting for the rollouts."""
        if not ("validate" in prompts and prompts["validate"]):  # noqa: RUF019  # so it is a bool
            rates = PRIORS.open(list(prompts["uid"]), list(prompts["raw_prompt"]))
            prompts[PRIOR_FIELD] = torch.from_numpy(self._estimator.in_reward_units(rates))
            if (fitted := self._estimator.calibration) is not None:
                prompts[CALIBRATION_FIELD] = torch.tensor(astuple(fitted), dtype=torch.float64, device="cpu").expand(len(rates), -1)
        super().generate_sequences(prompts)
