"""Measures the signal-to-noise ratio of the policy gradient at equal rollouts: `python bench/gradient_quality.py HISTORY.jsonl`.

Writes bench/results/gradient_quality.csv. Every prompt of a regime of bench/regimes.py is a bandit of bench/bandit.py with its own
policy. The ratio is the norm of the mean gradient of all prompts divided by the root of its variance, with k rollouts per prompt.
"oracle" subtracts the true success rate. All baselines are leave-one-out, so all have the same signal. The calibrator has learnt
from 4096 earlier groups of k.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from bandit import moments, squared_gradient
from machine import commit, processor, versions
from numpy.typing import NDArray
from regimes import REGIMES, draw_from, read_successes

from v05.ops import fused_advantage
from v05.prior.calibration import Calibrator
from v05.simulate.replay import Groups

RESULTS = Path(__file__).parent / "results" / "gradient_quality.csv"
FIELDS = ("regime", "k", "baseline", "signal_to_noise", "of_oracle", "standard_error", "device", "commit", "versions")
SIZES = (1, 2, 4, 8)
GROUPS = 200_000
BATCHES = 20  # parts of the groups, for standard errors
METHODS = {"leave-one-out mean": "rloo", "v05": "v05", "calibrated": "calibrated"}

Array = NDArray[np.float64]


def advantages(name: str, groups: Groups, calibrator: Calibrator) -> Array:
    """(G, k) advantages with a leave-one-out baseline."""
    if name == "oracle":
        return groups.rewards - groups.rates[:, None]
    count, k = groups.rewards.shape
    output = fused_advantage(
        groups.rewards.ravel(),
        groups.priors,
        group_offsets=np.arange(count + 1) * k,
        method=METHODS[name],
        leave_one_out=True,
        calibration=calibrator.calibration,
        singleton="raw",  # without other rollouts and without a prior the advantage is the reward itself
        dtype=torch.float64,
    )
    return output.advantages.numpy().reshape(count, k)


def signal_to_noise(adv: Array, groups: Groups) -> Array:
    """(BATCHES,) signal-to-noise ratios, one for each part of the groups."""
    p = np.clip(groups.rates, 1e-9, 1 - 1e-9)
    _, squared_norm = moments(adv / adv.shape[1], groups.rewards, p)
    signal = squared_gradient(p)
    noise = squared_norm - signal
    return np.sqrt(signal.reshape(BATCHES, -1).sum(axis=1) / noise.reshape(BATCHES, -1).sum(axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("history", type=Path, help="policy history, JSON lines")
    successes = read_successes(parser.parse_args().history)
    about = (processor(), commit(), versions("numpy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for regime in REGIMES:
            for k in SIZES:
                draw = draw_from(successes, regime, k, np.random.default_rng(0))
                calibrator = Calibrator()
                seen = draw(4096)
                calibrator.observe(seen.rewards.sum(axis=1), np.full(4096, k), seen.priors)
                calibrator.fit()
                groups = draw(GROUPS)
                found = {name: signal_to_noise(advantages(name, groups, calibrator), groups) for name in ("oracle", *METHODS)}
                shares = []
                for name, values in found.items():
                    share = values / found["oracle"]
                    error = float(share.std(ddof=1) / BATCHES**0.5)
                    shares.append(f"{name} {share.mean():.4f} ± {error:.4f}")
                    writer.writerow((regime, k, name, f"{values.mean():.6g}", f"{share.mean():.6g}", f"{error:.2g}", *about))
                print(f"{regime:<18} k = {k}: of the oracle's  {',  '.join(shares[1:])}", flush=True)


if __name__ == "__main__":
    main()
