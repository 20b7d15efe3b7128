"""Start-up and memory as the number of rows grows: tokenising, the cache, the first step.

    python bench/rows.py --model models/smollm2 [--rows 2000 160000] [--out FILE]

Rows are HH-like: dialogues and answers of the bundled sample, numbered so that no two are the same. For each
size align.py runs twice for one dpo step of --pairs pairs with an empty cache of its own: the first run
tokenises, the second finds the cache. Times are from the start of the command to the end of the first step;
peak memory is the training process's, by getrusage. Prints a Markdown table and one JSON line.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step import describe_machine, report  # noqa: E402


def write_rows(source: Path, number: int, path: Path) -> None:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(number):
            row, other = draw.choice(rows), draw.choice(rows)
            prompt = [dict(turn) for turn in row["prompt"]]
            prompt[-1]["content"] += f" ({index})"
            answers = {"chosen": row["chosen"], "rejected": other["rejected"]}
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")


def run(args: argparse.Namespace, rows: Path, out: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, "align.py", "--model", args.model, "--data", str(rows), "--out", str(out)]
    command += ["--steps", "1", "--batch-size", str(args.pairs), "--device", "cpu", "--token-cache", str(cache)]
    began = time.time()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors[-4000:])
    row = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"seconds": row["time"] - began, "step": row["step_s"], "peak_gb": row["mem_gb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "hh_train.jsonl")
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 160000])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="also write the output here")
    args = parser.parse_args()
    found = {}
    for number in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(args.data, number, folder / "rows.jsonl")
            first = run(args, folder / "rows.jsonl", folder / "first", folder / "cache")
            again = run(args, folder / "rows.jsonl", folder / "again", folder / "cache")
            disk = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()) / 1e9
            found[number] = {"first": first, "again": again, "disk_gb": disk}
    lines = [
        f"One dpo step of {args.pairs} pairs, bf16, live reference, {os.cpu_count()} cores, {describe_machine()}",
        "",
        "| rows | tokenising, s | start to first step, s | of it the step, s | peak RSS, tokenising, GB "
        "| peak RSS, cached, GB | cache, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in found.items():
        first, again = row["first"], row["again"]
        tokenising = (first["seconds"] - first["step"]) - (again["seconds"] - again["step"])
        lines.append(
            f"| {number} | {tokenising:.1f} | {again['seconds']:.1f} | {again['step']:.1f} | "
            f"{first['peak_gb']:.2f} | {again['peak_gb']:.2f} | {row['disk_gb']:.3f} |"
        )
    report(lines, found, args.out)


if __name__ == "__main__":
    main()
