"""One figure, one page and one table from the metrics.jsonl of one or many runs.

    python plot.py runs/dpo runs/ra_dpo1 --out comparison.png --out comparison.svg
    python plot.py runs/dpo --html dpo.html --live 10

The page needs nothing but a browser and loads itself again as long as --live writes it again: every so many
seconds, until no run is running any more, or Ctrl-C. Curves are the held-out evaluations (dots) and the
training steps (lines, a running mean). The table is the last held-out evaluation, speeds are medians over
steps; a column that no run has is left out. The figure (PNG, or SVG by the name of --out) needs matplotlib,
and is drawn unless --html is given without --out; runs that differ by --seed alone are one curve in it, their
mean, with a band from the least to the largest.

Units: losses, kl, risk and log-probabilities in nats, rewards in nats times beta (without a reference:
log-probabilities times beta), memory in GB.
"""

import argparse
import contextlib
import html
import json
import math
import os
import re
import statistics
import string
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Sequence

# Of several keys the first that a run has.
ACCURACY = ("rewards/accuracies", "logps/accuracies")
MARGIN = ("rewards/margins", "logps/margins")
PANELS = [  # (title, keys)
    ("loss (nats)", ("loss",)),
    ("accuracy", ACCURACY),
    ("margin (beta x nats)", MARGIN),
    ("sequential KL, chosen (nats)", ("kl/chosen",)),
    ("sequential KL, rejected (nats)", ("kl/rejected",)),
    ("gradient norm", ("grad_norm",)),
]
MORE_PANELS = [  # of the page
    ("log-probability, chosen (nats)", ("logps/chosen",)),
    ("log-probability, rejected (nats)", ("logps/rejected",)),
    ("learning rate", ("lr",)),
    ("tokens/s", ("tok_per_s",)),
]
HELD_OUT = [  # (heading, keys, format)
    ("held-out accuracy", ACCURACY, ".3f"),
    ("kl chosen", ("kl/chosen",), ".3f"),
    ("kl rejected", ("kl/rejected",), ".3f"),
    ("margin", MARGIN, ".4f"),
    ("loss", ("loss",), ".4f"),
    ("perplexity", ("perplexity",), ".2f"),
]
SPEEDS = [("tokens/s", "tok_per_s", ",.0f"), ("responses/s", "responses_per_s", ".1f")]
# Okabe and Ito
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
POINTS = 400  # at most, of a training curve on the page
SHOWN = 20_000  # characters of a sample on the page

Rows = list[dict[str, Any]]  # in order of steps
Curve = list[tuple[int, float]]  # (step, value)


class Run(NamedTuple):
    """What a run directory holds so far."""

    train: Rows
    held_out: Rows
    state: str  # of status.json; empty without one
    flags: dict[str, Any]
    sample: tuple[str, str]  # (name, text) of the newest file of samples/; ("", "") without one


def fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())[:1000]}", file=sys.stderr)
    sys.exit(2)


# ---- what a run directory holds
# ------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Run:
    """The rows of a run by split, of a step written twice the last one, and what else it says of itself. A
    last line without its end is still being written. Ends the program for what is no run."""
    status, flags = (_object(folder / name) for name in ("status.json", "args.json"))
    path = folder / "metrics.jsonl"
    if not path.exists() and not flags:
        fail(f"{path}: no such file (give run directories)")
    rows = {"train": {}, "eval": {}}
    whole, _, _ = _text(path).rpartition("\n")
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
        try:
            row = json.loads(line)
            step = range(10**12).index(int(row["step"]))  # or a ValueError
            rows.setdefault(row["split"], {})[step] = row
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            fail(f"{path}:{number}: not a row of metrics")
    train, held_out = ([rows[split][step] for step in sorted(rows[split])] for split in ("train", "eval"))
    return Run(train, held_out, str(status.get("state", "")), flags, _newest_sample(folder / "samples"))


def _text(path: Path) -> str:
    """Of a file; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def _object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if there is none."""
    text = _text(path)
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text or "{}")
        if isinstance(found, dict):
            return found
    fail(f"{path}: not an object of JSON")


def _newest_sample(folder: Path) -> tuple[str, str]:
    steps = [re.fullmatch(r"step-(\d+)\.txt", path.name) for path in folder.glob("step-*.txt")]
    newest = max(filter(None, steps), key=lambda found: int(found[1]), default=None)
    return (newest[0], _text(folder / newest[0])[:SHOWN]) if newest else ("", "")


def number(value: Any) -> float | None:
    """A number of a row, "nan" and "inf" among them; None for anything else."""
    if value in ("nan", "inf", "-inf") or isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    return None


def value_of(row: dict[str, Any], keys: Sequence[str]) -> float | None:
    """The number under the first of the keys that the row has."""
    return next((number(row[key]) for key in keys if key in row), None)


def curve(rows: Rows, keys: Sequence[str]) -> Curve:
    """The finite values over steps."""
    found = [(int(row["step"]), value_of(row, keys)) for row in rows]
    return [(step, value) for step, value in found if value is not None and abs(value) < 1e100]


def smooth(points: Curve, width: int = 10) -> Curve:
    """Means of the last `width` values."""
    values = [value for _, value in points]
    means = [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(points, means)]


# ---- tables
# --------------------------------------------------------------------------------------------------------


def summary(runs: dict[str, Run]) -> list[list[str]]:
    """Rows of cells, the headings first: the last held-out evaluation of every run, the median speeds and the
    peak memory."""
    columns = {}  # heading -> a cell a run
    for heading, keys, form in HELD_OUT:
        columns[heading] = [_cell(value_of((run.held_out or [{}])[-1], keys), form) for run in runs.values()]
    for heading, key, form in SPEEDS:
        speeds = [[value for _, value in curve(run.train, (key,))] for run in runs.values()]
        columns[heading] = [_cell(statistics.median(found) if found else None, form) for found in speeds]
    memory = [[value for _, value in curve(run.train + run.held_out, ("mem_gb",))] for run in runs.values()]
    columns["peak GB"] = [_cell(max(found, default=None), ".2f") for found in memory]
    columns = {heading: cells for heading, cells in columns.items() if set(cells) != {"-"}}
    return [["run", *columns], *[[_plain(name), *cells] for name, *cells in zip(runs, *columns.values())]]


def by_subset(runs: dict[str, Run]) -> list[list[str]]:
    """Rows of cells: of every subset of the last held-out evaluations its pairs and each run's accuracy;
    empty where there are none."""
    found, pairs = {}, {}  # subset -> a cell by run, pairs
    for name, run in runs.items():
        for key, value in (run.held_out or [{}])[-1].items():
            kind, word, subset = key.split("/", 2) if key.count("/") > 1 else ("", "", "")
            if f"{kind}/{word}" in ACCURACY:
                found.setdefault(subset, {})[name] = _cell(number(value), ".3f")
                pairs[subset] = _cell(number(run.held_out[-1].get(f"pairs/{subset}")), ",.0f")
    cells = [[_plain(s), pairs[s], *[found[s].get(name, "-") for name in runs]] for s in sorted(found)]
    return [["subset", "pairs", *map(_plain, runs)], *cells] if cells else []


def markdown(cells: list[list[str]]) -> str:
    """A table of cells, the headings first."""
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plain(name: str) -> str:
    """Without what would break a table or a terminal."""
    return re.sub(r"[\0-\x1f\x7f-\x9f|]", "?", name)


# ---- the figure
# -----------------------------------------------------------------------------------------------------


def by_seed(runs: dict[str, Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ by their seed alone, together, as "dpo-* (3)"; the others alone."""
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        flags = {k: v for k, v in run.flags.items() if k not in ("seed", "out", "resume", "token_cache")}
        groups.setdefault(json.dumps(flags, sort_keys=True) if flags else name, []).append(name)
    found = []
    for names in groups.values():
        said = names[0] if len(names) == 1 else f"{os.path.commonprefix(names)}* ({len(names)})"
        found.append((said, [runs[name] for name in names]))
    return found


def over_seeds(curves: list[Curve]) -> list[tuple[int, float, float, float]]:
    """(step, mean, least, largest) at the steps that all of the curves have."""
    values = [dict(points) for points in curves]
    rows = [(s, [part[s] for part in values]) for s in sorted(set.intersection(*map(set, values)))]
    return [(step, statistics.fmean(found), min(found), max(found)) for step, found in rows]


def draw(runs: dict[str, Run], out: Path) -> None:
    """Six panels over optimiser steps, one colour a run, or mean and band of several seeds; the names at the
    right. PNG or SVG, which appears when complete, the same bytes each time."""
    try:
        from matplotlib import figure, rc_context
    except ImportError:
        fail("a figure needs matplotlib: pip install matplotlib")
    style = {"font.size": 8, "axes.titlesize": 10, "axes.titlelocation": "left", "text.parse_math": False}
    style |= {"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False}
    kind = "svg" if out.suffix.lower() == ".svg" else "png"
    beside = out.with_name(f".{out.stem}.tmp.{kind}")
    dots = {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
    with rc_context(style | {"svg.hashsalt": "plot"}):  # figures of others, drawn after it, keep their own
        made = figure.Figure(figsize=(14, 6.5), layout="constrained")
        for axis, (title, keys) in zip(made.subplots(2, 3).flat, PANELS):
            ends = []  # (height, name, colour)
            for index, (name, seeds) in enumerate(by_seed(runs)):
                color = COLORS[index % len(COLORS)]
                train = over_seeds([smooth(curve(run.train, keys)) for run in seeds])
                held_out = over_seeds([curve(run.held_out, keys) for run in seeds])
                for points, how in ((train, {"alpha": 0.4, "linewidth": 1.2}), (held_out, dots)):
                    steps, means, least, largest = zip(*points) if points else [()] * 4
                    axis.plot(steps, means, color=color, **how)
                    axis.fill_between(steps, least, largest, color=color, alpha=0.15, linewidth=0)
                ends += [(points[-1][1], name, color) for points in (held_out or train,) if points]
            (low, high), place = axis.get_ylim(), math.inf
            for value, name, color in sorted(ends, reverse=True):  # no two names in one place
                place = min((value - low) / (high - low), place - 0.07)
                axis.text(1.02, place, name, color=color, va="center", transform=axis.transAxes)
            axis.set(title=title, xlabel="optimiser step")
        made.savefig(beside, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    beside.replace(out)


# ---- the page
# -------------------------------------------------------------------------------------------------------

PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8">$refresh
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title><style>
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #22252a; --dim: #667079; --line: #dfe1dd; }
.c0 { --c: #0a7350; } .c1 { --c: #c2571a; } .c2 { --c: #3563b8; } .c3 { --c: #a8327d; }
.c4 { --c: #8a6d00; } .c5 { --c: #0f7f96; } .c6 { --c: #b3332f; } .c7 { --c: #6a55b5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181b; --ink: #dfe3e6; --dim: #8d979f; --line: #30363b; }
  .c0 { --c: #5fd1a3; } .c1 { --c: #f2945c; } .c2 { --c: #82aaf5; } .c3 { --c: #e58bc4; }
  .c4 { --c: #d6b84a; } .c5 { --c: #5cc6dd; } .c6 { --c: #f08a85; } .c7 { --c: #b3a2f2; } }
body { max-width: 72rem; margin: auto; padding: 2.5rem 1.5rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; letter-spacing: -.01em; } h2 { margin: 2.5rem 0 .6rem; font-size: 1.1rem; }
.note, figcaption { margin: .15rem 0 1rem; color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr + tr > * { border-top: 1px solid var(--line); }
th, td { padding: .3rem 1.5rem .3rem 0; font-weight: 400; text-align: right; }
th { color: var(--dim); } tr > :first-child { text-align: left; } .table { overflow-x: auto; }
b { font-weight: 400; } b::before { content: "\\25cf  "; color: var(--c); }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
section { gap: 1.5rem; margin-top: 2.5rem; }
svg { width: 100%; font-size: 11px; fill: var(--dim); text-anchor: middle; } svg .value { text-anchor: end; }
path { stroke: var(--line); } figure, figure * { margin: 0; } circle { fill: var(--c); }
polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
polyline.train { stroke-width: 1.2; opacity: .5; } circle:hover { stroke: var(--ink); stroke-width: 1.5; }
pre { padding: .1rem 0 .1rem 1rem; border-left: 2px solid var(--line); white-space: pre-wrap;
  font: .84rem/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
</style>
<h1>$title</h1><p class="note">$note</p>
$tables<section>$figures</section>$samples</html>
""")


def page(runs: dict[str, Run], refresh: float | None) -> str:
    """HTML that needs nothing else; loads itself again every `refresh` seconds. What runs hold is text."""
    title = " ".join(runs) if len(runs) < 5 else f"{len(runs)} runs"
    said = [f"{name} {run.state or 'has no status'}{_last(run)}" for name, run in runs.items()]
    parts = {"title": _escaped(title), "refresh": "", "tables": "", "figures": "", "samples": ""}
    parts["note"] = "<br>".join(map(_escaped, [*said, f"written {time.strftime('%H:%M:%S')}"]))
    if refresh:
        parts["refresh"] = f'\n<meta http-equiv="refresh" content="{refresh:g}">'
    parts["tables"] = _table(summary(runs), list(runs))
    if subsets := by_subset(runs):
        parts["tables"] += f"<h2>Held-out accuracy by subset</h2>{_table(subsets, list(runs))}"
    for heading, keys in PANELS + MORE_PANELS:
        curves = [(curve(run.train, keys), curve(run.held_out, keys)) for run in runs.values()]
        parts["figures"] += _figure(heading, curves)
    for name, run in runs.items():
        if run.sample[0]:
            parts["samples"] += f"<h2>{_escaped(name)}: samples/{run.sample[0]}</h2>"
            parts["samples"] += f"<pre>{_escaped(run.sample[1])}</pre>"
    return PAGE.substitute(parts)


def _last(run: Run) -> str:
    """The newest row of a run, in words."""
    rows = run.train[-1:] + run.held_out[-1:]
    times = [(number(row.get("time")) or 0.0, int(row["step"])) for row in rows]
    seconds, step = max(times, default=(0.0, 0))
    clock = time.strftime(" at %H:%M:%S", time.localtime(seconds)) if 0 < seconds < 1e11 else ""
    return f", step {step}{clock}" if rows else ", no rows yet"


def _escaped(text: str) -> str:
    """As text of a page; without what nobody sees and what turns the direction of the text after it."""
    unseen = "[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return html.escape(re.sub(unseen, "\ufffd", text))


def _table(cells: list[list[str]], names: list[str]) -> str:
    """A table, the names of runs in it with their colours."""
    marked = {_plain(name): f'<b class="c{k % 8}">{_escaped(name)}</b>' for k, name in enumerate(names)}
    lines = []
    for tag, row in zip(["th", *["td"] * len(cells)], cells):
        found = [marked.get(cell, _escaped(cell)) for cell in row]
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in found) + "</tr>")
    return f'<div class="table"><table>{"".join(lines)}</table></div>'


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers from low to high, which differ."""
    size = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(size * part for part in (1, 2, 5, 10) if size * part * 5.001 >= high - low)
    return [k * step for k in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def _figure(title: str, curves: list[tuple[Curve, Curve]]) -> str:
    """The curves of each run, of training and held out, over steps; nothing where there is no point."""
    left, top, wide, high = 58, 8, 320, 150  # of the plot, in units of the view box
    curves = [(smooth(train), held_out) for train, held_out in curves]
    points = [point for both in curves for part in both for point in part]
    if not points:
        return ""
    last = max(1, *[step for step, _ in points])
    values = [value for _, value in points]
    spare = (max(values) - min(values)) * 0.05 or abs(values[0]) * 0.05 or 1.0
    low, above = min(values) - spare, max(values) + spare

    def x(step: float) -> str:
        return f"{left + wide * step / last:.1f}"

    def y(value: float) -> str:
        return f"{top + high * (above - value) / (above - low):.1f}"

    drawn = []
    for tick in _ticks(low, above):
        drawn += [f'<path d="M{left} {y(tick)}h{wide}"/><text class="value" x="{left - 6}" dy="4"']
        drawn += [f' y="{y(tick)}">{round(tick, 12):.5g}</text>']
    for tick in _ticks(0, last):
        drawn += [f'<text x="{x(tick)}" y="{top + high + 16}">{tick:g}</text>'] * (tick == int(tick))
    for index, (train, held_out) in enumerate(curves):
        thin = math.ceil(len(train) / POINTS)
        drawn.append(f'<g class="c{index % 8}">')
        for kind, part in (("train", train[:: thin or 1] + train[-1:]), ("held-out", held_out)):
            drawn += [f'<polyline class="{kind}" points="{" ".join(f"{x(s)},{y(v)}" for s, v in part)}"/>']
        for step, value in held_out:
            said = f"<title>step {step}: {value:.5g}</title>"
            drawn += [f'<circle cx="{x(step)}" cy="{y(value)}" r="2.8">{said}</circle>']
        drawn.append("</g>")
    box = f'viewBox="0 0 {left + wide + 20} {top + high + 24}" role="img" aria-label="{html.escape(title)}"'
    return f"<figure><figcaption>{title}</figcaption><svg {box}>{''.join(drawn)}</svg></figure>"


# ---- together
# -------------------------------------------------------------------------------------------------------


def tell(text: str) -> None:
    """Print; a reader that has gone away, such as `head`, ends the printing and nothing else."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def look(args: argparse.Namespace) -> bool:
    """Read, print and draw everything once; whether a run is still running."""
    names = [os.path.basename(os.path.realpath(folder)) for folder in args.runs]
    names = [n if names.count(n) == 1 else str(folder) for n, folder in zip(names, args.runs)]
    runs = {name: read(folder) for name, folder in zip(names, args.runs)}
    running = any(run.state in ("running", "") for run in runs.values())
    tell("\x1b[H\x1b[2J" * (bool(args.live) and sys.stdout.isatty()) + markdown(summary(runs)))
    if subsets := by_subset(runs):
        tell(f"\n{markdown(subsets)}")
    try:
        if args.html:
            beside = args.html.with_name(f".{args.html.name}.tmp")
            beside.write_text(page(runs, args.live if running else None), encoding="utf-8")
            beside.replace(args.html)
            tell(f"wrote {args.html}")
        for out in args.out:
            draw(runs, out)
            tell(f"wrote {out}")
    except OSError as error:
        fail(f"{error.filename2 or error.filename}: {error.strerror}")
    return running


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"must be 1 to 86400 seconds, got {text}")
    return value


def _path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError("must not hold a NUL character")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=_path, help="run directories")
    parser.add_argument("--out", type=_path, action="append", help="PNG, SVG, repeatable; or comparison.png")
    parser.add_argument("--html", type=_path, default=None, help="the page to write")
    parser.add_argument("--live", type=_seconds, default=None, help="again every so many seconds")
    args = parser.parse_args(argv)
    args.out = args.out or ([] if args.html else [Path("comparison.png")])
    for path in filter(None, [*args.out, args.html]):
        if path.is_dir() or not path.parent.is_dir():
            fail(f"{path}: not a file in a folder that is there")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        while look(args) and args.live:
            time.sleep(args.live)
    except KeyboardInterrupt:
        pass  # the page and the figure are whole


if __name__ == "__main__":
    main()
