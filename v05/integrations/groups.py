"""What the hosts share: groups that wait for their rewards under the host's ids, and advantages in a padded trainer's tensors."""

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
OF_THE_PRIOR = ("prior", "backbone", "adapter", "outcomes", "learnt")  # settings that say which prior is made
ESTIMATORS = {method.estimator: method.name for method in METHODS.values()}  # name in verl and SkyRL: method
PADDING = re.compile(r"pad([0-9]+|[0-9a-f]{32})")  # group ids of the rows that fill up a batch, in SkyRL and in verl


def prompt_text(prompt: Any) -> str:
    """A prompt as the text a prior reads: itself, or the texts of its messages, one a line.

    A tool call may come without a text, and a part that is an image with None for it: Arrow fills up fields that are missing.
    """
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") or [] for message in prompt]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "\n".join(part["text"] for content in parts for part in content if part.get("text") is not None)


class _Open(NamedTuple):
    """A group whose rewards are awaited."""

    prompt: str
    rate: float  # predicted
    calibration: Calibration | None  # what its rounds trust that by


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
            raise ValueError(f"prior: {self._learnt.path} keeps the one that is there; set another before the settings are given")
        self._prior, self._settled = prior, None

    def settle(self, settings: Settings, maximum: int | None = None) -> Estimator:
        """Take the prior of these settings, unless there is one already; one that was given as an object stands. Whichever it is
        goes on from the file `learnt`.

        Args:
            maximum: the most rollouts of a prompt, from a host that samples in rounds; it stands for the calls that follow.

        Returns:
            the estimator of these settings, which learns with all others of this table.

        Raises ValueError where the prior at hand was made with other settings, or what `prior_of`, `LearntFile` and `Estimator`
        raise.
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
            from v05.prior.calibration import Calibrator  # needs scipy, which methods without a prior do not

            self._calibrator = Calibrator()
        if settings.learnt is not None and self._learnt is None:
            self._learnt = LearntFile(Path(settings.learnt), {"prior": self._prior, "calibrator": self._calibrator})
        self._maximum = maximum or self._maximum
        return settings.estimator(self._prior, self._calibrator, maximum=self._maximum)

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
        """(G,) success rates predicted when the groups were opened; NaN for a group that was not, or whose prior says nothing."""
        return np.array([self._open[group].rate if group in self._open else np.nan for group in group_ids], dtype=np.float64)

    def calibrations(self, group_ids: Sequence[str]) -> list[Calibration | None]:
        """(G,) what the rounds of each group trust its prior by; None for a group that was not opened, or where nothing fits it."""
        return [self._open[group].calibration if group in self._open else None for group in group_ids]

    def close(
        self,
        estimator: Estimator,
        group_ids: Sequence[str],
        successes: NDArray[np.float64],
        trials: NDArray[np.float64],
        energies: NDArray[np.float64] | None = None,
    ) -> None:
        """Have the estimator learn what (G,) trials of each group came to, and forget the groups; those that are not open teach
        nothing."""
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
    """Advantages in the tensors that verl and SkyRL give their estimators; the groups' prior learns from the rewards.

    Args:
        token_level_rewards: (N, T), reward units. A rollout's reward is the sum of its whole row, as in the hosts: where the last
            token is a tool's, or there is none, the reward stands outside the mask. A row that is not finite is left out.
        response_mask: (N, T), 1 for the policy's own tokens. A row without any was rejected by the host or the user: it is left out
            of its group's statistics and of what the prior learns.
        index: (N,) ids of the groups, rows in any order. Rows whose id is one of `PADDING` fill up the batch and are left out.
        normalize: False takes away the division by the deviation from a method that has one, as the hosts' own switches do.
        remedy: what to do about groups that were not opened.
        trains: (N,) False for a row of which no token is trained on, where the host's mask does not say so.
        energy: (N,) of the rows, for a method that reads energies; None where the host has none.

    Returns:
        advantages and returns, both the same (N, T) float32 tensor.

    Raises:
        ValueError: the method needs a prior, and no group was ever opened or the priors are not of these settings; a reward is
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
            logger.warning("%s; their own means stand in", problem)  # a resumed host may hand over what it finished before
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
