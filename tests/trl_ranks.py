"""One process of test_trl.py's split groups: prints its rows' rewards and V05Trainer's advantages."""

import json
import sys

from datasets import Dataset
from tiny_policy import tiny_model, tiny_tokenizer

from v05.integrations.trl import V05Config, V05Trainer


def main(folder):
    given = []

    def reward(completions, **_):
        rank = trainer.accelerator.process_index
        given.extend([[1.0, 0.0], [0.0, 0.0]][rank])
        return given

    trainer = V05Trainer(
        model=tiny_model(),
        reward_funcs=reward,
        args=V05Config(
            output_dir=folder,
            per_device_train_batch_size=2,
            num_generations=4,
            initial_generations=None,
            max_completion_length=2,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "1+1="}, {"prompt": "2+2="}]),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    learnt = trainer.prior.predict(["1+1=", "2+2="]).tolist()
    print(json.dumps({"rank": trainer.accelerator.process_index, "advantages": batch["advantages"].tolist(), "learnt": learnt}))


if __name__ == "__main__":
    main(sys.argv[1])
