"""The script that test_trl.py starts with torchrun: V05Trainer in several processes, each with a part of every group.

torchrun --nproc-per-node 2 trl_rank_script.py FOLDER    # writes FOLDER/RANK.pt and FOLDER/run
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_trl import V05Config, V05Trainer, make, tiny_tokenizer

SIZE = 8  # completions per prompt
STEPS = 3


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    settings = {
        "num_generations": SIZE,
        "per_device_train_batch_size": SIZE // int(os.environ["WORLD_SIZE"]),
        "gradient_accumulation_steps": 1,
        "initial_generations": None,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    options = (V05Trainer, V05Config, tiny_tokenizer(), folder / "run")
    trainer = make(*options, settings=settings)
    batches = []

    def remembered(inputs, generate=trainer._generate_and_score_completions):
        output = generate(inputs)
        batches.append((trainer._rates.tolist(), trainer._rewards.flatten(), output["advantages"]))
        return output

    trainer._generate_and_score_completions = remembered
    trainer.train()
    again = make(*options, settings=settings | {"max_steps": STEPS + 1})
    again.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{STEPS}"))
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    torch.save(
        {"batches": batches, "weights": weights, "learnt": trainer.prior.state_dict(), "resumed": again.prior.state_dict()},
        folder / f"{os.environ['RANK']}.pt",
    )
    dist.barrier()  # a rank that leaves early closes the others' connections
    os._exit(0)  # gloo's threads sometimes abort an interpreter that is shutting down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
