"""One rollout a prompt: which baseline is left where there is no group? In seconds, on a CPU.

    python examples/single_rollout.py

A small network learns to add two digits by policy gradients, in a loop of one's own around v05.estimator.Estimator. Every method
gets the same number of rollouts: GRPO as 8 prompts with 8 rollouts each, the others as 64 prompts with one. `none` subtracts
nothing, `batch` the mean of the batch's other rewards. `batch_energy` weighs that mean by the size of each answer's gradient, and
`optimal` does so for each prompt, from what was seen before. Printed is the success rate over all 100 prompts, the mean over seeds.
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
BATCH = 64  # rollouts of a step
FIT_EVERY = 8  # steps; a fit of the calibration takes longer than a step of this network
RUNS = {"grpo": 8, "none": 1, "batch": 1, "batch_energy": 1, "optimal": 1}  # rollouts a prompt

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
        rates = estimator.open(prompts)  # what the prior expects; NaN for a method without one

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
