"""Kill a run many times, resume it each time, and compare it with a run that was left alone.

    python tests/helpers/kill_and_resume.py --kills 20 --directory /tmp/killed

Prints what was injected and what was lost. The exit status is 1 if anything was lost. One kill in three hits while a checkpoint is
written or an old one deleted. The others come a random time after a few records.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from v05.train.compare import run_one
from v05.train.config import RunConfig
from v05.train.metrics import METRICS, read_metrics
from v05.train.presets import run_config


@dataclass
class Injected:
    """The kills that a run went through."""

    kills: int = 0
    in_checkpoint: int = 0
    resumed: int = 0  # how many of the processes resumed from a checkpoint
    exit_codes: list[int] = field(default_factory=list)


def untimed(directory: Path) -> list[dict]:
    """All records of a run without their times."""
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in read_metrics(directory)]


def policy_digest(directory: Path) -> str:
    return hashlib.sha256((directory / "policy" / "model.safetensors").read_bytes()).hexdigest()


def smoke(steps: int, method: str = "v05") -> RunConfig:
    """The smoke preset for about `steps` steps, with a checkpoint after each."""
    return run_config("smoke", method, total_rollouts=64 * steps, checkpoint_seconds=0)


class Runner:
    """Starts runs as processes that have imported everything already, so that one lives for only tenths of a second."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["v05.train.trainer", "reasoning_gym"])

    def start(self, config: RunConfig, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=run_one, args=(config, directory))
        process.start()
        return process

    def finish(self, config: RunConfig, directory: Path) -> None:
        process = self.start(config, directory)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"the run failed; its log:\n{(directory / 'log.txt').read_text()}")

    def kill_and_resume(self, config: RunConfig, directory: Path, kills: int, seed: int = 0) -> Injected:
        """Run `config` to its end with `kills` SIGKILLs on the way.

        Raises:
            RuntimeError: if the run ends or fails before the last kill.
        """
        rng = random.Random(seed)
        injected = Injected()
        while injected.kills < kills:
            process = self.start(config, directory)
            inside = injected.kills % 3 == 2
            reached = wait_inside_checkpoint(process, directory) if inside else wait_at_random(process, directory, rng)
            if not reached:
                log = (directory / "log.txt").read_text()
                raise RuntimeError(f"the run ended by itself after {injected.kills} kills; its log:\n{log}")
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            injected.kills += 1
            injected.in_checkpoint += any(directory.glob("checkpoint-*.partial"))
            injected.exit_codes.append(process.exitcode)
        self.finish(config, directory)
        injected.resumed = (directory / "log.txt").read_text().count("resuming from step")
        return injected


def wait_at_random(process, directory: Path, rng: random.Random) -> bool:
    """Wait for up to seven new records and then a little. Returns False if the run ends before that."""
    metrics = directory / METRICS
    lines = rng.randrange(8)  # often enough records for a first checkpoint, so that a slow machine has one to resume from
    pause = rng.random() * 0.1
    before = measured(directory) if lines else 0
    size = -1
    while lines and process.is_alive():
        time.sleep(0.005)
        if not metrics.exists() or metrics.stat().st_size == size:
            continue
        size, now = metrics.stat().st_size, measured(directory)
        if now >= before + lines:
            break
        before = min(before, now)  # on resuming, the file is cut back to the checkpoint
    time.sleep(pause)
    return process.is_alive()


def measured(directory: Path) -> int:
    """The number of a run's records, without the records of completions: a step may write many of those."""
    return sum(record["kind"] != "group" for record in read_metrics(directory))


def wait_inside_checkpoint(process, directory: Path) -> bool:
    """Stop the process while a checkpoint is half-written or half-deleted. Returns False if the run ends before that."""
    before = partials(directory)
    while process.is_alive():
        if partials(directory) - before:
            os.kill(process.pid, signal.SIGSTOP)
            while process.is_alive() and state_of(process.pid) != "T":
                time.sleep(0.001)
            if partials(directory) - before:
                return True
            os.kill(process.pid, signal.SIGCONT)  # the checkpoint was complete before the process stopped: wait for the next one
        time.sleep(0.0002)
    return False


def partials(directory: Path) -> set[int]:
    """Inodes of half-written and half-deleted checkpoints. By inode, two checkpoints of the same name are different."""
    with os.scandir(directory) as entries:  # config.json and result.json have partial files too
        return {entry.inode() for entry in entries if entry.name.startswith("checkpoint-") and entry.name.endswith(".partial")}


def state_of(pid: int) -> str:
    """The letter by which the system names a process's state; T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def lost(whole: Path, killed: Path) -> dict[str, int]:
    """Counts of differences between the run left alone and the killed one. All are zero if nothing was lost or counted twice."""
    expected, found = untimed(whole), untimed(killed)
    steps = [record["step"] for record in found if record["kind"] == "step"]
    results = [json.loads((directory / "result.json").read_text()) for directory in (whole, killed)]
    return {
        "records missing": sum(record not in found for record in expected),
        "records too many": len(found) - len(expected),
        "records out of place": sum(a != b for a, b in zip(expected, found, strict=False)),
        "steps counted twice": len(steps) - len(set(steps)),
        "rollouts": abs(results[0]["rollouts"] - results[1]["rollouts"]),
        "held-out successes": int(results[0]["heldout_successes"] != results[1]["heldout_successes"]),
        "policy": int(policy_digest(whole) != policy_digest(killed)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    runner, config = Runner(), smoke(steps=8 * options.kills)
    runner.finish(config, options.directory / "whole")
    injected = runner.kill_and_resume(config, options.directory / "killed", options.kills, options.seed)
    losses = lost(options.directory / "whole", options.directory / "killed")
    print(
        f"injected: {injected.kills} kills, {injected.in_checkpoint} of them inside a checkpoint; resumed {injected.resumed} times"
    )
    print(f"lost: {losses}")
    return int(any(losses.values()))


if __name__ == "__main__":
    raise SystemExit(main())
