"""Trains the in-context head whose weights ship with the package, on synthetic policies and on runs of real ones.

    python bench/unseen_policies.py  # leaves runs of four small policies in runs/unseen-policies
    python -m v05.prior.v0.pretrain --work runs/pretrain --out v05/prior/v0/head.safetensors --tasks 800 --epochs 10 \\
        runs/unseen-policies/tiny-* runs/unseen-policies/sums-*

A synthetic policy succeeds on a prompt with log-odds level + skill(prompt) + difficulty. Skill is a random function of the prompt's
features (directions, bumps, clusters, letters). Difficulty does not depend on the features, but almost identical prompts share it.
The share of skill in the spread is drawn at random, from almost none to almost all, so that the head learns to shrink. Level, skill
and difficulty drift from version to version, and some prompts recur. Half of the tasks use reasoning-gym prompts with the sentence
model's features, half use random points. The target is the true success rate.

Real policies are the runs named on the command line. Their histories, with the policy that each run started from as backbone, are
tasks too. From them the head learns how far the regressions can be trusted on text that the policy itself reads.

Tasks are made in shards, and training writes a checkpoint after every epoch. After an interruption, the same command resumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import load_file, save_file
from scipy.special import expit

from v05.files import read_object, replacing
from v05.prior.v0 import V0Prior
from v05.prior.v0.backbone import Backbone
from v05.prior.v0.context import History, Past
from v05.prior.v0.features import COORDINATES, Task, in_context_task
from v05.prior.v0.head import InContextHead, save_head
from v05.prior.v0.logs import read_logs, walk
from v05.prior.v0.surface import surface_features

SHARD = 50  # tasks
QUERIES = 64
LARGEST = 320  # context rows
PROMPTS_A_DATASET = 20
FIRST_COORDINATE = 8
VALIDATION_SHARDS = 4
ACCUMULATED = 2  # tasks an update
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Points:
    """P prompts as points: (P, D1) meaning features, (P, D2) surface features, (P,) cluster index."""

    meaning: NDArray[np.float64]
    surface: NDArray[np.float64]
    cluster: NDArray[np.int64]


def gym_points(cache: Path) -> Points:
    """Prompts of every second reasoning-gym dataset that needs no further downloads. They are cached in the folder `cache`."""
    kept = cache / "points.npz"
    if kept.is_file():
        with np.load(kept) as arrays:
            return Points(**arrays)
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    texts, clusters = [], []
    for number, name in enumerate(sorted(DATASETS)[::2]):
        if name == "composite":
            continue
        try:
            dataset = reasoning_gym.create_dataset(name, size=PROMPTS_A_DATASET, seed=0)
            questions = [str(item["question"])[:400] for item in dataset]
        except Exception as error:  # a few datasets need further packages or data, and raise various errors
            typer.echo(f"skipping the prompts of {name}: {error!r}")
            continue
        texts += questions
        clusters += [number] * len(questions)
    points = Points(Backbone(cache=cache).features(texts).astype(np.float64), surface_features(texts), np.array(clusters))
    np.savez(kept, **vars(points))
    return points


def random_points(rng: np.random.Generator, count: int) -> Points:
    """Random points in clusters, whose standard deviations fall by a power law over the dimensions."""
    dimensions = int(rng.integers(4, 65))
    spectrum = np.arange(1.0, dimensions + 1) ** -rng.uniform(0, 1.5)
    cluster = rng.integers(0, rng.integers(1, 30), count)
    centres = rng.normal(size=(cluster.max() + 1, dimensions)) * rng.uniform(0, 2)
    meaning = (centres[cluster] + rng.normal(size=(count, dimensions))) * spectrum
    mixed = meaning @ rng.normal(size=(dimensions, 16)) / np.sqrt(dimensions)
    surface = rng.uniform() * mixed / mixed.std() + rng.normal(size=mixed.shape)
    return Points(meaning, surface, cluster)


def some_of(points: Points, rng: np.random.Generator, count: int) -> Points:
    """At most `count` prompts of a few random clusters."""
    clusters = np.unique(points.cluster)
    few = rng.permutation(clusters)[: int(np.exp(rng.uniform(np.log(5), np.log(len(clusters)))))]
    rows = np.flatnonzero(np.isin(points.cluster, few))
    rows = rng.permutation(rows)[:count]
    return Points(points.meaning[rows], points.surface[rows], points.cluster[rows])


def with_twins(points: Points, rng: np.random.Generator) -> tuple[Points, NDArray[np.int64]]:
    """The points with some replaced by near copies of others, and the (P,) index of the point whose difficulty each shares."""
    count = len(points.cluster)
    original = np.arange(count)
    pairs = rng.permutation(count)[: 2 * int(count * rng.choice([0.0, rng.uniform(0, 0.15)]))].reshape(2, -1)
    original[pairs[0]] = pairs[1]
    blur = rng.uniform(0, 0.4)

    def copied(features: NDArray[np.float64]) -> NDArray[np.float64]:
        noise = rng.permutation(features)[: pairs.shape[1]] - features.mean(0)
        result = features[original]
        result[pairs[0]] += blur * rng.uniform(size=(pairs.shape[1], 1)) * noise
        return result

    return Points(copied(points.meaning), copied(points.surface), points.cluster[original]), original


def skill(points: Points, rng: np.random.Generator) -> NDArray[np.float64]:
    """(P,) values of a random function of the prompts' features, with mean 0 and variance 1 over the prompts."""
    meaning = points.meaning - points.meaning.mean(0)
    meaning = meaning / np.sqrt((meaning**2).sum(1).mean())
    directions = meaning @ rng.normal(size=meaning.shape[1])
    bumps = int(rng.integers(2, 40))
    width = np.exp(rng.uniform(np.log(0.5), np.log(3)))
    phases = meaning @ rng.normal(size=(meaning.shape[1], bumps)) / width + rng.uniform(0, 2 * np.pi, bumps)
    waves = np.cos(phases) @ rng.normal(size=bumps)
    clusters = rng.normal(size=points.cluster.max() + 1)[points.cluster]
    letters = points.surface @ rng.normal(size=points.surface.shape[1])
    shares = rng.dirichlet(np.full(4, 0.5))
    parts = np.stack([(part - part.mean()) / (part.std() + 1e-9) for part in (directions, waves, clusters, letters)])
    mixed = np.sqrt(shares) @ parts
    result: NDArray[np.float64] = (mixed - mixed.mean()) / (mixed.std() + 1e-9)
    return result


def synthetic_task(points: Points, rng: np.random.Generator) -> tuple[Task, NDArray[np.float64]]:
    """A random task of `QUERIES` queries, and their true success rates (QUERIES,)."""
    count = int(np.exp(rng.uniform(np.log(24), np.log(LARGEST))))
    pool = some_of(points, rng, 900) if rng.uniform() < 0.5 else random_points(rng, 900)
    pool, original = with_twins(pool, rng)
    prompts = len(pool.cluster)
    wording = rng.uniform(0, 0.5)  # weight of the part of the difficulty that near copies do not share

    def drawn_difficulty() -> NDArray[np.float64]:
        shared, apart = rng.normal(size=(2, prompts))
        result: NDArray[np.float64] = np.sqrt(1 - wording**2) * shared[original] + wording * apart
        return result

    spread = np.exp(rng.uniform(np.log(0.4), np.log(6)))
    share = rng.beta(0.6, 0.8)  # share of skill in the variance of the log-odds
    level, ability, difficulty = rng.normal(0, 1.3), skill(pool, rng), drawn_difficulty()
    versions = int(rng.integers(1, 5))
    drift = rng.uniform(0, 0.6, 3)
    recurrence = rng.choice([0.0, rng.uniform(0, 0.6)])
    trials = float(rng.choice([1, 2, 4, 4, 8, 10, 16]))
    sizes = rng.multinomial(count, rng.dirichlet(np.full(versions, 2.0))) + 1
    ahead = rng.uniform() < 0.3  # queries belong to the version after the context, as in a trainer, or else to its newest version
    history = History()
    seen: list[int] = []

    def ask() -> tuple[NDArray[np.int64], Past]:
        old = rng.permutation(seen)[: rng.binomial(QUERIES, recurrence)]
        asked = np.concatenate((old, rng.permutation(np.arange(prompts - QUERIES, prompts))))[:QUERIES].astype(np.int64)
        return asked, history.past([str(i) for i in asked])

    for version in range(versions):
        last = version == versions - 1
        rates = expit(level + spread * (np.sqrt(share) * ability + np.sqrt(1 - share) * difficulty))
        if last and not ahead:
            queries, past = ask()
        known = np.setdiff1d(seen, queries) if last and not ahead else np.array(seen)
        fresh = rng.permutation(np.setdiff1d(np.arange(prompts - QUERIES), seen))
        again = rng.permutation(known)[: rng.binomial(sizes[version], recurrence)]
        rows = np.concatenate((again, fresh[: max(sizes[version] - len(again), 1)])).astype(int)
        seen = sorted({*seen, *rows.tolist()})
        history.add([str(i) for i in rows], rng.binomial(int(trials), rates[rows]) / trials, np.full(len(rows), trials))
        if not last or ahead:
            level += rng.normal(0.2, 1) * drift[0]
            ability = np.sqrt(1 - drift[1] ** 2) * ability + drift[1] * skill(pool, rng)
            difficulty = np.sqrt(1 - drift[2] ** 2) * difficulty + drift[2] * drawn_difficulty()
    if ahead:
        queries, past = ask()
        rates = expit(level + spread * (np.sqrt(share) * ability + np.sqrt(1 - share) * difficulty))
    context = history.context(count)
    rows = np.array([*map(int, context.prompts), *queries])
    place = {prompt: i for i, prompt in enumerate(context.prompts)}
    same = np.array([place.get(str(i), -1) for i in queries])
    views = (torch.from_numpy(pool.meaning[rows]), torch.from_numpy(pool.surface[rows]))
    return in_context_task(views, context, past, same), rates[queries]


def run_tasks(directory: Path, rng: np.random.Generator, draws: int) -> Iterator[tuple[Task, NDArray[np.float64]]]:
    """Tasks from the outcomes of a `v05 train` run, with the policy that the run started from as backbone.

    The targets are success rates of the run's rollouts. Each draw splits the prompts into context and queries at random, and takes
    one version and setting with a random part of its context.
    """
    folder = read_object(directory / "config.json")["policy"]["path"]
    prior = V0Prior(Backbone(Path(folder), directory / "features"), InContextHead())
    rows = read_logs(sorted(directory.glob("outcomes/*.jsonl")))
    prompts = sorted({row.prompt for row in rows})
    for _ in range(draws):
        held_out = set(rng.permutation(prompts)[: rng.binomial(len(prompts), 0.2)].tolist())
        split = [replace(row, split="test" if row.prompt in held_out else "context") for row in rows]
        versions = list(walk(split, len(prompts)))
        queries = versions[rng.integers(len(versions))]
        size = int(np.exp(rng.uniform(np.log(24), np.log(LARGEST))))
        context = queries.context[rng.permutation(len(queries.context))[:size]]
        asked = rng.permutation(len(queries.rows))[:QUERIES]
        texts = [*context.prompts, *(queries.rows[i].prompt for i in asked)]
        place = {prompt: i for i, prompt in enumerate(context.prompts)}
        same = np.array([place.get(prompt, -1) for prompt in texts[len(context) :]])
        views = (prior.meaning(texts), torch.from_numpy(surface_features(texts)))
        rates = np.array([queries.rows[i].rate for i in asked])
        yield in_context_task(views, context, queries.past[asked], same), rates


def make_shard(path: Path, tasks: Iterable[tuple[Task, NDArray[np.float64]]]) -> None:
    """Write tasks and their success rates to a safetensors file, atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (task, rates) in enumerate(tasks):
        tensors |= {
            f"{i}.rows": task.rows,
            f"{i}.labels": task.labels,
            f"{i}.base": task.base,
            f"{i}.rates": torch.from_numpy(rates).float(),
        }
    with replacing(path) as scratch:
        save_file(tensors, scratch)


def load_shard(path: Path) -> list[tuple[Task, torch.Tensor]]:
    tensors = load_file(path)
    count = sum(name.endswith(".base") for name in tensors)
    return [(Task(*(tensors[f"{i}.{part}"] for part in ("rows", "labels", "base"))), tensors[f"{i}.rates"]) for i in range(count)]


def excess(logits: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the last Q predictions minus that of the true rates, in nats."""
    floor = torch.nn.functional.binary_cross_entropy(rates, rates)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[-len(rates) :], rates) - floor


@torch.no_grad()
def validate(head: InContextHead, tasks: list[tuple[Task, torch.Tensor]]) -> tuple[float, float]:
    """Mean excess cross-entropy of the head and of the base prediction, in nats."""
    pairs = [(excess(head(task), rates).item(), excess(task.base, rates).item()) for task, rates in tasks]
    ours, base = np.mean(pairs, axis=0)
    return float(ours), float(base)


def flipped(task: Task, generator: torch.Generator) -> Task:
    """The task with random signs of the principal components, because their signs are arbitrary."""
    signs = torch.ones(task.rows.shape[1], device="cpu")
    drawn = torch.randint(0, 2, (COORDINATES,), generator=generator, device="cpu")
    signs[FIRST_COORDINATE : FIRST_COORDINATE + COORDINATES] = drawn * 2.0 - 1
    return Task(task.rows * signs, task.labels, task.base)


def main(
    work: Annotated[Path, typer.Option(help="The directory for shards and checkpoints.")],
    out: Annotated[Path, typer.Option(help="The weight file to write.")],
    tasks: Annotated[int, typer.Option(help="The number of synthetic tasks.", min=SHARD)] = 1000,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    runs: Annotated[list[Path] | None, typer.Argument(help="Directories of `v05 train` runs to make tasks from.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make the tasks, train the head, and write its weights."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    shards = [work / f"tasks-{seed}-{i}.safetensors" for i in range(tasks // SHARD + VALIDATION_SHARDS)]
    missing = [(i, path) for i, path in enumerate(shards) if not path.is_file()]
    if missing:
        points = gym_points(work)
        for i, path in track(missing, "tasks"):
            rng = np.random.default_rng((seed, i))
            make_shard(path, (synthetic_task(points, rng) for _ in range(SHARD)))
    for i, run in enumerate(track(runs or [], "runs")):
        shards.append(work / f"run-{seed}-{i}.safetensors")
        if not shards[-1].is_file():
            make_shard(shards[-1], run_tasks(run, np.random.default_rng((seed, 1, i)), SHARD))
    validation = [task for path in shards[:VALIDATION_SHARDS] for task in load_shard(path)]
    training = [task for path in shards[VALIDATION_SHARDS:] for task in load_shard(path)]

    torch.manual_seed(seed)
    head = InContextHead()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    steps = epochs * (len(training) // ACCUMULATED)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    checkpoint, first = work / f"checkpoint-{seed}.pt", 0
    if checkpoint.is_file():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(training), generator=generator, device="cpu")[: len(training) // ACCUMULATED * ACCUMULATED]
        for batch in track(order.split(ACCUMULATED), f"epoch {epoch + 1} of {epochs}"):
            optimizer.zero_grad()
            for i in batch.tolist():
                task, rates = training[i]
                (excess(head(flipped(task, generator)), rates) / ACCUMULATED).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        ours, base = validate(head, validation)
        print(f"epoch {epoch + 1}: excess cross-entropy {ours:.4f} nats, of the regressions alone {base:.4f} nats", flush=True)
        state = {
            "head": head.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
        }
        with replacing(checkpoint) as scratch:
            torch.save(state, scratch)
    ours, base = validate(head, validation)
    settings = dict(
        tasks=str(len(training)),
        epochs=str(epochs),
        seed=str(seed),
        excess=f"{ours:.4f}",
        excess_of_base=f"{base:.4f}",
        runs=str(len(runs or [])),
    )
    save_head(head, out, settings)


if __name__ == "__main__":
    typer.run(main)
