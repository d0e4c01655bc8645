"""The trainer, read top to bottom: one policy, one method.

    v05 train --preset tiny --method v05 --seed 0 --out runs/one
    torchrun --nproc-per-node 2 -m v05 train --preset tiny --method v05 --seed 0 --out runs/one

A step is: draw prompts -> predict priors -> sample until the allocator has stopped every group -> fused advantages ->
clipped policy gradient -> let the prior observe -> log. Several processes share out the sampling and the gradient and do the
rest alike (v05.train.distributed). Between steps the run is written down now and then (v05.train.checkpoint), and goes on from
there when it is called again. Evaluations, probes and checkpoints are paid for apart: they count neither as training rollouts nor
as training time. Entropy is measured at evaluations, on the same prompts for every method; a step's own figures are
of the rollouts that the method chose to take and keep.

Departures from the published algorithms:
- A step holds about `rollouts_per_step` rollouts whatever the group size: a method with smaller groups sees more prompts a step,
  not more steps. The papers fix the number of prompts.
- GRPO (arXiv 2402.03300): no KL term by default (as DAPO and Dr. GRPO); one update a step, so ratios start at 1.
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
- All: a rollout whose advantage is zero has no gradient (without a KL term) and is left out of the backward pass. Exact.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.energy import proxy_energies
from v05.files import explained, flush, flush_folder
from v05.methods import Baseline, Method, Scale, find_method
from v05.ops import AdvantageOutput, AdvantageStats, fused_advantage
from v05.path_counting import path_counting_advantages
from v05.prior import ConstantPrior, NoisePrior, ValuePrior
from v05.prior.calibration import Calibrator
from v05.prior.history import HistoryPrior
from v05.prior.scores import auc, brier, cross_entropy
from v05.rollout import Completion, NotFiniteError, Request, generate
from v05.rollout.limits import positions_of, refuse_prompt, stop_tokens
from v05.rollout.scheduler import RolloutBatch, collect, join, select
from v05.rollout.transformers_engine import completion_logprobs
from v05.rollout.verifier import verify_all
from v05.tasks import Prompt, heldout_set, make_task
from v05.train.checkpoint import (
    Checkpoint,
    CheckpointSchedule,
    delete_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from v05.train.config import OverlongConfig, RunConfig
from v05.train.distributed import (
    distribute,
    join_world,
    load_optimizer_state,
    load_parameters,
    whole,
    whole_optimizer_state,
    whole_parameters,
)
from v05.train.engine import explaining_divergence, make_engine, make_verifier, require_finite, sync_weights
from v05.train.identity import identity_digest, inputs_of, paths_of
from v05.train.loss import importance_weights, mismatch, policy_loss, rollout_weights, token_weights
from v05.train.metrics import CONFIG, INPUTS, POLICY, RESULT, MetricsLog, refuse_to_overwrite, write_json, write_outcomes
from v05.train.policy import chat_tokens, load_policy, policy_folder
from v05.train.sinks import Sink, TensorBoard, figures_of, interrupted_later

PROMPTS_BETWEEN_SEEDS = 10_000_000  # runs of different seeds read different stretches of the task's prompts
EVALUATION_SEED = 1 << 40  # apart from the seeds of training rollouts, and the same for every method
MICRO_BATCH = 512  # rollouts a backward pass and process
CHECKED_PROMPTS = 256  # of training, whose lengths are checked at the start; of the others when they are drawn
PROBE_ROLLOUTS = 16  # whose log-probabilities are compared after a sync; the actors of an engine share them
GROUP_SIZE_MEMORY = 0.5  # of the running mean that turns rollouts_per_step into prompts
SAMPLED_GROUPS, SAMPLED_COMPLETIONS = 8, 4  # of a step that follows an evaluation: completions to read
SAMPLED_CHARACTERS = 4000  # of each text
BINS = 10  # of the histograms of a step


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        rollouts, total: training rollouts spent and wanted.
        evaluations: of the held-out set after the first step.
        accuracy: held-out, last.
        rollouts_per_second: of training, on average; NaN before the first step.
        group_size: running mean of rollouts a prompt.
        prior_rejected: share of the last step's groups whose prior was rejected; NaN without one.
    """

    rollouts: int
    total: int
    evaluations: int
    accuracy: float
    rollouts_per_second: float
    group_size: float
    prior_rejected: float


@dataclass
class RunState:
    """What a run has come to between two steps, beside its tensors; the same on every rank, but for the seconds.

    Attributes:
        next_prompt: where in the task's training prompts the next step reads on.
        group_size: running mean of rollouts a prompt.
        steps, groups: optimiser steps taken, groups opened.
        rollouts, generated_tokens: spent on training, thrown away ones included.
        seconds: of training.
        evaluations: of the held-out set after the first step, at equal distances in rollouts.
        accuracy_before, accuracy: held-out, before the first step and last; None before the first evaluation.
        successes: of each held-out prompt, if the policy has not changed since it was evaluated.
    """

    next_prompt: int
    group_size: float
    steps: int = 0
    groups: int = 0
    rollouts: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    accuracy_before: float | None = None
    accuracy: float | None = None
    successes: list[int] | None = None


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

        self.method = find_method(config.method)
        self.task = make_task(config.task)
        start = policy_folder(config.policy, config.task, self.task, report) if self.world.writes else None
        folder = self.world.broadcast(start)
        assert folder is not None
        self.model, self.tokenizer = load_policy(folder)
        if config.chat and self.tokenizer.chat_template is None:
            raise ValueError(f"chat=True, but the tokenizer of {folder} has no chat template; leave it out, or give it one")
        self.reference = load_policy(folder)[0] if config.loss.kl_coefficient > 0 else None
        self.sharded = self.world.size > 1 and config.distributed == "fsdp2"
        self.sampled = load_policy(folder)[0] if self.sharded else self.model  # unsharded
        self.scorer = distribute(self.model, self.tokenizer.pad_token_id, config.distributed, self.world)
        self.engine = make_engine(config, folder, directory, self.sampled, self.tokenizer)
        self.verifier = make_verifier(config, self.task)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
        )
        self.prior = make_prior(config, folder)
        self.calibrator = Calibrator() if self.method.baseline is Baseline.CALIBRATED else None
        budget = config.budget
        self.allocator = self.new_allocator(0)
        self.heldout = heldout_set(self.task, config.evaluation.prompts, skip=config.evaluation.skip)
        self.own_weights = config.engine.kind != "transformers"  # the engine's, to be kept up to date
        self.state = RunState(
            next_prompt=(config.seed + 1) * PROMPTS_BETWEEN_SEEDS,
            group_size=float(budget.mean or (budget.initial if budget.rule == "uniform" else budget.maximum)),
        )
        self.prior_rejected = float("nan")
        self.schedule = CheckpointSchedule(config.checkpoint_seconds)
        self.resume(report)
        self.prompts = self.task.prompts("train", start=self.state.next_prompt)
        first = itertools.islice(self.task.prompts("train", start=self.state.next_prompt), CHECKED_PROMPTS)
        for prompt in (*self.heldout, *(prompt for _, prompt in first)):
            self.tokens_of(prompt)  # refuses one that does not fit, before anything is sampled

    def resume(self, report: Callable[[str], None]) -> None:
        """Go on from the directory's newest checkpoint, or start its records anew."""
        path = self.world.broadcast(newest_checkpoint(self.directory, report) if self.world.writes else None)
        length = 0
        if path is not None:
            checkpoint = read_checkpoint(path)
            state = checkpoint.state
            if state["config"] != self.identity:
                raise ValueError(f"{path} belongs to another configuration; give another directory")
            self.state = RunState(**state["run"])
            length = state["metrics_bytes"]
            load_parameters(self.model, checkpoint.tensors["policy"].items())
            load_optimizer_state(self.model, self.optimizer, checkpoint.tensors["optimizer"].items())
            self.prior.load_state_dict({name: value.numpy() for name, value in checkpoint.tensors["prior"].items()})
            if self.calibrator is not None:
                self.calibrator.load_state_dict({name: value.numpy() for name, value in checkpoint.tensors["calibrator"].items()})
            self.allocator = RolloutAllocator.restore(checkpoint.allocator)
            torch.set_rng_state(checkpoint.tensors["random"]["torch"])
            self.refresh_sampled()
            report(f"going on from step {self.state.steps}, rollout {self.state.rollouts} of {self.config.total_rollouts}")
        if self.world.writes:
            self.log.cut(length)
        for sink in self.sinks:
            sink.start(self.state.rollouts)

    def save(self) -> None:
        """Write a checkpoint: all that the coming steps depend on. Every rank must call it.

        NotFiniteError if the policy has diverged: the earlier checkpoint stays.
        """
        started = time.monotonic()
        require_finite(self.sampled, [request.prompt for request in self.probe_requests()], self.tokenizer.pad_token_id)
        policy = self.kept(whole_parameters(self.model))
        optimizer = self.kept(whole_optimizer_state(self.model, self.optimizer))
        with interrupted_later():
            for sink in self.sinks:
                sink.flush()
        if self.world.writes:
            tensors = {
                "policy": policy,
                "optimizer": optimizer,
                "prior": {name: torch.from_numpy(value) for name, value in self.prior.state_dict().items()},
                "random": {"torch": torch.get_rng_state()},
            }
            if self.calibrator is not None:
                tensors["calibrator"] = {name: torch.from_numpy(value) for name, value in self.calibrator.state_dict().items()}
            state = {"config": self.identity, "metrics_bytes": self.log.flush(), "run": asdict(self.state)}
            write_checkpoint(self.directory, self.state.steps, Checkpoint(state, tensors, self.allocator.snapshot()))
        self.schedule.written(time.monotonic() - started)

    def kept(self, values: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The values on the rank that writes; the others have helped to gather each and drop it."""
        return {name: value for name, value in values if self.world.writes}

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
                state.accuracy_before, _ = self.evaluate()
                state.accuracy = state.accuracy_before
            yield self.progress()
            while self.rollouts_of_step():
                probe = state.steps == 0 or state.successes is not None  # the step after an evaluation
                self.step(probe)
                state.successes = None
                passed = state.rollouts * config.evaluation.evaluations // config.total_rollouts
                if passed > state.evaluations or not self.rollouts_of_step():
                    state.accuracy, state.successes = self.evaluate()
                    state.evaluations = passed
                if self.world.broadcast(self.schedule.due()):
                    self.save()
                yield self.progress()
        self.finish()

    def finish(self) -> None:
        """Write the policy and the result, then let go of the checkpoints."""
        config, state = self.config, self.state
        policy = self.kept(whole_parameters(self.model))
        if not self.world.writes:
            return
        folder = self.directory / POLICY
        with explained(folder, "the run goes on from its checkpoint"):
            self.model.save_pretrained(folder, state_dict=policy)
            self.tokenizer.save_pretrained(folder)
            flush_folder(folder)
        result = {
            "method": config.method,
            "seed": config.seed,
            "accuracy_before": state.accuracy_before,
            "accuracy_after": state.accuracy,
            "rollouts": state.rollouts,
            "steps": state.steps,
            "seconds": state.seconds,
            "heldout_samples": config.evaluation.samples,
            "heldout_successes": state.successes,
        }
        write_json(self.directory / RESULT, result)
        flush(self.directory)
        delete_checkpoints(self.directory)

    def progress(self) -> Progress:
        state = self.state
        assert state.accuracy is not None
        return Progress(
            state.rollouts,
            self.config.total_rollouts,
            state.evaluations,
            state.accuracy,
            state.rollouts / state.seconds if state.seconds else float("nan"),
            state.group_size,
            self.prior_rejected,
        )

    def record(self, kind: str, **values: Any) -> None:
        """Log once for all ranks."""
        with interrupted_later():
            if self.world.writes:
                self.log.write(kind, **values)
            for sink in self.sinks:
                sink.show(figures_of(kind, values), self.state.rollouts)

    def step(self, probe: bool) -> None:
        """One optimiser step, from prompts to the logged record."""
        config, state = self.config, self.state
        started = time.perf_counter()
        spent_before, timeouts_before = state.rollouts, self.verifier.timed_out
        batch, thrown_away = self.sample()
        rewards = shaped_rewards(batch.rewards, batch.completions, config.overlong, config.policy.max_new_tokens)
        sampled = time.perf_counter()

        lengths = torch.tensor([len(c.tokens) for c in batch.completions], dtype=torch.int64, device="cpu")
        mask = torch.arange(config.policy.max_new_tokens, device="cpu") < lengths[:, None]
        out = self.advantages(batch, rewards, config.scale, response_mask=mask)
        unbiased = self.unbiased_advantages(batch, mask) if config.budget.unbiased else None
        advantages = out.advantages if unbiased is None else unbiased
        judged = time.perf_counter()
        # Where paths are counted, no single baseline is subtracted from a reward.
        probed = self.probe(batch, rewards) if probe and not config.budget.unbiased else 0.0
        updating = time.perf_counter()
        rescored = self.rescore(batch) if self.own_weights or config.loss.importance_cap else None
        update = self.update(batch, advantages, mask, rescored)
        self.refresh_sampled()
        updated = time.perf_counter()
        sync_difference = self.sync() if self.own_weights else float("nan")
        synced = time.perf_counter()
        if self.method.needs_prior:
            sizes = np.diff(batch.offsets)
            successes = np.add.reduceat(batch.rewards, batch.offsets[:-1]) if len(sizes) else np.zeros(0)
            self.prior.observe([p.text for p in batch.prompts], successes, sizes)
            self.calibrate(successes, sizes, batch.priors)
        state.seconds += time.perf_counter() - started - probed

        assert out.stats is not None
        stats = out.stats
        weight, hallucination = stats.weight, stats.hallucination
        self.prior_rejected = rejected(stats)
        self.record(
            "step",
            step=state.steps,
            rollouts=state.rollouts,
            spent=state.rollouts - spent_before,
            thrown_away=thrown_away,
            prompts=len(batch.prompts),
            tokens=int(lengths.sum()),
            generated_tokens=state.generated_tokens,
            seconds=state.seconds,
            accuracy=float(np.mean(batch.rewards)) if len(batch.rewards) else float("nan"),
            group_size=float(np.mean(np.diff(batch.offsets))) if batch.prompts else float("nan"),
            prior_mean=float(np.mean(batch.priors)) if self.method.needs_prior else float("nan"),
            prior_gap=float(torch.mean((stats.mean - stats.prior) ** 2)) if stats.prior is not None else float("nan"),
            weight=float(weight.mean()) if weight is not None else float("nan"),
            prior_rejected=self.prior_rejected,
            hallucination=float(hallucination.mean()) if hallucination is not None else float("nan"),
            group_sizes=np.bincount(np.diff(batch.offsets)).tolist(),
            weights=histogram(weight) if weight is not None else None,
            hallucinations=histogram(hallucination) if hallucination is not None else None,
            prior_outcomes=prior_outcomes(batch, config.budget.initial) if self.method.needs_prior else None,
            **self.calibration_figures(),
            unbiased=unbiased is not None,
            invalid=batch.invalid,
            failures=len(batch.failures),
            failure=batch.failures[-1] if batch.failures else None,
            verifier_timeouts=int(self.world.sum(torch.tensor(self.verifier.timed_out - timeouts_before, device="cpu"))),
            in_flight=batch.in_flight,
            generate_seconds=batch.generate_seconds,
            verify_seconds=batch.verify_seconds,
            sample_seconds=sampled - started,
            advantage_seconds=judged - sampled,
            update_seconds=updated - updating,
            sync_seconds=synced - updated,
            sync_difference=sync_difference,
            **mismatch(rescored, [c.logprobs for c in batch.completions], config.loss.importance_cap),
            **update,
        )
        if probe:
            self.record_samples(batch, out, advantages[:, 0].tolist())
        state.steps += 1

    def advantages(self, batch: RolloutBatch, rewards: NDArray[np.float64], scale: Scale | None, **layout: Any) -> AdvantageOutput:
        """By the run's method, from (N,) rewards."""
        config = self.config
        return fused_advantage(
            rewards,
            batch.priors if self.method.needs_prior else None,
            group_offsets=batch.offsets,
            method=config.method,
            scale=scale,
            leave_one_out=config.leave_one_out,
            energy=weights_of(self.method, batch.completions),
            calibration=None if self.calibrator is None else self.calibrator.calibration,
            max_rollouts=config.budget.maximum,
            cost=config.budget.cost,
            nonfinite="exclude",
            **layout,
        )

    def record_samples(self, batch: RolloutBatch, out: AdvantageOutput, advantages: Sequence[float]) -> None:
        """Log the step's first groups with their first completions, long texts cut: at most 200,000 characters in all.

        They are to be read: sinks, which draw, get none of it.
        """
        if not self.world.writes:
            return
        assert out.stats is not None
        for g, prompt in enumerate(batch.prompts[:SAMPLED_GROUPS]):
            start, end = batch.offsets[g : g + 2].tolist()
            completions = [
                {
                    "text": shortened(self.engine.decode(batch.completions[i])),
                    "reward": float(batch.rewards[i]),
                    "advantage": advantages[i],
                }
                for i in range(start, min(end, start + SAMPLED_COMPLETIONS))
            ]
            self.log.write(
                "group",
                step=self.state.steps,
                rollouts=self.state.rollouts,
                prompt=shortened(prompt.text),
                answer=shortened(prompt.answer),
                size=end - start,
                mean=float(out.stats.mean[g]),
                prior=float(batch.priors[g]),
                baseline=float(out.stats.baseline[g]),
                completions=completions,
            )

    def unbiased_advantages(self, batch: RolloutBatch, mask: torch.Tensor) -> torch.Tensor | None:
        """(N, T) advantages by path counting; None where paths cannot be counted: rollouts were lost, or rewards have more than
        two values."""
        if batch.invalid or not np.isin(batch.rewards, (0.0, 1.0)).all():
            return None
        budget = self.config.budget
        advantages = path_counting_advantages(
            batch.rewards,
            batch.priors,
            batch.offsets,
            method=self.config.method,
            initial=budget.initial,
            maximum=budget.maximum,
            cost=budget.cost,
            chunk=budget.chunk,
            calibration=None if self.calibrator is None else self.calibrator.calibration,
        )
        return torch.where(mask, advantages.float()[:, None], 0.0)

    def calibrate(self, successes: NDArray[np.float64], sizes: NDArray[np.int64], priors: NDArray[np.float64]) -> None:
        """Fit anew, with the step's (G,) groups, how far the prior can be trusted. All ranks go on with one rank's fit."""
        if self.calibrator is None:
            return
        self.calibrator.observe(successes, sizes, priors)
        fitted = self.calibrator.fit() if self.world.writes else self.calibrator.calibration
        self.calibrator.calibration = self.world.broadcast(fitted)

    def calibration_figures(self) -> dict[str, float]:
        """What the coming step trusts the prior by, and how many fits have failed; nothing for methods that do not ask."""
        if self.calibrator is None:
            return {}
        numbers = {f"calibration_{name}": value for name, value in asdict(self.calibrator.calibration).items()}
        return numbers | {"failed_fits": self.calibrator.failed_fits}

    def new_allocator(self, prompts: int) -> RolloutAllocator:
        """With the last fit, and the total that `prompts` are to share where the budget is one."""
        budget = self.config.budget
        return RolloutAllocator(
            rule=budget.rule,
            initial=budget.initial,
            maximum=budget.maximum,
            cost=budget.cost,
            total=None if budget.mean is None else max(budget.initial, round(budget.mean * prompts)),
            chunk=budget.chunk,
            seed=self.config.seed,
            calibration=self.calibrator.calibration if self.calibrator and budget.rule in ("calibrated", "total") else None,
        )

    def refresh_sampled(self) -> None:
        """Bring the unsharded copy of a sharded policy up to date."""
        if self.sharded:
            load_parameters(self.sampled, whole_parameters(self.model))

    def rollouts_of_step(self) -> int:
        """What the coming step is to sample; 0 where the run is over, which ends within half a step of its total. Steps of the few
        prompts that are left would each be a full update, and befall only methods whose groups differ in size."""
        config, state = self.config, self.state
        left = config.total_rollouts - state.rollouts
        return min(config.rollouts_per_step, left) if 2 * left >= config.rollouts_per_step or state.steps == 0 else 0

    def sample(self) -> tuple[RolloutBatch, int]:
        """The step's rollouts, and how many were thrown away for giving no signal (DAPO's dynamic sampling)."""
        config = self.config
        missing = max(1, round(self.rollouts_of_step() / self.state.group_size))
        parts: list[RolloutBatch] = []
        thrown_away = 0
        while missing and len(parts) <= config.max_refills:
            part = self._collect(missing)
            if config.max_refills:
                signal = has_signal(part)
                thrown_away += int(np.diff(part.offsets)[~signal].sum())
                part = select(part, signal)
            parts.append(part)
            missing -= len(part.prompts)
        return join(parts), thrown_away

    def _collect(self, count: int) -> RolloutBatch:
        """The rollouts of the next `count` prompts, of which each rank samples a block."""
        state = self.state
        drawn = list(itertools.islice(self.prompts, count))
        prompts = [prompt for _, prompt in drawn]
        mine = self.world.block(count)
        priors = self.predict(prompts) if self.method.needs_prior else np.full(len(prompts), np.nan)
        if self.config.budget.rule in ("calibrated", "total"):  # no group is open: what was fitted since may take its place
            self.allocator = self.new_allocator(len(prompts[mine]))
        part = collect(
            self.allocator,
            self.engine,
            self.verifier,
            prompts[mine],
            [self.tokens_of(p) for p in prompts[mine]],
            priors[mine],
            first_group=state.groups + mine.start,
        )
        parts = self.world.gather(part)
        batch = replace(
            join(parts),  # ranks worked side by side: the slowest is what it took
            in_flight=sum(p.in_flight for p in parts if p.prompts),
            generate_seconds=max(p.generate_seconds for p in parts),
            verify_seconds=max(p.verify_seconds for p in parts),
        )
        state.next_prompt = drawn[-1][0] + 1
        state.groups += count
        state.rollouts += len(batch.rewards)
        state.generated_tokens += sum(len(c.tokens) for c in batch.completions)
        state.group_size += (1 - GROUP_SIZE_MEMORY) * (len(batch.rewards) / count - state.group_size)
        return batch

    def predict(self, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """(P,) success rates by the prior."""
        if self.config.prior == "oracle":
            return self.answer_probability(prompts)
        return self.prior.predict([prompt.text for prompt in prompts])

    @torch.no_grad()
    def answer_probability(self, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """(P,) chance that the policy samples the reference answer: the true success rate where no other answer is right."""
        parts = [np.zeros(0)]
        stops = stop_tokens(self.tokenizer, self.model.generation_config)
        for start in range(0, len(prompts), MICRO_BATCH):
            block = prompts[start : start + MICRO_BATCH]
            answers = [self.tokenizer(p.answer, add_special_tokens=False)["input_ids"] for p in block]
            chances = [self._chances(block, [(*tokens, stop) for tokens in answers]) for stop in stops]
            parts.append(np.sum(chances, axis=0))
        return np.concatenate(parts)

    def _chances(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
        """(P,) chance that the policy samples just these tokens; 0 where they are too many."""
        completions = [Completion(np.array(tokens), np.zeros(len(tokens), dtype=np.float32), True) for tokens in answers]
        logprobs = completion_logprobs(self.sampled, [self.tokens_of(p) for p in prompts], completions, self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(tokens) for tokens in answers], device=logprobs.device)
        within = torch.arange(logprobs.shape[1], device=logprobs.device) < lengths[:, None]
        chance = torch.where(within, logprobs, 0.0).sum(-1).exp()
        return torch.where(lengths <= self.config.policy.max_new_tokens, chance, 0.0).double().cpu().numpy()

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids. ValueError where they leave the model no room for a completion."""
        if self.config.chat or prompt.messages is not None:
            tokens = chat_tokens(self.tokenizer, prompt)
        else:
            tokens = tuple(self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
        refuse_prompt(len(tokens), self.config.policy.max_new_tokens, positions_of(self.model.config), prompt.text)
        return tokens

    def probe_requests(self) -> list[Request]:
        """Rollouts of held-out prompts that the policy is checked with, always the same."""
        prompts = [self.tokens_of(prompt) for prompt in self.heldout[:PROBE_ROLLOUTS]]
        return [Request(prompts[i % len(prompts)], EVALUATION_SEED + i) for i in range(PROBE_ROLLOUTS)]

    def sync(self) -> float:
        """Bring an engine with weights of its own up to date, and check that it is; the largest difference found, nats."""
        probe, tolerance = self.probe_requests(), self.config.engine.tolerance
        return sync_weights(self.engine, self.sampled, probe, self.tokenizer.pad_token_id, tolerance)

    @torch.no_grad()
    def rescore(self, batch: RolloutBatch) -> list[NDArray[np.float32]]:
        """The completions' log-probabilities under the trainer's own policy, before the update. Ranks share them out."""
        rescored = []
        mine = torch.arange(len(batch.completions), device="cpu")[self.world.block(len(batch.completions))]
        for rows in mine.split(MICRO_BATCH) if len(mine) else ():
            prompts, completions = rollouts_of(batch, rows)
            logprobs = completion_logprobs(self.sampled, prompts, completions, self.tokenizer.pad_token_id).cpu().numpy()
            rescored += [row[: len(c.tokens)] for row, c in zip(logprobs, completions, strict=True)]
        return [row for part in self.world.gather(rescored) for row in part]

    def update(
        self,
        batch: RolloutBatch,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        rescored: Sequence[NDArray[np.float32]] | None = None,
    ) -> dict[str, float]:
        """Optimiser updates on the step's rollouts, one a part; returns means over the updates, NaN if no part had a gradient.

        Ratios are taken to `rescored` where it is given, else to the engine's log-probabilities.
        Every rank holds the whole step and passes backward through its share of it.
        """
        config, world = self.config, self.world
        parts = [p for p in np.array_split(np.arange(len(batch.prompts)), config.optimizer.updates_per_step) if len(p)]
        offsets = torch.from_numpy(batch.offsets)
        records = []
        for part in parts:
            rows = torch.arange(int(offsets[part[0]]), int(offsets[part[-1] + 1]), device="cpu")
            weights = rollout_weights(offsets[part[0] : part[-1] + 2] - offsets[part[0]], config.loss.group_weighting)
            weights = token_weights(weights, mask[rows], config.loss.aggregation)
            teaches = (advantages[rows] != 0).any(-1) | (self.reference is not None)
            if not teaches.any():
                continue
            self.optimizer.zero_grad()
            totals = torch.zeros(3, device="cpu")
            for chunk in torch.nonzero(teaches).squeeze(-1).split(MICRO_BATCH * world.size):
                width = int(mask[rows[chunk]].sum(-1).max())
                share, share_weights = chunk[world.rank :: world.size], weights[chunk[world.rank :: world.size]]
                if not len(share):  # all ranks pass backward equally often: this one with a rollout of no weight
                    share, share_weights = chunk[:1], torch.zeros_like(weights[chunk[:1]])
                totals += self._backward(batch, rows[share], advantages[rows[share]], share_weights, rescored, width)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm)
            grad_norm = float(whole(norm))
            if not isfinite(grad_norm):
                raise NotFiniteError(f"the policy is not finite: the gradient's norm is {grad_norm}")
            self.optimizer.step()
            loss, clipped, kl = world.sum(totals).tolist()
            records.append([grad_norm, loss, clipped / int(mask[rows].sum()), kl])
        means = np.mean(records, axis=0) if records else np.full(4, np.nan)
        return dict(zip(("grad_norm", "loss", "clip_fraction", "kl"), map(float, means), strict=True))

    def _backward(
        self,
        batch: RolloutBatch,
        rows: torch.Tensor,
        advantages: torch.Tensor,
        weights: torch.Tensor,
        rescored: Sequence[NDArray[np.float32]] | None,
        width: int,
    ) -> torch.Tensor:
        """Accumulate gradients of rollouts up to `width` tokens long; returns their part of (loss, clipped tokens, KL)."""
        device = self.model.device
        settings = self.config.loss
        prompts, completions = rollouts_of(batch, rows)
        logprobs = self.scorer(prompts, completions, width)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = completion_logprobs(self.reference, prompts, completions, self.tokenizer.pad_token_id, width)
        engine = padded([c.logprobs for c in completions], width).to(device)
        old = engine if rescored is None else padded([rescored[i] for i in rows.tolist()], width).to(device)
        loss = policy_loss(
            logprobs,
            old,
            advantages[:, :width].to(device),
            weights[:, :width].to(device),
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            importance=importance_weights(old, engine, settings.importance_cap) if settings.importance_cap else None,
            reference_logprobs=reference,
            kl_coefficient=settings.kl_coefficient,
        )
        (loss.total * self.world.size).backward()  # ranks' gradients are averaged, their losses add up
        kl = torch.tensor(torch.nan, device="cpu") if loss.kl is None else loss.kl.detach().cpu()
        return torch.stack((loss.total.detach().cpu(), loss.clipped.cpu(), kl))

    def evaluate(self) -> tuple[float, list[int]]:
        """Held-out accuracy by sampling, and the successes of each held-out prompt. Logged; the seeds never change."""
        samples = self.config.evaluation.samples
        rewards, completions = self.true_rewards(self.heldout, samples, EVALUATION_SEED)
        accuracy = float(rewards.mean())
        entropy = -float(np.mean(np.concatenate([c.logprobs for c in completions])))
        state = self.state
        rates = rewards.mean(-1)
        prior = self.prior_scores(rates) if self.method.needs_prior else {}
        self.record(
            "evaluation",
            rollouts=state.rollouts,
            generated_tokens=state.generated_tokens,
            seconds=state.seconds,
            accuracy=accuracy,
            entropy=entropy,
            **prior,
        )
        if self.world.writes:
            write_outcomes(self.directory, self.config, state.steps, [p.text for p in self.heldout], rates, samples)
        return accuracy, rewards.sum(-1).astype(int).tolist()

    def prior_scores(self, rates: NDArray[np.float64]) -> dict[str, float]:
        """How well the prior, which never observes held-out prompts, predicts their (P,) success rates."""
        predicted = self.predict(self.heldout)
        scores = {"auc": auc, "brier": brier, "cross_entropy": cross_entropy}
        known = not np.isnan(predicted).any()  # a prior without any outcome yet predicts nothing
        return {f"prior_{name}": score(predicted, rates) if known else float("nan") for name, score in scores.items()}

    def probe(self, batch: RolloutBatch, rewards: NDArray[np.float64]) -> float:
        """Log the squared error of each rollout's baseline, averaged within groups, against many fresh rollouts of the same policy;
        returns the seconds it took.

        The baseline is what was subtracted from the reward before any scaling, under leave-one-out another for every rollout. The
        truth's own sampling variance is subtracted, so that the figure is unbiased (and may dip below zero).
        """
        started = time.perf_counter()
        settings = self.config.evaluation
        sizes = np.diff(batch.offsets)
        probed = np.flatnonzero(sizes)[: settings.probe_prompts]
        if len(probed):
            seed = EVALUATION_SEED + self.state.rollouts * settings.probe_samples
            fresh, completions = self.true_rewards([batch.prompts[g] for g in probed], settings.probe_samples, seed)
            shaped = shaped_rewards(fresh.ravel(), completions, self.config.overlong, self.config.policy.max_new_tokens)
            shaped = shaped.reshape(fresh.shape)
            noise = shaped.var(axis=1, ddof=1) / settings.probe_samples
            baselines = rewards - self.advantages(batch, rewards, "none", dtype=torch.float64).advantages.numpy()
            errors = [
                np.mean((baselines[batch.offsets[g] : batch.offsets[g + 1]] - truth) ** 2)
                for g, truth in zip(probed, shaped.mean(axis=1), strict=True)
            ]
            self.record("probe", rollouts=self.state.rollouts, prompts=len(probed), baseline_mse=float(np.mean(errors - noise)))
        return time.perf_counter() - started

    def true_rewards(self, prompts: Sequence[Prompt], samples: int, seed: int) -> tuple[NDArray[np.float64], list[Completion]]:
        """(P, samples) verified rewards of fresh rollouts, and the rollouts. Ranks share them out by prompt."""
        mine = self.world.block(len(prompts))
        tokens = [self.tokens_of(prompt) for prompt in prompts]
        slots = [(i, j) for i in range(mine.start, mine.stop) for j in range(samples)]
        completions = generate(self.engine, [Request(tokens[i], seed + i * samples + j) for i, j in slots])
        rewards = verify_all(self.verifier, [prompts[i] for i, _ in slots], [self.engine.decode(c) for c in completions])
        parts = self.world.gather((rewards, completions))
        matrix = np.array([reward for part, _ in parts for reward in part]).reshape(len(prompts), samples)
        return matrix, [completion for _, part in parts for completion in part]


def make_prior(config: RunConfig, policy: Path) -> ValuePrior:
    """The prior of the run's configuration; `policy` is the folder of its warm start."""
    if config.prior == "history":
        return HistoryPrior()
    if config.prior == "noise":
        return NoisePrior(config.seed)
    if config.prior in ("constant", "oracle"):  # the trainer is the oracle
        return ConstantPrior()
    from v05.prior.v0 import load_v0

    return load_v0(config.v0.backbone or policy, config.v0.adapter, config.v0.context, config.v0.diverse)


def rollouts_of(batch: RolloutBatch, rows: torch.Tensor) -> tuple[list[tuple[int, ...]], list[Completion]]:
    """Prompt tokens and completions of some rollouts."""
    group_of = np.repeat(np.arange(len(batch.prompts)), np.diff(batch.offsets))
    return [batch.prompt_tokens[g] for g in group_of[rows.numpy()]], [batch.completions[i] for i in rows.tolist()]


def weights_of(method: Method, completions: Sequence[Completion]) -> NDArray[np.float64] | None:
    """(N,) what the method weighs rollouts by; None where it does not."""
    if method.weight == "length":
        return np.array([len(c.tokens) for c in completions], dtype=np.float64)
    return proxy_energies([c.logprobs for c in completions]) if method.weight == "energy" else None


def padded(rows: Sequence[NDArray[np.float32]], width: int) -> torch.Tensor:
    """(N, width) float32, zero beyond the end of each row."""
    matrix = torch.zeros(len(rows), width, device="cpu")
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = torch.tensor(row, device="cpu")
    return matrix


def has_signal(batch: RolloutBatch) -> NDArray[np.bool_]:
    """(G,) the group's rewards are not all equal."""
    groups = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    return np.array([bool(np.ptp(batch.rewards[a:b]) > 0) for a, b in groups], dtype=bool)


def rejected(stats: AdvantageStats) -> float:
    """Share of the groups whose prior the test rejected, or (calibrated) more probably hallucinates than not; NaN for others."""
    if stats.weight is not None:
        return float((stats.weight > 0).double().mean())
    return float((stats.hallucination > 0.5).double().mean()) if stats.hallucination is not None else float("nan")


def histogram(shares: torch.Tensor) -> list[int]:
    """Groups in each of ten equal bins of their (G,) shares, [0, 0.1) first."""
    counts: list[int] = np.bincount(tenth(shares[~shares.isnan()].numpy()), minlength=BINS).tolist()
    return counts


def prior_outcomes(batch: RolloutBatch, initial: int) -> list[list[float]]:
    """(groups, sum of priors, sum of outcomes) in each of ten equal bins of the prior; what happened to them adds up over steps.

    A group's outcome is the mean of its first `initial` rewards: those that came later did because of the first.
    """
    sizes = np.diff(batch.offsets)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    first = np.arange(len(group_of)) - batch.offsets[group_of] < initial
    outcomes = np.bincount(group_of[first], batch.rewards[first], len(sizes)) / np.minimum(sizes, initial)
    known = ~np.isnan(batch.priors)
    bins = tenth(batch.priors[known])
    columns = (None, batch.priors[known], outcomes[known])
    sums: list[list[float]] = np.stack([np.bincount(bins, values, BINS) for values in columns], axis=1).tolist()
    return sums


def tenth(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of ten equal bins of [0, 1] each share falls into."""
    return np.minimum((shares * BINS).astype(np.int64), BINS - 1)


def shortened(text: str) -> str:
    """The text, or where it is long its beginning and its end."""
    half = SAMPLED_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"


def shaped_rewards(
    rewards: NDArray[np.float64], completions: Sequence[Completion], overlong: OverlongConfig | None, limit: int
) -> NDArray[np.float64]:
    """(N,) rewards, less DAPO's soft punishment of long completions where it is asked for (arXiv 2503.14476, eq. 13).

    The token that ends a completion does not count: with a buffer of 1 only what was cut off is punished.
    """
    if overlong is None:
        return rewards
    buffer = overlong.tokens(limit)
    lengths = np.array([len(c.tokens) - c.finished for c in completions])
    return rewards - np.clip((lengths - (limit - buffer)) / buffer, 0.0, 1.0)


def train(config: RunConfig, directory: Path) -> None:
    """Run `config` in `directory` to the end without a progress display."""
    for _ in Trainer(config, directory, functools.partial(print, flush=True), [TensorBoard(directory)]).run():
        pass
