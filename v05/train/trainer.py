"""The trainer: one policy, one method; its step reads top to bottom.

    v05 train --preset tiny --method v05 --seed 0 --out runs/one
    torchrun --nproc-per-node 2 -m v05 train --preset tiny --method v05 --seed 0 --out runs/one

A step is: draw prompts -> predict priors -> sample until the allocator has stopped every group -> fused advantages ->
clipped policy gradient -> let the prior observe -> record. Priors and advantages are v05.estimator's, the policy and its
optimiser v05.train.learner's. Several processes share out the sampling and the gradient and do the rest alike
(v05.train.distributed). With `overlap`, the coming step's first rollouts are sampled within the step before it
(v05.train.overlap). Between steps the run is written down now and then (v05.train.state, v05.train.checkpoint), and goes on
from there when it is called again. Evaluations, probes and checkpoints are paid for apart: they count neither as training rollouts
nor as training time. Entropy is measured at evaluations, on the same prompts for every method; a step's own figures are of the
rollouts that the method chose to take and keep.

Departures from the published algorithms:
- A step holds about `rollouts_per_step` rollouts whatever the group size: a method with smaller groups sees more prompts a step,
  not more steps. The papers fix the number of prompts.
- GRPO (arXiv 2402.03300): no KL term by default (as DAPO and Dr. GRPO); one update a step, so ratios start at 1. Groups may differ
  in size here, so their prompts weigh alike in the loss (`loss.group_weighting`), which for groups of one size is the paper's.
- Dr. GRPO (arXiv 2503.20783): its recipe divides by the tokens of the batch; the paper's constant, which differs from that by one
  factor a batch that Adam absorbs, is `loss.kind=dr_grpo`.
- DAPO (arXiv 2503.14476): groups whose rewards are all equal are replaced by fresh prompts, as many as are missing and at most
  `max_refills` times; the paper draws whole batches without end. What is thrown away counts as rollouts spent. The filter reads
  the verifier's reward, not the shaped one. Overlong shaping starts a sixteenth of the length limit before its end (the paper: a
  fifth), and does not count the token that ends a completion.
- V_0.5 (arXiv 2603.10848): the prior is by default learnt from the run's own rollouts (v05.prior.history) instead of a pre-trained
  value model, and starts knowing nothing. With prior = "v0" it is one (v05.prior.v0); its context is empty in the first step, whose
  groups have no prior. Prompts weigh alike in the loss, whatever size the test gave their groups (`loss.group_weighting`; how the
  paper weighs them is not known).
- Calibrated: how far the prior can be trusted is fitted after every step to the groups of the last steps (v05.prior.calibration)
  and used by the next. Under its budget rule a group's size depends on its rewards, which biases the gradient even with
  leave-one-out; its recipe counts paths instead (v05.path_counting, docs/calibrated.md).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.files import explained, flush, flush_folder
from v05.rollout import Completion, Request
from v05.rollout.limits import positions_of, refuse_prompt
from v05.rollout.scheduler import RolloutBatch, collect, join, select
from v05.tasks import Prompt, heldout_set, make_task
from v05.train.checkpoint import CheckpointSchedule, delete_checkpoints, newest_checkpoint, write_checkpoint
from v05.train.config import RunConfig
from v05.train.dapo import has_signal, shaped_rewards
from v05.train.distributed import join_world
from v05.train.engine import explaining_divergence, make_engine, make_verifier, require_finite, sync_weights
from v05.train.estimator import close_batch, estimate_batch, make_estimator
from v05.train.evaluation import EVALUATION_SEED, FINAL_SEED, baseline_error, entropy_of, prior_scores, true_rewards, write_outcomes
from v05.train.identity import identity_digest, inputs_of, paths_of
from v05.train.learner import Learner
from v05.train.lora import merged_weights
from v05.train.memory import memory_report
from v05.train.metrics import CONFIG, INPUTS, POLICY, RESULT, MetricsLog, refuse_to_overwrite, write_json
from v05.train.oracle import answer_probability
from v05.train.overlap import PromptQueue, places, requests_ahead
from v05.train.policy import chat_tokens, policy_folder
from v05.train.sinks import Sink, TensorBoard, figures_of, interrupted_later
from v05.train.state import Progress, TrainerState, restore, result_of, snapshot
from v05.train.step_records import Stopwatch, calibration_figures, gradient_noise, group_figures, mismatch, sampled_groups

PROMPTS_BETWEEN_SEEDS = 10_000_000  # runs of different seeds read different stretches of the task's prompts
CHECKED_PROMPTS = 256  # of training, whose lengths are checked at the start; of the others when they are drawn
PROBE_ROLLOUTS = 16  # whose log-probabilities are compared after a sync; the actors of an engine share them
GROUP_SIZE_MEMORY = 0.5  # of the running mean that turns rollouts_per_step into prompts


class Trainer:
    """One run in one directory: config.json, metrics.jsonl, result.json and the final policy/; checkpoints until then.

    Goes on from the directory's checkpoint, if it has one, and says so by `report`. What it logs it also shows to `sinks`.
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
            self.log = MetricsLog(directory)  # refuses a directory that another process writes: nothing in it is touched
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
        self.own_weights = config.engine.kind != "transformers"  # the engine's, to be kept up to date
        self.verifier = make_verifier(config, self.task)
        self.estimator = make_estimator(config, folder)
        self.allocator = self.new_allocator(0)
        self.heldout = heldout_set(self.task, config.evaluation.prompts, skip=config.evaluation.skip)
        budget = config.budget
        self.state = TrainerState(
            next_prompt=(config.seed + 1) * PROMPTS_BETWEEN_SEEDS,
            group_size=float(budget.mean or (budget.initial if budget.rule == "uniform" else budget.maximum)),
        )
        self.prior_rejected = float("nan")
        self.ahead: list[Completion | None] = []  # of the coming step's first prompts, `initial` each
        self.schedule = CheckpointSchedule(config.checkpoint_seconds)
        self.resume(report)
        self.prompts = PromptQueue(self.task.prompts("train", start=self.state.next_prompt))
        first = itertools.islice(self.task.prompts("train", start=self.state.next_prompt), CHECKED_PROMPTS)
        # Refuses a prompt that does not fit, before anything is sampled.
        longest = max(len(self.tokens_of(prompt)) for prompt in (*self.heldout, *(prompt for _, prompt in first)))
        if config.policy.path is not None:  # those that are made here fit everywhere
            model = self.learner.sampled
            report(memory_report(config, model.config, longest, self.world.size, model.device.type))

    def resume(self, report: Callable[[str], None]) -> None:
        """Go on from the directory's newest checkpoint, or start its records anew."""
        path = self.world.broadcast(newest_checkpoint(self.directory, report) if self.world.writes else None)
        length = 0
        if path is not None:
            self.state, length, self.allocator, self.ahead = restore(path, self.identity, self.learner, self.estimator)
            report(f"going on from step {self.state.steps}, rollout {self.state.rollouts} of {self.config.total_rollouts}")
        if self.world.writes:
            self.log.cut(length)
        for sink in self.sinks:
            sink.start(self.state.rollouts)

    def run(self) -> Iterator[Progress]:
        """Train to the end, yielding before and after every step; then write the result."""
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
            while self.rollouts_of_step():
                after_evaluation = state.steps == 0 or state.successes is not None
                self.step(probe=after_evaluation)
                state.successes = None
                passed = state.rollouts * config.evaluation.evaluations // config.total_rollouts
                if passed > state.evaluations or not self.rollouts_of_step():
                    state.accuracy, state.successes = self.evaluate_heldout()
                    state.evaluations = passed
                if self.world.broadcast(self.schedule.due()):
                    self.save()
                yield state.progress(config.total_rollouts, self.prior_rejected)
            self.evaluate_policy()
        self.finish()

    def step(self, probe: bool) -> None:
        """One optimiser step, from prompts to the record; with `probe`, the baselines are checked and completions kept to read."""
        config, state = self.config, self.state
        watch = Stopwatch()
        spent_before, timeouts_before, stale = state.rollouts, self.verifier.timed_out, len(self.ahead)
        batch, thrown_away = self.sample()
        rewards = shaped_rewards(batch.rewards, batch.completions, config.overlong, config.policy.max_new_tokens)
        watch.lap("sample")

        estimate = estimate_batch(self.estimator, batch, rewards)
        watch.lap("advantage")
        if probe and not config.budget.unbiased:  # where paths are counted, no single baseline is subtracted from a reward
            self.probe_baselines(batch, rewards)
        watch.lap("probe")

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
        if probe and self.world.writes:  # to be read: sinks, which draw, get none of it
            for group in sampled_groups(batch, estimate.stats, estimate.advantages.tolist(), self.engine.decode):
                self.log.write("group", step=state.steps, rollouts=state.rollouts, **group)
        state.steps += 1

    def rollouts_of_step(self) -> int:
        """What the coming step is to sample; 0 where the run is over, which ends within half a step of its total. Steps of the few
        prompts that are left would each be a full update, and befall only methods whose groups differ in size."""
        config, state = self.config, self.state
        left = config.total_rollouts - state.rollouts
        return min(config.rollouts_per_step, left) if 2 * left >= config.rollouts_per_step or state.steps == 0 else 0

    def sample(self) -> tuple[RolloutBatch, int]:
        """The step's rollouts, and how many were thrown away for giving no signal (DAPO's dynamic sampling)."""
        config = self.config
        missing = len(self.ahead) // config.budget.initial or max(1, round(self.rollouts_of_step() / self.state.group_size))
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
        """The rollouts of the next `count` prompts, of which each rank samples a block."""
        state = self.state
        initial = self.config.budget.initial
        drawn = self.prompts.draw(count)
        prompts = [prompt for _, prompt in drawn]
        mine = self.world.block(count)
        coming = self.prompts_ahead()
        share = self.world.block(len(coming))
        priors = self.predict(prompts)
        if self.config.budget.rule not in ("uniform", "osla"):  # no group is open: what was fitted since may take its place
            self.allocator = self.new_allocator(len(prompts[mine]))
        part = collect(
            self.allocator,
            self.engine,
            self.verifier,
            prompts[mine],
            [self.tokens_of(p) for p in prompts[mine]],
            priors[mine],
            first_group=state.groups + mine.start,
            ready=places(self.ahead[mine.start * initial : mine.stop * initial], initial),
            ahead=requests_ahead(
                [self.tokens_of(p) for p in coming[share]], state.groups + count + share.start, initial, self.config.seed
            ),
        )
        parts = self.world.gather(part)
        batch = replace(
            join(parts),  # ranks worked side by side: the slowest is what it took
            in_flight=sum(p.in_flight for p in parts if p.prompts),
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

    def prompts_ahead(self) -> list[Prompt]:
        """Those of the coming step, if its first rollouts are to be sampled in this one."""
        config, state = self.config, self.state
        left = config.total_rollouts - state.rollouts - config.rollouts_per_step
        if not config.overlap or left < 2 * config.rollouts_per_step:  # the end may come sooner than thought
            return []
        return [prompt for _, prompt in self.prompts.look(max(1, round(config.rollouts_per_step / state.group_size)))]

    def new_allocator(self, prompts: int) -> RolloutAllocator:
        """With the last fit of the calibration, and the total that `prompts` are to share where the budget is one."""
        budget = self.config.budget
        total = None if budget.mean is None else max(budget.initial, round(budget.mean * prompts))
        return self.estimator.allocator(total=total, seed=self.config.seed)

    def predict(self, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """(P,) success rates by the prior; NaN for a method without one."""
        if self.config.prior == "oracle":
            tokens, answers = [self.tokens_of(p) for p in prompts], [p.answer for p in prompts]
            return answer_probability(self.learner.sampled, self.tokenizer, tokens, answers, self.config.policy.max_new_tokens)
        return self.estimator.open([prompt.text for prompt in prompts])

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids. ValueError where they leave the model no room for a completion."""
        if self.config.chat or prompt.messages is not None:
            tokens = chat_tokens(self.tokenizer, prompt)
        else:
            tokens = tuple(self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
        refuse_prompt(len(tokens), self.config.policy.max_new_tokens, positions_of(self.learner.model.config), prompt.text)
        return tokens

    def evaluate_heldout(self) -> tuple[float, list[int]]:
        """Held-out accuracy by sampling, and the successes of each held-out prompt. Logged; the seeds never change."""
        state, samples = self.state, self.config.evaluation.samples
        rewards, completions = self.true_rewards(self.heldout, samples, EVALUATION_SEED)
        accuracy, rates = float(rewards.mean()), rewards.mean(-1)
        # No prior ever observes held-out prompts.
        prior = prior_scores(self.predict(self.heldout), rates) if self.estimator.of.needs_prior else {}
        self.record(
            "evaluation",
            rollouts=state.rollouts,
            generated_tokens=state.generated_tokens,
            seconds=state.seconds,
            accuracy=accuracy,
            entropy=entropy_of(completions),
            **prior,
        )
        if self.world.writes:
            write_outcomes(self.directory, self.config, state.steps, [p.text for p in self.heldout], rates, samples)
        return accuracy, rewards.sum(-1).astype(int).tolist()

    def evaluate_policy(self) -> None:
        """Held-out greedy accuracy, mean@k and pass@k, which tell a better policy from one that is only surer of itself."""
        k = self.config.evaluation.final_samples
        if k == 0:
            return
        greedy, _ = self.true_rewards(self.heldout, 1, FINAL_SEED, greedy=True)
        sampled, _ = self.true_rewards(self.heldout, k, FINAL_SEED)
        solved = sampled.max(-1) > 0
        self.state.final = {
            "greedy": float(greedy.mean()),
            "mean_at_k": float(sampled.mean()),
            "pass_at_k": float(solved.mean()),
            "k": k,
        }
        self.record("final", rollouts=self.state.rollouts, **self.state.final)

    def probe_baselines(self, batch: RolloutBatch, rewards: NDArray[np.float64]) -> None:
        """Log the squared error of the baselines of the step's first groups against many fresh rollouts of the same policy.

        The baseline is what was subtracted from the reward before any scaling, under leave-one-out another for every rollout.
        """
        settings = self.config.evaluation
        probed = np.flatnonzero(np.diff(batch.offsets))[: settings.probe_prompts]
        if not len(probed):
            return
        seed = EVALUATION_SEED + self.state.rollouts * settings.probe_samples
        fresh, completions = self.true_rewards([batch.prompts[g] for g in probed], settings.probe_samples, seed)
        truth = shaped_rewards(fresh.ravel(), completions, self.config.overlong, self.config.policy.max_new_tokens)
        unscaled = replace(self.estimator, scale="none")
        baselines = rewards - estimate_batch(unscaled, batch, rewards, dtype=torch.float64).advantages.numpy()
        by_group = [baselines[batch.offsets[g] : batch.offsets[g + 1]] for g in probed]
        error = baseline_error(by_group, truth.reshape(fresh.shape))
        self.record("probe", rollouts=self.state.rollouts, prompts=len(probed), baseline_mse=error)

    def true_rewards(
        self, prompts: Sequence[Prompt], samples: int, seed: int, greedy: bool = False
    ) -> tuple[NDArray[np.float64], list[Completion]]:
        """(P, samples) verified rewards of fresh rollouts of the run's policy, and the rollouts."""
        tokens = [self.tokens_of(prompt) for prompt in prompts]
        return true_rewards(self.engine, self.verifier, self.world, prompts, tokens, samples, seed, greedy)

    def sync(self) -> float:
        """Bring an engine with weights of its own up to date, and check that it is; the largest difference found, nats."""
        probe, tolerance = self.probe_requests(), self.config.engine.tolerance
        return sync_weights(self.engine, self.learner.sampled, probe, self.tokenizer.pad_token_id, tolerance)

    def probe_requests(self) -> list[Request]:
        """Rollouts of held-out prompts that the policy is checked with, always the same."""
        prompts = [self.tokens_of(prompt) for prompt in self.heldout[:PROBE_ROLLOUTS]]
        return [Request(prompts[i % len(prompts)], EVALUATION_SEED + i) for i in range(PROBE_ROLLOUTS)]

    def record(self, kind: str, **values: Any) -> None:
        """Log once for all ranks."""
        with interrupted_later():
            if self.world.writes:
                self.log.write(kind, **values)
            for sink in self.sinks:
                sink.show(figures_of(kind, values), self.state.rollouts)

    def save(self) -> None:
        """Write a checkpoint: all that the coming steps depend on. Every rank must call it.

        NotFiniteError if the policy has diverged: the earlier checkpoint stays.
        """
        started = time.monotonic()
        prompts = [request.prompt for request in self.probe_requests()]
        require_finite(self.learner.sampled, prompts, self.tokenizer.pad_token_id)
        policy = self.learner.state_dict()
        with interrupted_later():
            for sink in self.sinks:
                sink.flush()
        if self.world.writes:
            checkpoint = snapshot(self.identity, self.state, self.log.flush(), policy, self.estimator, self.allocator, self.ahead)
            write_checkpoint(self.directory, self.state.steps, checkpoint)
        self.schedule.written(time.monotonic() - started)

    def finish(self) -> None:
        """Write the policy and the result, then let go of the checkpoints."""
        if not self.world.writes:
            return
        folder = self.directory / POLICY
        with explained(folder, "the run goes on from its checkpoint"):
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
