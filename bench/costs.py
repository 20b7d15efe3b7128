"""What safety costs: a checkpoint with its check of the weights, and the signals asked for in every step, as
shares of a step.

    python bench/costs.py [--model models/smollm2] [--processes 2] [--steps 8]

Runs align.py with dpo and --save-every half of the steps, under torchrun, with clocks around its own calls.
Prints a Markdown table. The saves are of the whole state: fp32 masters and both moments.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import align  # noqa: E402
import checkpoint  # noqa: E402
import fsdp  # noqa: E402
import rundir  # noqa: E402
from step import describe_machine  # noqa: E402

EVERY = 50  # steps between two saves, of the share


def timed(module: object, name: str, into: list[float]) -> None:
    """A clock around a function of a module."""
    plain = getattr(module, name)

    @functools.wraps(plain)
    def measured(*args, **named):
        began = time.perf_counter()
        try:
            return plain(*args, **named)
        finally:
            into.append(time.perf_counter() - began)

    setattr(module, name, measured)


def worker(argv: list[str], out: Path) -> None:
    """One rank: the run, and what rank 0 says of its clocks."""
    saves, checks, asks = [], [], []
    timed(checkpoint, "save", saves)
    timed(fsdp, "not_finite", checks)
    timed(rundir, "leave_if_told", asks)
    align.main(argv)
    if int(os.environ["RANK"]) == 0:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step_s"] for row in rows if row["split"] == "train"][1:]  # the first compiles
        found = {"step": steps, "save": saves, "finite": checks, "signals": asks}
        (out / "costs.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(args.processes), __file__]
        given = ["configs/hh_smollm2.toml", "--model", args.model, "--out", f"{folder}/run"]
        given += ["--steps", str(args.steps), "--save-every", str(args.steps // 2), "--eval-every", "0"]
        subprocess.run([*command, *given, "--batch-size", "8"], check=True, cwd=ROOT)
        found = json.loads(Path(folder, "run", "costs.json").read_text())
    names = ("step", "save", "finite", "signals")
    step, save, finite, asked = (statistics.median(found[name]) for name in names)
    print(f"\ndpo, 8 pairs a step, {args.processes} processes, {describe_machine()}\n")
    print("| what | s | share of a step |\n|---|---|---|")
    print(f"| a step | {step:.2f} | 100% |")
    print(f"| a checkpoint, every {EVERY} steps | {save:.2f} | {save / EVERY / step:.2%} |")
    print(f"| are all weights finite, before each checkpoint | {finite:.3f} | {finite / EVERY / step:.3%} |")
    print(f"| the same, if it were asked in every step | {finite:.3f} | {finite / step:.2%} |")
    print(f"| has a signal come, on any rank | {asked:.4f} | {asked / step:.2%} |")


if __name__ == "__main__":
    worker(sys.argv[1:], Path(sys.argv[sys.argv.index("--out") + 1])) if "RANK" in os.environ else main()
