"""Results of many runs by method, beta and seed: kept line by line, shown as a table and as a frontier.

    add, read         a row a run, in a JSONL file; what is there need not be run again
    where             what a row was made with
    table             means and standard errors over seeds, as Markdown
    differences       from one method at the same beta, seed by seed, with intervals
    at_equal_drift    differences from dpo at the same drift, seed by seed, with intervals
    figure            what was gained against the drift it took, a line a method through its betas

Used by controlled.py, whose docstring says what the numbers of the figure are, and compare.py.
"""

import json
import math
import multiprocessing
import os
import subprocess
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Callable, Iterable, Sequence

import config
import numpy as np
import torch

Row = dict[str, Any]
MEASURES = {  # key of a row -> heading, format
    "reward": ("mean reward", ".3f"),
    "tail": ("worst 5 %", ".2f"),
    "ruin": ("P(ruin), %", ".2f"),
    "bold": ("bold words", ".2f"),
    "win": ("win rate", ".3f"),
    "kl": ("KL to reference", ".3f"),
    "accuracy": ("held-out accuracy", ".3f"),
    "kl_chosen": ("seq. KL chosen", ".3f"),
    "kl_rejected": ("seq. KL rejected", ".3f"),
    "seconds": ("seconds a run", ".0f"),
}
TICKS = (0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1, 1.5, 2, 3, 4, 6, 10, 20, 30, 50, 100)  # of a drift's root scale
DRIFTS = (0.1, 0.3, 0.8)  # nats, at which methods are compared
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, by seeds less 2
FOUND = (11.57, 3.26, 2.13, 1.68, 1.44, 1.27, 1.16, 1.07, 0.99)  # see differences, by seeds less 2
PANELS = (("reward", "mean reward"), ("tail", "mean reward of the worst 5 %"), ("ruin", "P(ruin), %"))
BASES = ("dpo", "tdpo1", "tdpo2")  # that the others are compared with, seed by seed
METHODS = {  # flags of align.py
    "dpo": "--loss dpo",
    "kto": "--loss kto",
    "tdpo1": "--loss tdpo1",
    "tdpo2": "--loss tdpo2",
    **{
        f"{loss}_cvar_{level}": f"--loss {loss} --risk cvar --confidence-level {level}"
        for loss, levels in {"ra_dpo1": (0.97, 0.98, 0.99, 0.5, 0.1), "ra_dpo2": (0.97, 0.98, 0.1)}.items()
        for level in levels
    },
    **{f"ra_dpo1_erm_{mu}": f"--loss ra_dpo1 --risk erm --risk-aversion {mu}" for mu in (1, 5)},
    "ra_dpo1_published_0.98": "--loss ra_dpo1 --risk published --confidence-level 0.98",
}
LINES = {  # Okabe and Ito, by family; the line says which of it
    "dpo": ("#000000", "-"),
    "kto": ("#999999", "-"),
    "tdpo1": ("#0072b2", "-"),
    "tdpo2": ("#0072b2", "--"),
    "ra_dpo1_cvar_0.97": ("#e69f00", "-."),
    "ra_dpo1_cvar_0.98": ("#e69f00", "-"),
    "ra_dpo1_cvar_0.99": ("#e69f00", ":"),
    "ra_dpo1_cvar_0.5": ("#d55e00", "-"),
    "ra_dpo1_cvar_0.1": ("#cc79a7", "-"),
    "ra_dpo2_cvar_0.97": ("#e69f00", "--"),
    "ra_dpo2_cvar_0.98": ("#56b4e9", "--"),
    "ra_dpo2_cvar_0.1": ("#cc79a7", "--"),
    "ra_dpo1_erm_1": ("#009e73", "-"),
    "ra_dpo1_erm_5": ("#56b4e9", "-"),
    "ra_dpo1_published_0.98": ("#d55e00", ":"),
    "ideal": ("#000000", ":"),
}


def add(path: Path, row: Row) -> None:
    """A line at the end of the results, on the disk before the next run."""
    line = json.dumps(rounded(row))
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Six digits of a number; the learning rate and beta, by which runs are told apart, as they are."""
    apart = ("lr", "beta")
    return {k: float(f"{v:.6g}") if isinstance(v, float) and k not in apart else v for k, v in row.items()}


def where() -> Row:
    """Of a row: the commit, torch and the device that made it."""
    root = Path(__file__).resolve().parent.parent
    asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    cpu = torch.backends.cpu.get_cpu_capability()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"commit": commit, "torch": torch.__version__, "device": device}


def read(path: Path, settings: dict[str, int]) -> dict[tuple, Row]:
    """The rows of these settings by (method, beta, seed). A last line that a kill has cut short is cut off.

    Raises ValueError at file:line for what is no row.
    """
    found = {}
    written = path.read_bytes() if path.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]
    if len(whole) < len(written) and multiprocessing.parent_process() is None:  # another may be at it
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.decode().splitlines(), 1):
        try:
            row = json.loads(line)
            key = row["method"], row["beta"], row["seed"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a row of results") from error
        if settings.items() <= row.items():
            found[key] = row
    return found


def by_method(rows: Iterable[Row]) -> dict[str, dict[float | None, list[Row]]]:
    """Method -> beta, the largest first -> the rows of its seeds; in the order of LINES."""
    found: dict[str, dict] = {name: {} for name in ("reference", *LINES)}
    for row in sorted(rows, key=lambda row: (-(row["beta"] or 0), row["seed"])):
        found.setdefault(row["method"], {}).setdefault(row["beta"], []).append(row)
    return {name: betas for name, betas in found.items() if betas}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """With the standard error over seeds; NaN for one seed."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(rows: Iterable[Row], columns: dict[str, tuple[str, str]] = MEASURES) -> str:
    """As Markdown: mean and, in brackets, standard error over seeds, where they differ; of each column
    heading and format."""
    lines = ["| method | beta | seeds | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for method, betas in by_method(rows).items():
        for beta, found in betas.items():
            cells = []
            for key, (_, form) in columns.items():
                values = [row[key] for row in found if key in row]
                mean, error = mean_and_error(values) if values else (math.nan, math.nan)
                cells.append("" if math.isnan(mean) else format(mean, form))
                cells[-1] += f" ({error:{form}})" if error > 0 else ""
            lines.append(f"| {method} | {beta or ''} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_interval(differences: Sequence[float], form: str = "+.3f", shown: Callable = float) -> str:
    """Their mean and 95 % interval (Student's t), one a seed, each end as `shown` makes it."""
    mean, error = mean_and_error(differences) if differences else (math.nan, math.nan)
    half = STUDENT[min(len(differences), 10) - 2] * error
    middle, low, high = (format(shown(value), form) for value in (mean, mean - half, mean + half))
    return f"{middle} ({low} to {high})" if len(differences) > 1 else middle


def differences(
    rows: Iterable[Row], columns: dict[str, tuple[str, str]], base: str, ratios: dict[str, str] = {}
) -> str:  # fmt: skip
    """As Markdown: each method less `base` at the same beta, seed by seed, so that what the order of the data
    does to both falls out; mean and 95 % interval over the seeds that both have. Of `ratios`, key -> heading,
    the mean and interval of the logarithms of quotients, as quotients: for what a seed multiplies, as it does
    a drift; and of the first of them, what four of five experiments with such a spread would tell from 1
    (from simulated Student's t). Learning rates are named where they differ. "" if nothing is paired."""
    found = by_method(rows)
    heads = [title for title, _ in columns.values()] + list(ratios.values())
    if ratios:
        heads.append(f"{heads[len(columns)]}: found if")
    lines = [f"| method, less {base} | beta | seeds | {' | '.join(heads)} |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for method in [name for name in found if name not in (base, "reference", "ideal")]:
        for beta, ours in found[method].items():
            pairs = paired(ours, found.get(base, {}).get(beta, []))
            cells = [with_interval([a[key] - b[key] for a, b in pairs]) for key in columns]
            logs = [logs_of_quotients(pairs, key) for key in ratios]
            cells += [with_interval(some, ".2f", math.exp) if some else "" for some in logs]
            if ratios:
                cells.append(found_if(logs[0]))
            rates = {(a.get("lr"), b.get("lr")) for a, b in pairs}
            said = "".join(f" at {ours:g}, {base} at {theirs:g}" for ours, theirs in rates if ours != theirs)
            if pairs:
                lines.append(f"| {method}{said} | {beta:g} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def paired(ours: Iterable[Row], theirs: Iterable[Row]) -> list[tuple[Row, Row]]:
    """The rows of the seeds that both have."""
    found = {row["seed"]: row for row in theirs}
    return [(row, found[row["seed"]]) for row in ours if row["seed"] in found]


def logs_of_quotients(pairs: Sequence[tuple[Row, Row]], key: str) -> list[float]:
    """Empty if one of them has none."""
    if any(min(a[key], b[key]) <= 0 for a, b in pairs):
        return []
    return [math.log(a[key] / b[key]) for a, b in pairs]


def least_found(values: Sequence[float]) -> float:
    """The least mean, from 0, that four of five experiments with such a spread between seeds would find."""
    return FOUND[min(len(values), 10) - 2] * stdev(values)


def found_if(logs: Sequence[float]) -> str:
    """What four of five experiments with such a spread between seeds would tell from 1, below and above."""
    if len(logs) < 2:
        return ""
    least = math.exp(least_found(logs))
    return f"{1 / least:.2f} or {least:.2f}"


def at_equal_drift(rows: Iterable[Row]) -> str:
    """As Markdown: how far the curve of a method lies above dpo's at the same KL(policy || reference), mean
    over seeds and 95 % interval (Student's t on the differences by seed). A curve joins a seed's runs by lines
    over the root of KL, and is drawn neither beyond its last nor before its first: from the reference on, the
    line itself would be the difference. Only drifts that the runs of all seeds of both lie around."""
    rows = list(rows)
    seeds = {name: len({row["seed"] for row in rows if row["method"] == name}) for name in LINES}
    names = " | ".join(f"{MEASURES[key][0]}" for key, _ in PANELS)
    lines = [f"| method, less dpo | KL | seeds | {names} |", "|---" * (len(PANELS) + 3) + "|"]
    for method in [name for name in LINES if name not in ("dpo", "ideal")]:
        for drift in DRIFTS:
            cells, number = [], 0
            for key, _ in PANELS:
                ours, theirs = (on_curve(rows, name, key, drift) for name in (method, "dpo"))
                found = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
                number = len(found)
                cells.append(with_interval(found))
            if number and number == min(map(seeds.get, (method, "dpo"))):
                lines.append(f"| {method} | {drift:g} | {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def on_curve(
    rows: Iterable[Row], method: str, key: str, drift: float, against: str = "kl"
) -> dict[int, float]:
    """What a method has at a drift, by seed, where its runs lie around it."""
    curves: dict[int, list] = {}
    for row in rows:
        if row["method"] == method:
            curves.setdefault(row["seed"], []).append((math.sqrt(max(row[against], 0.0)), row[key]))
    found = {}
    for seed, points in curves.items():
        roots, values = zip(*sorted(points))
        if roots[0] ** 2 <= drift <= roots[-1] ** 2:
            found[seed] = float(np.interp(math.sqrt(drift), roots, values))
    return found


def figure(
    rows: Iterable[Row],
    path: Path,
    panels: Sequence[tuple[str, str]] = PANELS,
    against: tuple[str, str] = ("kl", "KL(policy || reference), nats a sentence"),
) -> None:
    """Each measure of `panels` against a drift, a line a method through its betas, which begins at the first of
    them, for from the reference (the cross) on the line itself would be what differs; mean and band of one
    standard error over seeds, the names at the right: PNG and SVG."""
    found = by_method(rows)
    start = found.pop("reference", {}).get(None)
    made, axes = canvas(len(panels))
    for panel, (key, title) in zip(axes, panels):
        ends = []
        if start:
            panel.plot(*[fmean(row[which] for row in start) for which in (against[0], key)], "kx", clip_on=False)
        for method, betas in found.items():
            runs = list(betas.values())
            points = [[fmean(row[name] for row in some) for name in (against[0], key)] for some in runs]
            drift, middle = zip(*points)
            errors = np.nan_to_num([mean_and_error([row[key] for row in some])[1] for some in runs])
            colour, line = LINES.get(method, ("#999999", ":"))
            panel.plot(drift, middle, line, color=colour, marker=".", linewidth=1.4)
            panel.fill_between(drift, middle - errors, middle + errors, color=colour, alpha=0.12, linewidth=0)
            ends.append((middle[-1], drift[-1], method, colour))
        panel.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        panel.set_xlim(left=0)
        most = panel.get_xlim()[1]
        panel.set_xticks([0, *(tick for tick in TICKS if 0.03 * most <= tick <= most)])
        name(panel, ends)
        panel.set_xlabel(f"{against[1]}; root scale")
        panel.set_title(title, loc="left", fontsize=11)
    save(made, path)


def canvas(panels: int) -> tuple[Any, Sequence[Any]]:
    """An empty figure and its panels, side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        config.fail("the figure needs matplotlib", right="pip install matplotlib")
    made = Figure(figsize=(6.2 * panels, 5.2))
    axes = made.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made: Any, path: Path) -> None:
    """PNG and SVG, the same bytes from the same rows."""
    from matplotlib import rc_context

    made.tight_layout()
    with rc_context({"svg.hashsalt": path.stem}):
        made.savefig(path.with_suffix(".png"), dpi=110)
        made.savefig(path.with_suffix(".svg"), dpi=110, metadata={"Date": None})


def name(panel: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Each line's name in a column at the right, as high as its end is, but no two in one place."""
    panel.get_ylim()  # settles the scale
    places = panel.transData + panel.transAxes.inverted()  # a share of the panel's height, on any scale
    gap, heights = 0.053, []
    for height, drift, *_ in sorted(ends):
        own = places.transform((drift, height))[1]
        heights.append(max(own, heights[-1] + gap) if heights else own)
    for index in reversed(range(len(heights))):  # down again from the top of the panel
        heights[index] = min(heights[index], heights[index + 1] - gap if heights[index + 1 :] else 1.0)
    for (height, drift, method, colour), place in zip(sorted(ends), heights):
        end = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.5}
        how = {"textcoords": "axes fraction", "annotation_clip": False, "arrowprops": end}
        panel.annotate(method, (drift, height), (1.02, place), color=colour, fontsize=8, va="center", **how)
