"""The script that test_ranks.py starts with torchrun: runs of two ranks. In the last run rank 1 raises.

torchrun --nproc-per-node 2 rank_script.py FOLDER    # FOLDER/NAME.json: a run's configuration, its directory FOLDER/NAME
"""

import os
import sys
from pathlib import Path

import torch

from v05.train.config import RunConfig
from v05.train.trainer import Trainer

NAMES = ("ddp", "fsdp2", "refills", "calibrated", "idle", "overlap", "bfloat16", "bfloat16-fsdp2", "lora")
TORN = "torn"  # the run in which rank 1 raises
LIVES = 250  # completions that rank 1 reads before it raises


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        for _ in Trainer(read(folder, name), folder / name, print).run():
            pass
    trainer = Trainer(read(folder, TORN), folder / TORN, print)
    if os.environ["RANK"] == "1":
        trainer.engine.decode = raise_after(LIVES, trainer.engine.decode)
    for _ in trainer.run():
        pass


def read(folder, name):
    return RunConfig.model_validate_json((folder / f"{name}.json").read_text())


def raise_after(count, decode):
    left = iter(range(count))

    def decode_or_raise(completion):
        if next(left, None) is None:
            raise RuntimeError("rank 1 has had enough")
        return decode(completion)

    return decode_or_raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
