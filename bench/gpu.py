"""What a GPU does with a step: tokens a second, MFU and memory of models of three sizes, in about 10 minutes.

    python bench/gpu.py [--models smollm2 1b 8b] [--rows dpo "dpo, cached"] [--minutes 10] [--out DIR]
    python bench/gpu.py --device cpu --models tiny --steps 2 --warmup 1    a trial of the command itself

Drives the real scripts, one process a row, on models of SHAPES with random weights, written as ordinary
folders first and loaded from there: speed and memory do not depend on what weights say. A row with a live
reference that cannot fit is refused by align.py itself, and its line says so. After --minutes no row is begun;
those that are left out are named. Medians over --steps steps after --warmup; the run is
stopped when it has logged them, for its last save would take longer than all of it.

    MFU, 6N       6 N tokens / s / peak, N the weights without the input embedding: what papers print, whatever
                  was computed; of LoRA 4 N
    with ref      8 N where a live reference's forward is part of the step
    counted       all products that memory.flops counts (a head at trained tokens only, attention, recomputation)

The peak is the data sheet's dense bf16 rate (memory.CARDS), the rate of one product of 8192^3 is measured
beside it. TRL's trainers run on the same pairs, of the 1b (or those of --trl) in --trl-python, where that has
trl; one step of the 1b's dpo (or those of --profile) runs under torch's profiler: where a GPU's time goes, and
how much of it no kernel runs.
"""

import argparse
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
import transformers  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402
import encode  # noqa: E402
import loading  # noqa: E402
import memory  # noqa: E402
from step import report  # noqa: E402
from vs_trl import choose_pairs, run_trl  # noqa: E402

# Of SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B, and of nothing.
WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "smollm2": dict(zip(WIDTHS, (576, 1536, 30, 9, 3)), head_dim=64, vocab_size=49152, tie_word_embeddings=True),
    "1b": dict(zip(WIDTHS, (2048, 8192, 16, 32, 8)), head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(zip(WIDTHS, (4096, 14336, 32, 32, 8)), head_dim=128, vocab_size=128256, tie_word_embeddings=False),
    "tiny": dict(zip(WIDTHS, (64, 128, 2, 4, 2)), head_dim=16, vocab_size=8192, tie_word_embeddings=True),
}
# Pairs of a step, and flags of what trains all weights: else the run itself chooses what fits.
TIGHT = ["--tokens-per-microbatch", "4096", "--activation-checkpointing", "full"]
HOW = {"smollm2": (128, []), "1b": (128, []), "8b": (64, TIGHT), "tiny": (4, [])}
ROWS = {
    "sft": ["sft.py"],
    "dpo": ["align.py", "--loss", "dpo"],
    "dpo, cached": ["align.py", "--loss", "dpo"],
    "dpo, hidden states cached": ["align.py", "--loss", "dpo", "--cache-hidden", "true"],
    "ra_dpo1, cvar": ["align.py", "--loss", "ra_dpo1", "--risk", "cvar"],
    "ra_dpo1, cvar, cached": ["align.py", "--loss", "ra_dpo1", "--risk", "cvar", "--cache-hidden", "true"],
    "sft, LoRA": ["sft.py", "--lora-rank", "16"],
    "dpo, LoRA": ["align.py", "--loss", "dpo", "--lora-rank", "16"],
}
AUTOCAST = {"bf16": True, "gradient_checkpointing": False, "use_cpu": False, "per_device_train_batch_size": 32}
TRL = {
    "TRL SFT, 32 at a time": AUTOCAST,
    "TRL DPO, 32 at a time": AUTOCAST,
    "TRL DPO, LoRA, 32 at a time": AUTOCAST
    | {"weights": "bfloat16", "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}},
}
ANCHORS = """Published, other data and lengths: 7B DPO on 16 H100, 5,282 tokens/s/GPU, MFU 22.5 % (open-instruct);
8B SFT on one H200, MFU 57.8 % (KempnerForge); 8B LoRA SFT on one H100, 10,115 tokens/s (Liger)."""
# Of kernels by their names; the first that matches.
KINDS = {
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|splitK",
    "AdamW": r"multi_tensor|fused_adam|FusedAdam",
    "copies": r"Memcpy|Memset|copy|CatArray|nccl",
    "index and gather": r"index|gather|scatter|embedding|sort",
    "elementwise and sums": r"elementwise|reduce|softmax|Reduce|norm|triton",
}


class Place(NamedTuple):
    """Of one model: its folder, that of its pairs, and where runs and the reference's values go."""

    model: Path
    pairs: Path
    out: Path
    cache: Path

    @property
    def data(self) -> Path:
        return self.pairs / "ours.jsonl"


Row = dict[str, Any]  # how, tok_per_s, step_s, tokens of a step, mfu, gb, start_s; or why it failed


def make(name: str, path: Path, device: str) -> None:
    """A folder with a model of random bf16 weights, made on the device, and the tokenizer of examples/tiny."""
    settings = transformers.LlamaConfig(
        **SHAPES[name], max_position_embeddings=8192, dtype="bfloat16", bos_token_id=None, eos_token_id=2
    )
    torch.manual_seed(0)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    lm.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "examples" / "tiny" / file, path)
    del lm
    if device == "cuda":
        torch.cuda.empty_cache()


def prepare(name: str, folder: Path, args: argparse.Namespace) -> tuple[Place, list[int], list[int], dict[bool, float]]:
    """A model and its pairs; the tokens of each pair in DPO and in SFT, and the shares of them that are trained."""
    place = Place(*(folder / part for part in (name, "pairs", "run", "cache")))
    place.pairs.mkdir()
    make(name, place.model, args.device)
    many = HOW[name][0] * (args.warmup + args.steps)
    _, lengths, short = choose_pairs(str(place.model), args.data, min(many, 1800), place.pairs)
    return place, lengths, short, shares(place.model, place.data)


def run(command: list[str], steps: int, out: Path, wait: float = 300) -> dict:
    """The rows of a script that is stopped after so many steps, or why there are none."""
    began, rows, path = time.perf_counter(), [], out / "metrics.jsonl"
    env = dict(os.environ, OMP_NUM_THREADS=str(min(8, os.cpu_count() or 1)), HF_HUB_OFFLINE="1")
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, env=env)
        while child.poll() is None and len(rows) < steps and time.perf_counter() - began < wait:
            time.sleep(0.2)
            rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        start = time.perf_counter() - began
        child.kill()
        child.wait()
        flags = json.loads((out / "args.json").read_text()) if (out / "args.json").exists() else {}
        errors.seek(0)
        said = errors.read().strip().splitlines()
    shutil.rmtree(out, ignore_errors=True)
    if len(rows) < steps:
        found = [line for line in said if line.startswith("error:")] or said[-1:] or ["no word"]
        refused = re.match(r"error: (needs .+?) \(", found[0])
        return {"failed": f"refused: {refused[1]}" if refused else found[0][:200]}
    rows = [json.loads(row) for row in rows[:steps]]
    start -= sum(row["step_s"] for row in rows)
    return {"rows": rows, "start_s": start, "how": flags["activation_checkpointing"]}


def is_live(label: str) -> bool:
    """Does a step compute the reference's values?"""
    return "dpo" in label and "cached" not in label


def command(label: str, place: Place, args: argparse.Namespace) -> list[str]:
    pairs, how = HOW[place.model.name]
    made = [sys.executable, *ROWS[label], "--model", str(place.model), "--data", str(place.data)]
    made += ["--out", str(place.out), *([] if "LoRA" in label else how), "--batch-size", str(pairs)]
    made += ["--steps", str(args.warmup + args.steps + 1), "--warmup-steps", "1", "--eval-every", "0"]
    made += ["--device", args.device, "--max-length", "512", "--log-every", "1000"]
    if "cached" in label:
        made += ["--cache-reference", str(place.cache)]
    if not is_live(label):  # a step of the 8b takes 0.4 % more than the plan leaves of an H200, and runs
        made += ["--yes", "true"]
    return made + args.flags.split()


def shares(path: Path, file: Path) -> dict[bool, float]:
    """Of the tokens, those that are trained: in pairs, and (True) in SFT on the chosen answers."""
    tokenizer = loading.load_tokenizer(str(path))
    template = chat.chat_template(tokenizer, None)
    rows = [encode.encode(row, tokenizer, 512, 256, template) for row in data.load(str(file), "train")[0][:500]]
    chosen = sum(len(row.completions[0]) for row in rows)
    pairs = sum(row.trained_tokens for row in rows) / sum(row.tokens for row in rows)
    return {False: pairs, True: chosen / (chosen + sum(len(row.prompt) for row in rows))}


def counted(label: str, path: Path, trained: float, checkpointing: str) -> tuple[float, float, float]:
    """FLOPs a token: 6 N, that with the reference, and all products."""
    adapt = None
    if "LoRA" in label:
        options = argparse.Namespace(model=str(path), **memory.ADAPTERS)
        adapt = functools.partial(memory.lora.insert, args=options)
    body = memory.body(transformers.AutoConfig.from_pretrained(path), adapt=adapt)
    weights = memory.numbers(body.weights)
    if not SHAPES[path.name]["tie_word_embeddings"]:
        weights -= body.head[0] * body.head[1]
    live, hidden = is_live(label), "--cache-hidden" in ROWS[label]
    reference = "live" if live else "hidden" if hidden else "cached" if "cached" in label else "none"
    how = memory.Run(1, checkpointing=checkpointing, reference=reference, drift="ra_dpo1" in label, cuda=True)
    plain = (4 if "LoRA" in label else 6) * weights
    return plain, plain + 2 * weights * live, memory.flops(body, how, 1.0, trained, 150.0)


def measured_rate(device: str) -> float:
    """FLOP a second of one bf16 product of 8192^3, or on a CPU one of fp32 of 1024^3."""
    size, dtype, many = (8192, torch.bfloat16, 20) if device == "cuda" else (1024, torch.float32, 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    (a @ b).sum().item()
    began = time.perf_counter()
    for _ in range(many):
        found = a @ b
    found.sum().item()
    return many * 2 * size**3 / (time.perf_counter() - began)


def profiled(argv: list[str]) -> None:
    """align.py with one step under the profiler; prints microseconds of each kind of kernel as JSON."""
    import align
    import batch
    import rundir

    steps = int(argv[argv.index("--steps") + 1]) - 1
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU])
    packs, calls, began = batch.packs, [], []

    def begin(*parts):  # noqa: ANN002, ANN202
        calls.append(parts)
        if len(calls) == steps:
            torch.cuda.synchronize()
            profiler.start()
            began.append(time.perf_counter())
        return packs(*parts)

    def end(args, rank, total, row) -> None:  # noqa: ANN001
        if len(calls) < steps:
            return
        torch.cuda.synchronize()
        whole = (time.perf_counter() - began[0]) * 1e6
        profiler.stop()
        found, longest = dict.fromkeys([*KINDS, "other kernels"], 0.0), {}
        for event in profiler.events():
            if event.device_type.name == "CUDA" and not event.is_user_annotation:  # spans of kernels
                kind = next((k for k, names in KINDS.items() if re.search(names, event.name)), "other kernels")
                found[kind] += event.device_time
                longest[event.name[:90]] = longest.get(event.name[:90], 0) + event.device_time
        found["no kernel"] = whole - sum(found.values())
        most = sorted(longest.items(), key=lambda item: -item[1])[:25]
        host = {event.key[:60]: event.self_cpu_time_total for event in profiler.key_averages()}
        host = sorted(host.items(), key=lambda item: -item[1])[:40]
        print(json.dumps({"kinds": found, "most": most, "host": host}), flush=True)
        os._exit(0)

    batch.packs, rundir.write_row = begin, end
    align.main(argv)


def measure(label: str, place: Place, trained: dict[bool, float], peak: float, args: argparse.Namespace) -> Row:
    """A row of ours; where its reference is cached, the cache is filled before."""
    total, made = args.warmup + args.steps, command(label, place, args)
    if "cached" in label:
        fill = subprocess.run([*made, "--cache-reference-only", "true"], cwd=ROOT, capture_output=True, text=True)
        if fill.returncode:
            return {"failed": f"the cache: {fill.stderr.strip()[-200:]}"}
    found = run(made, total, place.out)
    if "failed" in found:
        return found
    rows = found["rows"][args.warmup :]
    tokens = sum(row["tokens"] for row in rows)
    rate = statistics.median(row["tokens"] / row["step_s"] for row in rows)
    works = counted(label, place.model, trained["sft" in label], found["how"])
    return {
        "how": found["how"],
        "tok_per_s": rate,
        "step_s": statistics.median(row["step_s"] for row in rows),
        "tokens": tokens / len(rows),
        "mfu": [rate * work / peak for work in works],
        "gb": max(row["mem_gb"] for row in rows),
        "start_s": found["start_s"],
    }


def measure_trl(label: str, place: Place, tokens: Sequence[int], args: argparse.Namespace) -> Row:
    """The same of TRL; `tokens` are those of the packed form, by pair."""
    many, total = HOW[place.model.name][0], args.warmup + args.steps
    options = TRL[label] | {"use_cpu": args.device == "cpu"}
    size = options["per_device_train_batch_size"] = min(many, options["per_device_train_batch_size"])
    options["gradient_accumulation_steps"] = many // size
    job = {"name": label, "options": options, "steps": total, "pairs": many, "model": str(place.model)}
    found = run_trl(args.trl_python, job, place.pairs)
    if "failed" in found:
        return found
    counts = tokens[many * args.warmup : many * total]
    spent = found["seconds"][args.warmup :][: len(counts) // many]
    rate, step = sum(counts) / sum(spent), statistics.median(spent)
    shown = {"how": "none", "tok_per_s": rate, "step_s": step, "tokens": sum(counts) / len(spent)}
    return shown | {"gb": found["peak_gb"]}


def profile(place: Place, args: argparse.Namespace) -> dict[str, Any]:
    made = command("dpo", place, args)
    made[1:2] = ["bench/gpu.py", "profiled"]
    done = subprocess.run(made, cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(place.out, ignore_errors=True)
    return json.loads(done.stdout.strip().splitlines()[-1]) if not done.returncode else {"failed": done.stderr[-500:]}


def cells(model: str, label: str, row: Row) -> str:
    """A row of the table."""
    if "failed" in row:
        return f"| {model} | {label} | {row['failed']} |" + " - |" * 8
    shown = [model, label, row["how"], f"{row['tok_per_s']:,.0f}", f"{row['step_s']:.3f}", f"{row['tokens']:,.0f}"]
    shown += [f"{part:.1%}" for part in row["mfu"]] if "mfu" in row else ["-"] * 3
    shown += [f"{row['gb']:.1f}", f"{row['start_s']:.0f}" if "start_s" in row else "-"]
    return "| " + " | ".join(shown) + " |"


def shown_profile(model: str, found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return ["", f"{model} was not profiled: {found['failed']}"]
    whole = sum(found["kinds"].values())
    lines = ["", f"| where a step of dpo, {model}, goes | ms | share |", "|---|---|---|"]
    lines += [f"| {kind} | {spent / 1e3:.1f} | {spent / whole:.0%} |" for kind, spent in found["kinds"].items()]
    return lines + [f"| _{name}_ | {spent / 1e3:.1f} | |" for name, spent in found["most"][:12]]


def describe(args: argparse.Namespace) -> tuple[float, str]:
    """The FLOP a second that MFU is of, and the device in words."""
    measured = measured_rate(args.device)
    peak, words = measured, f"a CPU, {measured / 1e12:.2f} TFLOP/s measured in fp32 at 1024^3"
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        peak = next((1e12 * rate for name, rate in memory.CARDS.values() if name in card.name), measured)
        words = f"{card.name}, {card.total_memory / 1e9:.0f} GB, {peak / 1e12:.0f} TFLOP/s by its data sheet, "
        words += f"{measured / 1e12:.0f} measured at 8192^3"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    words += f"; torch {torch.__version__}, transformers {transformers.__version__}, commit "
    words += f"{commit.stdout.strip() or 'none'}; HH, max length 512, {args.flags or 'bf16'}"
    return peak, words + f"; medians of {args.steps} steps after {args.warmup}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = made.add_argument
    add("--models", nargs="+", choices=SHAPES, default=["smollm2", "1b", "8b"])
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--steps", type=int, default=8)
    add("--warmup", type=int, default=3)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command, with tiny")
    add("--data", default="examples/hh_train.jsonl")
    add("--minutes", type=float, default=10.0, help="after these no row is begun")
    add("--trl", nargs="*", choices=SHAPES, default=None, help="models that TRL trains too; None: 1b")
    add("--trl-python", default=sys.executable, help="an interpreter that has trl")
    add("--profile", nargs="*", choices=SHAPES, default=None, help="whose dpo is profiled, on a GPU; None: 1b")
    add("--flags", default="", help="more flags of the scripts")
    add("--out", type=Path, default=None, help="a folder for table and records")
    args = made.parse_args(argv)
    usual = [model for model in ("1b",) if model in args.models]
    args.profile = usual if args.profile is None else args.profile
    args.trl = usual if args.trl is None else args.trl
    args.without_trl = ""
    if args.trl and subprocess.run([args.trl_python, "-c", "import trl"], capture_output=True).returncode:
        args.trl, args.without_trl = [], f"{args.trl_python} has no trl, so there are no rows of it."
    return args


def main(argv: Sequence[str] | None = None) -> None:
    began, args = time.perf_counter(), parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: bench/gpu.py: no CUDA device here; bench/step.py measures a CPU")
    peak, about = describe(args)
    head = "model, run, recomputed, tokens/s, s/step, tokens a step, MFU 6N, with ref, counted, peak GB, start s"
    lines = [about, "", "| " + head.replace(", ", " | ") + " |", "|---" * 11 + "|"]
    record: dict[str, Any] = {"about": about, "rows": {}}

    def add(model: str, label: str, row: Row) -> None:
        print(cells(model, label, row), file=sys.stderr, flush=True)
        lines.append(cells(model, label, row))
        record["rows"][f"{model}, {label}"] = row

    profiles: list[str] = []
    dropped: list[str] = []
    for model in args.models:
        profiled = ["profile"] * (model in args.profile)
        with tempfile.TemporaryDirectory() as folder:
            made = None
            for label in (*args.rows, *(TRL if model in args.trl else ()), *profiled):
                if time.perf_counter() - began >= 60 * args.minutes:
                    dropped.append(f"{model}, {label}")
                    continue
                place, lengths, short, trained = made = made or prepare(model, Path(folder), args)
                if label in TRL:
                    add(model, label, measure_trl(label, place, short if "SFT" in label else lengths, args))
                elif label in ROWS:
                    add(model, label, measure(label, place, trained, peak, args))
                else:
                    found = record[f"profile {model}"] = profile(place, args)
                    profiles += shown_profile(model, found)
    lines += ["", f"Not begun within {args.minutes:g} minutes: {'; '.join(dropped)}."] * bool(dropped)
    lines += ["", args.without_trl] * bool(args.without_trl)
    lines += [*profiles, "", "Tokens are those of the packed form (a prompt once), for TRL too. " + ANCHORS]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    report(lines, record, args.out and args.out / "gpu.md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["profiled"]:
        profiled(sys.argv[2:])
    else:
        main()
