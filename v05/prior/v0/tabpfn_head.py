"""TabPFN (Nature 2025; v2.5 in the V0 paper) as the in-context head, from a checkpoint file on disk. Tested with tabpfn 9.2.0.

The package carries no weights, and their licence is their authors' to grant: fetch a classifier checkpoint and give its path.
TabPFN reads the features themselves, the adapter's among them, and each prompt's own past, and classifies success rates above 1/2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v05.prior.v0.context import Context, Past

SUREST = 1e-3  # distance that probabilities keep from 0 and 1


class TabPFNHead:
    """The head of a TabPFN classifier's checkpoint.

    Args:
        checkpoint: its file (.ckpt or .safetensors).
        estimators: TabPFN's ensemble size.

    Raises:
        ValueError: the package is missing, or the file.
    """

    def __init__(self, checkpoint: Path, estimators: int = 4) -> None:
        try:
            from tabpfn import TabPFNClassifier
        except ImportError:
            raise ValueError("tabpfn: the package is missing; install it with: pip install tabpfn") from None
        if not Path(checkpoint).is_file():
            raise ValueError(f"tabpfn={checkpoint}: no such file; give a TabPFN classifier checkpoint, nothing is downloaded")
        self._checkpoint = checkpoint
        self._classifier: Any = TabPFNClassifier(
            model_path=checkpoint,
            n_estimators=estimators,
            device="cuda" if torch.cuda.is_available() else "cpu",
            ignore_pretraining_limits=True,  # it refuses a thousand rows on a CPU otherwise
        )

    def infer(self, views: tuple[Tensor, Tensor], context: Context, past: Past, same: NDArray[np.int64]) -> Tensor:
        """(Q,) log-odds.

        Raises:
            ValueError: the context holds one class, or the checkpoint does not fit the package.
        """
        labels = context.rate > 0.5
        if labels.all() or not labels.any():
            raise ValueError(
                f"context holds {len(labels)} prompts of one class, TabPFN needs both; give a longer context, or the embedded head"
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
