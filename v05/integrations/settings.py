"""The settings of v05 in a host's configuration. They have the same names in all hosts."""

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
    """The settings that a user may give, under the name `v05` in the host's configuration.

    Attributes:
        method: a name of `v05.methods.METHODS`. In verl and SkyRL the estimator's name already gives the method.
        reward_range: (lo, hi), which must contain all rewards, in reward units.
        leave_one_out: whether the baseline of a rollout is computed from the group's other rollouts only.
        initial: rollouts of a prompt before its first test, for hosts that sample in rounds.
        chunk: rollouts added at a time after the first test, or "look" to add as many at once as the test is expected to ask for.
        unbiased: whether the advantages of prompts that the test stopped come from counted paths (v05.path_counting), so that
            stopping does not bias the gradient. It needs a host that samples in rounds, and group_weighting "prompt".
        group_weighting: "prompt" gives every prompt the same weight in a loss that averages over rollouts: the advantages of a
            group of k rollouts are multiplied by initial / k. "rollout" does not change them.
        prior: "history", learnt in the run from prompt texts and outcomes; "mean", the mean of the run's outcomes; "spo", each
            prompt's own past (v05.prior.spo); or "v0", the generalist value model (v05.prior.v0). `read` sets the prior of the
            method's paper if none is given.
        backbone: the model folder that reads prompts, for prior "v0". None means the sentence model of the extra `value`.
        adapter: a file that `v05 fit-prior` trained on that backbone, for prior "v0".
        outcomes: a JSON-lines file with the policy's outcomes before training (`v05 eval` writes one). The prior learns it first.
        learnt: the absolute path of a file that stores the state of the prior and its calibration after every batch. A run that
            finds the file resumes from it. Every run needs a file of its own.
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
        """The settings of a mapping. `method` is the method that the host already knows, from the estimator's name.

        Raises ValueError for an unknown setting or an invalid value.
        """
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
                f"v05.unbiased=True with v05.group_weighting={settings.group_weighting!r}: large groups would have more "
                "weight, and a group's size depends on its rewards; set group_weighting to 'prompt'"
            )
        if settings.learnt is not None and not Path(settings.learnt).is_absolute():
            raise ValueError(
                f"v05.learnt={settings.learnt!r} is relative, and hosts start their processes anywhere; give an absolute path"
            )
        for name in ("backbone", "adapter"):
            if settings.prior != "v0" and getattr(settings, name) is not None:
                raise ValueError(
                    f"v05.{name}={getattr(settings, name)!r} belongs to prior 'v0', not to {settings.prior!r}; leave it out"
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
        """The estimator of these settings.

        Args:
            prior: the prior, for methods that need one.
            calibrator: the calibrator, for methods that have a calibration.
            maximum: the most rollouts of a prompt, for hosts that sample in rounds. None means that all groups have one size.
            scale: as in `v05.ops.fused_advantage`.

        Raises ValueError as `Estimator` does, and if `unbiased` is set although all groups have one size.
        """
        if self.unbiased and maximum is None:
            raise ValueError(
                "v05.unbiased=True: all groups have one size here; set leave_one_out=True instead, which is unbiased for them"
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
    """Make the prior of the settings and let it learn the file `outcomes`.

    Raises ValueError or OSError if a folder or file of the settings cannot be read.
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
