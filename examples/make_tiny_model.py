"""Train the tokenizer and write the configuration of the tiny model in examples/tiny/.

    python examples/make_tiny_model.py

The demo and the tests need a model that starts in a second on a CPU. It has the shape of a modern Llama:
grouped key/value heads, tied embeddings, ChatML turns. No weights are written: whoever uses it draws them
from the configuration, and says with which seed.

The tokenizer is byte-level BPE without any normalisation, so every text survives encode and decode. It is
trained on hh_train.jsonl only. Same file and same version of the tokenizers library: same bytes out.
"""
import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
VOCABULARY = 8192  # small enough that embeddings are half of the parameters, large enough for words
CONTEXT = 2048  # tokens; the longest dialogue of the examples fits

# The position in this list is the id.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
EOS = "<|im_end|>"  # ends a turn, hence also an answer
PAD = "<|pad|>"  # its own id: a pad equal to eos invites masking by id, which hides the end of the answer

# ChatML. No default system turn: it would put tokens into every prompt that no file contains.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index(EOS),
    "pad_token_id": SPECIAL.index(PAD),
    "dtype": "float32",
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": EOS,
    "pad_token": PAD,
    "unk_token": None,
    "clean_up_tokenization_spaces": False,  # else decode deletes the space before a full stop
    "model_max_length": CONTEXT,
}


def fail(message):
    """One line on stderr, exit code 2. Called before anything is written."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_texts(path):
    """Every turn and answer of the training file, headed by its role as in the template: the two role words
    are in every sequence and should cost one token each.
    """
    texts = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                texts += [f"{turn['role']}\n{turn['content']}" for turn in row["prompt"]]
                texts += [f"assistant\n{row[side]}" for side in ("chosen", "rejected")]
    except OSError as problem:
        fail(f"{path}: {problem.strerror}; make it with examples/make_hh.py")
    return texts


def train_tokenizer(texts):
    """Byte-level BPE with GPT-2's word boundaries: strings -> Tokenizer of exactly VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so nothing is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        fail(f"the text gives only {tokenizer.get_vocab_size()} entries, not {VOCABULARY}; use more text")
    return tokenizer


def count_parameters():
    """Parameters of the model that CONFIG describes, the tied ones once. Arithmetic, to do without torch."""
    hidden = CONFIG["hidden_size"]
    heads = CONFIG["num_attention_heads"] + CONFIG["num_key_value_heads"]
    attention = 2 * hidden * heads * CONFIG["head_dim"]  # query and output, key and value
    mlp = 3 * hidden * CONFIG["intermediate_size"]  # gate, up, down
    layer = attention + mlp + 2 * hidden  # two norms
    return CONFIG["vocab_size"] * hidden + CONFIG["num_hidden_layers"] * layer + hidden  # one last norm


def write_files(folder, contents):
    """{name: text} -> files in `folder`. Every byte is on the disk before the first file gets its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the target, so that the renames stay within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as beside:
            for name, content in contents.items():
                Path(beside, name).write_bytes(content.encode("utf-8"))
            for name in contents:
                os.replace(Path(beside, name), folder / name)
    except OSError as problem:
        fail(f"{folder}: {problem.strerror}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="folder of the four files")
    args = parser.parse_args()

    tokenizer = train_tokenizer(read_texts(HERE / "hh_train.jsonl"))
    contents = {
        "config.json": json.dumps(CONFIG, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    write_files(args.out, contents)
    size = sum(len(content.encode("utf-8")) for content in contents.values())
    print(f"{args.out}: {VOCABULARY:,} tokens, {count_parameters():,} parameters when drawn, {size:,} bytes")


if __name__ == "__main__":
    main()
