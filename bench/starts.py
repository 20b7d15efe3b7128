"""Twenty steps of every loss from its starting point: which are sound, which noisy, which need care?

    python bench/starts.py --model models/smollm2 [--losses dpo kto] [--steps 20] [--jobs 8] [--device cuda]
    python bench/starts.py --model examples/tiny --weights random --results /tmp/starts.jsonl

Drives the real align.py, a process a run and --jobs of them at a time, from configs/hh_smollm2.toml, whose
table [loss] holds the starting points; `sft` and `csft` are sft.py from configs/hh_smollm2_sft.toml. A tenth
of the steps is warm-up, a cosine to 0 follows. Flags not named here go to every run (--max-length 256, --lr
2e-5). A line a run goes to --results; what is there with the same model, steps and flags is not run again.
Prints them as a Markdown table; exit code 1 if a run failed, whose log is kept in --out.

    loss, first and last     of the training batches: step 0, mean of the last five
    held out                 the loss, before and after, on the same --eval-examples rows
    noise                    of the held-out loss: the standard deviation of a training step's loss (of its
                             successive differences, over the root of 2: a trend does not count), times the
                             root of (batch size / held-out pairs, or what the loss counts)
    accuracy, margin, KL     held out, after: of rewards, or of log-probabilities without a reference; the
                             sequential KL(ref, policy) of chosen / rejected answers in nats
    needs care               a step not finite, or the held-out loss rises by more than its noise, or the
                             largest gradient norm is over 10 times the median
    sound                    none of it, and the held-out loss falls by more than its noise
    noisy                    neither
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from typing import Any, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import precision  # noqa: E402

CONFIG = ROOT / "configs" / "hh_smollm2.toml"
SFT_CONFIG = ROOT / "configs" / "hh_smollm2_sft.toml"
STARTS = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["loss"] | {"sft": {}, "csft": {}}
EXPLODES = 10  # times the median: a gradient norm
HEADER = (
    "| loss | lr | its own | batch | first | last 5 | held out, before | after | noise | accuracy | margin "
    "| KL chosen / rejected | largest norm | s/step | status |"
)

Row = dict[str, Any]


def number(row: Row, *names: str) -> float:
    """Under the first name that a row of metrics has, NaN without one; "nan" and "inf" are numbers."""
    return float(next((row[name] for name in names if name in row), "nan"))


def measured(folder: Path, own: Sequence[str]) -> Row:
    """What a finished run says of itself; `own` are the flags that its starting point set."""
    flags = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    steps = [row for row in rows if row["split"] == "train" and "skipped" not in row]
    before, after = [row for row in rows if row["split"] == "eval"]
    held_out = next(after[name] for name in ("pairs", "responses", "examples") if name in after)
    losses = [number(row, "loss") for row in steps] or [math.nan]
    norms = [number(row, "grad_norm") for row in steps] or [math.nan]
    jumps = [(b - a) ** 2 / 2 for a, b in zip(losses, losses[1:])] or [math.nan]
    found = {
        "lr": flags["lr"],
        "batch": flags["batch_size"],
        "own": {name: flags[name] for name in own if name not in ("lr", "batch_size")},
        "first": losses[0],
        "last": fmean(losses[-5:]),
        "before": number(before, "loss"),
        "after": number(after, "loss"),
        "noise": math.sqrt(fmean(jumps) * flags["batch_size"] / held_out),
        "accuracy": number(after, "rewards/accuracies", "logps/accuracies"),
        "margin": number(after, "rewards/margins", "logps/margins"),
        "kl_chosen": number(after, "kl/chosen"),
        "kl_rejected": number(after, "kl/rejected"),
        "norm": max(norms),
        "norm_median": median(norms),
        "step_s": median([number(row, "step_s") for row in steps] or [math.nan]),
        "not_finite": sum("skipped" in row for row in rows),
    }
    return found


def status(row: Row) -> str:
    """By the rule of the docstring above."""
    fall = row["before"] - row["after"]
    finite = math.isfinite(fall + row["last"] + row["norm"]) and not row["not_finite"]
    if not finite or fall < -row["noise"] or row["norm"] > EXPLODES * row["norm_median"]:
        return "needs care"
    return "sound" if fall > row["noise"] else "noisy"


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""

    def cell(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for row in rows:
        cells = [row["loss"], f"{row['lr']:g}"]
        cells += [", ".join(f"{name} {value:g}" for name, value in row["own"].items()) or "-"]
        cells += [str(row["batch"]), *[cell(row[key], ".4g") for key in ("first", "last")]]
        cells += [cell(row[key], ".5g") for key in ("before", "after")]
        cells += [cell(row["noise"], ".2g"), cell(row["accuracy"], ".3f"), cell(row["margin"], ".3g")]
        cells += [" / ".join(cell(row[key], ".3g") for key in ("kl_chosen", "kl_rejected"))]
        cells += [cell(row["norm"], ".3g"), cell(row["step_s"], ".2f"), status(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command(loss: str, args: argparse.Namespace) -> list[str]:
    """The training of a loss from its starting point."""
    by_sft = loss in ("sft", "csft")
    script, config, flag = ("sft", SFT_CONFIG, "--method") if by_sft else ("align", CONFIG, "--loss")
    line = [sys.executable, f"{ROOT}/{script}.py", config, flag, loss, "--model", args.model]
    line += ["--steps", args.steps, "--warmup-steps", max(1, args.steps // 10)]
    line += ["--eval-every", 0, "--eval-examples", args.eval_examples, "--save-every", 0]
    line += ["--skip-non-finite", args.steps, "--device", args.device, "--token-cache", args.out / "tokens"]
    return [str(part) for part in [*line, *args.flags, "--out", args.out / loss]]


def run(loss: str, args: argparse.Namespace) -> None:
    """A training in a process of its own; what it measured as a line of the results, unless it failed."""
    out = args.out / loss
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed or failed
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with open(args.out / f"{loss}.log", "w", encoding="utf-8") as log:
        env = {"OMP_NUM_THREADS": threads} | os.environ
        code = subprocess.run(command(loss, args), cwd=ROOT, env=env, stdout=log, stderr=log).returncode
    if code:
        print(f"{loss} failed: {args.out / loss}.log", file=sys.stderr, flush=True)
        return
    row = {"loss": loss} | settings(args) | measured(out, STARTS[loss])
    written = {key: _written(value) for key, value in row.items()}
    with open(args.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(written) + "\n")
    shutil.rmtree(out)
    print(f"{loss}: {status(row)}", file=sys.stderr, flush=True)
    return row


def _written(value: Any) -> Any:
    """Six digits of a number; what is no number in JSON as text."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def settings(args: argparse.Namespace) -> Row:
    """What rows of one table have in common."""
    shared = {"model": Path(args.model).name, "steps": args.steps, "eval_examples": args.eval_examples}
    return shared | {"flags": " ".join(args.flags), "dtype": precision.usual(args.device)}  # unless those say it


def read(path: Path, told: Row) -> dict[str, Row]:
    """The rows of these settings by loss."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    rows = [{key: float(v) if v in ("nan", "inf", "-inf") else v for key, v in row.items()} for row in rows]
    return {row["loss"]: row for row in rows if told.items() <= row.items()}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--model", required=True, help="where every run starts")
    made.add_argument("--losses", nargs="+", choices=STARTS, default=list(STARTS), metavar="LOSS")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--jobs", type=int, default=1, help="runs at a time")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--eval-examples", type=int, default=128)
    made.add_argument("--out", type=Path, default=ROOT / "runs" / "starts", help="logs, and runs as they go")
    made.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "starts.jsonl")
    args, flags = made.parse_known_args(argv)
    args.flags = flags
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.out, args.results = args.out.absolute(), args.results.absolute()
    args.model = str(Path(args.model).absolute()) if Path(args.model).is_dir() else args.model
    args.out.mkdir(parents=True, exist_ok=True)
    told = settings(args)
    missing = [loss for loss in args.losses if loss not in read(args.results, told)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda loss: run(loss, args), missing))
    found = read(args.results, told)
    print(table([found[loss] for loss in args.losses if loss in found]))
    sys.exit(int(any(loss not in found for loss in args.losses)))


if __name__ == "__main__":
    main()
