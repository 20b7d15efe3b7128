"""Rows of every wrong kind through the readers: each becomes an Example, a counted reason or one error.

    python bench/fuzz.py [--rows 100000] [--seed 0] [--model examples/tiny]

Half of the rows are objects with the keys of the layouts and values of any type, depth and size, given to
formats.parse and, where they are read, to every encoder; half are rows whose bytes were changed, in files of
all kinds, given to data.stream. Prints how many went which way, the slowest, and the peak of memory; exits
with 1 at the first exception that is not a ValueError, or a ValueError of more than one line.
"""

import argparse
import gzip
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import chat  # noqa: E402
import data  # noqa: E402
import encode  # noqa: E402
import formats  # noqa: E402
import loading  # noqa: E402
import ranking  # noqa: E402

LAYOUTS = [layout for rank in formats.RANKS for layout in rank]
KEYS = sorted(
    {key for layout in LAYOUTS for key in formats._parameters(layout)[1]} | formats.CONVERSATION_KEYS
)
TEXTS = [
    "", " ", "\n", "a", "Name a prime.", "7", "é🙂\u200d", "\ud800", "\x00", "<|im_end|>", "<|im_start|>user\n",
    "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", '[{"role": "user", "content": "a"}]', '[{"', "[{}]",
    "<think>\na\n</think>\n\nb", "</think>", "{{ 7 * 7 }}", "{% raise %}", "true", "False", "1", "nan", "1e999", "-0",
    "a" * 3000, "word " * 2000, "\u2028", "\r\n", "‮", "[INST]", "../../etc/passwd",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2.5, float("nan"), float("inf"), 1e300, 10**30, 10**400, True, False]
ROLES = [
    "user",
    "assistant",
    "system",
    "human",
    "gpt",
    "tool",
    "developer",
    "function_call",
    "usr",
    "",
    None,
    7,
]


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(12 if depth < 3 else 6)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 5:
        return None
    if kind < 6:
        return "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xFFFF)))) for _ in range(rng.randrange(20))
        )
    if kind < 10:
        return [turn(rng, depth) for _ in range(rng.randrange(5))]
    if kind < 11:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(KEYS + TEXTS)): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def likely(rng: random.Random, key: str) -> Any:
    """What a row of this key mostly holds."""
    plain = rng.choice(TEXTS)
    if key in ("messages", "conversations", "rejected_messages"):
        roles = ("user", "assistant") * 3
        return [{"role": role, "content": rng.choice(TEXTS)} for role in roles[: rng.randrange(1, 7)]]
    if key in ("label", "labels", "kto_tag"):
        return rng.choice((True, False, 0, 1, "True", "0"))
    if key in ("weight", "margin", "score", "reward", "reward_A", "reward_B"):
        return rng.choice((0.5, 1, "2"))
    if key in ("completions", "scores", "answers", "tools", "history", "chat_template_kwargs"):
        return {"completions": [plain, "b"], "scores": [1, 0]}.get(key, [])
    return plain


def turn(rng: random.Random, depth: int) -> Any:
    names = rng.choice((("role", "content"), ("from", "value"), ("role", "text")))
    plain = rng.random() < 0.7
    said = rng.choice(TEXTS) if plain else value(rng, depth + 1)
    made = {names[0]: rng.choice(ROLES[:6] if plain else ROLES), names[1]: said}
    if rng.random() < 0.1:
        made[rng.choice(("tool_calls", "name", "weight", "reasoning_content"))] = value(rng, depth + 1)
    return made


def row(rng: random.Random) -> dict[str, Any]:
    """With the keys of a layout more often than not."""
    keys = list(formats._parameters(rng.choice(LAYOUTS))[1]) if rng.random() < 0.8 else []
    keys += rng.sample(KEYS, rng.randrange(3))
    odd = rng.choice((0.0, 0.1, 1.0))
    return {key: value(rng) if rng.random() < odd else likely(rng, key) for key in keys}


def damaged(rng: random.Random, raw: bytes) -> bytes:
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(raw) + 1)
        how = rng.randrange(5)
        if how == 0:
            raw[place:place] = bytes([rng.randrange(256)])
        elif how == 1:
            del raw[place : place + rng.randrange(1, 9)]
        elif how == 2:
            raw[place:place] = rng.choice(
                (b"[" * 5000, b"9" * 5000, b'{"a":' * 3000, b"\n", b'"', b"\xef\xbb\xbf")
            )
        elif how == 3:
            del raw[place:]
        else:
            raw[place : place + 1] = rng.choice((b"NaN", b"-", b"\\u12", b"\\ud800", b"null", b"]", b"}"))
    return bytes(raw)


def check_row(made: dict[str, Any], tokenizer: Any, template: Any) -> str:
    found = formats.parse(made, "f:1")
    formats.unread_keys(made)
    if isinstance(found, formats.Fault):
        return "fault of the row"
    limits = (tokenizer, 64, 32, template)
    for select, encoder in (
        (ranking.usable_pair, encode.encode), (ranking.usable_feedback, encode.encode),
        (ranking.best_completion, encode.encode_turns), (ranking.usable_pair, encode.encode_rendered),
    ):  # fmt: skip
        chosen = select(found)
        groups = chosen if isinstance(chosen, str) else encoder(chosen, *limits)
        for group in groups if isinstance(groups, list) else [groups]:
            if not isinstance(group, str):
                assert len(group.prompt) + max(map(len, group.completions)) <= 64 and all(
                    map(any, group.trained)
                )
    return "example"


def check_file(rng: random.Random, folder: Path) -> str:
    rows = [json.dumps(row(rng)).encode() for _ in range(4)]
    if rng.random() < 0.7:
        rows[rng.randrange(4)] = damaged(rng, rng.choice(rows))
    name = rng.choice(("a.jsonl", "a.json", "a.JSONL.gz", "a.csv", "a.ndjson"))
    raw = b"[" + b",".join(rows) + b"]" if rng.random() < 0.3 else b"\n".join(rows)
    raw = gzip.compress(raw) if name.endswith("gz") else raw
    path = folder / name
    path.write_bytes(raw[: len(raw) - rng.randrange(9)] if rng.random() < 0.1 else raw)
    for _ in data.stream(str(path), "train", set()):
        pass
    return "file read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny"))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tokenizer = loading.load_tokenizer(args.model)
    template = chat.chat_template(tokenizer, None)
    counts, slowest, done = Counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        while done < args.rows:
            state = rng.getstate()
            began = time.perf_counter()
            by_file = done * 2 >= args.rows
            try:
                counts[
                    check_file(rng, Path(folder)) if by_file else check_row(row(rng), tokenizer, template)
                ] += 1
            except ValueError as error:
                if "\n" in str(error):
                    sys.exit(f"an error of several lines: {error!r}")
                counts["file refused" if by_file else "row refused"] += 1
            except Exception:
                rng.setstate(state)
                made = "a file" if by_file else repr(row(rng))[:2000]
                sys.exit(f"{traceback.format_exc()}\nrow {done}: {made}")
            slowest = max(slowest, time.perf_counter() - began)
            done += 4 if by_file else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{done} rows, seed {args.seed}: {dict(counts)}; slowest {slowest:.2f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
