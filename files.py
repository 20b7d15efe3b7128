"""Files of rows: JSON in any arrangement, tables, Parquet; plain or compressed; read a row at a time.

    rows           (where, row) of a file, where "file:line" or "file[index]"
    read_json      the one object of a small file: settings, records, what a model says of itself
    looks_local    a name that is no file may still not be one of a hub
    suffix         what says which kind of file it is
    split_names    what a split may be called
    fingerprint    a hash of what files of any kind hold, of a few blocks of each

JSON may be lines, indented objects one after another, one list, or one object that holds the list ({"data":
[...]}, {"train": [...], "test": [...]}), whatever the file is called. Bytes are UTF-8, with a byte order mark
or without.

A fault of a file is a ValueError that reads "file:line: what is wrong". Neither a file that unpacks to a
thousand times its size nor a row without an end is held: a row has at most MAX_ROW characters.
"""

import codecs
import contextlib
import csv
import gzip
import hashlib
import json
import os
import re
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Iterator

MAX_ROW = 2**24  # characters
CHUNK = 2**20  # bytes read at a time
BLOCK = 4096  # bytes of a sample
MAX_OBJECT = 2**26  # bytes of a file that is one object; the index of 100,000 tensors has a tenth of that
JSON = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*JSON, *TABLES, ".parquet")
PACKED = (".gz", ".zst")
FOLDERS = ("runs", "models", "cache", "configs", "examples")  # of this project
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev", "eval")}
WRAPPERS = ("data", "rows", "examples", "instances")  # what a file's one object may call its list
# Keys of rows, which an object that wraps a list of them does not have.
LAYOUT = {"prompt", "chosen", "rejected", "completion", "messages", "conversations", "instruction", "text"}
CALLS = ("tools", "tool_calls", "function_call")
SPACE = re.compile(r"\s*")
ITEM = re.compile(r"\[\s*(\S)")  # what a list begins with


def read_text(path: Path, most: int = MAX_OBJECT) -> str:
    """A small file of UTF-8, with a byte order mark or without. Raises ValueError, "path: what"."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ValueError(f"{path}: not a file")
        with open(path, "rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise ValueError(f"{path}: more than {most} bytes")
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small file of JSON, without a key twice. Raises ValueError, "path: what"."""
    text = read_text(path)
    with parsing(path, "JSON"):
        found = json.loads(text, object_pairs_hook=_once)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be one object, got {json.dumps(found)[:40]}")
    return found


@contextlib.contextmanager
def parsing(path: Path, kind: str) -> Iterator[None]:
    """Whatever a parser of untrusted text raises within is a ValueError, "path: not KIND: why"."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{path}: not {kind}: nested too deeply") from None
    except ValueError as error:  # among them that of an integer of more than 4,300 digits
        raise ValueError(f"{path}: not {kind}: {str(error).splitlines()[0][:200]}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)[:40]!r} stands there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of files' names, sizes, and 64 blocks of 4 kB of each, its first and last among them: 0.02 s for
    files of any size. Other weights, other rows, a hole that a crash left, are seen; one changed byte in a
    file of over 256 kB need not be."""
    found = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        last = max(0, size - BLOCK)
        with open(path, "rb", buffering=0) as file:
            for index in range(64):
                file.seek(last * index // 63)
                found.update(file.read(BLOCK))
    return found.hexdigest()


def looks_local(name: str) -> bool:
    """Is a name of nothing that is there a path's all the same, and not org/name of a hub? So is one in a
    folder that is there, or where this project keeps its own: a misspelled run is no repository."""
    first = name.split("/")[0]
    inside = "/" in name and (first in FOLDERS or os.path.lexists(first))
    return inside or name.count("/") > 1 or name.startswith((".", os.sep, "~")) or os.path.lexists(name)


def suffix(path: Path) -> str:
    """The suffix that says what is in a file, in lower case, without that of its compression."""
    found = [part.lower() for part in path.suffixes]
    return next((part for part in reversed(found) if part not in PACKED), "")


def split_names(split: str) -> tuple[str, ...]:
    """What a split may be called, best first: "test_prefs" may be "test", and that "validation"."""
    return tuple(dict.fromkeys((split, *SPLITS.get(split.split("_")[0], ()))))


def rows(path: Path, split: str, named: str | None = None) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row of a file; of an object that holds several lists, the one that is named, or
    else that of the split. Raises ValueError for a file that cannot be read to its end."""
    kind = suffix(path)
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)} (with .gz or .zst)")
    if named is not None and kind not in JSON:
        raise ValueError(f"{path}: no split {named!r}: a table has none")
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    with _opened(path) as file:
        if kind in JSON:
            yield from _json_rows(path, file, split, named)
        else:
            yield from _table_rows(path, file, TABLES[kind])


def _opened(path: Path) -> BinaryIO:
    packed = path.suffix.lower()
    if packed == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return gzip.open(path, "rb") if packed == ".gz" else open(path, "rb")


def _text(path: Path, file: BinaryIO) -> Iterator[str]:
    """The text of a file in pieces, without a byte order mark. Raises ValueError at file:line for bytes that
    are not UTF-8, or for an archive that is damaged."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, before = 1, 0  # of what is decoded, and the bytes of its last line
    block = b"\n"
    while block:
        try:
            block = file.read(CHUNK)
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            valid, byte = error.object[: error.start], error.object[error.start]
            begin = valid.rfind(b"\n") + 1
            line += valid.count(b"\n")
            column = len(valid) - begin + 1 + (0 if begin else before)
            raise ValueError(
                f"{path}:{line}: not valid UTF-8 (byte 0x{byte:02x} at column {column})"
            ) from None
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: {(str(error) or 'damaged').splitlines()[0]}") from error
        begin = piece.rfind("\n") + 1
        line += piece.count("\n")
        before = len(piece[begin:].encode()) + (0 if begin else before)
        yield piece


# ---- tables
# --------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for some in file.iter_batches(batch_size=64):
                for row in some.to_pylist():
                    yield f"{path}[{index}]", without_nulls(row)
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error


def without_nulls(value: Any, within: bool = False) -> Any:
    """Tools, and calls of them, without the nulls that Arrow puts where one row of a table has a key and
    another has not: they would be read as arguments."""
    if isinstance(value, list):
        return [without_nulls(part, within) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {key: part for key, part in value.items() if part is not None or not within}
    return {key: without_nulls(part, within or key in CALLS) for key, part in kept.items()}


def _table_rows(path: Path, file: BinaryIO, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table with a header; an empty cell is null."""
    csv.field_size_limit(MAX_ROW)
    reader = csv.DictReader(_lines(path, _text(path, file)), delimiter=delimiter, strict=True)
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise ValueError(f"{path}:1: two columns of one name ({', '.join(header)[:200]})")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise ValueError(f"{where}: more cells than the header has names")
            yield where, {key: value or None for key, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def _lines(path: Path, pieces: Iterator[str]) -> Iterator[str]:
    """Lines with their ends."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        if len(rest) > MAX_ROW:
            raise ValueError(f"{path}: a line of more than {MAX_ROW} characters")
        yield from (f"{line}\n" for line in whole)
    yield rest


# ---- JSON
# ----------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, file: BinaryIO, split: str, named: str | None) -> Iterator[tuple[str, Any]]:
    """Rows of JSON: values one after another, the items of one list, or of the list in one object."""
    scan = Scan(path, _text(path, file))
    if scan.peek() == "{":
        yield from _first_object(scan, split, named)
    elif named is not None:
        raise ValueError(f"{path}: no split {named!r}: it is one list")
    elif scan.peek() == "[":
        yield from _items(scan)
    while scan.peek():
        yield f"{path}:{scan.line}", scan.value()


def _items(scan: "Scan") -> Iterator[tuple[str, Any]]:
    scan.take("[")
    index = 0
    while scan.peek() != "]":
        if index:
            scan.take(",")
        yield f"{scan.path}[{index}]", scan.value()
        index += 1
    scan.take("]")


def _first_object(scan: "Scan", split: str, named: str | None) -> Iterator[tuple[str, Any]]:
    """The first object of a file, key by key, for it may wrap a list that is too long to hold: the rows of
    that list, or the object as a row."""
    wanted = {*split_names(split), *WRAPPERS} if named is None else {named}
    lists = {*wanted, *WRAPPERS, *(name for names in SPLITS.values() for name in names)}
    begin, line, row, held = scan.gone, scan.line, {}, []
    scan.take("{")
    while scan.peek() != "}":
        if row or held:
            scan.take(",")
        key, place = scan.key(), f"{scan.path}:{scan.line}"
        if key in row:
            raise ValueError(f"{place}: the key {key[:40]!r} stands there twice")
        scan.take(":")
        if key in lists and scan.peek() == "[" and scan.holds_objects():
            held.append(key)
            if key in wanted and len(wanted.intersection(held)) > 1:
                raise ValueError(
                    f"{scan.path}: several lists, {', '.join(held)}; add one of them after a colon"
                )
            yield from (item for item in _items(scan) if key in wanted)
        else:
            row[key] = scan.value()
        if held and LAYOUT.intersection(row):
            raise ValueError(
                f"{scan.path}:{line}: two readings: the list {held[-1]!r} holds the rows, or this is one"
            )
        if held:
            row = {}  # it is no row, and may be long
        else:
            scan.check(scan.gone + 1 - begin)
    scan.take("}")
    if held and scan.peek():
        raise ValueError(
            f"{scan.path}:{line}: two readings: the list {held[-1]!r} holds the rows, or what follows does"
        )
    if named is None and not held:
        yield f"{scan.path}:{line}", row
    elif not wanted.intersection(held):
        wrong = split if named is None else named
        raise ValueError(f"{scan.path}: no split {wrong!r}; it has {', '.join(held) or 'none'}")


@dataclass
class Scan:
    """A place in the text of a file, of which no more is held than the value that begins there."""

    path: Path
    pieces: Iterator[str]
    text: str = ""
    at: int = 0
    line: int = 1
    gone: int = 0  # characters before the place
    before: int = 0  # of them those that are no longer held and stand in the line where the text begins

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._go(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            self._fail(f"expecting {expected!r}", self.at)
        self._go(self.at + 1)

    def key(self) -> str:
        """The key that begins here."""
        if self.peek() != '"':
            self._fail("expecting a key in double quotes", self.at)
        return self.value()

    def value(self) -> Any:
        """The value that begins here."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # what is wrong near the end of what was read may be only that it goes on
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                into = error.pos - self.at
                if not (cut and self._more()):
                    self._fail(error.msg, self.at + into)
            except (ValueError, RecursionError) as error:
                self._fail(str(error).splitlines()[0], self.at)
            else:
                size = end - self.at
                # of a number that goes on, "e+" may stand after what was taken for the whole
                if end + 2 < len(self.text) or self.text[end - 1] in '}]"' or not self._more():
                    self.check(size)
                    self._go(self.at + size)
                    return value

    def check(self, size: int) -> None:
        """Raises ValueError for a row of that many characters if it is too long."""
        if size > MAX_ROW:
            raise ValueError(f"{self.path}:{self.line}: a row of more than {MAX_ROW} characters")

    def holds_objects(self) -> bool:
        """Does a list begin here whose first item is an object? Nothing is taken."""
        while not (found := ITEM.match(self.text, self.at)) and self._more():
            pass
        return found is not None and found[1] == "{"

    def _go(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.gone += to - self.at
        self.at = to

    def _more(self) -> bool:
        """Read on, as much again as is held, so that a long value is not read over and over."""
        begin = self.text.rfind("\n", 0, self.at) + 1
        self.before = self.at - begin + (0 if begin else self.before)
        self.text, self.at = self.text[self.at :], 0
        self.check(len(self.text))
        wanted = 2 * len(self.text)
        parts = [self.text]
        size = len(self.text)
        for piece in self.pieces:
            parts.append(piece)
            size += len(piece)
            if size > wanted:
                break
        grown = size > len(self.text)
        self.text = "".join(parts)
        return grown

    def _fail(self, what: str, position: int) -> None:
        line = self.text.count("\n", self.at, position)
        place = f"line {self.line + line}, " * bool(line)
        begin = self.text.rfind("\n", 0, position) + 1
        column = position - begin + 1 + (0 if begin else self.before)
        raise ValueError(f"{self.path}:{self.line}: not JSON ({what}, {place}column {column})")
