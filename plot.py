"""One figure and one table from the metrics.jsonl of one or many runs.

    python plot.py runs/dpo runs/ra_dpo1 --out comparison.png

Needs matplotlib. Units: losses, kl and risk in nats, rewards in nats times beta, memory in GB. Curves are the
held-out evaluations (dots) and the training steps (lines, a running mean). The table is the last held-out
evaluation.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

PANELS = [  # (title, key)
    ("loss (nats)", "loss"),
    ("reward accuracy", "rewards/accuracies"),
    ("reward margin (beta x nats)", "rewards/margins"),
    ("sequential KL, chosen (nats)", "kl/chosen"),
    ("sequential KL, rejected (nats)", "kl/rejected"),
    ("gradient norm", "grad_norm"),
]
COLUMNS = [  # (heading, key, format)
    ("held-out accuracy", "rewards/accuracies", ".3f"),
    ("kl chosen", "kl/chosen", ".3f"),
    ("kl rejected", "kl/rejected", ".3f"),
    ("margin", "rewards/margins", ".4f"),
    ("loss", "loss", ".4f"),
]


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a run by split, in order of steps; of a step written twice the last row counts."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        fail(f"{path}: no such file; give run directories")
    rows = {"train": {}, "eval": {}}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["split"]][row["step"]] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            fail(f"{path}:{number}: not a row of metrics")
    return {split: [found[step] for step in sorted(found)] for split, found in rows.items()}


def table(runs: dict[str, dict]) -> str:
    """Markdown: the last held-out evaluation of every run, the median pairs per second and the peak
    memory."""
    lines = ["| run | " + " | ".join(heading for heading, *_ in COLUMNS) + " | pairs/s | peak GB |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for name, rows in runs.items():
        last = rows["eval"][-1] if rows["eval"] else {}
        cells = [
            format(last[key], form) if isinstance(last.get(key), float) else "-" for _, key, form in COLUMNS
        ]
        speeds = [row["pairs_per_s"] for row in rows["train"] if "pairs_per_s" in row]
        cells.append(f"{statistics.median(speeds):.1f}" if speeds else "-")
        cells.append(f"{max((row['mem_gb'] for row in rows['train'] + rows['eval']), default=0):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smooth(values: list[float], width: int = 10) -> list[float]:
    """Mean of the last `width` values."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def draw(runs: dict[str, dict], out: Path) -> None:
    """Six panels over optimiser steps, one colour a run; the PNG appears when complete."""
    try:
        import matplotlib
    except ImportError:
        fail("a figure needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, key) in zip(axes.flat, PANELS):
        for index, (name, rows) in enumerate(runs.items()):
            color = f"C{index}"
            train = [(row["step"], row[key]) for row in rows["train"] if isinstance(row.get(key), float)]
            held_out = [(row["step"], row[key]) for row in rows["eval"] if isinstance(row.get(key), float)]
            if train:
                steps, values = zip(*train)
                axis.plot(steps, smooth(list(values)), color=color, alpha=0.35, linewidth=1.2)
            if held_out:
                axis.plot(*zip(*held_out), color=color, marker="o", markersize=3.5, linewidth=1.6, label=name)
            elif train:
                axis.plot([], [], color=color, label=name)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes.flat[0].legend(fontsize=8, frameon=False)
    beside = out.with_name(f".{out.stem}.tmp.png")
    figure.savefig(beside, dpi=120)
    beside.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="the PNG to write")
    args = parser.parse_args()
    runs = {run.name: read(run) for run in args.runs}
    print(table(runs))
    draw(runs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
