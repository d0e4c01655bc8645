"""Trains and samples under injected faults, and prints what was injected and what was lost. `make soak` runs it for five minutes.

Sampling under fire: the allocator leases the rollouts of prompts one by one. Meanwhile processes that sample or verify are killed,
verifications hang, die and raise, leases expire, and reports arrive twice, too late or for leases that never existed. The result is
compared, rollout by rollout, with the same prompts sampled in peace.

Training under fire: a run is killed with SIGKILL again and again and resumes each time. It is compared bitwise with a run that was
left alone.

The exit status is 1 if anything was lost, or if one of the faults never occurred.

A small policy samples the rollouts: in actors on a Ray cluster where Ray is installed, otherwise in this process, by an engine that
gives up some of the rollouts.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from helpers.kill_and_resume import Runner, lost, smoke
from v05.budget import RolloutAllocator
from v05.rollout import Failure
from v05.rollout.scheduler import collect
from v05.rollout.transformers_engine import TransformersEngine
from v05.rollout.verifier import InlineVerifier, VerifierPool
from v05.tasks import Prompt
from v05.train.config import PolicyConfig
from v05.train.policy import character_decoder, character_tokenizer

PROMPTS = 48  # per round
TIME_LIMIT = 0.5  # seconds per verification
ATTEMPTS = 1000  # per rollout: so many that no rollout is given up, because every rollout is compared
KILLS = 10  # per training run
HERE = Path(__file__).parent
TOKENIZER = character_tokenizer()


def chance(*what: object) -> float:
    """A number in [0, 1) that depends on `what` alone, and is equal in every process."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class PeacefulTask:
    """Rewards that depend on prompt and completion alone. A completion that would hang, kill or break its verifier gets 0."""

    def verify(self, prompt: Prompt, completion: str) -> float:
        return float(trouble_of(prompt, completion) is None and chance("reward", prompt.text, completion) < 0.5)


class HostileTask(PeacefulTask):
    """The rewards of PeacefulTask, but some verifications hang, die or raise. Each of these leaves a file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def verify(self, prompt: Prompt, completion: str) -> float:
        trouble = trouble_of(prompt, completion)
        if trouble is not None:
            (self._folder / f"{trouble}-{int(2**60 * chance(prompt.text, completion))}").touch()
        if trouble == "hang":
            time.sleep(3600)
        if trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "raise":
            raise RuntimeError("a verifier that is not well")
        return super().verify(prompt, completion)


def trouble_of(prompt: Prompt, completion: str) -> str | None:
    """The fault that a completion causes in its verifier, None for most. The reference answer causes none."""
    place = chance("trouble", prompt.text, completion)
    if completion == prompt.answer or place >= 0.033:
        return None
    return "hang" if place < 0.003 else "die" if place < 0.013 else "raise"


class LyingAllocator(RolloutAllocator):
    """Repeats every report with the opposite reward, adds reports of old and of invented leases, and at times lets all leases
    expire.
    """

    def __init__(self, *, rng: random.Random, **settings: object) -> None:
        super().__init__(**settings)
        self._rng = rng
        self._old: list[int] = []

    def lease(self, n):
        if self._rng.random() < 0.03:
            self.expire(0.0)
        return super().lease(n)

    def report(self, lease_ids, rewards):
        super().report(lease_ids, rewards)
        super().report(lease_ids, [1.0 - reward for reward in rewards])
        if self._old:
            stale = self._rng.choices(self._old, k=4)
            super().report(stale, [1.0] * len(stale))
        invented = [self._rng.randrange(2**40, 2**60) for _ in range(2)]
        super().report(invented, [1.0, 0.0])
        super().fail(invented)
        self._old += lease_ids


class WeakEngine:
    """The embedded engine, but it gives up one rollout in ten."""

    reproducible = False

    def __init__(self, engine: TransformersEngine, rng: random.Random) -> None:
        self._engine = engine
        self._rng = rng
        self.capacity = engine.capacity
        self.decode, self.submit, self.close = engine.decode, engine.submit, engine.close
        self.injected = Counter({"rollouts that the engine gave up": 0})

    def poll(self, timeout=None):
        results = self._engine.poll(timeout)
        self._rng.shuffle(results)
        given_up = [key for key, _ in results if self._rng.random() < 0.1]
        self.injected["rollouts that the engine gave up"] += len(given_up)
        return [(key, Failure("the engine is tired") if key in given_up else result) for key, result in results]


class KilledActors:
    """An engine of Ray actors. One of them is killed every few seconds."""

    def __init__(self, rng: random.Random) -> None:
        import ray

        from v05.rollout.ray_engine import RayEngine

        self._mark = f"V05_SOAK={os.getpid()}"
        environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", str(HERE)), **dict([self._mark.split("=")])}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
        self.engine = RayEngine(make_engine, TOKENIZER, actors=2)
        self.injected = Counter({"actors killed while sampling": 0})
        self._rng = rng
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._kill, daemon=True)
        self._thread.start()

    def _kill(self) -> None:
        while not self._stop.wait(2 + 4 * self._rng.random()):
            actors = self._pids()
            # Kill no actor while another starts: the engine raises an error, as it should, if three starts in a row fail.
            if len(actors) > 1 and all(actor.capacity for actor in self.engine._actors):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._rng.choice(actors), signal.SIGKILL)
                    self.injected["actors killed while sampling"] += 1

    def _pids(self) -> list[int]:
        """The process ids of the actors of this cluster alone."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_actor = (process / "cmdline").read_bytes().startswith(b"ray::_Actor")
                if is_actor and self._mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def stop(self) -> None:
        import ray

        self._stop.set()
        self._thread.join()
        ray.shutdown()


def make_engine() -> TransformersEngine:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = character_decoder(PolicyConfig(hidden_size=48, layers=2, heads=2, intermediate_size=96), len(TOKENIZER))
    return TransformersEngine(model, TOKENIZER, max_new_tokens=6, capacity=64)


def sample(allocator, engine, verifier, number: int):
    """Sample round `number`, and return its batch."""
    prompts = [Prompt(f"{number}+{i}=", "", None) for i in range(PROMPTS)]
    tokens = [tuple(TOKENIZER(prompt.text)["input_ids"]) for prompt in prompts]
    priors = np.array([0.05 + 0.9 * chance("prior", prompt.text) for prompt in prompts])
    return collect(allocator, engine, verifier, prompts, tokens, priors, first_group=number * PROMPTS)


def differences(peace, fire) -> Counter:
    """Counts of the prompts, rollouts and rewards of `peace` that are missing or different in `fire`."""
    found = Counter({"prompts": len(peace.prompts) - len(fire.prompts), "rollouts given up": fire.invalid})
    for g, (start, stop) in enumerate(zip(peace.offsets[:-1], peace.offsets[1:], strict=True)):
        if g >= len(fire.prompts):
            break
        theirs = range(fire.offsets[g], fire.offsets[g + 1])
        found["rollouts missing or too many"] += abs((stop - start) - len(theirs))
        for i, j in zip(range(start, stop), theirs, strict=False):
            found["completions changed"] += int(peace.completions[i].tokens.tolist() != fire.completions[j].tokens.tolist())
            found["rewards changed"] += int(peace.rewards[i] != fire.rewards[j])
    return found


def sampling_under_fire(seconds: float, seed: int, folder: Path) -> tuple[Counter, Counter]:
    """Counts of injected faults and of losses."""
    settings = dict(rule="osla", initial=4, maximum=16, seed=seed, max_attempts=ATTEMPTS)
    peace = RolloutAllocator(**settings)
    fire = LyingAllocator(rng=random.Random(seed), **settings)
    calm = make_engine()
    try:
        source = KilledActors(random.Random(seed))
        engine = source.engine
    except ImportError:
        source, engine = None, WeakEngine(make_engine(), random.Random(seed))
    pool = VerifierPool(functools.partial(HostileTask, folder), workers=2, time_limit=TIME_LIMIT)
    injected, losses = Counter(), Counter()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or not injected:
        number = injected["rounds"]
        quiet = sample(peace, calm, InlineVerifier(PeacefulTask()), number)
        loud = sample(fire, engine, pool, number)
        losses.update(differences(quiet, loud))
        injected["rounds"] += 1
        injected["rollouts"] += len(loud.rewards)
    pool.close()
    if source is not None:
        source.stop()
    counts = fire.counts()
    injected.update(
        {
            "verifications that hung": pool.timed_out,
            "verifier processes that died": len(list(folder.glob("die-*"))),
            "verifications that raised": len(list(folder.glob("raise-*"))),
            "leases expired": counts["expired"],
            "reports a second time": counts["duplicate"],
            "reports too late": counts["late"],
            "reports of no lease": counts["unknown"],
        }
    )
    injected.update((engine if source is None else source).injected)
    return injected, losses


def training_under_fire(seconds: float, seed: int, folder: Path) -> tuple[Counter, Counter]:
    """Counts of injected faults and of losses."""
    runner, injected, losses = Runner(), Counter(), Counter()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or not injected:
        number = injected["runs"]
        config, directory = smoke(steps=8 * KILLS), folder / str(number)
        runner.finish(config, directory / "whole")
        killed = runner.kill_and_resume(config, directory / "killed", KILLS, seed + number)
        injected.update({"runs": 1, "kill -9 of a run": killed.kills, "of them inside a checkpoint": killed.in_checkpoint})
        losses.update(lost(directory / "whole", directory / "killed"))
    return injected, losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        # Training goes first: it loads what training imports into the fork server, from which verifiers are forked too.
        for name, part in {"training under fire": training_under_fire, "sampling under fire": sampling_under_fire}.items():
            folder = Path(scratch, name)
            folder.mkdir()
            print(f"{name}: {options.minutes / 2:.1f} minutes", flush=True)
            injected, losses = part(30 * options.minutes, options.seed, folder)
            for what, count in injected.items():
                print(f"  injected  {count:>8}  {what}")
            wrong = {what: count for what, count in losses.items() if count}
            never = [what for what, count in injected.items() if not count]
            failed |= bool(wrong or never)
            print("  lost      " + (", ".join(f"{count} {what}" for what, count in wrong.items()) or "       0"), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
