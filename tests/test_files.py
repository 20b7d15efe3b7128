"""Files of rows against rows written by hand: arrangements, encodings, faults, bounds of memory and time.

`red:` names a change of files.py that turns a test red.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import subprocess
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

import files

ROWS = [
    {"n": 0, "text": 'quoted "a", and\n\u2028lines 🙂', "turns": [{"role": "user", "content": "é"}]},
    {"n": 1, "text": "  blanks stay\t", "turns": [], "deep": {"a": [None, True, 1.5]}},
    {"n": 2, "text": "", "data": "no list", "train": {"no": "list"}},
]
OTHER = [{"n": 3, "text": "of the other split"}]


def zst(*frames):
    """The frames of a .zst file, each compressed by itself."""
    packed = b""
    for frame in frames:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as out:
            out.write(frame)
        packed += sink.getvalue().to_pybytes()
    return packed


def halves(raw):
    return raw[: len(raw) // 2], raw[len(raw) // 2 :]


def dumped(row, **options):
    return json.dumps(row, ensure_ascii=False, **options)


LINES = "\n".join(map(dumped, ROWS)) + "\n"
INDENTED = "\n".join(dumped(row, indent=2) for row in ROWS) + "\n"
# Where an indented object begins: after the lines of those before it.
BEGINS = [1 + sum(dumped(row, indent=2).count("\n") + 1 for row in ROWS[:k]) for k in range(3)]
BY_LINE, BY_INDEX = [":1", ":2", ":3"], ["[0]", "[1]", "[2]"]
ARRANGED = {  # file name, text, where each row stands
    "lines": ("a.jsonl", LINES, BY_LINE),
    "ndjson": ("a.ndjson", LINES, BY_LINE),
    "lines in a .json": ("a.json", LINES, BY_LINE),
    "no newline at the end": ("a.jsonl", LINES[:-1], BY_LINE),
    "blank lines": ("a.jsonl", f"\n \n{LINES}\n\n", [":3", ":4", ":5"]),
    "CRLF": ("a.jsonl", LINES.replace("\n", "\r\n"), BY_LINE),
    "objects on one line": ("a.jsonl", " ".join(map(dumped, ROWS)), [":1"] * 3),
    "indented": ("a.json", INDENTED, [f":{line}" for line in BEGINS]),
    "list": ("a.json", dumped(ROWS), BY_INDEX),
    "indented list": ("a.json", dumped(ROWS, indent=1), BY_INDEX),
    "list in a .jsonl": ("a.jsonl", f" {dumped(ROWS)}\n", BY_INDEX),
    "data": ("a.json", dumped({"data": ROWS}), BY_INDEX),
    "rows after a description": ("a.json", dumped({"version": [1, 2], "rows": ROWS}, indent=1), BY_INDEX),
    "splits": ("a.json", dumped({"test": OTHER, "train": ROWS}), BY_INDEX),
    "dots and capitals": ("My.Data.v2.JSONL", LINES, BY_LINE),
}
PACKED = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".GZ": lambda raw: b"".join(map(gzip.compress, halves(raw))),
    ".zst": zst,
    ".Zst": lambda raw: zst(*halves(raw)),
}


def read(path, raw, split="train"):
    path.write_bytes(raw)
    return list(files.rows(path, split))


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("arrangement", ARRANGED)
def test_json_in_every_arrangement(tmp_path, monkeypatch, arrangement, packing):
    # red: splitlines() on a file; "utf-8" for "utf-8-sig"; a decoder a piece; lines counted from 0; .lower()
    # left out; only the first frame of an archive read
    name, text, places = ARRANGED[arrangement]
    path = tmp_path / (name + packing)
    expected = [(f"{path}{place}", row) for place, row in zip(places, ROWS, strict=True)]
    for before, chunk in ((b"", 2**20), (BOM, 2**20), (b"", 7), (BOM, 1)):
        monkeypatch.setattr(files, "CHUNK", chunk)
        assert read(path, PACKED[packing](before + text.encode())) == expected, (before, chunk)


@pytest.mark.parametrize(
    ("split", "text"),
    [
        ("test", dumped({"train": ROWS, "test": OTHER})),
        ("test", dumped({"validation": OTHER, "train": ROWS})),
        ("test", dumped({"data": OTHER})),
        ("hard", dumped({"hard": OTHER, "test": ROWS, "train": ROWS})),
    ],
)
def test_the_split_of_an_object(tmp_path, split, text):
    # red: the first list taken; "train" for any split
    path = tmp_path / "a.json"
    assert read(path, text.encode(), split) == [(f"{path}[0]", OTHER[0])]


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("test", "no split 'test'; it has train"), ("easy", "no split 'easy'; it has train")],
)
def test_a_split_that_an_object_has_not(tmp_path, split, wanted):
    # red: nothing found and nothing said
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a.json'}: {wanted}")):
        read(tmp_path / "a.json", dumped({"train": ROWS}).encode(), split)


def test_two_lists_of_one_split_are_not_mixed(tmp_path):
    # red: validation and test read as one
    with pytest.raises(ValueError, match="a.json: several lists, validation, test; add one"):
        read(tmp_path / "a.json", dumped({"validation": OTHER, "test": ROWS}).encode(), "test")
    for named, rows in (("validation", OTHER), ("test", ROWS)):
        found = files.rows(tmp_path / "a.json", "test", named)
        assert [row for _, row in found] == rows


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.json", dumped(ROWS)),
        ("a.json", dumped({"data": ROWS})),
        ("a.csv", "text\na\n"),
    ],
)
def test_a_split_that_is_named_is_not_passed_over(tmp_path, name, text):
    # red: every row, whatever was named
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}: no split 'easy'"):
        list(files.rows(tmp_path / name, "train", "easy"))


# Tables.


CELLS = [
    {"prompt": 'two\nlines, "quoted"', "chosen": "é 🙂", "rejected": " b "},
    {"prompt": "q", "chosen": None, "rejected": "null"},
]


def table(delimiter, **options):
    written = io.StringIO()
    writer = csv.DictWriter(written, list(CELLS[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(CELLS)
    return written.getvalue().encode()


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.CSV"])
def test_tables(tmp_path, monkeypatch, name, packing):
    # red: lines split before quotes are seen; an empty cell kept as ""; a comma in a .tsv
    path = tmp_path / (name + packing)
    for options in ({}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}):
        raw = table("\t" if "tsv" in name else ",", **options)
        for before, chunk in ((b"", 2**20), (BOM, 2**20), (BOM, 3)):
            monkeypatch.setattr(files, "CHUNK", chunk)
            found = read(path, PACKED[packing](before + raw))
            assert [row for _, row in found] == CELLS, (options, before, chunk)
            assert all(re.fullmatch(re.escape(str(path)) + r":[2-4]", where) for where, _ in found)


@pytest.mark.parametrize("rows", [1, 1000])
def test_parquet(tmp_path, rows):
    # red: the first batch alone; an index that starts again with each batch
    path = tmp_path / "A.Parquet"
    expected = [{"i": k, "turns": [{"role": "user", "content": f"é{k}"}], "none": None} for k in range(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(expected), path, row_group_size=300)
    found = list(files.rows(path, "train"))
    assert found == [(f"{path}[{k}]", row) for k, row in enumerate(expected)]


# Faults.


GOOD = b'{"a": 1}\n'
LONG = b'{"a": "' + b"x" * 3000 + b'"}\n'  # more than a piece of it is read at a time below
NESTED = 100_000
BROKEN = {  # file name, its bytes, the message after the path
    "single quotes": (
        "a.jsonl",
        GOOD * 2 + b"{'a': 1}\n" + GOOD,
        ":3: not JSON (Expecting property name*column 2)",
    ),
    "no value": ("a.jsonl", GOOD + b'{"a": }\n' + GOOD, ":2: not JSON (Expecting value, column 7)"),
    "first row": ("a.jsonl", b'  {"a": }\n' + GOOD, ":1: not JSON (Expecting value, column 9)"),
    "after a long row": (
        "a.jsonl",
        LONG + b'{"a": }\n' + GOOD * 99,
        ":2: not JSON (Expecting value, column 7)",
    ),
    "in a long row": (
        "a.jsonl",
        GOOD + LONG[:-2] + b', "b": }\n' + GOOD,
        ":2: not JSON (Expecting value, column 3016)",
    ),
    "cut": ("a.jsonl", GOOD * 400 + b'{"a": "b', ":401: not JSON (Unterminated string*column 7)"),
    "no comma": ("a.jsonl", b'{"a": 1}\n{"a": 1 "b": 2}', ":2: not JSON (Expecting ',' delimiter, column 9)"),
    "in an indented row": (
        "a.json",
        GOOD + b'{\n "a": 1,\n "b": x\n}',
        ":2: not JSON (Expecting value, line 4, column 7)",
    ),
    "a word": ("a.jsonl", GOOD + b"hello\n", ":2: not JSON (Expecting value, column 1)"),
    "a comma too many": ("a.jsonl", b'{"a": 1,}\n' + GOOD, ":1: not JSON (*column 9)"),
    "a comma too many in the second row": ("a.jsonl", GOOD + b'{"a": 1,}\n', ":2: not JSON (*column 9)"),
    "a key that is no string": ("a.jsonl", b"{1: 2}\n", ":1: not JSON (*column 2)"),
    "list with a comma too many": ("a.json", b'[{"a": 1},]', ":1: not JSON (*column 11)"),
    "list without a comma": ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2: not JSON (expecting ',', column 2)"),
    "list without an end": ("a.json", b'[\n{"a": 1}', ":2: not JSON (expecting ',', column 9)"),
    "long list": ("a.json", b"[" + b'{"a": 1},' * 999 + b"{]", ":1: not JSON (*column 8994)"),
    "list in an object without an end": (
        "a.json",
        b'{"data": [{"a": 1}]',
        ":1: not JSON (expecting ',', column 20)",
    ),
    "nested in a list": ("a.json", b"[" * NESTED, ":1: not JSON (*column 2)"),
    "nested in a row": ("a.jsonl", GOOD + b'{"a": ' + b"[" * NESTED, ":2: not JSON (*column *)"),
    "nested objects": ("a.jsonl", GOOD + b'{"a":' * NESTED, ":2: not JSON (*column *)"),
    "a large number": ("a.jsonl", GOOD + b'{"a": 1' + b"0" * 5000 + b"}\n", ":2: not JSON (*column 1)"),
    "Latin-1": ("a.jsonl", GOOD + b'{"a": "caf\xe9"}\n', ":2: not valid UTF-8 (byte 0xe9 at column 11)"),
    "Latin-1 after a long row": (
        "a.jsonl",
        LONG + b'{"a": "\xe9"}\n',
        ":2: not valid UTF-8 (byte 0xe9 at column 8)",
    ),
    "Latin-1 in a long row": (
        "a.jsonl",
        LONG[:-3] + b'\xc3\xa9\xe9"}\n',
        ":1: not valid UTF-8 (byte 0xe9 at column 3010)",
    ),
    "Latin-1 in a list": ("a.json", b'[\n{"a": "\xe9"}]', ":2: not valid UTF-8 (byte 0xe9 at column 8)"),
    "half a character at the end": (
        "a.jsonl",
        GOOD + b'{"a": "\xc3',
        ":2: not valid UTF-8 (byte 0xc3 at column 8)",
    ),
    "UTF-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), ":1: not valid UTF-8 (byte 0xff at column 1)"),
    "CSV in Latin-1": ("a.csv", b"a,b\n1,\xe9\n", ":2: not valid UTF-8 (byte 0xe9 at column 3)"),
    "CSV, too many cells": ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3: more cells than the header has names"),
    "CSV, open quote": ("a.csv", b'a,b\n1,2\n1,"2\n', ":*: unexpected end of data"),
    "gz, cut": ("a.jsonl.gz", gzip.compress(GOOD * 50)[:-9], ": *ended before*"),
    "gz, no checksum": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), ": CRC check failed*"),
    "gz, bent": ("a.jsonl.gz", gzip.compress(GOOD)[:10] + b"\xff" * 20, ": *"),
    "not gz": ("a.jsonl.gz", GOOD, ": Not a gzipped file*"),
    "zst, cut": ("a.jsonl.zst", zst(GOOD * 50)[:-3], ": Truncated*"),
    "zst, second frame cut": ("a.jsonl.zst", zst(GOOD, GOOD)[:-3], ": Truncated*"),
    "not zst": ("a.jsonl.zst", GOOD, ": *ZSTD*"),
    "not Parquet": ("a.parquet", GOOD * 9, ": *Parquet*"),
    "packed Parquet": ("a.parquet.gz", gzip.compress(GOOD), ": *Parquet*"),
    "another suffix": (
        "a.txt",
        GOOD,
        ": not one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet (with .gz or .zst)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_its_place(tmp_path, monkeypatch, case):
    # red: a place of the piece for one of the file; lines of what was cut off forgotten; an error that is
    # not caught (RecursionError, csv.Error, zlib.error, EOFError)
    name, raw, message = BROKEN[case]
    pattern = re.escape(f"{tmp_path / name}{message}").replace(r"\*", ".*")
    for chunk in (2**20, 64):
        monkeypatch.setattr(files, "CHUNK", chunk)
        with pytest.raises(ValueError) as caught:
            read(tmp_path / name, raw)
        assert re.fullmatch(pattern, str(caught.value)), (chunk, caught.value)


def test_what_stands_before_the_fault_is_read_first(tmp_path):
    # red: the whole file parsed before the first row
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3 + b"{")
    found = files.rows(path, "train")
    assert [next(found)[1] for _ in range(3)] == [{"a": 1}] * 3
    with pytest.raises(ValueError, match="a.jsonl:4: not JSON"):
        next(found)


def test_a_cut_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CELLS * 50), path)
    with pytest.raises(ValueError, match=rf"^{path}: [^\n]+$"):
        read(path, path.read_bytes()[:-40])


@pytest.mark.parametrize("chunk", [2**20, 1])
@pytest.mark.parametrize("text", ["5", '"text"', "true", "null", "512 -6.25\n7e1"])
def test_lone_values_are_rows_that_a_layout_refuses(tmp_path, monkeypatch, text, chunk):
    """formats.parse says that they are no objects."""
    # red: a number that ends with what was read so far taken for the whole
    monkeypatch.setattr(files, "CHUNK", chunk)
    found = read(tmp_path / "a.json", text.encode())
    assert [row for _, row in found] == [json.loads(word) for word in text.split()]


def test_numbers_that_json_has_not(tmp_path):
    # they are read, and refused where a number is needed: test_formats.py
    (row,) = read(tmp_path / "a.jsonl", b'{"a": NaN, "b": -Infinity, "c": 1e999}')
    assert str(row[1]) == "{'a': nan, 'b': -inf, 'c': inf}"


# Bounds.


@pytest.mark.parametrize("wrapped", ["{}\n", "[{}]", '{{"data": [{}]}}'])
@pytest.mark.parametrize("chunk", [2**20, 1000])
def test_a_row_has_a_longest_length(tmp_path, monkeypatch, wrapped, chunk):
    # red: only what is not complete yet is measured
    monkeypatch.setattr(files, "CHUNK", chunk)
    monkeypatch.setattr(files, "MAX_ROW", 5000)
    path = tmp_path / "a.json"
    row = '{"a": "' + "é" * 4991 + '"}'
    assert len(row) == 5000
    assert len(read(path, wrapped.format(row).encode())) == 1
    many = "".join(f',"{key:03}": "123456"' for key in range(400))
    for longer in (row.replace("é", "éé", 1), f'{{"a": 1{many}}}'):
        with pytest.raises(ValueError, match="a.json:1: a row of more than 5000 characters"):
            read(path, wrapped.format(longer).encode())


@pytest.mark.parametrize("chunk", [2**20, 1000])
def test_a_cell_has_a_longest_length(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    monkeypatch.setattr(files, "MAX_ROW", 5000)
    assert len(read(tmp_path / "a.csv", b"a,b\n1," + b"x" * 4000)) == 1
    for row in (b"1," + b"x" * 6001, b'1,"' + b"x\n" * 3001 + b'"'):
        with pytest.raises(ValueError, match=r"a.csv(:\d+)?: (field larger than|a line of more than)"):
            read(tmp_path / "a.csv", b"a,b\n" + row)


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import files
try:
    for _ in files.rows(Path(sys.argv[2]), "train"):
        pass
    said = "read"
except ValueError as error:
    said = str(error)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) // 1024, said)
"""
MEMBER = 2**24  # bytes of an archive's member
BOMBS = {  # suffix, before, a character, how many members of it, what is said
    "spaces": (".gz", b"", b" ", 16, "read"),
    "1 GB of a string": (".gz", b'{"prompt": "', b"x", 64, "a row of more than"),
    "1 GB of a string, zst": (".zst", b'{"prompt": "', b"x", 64, "a row of more than"),
    "1 GB of a cell": (".csv.gz", b"prompt\n", b"x", 64, "a line of more than"),
    "1 GB of a number": (".gz", b'{"a": ', b"1", 64, "not JSON"),
    "1 GB of spaces in a row": (".gz", b'{"a": 1}\n{"prompt": ', b" ", 64, "a row of more than"),
    "spaces in the first row": (".gz", b'{"prompt": ', b" ", 8, "not JSON"),
    "spaces in a list": (".zst", b'[{"prompt": "q"}', b" ", 8, "expecting ','"),
    "blank lines": (".gz", b"", b"\n", 8, "read"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_file_that_unpacks_to_far_more_is_not_held(tmp_path, case):
    # red: file.read() of everything; MAX_ROW not looked at; white space kept until a value comes
    suffix, before, byte, times, said = BOMBS[case]
    path = tmp_path / ("a" + suffix if "csv" in suffix else f"a.jsonl{suffix}")
    pack = zst if suffix == ".zst" else gzip.compress
    path.write_bytes(pack(before) + pack(byte * MEMBER) * times)
    assert path.stat().st_size < 2**22
    command = [sys.executable, "-c", MEASURE, str(ROOT), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    peak, message = done.stdout.split(" ", 1)
    assert said in message
    assert int(peak) < 200, f"{peak} MiB"


DECODER = json.JSONDecoder()


class Counting:
    """A decoder that counts the characters it has looked at, and gives up when they are too many."""

    def __init__(self, most):
        self.most = most
        self.seen = 0

    def raw_decode(self, text, at):
        end = len(text)
        try:
            value, end = DECODER.raw_decode(text, at)
            return value, end
        finally:
            self.seen += end - at
            if self.seen > self.most:
                pytest.fail("read over and over")


@pytest.mark.parametrize("kind", ["row", "list"])
def test_reading_is_linear(tmp_path, monkeypatch, kind):
    # red: `wanted = 0` in Scan._more, which decodes a long row once a piece; self.text sliced a row
    monkeypatch.setattr(files, "CHUNK", 2**12)
    path = tmp_path / "a.json"
    short = dumped({"prompt": "q", "chosen": "a" * 400, "rejected": "b" * 400})
    text = dumped({"answer": "long " * 2_000_000}) if kind == "row" else f"[{','.join([short] * 19_000)}]"
    path.write_text(text, encoding="utf-8")
    assert 10e6 < len(text) < 17e6
    monkeypatch.setattr(files, "DECODER", Counting(4 * len(text)))
    tracemalloc.start()
    number = sum(1 for _ in files.rows(path, "train"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == (1 if kind == "row" else 19_000)
    assert peak < (6 * len(text) if kind == "row" else 2**20)


def test_a_file_is_closed_when_its_reader_is(tmp_path, recwarn):
    # red: open() without a with
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 5)
    found = files.rows(path, "train")
    next(found)
    with contextlib.closing(found):
        pass
    path.unlink()
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
