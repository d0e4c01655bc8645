"""Run directories as the trainer writes them, without training. The figures are plausible, and fixed by method and seed."""

import json

import numpy as np

from v05.train.metrics import plain_json
from v05.train.presets import run_config

HOSTILE = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)> & \u2028 \"quoted\" {{document}}"
SPEED = {"grpo": (0.16, 1.05), "v05": (0.24, 0.3), "calibrated": (0.26, 0.22), "dr_grpo": (0.22, 0.24)}  # gain, gradient norm


def write_run(directory, spec, seed, *, steps=60, of=60, evaluations=8, new=True, samples=8, completions=4, **overrides):
    """Write a run of `steps` steps. It is unfinished if `steps` < `of`, and lacks the figures of newer versions unless `new`."""
    config = run_config("tiny", spec, seed=seed, total_rollouts=of * 512, **overrides)
    budget = config.budget
    rng = np.random.default_rng([seed, sum(map(ord, spec))])
    gain, norm = SPEED[config.method]
    sequential = budget.rule != "uniform"
    records, seconds, tokens = [], 0.0, 0

    def evaluation(step):
        accuracy = 0.45 + gain * (1 - np.exp(-2.5 * step / of)) + rng.normal(0, 0.006)
        entropy = 0.42 - 0.1 * step / of + rng.normal(0, 0.004)
        newer = {"generated_tokens": tokens} if new else {}
        newer |= {"prior_auc": 0.5 + 0.3 * step / of if step else None} if sequential else {}
        records.append(
            {"kind": "evaluation", "rollouts": step * 512, "seconds": seconds, "accuracy": accuracy, "entropy": entropy} | newer
        )

    def probe(step):
        mse = 0.004 + 0.03 / budget.initial + rng.normal(0, 0.0008)
        records.append({"kind": "probe", "rollouts": step * 512, "prompts": 32, "baseline_mse": mse})

    def group(step, number):
        size = int(rng.integers(budget.initial, budget.maximum + 1))
        rewards = (rng.random(size) < 0.5).astype(float)
        texts = [HOSTILE if (step, number, i) == (0, 0, 0) else str(rng.integers(100, 2000)) for i in range(completions)]
        records.append(
            {
                "kind": "group",
                "step": step,
                "rollouts": (step + 1) * 512,
                "prompt": f"{rng.integers(100, 999)}+{rng.integers(100, 999)}=",
                "answer": str(rng.integers(100, 2000)),
                "size": size,
                "mean": rewards.mean(),
                "prior": rng.random() if sequential else None,
                "baseline": rewards.mean(),
                "completions": [
                    {"text": text, "reward": reward, "advantage": reward - rewards.mean()}
                    for text, reward in zip(texts, rewards, strict=False)
                ],
            }
        )

    evaluation(0)
    for step in range(steps):
        times = rng.uniform(0.9, 1.1, 5) * (0.25 * (2 if sequential else 1), 0.03, 0.004, 0.2, 0.0)
        sample = float(times[0] + times[1]) * 1.1
        seconds += sample + float(times[2:].sum())
        tokens += 512 * 4
        probes = step == 0 or (step * evaluations) // of != ((step - 1) * evaluations) // of
        if probes:
            probe(step)
        sizes = rng.multinomial(
            512 // budget.initial, np.ones(budget.maximum - budget.initial + 1) / (budget.maximum - budget.initial + 1)
        )
        if sequential:
            sizes = np.sort(sizes)[::-1]
        rejected = (
            float(np.clip(0.35 - 0.2 * step / of + rng.normal(0, 0.02), 0, 1)) if config.method in ("v05", "calibrated") else None
        )
        record = {
            "kind": "step",
            "step": step,
            "rollouts": (step + 1) * 512,
            "seconds": seconds,
            "group_size": float((sizes * np.arange(budget.initial, budget.maximum + 1)).sum() / sizes.sum()),
            "weight": rejected and rejected / 2 if config.method == "v05" else None,
            "hallucination": rejected and rejected / 2 if config.method == "calibrated" else None,
            "prior_rejected": rejected,
            "grad_norm": norm * float(rng.lognormal(0, 0.25)) if step != 3 else None,
            "failures": 0,
            "generate_seconds": float(times[0]),
            "verify_seconds": float(times[1]),
            "sample_seconds": sample,
            "advantage_seconds": float(times[2]),
            "update_seconds": float(times[3]),
            "sync_seconds": 0.0,
        }
        if new:
            weights = rng.multinomial(64, [0.6, *[0.4 / 9] * 9]).tolist()
            priors = (np.arange(10) + 0.5) / 10
            counts = rng.multinomial(64, np.ones(10) / 10)
            outcomes = np.clip(priors * 0.8 + 0.1 + rng.normal(0, 0.02, 10), 0, 1)
            record |= {
                "generated_tokens": tokens,
                "gradient_noise": norm / 4,
                "group_sizes": [0] * budget.initial + sizes.tolist(),
                "weights": weights if config.method == "v05" else None,
                "hallucinations": weights if config.method == "calibrated" else None,
                "prior_outcomes": np.stack((counts, counts * priors, counts * outcomes), axis=1).tolist() if rejected else None,
            }
        records.append(record)
        if new and probes:
            for number in range(samples):
                group(step, number)
        if ((step + 1) * evaluations) // of > (step * evaluations) // of:
            evaluation(step + 1)

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config.model_dump_json())
    (directory / "metrics.jsonl").write_text("".join(plain_json(record) + "\n" for record in records))
    if steps == of:
        found = [record["accuracy"] for record in records if record["kind"] == "evaluation"]
        result = {
            "method": config.method,
            "seed": seed,
            "accuracy_before": found[0],
            "accuracy_after": found[-1],
            "rollouts": of * 512,
            "steps": of,
            "seconds": seconds,
            "heldout_samples": 4,
            "heldout_successes": [2] * 8,
        }
        (directory / "result.json").write_text(json.dumps(result))
