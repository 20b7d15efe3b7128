"""How the peak memory of a Ra-DPO step grows with the vocabulary, and with the length at constant tokens.

    python bench/scaling.py [--out FILE] [--figure FILE.png]

Drives the real align.py on a randomly started Llama (4 layers, width WIDTH) and synthetic pairs, one process
a point, ra_dpo1 with the exact cvar, two steps. Vocabulary 8k to 256k: beside the peak resident set stand the
V x D tensors of the run, by name in TENSORS; what is left must not grow by more than two chunks of logits.
Length 512 to 8192 at the same number of tokens a step, all in one micro-batch. Prints two Markdown tables and
one JSON line.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step import describe_machine, report  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig  # noqa: E402

import vocab  # noqa: E402

WIDTH = 256
VOCABULARIES = (8192, 32768, 65536, 131072, 262144)
LENGTHS = (512, 8192)
PAIRS = 3  # a step, in the vocabulary's table; a pair of length L is a prompt and two answers of L / 2 each
TOKENS = 12288  # a step, in the length's table
# What has V x D numbers at the moment of the peak, the head's backward, and the bytes of each number. The
# embedding and the head are one matrix.
TENSORS = {
    "policy: fp32 master": 4, "AdamW's two moments": 8, "gathered bf16 copy": 2, "fp32 copy for the matmul": 4,
    "fp32 accumulator of its gradient": 4, "reference: bf16": 2, "its gathered copy": 2, "its fp32 copy": 4,
}  # fmt: skip


def peak_gb(vocabulary: int, length: int, pairs: int) -> float:
    """Peak resident set of two steps."""
    tiny = ROOT / "examples" / "tiny"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=8192, **sizes).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        words = random.Random(0)
        rows = []
        tokens = pairs * length * 3 // 2
        for _ in range(2 * pairs):
            texts = [
                " ".join(words.choices(("what", "a", "the", "he", "you"), k=length // 2 + 8))
                for _ in range(3)
            ]
            rows.append(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))) + "\n")
        (folder / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
        command = [
            sys.executable,
            "align.py",
            "--model",
            name,
            "--weights",
            "random",
            "--data",
            f"{name}/pairs.jsonl",
        ]
        command += [
            "--loss",
            "ra_dpo1",
            "--risk",
            "cvar",
            "--max-length",
            str(length),
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
        command += [
            "--batch-size",
            str(pairs),
            "--tokens-per-microbatch",
            str(2 * tokens),
            "--out",
            f"{name}/run",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert 0.9 * tokens < json.loads(lines[-1])["tokens"] <= tokens, lines[-1]
        return max(json.loads(line)["mem_gb"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=None, help="also write the output here")
    parser.add_argument("--figure", type=Path, default=None, help="a PNG of the memory over the vocabulary")
    args = parser.parse_args()
    number = sum(TENSORS.values())
    chunk = vocab.CHUNK_BYTES / 1e9
    lines = [
        f"ra_dpo1 with cvar, Llama of 4 layers of width {WIDTH}, {PAIRS} pairs of length 512 a step, {describe_machine()}",
        "",
        "| vocabulary V | peak RSS, GB | V x D tensors, GB | rest, GB | full logits of policy and reference, GB |",
        "|---|---|---|---|---|",
    ]
    rest = {}
    peaks = {}
    for size in VOCABULARIES:
        peaks[size] = peak_gb(size, 512, PAIRS)
        tensors = size * WIDTH * number / 1e9
        rest[size] = peaks[size] - tensors
        whole = PAIRS * 512 * size * 4 * 2 / 1e9
        lines.append(f"| {size} | {peaks[size]:.2f} | {tensors:.2f} | {rest[size]:.3f} | {whole:.2f} |")
    names = ", ".join(f"{name} {size}" for name, size in TENSORS.items())
    growth = max(rest.values()) - rest[VOCABULARIES[0]]
    lines += [
        "",
        f"V x D tensors, {number} bytes a number: {names}. The rest grows by {growth:.3f} GB at most; a chunk of ",
    ]
    lines[-1] += f"logits is {chunk:.3f} GB."
    lines += ["", f"| length | pairs a step | peak RSS, GB | to length {LENGTHS[0]} |", "|---|---|---|---|"]
    by_length = {length: peak_gb(8192, length, TOKENS * 2 // (3 * length)) for length in LENGTHS}
    for length, peak in by_length.items():
        pairs = TOKENS * 2 // (3 * length)
        lines.append(f"| {length} | {pairs} | {peak:.2f} | {peak / by_length[LENGTHS[0]]:.2f} |")
    report(lines, {"vocabulary": peaks, "rest": rest, "length": by_length}, args.out)
    if args.figure:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.5))
        axes.plot(VOCABULARIES, list(peaks.values()), "o-", label="peak resident set")
        axes.plot(VOCABULARIES, list(rest.values()), "s-", label="without the V x D tensors")
        axes.plot(
            VOCABULARIES, [PAIRS * 512 * v * 8 / 1e9 for v in VOCABULARIES], "--", label="full logits, twice"
        )
        axes.set(xlabel="vocabulary", ylabel="GB", xscale="log")
        axes.legend()
        figure.tight_layout()
        figure.savefig(args.figure, dpi=120)


if __name__ == "__main__":
    main()
