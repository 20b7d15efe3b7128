"""Ten runs on one reference: a sweep of beta with the reference's values cached, against a live one.

    python bench/sweep.py --model models/smollm2 [--runs 10] [--steps 2] [--loss ra_dpo1] [--lora-rank 16]

Drives the real align.py, a process a run, first with --cache-reference (an empty one: the first run fills it, which
counts), then with a live reference. Flags not named here go to every run. Prints a Markdown table: seconds of all
runs, of the one that fills, the median step, and the largest peak memory of a run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from step import describe_machine, report  # noqa: E402


def sweep(args: argparse.Namespace, flags: list[str], folder: Path) -> dict:
    """What the runs of one way took."""
    seconds, steps, peaks = [], [], []
    for index in range(args.runs):
        out = folder / f"run-{index}"
        command = [sys.executable, "align.py", "--model", args.model, "--data", args.data, "--out", str(out)]
        command += ["--beta", f"{0.02 * 1.6**index:.4g}", "--steps", str(args.steps), "--warmup-steps", "0"]
        command += ["--eval-every", "0", "--batch-size", str(args.pairs), *flags]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        seconds.append(time.perf_counter() - began)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps += [row["step_s"] for row in rows[1:] or rows]
        peaks += [row["mem_gb"] for row in rows if index or not folder.name.startswith("cached")]
        print(folder.name, index, f"{seconds[-1]:.0f} s", file=sys.stderr, flush=True)
    return {"all": sum(seconds), "first": seconds[0], "step": statistics.median(steps), "gb": max(peaks)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--model", required=True)
    made.add_argument("--data", default="examples/hh_train.jsonl")
    made.add_argument("--runs", type=int, default=10)
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--pairs", type=int, default=8)
    made.add_argument("--out", type=Path, default=None, help="also write the output here")
    args, flags = made.parse_known_args(argv)
    args.flags = flags
    return args


def main() -> None:
    args = parse_args(None)
    flags = args.flags
    lines = [f"{args.runs} runs of {args.steps} steps of {args.pairs} pairs, {' '.join(flags) or 'dpo'}, {describe_machine()}", ""]
    lines += ["| reference | all runs, s | the first, s | a step, s | peak of the others, GB |", "|---|---|---|---|---|"]
    record = {}
    with tempfile.TemporaryDirectory() as name:
        ways = {"cached": ["--cache-reference", f"{name}/cache"], "live": []}
        for way, own in ways.items():
            (Path(name) / way).mkdir()
            found = record[way] = sweep(args, [*flags, *own], Path(name) / way)
            lines.append(f"| {way} | {found['all']:.0f} | {found['first']:.0f} | {found['step']:.2f} | {found['gb']:.2f} |")
    report(lines, record, args.out)


if __name__ == "__main__":
    main()
