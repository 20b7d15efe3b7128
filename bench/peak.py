"""What memory.py says a run needs, against the peak that is measured.

    python bench/peak.py --model models/smollm2 [--made gpt2 qwen2] [--cases "all, live"] [--length 64]

Drives the real align.py, a process a run, on pairs of the same length: a model directory, and a GPT-2, a
GPT-NeoX and a Qwen2 of 50 to 200 million random parameters, each with all weights trained and with adapters,
against a live reference (the base with the adapters off), a cached one, of numbers and once of states, and
with a loss that has none. Measured is the peak resident set less what was resident once align.py was
imported; predicted is the line that the run begins with. GLIBC_TUNABLES is what run.sh sets it to, or what it
is. Prints a Markdown table. Other processes do not disturb it.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsdp  # noqa: E402

PAIRS = 8  # of a step: two micro-batches of four
CASES = {
    "all, live": ["--loss", "dpo"],
    "all, cached": ["--loss", "dpo", "--cache-reference", "CACHE"],
    "all, cached states": ["--loss", "ra_dpo1", "--cache-reference", "CACHE"],
    "all, none": ["--loss", "simpo"],
    "LoRA, adapters off": ["--loss", "dpo", "--lora-rank", "16"],
    "LoRA, cached": ["--loss", "dpo", "--lora-rank", "16", "--cache-reference", "CACHE"],
    "LoRA, none": ["--loss", "simpo", "--lora-rank", "16"],
}
SHARED = {"vocab_size": 50304, "bos_token_id": 0, "eos_token_id": 0}
MADE = {
    "gpt2": {"n_embd": 768, "n_layer": 6, "n_head": 12},
    "gpt_neox": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "qwen2": {
        "hidden_size": 640, "num_hidden_layers": 8, "num_attention_heads": 10, "num_key_value_heads": 2,
        "intermediate_size": 2560, "tie_word_embeddings": True,
    },
}  # fmt: skip


def resident(key: str) -> float:
    """GB of this process: VmRSS now, VmHWM at its peak. getrusage would count what ran before exec too."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 2**20 * 1.073741824


def measured(argv: list[str]) -> None:
    """align.py in this process; its peak above what its imports take, as JSON."""
    import align

    before = resident("VmRSS")
    align.main(argv)
    print(json.dumps({"peak": resident("VmHWM") - before, "before": before}))


def make_model(kind: str, sizes: dict, folder: Path) -> None:
    """A model directory of random bf16 weights, with the tokenizer of the tiny model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHARED | sizes), dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny").save_pretrained(folder)


def write_pairs(path: Path, pairs: int, length: int) -> None:
    """Pairs that the tokenizer makes longer than the flags allow, so that all are cut to one length."""
    words = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(pairs):
            texts = [" ".join(words.choices(("what", "a", "the", "he", "you"), k=length + 8)) for _ in range(3)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))) + "\n")


def run(
    model: str, flags: list[str], length: int = 64, steps: int = 2, fill: bool = True
) -> dict[str, float]:  # fmt: skip
    """GB that a run of align.py said it would need, and that it took; its cache is filled by one before it,
    or by itself."""
    environment = {"GLIBC_TUNABLES": fsdp.NO_THREAD_CACHE} | os.environ
    with tempfile.TemporaryDirectory() as name:
        flags = [f"{name}/kept" if word == "CACHE" else word for word in flags]
        write_pairs(Path(name, "pairs.jsonl"), 2 * PAIRS, length)
        command = [sys.executable, __file__, "measured", "--model", model, "--data", f"{name}/pairs.jsonl", *flags]
        command += ["--out", f"{name}/run", "--steps", str(steps), "--max-length", str(2 * length)]
        command += ["--max-prompt-length", str(length), "--batch-size", str(PAIRS), "--eval-every", "0"]
        command += ["--tokens-per-microbatch", str(PAIRS // 2 * 3 * length)]
        command += ["--device", "cpu", "--chat-template", "plain", "--token-cache", f"{name}/cache"]
        for more in [["--cache-reference-only", "true"]] * (fill and "--cache-reference" in flags) + [[]]:
            done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
        said = re.search(r"needs about ([\d.]+) GB a rank.*", done.stdout)
        found = json.loads(done.stdout.splitlines()[-1])
        return found | {"predicted": float(said[1]), "said": said[0]}


def main() -> None:
    if sys.argv[1:2] == ["measured"]:
        measured(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a directory, beside the made ones")
    parser.add_argument("--made", nargs="*", choices=MADE, default=list(MADE))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt, and of each of two answers")
    args = parser.parse_args()
    print("| model | trained, reference | predicted, GB | measured, GB | predicted / measured |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        models = {Path(args.model).name: args.model} | {kind: f"{name}/{kind}" for kind in args.made}
        for label, model in models.items():
            if label in args.made:
                make_model(label, MADE[label], Path(model))
            for case in args.cases:
                found = run(model, CASES[case], args.length, args.steps)
                ratio = found["predicted"] / found["peak"]
                print(f"| {label} | {case} | {found['predicted']:.2f} | {found['peak']:.2f} | {ratio:.2f} |", flush=True)
                print(found, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
