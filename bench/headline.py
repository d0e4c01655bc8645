"""Writes the tables and figures of the headline experiment: `python bench/headline.py` after examples/headline.sh.

Reads bench/results/headline.csv, puts the tables between their marks in README and docs/headline.md, and draws the figures in
docs/. README's table and those of methods with one rollout per prompt come from bench/results/headline_second.csv and
headline_long.csv. Their rows are from the same suite but from other warm starts, so they are not comparable with the first file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from marks import replaced

from v05.methods import METHODS
from v05.train.curves import crossing, mean_curve
from v05.train.suite import RIVALS, SUITES
from v05.train.suite_plots import draw_suite
from v05.train.suite_rows import Row, in_order, read_csv
from v05.train.suite_summary import TARGET, best_size, counted, difference, over, over_best_rival, summarise

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]
RESULTS = ROOT / "bench" / "results" / "headline.csv"
SECOND = ROOT / "bench" / "results" / "headline_second.csv"
LONG = ROOT / "bench" / "results" / "headline_long.csv"  # runs that are three times as long
README, PAGE = ROOT / "README.md", ROOT / "docs" / "headline.md"
MIXES = SUITES["headline"].mixes
PAIRS = (
    ("v05@4..16", "grpo@16"),
    ("v05@4..16", "dapo@16"),
    ("v05@4..16", "dr_grpo@8"),
    ("v05@4", "v05@4..16"),
    ("v05@4..16+weighting=rollout", "v05@4..16"),
    ("v05@4..16+oracle", "v05@4"),
    ("v05@4..16+noise", "grpo@16"),
    ("v05@4", "dr_grpo@4"),
    ("v05@2", "dr_grpo@2"),
    ("calibrated@1", "prior@1"),
)
FRONT = {  # methods in README's figure: the reference, the rival with the nearest final accuracy, and ours
    "grpo@16": "GRPO, 16 rollouts a prompt",
    "none@1": "no baseline, 1 rollout a prompt (nearest rival)",
    "optimal@1": "optimal, 1 rollout a prompt (ours)",
}
FRONT_TABLE = {
    "grpo@16": "GRPO, 16 rollouts a prompt",
    "dr_grpo@4": "Dr. GRPO, 4",
    "batch@1": "mean of the batch, 1",
    "calibrated@1": "`calibrated`, 1 (ours)",
    "none@1": "no baseline, 1",
    "batch_energy@1": "`batch_energy`, 1 (ours)",
    "optimal@1": "`optimal`, 1 (ours)",
}
OURS = ("v05@4..16", "v05@4", "v05@2", "calibrated@2..16", "calibrated@2", "calibrated@1", "prior@1")


def short_table(rows: Sequence[Row], summary: Sequence[Record]) -> str:
    """Final accuracy of GRPO at 16, each rival at its best size, and ours, by mix, and our mean difference to the best rivals."""
    records = {(r["mix"], r["label"]): r for r in summary}
    sizes = counted(rows)
    seeds = {mix: {len(group) for group in sizes[mix].values()} for mix in MIXES}
    counts = {mix: f"{min(seeds[mix])} to {max(seeds[mix])}" if len(seeds[mix]) > 1 else f"{min(seeds[mix])}" for mix in MIXES}
    lines = _head(["method", *MIXES, "over each best rival, mean"], ["seeds", *(counts[mix] for mix in MIXES), ""])

    def line(name: str, cells: Sequence[str], label: str) -> None:
        lines.append("| " + " | ".join([name, *cells, difference(over_best_rival(rows, label), "over_best")]) + " |")

    line("GRPO at 16", [_accuracy(records.get((mix, TARGET))) for mix in MIXES], TARGET)
    for rival in RIVALS:
        best = {mix: best_size(rival, sizes[mix]) for mix in MIXES}
        cells = [
            f"{_accuracy(records.get((mix, best[mix])))} at {str(best[mix]).split('@')[1]}" if best[mix] else "" for mix in MIXES
        ]
        line(f"{rival} at its best size", cells, "")
    for label in OURS:
        line(label, [_accuracy(records.get((mix, label))) for mix in MIXES], label)
    return "\n".join(lines) + "\n"


def long_tables(summary: Sequence[Record]) -> str:
    """A table of all figures for each mix, with the learning rates that tuning chose."""
    parts = []
    for mix in MIXES:
        records = [r for r in summary if r["mix"] == mix]
        if not records:
            continue
        start = sum(r["accuracy_before"] for r in records) / len(records)
        versus = [f"over {rival}'s best" for rival in RIVALS]
        figures = [
            f"rollouts to {TARGET}'s",
            "tokens to it",
            "a prompt",
            "steps",
            "rejected",
            "baseline MSE",
            "gradient norm",
            "entropy",
            "seconds, median: generate + verify + advantages + update",
        ]
        lines = _head(["method", "rate", "seeds", "accuracy", *versus, *figures])
        for r in records:
            cells = [
                *(r["label"], f"{r['learning_rate']:g}", str(len(r["seeds"])), _accuracy(r)),
                *(difference(r, f"over_{rival}") for rival in RIVALS),
                *(_reached(r, axis) for axis in ("rollouts", "tokens")),
                *(
                    f"{r['group_size']:.1f}",
                    f"{r['steps']:.0f}",
                    "" if isnan(r["prior_rejected"]) else f"{r['prior_rejected']:.2f}",
                ),
                *(
                    "" if isnan(r["baseline_mse"]) else f"{r['baseline_mse']:.4f}",
                    f"{r['grad_norm']:.2f}",
                    f"{r['entropy_after']:.3f}",
                ),
                " + ".join(f"{r[f'{stage}_seconds']:.1f}" for stage in ("generate", "verify", "advantage", "update")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append(f"### {mix}, from {start:.3f}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def pairs_table(rows: Sequence[Row]) -> str:
    """Differences in final accuracy between pairs of methods, by mix and averaged over mixes."""
    lines = _head(["method", "over", *MIXES, "mean over mixes"])
    for label, other in PAIRS:
        compared = [over(rows, label, other, mixes) for mixes in (*((mix,) for mix in MIXES), tuple(MIXES))]
        lines.append("| " + " | ".join([label, other, *(difference(record, "over") for record in compared)]) + " |")
    return "\n".join(lines) + "\n"


def tuning_table(rows: Sequence[Row]) -> str:
    """The final accuracy of each tuning run by method and learning rate, with a column for each mix."""
    ends = {(row.mix, row.label, row.learning_rate): row.accuracy_after for row in rows if row.stage == "tune"}
    lines = _head(["method", "rate", *MIXES])
    for label, rate in dict.fromkeys((label, rate) for _, label, rate in ends):
        cells = [f"{ends[mix, label, rate]:.3f}" if (mix, label, rate) in ends else "" for mix in MIXES]
        lines.append("| " + " | ".join([label, f"{rate:g}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def front_table(rows: Sequence[Row], summary: Sequence[Record]) -> str:
    """README's table: the final accuracy of each method by mix, and the mean lead of `optimal`."""
    records = {(record["label"], record["mix"]): record for record in summary}
    lines = _head(["method, rollouts a prompt", *MIXES, "`optimal` over it, mean"])
    for label, name in FRONT_TABLE.items():
        ends = [f"{records[label, mix]['accuracy_after']:.3f}" for mix in MIXES]
        ahead = "" if label == "optimal@1" else difference(over(rows, "optimal@1", label, list(MIXES)), "over")
        lines.append("| " + " | ".join([name, *ends, ahead]) + " |")
    return "\n".join(lines) + "\n"


def draw_front(rows: Sequence[Row], file: Path) -> None:
    """README's figure: mean accuracy over rollouts, the seeds' range, and the point where ours passes GRPO's final accuracy."""
    mixes = counted(rows)
    figure, panels = plt.subplots(1, len(mixes), figsize=(4.2 * len(mixes), 3.9), layout="constrained")
    shares = []
    for axes, (mix, by_label) in zip(panels, mixes.items(), strict=True):
        target = float(np.mean([row.accuracy_after for row in by_label[TARGET].values()]))
        total = by_label[TARGET][0].total_rollouts
        for label, name in FRONT.items():
            curves = [row.accuracy_over("rollouts") for row in by_label[label].values()]
            points, mean, _ = mean_curve(curves)
            seeds = np.stack([np.interp(points, xs, ys) for xs, ys in curves])
            colour = METHODS[label.split("@")[0]].colour[0]
            axes.plot(points, mean, color=colour, lw=2.2 if label == "optimal@1" else 1.6, label=name)
            axes.fill_between(points, seeds.min(0), seeds.max(0), color=colour, alpha=0.12, lw=0)
        shares.append(crossing([row.accuracy_over("rollouts") for row in by_label["optimal@1"].values()], target) / total)
        axes.axhline(target, color=METHODS["grpo"].colour[0], lw=0.8, ls=":")
        axes.plot([shares[-1] * total], [target], "o", color=METHODS["optimal"].colour[0])
        axes.annotate(f"{shares[-1]:.0%}", (shares[-1] * total, target), (6, -14), textcoords="offset points", fontsize=10)
        axes.set(xlabel="training rollouts", title=mix)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.suptitle(
        f"One rollout a prompt passes the final accuracy of GRPO-16 after {min(shares):.0%} to {max(shares):.0%} of the rollouts",
        fontsize=12,
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def second_table(rows: Sequence[Row], summary: Sequence[Record], ours: str = "optimal@1") -> str:
    """Final figures of every method of the second edition by mix, and the lead of `ours` over all mixes that the method ran in."""
    single = _singles(summary)
    records = [record for record in summary if record["label"] not in single]
    lines = _head(["method", "mix", "rate", "seeds", "accuracy", "greedy", "mean@8", "pass@8", "entropy", f"{ours} over it"])
    for label in dict.fromkeys(record["label"] for record in records):
        mixes = [record["mix"] for record in records if record["label"] == label]
        ahead = "" if label == ours else difference(over(rows, ours, label, mixes), "over")
        for record in (record for record in records if record["label"] == label):
            ends = (record[name] for name in ("greedy", "mean_at_k", "pass_at_k", "entropy_after"))
            cells = [record["mix"], f"{record['learning_rate']:g}", str(len(record["seeds"])), _accuracy(record)]
            cells += [f"{end:.3f}" for end in ends]
            lines.append("| " + " | ".join([label, *cells, ahead if record["mix"] == mixes[-1] else ""]) + " |")
    return "\n".join(lines) + "\n"


def single_table(summary: Sequence[Record]) -> str:
    """Final accuracy and greedy accuracy of the methods that ran with only one seed in some mix."""
    records = {(record["label"], record["mix"]): record for record in summary}
    lines = _head(["method", *MIXES])
    for label in _singles(summary):
        ends = [records[label, mix] for mix in MIXES]
        lines.append("| " + " | ".join([label, *(f"{end['accuracy_after']:.3f}, {end['greedy']:.3f}" for end in ends)]) + " |")
    return "\n".join(lines) + "\n"


def _singles(summary: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["label"] for record in summary if len(record["seeds"]) == 1))


def curve_table(rows: Sequence[Row]) -> str:
    """The accuracy of single long runs over rollouts, and their final figures."""
    counted_rows = [row for row in rows if row.stage == "count"]
    rollouts = [f"{int(point[0]):,}" for point in counted_rows[0].evaluations()]
    lines = _head(["method", "mix", *rollouts, "greedy", "mean@8", "pass@8", "entropy"])
    for row in counted_rows:
        ends = (row.greedy, row.mean_at_k, row.pass_at_k, row.entropy_after)
        figures = [*(float(point[3]) for point in row.evaluations()), *ends]
        lines.append("| " + " | ".join([row.label, row.mix, *(f"{figure:.3f}" for figure in figures)]) + " |")
    return "\n".join(lines) + "\n"


def _head(columns: Sequence[str], *under: Sequence[str]) -> list[str]:
    first, *others = ("| " + " | ".join(line) + " |" for line in (columns, *under))
    return [first, "|" + "---|" * len(columns), *others]


def _accuracy(record: dict[str, Any] | None) -> str:
    return "" if record is None else f"{record['accuracy_after']:.3f} [{record['accuracy_low']:.3f}, {record['accuracy_high']:.3f}]"


def _reached(record: dict[str, Any], axis: str) -> str:
    def count(value: float | None) -> str:
        return "never" if value is None else f"{value:,.0f}"

    name = f"{axis}_to_grpo"
    interval = f" [{count(record[f'{name}_low'])}, {count(record[f'{name}_high'])}]" if f"{name}_low" in record else ""
    return count(record[name]) + interval if name in record else ""


def pages() -> dict[Path, str]:
    """The texts of README.md and docs/headline.md with current tables."""
    rows = in_order(SUITES["headline"], read_csv(RESULTS))
    second = in_order(SUITES["headline"], read_csv(SECOND))
    summary, of_second = summarise(rows), summarise(second)  # takes two minutes
    page = replaced(PAGE.read_text(), "headline pairs", pairs_table(rows))
    page = replaced(page, "headline second", second_table(second, of_second))
    page = replaced(page, "headline singles", single_table(of_second))
    page = replaced(page, "headline long", curve_table(in_order(SUITES["headline"], read_csv(LONG))))
    page = replaced(page, "headline tuning", tuning_table(second))
    page = replaced(page, "headline", short_table(rows, summary))
    return {
        README: replaced(README.read_text(), "front", front_table(second, of_second)),
        PAGE: replaced(page, "headline tables", long_tables(summary)),
    }


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)
    with tempfile.TemporaryDirectory() as scratch:
        for figure in draw_suite(in_order(SUITES["headline"], read_csv(RESULTS)), Path(scratch)):
            shutil.move(figure, ROOT / "docs" / f"headline_{figure.name}")
    draw_front(in_order(SUITES["headline"], read_csv(SECOND)), ROOT / "docs" / "front.png")


if __name__ == "__main__":
    main()
