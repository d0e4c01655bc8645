"""What the hosts share: settings, priors that wait for the rewards of their groups, advantages in a padded trainer's tensors."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.integrations.learnt import LearntFile
from v05.methods import METHODS, Calibration, find_method
from v05.ops import AdvantageStats, fused_advantage
from v05.prior import ValuePrior

if TYPE_CHECKING:
    from v05.prior.calibration import Calibrator

logger = logging.getLogger(__name__)
Range = tuple[float, float]
PRIORS = ("history", "v0")
OF_THE_PRIOR = ("prior", "backbone", "adapter", "outcomes", "learnt")  # settings that say which prior is made
ESTIMATORS = {method.estimator: method.name for method in METHODS.values()}  # name in verl and SkyRL: method
PADDING = re.compile(r"pad([0-9]+|[0-9a-f]{32})")  # group ids of the rows that fill up a batch, in SkyRL and in verl


@dataclass(frozen=True)
class Settings:
    """What a user may set, under the name `v05` in the host's configuration.

    Attributes:
        reward_range: (lo, hi) that holds all rewards, reward units.
        leave_one_out: the baseline of a rollout is computed from the group's other rollouts.
        initial: rollouts of a prompt before its first test, where the host samples in rounds.
        chunk: rollouts added at a time after that.
        prior: "history", learnt in the run from texts and outcomes, or "v0", the generalist value model (v05.prior.v0).
        backbone: of v0, the model folder that reads prompts; None is the sentence model of the extra `value`.
        adapter: of v0, a file that `v05 fit-prior` trained on that backbone.
        outcomes: JSON lines of what the policy came to before training (`v05 eval` writes them), which the prior learns first.
        learnt: a file, by its absolute path, for what the prior and its calibration have learnt, replaced after every batch; a run
            that finds one goes on from it. One run, one file.
    """

    reward_range: Range = (0.0, 1.0)
    leave_one_out: bool = False
    initial: int = 4
    chunk: int = 1
    prior: str = "history"
    backbone: str | None = None
    adapter: str | None = None
    outcomes: str | None = None
    learnt: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Settings:
        """The settings of a mapping; a ValueError names what is not one."""
        known = {field.name for field in fields(cls)}
        given = dict(given or {})
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"v05.{unknown[0]}={given[unknown[0]]!r} is not a setting; choose from {', '.join(sorted(known))}")
        if "reward_range" in given:
            try:
                low, high = map(float, given["reward_range"])
            except (TypeError, ValueError):
                raise ValueError(f"v05.reward_range={given['reward_range']!r} is not two numbers; give [lowest, highest]") from None
            given["reward_range"] = (low, high)
        settings = cls(**given)
        if settings.prior not in PRIORS:
            raise ValueError(f"v05.prior={settings.prior!r} is unknown; choose one of {', '.join(PRIORS)}")
        if settings.learnt is not None and not Path(settings.learnt).is_absolute():
            raise ValueError(
                f"v05.learnt={settings.learnt!r} is relative, and hosts start their processes anywhere; give an absolute path"
            )
        for name in ("backbone", "adapter"):
            if settings.prior != "v0" and getattr(settings, name) is not None:
                raise ValueError(
                    f"v05.{name}={getattr(settings, name)!r} is of prior 'v0', not of {settings.prior!r}; leave it out"
                )
        return settings


def prior_of(settings: Settings) -> ValuePrior:
    """A new prior by its settings, which has learnt `outcomes`.

    Raises ValueError and OSError where a folder or file of the settings cannot be read.
    """
    prior: ValuePrior
    if settings.prior == "v0":
        from v05.prior.v0 import load_v0

        prior = load_v0(_path(settings.backbone), _path(settings.adapter))
    else:
        from v05.prior.history import HistoryPrior

        prior = HistoryPrior()
    if settings.outcomes is not None:
        from v05.prior.v0.logs import read_logs

        rows = read_logs([Path(settings.outcomes)])
        trials = np.array([row.trials for row in rows])
        prior.observe([row.prompt for row in rows], np.array([row.rate for row in rows]) * trials, trials)
    return prior


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def prompt_text(prompt: Any) -> str:
    """A prompt as the text a prior reads: itself, or the texts of its messages, one a line.

    A tool call may come without a text, and a part that is an image with None for it: Arrow fills up fields that are missing.
    """
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") or [] for message in prompt]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "\n".join(part["text"] for content in parts for part in content if part.get("text") is not None)


class PromptPriors:
    """Predicts a group's success rate when its prompt is drawn, keeps it until its rewards are there, and learns from them.

    Hosts name groups by ids and show their estimators no prompt: this is the table between the two.

    Args:
        prior: predicts and learns; None is that of the settings given to `settle`, or else a `HistoryPrior`.
        capacity: groups remembered; those opened first, whose rewards never came, go first.
    """

    def __init__(self, prior: ValuePrior | None = None, capacity: int = 1_000_000) -> None:
        self._prior = prior
        self._settled: Settings | None = None  # what the prior was made with; None of one that was given
        self._calibrator: Calibrator | None = None
        self._learnt: LearntFile | None = None
        self._capacity = capacity
        self._open: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self.used = False  # whether any group was ever opened

    @property
    def prior(self) -> ValuePrior:
        if self._prior is None:
            self.settle(Settings())
        assert self._prior is not None
        return self._prior

    @prior.setter
    def prior(self, prior: ValuePrior) -> None:
        if self._learnt is not None:
            raise ValueError(f"prior: {self._learnt.path} keeps the one that is there; set another before the settings are given")
        self._prior, self._settled = prior, None

    def settle(self, settings: Settings) -> None:
        """Take the prior of these settings, unless there is one already; one that was given as an object stands. Whichever it is
        goes on from the file `learnt`.

        Raises ValueError where the one at hand was made with other settings, or what `prior_of` and `LearntFile` raise.
        """
        if self._prior is None:
            self._prior, self._settled = prior_of(settings), settings
        elif self._settled is not None:
            for name in OF_THE_PRIOR:
                asked, made = getattr(settings, name), getattr(self._settled, name)
                if asked != made:
                    raise ValueError(
                        f"v05.{name}={asked!r}: the prior in PRIORS was made with {made!r}; give PRIORS.settle these settings "
                        "before its first use"
                    )
        if settings.learnt is not None and self._learnt is None:
            calibrator = self._calibrator or _new_calibrator()
            self._learnt = LearntFile(Path(settings.learnt), {"prior": self.prior, "calibrator": calibrator})
            self._calibrator = calibrator

    def calibration(self, method: str) -> Calibration | None:
        """How far the priors are to be trusted, fitted to the groups closed since a calibrated method first asked for it, or
        since `learnt` was begun.

        None for the other methods. The first 64 groups are judged by the default.
        """
        if not find_method(method).is_calibrated:
            return None
        if self._calibrator is None:
            self._calibrator = _new_calibrator()
        return self._calibrator.fit()

    def open(self, group_ids: Sequence[str], prompts: Sequence[Any], anew: bool = False) -> NDArray[np.float64]:
        """(G,) predicted success rates of G prompts, texts or lists of messages, remembered under their ids.

        A group that is open already keeps its prediction, so that rows of one group may come in several calls. With `anew` it gets
        a new one: where a prompt's id is the same in every epoch, an open group may be one that was dropped in the last.
        """
        self.used = True
        if anew:
            for group in group_ids:
                self._open.pop(group, None)
        new = {group: prompt_text(prompt) for group, prompt in zip(group_ids, prompts, strict=True) if group not in self._open}
        rates = self.prior.predict(list(new.values()))
        self._open.update((group, (text, float(rate))) for (group, text), rate in zip(new.items(), rates, strict=True))
        predicted = self.rates(group_ids)
        while len(self._open) > self._capacity:
            self._open.popitem(last=False)
        return predicted

    def __contains__(self, group_id: str) -> bool:
        """Whether the group is open."""
        return group_id in self._open

    def rates(self, group_ids: Sequence[str]) -> NDArray[np.float64]:
        """(G,) success rates predicted when the groups were opened; NaN for a group that was not, or whose prior says nothing."""
        return np.array([self._open[group][1] if group in self._open else np.nan for group in group_ids], dtype=np.float64)

    def close(self, group_ids: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn what (G,) trials of each group came to, and forget the groups; those that are not open teach nothing."""
        learnt = [g for g, group in enumerate(group_ids) if group in self._open]
        if not learnt:
            return
        if self._calibrator is not None:
            self._calibrator.observe(successes[learnt], trials[learnt], self.rates([group_ids[g] for g in learnt]))
        prompts = [self._open.pop(group_ids[g])[0] for g in learnt]
        self.prior.observe(prompts, successes[learnt], trials[learnt])
        if self._learnt is not None:
            self._learnt.keep()


def _new_calibrator() -> Calibrator:
    from v05.prior.calibration import Calibrator  # needs scipy, which methods without a prior do not

    return Calibrator()


def in_reward_units(rates: NDArray[np.float64], reward_range: Range) -> NDArray[np.float64]:
    """Success rates in [0, 1] as rewards."""
    low, high = reward_range
    return low + rates * (high - low)


def outcomes(stats: AdvantageStats, reward_range: Range) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(successes, trials), each (G,), that a prior learns from; rewards scaled from their range to [0, 1]."""
    low, high = reward_range
    trials = stats.count.cpu().numpy().astype(np.float64)
    mean = np.where(trials > 0, stats.mean.cpu().numpy(), low)
    return np.clip((mean - low) / (high - low), 0.0, 1.0) * trials, trials


def outcome_advantages(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Any] | NDArray[np.object_],
    *,
    method: str,
    settings: Settings,
    priors: PromptPriors,
    normalize: bool,
    remedy: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages in the tensors that verl and SkyRL give their estimators; the groups' prior learns from the rewards.

    Args:
        token_level_rewards: (N, T), reward units. A rollout's reward is the sum of its whole row, as in the hosts: where the last
            token is a tool's, or there is none, the reward stands outside the mask. A row that is not finite is left out.
        response_mask: (N, T), 1 for the policy's own tokens. A row without any was rejected by the host or the user: it is left out
            of its group's statistics and of what the prior learns.
        index: (N,) ids of the groups, rows in any order. Rows whose id is one of `PADDING` fill up the batch and are left out.
        method: a name of `v05.methods.METHODS`.
        normalize: False takes away the division by the deviation from a method that has one, as the hosts' own switches do.
        remedy: what to do about groups that were not opened.

    Returns:
        advantages and returns, both the same (N, T) float32 tensor.

    Raises:
        ValueError: the method needs a prior, and no group was ever opened or the priors are not of these settings; a reward is
            outside `settings.reward_range`.
    """
    rule = find_method(method)
    ids = [str(group) for group in index]
    groups = list(dict.fromkeys(ids))
    rates = priors.rates(groups)
    if rule.needs_prior:
        missing = [group for group in groups if group not in priors and not PADDING.fullmatch(group)]
        if missing:
            problem = f"prior: none for {len(missing)} of {len(groups)} groups, the first is {missing[0]!r}"
            if not priors.used:
                raise ValueError(f"{problem}; {remedy}")
            logger.warning("%s; their own means stand in", problem)  # a resumed host may hand over what it finished before
        priors.settle(settings)
    is_padding = torch.tensor(
        [PADDING.fullmatch(group) is not None for group in ids], dtype=torch.bool, device=response_mask.device
    )
    out = fused_advantage(
        token_level_rewards.sum(-1, dtype=torch.float64),
        in_reward_units(rates, settings.reward_range) if rule.needs_prior else None,
        group_ids=ids,
        response_mask=response_mask,
        valid=(response_mask != 0).any(-1) & ~is_padding,
        method=method,
        scale=None if normalize else "none",
        leave_one_out=settings.leave_one_out,
        reward_range=settings.reward_range,
        calibration=priors.calibration(method),
        nonfinite="exclude",
    )
    assert out.stats is not None
    priors.close(groups, *outcomes(out.stats, settings.reward_range))
    return out.advantages, out.advantages
