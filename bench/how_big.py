"""How big can one go: GB a GPU and the fewest GPUs by size of model, as memory.py counts them. Computed.

    python bench/how_big.py
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora  # noqa: E402
import memory  # noqa: E402

# The shapes of Llama 3 and of what is built like it.
SHAPE = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
SIZES = {
    "1B": (2048, 8192, 16, 32, 8, 128256), "3B": (3072, 8192, 28, 24, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256), "14B": (5120, 17408, 40, 40, 8, 151936),
    "32B": (5120, 25600, 64, 64, 8, 151936), "70B": (8192, 28672, 80, 64, 8, 128256),
}  # fmt: skip
TIED = ("1B", "3B")  # embedding and head are one matrix
RANKS = (1, 8, 16, 64)


def table(tokens: int = 4096) -> str:
    """Markdown, computed: GB a GPU of each of SIZES by ranks, method and loss, and which cards hold it."""
    cards = " / ".join(map(str, memory.CARDS))
    heads = ["model", "trained", "loss", *[f"GB a GPU of {n}" for n in RANKS], f"fewest of {cards} GB"]
    rows = [heads, ["---"] * len(heads)]
    for name, sizes in SIZES.items():
        shape = dict(zip([*SHAPE, "vocab_size"], sizes))
        shape |= {"tie_word_embeddings": name in TIED, "head_dim": 64 if name == "1B" else 128}
        settings = LlamaConfig(**shape)
        settings._attn_implementation = None
        flags = argparse.Namespace(model="", **memory.ADAPTERS)
        for adapters in (False, True):
            adapt = functools.partial(lora.insert, args=flags) if adapters else None
            whole = memory.body(settings, torch.bfloat16, adapt)
            for loss, drift in (("dpo", False), ("ra_dpo1", True)):
                run = memory.Run(tokens, 1, 2, reference="adapters" if adapters else "live", drift=drift, cuda=True)
                sums = [sum(memory.need(whole, run._replace(ranks=n)).values()) / 1e9 for n in RANKS]
                least = [str(memory.fewest(whole, run, size) or "-") for size in memory.CARDS]
                cells = [f"{size:.0f}" for size in sums] + [" / ".join(least)]
                rows.append([name, "LoRA" if adapters else "all", loss, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    print("Computed, not measured: micro-batches of 4,096 tokens, bf16, full checkpointing, adapters of rank "
          f"16, {memory.SPARE:.0%} of a GPU left free.\n\n{table()}")  # fmt: skip


if __name__ == "__main__":
    main()
