"""What a user sets of v05 in a host's configuration, under the same names in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from v05.arguments import choice
from v05.budget import Chunk
from v05.estimator import GROUP_WEIGHTINGS, Estimator, GroupWeighting
from v05.methods import METHODS, Scale
from v05.prior import MeanPrior, ValuePrior
from v05.prior.spo import SpoPrior

if TYPE_CHECKING:
    from v05.prior.calibration import Calibrator

PRIOR_KINDS = ("history", "mean", "spo", "v0")


@dataclass(frozen=True)
class Settings:
    """What a user may set, under the name `v05` in the host's configuration.

    Attributes:
        method: a name of `v05.methods.METHODS`. verl and SkyRL have it in the name of their estimator and need no other.
        reward_range: (lo, hi) that holds all rewards, reward units.
        leave_one_out: the baseline of a rollout is computed from the group's other rollouts.
        initial: rollouts of a prompt before its first test, where the host samples in rounds.
        chunk: rollouts added at a time after that, or "look", as many at once as the test is expected to ask for.
        unbiased: the advantages of prompts that the test stopped come from counted paths (v05.path_counting), so that the stop does
            not bias the gradient. Where the host samples in rounds, with group_weighting "prompt".
        group_weighting: "prompt" has prompts weigh alike in a loss that averages over rollouts, however many each got: the
            advantages of a group of k are multiplied by initial / k. "rollout" leaves them.
        prior: "history", learnt in the run from texts and outcomes, "mean", the mean of the run's outcomes, "spo", each prompt's
            own past alone (v05.prior.spo), or "v0", the generalist value model (v05.prior.v0); where it is left out, what the
            method's paper has.
        backbone: of v0, the model folder that reads prompts; None is the sentence model of the extra `value`.
        adapter: of v0, a file that `v05 fit-prior` trained on that backbone.
        outcomes: JSON lines of what the policy came to before training (`v05 eval` writes them), which the prior learns first.
        learnt: a file, by its absolute path, for what the prior and its calibration have learnt, replaced after every batch; a run
            that finds one goes on from it. One run, one file.
    """

    method: str = "v05"
    reward_range: tuple[float, float] = (0.0, 1.0)
    leave_one_out: bool = False
    initial: int = 4
    chunk: Chunk = 1
    unbiased: bool = False
    group_weighting: GroupWeighting = "rollout"
    prior: str = "history"
    backbone: str | None = None
    adapter: str | None = None
    outcomes: str | None = None
    learnt: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any] | None, method: str | None = None) -> Settings:
        """The settings of a mapping; a ValueError names what is not one. `method` is what the host already knows it to be."""
        known = {field.name for field in fields(cls)}
        given = dict(given or {})
        if method is not None and given.setdefault("method", method) != method:
            raise ValueError(f"v05.method={given['method']!r}, but the estimator's name says {method!r}; leave it out")
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"v05.{unknown[0]}={given[unknown[0]]!r} is not a setting; choose from {', '.join(sorted(known))}")
        if "reward_range" in given:
            try:
                low, high = map(float, given["reward_range"])
            except (TypeError, ValueError):
                raise ValueError(f"v05.reward_range={given['reward_range']!r} is not two numbers; give [lowest, highest]") from None
            given["reward_range"] = (low, high)
        name = given.get("method")
        if isinstance(name, str) and name in METHODS:
            given.setdefault("prior", METHODS[name].prior)
        settings = cls(**given)
        for name, choices in (("method", METHODS), ("prior", PRIOR_KINDS), ("group_weighting", GROUP_WEIGHTINGS)):
            choice(f"v05.{name}", getattr(settings, name), choices)
        if settings.unbiased and settings.group_weighting != "prompt":
            raise ValueError(
                f"v05.unbiased=True with v05.group_weighting={settings.group_weighting!r}: large groups would have more say, and "
                "which are large depends on their rewards; set group_weighting to 'prompt'"
            )
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

    def estimator(
        self,
        prior: ValuePrior | None = None,
        calibrator: Calibrator | None = None,
        *,
        maximum: int | None = None,
        scale: Scale | None = None,
    ) -> Estimator:
        """Of these settings.

        Args:
            maximum: the most rollouts of a prompt where the host samples in rounds; None where it samples groups of one size.
            scale: as in `v05.ops.fused_advantage`.

        Raises ValueError as `Estimator` does, and where paths are to be counted of groups of one size.
        """
        if self.unbiased and maximum is None:
            raise ValueError(
                "v05.unbiased=True: groups are of one size here, and leave_one_out=True is unbiased then; set that instead"
            )
        return Estimator(
            self.method,
            prior,
            calibrator,
            reward_range=self.reward_range,
            scale=scale,
            leave_one_out=self.leave_one_out,
            initial=self.initial,
            maximum=16 if maximum is None else maximum,
            chunk=self.chunk,
            unbiased=self.unbiased,
            group_weighting=self.group_weighting,
        )


def prior_of(settings: Settings) -> ValuePrior:
    """A new prior by its settings, which has learnt `outcomes`.

    Raises ValueError and OSError where a folder or file of the settings cannot be read.
    """
    prior: ValuePrior
    if settings.prior == "v0":
        from v05.prior.v0 import load_v0

        prior = load_v0(_path(settings.backbone), _path(settings.adapter))
    elif settings.prior == "mean":
        prior = MeanPrior()
    elif settings.prior == "spo":
        prior = SpoPrior()
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
