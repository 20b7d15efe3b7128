"""Time and memory of one optimiser step, against the matmul lower bound measured in the same run.

    python bench/step.py --model models/smollm2 [--rows dpo "ra_dpo1, cvar"] [--steps 8] [--profile] [--out FILE]

Drives the real align.py, one process a row of ROWS (so that peak memory is its own), in --rounds turns, row by
row. The lower bound is the time of the step's matrix multiplications alone, at their shapes, in bf16: body
forward of the reference and of the policy, again where activations are checkpointed, backward (twice a
forward), and the head: logits of both, of the policy again, two products of the backward. With --profile the
first row runs once more, its step PROFILED under torch's profiler. Prints Markdown tables and one JSON line.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402
import encode  # noqa: E402
import loading  # noqa: E402

ROWS = {
    "dpo": ["--loss", "dpo"],
    "tdpo1": ["--loss", "tdpo1"],
    "ra_dpo1, cvar": ["--loss", "ra_dpo1", "--risk", "cvar"],
    "ra_dpo1, erm": ["--loss", "ra_dpo1", "--risk", "erm"],
    "ra_dpo1, published": ["--loss", "ra_dpo1", "--risk", "published"],
    "kto": ["--loss", "kto"],
    "ppo": ["--loss", "ppo"],
    "dpo, selective": ["--loss", "dpo", "--activation-checkpointing", "selective"],
    "dpo, none": ["--loss", "dpo", "--activation-checkpointing", "none"],
    "dpo, 2 processes": ["--loss", "dpo"],
    "dpo, cached": ["--loss", "dpo"],
    "ra_dpo1, cvar, cached": ["--loss", "ra_dpo1", "--risk", "cvar"],
    "dpo, LoRA": ["--loss", "dpo", "--lora-rank", "16"],
    "dpo, LoRA, cached": ["--loss", "dpo", "--lora-rank", "16"],
}
FILLED: dict[str, float] = {}  # seconds that a cache of reference values took, of the rows that have one
PROFILED = 5  # the step under the profiler: the ones before it still touch memory for the first time
# What the profile's operations are for, by their names; the first that matches.
KINDS = {
    "matrix products of body and head": r"aten::(mm|addmm|addmm_)$",
    "matrix products of attention": r"aten::bmm$",
    "copies and casts": r"aten::(copy_|cat|_to_copy|clone|index_select|gather|zero_|fill_)|fsdp::|c10d::|gloo",
    "elementwise and sums": r"aten::(mul|add|sub|div|exp|pow|silu|rsqrt|mean|sum|neg|tanh|softmax|_softmax|logsumexp|"
    r"log|masked|where|addcmul|triu|tril|index_add|scatter|embedding|linalg|amax|heaviside|clamp|maximum)",
    "AdamW": r"aten::_fused_adamw_",
}


# ---- the lower bound


def median_seconds(run: Callable, repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_seconds(config, tokens: int, trained: int) -> dict[str, float]:  # noqa: ANN001
    """Seconds of a step's matmuls in bf16 at their shapes, and the rate of the body's in FLOP a second."""
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    size, inner = config.hidden_size, config.intermediate_size
    block = [(size, wide), (wide, size), (size, narrow), (size, narrow), (size, inner), (size, inner), (inner, size)]
    forward = inputs = weights = 0.0
    for before, after in block:
        x, y = (torch.randn(tokens, width, dtype=torch.bfloat16) for width in (before, after))
        w = torch.randn(after, before, dtype=torch.bfloat16)
        forward += config.num_hidden_layers * median_seconds(lambda x=x, w=w: x @ w.t())
        inputs += config.num_hidden_layers * median_seconds(lambda y=y, w=w: y @ w)
        weights += config.num_hidden_layers * median_seconds(lambda x=x, y=y: y.t() @ x)
    h = torch.randn(trained, size, dtype=torch.bfloat16)
    w = torch.randn(config.vocab_size, size, dtype=torch.bfloat16)
    z = torch.randn(trained, config.vocab_size, dtype=torch.bfloat16)
    head = {"logits": median_seconds(lambda: h @ w.t(), 3), "head inputs": median_seconds(lambda: z @ w, 3)}
    head["head weights"] = median_seconds(lambda: z.t() @ h, 3)
    flops = 2 * tokens * sum(before * after for before, after in block) * config.num_hidden_layers
    body = {"body forward": forward, "inputs": inputs, "weights": weights, "rate": flops / forward}
    return body | head


def head_bound(parts: dict[str, float], label: str) -> float:
    """The policy's logits twice, the reference's where its states are there, and what is trained."""
    logits = 2 + (label != "dpo, cached" and label != "dpo, LoRA, cached")
    return logits * parts["logits"] + parts["head inputs"] + ("LoRA" not in label) * parts["head weights"]


def bound(parts: dict[str, float], label: str) -> float:
    """Without the products of the adapters themselves, which are small."""
    passes = 3 - ("none" in label) - 0.5 * ("selective" in label) - ("cached" in label)
    body = passes * parts["body forward"] + parts["inputs"] + ("LoRA" not in label) * parts["weights"]
    return body + head_bound(parts, label)


# ---- the runs


def run_row(args: argparse.Namespace, label: str, steps: int, *wrapper: str) -> tuple[list[dict], str]:
    """The logged rows of a run, and the last line that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        script = wrapper or ["align.py"]
        command = [sys.executable, *script, "--model", args.model, "--data", args.data, *ROWS[label]]
        command += ["--out", f"{folder}/run", "--steps", str(steps), "--max-length", "512", "--eval-every", "0"]
        responses = args.pairs * (1 if "dpo" in label else 2)  # kto and ppo count responses
        command += ["--batch-size", str(responses), "--device", "cpu"]
        command += ["--tokens-per-microbatch", str(args.tokens_per_microbatch)]
        if "cached" in label:
            command += ["--cache-reference", args.cache]
            if label not in FILLED:
                began = time.perf_counter()
                subprocess.run([*command, "--cache-reference-only", "true"], cwd=ROOT, capture_output=True, check=True)
                FILLED[label] = time.perf_counter() - began
        env = dict(os.environ)
        if label.endswith("processes"):
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            env["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines], done.stdout.splitlines()[-1]


def profile_last_step(argv: list[str]) -> None:
    """align.py with its last step under the profiler; prints the seconds of each kind of work as JSON."""
    import align
    import batch
    import rundir

    steps = int(argv[argv.index("--steps") + 1])
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    packs, write_row = batch.packs, rundir.write_row
    calls = []

    def begin(*parts):  # noqa: ANN002, ANN202
        calls.append(parts)
        if len(calls) == steps:
            profiler.start()
        return packs(*parts)

    def end(*parts):  # noqa: ANN002, ANN202
        if len(calls) == steps:
            profiler.stop()
        return write_row(*parts)

    batch.packs, rundir.write_row = begin, end
    align.main(argv)
    found = dict.fromkeys([*KINDS, "the rest: dispatch, Python, hooks"], 0.0)
    for event in profiler.key_averages():
        kinds = [kind for kind, names in KINDS.items() if re.match(names, event.key)]
        found[kinds[0] if kinds else list(found)[-1]] += event.self_cpu_time_total / 1e6
    print(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["profiled"]:
        profile_last_step(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/hh_train.jsonl")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="also write the output here")
    args = parser.parse_args()
    cache = tempfile.TemporaryDirectory()
    args.cache = cache.name

    found = {label: [] for label in args.rows}
    peaks = dict.fromkeys(args.rows, 0.0)
    for _ in range(args.rounds):
        for label in args.rows:
            rows, _ = run_row(args, label, args.warmup + args.steps)
            found[label] += rows[args.warmup :]
            peaks[label] = max(peaks[label], *[row["mem_gb"] for row in rows])
    tokenizer = loading.load_tokenizer(args.model)
    template = chat.chat_template(tokenizer, None)
    examples = data.load(args.data, "train")[0]
    encoded = [encode.encode(example, tokenizer, 512, 256, template) for example in examples]
    trained = sum(example.trained_tokens for example in encoded) / len(encoded) * args.pairs
    base = args.rows[0]
    tokens = statistics.mean(row["tokens"] for row in found[base])
    config = transformers.AutoConfig.from_pretrained(args.model)
    parts = matmul_seconds(config, int(tokens), int(trained))
    seconds = {label: statistics.median(row["step_s"] for row in rows) for label, rows in found.items()}
    lines = [
        f"{args.pairs} pairs a step, max length 512, bf16, live reference, {describe_machine()}; medians of "
        f"{args.steps * args.rounds} steps after {args.warmup} of warm-up, {tokens:.0f} tokens a step on average.",
        "",
        f"| row | s/step | to {base} | pairs/s | tokens/s | peak RSS, GB | matmul bound / step |",
        "|---|---|---|---|---|---|---|",
    ]
    record = {"machine": describe_machine(), "bound": parts, "rows": {}}
    for label, rows in found.items():
        step = seconds[label]
        speed = sum(row["tokens"] for row in rows) / sum(row["step_s"] for row in rows)
        share = f"{bound(parts, label) / step:.0%}" if "dpo" in label else "-"
        lines.append(
            f"| {label} | {step:.2f} | {step / seconds[base]:.2f} | {args.pairs / step:.2f} | {speed:.0f} | "
            f"{peaks[label]:.2f} | {share} |"
        )
        record["rows"][label] = {"step_s": step, "tokens_per_s": speed, "peak_gb": peaks[label]}
    lines += [
        "",
        f"Matmul lower bound of {base}: {bound(parts, base):.2f} s, of which the head {head_bound(parts, base):.2f} s, at "
        f"{parts['rate'] / 1e12:.2f} TFLOP/s measured on the body's shapes. Peak memory is one process's.",
    ]
    if args.profile:
        _, last = run_row(args, base, PROFILED, __file__, "profiled")
        record["profile"] = json.loads(last)
        whole = sum(record["profile"].values())
        lines += ["", f"| where a step of {base} goes (profiler) | s | share |", "|---|---|---|"]
        lines += [f"| {kind} | {spent:.2f} | {spent / whole:.0%} |" for kind, spent in record["profile"].items()]
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
