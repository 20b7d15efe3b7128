"""Input of every wrong kind through the readers: it is read, counted, or refused in one line.

    python bench/fuzz.py [--what rows] [--number 100000] [--seed 0] [--model examples/tiny]

    rows        rows and files of them
    configs     .toml and .json files of flags of align.py and sft.py
    commands    command lines of every script
    models      config.json, tokenizer files and weights of a model directory
    records     trainer.json, .metadata, args.json, metrics.jsonl, status.json of a run

Half of the rows are objects with the keys of the layouts and values of any type, depth and size, given to
formats.parse and, where they are read, to every encoder; half are rows whose bytes were changed, in files of
all kinds, given to data.stream. The other files are whole ones of which a value, a key or some bytes were
changed. Prints how many went which way, the slowest, and the peak of memory; exits with 1 at the first
exception that is not a ValueError, an error of more than one line, or what takes more than 20 s.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

import align  # noqa: E402
import chat  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import encode  # noqa: E402
import formats  # noqa: E402
import judge  # noqa: E402
import label  # noqa: E402
import loading  # noqa: E402
import model  # noqa: E402
import plot  # noqa: E402
import ranking  # noqa: E402
import rundir  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402

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


# ---- files and flags
# ----------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, made: Any) -> Any:
    """With one value in it another, one key gone, or one more."""
    if isinstance(made, dict) and made and rng.random() < 0.9:
        key = rng.choice(sorted(made))
        how = rng.randrange(8)
        if how == 0:
            return {name: part for name, part in made.items() if name != key}
        if how == 1:
            return made | {str(rng.choice(TEXTS)): value(rng)}
        return made | {key: mutated(rng, made[key]) if how < 6 else value(rng)}
    if isinstance(made, list) and made and rng.random() < 0.9:
        place = rng.randrange(len(made))
        return [*made[:place], mutated(rng, made[place]), *made[place + 1 :]]
    return rng.choice((value(rng), rng.choice(NUMBERS), rng.choice((-1, 0, 1, 2, 3, 10**9, 2**40, "a", [], {}, None))))


def dumped(made: Any) -> str:
    try:
        return json.dumps(made)
    except ValueError:  # an integer of more digits than are written
        return "9" * 5000


def spoiled(rng: random.Random, raw: bytes) -> bytes:
    """A file of JSON with a value or some bytes changed."""
    if rng.random() < 0.3:
        return damaged(rng, raw)
    return dumped(mutated(rng, json.loads(raw))).encode()


def quietly(run: Callable, argv: list[str]) -> str:
    """What a script's parse of its flags ends with; a refusal is a ValueError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            run(argv)
    except SystemExit as end:
        lines = said.getvalue()
        assert end.code == 0 or end.code == 2 and lines.startswith("error: ") and lines.count("\n") == 1, lines
        if end.code:
            raise ValueError(lines.strip()) from None
    return "taken"


SCRIPTS = {"align": align.parse_args, "sft": sft.parse_args, "sample": sample.parse_args}
SCRIPTS |= {"label": label.parse_args, "judge": judge.parse_args}
COMMON = ("--beta", "--alpha", "--risk-aversion", "--out", "--resume", "--save-every", "--keep-last", "--device", "--x")
WORDS = [*TEXTS, *map(str, NUMBERS[:-3]), "auto", "step-1", "none", "dpo", "kto", "ra_dpo1", "cvar", "--", "-1", "0x10"]
OPTIONS = {
    name: sorted(set(re.findall(r'"(--[a-z][a-z-]*)"', (ROOT / f"{name}.py").read_text())) | set(COMMON))
    for name in SCRIPTS
}


def check_command(rng: random.Random, folder: Path) -> str:
    name = rng.choice(sorted(SCRIPTS))
    argv = ["--data", "d", "--out", str(folder / "o")]
    argv += {"judge": ["--against", "d", "--by", "m"], "label": ["--by", "m"]}.get(name, ["--model", "m"])
    for _ in range(rng.randrange(1, 4)):
        flag = rng.choice(OPTIONS[name])
        some = [flag, rng.choice(WORDS)] if rng.random() < 0.7 else [f"{flag}={rng.choice(WORDS)}"]
        place = rng.randrange(len(argv) + 1)
        argv[place:place] = some
    return quietly(SCRIPTS[name], [word for word in argv if word not in ("--help", "-h")])


def check_config(rng: random.Random, folder: Path) -> str:
    name = rng.choice(("align", "sft"))
    flags = {"lr": 1e-5, "batch_size": 8, "data": ["d"], "model": "m", "save_every": 3, "check": True, "seed": 0}
    if rng.random() < 0.5:
        path, raw = folder / "a.json", spoiled(rng, json.dumps(flags).encode())
    else:
        made = flags | {rng.choice(sorted(flags)): mutated(rng, rng.choice(list(flags.values())))}
        path, raw = folder / "a.toml", "\n".join(f"{k} = {dumped(v)}" for k, v in made.items()).encode()
        raw = damaged(rng, raw) if rng.random() < 0.5 else raw
    path.write_bytes(raw)
    return quietly(SCRIPTS[name], [str(path), "--model", "m", "--data", "d", "--out", str(folder / "o")])


def make_model(folder: Path, source: str) -> None:
    """A model of 32 dimensions, with weights."""
    shutil.copytree(source, folder)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = json.loads((folder / "config.json").read_text()) | small | {"head_dim": 16, "intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps(settings))
    lm = loading.AutoModelForCausalLM.from_config(loading.settings(str(folder)))
    lm.save_pretrained(folder)


def check_model(rng: random.Random, folder: Path) -> str:
    """One file of a model directory changed, the directory read as align.py reads it."""
    place = folder / "model"
    names = ["config.json"] * 5 + ["generation_config.json", "tokenizer_config.json", "model.safetensors"] * 2
    path = place / rng.choice([*names, "tokenizer.json"])
    raw = path.read_bytes()
    if path.suffix == ".json":
        made = spoiled(rng, raw)
    else:
        size = int.from_bytes(raw[:8], "little")
        made = damaged(rng, raw[: 8 + size]) + raw[8 + size :] if rng.random() < 0.9 else raw[: rng.randrange(len(raw))]
    path.write_bytes(made)
    try:
        loading.check(str(place))
        if path.name.startswith("token"):
            chat.chat_template(loading.load_tokenizer(str(place)), None)
        else:
            model.stop_at(model.load(str(place), torch.float32, 64), [2])
    finally:
        path.write_bytes(raw)
    return f"{path.name} read"


def make_run(folder: Path) -> None:
    """A finished run with a checkpoint."""
    rows = (ROOT / "examples" / "hh_test.jsonl").read_bytes().split(b"\n")[:6]
    (folder / "pairs.jsonl").write_bytes(b"\n".join(rows))
    argv = ["--model", folder / "model", "--data", folder / "pairs.jsonl", "--out", folder / "run"]
    argv += ["--token-cache", folder / "cache", "--steps", "1", "--batch-size", "2", "--save-every", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        align.main([str(word) for word in argv])


def check_record(rng: random.Random, folder: Path) -> str:
    """One file of a run changed, the run read as a resumed one and as plot.py read it."""
    place = folder / "run"
    names = ("step-1/trainer.json", "step-1/.metadata", "args.json", "metrics.jsonl", "status.json")
    path = place / rng.choice(names)
    record = place / "step-1" / "trainer.json"
    raw, told = path.read_bytes(), record.read_bytes()
    path.write_bytes(spoiled(rng, raw) if path.suffix == ".json" else damaged(rng, raw))
    if path.name == ".metadata":  # with a record that vouches for it
        about = json.loads(told)
        about["files"][".metadata"] = [path.stat().st_size, checkpoint._checksum(path)]
        record.write_text(json.dumps(about))
    try:
        quietly(lambda argv: plot.read(place), [])
        if path.name == "args.json":
            args = argparse.Namespace(out=str(place), resume="auto", steps=1, lr=1.0)
            quietly(lambda argv: rundir.check_run(args), [])
        elif path.name == "metrics.jsonl":
            shutil.copy(path, folder / "metrics.jsonl")
            rundir.rewind_log(folder, 1)
        else:
            dict(checkpoint.read(place / "step-1", checkpoint.outline(place / "step-1")))
    finally:
        path.write_bytes(raw)
        record.write_bytes(told)
    return f"{path.name} read"


CHECKS = {"configs": check_config, "commands": check_command, "models": check_model, "records": check_record}


def too_long(number: int, frame: Any) -> None:
    raise AssertionError("more than 20 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("rows", *CHECKS), default="rows")
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny"))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tokenizer = loading.load_tokenizer(args.model)
    template = chat.chat_template(tokenizer, None)
    counts, slowest, done = Counter(), 0.0, 0
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what in ("models", "records"):
            make_model(folder / "model", args.model)
        if args.what == "records":
            make_run(folder)
        while done < args.number:
            state = rng.getstate()
            began = time.perf_counter()
            by_file = args.what != "rows" or done * 2 >= args.number
            try:
                if args.what != "rows":
                    signal.alarm(20)
                    counts[CHECKS[args.what](rng, folder)] += 1
                elif by_file:
                    counts[check_file(rng, folder)] += 1
                else:
                    counts[check_row(row(rng), tokenizer, template)] += 1
            except ValueError as error:
                if "\n" in str(error) or len(str(error)) > 1200:
                    sys.exit(f"an error of several lines: {error!r}")
                counts["file refused" if by_file else "row refused"] += 1
            except BaseException:
                signal.alarm(0)
                rng.setstate(state)
                made = args.what if by_file else repr(row(rng))[:2000]
                sys.exit(f"{traceback.format_exc()}\n{args.what} {done}, seed {args.seed}: {made}")
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - began)
            done += 4 if args.what == "rows" and by_file else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    said = f"{done} {args.what}, seed {args.seed}: {dict(counts)}"
    print(f"{said}; slowest {slowest:.2f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
