"""Sources: files, folders, named datasets, what stands after a colon, against rows written by hand.

`red:` names a change of data.py that turns a test red. What is in a file: test_files.py; in a row:
test_formats.py.
"""

import gzip
import json
import os

import datasets as hub
import pyarrow
import pyarrow.parquet
import pytest

import data
from formats import Example, Fault


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def turns(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def write(path, *rows):
    """A file of rows; of strings, each a row of plain text; of pairs, rows of HH."""
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    rows = [dict(zip(("chosen", "rejected"), row)) if isinstance(row, tuple) else row for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(source, split="train"):
    return [example.completions[0] for example in data.load(str(source), split)[0]]


def refused(source, *words, split="train"):
    """One line that starts with the first of the words and holds the others."""
    with pytest.raises(ValueError) as caught:
        data.load(str(source), split)
    message = str(caught.value)
    assert message.startswith(words[0]) and "\n" not in message, message
    assert [word for word in words if word not in message] == [], message


# Files.


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
ROWS = [PAIR, {"prompt": "q", "completion": "b", "label": False}, {"text": "t"}, PAIR | {"chosen": " "}]
READ = [Example(turns("q"), ["a", "b"], [1.0, 0.0]), Example(turns("q"), ["b"], [0.0])]
READ += [Example([], ["t"], [1.0], labelled=False)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_rows_of_a_file_with_their_places(tmp_path, name):
    # red: a blank line that is not counted; rows that are no examples lost; `where` left out
    rows = [json.dumps(row) for row in ROWS]
    lines = ".jsonl" in name
    raw = ("\r\n\r\n".join(rows) if lines else f"[{','.join(rows)}]").encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    places = [f"{path}:{2 * i + 1}" if lines else f"{path}[{i}]" for i in range(len(ROWS))]
    found = list(data.stream(str(path), "train"))
    expected = [example._replace(where=place) for example, place in zip(READ, places)]
    assert found == [*expected, Fault(places[3], "an answer is empty")]
    assert data.load(str(path), "train") == (expected, {"an answer is empty": 1})


def test_keys_that_are_not_read_are_gathered(tmp_path):
    # red: those of the last row alone; nulls among them; keys of rows that cannot be used
    rows = [
        PAIR | {"id": 1},
        {"text": "t", "source": "x", "id": None},
        PAIR,
        PAIR | {"chosen": None, "no": 1},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    unread = set()
    list(data.stream(str(path), "train", unread))
    assert unread == {"id", "source"}


CANNOT = {  # a source, what is written there, what is said
    "none.jsonl": (None, "no such file or directory"),
    "./none/at/all": (None, "./none/at/all: no such file or directory"),
    "{}/none": (None, "{}/none: no such file or directory"),
    "hh={}/none": (None, "{}/none: no such file or directory"),
    "a.txt": (b"x", "not one of .jsonl"),
    "blank.jsonl": (b"\n \n", "blank.jsonl: no examples"),
    "empty.jsonl": (b"", "empty.jsonl: no examples"),
    "empty.json": (b"[]", "empty.json: no examples"),
    "empty.csv": (b"", "empty.csv: no examples"),
    "header.csv": (b"prompt,chosen\n", "header.csv: no examples"),
    "list.json": (b"[[]]", "list.json[0]: not an object"),
    "plain.jsonl.gz": (b'{"text": "t"}', "Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "t"}' * 50)[:-9], "ended before"),
    "wrong.jsonl": (b'{"text": "t"}\n{"text": 5}\n', 'wrong.jsonl:2: "text" must be a string'),
    "hh=other.jsonl": (b'{"question": "q"}', "other.jsonl:1: not a row of the published dataset"),
    "hh=null.jsonl": (b'{"chosen": null, "rejected": "q"}', "null.jsonl:1: not a row of the published"),
    "imdb=other.jsonl": (b'{"question": "q"}', "other.jsonl:1: not a row of the published dataset"),
    "imdb=number.jsonl": (b'{"text": 5}', "number.jsonl:1: not a row of the published dataset"),
    "hhh": (None, "; NAME=DIR reads local files) nor a file, a folder or org/name of the hub"),
    "": (None, "neither a dataset"),
    "org/name/more": (None, "org/name/more: no such file"),
    "org/name": (None, "org/name: "),
    "a.jsonl:b:c:d": (None, "at most a configuration and a split"),
}


@pytest.mark.parametrize("source", CANNOT)
def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch, source):
    # red: an error of the system or of a library; an empty --data that reads the working directory
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here" / "train.jsonl", "not asked for")
    content, message = CANNOT[source]
    if content is not None:
        (tmp_path / source.rpartition("=")[2]).write_bytes(content)
    refused(source.format(tmp_path), "", message.format(tmp_path))


# Folders.


def test_shards_in_the_order_of_their_names(tmp_path):
    # red: the order of the file system; the first file alone; files of other kinds, hidden ones
    write(tmp_path / "train-00001-of-00003.parquet", "c", "d")
    write(tmp_path / "train-00000-of-00003.parquet", "a", "b")
    write(tmp_path / "train-00002-of-00003.parquet", "e")
    write(tmp_path / "test-00000-of-00001.parquet", "t")
    write(tmp_path / ".train-00000.jsonl", "hidden")
    write(tmp_path / ".cache" / "train.jsonl", "hidden")
    write(tmp_path / "dataset_info.json", {"splits": []})
    (tmp_path / "notes.txt").write_text("x")
    assert texts(tmp_path) == list("abcde")
    assert texts(tmp_path, "test") == texts(f"{tmp_path}:test") == ["t"]
    first = next(data.stream(str(tmp_path), "train"))
    assert first.where == f"{tmp_path}/train-00000-of-00003.parquet[0]"


def test_folders_of_splits(tmp_path):
    # red: the name of the file alone looked at
    write(tmp_path / "train" / "0001.jsonl", "b")
    write(tmp_path / "train" / "0000.jsonl", "a")
    write(tmp_path / "validation" / "part.jsonl.gz").write_bytes(gzip.compress(b'{"text": "v"}'))
    assert (texts(tmp_path), texts(tmp_path, "test")) == (["a", "b"], ["v"])
    assert texts(f"{tmp_path}:validation") == ["v"]


def test_files_without_a_split_in_their_names_are_for_training(tmp_path):
    write(tmp_path / "part2.jsonl", "b")
    write(tmp_path / "part1.csv").write_text("text\na\n")
    assert texts(tmp_path) == ["a", "b"]
    refused(tmp_path, f"{tmp_path}: no split 'test'; it has train", split="test")


def test_the_names_of_the_hub(tmp_path):
    # red: train_prefs taken for train; a split that is not there read as another
    for name, said in (("train_prefs", "p"), ("train_sft", "s"), ("test_prefs", "t")):
        write(tmp_path / "data" / f"{name}-00000-of-00002.parquet", said)
        write(tmp_path / "data" / f"{name}-00001-of-00002.parquet", said.upper())
    assert texts(f"{tmp_path}:train_prefs") == ["p", "P"]
    assert texts(f"{tmp_path}:test_prefs", "test") == ["t", "T"]
    splits = "it has test_prefs, train_prefs, train_sft: add one after a colon"
    refused(tmp_path, f"{tmp_path}: no split 'train'; {splits}")
    refused(f"{tmp_path}:prefs", f"{tmp_path}: no split 'prefs'; {splits}")
    refused(f"{tmp_path}:default:train_sft", f"{tmp_path}: only a split may follow it, not default:train_sft")


def test_test_before_validation(tmp_path):
    # red: both mixed; the first in the alphabet
    for name in ("train", "dev", "test", "validation"):
        write(tmp_path / f"{name}.jsonl", name)
    assert texts(tmp_path, "test") == ["test"]
    (tmp_path / "test.jsonl").unlink()
    assert texts(tmp_path, "test") == ["validation"]
    assert texts(f"{tmp_path}:dev", "test") == ["dev"]


def test_an_empty_folder(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path, f"{tmp_path}: no .jsonl, .ndjson, .json, .csv, .tsv, .parquet file in it")


CARD = """---
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/a.jsonl
- config_name: hard
  data_files:
  - split: train
    path: hard/b.jsonl
  - split: test
    path: hard/c.jsonl
---
# A card
"""


def test_a_readme_with_configurations(tmp_path):
    # red: the README not read: every file is for training
    for name in ("easy/a", "hard/b", "hard/c"):
        write(tmp_path / f"{name}.jsonl", name)
    (tmp_path / "README.md").write_text(CARD)
    assert texts(f"{tmp_path}:easy") == ["easy/a"]
    assert texts(f"{tmp_path}:hard", "test") == texts(f"{tmp_path}:hard:test") == ["hard/c"]
    refused(tmp_path, f"{tmp_path}: several configurations; add one of easy, hard after a colon")
    refused(f"{tmp_path}:easy", f"{tmp_path}: no split 'test'; it has train", split="test")
    refused(f"{tmp_path}:none:train", f"{tmp_path}: no configuration 'none'; it has easy, hard")
    (tmp_path / "README.md").write_text("# A card\n")
    assert texts(tmp_path) == ["easy/a", "hard/b", "hard/c"]


def test_what_save_to_disk_wrote(tmp_path):
    # red: the .arrow files not seen; the first split
    rows = [{"text": "a", "unset": None}, {"text": "b", "unset": None}]
    hub.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == ["a", "b"]
    assert next(data.stream(str(tmp_path / "one"), "train")).where == f"{tmp_path}/one[0]"
    refused(f"{tmp_path}/one:test", f"{tmp_path}/one: no split 'test'")
    splits = {"train": hub.Dataset.from_list(rows), "validation": hub.Dataset.from_list(rows[:1])}
    hub.DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "several") == ["a", "b"]
    assert texts(tmp_path / "several", "test") == texts(f"{tmp_path}/several:validation") == ["a"]
    refused(f"{tmp_path}/several:test", f"{tmp_path}/several: no split 'test'; it has train, validation")


def test_a_file_with_splits(tmp_path):
    # red: what stands after the colon ignored
    rows = {"train": [{"text": "a"}], "test": [{"text": "t"}], "validation": [{"text": "v"}]}
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert texts(tmp_path / "a.json") == ["a"]
    for name, text in (("test", "t"), ("validation", "v"), ("train", "a")):
        assert texts(f"{tmp_path}/a.json:{name}") == [text]
    refused(f"{tmp_path}/a.json:train:test", f"{tmp_path}/a.json: only a split may follow it")


def test_a_colon_in_a_name(tmp_path):
    # red: a path split at its colons although it exists
    assert texts(write(tmp_path / "a:b" / "x:1.jsonl", "t")) == texts(tmp_path / "a:b") == ["t"]
    assert texts(write(tmp_path / "data:2" / "a.jsonl", "u").parent) == ["u"]
    assert data.weighted(f"{tmp_path}/data:2") == (f"{tmp_path}/data:2", 1.0)
    assert data.weighted(f"{tmp_path}/data:2:2") == (f"{tmp_path}/data:2", 2.0)
    assert data.weighted(f"{tmp_path}/a:b/x:1.jsonl:2") == (f"{tmp_path}/a:b/x:1.jsonl", 2.0)


# Named datasets.


ASKED = "\n\nHuman: p\n\nAssistant: "
LONG = ASKED + "o\n\nHuman: n\n\nAssistant: "
STRAY = ["\n\nHuman: o" + ASKED, "\n\nAssistant: o" + ASKED, "preamble" + ASKED, "\n\nAssistant: ", ""]
DIRT = {
    "differ": [(ASKED + "a", LONG + "b"), (LONG + "a", LONG.replace("o", "m") + "b")],
    "alternate": [(text + "a", text + "b") for text in STRAY],
    "empty": [(ASKED + " ", ASKED + "b"), (ASKED + "a", ASKED)],
    "": [(LONG.replace("o", "") + "a", LONG.replace("o", "") + "b")],  # an empty turn in the prompt
    "Human": [(ASKED + "a\n\nHuman: o", ASKED + "b\n\nHuman: o")],  # ends with a turn of the human
    "surrogate": [(ASKED + "a\ud83d", ASKED + "b"), (ASKED.replace("p", "\udc00") + "a",) * 2],
}
CLEAN = [(ASKED + "a\n\nmore", ASKED + " b"), (LONG + "f():\n    x", LONG + "b")]
PAIRS = [(turns("p"), ["a\n\nmore", "b"]), (turns("p", "o", "n"), ["f():\n    x", "b"])]
READ_PAIRS = [Example(prompt, answers, [1.0, 0.0]) for prompt, answers in PAIRS]


@pytest.mark.parametrize("kind", DIRT)
def test_hh_counts_each_kind_of_dirt(tmp_path, kind):
    # red: roles by parity; the rejected dialogue's prompt ignored; rows dropped in silence; split="train"
    path = write(tmp_path / "train.jsonl", CLEAN[0], *DIRT[kind])
    write(tmp_path / "test.jsonl", CLEAN[1])
    for source, split in ((path, "train"), (tmp_path, "train"), (tmp_path, "test")):
        examples, dropped = data.load(f"hh={source}", split)
        assert [found._replace(where="") for found in examples] == [READ_PAIRS[split == "test"]]
        assert examples[0].where == f"{tmp_path}/{split}.jsonl:1"
        assert all(kind in reason for reason in dropped)
        assert dropped.total() == len(DIRT[kind]) * (split == "train")
    refused(f"hh={tmp_path}", str(tmp_path), "no split 'other'", split="other")


def test_imdb_from_a_file(tmp_path):
    # red: characters for texts; <br /> kept
    path = write(tmp_path / "a.jsonl", {"text": "A.<br /><br />B. ", "label": 1}, {"text": " ", "label": 0})
    examples, dropped = data.load(f"imdb={path}", "train")
    assert [found[:3] for found in examples] == [([], ["A.\n\nB."], [1.0])] and dropped.total() == 1


def test_a_dataset_is_a_function_with_its_annotation(monkeypatch):
    # red: names kept in a list beside
    def mine(split: str, source: str = "here") -> data.Rows:
        yield Example([], [f"{split} of {source}"], [1.0])
        yield "not wanted"

    before = data.datasets()
    assert {"hh", "imdb"} <= set(before) and not {"published", "rows", "stream", "_hh"} & set(before)
    monkeypatch.setattr(data, "mine", mine, raising=False)
    assert data.datasets() == sorted([*before, "mine"])
    assert texts("mine") == ["train of here"] and texts("mine=there", "test") == ["test of there"]
    assert data.load("mine", "train")[1] == {"not wanted": 1}


# What stands after a source.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("hh:0.5", ("hh", 0.5)),
        ("rows.jsonl:2", ("rows.jsonl", 2.0)),
        ("org/name:config:train:.25", ("org/name:config:train", 0.25)),
        ("hh=place:1.", ("hh=place", 1.0)),
        ("rows.jsonl", ("rows.jsonl", 1.0)),
        ("org/name:train", ("org/name:train", 1.0)),
        ("hh:100", ("hh", 100.0)),
    ],
)
def test_weights(source, found):
    assert data.weighted(source) == found


@pytest.mark.parametrize("source", ["hh:0", "hh:0.0", "hh:100.5", "rows.jsonl:1000"])
def test_weights_out_of_range(source):
    with pytest.raises(ValueError, match=f"^--data {source}: a weight must be > 0 and <= 100$"):
        data.weighted(source)


def test_what_is_held_out():
    # red: a weighted share of a test split, which would change with --seed
    assert data.held_out(["hh:0.5", "rows.jsonl", "imdb=place:2"], None) == ["hh", "imdb=place"]
    assert data.held_out(["hh"], ["a.jsonl:0.5", "b"]) == ["a.jsonl:0.5", "b"]
    assert data.held_out(["rows.jsonl"], None) == []


def test_the_state_of_a_source(tmp_path):
    # red: the name alone; the folder's own time
    path = write(tmp_path / "d" / "train.jsonl", "a")
    sources = [str(path), str(tmp_path / "d"), f"{tmp_path}/d:train", f"hh={path}"]
    before = [data.state(source, "train") for source in sources]
    assert len(set(before)) == 4 and before == [data.state(source, "train") for source in sources]
    os.utime(path, ns=(1, 1))
    touched = [data.state(source, "train") for source in sources]
    assert not set(touched) & set(before)
    write(path, "ab")
    os.utime(path, ns=(1, 1))
    assert not set(touched) & {data.state(source, "train") for source in sources}
