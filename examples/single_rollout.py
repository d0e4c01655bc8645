"""Training with one rollout per prompt: which baseline can replace the group's mean? It takes seconds on a CPU.

    python examples/single_rollout.py

A small network learns to add two digits by policy gradients, in a training loop around v05.estimator.Estimator. Every method gets
the same number of rollouts: GRPO has 8 prompts with 8 rollouts each per step, the other methods have 64 prompts with one rollout.
`none` subtracts nothing, and `batch` subtracts the mean of the batch's other rewards. `batch_energy` weights that mean by the
squared gradient norm of each answer. `optimal` does the same per prompt, from the outcomes of earlier steps. The script prints the
success rate over all 100 prompts, averaged over seeds.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from v05.energy import token_energy
from v05.estimator import Estimator
from v05.prior.calibration import Calibrator
from v05.prior.spo import SpoPrior

DIGITS, ANSWERS = 10, 19
BATCH = 64  # rollouts per step
FIT_EVERY = 8  # steps between fits of the calibration, which take longer than a step of this network
RUNS = {"grpo": 8, "none": 1, "batch": 1, "batch_energy": 1, "optimal": 1}  # rollouts per prompt

PAIRS = torch.cartesian_prod(torch.arange(DIGITS), torch.arange(DIGITS))
INPUTS = torch.cat([torch.nn.functional.one_hot(PAIRS[:, i], DIGITS) for i in (0, 1)], dim=1).float()
SUMS = PAIRS.sum(1)
TEXTS = [f"{a}+{b}=" for a, b in PAIRS.tolist()]


def train(method: str, rollouts: int, seed: int, steps: int) -> float:
    """The success rate after `steps` steps."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(2 * DIGITS, 64), torch.nn.ReLU(), torch.nn.Linear(64, ANSWERS))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    estimator = Estimator(method, SpoPrior(), Calibrator(), leave_one_out=method != "grpo")
    offsets = np.arange(0, BATCH + 1, rollouts)
    for step in range(steps):
        drawn = torch.randint(len(PAIRS), (BATCH // rollouts,))
        prompts = [TEXTS[i] for i in drawn.tolist()]
        rates = estimator.open(prompts)  # predictions of the prior; NaN for a method without a prior

        rows = drawn.repeat_interleave(rollouts)
        policy = torch.distributions.Categorical(logits=network(INPUTS[rows]))
        answers = policy.sample()
        rewards = (answers == SUMS[rows]).float()
        with torch.no_grad():  # the squared norm of the logits' gradient of each answer
            energy = token_energy(1 - policy.log_prob(answers).exp(), policy.probs.square().sum(1))

        estimate = estimator.advantages(rewards, rates, group_offsets=offsets, energy=energy.numpy())
        loss = -(estimate.advantages * policy.log_prob(answers)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outcomes = estimator.outcomes(estimate.stats)
        estimator.close(prompts, rates, *outcomes, estimate.energies, fit=step % FIT_EVERY == 0)
    with torch.no_grad():
        return float(network(INPUTS).softmax(1)[torch.arange(len(PAIRS)), SUMS].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for method, rollouts in RUNS.items():
        rates = [train(method, rollouts, seed, arguments.steps) for seed in range(arguments.seeds)]
        print(f"{method}@{rollouts}: success rate {np.mean(rates):.2f} after {arguments.steps * BATCH} rollouts")


if __name__ == "__main__":
    main()
