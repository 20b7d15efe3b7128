"""Time and memory of one optimiser step, against the matmul lower bound measured in the same run.

    python bench/step.py --model models/smollm2 [--losses dpo ra_dpo1] [--steps 8] [--out bench/step.md]

Drives the real align.py, one process a loss (so that peak memory is its own), in turns: loss by loss, round
by round. The lower bound is the time of the step's matrix multiplications alone, at their shapes, in the
run's dtype: body forward twice (policy, and recomputed where activations are checkpointed), backward (twice a
forward), the reference's forward, and the head. Prints a Markdown table and one JSON line.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402


def median_seconds(run, repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_seconds(config, tokens: int, trained: int, recompute: bool) -> dict[str, float]:
    """Seconds of a step's matmuls in bf16, at their shapes, summed from single calls."""
    shapes = {}  # (in, out) of every linear layer of a block -> how many
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    for shape in (
        (config.hidden_size, wide), (wide, config.hidden_size), (config.hidden_size, narrow), (config.hidden_size, narrow),
        (config.hidden_size, config.intermediate_size), (config.hidden_size, config.intermediate_size),
        (config.intermediate_size, config.hidden_size),
    ):  # fmt: skip
        shapes[shape] = shapes.get(shape, 0) + config.num_hidden_layers
    forward = backward = 0.0
    for (inner, outer), number in shapes.items():
        x = torch.randn(tokens, inner, dtype=torch.bfloat16)
        y = torch.randn(tokens, outer, dtype=torch.bfloat16)
        w = torch.randn(outer, inner, dtype=torch.bfloat16)
        forward += number * median_seconds(lambda x=x, w=w: x @ w.t())
        backward += number * (
            median_seconds(lambda y=y, w=w: y @ w) + median_seconds(lambda x=x, y=y: y.t() @ x)
        )
    h = torch.randn(trained, config.hidden_size, dtype=torch.bfloat16)
    w = torch.randn(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
    z = torch.randn(trained, config.vocab_size, dtype=torch.bfloat16)
    head = median_seconds(lambda: h @ w.t(), 3)
    head_backward = median_seconds(lambda: z @ w, 3) + median_seconds(lambda: z.t() @ h, 3)
    body = (
        forward * (3 if recompute else 2) + backward
    )  # policy and reference forward, recomputation, backward
    return {"body": body, "head": 2 * head + head_backward, "flops_rate": _rate(config, tokens, forward)}


def _rate(config, tokens: int, forward: float) -> float:
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    block = config.hidden_size * (2 * wide + 2 * narrow + 3 * config.intermediate_size)
    return 2 * tokens * block * config.num_hidden_layers / forward


def step_times(args: argparse.Namespace, loss: str) -> tuple[list[dict], float]:
    """Rows of the steps after the warm-up, and the peak resident set of the process in GB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "align.py", "--model", args.model, "--data", args.data, "--loss", loss]
        command += [
            "--steps",
            str(args.warmup + args.steps),
            "--batch-size",
            str(args.pairs),
            "--max-length",
            "512",
        ]
        command += [
            "--out",
            folder + "/run",
            "--eval-every",
            "0",
            "--device",
            "cpu",
            "--tokens-per-microbatch",
        ]
        command += [
            str(args.tokens_per_microbatch),
            "--activation-checkpointing",
            args.activation_checkpointing,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return rows[args.warmup :], max(row["mem_gb"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/hh_train.jsonl")
    parser.add_argument("--losses", nargs="+", default=["dpo", "tdpo1", "ra_dpo1"])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--activation-checkpointing", choices=("none", "full"), default="full")
    parser.add_argument("--out", type=Path, default=None, help="also write the output here")
    args = parser.parse_args()

    found = {loss: ([], 0.0) for loss in args.losses}
    for _ in range(args.rounds):
        for loss in args.losses:
            rows, peak = step_times(args, loss)
            found[loss] = (found[loss][0] + rows, max(found[loss][1], peak))
    tokenizer = model.load_tokenizer(args.model)
    template = data.chat_template(tokenizer, None)
    encoded = [
        data.encode(example, tokenizer, 512, 256, template) for example in data.load(args.data, "train")[0]
    ]
    trained = sum(example.trained_tokens for example in encoded) / len(encoded) * args.pairs
    tokens = statistics.mean(row["tokens"] for row in found[args.losses[0]][0])
    config = transformers.AutoConfig.from_pretrained(args.model)
    bound = matmul_seconds(config, int(tokens), int(trained), args.activation_checkpointing == "full")
    seconds = bound["body"] + bound["head"]
    base = statistics.median(row["step_s"] for row in found[args.losses[0]][0])
    lines = [
        f"{args.pairs} pairs a step, max length 512, bf16, live reference, {describe_machine()}; "
        f"medians of {args.steps * args.rounds} steps after {args.warmup} of warm-up; activation checkpointing "
        f"{args.activation_checkpointing}, {args.tokens_per_microbatch} tokens a micro-batch.",
        "",
        f"| loss | s/step | ratio to {args.losses[0]} | pairs/s | tokens/s | peak RSS, GB | matmul bound / step |",
        "|---|---|---|---|---|---|---|",
    ]
    record = {
        "machine": describe_machine(),
        "bound_s": seconds,
        "matmul_flops": bound["flops_rate"],
        "losses": {},
    }
    for loss, (rows, peak) in found.items():
        step = statistics.median(row["step_s"] for row in rows)
        speed = statistics.median(row["tok_per_s"] for row in rows)
        pairs = args.pairs / step
        lines.append(
            f"| {loss} | {step:.2f} | {step / base:.2f} | {pairs:.2f} | {speed:.0f} | {peak:.2f} | {seconds / step:.0%} |"
        )
        record["losses"][loss] = {
            "step_s": step,
            "pairs_per_s": pairs,
            "tokens_per_s": speed,
            "peak_gb": peak,
        }
    lines.append("")
    lines.append(
        f"Matmul lower bound {seconds:.2f} s (body {bound['body']:.2f}, head {bound['head']:.2f}) at "
        f"{bound['flops_rate'] / 1e12:.2f} TFLOP/s measured on the body's shapes."
    )
    report(lines, record, args.out)


def report(lines: list[str], record: dict, out: Path | None) -> None:
    """Print a table and its record as one JSON line; the table also goes into `out`."""
    text = "\n".join(lines)
    print(text)
    print(json.dumps(record))
    if out:
        out.write_text(text + "\n", encoding="utf-8")


def describe_machine() -> str:
    """Threads, processor, versions and commit, for the line above a table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "none"
    return (
        f"{torch.get_num_threads()} threads of {processor}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, commit {commit}"
    )


if __name__ == "__main__":
    main()
