"""The trainer: one policy, one method. `Trainer.step` reads from top to bottom.

    v05 train --preset tiny --method v05 --seed 0 --out runs/one
    torchrun --nproc-per-node 2 -m v05 train --preset tiny --method v05 --seed 0 --out runs/one

A step draws prompts, predicts their priors, samples until the allocator has closed every group, computes advantages with the
fused op, takes a clipped policy gradient step, lets the prior observe the outcomes, and records figures. Sampling is in
v05.train.sampler, priors and advantages in v05.estimator, the policy and its optimiser in v05.train.learner, and measurements
with fresh rollouts in v05.train.evaluation. Several processes divide the sampling and the gradient among themselves and do
everything else identically (v05.train.distributed). Checkpoints are written between steps (v05.train.state,
v05.train.checkpoint); a run that is started again resumes from the newest one.

Evaluations, probes and checkpoints count neither as training rollouts nor as training time. Entropy is measured at evaluations,
on prompts that do not depend on the method. The figures of a step describe only the rollouts that the method chose to take and to
keep.

Departures from the published algorithms:
- A step holds about `rollouts_per_step` rollouts whatever the group size, so a method with smaller groups sees more prompts in
  each step, not more steps. The papers fix the number of prompts.
- GRPO (arXiv 2402.03300): there is no KL term by default (as in DAPO and Dr. GRPO), and one update in each step, so ratios start
  at 1. Groups may differ in size here, so every prompt has an equal weight in the loss (`loss.group_weighting`); for groups of
  one size this is the paper's loss.
- Dr. GRPO (arXiv 2503.20783): its recipe divides by the number of tokens in the batch. The paper divides by a constant, which is
  available as `loss.kind=dr_grpo`. The two differ by one factor for the whole batch, which Adam absorbs.
- DAPO (arXiv 2503.14476): groups whose rewards are all equal are replaced by an equal number of fresh prompts, at most
  `max_refills` times; the paper draws whole batches without a limit. Rollouts that are thrown away count as spent. The filter
  reads the verifier's reward, not the shaped one. Overlong shaping starts a sixteenth of the length limit before the limit (the
  paper: a fifth), and does not count the token that ends a completion.
- V_0.5 (arXiv 2603.10848): the prior is by default learnt from the run's own rollouts (v05.prior.history) instead of being a
  pre-trained value model, so it starts without knowledge. prior = "v0" selects a value model (v05.prior.v0); its context is empty
  in the first step, whose groups have no prior. Every prompt has an equal weight in the loss, whatever size the test gave its
  group (`loss.group_weighting`); the paper does not say how it weighs prompts.
- Calibrated: after every step, the trust in the prior is fitted to the groups of the last steps (v05.prior.calibration), and the
  next step uses it. Under the calibrated budget rule the size of a group depends on its rewards, which biases the gradient even
  with leave-one-out; the method's recipe therefore counts paths (v05.path_counting, docs/calibrated.md).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.files import explained, flush, flush_folder
from v05.rollout import Completion, Request, SleepingEngine
from v05.rollout.scheduler import RolloutBatch
from v05.tasks import heldout_set, make_task
from v05.train.checkpoint import CheckpointSchedule, delete_checkpoints, newest_checkpoint, write_checkpoint
from v05.train.config import RunConfig
from v05.train.dapo import shaped_rewards
from v05.train.distributed import join_world
from v05.train.engine import explaining_divergence, make_engine, make_verifier, require_finite, sync_weights
from v05.train.estimator import close_batch, estimate_batch, make_estimator
from v05.train.evaluation import EVALUATION_SEED, Evaluator, write_outcomes
from v05.train.identity import identity_digest, inputs_of, paths_of
from v05.train.learner import Learner
from v05.train.lora import merged_weights
from v05.train.memory import memory_report
from v05.train.metrics import CONFIG, INPUTS, POLICY, RESULT, MetricsLog, refuse_to_overwrite, write_json
from v05.train.policy import policy_folder
from v05.train.sampler import Sampler
from v05.train.sinks import Sink, TensorBoard, figures_of, interrupted_later
from v05.train.state import Progress, TrainerState, restore, result_of, snapshot
from v05.train.step_records import Stopwatch, calibration_figures, gradient_noise, group_figures, mismatch, sampled_groups

PROMPTS_BETWEEN_SEEDS = 10_000_000  # runs of different seeds read different stretches of the task's prompts
CHECKED_PROMPTS = 256  # training prompts whose lengths are checked at the start; later ones are checked when they are drawn
PROBE_ROLLOUTS = 16  # rollouts whose log-probabilities are compared after a sync


class Trainer:
    """One training run in one directory.

    The run writes config.json and metrics.jsonl, checkpoints while it trains, and at its end result.json and the trained policy/.

    Args:
        config: of the run.
        directory: of the run. If it holds a checkpoint of the same configuration, the run resumes from it.
        report: is called with lines for the user, such as where a run resumes.
        sinks: are shown every record that is logged.

    Raises:
        ValueError: the directory belongs to another configuration, a prompt leaves no room for a completion, the policy has no
            chat template though `chat` asks for one, or the engine cannot serve several processes.
    """

    def __init__(self, config: RunConfig, directory: Path, report: Callable[[str], None], sinks: Sequence[Sink] = ()) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.directory = directory
        self.world = join_world()
        self.sinks = sinks if self.world.writes else ()
        if self.world.size > 1 and config.engine.kind != "transformers":
            raise ValueError(f"engine.kind={config.engine.kind!r} samples for one process; under torchrun use 'transformers'")
        if self.world.writes:
            refuse_to_overwrite(config, directory)
            directory.mkdir(parents=True, exist_ok=True)
            self.log = MetricsLog(directory)  # raises before anything is written if another process writes to the directory
            write_json(directory / CONFIG, config.model_dump(mode="json"))
            write_json(directory / INPUTS, inputs_of(config))
        self.identity = identity_digest(config)
        if len(set(self.world.gather(self.identity))) > 1:
            raise ValueError(f"the ranks read different contents of {', '.join(map(str, paths_of(config).values()))}; share them")

        self.task = make_task(config.task)
        start = policy_folder(config.policy, config.task, self.task, report) if self.world.writes else None
        folder = self.world.broadcast(start)
        assert folder is not None
        self.learner = Learner(config, folder, self.world)
        self.tokenizer = self.learner.tokenizer
        if config.chat and self.tokenizer.chat_template is None:
            raise ValueError(f"chat=True, but the tokenizer of {folder} has no chat template; leave it out, or give it one")
        self.engine = make_engine(config, folder, directory, self.learner.sampled, self.tokenizer)
        self.own_weights = config.engine.kind != "transformers"  # the engine has a copy of the weights, which sync updates
        self.verifier = make_verifier(config, self.task)
        self.estimator = make_estimator(config, folder)
        self.heldout = heldout_set(self.task, config.evaluation.prompts, skip=config.evaluation.skip)
        self.prior_rejected = float("nan")
        self.schedule = CheckpointSchedule(config.checkpoint_seconds)
        self.state, allocator, ahead = self.start(report)
        self.sampler = Sampler(
            config,
            self.world,
            self.task,
            self.learner,
            self.engine,
            self.verifier,
            self.estimator,
            self.state,
            allocator,
            ahead,
        )
        self.evaluator = Evaluator(config, self.world, self.sampler, self.engine, self.verifier, self.heldout)
        first = itertools.islice(self.task.prompts("train", start=self.state.next_prompt), CHECKED_PROMPTS)
        # Raises for a prompt that does not fit, before anything is sampled.
        longest = max(len(self.sampler.tokens_of(prompt)) for prompt in (*self.heldout, *(prompt for _, prompt in first)))
        if config.policy.path is not None:  # policies that are made here fit into any memory
            model = self.learner.sampled
            report(memory_report(config, model.config, longest, self.world.size, model.device.type))

    def start(self, report: Callable[[str], None]) -> tuple[TrainerState, RolloutAllocator | None, list[Completion | None]]:
        """The state, the allocator and the completions sampled ahead, from the directory's newest checkpoint or for a new run.

        The learner, the estimator and the log are brought to the same moment. A new run has no allocator yet.
        """
        budget = self.config.budget
        state = TrainerState(
            next_prompt=(self.config.seed + 1) * PROMPTS_BETWEEN_SEEDS,
            group_size=float(budget.mean or (budget.initial if budget.rule == "uniform" else budget.maximum)),
        )
        length, allocator, ahead = 0, None, list[Completion | None]()
        path = self.world.broadcast(newest_checkpoint(self.directory, report) if self.world.writes else None)
        if path is not None:
            state, length, allocator, ahead = restore(path, self.identity, self.learner, self.estimator)
            report(f"resuming from step {state.steps}, rollout {state.rollouts} of {self.config.total_rollouts}")
        if self.world.writes:
            self.log.cut(length)
        for sink in self.sinks:
            sink.start(state.rollouts)
        return state, allocator, ahead

    def run(self) -> Iterator[Progress]:
        """Train to the end, then write the result. Yields the progress before the first step and after every step."""
        config, state = self.config, self.state
        with closing(self.engine), closing(self.verifier), ExitStack() as stack:
            for sink in self.sinks:
                stack.enter_context(closing(sink))
            stack.enter_context(explaining_divergence(config.optimizer, lambda: state.steps))
            if self.own_weights:
                self.sync()
            if state.accuracy_before is None:
                state.accuracy_before, _ = self.evaluate_heldout()
                state.accuracy = state.accuracy_before
            yield state.progress(config.total_rollouts, self.prior_rejected)
            while self.sampler.remaining():
                after_evaluation = state.steps == 0 or state.successes is not None
                self.step(probe=after_evaluation)
                state.successes = None
                passed = state.rollouts * config.evaluation.evaluations // config.total_rollouts
                if passed > state.evaluations or not self.sampler.remaining():
                    state.accuracy, state.successes = self.evaluate_heldout()
                    state.evaluations = passed
                if self.world.broadcast(self.schedule.due()):
                    self.save()
                yield state.progress(config.total_rollouts, self.prior_rejected)
            self.evaluate_policy()
        self.finish()

    def step(self, probe: bool) -> None:
        """One step, from prompts to the record. With `probe`, also measure the baselines' error and log completions."""
        config, state = self.config, self.state
        watch = Stopwatch()
        spent_before, timeouts_before, stale = state.rollouts, self.verifier.timed_out, len(self.sampler.ahead)
        batch, thrown_away = self.sampler.sample()
        rewards = shaped_rewards(batch.rewards, batch.completions, config.overlong, config.policy.max_new_tokens)
        watch.lap("sample")

        estimate = estimate_batch(self.estimator, batch, rewards)
        watch.lap("advantage")
        if probe and not config.budget.unbiased:  # path counting does not subtract a single baseline from a reward
            self.probe_baselines(batch, rewards)
        watch.lap("probe")

        if isinstance(self.engine, SleepingEngine):  # until sync, with the new weights, wakes it
            self.engine.sleep()
        rescored = self.learner.rescore(batch) if self.own_weights or config.loss.importance_cap else None
        update = self.learner.update(batch, estimate.advantages, rescored)
        watch.lap("update")
        sync_difference = self.sync() if self.own_weights else float("nan")
        watch.lap("sync")
        close_batch(self.estimator, batch, estimate, self.world)
        watch.lap("observe")
        seconds = watch.seconds
        state.seconds += sum(seconds.values()) - seconds["probe"]

        figures = group_figures(batch, estimate.stats, config.budget.initial)
        self.prior_rejected = figures["prior_rejected"]
        self.record(
            "step",
            step=state.steps,
            rollouts=state.rollouts,
            spent=state.rollouts - spent_before,
            thrown_away=thrown_away,
            prompts=len(batch.prompts),
            tokens=sum(len(c.tokens) for c in batch.completions),
            generated_tokens=state.generated_tokens,
            seconds=state.seconds,
            **figures,
            gradient_noise=gradient_noise(
                batch, rewards, estimate.advantages.double().numpy(), (config.scale or self.estimator.of.scale) != "none"
            ),
            **calibration_figures(self.estimator.calibrator),
            sampled_ahead=stale,
            unbiased=config.budget.unbiased and bool(estimate.counted.all()) and not stale,
            invalid=batch.invalid,
            failures=len(batch.failures),
            failure=batch.failures[-1] if batch.failures else None,
            verifier_timeouts=int(self.world.sum(torch.tensor(self.verifier.timed_out - timeouts_before, device="cpu"))),
            in_flight=batch.in_flight,
            generate_seconds=batch.generate_seconds,
            verify_seconds=batch.verify_seconds,
            **{f"{stage}_seconds": seconds[stage] for stage in ("sample", "advantage", "update", "sync")},
            sync_difference=sync_difference,
            **mismatch(rescored, [c.logprobs for c in batch.completions], config.loss.importance_cap),
            **update,
        )
        if probe and self.world.writes:  # completions are for reading; sinks, which draw curves, do not get them
            for group in sampled_groups(batch, estimate.stats, estimate.advantages.tolist(), self.engine.decode):
                self.log.write("group", step=state.steps, rollouts=state.rollouts, **group)
        state.steps += 1

    def evaluate_heldout(self) -> tuple[float, list[int]]:
        """Log an evaluation; returns held-out accuracy and the number of successes of each held-out prompt."""
        state = self.state
        figures, rewards = self.evaluator.heldout(prior=self.estimator.of.needs_prior)
        self.record(
            "evaluation", rollouts=state.rollouts, generated_tokens=state.generated_tokens, seconds=state.seconds, **figures
        )
        if self.world.writes:
            prompts = [prompt.text for prompt in self.heldout]
            write_outcomes(self.directory, self.config, state.steps, prompts, rewards.mean(-1), rewards.shape[1])
        return figures["accuracy"], rewards.sum(-1).astype(int).tolist()

    def evaluate_policy(self) -> None:
        """Log greedy accuracy, mean@k and pass@k of the trained policy."""
        self.state.final = self.evaluator.final()
        if self.state.final:
            self.record("final", rollouts=self.state.rollouts, **self.state.final)

    def probe_baselines(self, batch: RolloutBatch, rewards: NDArray[np.float64]) -> None:
        """Log how far the step's baselines are from the policy's true success rates."""
        seed = EVALUATION_SEED + self.state.rollouts * self.config.evaluation.probe_samples
        figures = self.evaluator.probe(batch, rewards, self.estimator, seed)
        if figures is not None:
            self.record("probe", rollouts=self.state.rollouts, **figures)

    def sync(self) -> float:
        """Give the engine the policy's new weights. Returns the largest difference of log-probabilities on a probe, nats."""
        probe, tolerance = self.probe_requests(), self.config.engine.tolerance
        return sync_weights(self.engine, self.learner.sampled, probe, self.tokenizer.pad_token_id, tolerance)

    def probe_requests(self) -> list[Request]:
        """The probe: fixed rollouts of held-out prompts."""
        prompts = [self.sampler.tokens_of(prompt) for prompt in self.heldout[:PROBE_ROLLOUTS]]
        return [Request(prompts[i % len(prompts)], EVALUATION_SEED + i) for i in range(PROBE_ROLLOUTS)]

    def record(self, kind: str, **values: Any) -> None:
        """Write a record to the log and the sinks, on the rank that writes."""
        with interrupted_later():
            if self.world.writes:
                self.log.write(kind, **values)
            for sink in self.sinks:
                sink.show(figures_of(kind, values), self.state.rollouts)

    def save(self) -> None:
        """Write a checkpoint, which holds everything that the remaining steps depend on. Every rank must call it.

        Raises:
            NotFiniteError: the policy has diverged; the earlier checkpoint is kept.
        """
        started = time.monotonic()
        prompts = [request.prompt for request in self.probe_requests()]
        require_finite(self.learner.sampled, prompts, self.tokenizer.pad_token_id)
        policy = self.learner.state_dict()
        with interrupted_later():
            for sink in self.sinks:
                sink.flush()
        if self.world.writes:
            sampler = self.sampler
            checkpoint = snapshot(
                self.identity, self.state, self.log.flush(), policy, self.estimator, sampler.allocator, sampler.ahead
            )
            write_checkpoint(self.directory, self.state.steps, checkpoint)
        self.schedule.written(time.monotonic() - started)

    def finish(self) -> None:
        """Write the policy and the result, then delete the checkpoints."""
        if not self.world.writes:
            return
        folder = self.directory / POLICY
        with explained(folder, "the run resumes from its checkpoint"):
            self.learner.sampled.save_pretrained(folder, state_dict=dict(merged_weights(self.learner.sampled)))
            self.tokenizer.save_pretrained(folder)
            flush_folder(folder)
        write_json(self.directory / RESULT, result_of(self.config, self.state))
        flush(self.directory)
        delete_checkpoints(self.directory)


def train(config: RunConfig, directory: Path) -> None:
    """Run `config` in `directory` to the end without a progress display."""
    for _ in Trainer(config, directory, functools.partial(print, flush=True), [TensorBoard(directory)]).run():
        pass
