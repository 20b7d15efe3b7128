"""A file of rows that is made in parts: killed at any moment, the same command goes on, and the file is the
one that it would have been.

    begin     take the place of a file: what is already made of it, or that it is finished
    write     one part, complete or absent
    undone    within it a failure before the first part leaves nothing
    finish    all parts in their order as the file, complete or absent

Beside FILE stand FILE.args.json, the flags that made it (itself a config), and until it is finished the
folder .FILE.parts. The parts are numbered, and what is in one does not depend on the others: any process
makes any of them, at any time. Left out: processes that share no file system.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import config
import files

# What changes how a part is made, and not what is in it.
HOW = ("out", "device", "batch_size", "timeout_minutes", "trust_remote_code")


def check(out: str, settings: dict[str, Any]) -> bool:
    """Is the file finished, and made with these settings? Fails if it was made, or begun, with others; every
    process may ask this before anything is loaded. A setting "X_state" is no flag but changes when what flag
    --X names does."""
    path = Path(out)
    if path.is_dir() or not path.name:
        config.fail(f"--out {out}", "must be a file")
    if path.exists() and not _about(path).exists():
        config.fail(f"--out {out}", "exists and was not made by this program", "choose another")
    _refuse_changed(out, settings)
    if path.exists():
        shutil.rmtree(folder(out), ignore_errors=True)  # of a kill between the last two steps of `finish`
    return path.exists()


def states(**found: str) -> dict[str, str]:
    """Settings that change when what a flag names does: {"X_state": a hash} of X's state."""
    return {f"{name}_state": hashlib.sha256(text.encode()).hexdigest()[:32] for name, text in found.items()}


def begin(out: str, settings: dict[str, Any]) -> Any:
    """Take the place of a file, in one process: held as long as what is returned lives. Fails if another
    program holds it, or it cannot be written."""
    path = Path(out)
    with config.user_errors():
        folder(out).mkdir(parents=True, exist_ok=True)
        lock = open(folder(out) / ".lock", "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            config.fail(f"--out {out}", "another program is writing it")
        _refuse_changed(out, settings)  # again: one with other settings may have begun it since
        if not _about(path).exists():
            for part in folder(out).glob("*.jsonl"):  # of settings that somebody deleted
                part.unlink()
        config.write_json(_about(path), {key: value for key, value in settings.items() if value is not None})
    return lock


def folder(out: str) -> Path:
    """Where the parts of a file are."""
    path = Path(out)
    return path.with_name(f".{path.name}.parts")


def is_done(out: str, index: int) -> bool:
    """Is a part there?"""
    return (folder(out) / f"{index}.jsonl").exists()


def write(out: str, index: int, rows: Iterable[dict[str, Any]]) -> None:
    """A part: one JSON object a line."""
    target = folder(out) / f"{index}.jsonl"
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, target)


@contextlib.contextmanager
def undone(out: str) -> Iterator[None]:
    """Where what is done within raises, and not one part is there yet, nothing is left of what had begun."""
    try:
        yield
    except Exception:
        if not any(folder(out).glob("*.jsonl")):
            _about(Path(out)).unlink(missing_ok=True)
            shutil.rmtree(folder(out), ignore_errors=True)
        raise


def read(out: str, count: int) -> Iterable[dict[str, Any]]:
    """The rows of the first `count` parts, in their order."""
    for index in range(count):
        with open(folder(out) / f"{index}.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, file)


def finish(out: str, count: int, lines: Iterable[str] | None = None) -> None:
    """The rows of the first `count` parts as the file, or these `lines` instead; then the parts go. In one
    process, when all of them are there."""
    path = Path(out)
    beside = folder(out) / "whole"
    with open(beside, "w", encoding="utf-8") as file:
        for line in _lines(out, count) if lines is None else lines:
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    shutil.rmtree(folder(out), ignore_errors=True)


def _lines(out: str, count: int) -> Iterable[str]:
    for index in range(count):
        with open(folder(out) / f"{index}.jsonl", encoding="utf-8") as file:
            yield from file


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.args.json")


def _refuse_changed(out: str, settings: dict[str, Any]) -> None:
    path = Path(out)
    changed = _changed(path, settings)
    if changed:
        key, then, now = changed
        state = "was made" if path.exists() else "was begun"
        said = f"{state} with --{key.replace('_', '-')} {then}, this run has {now}"
        if key.endswith("_state"):
            said = f"{state} from another --{key.removesuffix('_state')} than what is there now"
        config.fail(f"--out {out}", said, f"choose another, or delete {_about(path)}" * (not path.exists()))


def _changed(path: Path, settings: dict[str, Any]) -> Sequence[Any] | None:
    """(key, then, now) of the first setting that is not what it was; None if there is none, or no file."""
    if not os.path.lexists(_about(path)):
        return None
    with config.user_errors():
        then = files.read_json(_about(path))
    now = json.loads(json.dumps(settings))
    for key in sorted(set(then) | set(now)):
        if key not in HOW and then.get(key) != now.get(key):
            return key, then.get(key), now.get(key)
    return None
