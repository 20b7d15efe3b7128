"""One optimiser step of DPO and of SFT: ours against TRL's trainers, same pairs, same model, same machine.

    python bench/vs_trl.py --model models/smollm2 [--steps 8] [--venv DIR] [--out FILE]

TRL runs in an environment of its own (that of bench/parity.py, pinned), in every setting of SETTINGS; ours
through the real scripts. Both train on the same pairs in the same order, all short enough that neither
truncates: bf16 compute, AdamW, a live reference. Medians over the steps after the warm-up, peak resident set
of the whole process by getrusage. Prints a Markdown table and one JSON line.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH = 512
# TRL's arguments of each setting tried. Autocast keeps fp32 masters as ours does, bf16 weights have none.
# KEPT tells the C library to give nothing back that was freed; align.py gives back blocks of over 32 MB.
AUTOCAST = {"bf16": True, "gradient_checkpointing": False}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
CHECKPOINTED = {"gradient_checkpointing": True}
NO_MASTERS = {"bf16": False, "weights": "bfloat16"}
ADAPTERS = {"weights": "bfloat16", "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}
KEPT = {
    "environment": {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"}
}
SETTINGS = {
    "TRL DPO, 8 pairs at once": AUTOCAST,
    "TRL DPO, 8 at once, checkpointing": AUTOCAST | CHECKPOINTED,
    "TRL DPO, 8 at once, freed memory kept": AUTOCAST | KEPT,
    "TRL DPO, 2 at a time": AUTOCAST | TWO,
    "TRL DPO, 2 at a time, freed memory kept": AUTOCAST | TWO | KEPT,
    "TRL DPO, 1 at a time, freed memory kept": AUTOCAST | ONE | KEPT,
    "TRL DPO, 2 at a time, freed memory kept, bf16 weights": AUTOCAST | TWO | KEPT | NO_MASTERS,
    "TRL DPO, LoRA, 1 at a time, freed memory kept": AUTOCAST | ONE | KEPT | ADAPTERS,
    "TRL SFT, 8 at once": AUTOCAST,
    "TRL SFT, 2 at a time, freed memory kept": AUTOCAST | TWO | KEPT,
    "TRL SFT, 2 at a time, freed memory kept, bf16 weights": AUTOCAST | TWO | KEPT | NO_MASTERS,
}
# What a run without --only measures: the fastest of each that has fp32 masters.
FASTEST = (
    "TRL DPO, 1 at a time, freed memory kept",
    "TRL DPO, LoRA, 1 at a time, freed memory kept",
    "TRL SFT, 2 at a time, freed memory kept",
)
OURS = {
    "ours, dpo": ["align.py", "--loss", "dpo"],
    "ours, dpo, LoRA": ["align.py", "--loss", "dpo", "--lora-rank", "16"],
    "ours, sft": ["sft.py"],
}


def child(job: dict) -> None:
    """In TRL's environment: train, and print the seconds of each step and the peak memory as JSON."""
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    options = dict(job["options"])
    options.pop("environment", None)
    weights = options.pop("weights", "float32")
    adapters = options.pop("lora", None)
    rows = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    seconds = []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):  # noqa: ANN002, ANN003
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):  # noqa: ANN002, ANN003
            wait()
            seconds.append(time.perf_counter() - self.began)

    if "DPO" in job["name"]:
        answer = {"chosen": "chosen", "rejected": "rejected"}
        config, trainer = trl.DPOConfig, trl.DPOTrainer
        options |= {"beta": 0.1}
    else:
        answer = {"completion": "chosen"}
        config, trainer = trl.SFTConfig, trl.SFTTrainer
        options |= {"completion_only_loss": True}
    table = [
        {
            "prompt": row["prompt"],
            **{to: [{"role": "assistant", "content": row[of]}] for to, of in answer.items()},
        }
        for row in rows
    ]
    cuda = not options.get("use_cpu", True)
    settings = {
        "output_dir": job["folder"], "per_device_train_batch_size": job["pairs"], "max_steps": job["steps"],
        "max_length": MAX_LENGTH, "learning_rate": 5e-6, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "train_sampling_strategy": "sequential", "disable_tqdm": True, "optim": "adamw_torch",
    }  # fmt: skip
    lm = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, weights))
    run = trainer(
        model=lm,
        args=config(**(settings | options)),
        train_dataset=Dataset.from_list(table),
        processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Clock()],
        peft_config=adapters and peft.LoraConfig(**adapters, task_type="CAUSAL_LM"),
    )
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak
    print(json.dumps({"seconds": seconds, "peak_gb": peak, "loss": losses[0], "trl": trl.__version__}))


def choose_pairs(model: str, source: str, number: int, folder: Path) -> tuple[Path, list[int], list[int]]:
    """A file of pairs that fit, in the order in which seed 0 trains them, and the tokens of each: prompt and
    both answers as packed; prompt and chosen."""
    sys.path.insert(0, str(ROOT))
    import batch
    import chat
    import data
    import encode
    import loading

    tokenizer = loading.load_tokenizer(model)
    template = chat.chat_template(tokenizer, None)
    kept, pair_tokens, sft_tokens = [], [], []
    for example in data.load(source, "train")[0]:
        found = encode.encode(example, tokenizer, 4096, 2048, template)
        longest = len(found.prompt) + max(map(len, found.completions))
        if len(found.prompt) < MAX_LENGTH // 2 and longest < MAX_LENGTH - 8:
            kept.append(dict(zip(("prompt", "chosen", "rejected"), (example.prompt, *example.completions))))
            pair_tokens.append(found.tokens)
            sft_tokens.append(len(found.prompt) + len(found.completions[0]))
        if len(kept) == number:
            break
    order = batch.epoch_order(len(kept), 0, 0)  # fewer, where so many do not fit
    for name, rows in (("ours", kept), ("trl", [kept[index] for index in order])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder, [pair_tokens[index] for index in order], [sft_tokens[index] for index in order]


def run_ours(command: list[str], args: argparse.Namespace, folder: Path) -> dict:
    out = folder / "-".join(command).replace("/", "-")
    flags = [
        "--model",
        args.model,
        "--data",
        str(folder / "ours.jsonl"),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    flags += ["--batch-size", str(args.pairs), "--max-length", str(MAX_LENGTH), "--eval-every", "0"]
    flags += [
        "--tokens-per-microbatch",
        str(args.tokens_per_microbatch),
        "--lr",
        "5e-6",
        "--warmup-steps",
        "0",
        "--dtype",
        args.dtype,
    ]
    done = subprocess.run([sys.executable, *command, *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = max(row["mem_gb"] for row in rows)
    return {"seconds": [row["step_s"] for row in rows], "peak_gb": peak, "loss": rows[0]["loss"]}


def run_trl(python: Path | str, job: dict, folder: Path) -> dict:
    """A job of `child` in an interpreter that has TRL, on the pairs that choose_pairs wrote into a folder."""
    job |= {"data": str(folder / "trl.jsonl"), "folder": str(folder / "trl")}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [str(python), __file__, "--model", job["model"], "--child", str(folder / "job.json")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **job["options"].get("environment", {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:  # does not fit, or is refused by TRL: said in the table
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        found = {"failed": f"exit code {done.returncode}: {last[:100]}"}
    else:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    print(job["name"], found, file=sys.stderr, flush=True)  # a long wait: what is known so far
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/hh_train.jsonl")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    sys.path.insert(0, str(ROOT))
    import precision

    kinds = {"choices": ("bfloat16", "float32"), "default": precision.usual("cpu")}
    parser.add_argument("--dtype", **kinds, help="of both; None: what this CPU multiplies")
    parser.add_argument("--out", type=Path, default=None, help="also write the output here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_flags(parser)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-trl")
    parser.add_argument("--only", default=None, help="settings whose name holds this; None: the FASTEST")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(Path(args.child).read_text(encoding="utf-8")))
        return
    from parity import install
    from step import describe_machine, report

    python = install(args.venv)
    total = args.warmup + args.steps
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, pair_tokens, sft_tokens = choose_pairs(args.model, args.data, args.pairs * total, folder)
        for label, command in OURS.items():
            if args.only and "sft" in label and "SFT" not in args.only:
                continue
            found[label] = run_ours(command, args, folder)
            print(label, found[label], file=sys.stderr, flush=True)
        for label, options in SETTINGS.items():
            if label not in FASTEST if args.only is None else args.only not in label:
                continue
            options = options | ({"bf16": False, "weights": "float32"} if args.dtype == "float32" else {})
            job = {"name": label, "options": options, "steps": total, "pairs": args.pairs}
            found[label] = run_trl(python, job | {"model": str(Path(args.model).resolve())}, folder)
    lines = [
        f"{args.pairs} pairs a step, max length {MAX_LENGTH}, {args.dtype}, live reference, {describe_machine()}, TRL 1.16.0; "
        f"medians of {args.steps} steps after {args.warmup} of warm-up.",
        "",
        "| run | s/step | pairs/s | tokens/s | speed, ours to it | peak RSS, GB | memory, ours to it | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, result in found.items():
        if "failed" in result:
            lines.append(f"| {label} | {result['failed']} | - | - | - | - | - | - |")
            continue
        seconds = statistics.median(result["seconds"][args.warmup :])
        ours = found["ours, sft" if "sft" in label.lower() else "ours, dpo" + ", LoRA" * ("LoRA" in label)]
        speed = seconds / statistics.median(ours["seconds"][args.warmup :])
        memory = ours["peak_gb"] / result["peak_gb"]
        tokens = sum((sft_tokens if "sft" in label.lower() else pair_tokens)[args.pairs * args.warmup :])
        rate = tokens / sum(result["seconds"][args.warmup :])
        lines.append(
            f"| {label} | {seconds:.2f} | {args.pairs / seconds:.2f} | {rate:.0f} | {speed:.2f} | "
            f"{result['peak_gb']:.2f} | {memory:.2f} | {result['loss']:.4f} |"
        )
    lines += [
        "",
        "Tokens are those of the packed form (a prompt once), the same for both; padding counts nowhere.",
    ]
    report(lines, found, args.out)


if __name__ == "__main__":
    main()
