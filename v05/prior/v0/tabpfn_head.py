"""TabPFN (Nature 2025; v2.5 in the V0 paper) as the in-context head, loaded from a checkpoint file. Tested with tabpfn 9.2.0.

The tabpfn package contains no weights, and the weights have a licence of their own: download a classifier checkpoint and give its
path. TabPFN reads the backbone's features (with the adapter's, if there is one) and each prompt's past. It classifies whether the
success rate is above 1/2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v05.prior.v0.context import Context, Past

SUREST = 1e-3  # least distance of probabilities from 0 and 1


class TabPFNHead:
    """A head that classifies with TabPFN.

    Args:
        checkpoint: file of a TabPFN classifier's checkpoint (.ckpt or .safetensors).
        estimators: TabPFN's ensemble size.

    Raises:
        ValueError: the package tabpfn or the checkpoint file is missing.
    """

    def __init__(self, checkpoint: Path, estimators: int = 4) -> None:
        try:
            from tabpfn import TabPFNClassifier
        except ImportError:
            raise ValueError("tabpfn: the package is missing; install it with: pip install tabpfn") from None
        if not Path(checkpoint).is_file():
            raise ValueError(f"tabpfn={checkpoint}: no such file; download a TabPFN classifier checkpoint and give its path")
        self._checkpoint = checkpoint
        self._classifier: Any = TabPFNClassifier(
            model_path=checkpoint,
            n_estimators=estimators,
            device="cuda" if torch.cuda.is_available() else "cpu",
            ignore_pretraining_limits=True,  # TabPFN otherwise refuses a thousand rows on a CPU
        )

    def infer(self, views: tuple[Tensor, Tensor], context: Context, past: Past, same: NDArray[np.int64]) -> Tensor:
        """(Q,) log-odds of success of the queries.

        Raises:
            ValueError: all context rows are of one class, or the checkpoint does not fit the package.
        """
        labels = context.rate > 0.5
        if labels.all() or not labels.any():
            raise ValueError(
                f"context holds {len(labels)} prompts of one class, TabPFN needs both; give a longer context, or leave TabPFN out"
            )
        columns = [
            np.concatenate((context.past.surplus, past.surplus)),
            np.log1p(np.concatenate((context.past.trials, past.trials))),
        ]
        rows = np.column_stack((views[0].numpy(), *columns))
        try:
            self._classifier.fit(rows[: len(context)], labels.astype(int))
        except (KeyError, RuntimeError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"tabpfn={self._checkpoint} cannot be used ({reason}); give a classifier checkpoint of this tabpfn version"
            ) from error
        chance = self._classifier.predict_proba(rows[len(context) :])[:, 1]
        return torch.logit(torch.from_numpy(np.asarray(chance, dtype=np.float64)).clamp(SUREST, 1 - SUREST))
