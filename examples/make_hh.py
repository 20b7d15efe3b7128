"""Turn a published HH-RLHF file into the two small preference files of this folder.

    python examples/make_hh.py hh_harmless_base_test.jsonl.gz

A published row holds two whole dialogues, which should be the same up to the last answer:

    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "\\n\\nHuman: ...\\n\\nAssistant: ..."}

Ours stores what they share once:

    {"prompt": [{"role": "user", "content": ...}, ...], "chosen": ..., "rejected": ...}

A row that breaks this promise is dropped and counted under the first reason that applies. Rows whose
dialogues open with the same user turn stay on the same side of the train/test split. Keeping only equal
prompts together would not do: the file has dialogues at several lengths, and the answer of one row stands in
the prompt of another.

Left out: no answer is judged or repaired. Some begin with a stray "Human:"; they are kept as published.
"""
import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
MAX_BYTES = 3_000_000  # both files together: they live in git

DIFFERENT = "the two dialogues differ before the last answer"
DISORDER = "roles do not alternate from a first Human turn to a last Assistant turn"
EMPTY_TURN = "a turn of the prompt is empty"
EMPTY_CHOSEN = "the chosen answer is empty"
EMPTY_REJECTED = "the rejected answer is empty"
EQUAL = "the chosen and the rejected answer are the same"
REASONS = [DIFFERENT, DISORDER, EMPTY_TURN, EMPTY_CHOSEN, EMPTY_REJECTED, EQUAL]


def fail(message):
    """One line on stderr, exit code 2. Called before anything is written."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_rows(source):
    """The rows of a published .jsonl or .jsonl.gz file, checked: a list of (chosen, rejected) dialogues."""
    rows = []
    number = 0
    opener = gzip.open if source.suffix == ".gz" else open
    try:
        # Bytes, because text mode may end a line elsewhere than at \n.
        with opener(source, "rb") as file:
            for number, line in enumerate(file, 1):
                rows.append(parse_row(line, f"{source}:{number}"))
    except (EOFError, zlib.error):
        fail(f"{source}:{number + 1}: the gzip stream is cut or damaged; fetch the file again")
    except OSError as problem:
        fail(f"{source}: {problem.strerror or problem}")
    if not rows:
        fail(f"{source}: no rows")
    return rows


def parse_row(line, where):
    """One line of the source -> (chosen, rejected)."""
    try:
        row = json.loads(line)
        # JSON can spell half of a surrogate pair, which no UTF-8 file can hold.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        fail(f"{where}: not UTF-8 text")
    except ValueError as problem:
        fail(f"{where}: not JSON ({problem})")
    if not isinstance(row, dict):
        fail(f"{where}: expected an object with 'chosen' and 'rejected'")
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str):
            fail(f"{where}: '{name}' must be a string")
    return row["chosen"], row["rejected"]


def split_turns(dialogue):
    """The dialogue as [(speaker, stripped text), ...]; text before the first speaker is a turn of ''."""
    pieces = SPEAKER.split(dialogue)
    turns = [(speaker, text.strip()) for speaker, text in zip(pieces[1::2], pieces[2::2])]
    preamble = pieces[0].strip()
    return [("", preamble)] + turns if preamble else turns


def convert(chosen, rejected):
    """Two dialogues -> (our row, None), or (None, the reason why not)."""
    turns = split_turns(chosen)
    others = split_turns(rejected)
    if turns[:-1] != others[:-1]:
        return None, DIFFERENT
    for dialogue in (turns, others):
        expected = ["Human", "Assistant"] * (len(dialogue) // 2)
        if not dialogue or [speaker for speaker, _ in dialogue] != expected:
            return None, DISORDER
    prompt = [{"role": ROLES[speaker], "content": text} for speaker, text in turns[:-1]]
    row = {"prompt": prompt, "chosen": turns[-1][1], "rejected": others[-1][1]}
    if not all(turn["content"] for turn in prompt):
        return None, EMPTY_TURN
    if not row["chosen"]:
        return None, EMPTY_CHOSEN
    if not row["rejected"]:
        return None, EMPTY_REJECTED
    if row["chosen"] == row["rejected"]:
        return None, EQUAL
    return row, None


def split(rows, test_rows, seed):
    """Rows -> (train, test). Rows with the same opening turn form a group. Both files are in the order of a
    seeded hash of that turn, so that the first rows of either are already a random sample. A group that would
    overshoot `test_rows` goes to train.
    """
    groups = {}
    for row in rows:
        key = json.dumps([seed, row["prompt"][0]["content"]])
        groups.setdefault(hashlib.sha256(key.encode()).hexdigest(), []).append(row)
    train = []
    test = []
    for _, group in sorted(groups.items()):
        side = test if len(test) + len(group) <= test_rows else train
        side.extend(group)
    return train, test


def write_files(folder, contents):
    """{name: bytes} -> files in `folder`. Every byte is on the disk before the first file gets its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the target, so that the renames stay within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as beside:
            for name, content in contents.items():
                Path(beside, name).write_bytes(content)
            for name in contents:
                os.replace(Path(beside, name), folder / name)
    except OSError as problem:
        fail(f"{folder}: {problem.strerror}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("source", type=Path, help="published HH-RLHF file, .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the two files")
    parser.add_argument("--test-rows", type=int, default=360, help="rows held out; the rest is for training")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the order of the rows")
    args = parser.parse_args()

    dialogues = read_rows(args.source)
    rows = []
    dropped = Counter()
    for chosen, rejected in dialogues:
        row, reason = convert(chosen, rejected)
        if reason:
            dropped[reason] += 1
        else:
            rows.append(row)
    if not 0 < args.test_rows < len(rows):
        fail(f"--test-rows {args.test_rows}: must be at least 1 and less than the {len(rows)} clean rows")
    train, test = split(rows, args.test_rows, args.seed)

    sides = {"hh_train.jsonl": train, "hh_test.jsonl": test}
    contents = {}
    for name, side in sides.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side)
        contents[name] = text.encode("utf-8")
    size = sum(len(content) for content in contents.values())
    if size > MAX_BYTES:
        fail(f"{args.source}: would give {size:,} bytes, the limit for both files is {MAX_BYTES:,}")
    write_files(args.out, contents)

    print(f"{args.source}: {len(dialogues)} rows read, {len(rows)} kept, {dropped.total()} dropped")
    for reason in REASONS:
        print(f"{dropped[reason]:6d} dropped: {reason}")
    for name, side in sides.items():
        print(f"{len(side):6d} rows, {len(contents[name]):,} bytes: {args.out / name}")


if __name__ == "__main__":
    main()
