"""Code that the hosts share: a table of groups that wait for their rewards, and advantages for trainers with padded tensors."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from v05.estimator import Estimator
from v05.integrations.learnt import LearntFile
from v05.integrations.settings import Settings, prior_of
from v05.methods import METHODS, Calibration, find_method
from v05.prior import ValuePrior

if TYPE_CHECKING:
    from v05.prior.calibration import Calibrator

logger = logging.getLogger(__name__)
OF_THE_PRIOR = ("prior", "backbone", "adapter", "outcomes", "learnt")  # settings that determine the prior
ESTIMATORS = {method.estimator: method.name for method in METHODS.values()}  # name in verl and SkyRL: method
PADDING = re.compile(r"pad([0-9]+|[0-9a-f]{32})")  # group ids of rows that SkyRL and verl add to fill up a batch


def prompt_text(prompt: Any) -> str:
    """The text of a prompt for the prior: the prompt itself, or the texts of its messages joined by newlines.

    Messages without text (a tool call) and parts whose text is None (an image, where Arrow fills up missing fields) are skipped.
    """
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") or [] for message in prompt]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "\n".join(part["text"] for content in parts for part in content if part.get("text") is not None)


class _Open(NamedTuple):
    """A group that waits for its rewards."""

    prompt: str
    rate: float  # predicted success rate
    calibration: Calibration | None  # the calibration that the group's rounds are tested with


class PromptPriors:
    """Predicts a group's success rate when its prompt is drawn, keeps it until the rewards arrive, and learns from them.

    Hosts identify groups by ids and do not pass prompts to their estimators. This table maps ids to prompts and predictions.

    Args:
        prior: the prior. None takes the prior of the settings given to `settle`, or a `HistoryPrior` without settings.
        capacity: how many open groups are kept. The groups opened first are dropped first; their rewards never arrived.
    """

    def __init__(self, prior: ValuePrior | None = None, capacity: int = 1_000_000) -> None:
        self._prior = prior
        self._settled: Settings | None = None  # settings the prior was made with; None if the prior was given as an object
        self._calibrator: Calibrator | None = None
        self._learnt: LearntFile | None = None
        self._maximum: int | None = None
        self._capacity = capacity
        self._open: OrderedDict[str, _Open] = OrderedDict()
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
            raise ValueError(
                f"prior: {self._learnt.path} already stores another prior; set the prior before the settings are given"
            )
        self._prior, self._settled = prior, None

    def settle(self, settings: Settings, maximum: int | None = None) -> Estimator:
        """Make the prior of these settings, unless there is a prior already, and return the estimator of the settings.

        A prior that was given as an object is kept. The prior resumes from the file `settings.learnt` if there is one.

        Args:
            settings: the user's settings.
            maximum: the most rollouts of a prompt, for a host that samples in rounds. It also applies to later calls without it.

        Returns:
            the estimator of these settings. All estimators of this table share its prior and calibrator.

        Raises:
            ValueError: the prior was made with other settings; also all errors of `prior_of`, `LearntFile` and `Estimator`.
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
        if self._calibrator is None:
            from v05.prior.calibration import Calibrator  # imported here because methods without a prior do not need scipy

            self._calibrator = Calibrator()
        if settings.learnt is not None and self._learnt is None:
            self._learnt = LearntFile(Path(settings.learnt), {"prior": self._prior, "calibrator": self._calibrator})
        self._maximum = maximum or self._maximum
        return settings.estimator(self._prior, self._calibrator, maximum=self._maximum)

    def open(self, group_ids: Sequence[str], prompts: Sequence[Any], anew: bool = False) -> NDArray[np.float64]:
        """Predict the (G,) success rates of G prompts (texts or lists of messages) and keep them under the group ids.

        A group that is already open keeps its prediction, so rows of one group may come in several calls. With `anew` it gets a new
        prediction. This is for hosts where a prompt has the same id in every epoch: there an open group may be left over from the
        epoch before, in which it was dropped.
        """
        self.used = True
        if anew:
            for group in group_ids:
                self._open.pop(group, None)
        new = {group: prompt_text(prompt) for group, prompt in zip(group_ids, prompts, strict=True) if group not in self._open}
        calibration = None if self._calibrator is None else self._calibrator.calibration
        for group, rate in zip(new, self.prior.predict(list(new.values())), strict=True):
            self._open[group] = _Open(new[group], float(rate), calibration)
        predicted = self.rates(group_ids)
        while len(self._open) > self._capacity:
            self._open.popitem(last=False)
        return predicted

    def __contains__(self, group_id: str) -> bool:
        """Whether the group is open."""
        return group_id in self._open

    def rates(self, group_ids: Sequence[str]) -> NDArray[np.float64]:
        """(G,) success rates predicted when the groups were opened. NaN if a group is not open or has no prior."""
        return np.array([self._open[group].rate if group in self._open else np.nan for group in group_ids], dtype=np.float64)

    def calibrations(self, group_ids: Sequence[str]) -> list[Calibration | None]:
        """(G,) calibrations that each group was opened with. None if a group is not open or there was no calibrator."""
        return [self._open[group].calibration if group in self._open else None for group in group_ids]

    def close(
        self,
        estimator: Estimator,
        group_ids: Sequence[str],
        successes: NDArray[np.float64],
        trials: NDArray[np.float64],
        energies: NDArray[np.float64] | None = None,
    ) -> None:
        """Let the estimator learn from (G,) successes in (G,) trials, and remove the groups from the table.

        `energies` are (2, G), as in `Calibrator.observe`. Groups that are not open are skipped.
        """
        learnt = [g for g, group in enumerate(group_ids) if group in self._open]
        if not learnt:
            return
        closed = [self._open.pop(group_ids[g]) for g in learnt]
        rates, spent = np.array([g.rate for g in closed]), None if energies is None else energies[:, learnt]
        estimator.close([g.prompt for g in closed], rates, successes[learnt], trials[learnt], spent)
        if self._learnt is not None:
            self._learnt.keep()


def outcome_advantages(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Any] | NDArray[np.object_],
    *,
    settings: Settings,
    priors: PromptPriors,
    normalize: bool,
    remedy: str,
    trains: NDArray[np.bool_] | None = None,
    energy: NDArray[np.float64] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute advantages from the tensors that verl and SkyRL pass to their estimators. The prior learns from the rewards.

    Args:
        token_level_rewards: (N, T) rewards of tokens, in reward units. A rollout's reward is the sum of its whole row, as in the
            hosts, because the reward is outside the mask if the last token is a tool's or there is no token. A row with a reward
            that is not finite is excluded.
        response_mask: (N, T), 1 for the policy's own tokens. A row without such tokens was rejected by the host or the user. It is
            excluded from its group's statistics, and the prior does not learn from it.
        index: (N,) group ids, rows in any order. Rows whose id matches `PADDING` fill up the batch and are excluded.
        settings: the user's settings.
        priors: the table of open groups.
        normalize: False disables the division by the standard deviation, as the hosts' own switches do.
        remedy: the remedy that the error message gives if no groups were opened.
        trains: (N,) False for rows without a trained token, for hosts whose mask does not show this.
        energy: (N,) energies of the rows, for methods that read them. None if the host has none.

    Returns:
        advantages and returns, which are the same (N, T) float32 tensor.

    Raises:
        ValueError: the method needs a prior, and no group was ever opened or the prior was made with other settings; a reward is
            outside `settings.reward_range`.
    """
    ids = [str(group) for group in index]
    groups = list(dict.fromkeys(ids))
    if find_method(settings.method).needs_prior:
        missing = [group for group in groups if group not in priors and not PADDING.fullmatch(group)]
        if missing:
            problem = f"prior: none for {len(missing)} of {len(groups)} groups, the first is {missing[0]!r}"
            if not priors.used:
                raise ValueError(f"{problem}; {remedy}")
            # A resumed host may pass groups that it sampled before the restart.
            logger.warning("%s; their own means are used instead", problem)
        estimator = priors.settle(settings)
    else:
        estimator = settings.estimator()
    is_padding = torch.tensor(
        [PADDING.fullmatch(group) is not None for group in ids], dtype=torch.bool, device=response_mask.device
    )
    valid = (response_mask != 0).any(-1) & ~is_padding
    if trains is not None:
        valid &= torch.from_numpy(trains).to(valid.device)
    estimate = replace(estimator, scale=None if normalize else "none").advantages(
        token_level_rewards.sum(-1, dtype=torch.float64),
        priors.rates(groups),
        group_ids=ids,
        response_mask=response_mask,
        valid=valid,
        energy=energy,
        calibrations=priors.calibrations(groups),
    )
    priors.close(estimator, groups, *estimator.outcomes(estimate.stats), estimate.energies)
    return estimate.advantages, estimate.advantages
