"""A value model as the prior: V0 predicts a prompt's success rate before sampling, from the policy's outcomes on other prompts.

    pip install '.[value]'
    python examples/value_model.py [--backbone FOLDER]

The policy is simulated, so that its success rates are known: it adds well, multiplies badly, and does worse with larger numbers.
Every step has new prompts with 2 rollouts each. The script prints the root mean square error of each baseline against the true
success rate. FOLDER is the folder of a Hugging Face model that reads prompts. The default is the sentence model of the extra
`value`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from v05.estimator import Estimator
from v05.prior.calibration import Calibrator
from v05.prior.v0 import load_v0

PROMPTS, ROLLOUTS = 32, 2  # prompts per step and rollouts per prompt
WARM_UP = 4  # first steps that are not counted, because V0 needs a context


def made_up(rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """PROMPTS random prompts, and the simulated policy's success rates (PROMPTS,)."""
    a, b = rng.integers(1, 1000, (2, PROMPTS))
    product = rng.random(PROMPTS) < 0.5
    prompts = [f"What is {x} {'times' if p else 'plus'} {y}?" for x, y, p in zip(a, b, product, strict=True)]
    return prompts, np.where(product, 0.35, 0.9) - 0.3 * (np.maximum(a, b) > 500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    try:
        value_model = load_v0(arguments.backbone)
    except ValueError as error:
        raise SystemExit(str(error)) from None

    rng = np.random.default_rng(0)
    estimator = Estimator("calibrated", value_model, Calibrator())
    names = ("1/2 for every prompt", "mean of 2 rollouts", "V0", "V0 fused with the mean")
    squares: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for step in range(arguments.steps):
        prompts, truth = made_up(rng)
        rates = estimator.open(prompts)  # before sampling; NaN in the first step
        rewards = rng.binomial(1, truth[:, None], (PROMPTS, ROLLOUTS))
        estimate = estimator.advantages(rewards.ravel(), rates, group_offsets=np.arange(PROMPTS + 1) * ROLLOUTS)
        estimator.close(prompts, rates, *estimator.outcomes(estimate.stats))
        if step >= WARM_UP:
            baselines = (np.full(PROMPTS, 0.5), rewards.mean(1), rates, estimate.stats.baseline.numpy())
            for kept, baseline in zip(squares.values(), baselines, strict=True):
                kept.append((baseline - truth) ** 2)
    for name, kept in squares.items():
        print(f"{name:<23} {np.sqrt(np.mean(kept)):.3f}")


if __name__ == "__main__":
    main()
