"""Readers, encode, pack and plan against oracles written from what they promise: loops over characters and tokens.

The tokenizer is that of examples/tiny: byte-level, ChatML turns ended by <|im_end|>. A comment `red:` names a
one-line change of data.py that turns a test red.
"""
import copy
import gzip
import json
import random
from collections import Counter

import datasets as hub
import pytest
import torch
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import data

TINY = ROOT / "examples" / "tiny"
BOS, END = 0, 2  # <|endoftext|>, which is free, and <|im_end|>
OWN = ("the tokenizer's own", None)
PLAIN = ("plain", data.PLAIN)
RAW = ("raw", data.RAW)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def turns(*contents, system=None):
    """User and assistant in turn, after a system turn if there is one."""
    roles = ["user", "assistant"] * len(contents)
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": role, "content": content} for role, content in zip(roles, contents)]


def example(prompt, *completions):
    """A string is one user turn."""
    prompt = turns(prompt) if isinstance(prompt, str) else prompt
    return data.Example(prompt, list(completions), [float(-rank) for rank in range(len(completions))])


# Readers.

USER = turns("q")
ANSWER = [{"role": "assistant", "content": "a"}]
CHAT = turns("q", "a", "r", "b", system="s")
FORMS = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, (USER, ["a", "b"], [1.0, 0.0])),
    ({"prompt": USER, "chosen": ANSWER, "rejected": "b", "weight": 2}, (USER, ["a", "b"], [1.0, 0.0], 2.0)),
    ({"prompt": "", "chosen": "a", "rejected": "b", "margin": 0.5}, ([], ["a", "b"], [1.0, 0.0], 1.0, 0.5)),
    ({"prompt": "q", "completions": ["a", "b", ANSWER], "scores": [1, -2.5, 3]}, (USER, ["a", "b", "a"], [1.0, -2.5, 3.0])),
    ({"prompt": CHAT[:4], "completion": " b\n"}, (CHAT[:4], [" b\n"], [1.0])),
    ({"prompt": "q", "completion": ANSWER, "other": 1}, (USER, ["a"], [1.0])),
    ({"messages": CHAT}, (CHAT[:2], [CHAT[2:]], [1.0])),
    ({"text": "  two\n\u2028lines 🙂 "}, ([], ["  two\n\u2028lines 🙂 "], [1.0])),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_every_form_in_every_container(tmp_path, name):
    # red: str.splitlines() on the file; indices that start at 1 in a list; a blank line that is not counted
    rows = [json.dumps(row, ensure_ascii=False) for row, _ in FORMS]
    lines = ".jsonl" in name
    content = "\r\n\r\n".join(rows) if lines else f"[{','.join(rows)}]"
    raw = content.encode("utf-8")
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    examples, dropped = data.load(str(path), "train")
    places = [f"{path}:{2 * i + 1}" if lines else f"{path}[{i}]" for i in range(len(FORMS))]
    assert examples == [data.Example(*fields)._replace(where=place) for (_, fields), place in zip(FORMS, places)]
    assert not dropped


def row(**change):
    return json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"} | change).encode()


ERRORS = {
    "not JSON": (b"{'prompt': 'q'}", "not JSON"),
    "not UTF-8": (row().replace(b"q", b"\xff"), "UTF-8"),
    "half a character": (row(chosen="\ud83d"), "chosen"),
    "not an object": (b"[1]", "object"),
    "missing prompt": (b'{"chosen": "a", "rejected": "b"}', '"prompt"'),
    "missing rejected": (b'{"prompt": "q", "chosen": "a"}', '"rejected"'),
    "missing scores": (b'{"prompt": "q", "completions": ["a"]}', '"scores"'),
    "prompt a number": (row(prompt=1), "prompt"),
    "chosen a number": (row(chosen=1), "chosen"),
    "text a list": (b'{"text": ["a"]}', "text"),
    "empty chosen": (row(chosen=""), "empty"),
    "blank rejected": (row(rejected=" \n"), "empty"),
    "empty text": (b'{"text": ""}', "empty"),
    "empty turn": (row(prompt=turns("")), "empty"),
    "empty among completions": (b'{"prompt": "q", "completions": ["a", ""], "scores": [1, 0]}', "completions[1]"),
    "unknown role": (row(prompt=[{"role": "bot", "content": "q"}]), "bot"),
    "turn without content": (row(prompt=[{"role": "user"}]), "content"),
    "turn with another key": (row(prompt=[{"role": "user", "text": "q"}]), "content"),
    "turn a string": (row(prompt=["q"]), "prompt[0]"),
    "answer of two turns": (row(chosen=turns("q", "a")), "chosen"),
    "answer of the user": (row(chosen=USER), "chosen"),
    "nothing to train on": (json.dumps({"messages": USER}).encode(), "assistant"),
    "NaN weight": (row(weight=float("nan")), "weight"),
    "infinite margin": (row(margin=float("inf")), "margin"),
    "huge weight": (row(weight=10**400), "weight"),
    "negative weight": (row(weight=-1), "weight"),
    "weight a string": (row(weight="1"), "weight"),
    "weight a bool": (row(weight=True), "weight"),
    "NaN score": (b'{"prompt": "q", "completions": ["a"], "scores": [NaN]}', "scores[0]"),
    "more scores": (b'{"prompt": "q", "completions": ["a"], "scores": [1, 2]}', "scores"),
    "no completions": (b'{"prompt": "q", "completions": [], "scores": []}', "completions"),
}


def refused(source, *words, split="train"):
    """One line that starts with the words' first and holds the others."""
    with pytest.raises(ValueError) as caught:
        data.load(str(source), split)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(words[0])
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_named_with_its_line(tmp_path, name):
    # red: enumerate without the 1; any check of _example, _turns, _string or _number left out
    content, word = ERRORS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(row() + b"\n\n" + content + b"\n" + row())
    refused(path, f"{path}:3: ", word)


FILES = {
    "no file": ("a.jsonl", None),
    "no rows": ("a.jsonl", b"\n \n"),
    "empty list": ("a.json", b"[]"),
    "no list": ("a.json", row()),
    "lines in .json": ("a.json", row() + b"\n" + row()),
    "not gzip": ("a.jsonl.gz", row()),
    "cut gzip": ("a.jsonl.gz", gzip.compress(row() * 50)[:-9]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    path = tmp_path / FILES[name][0]
    if FILES[name][1] is not None:
        path.write_bytes(FILES[name][1])
    refused(path, f"{path}: " if name != "cut gzip" else str(path))


@pytest.mark.parametrize("source", ["a.txt", "imbd", "hh=/no/such/place", "hh=no/such.jsonl/file"])
def test_a_source_that_is_not_there(source):
    refused(source, source.removeprefix("hh="))


# Named datasets.


def dialogue(*contents):
    speakers = ["Human", "Assistant"] * len(contents)
    return "".join(f"\n\n{speaker}: {content}" for speaker, content in zip(speakers, contents))


def published(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


DIRT = {
    "differ": [published(dialogue("p", "a"), dialogue("o", "b"))],
    "alternate": [
        published("\n\nHuman: p\n\nHuman: o\n\nAssistant: a", "\n\nHuman: p\n\nHuman: o\n\nAssistant: b"),
        published("\n\nAssistant: o" + dialogue("p", "a"), "\n\nAssistant: o" + dialogue("p", "b")),
        published("preamble" + dialogue("p", "a"), "preamble" + dialogue("p", "b")),
        published("\n\nAssistant: a", "\n\nAssistant: b"),
        published("", ""),
        published(dialogue("p", " ", "o", "a"), dialogue("p", " ", "o", "b")),
    ],
    "empty": [published(dialogue("p", " "), dialogue("p", "b")), published(dialogue("p", "a"), dialogue("p", ""))],
    "ends with Human": [published(dialogue("p", "a", "o"), dialogue("p", "b", "o"))],
}
CLEAN = [
    published(dialogue(" p? ", "a\n\nmore"), dialogue("p?", " b")),
    published(dialogue("p", "o", "n", "def f():\n    pass"), dialogue("p", "o", "n", "b")),
]
READ = [(turns("p?"), ["a\n\nmore", "b"]), (turns("p", "o", "n"), ["def f():\n    pass", "b"])]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", DIRT)
def test_hh_counts_each_kind_of_dirt(tmp_path, kind):
    # red: roles by parity; the rejected dialogue's prompt ignored; rows dropped in silence
    path = write(tmp_path / "hh.jsonl", CLEAN[:1] + DIRT[kind] + CLEAN[1:])
    examples, dropped = data.load(f"hh={path}", "train")
    assert [(found.prompt, found.completions) for found in examples] == READ
    assert all(found.scores == [1.0, 0.0] for found in examples)
    assert sum(dropped.values()) == len(DIRT[kind])
    assert kind == "ends with Human" or all(kind in reason for reason in dropped)


def test_hh_from_a_directory(tmp_path, monkeypatch):
    # red: split="train" whatever is asked for
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "hh"
    place.mkdir()
    write(place / "train.jsonl", CLEAN[:1] + DIRT["empty"])
    write(place / "test.jsonl", CLEAN[1:])
    for split, expected, left_out in (("train", READ[:1], 2), ("test", READ[1:], 0)):
        examples, dropped = data.load(f"hh={place}", split)
        assert [(found.prompt, found.completions) for found in examples] == expected
        assert sum(dropped.values()) == left_out
    refused(f"hh={place}", str(place), "validation", split="validation")


@pytest.mark.parametrize("extra", [{}, {"label": 1}], ids=["text", "with the published label"])
def test_imdb_from_a_file(tmp_path, extra):
    # red: `generations.extend(text)`, which adds characters; <br /> kept
    path = write(tmp_path / "imdb.jsonl", [{"text": text} | extra for text in ("Good.<br /><br />Very. ", " ")])
    examples, dropped = data.load(f"imdb={path}", "train")
    assert [tuple(found)[:3] for found in examples] == [([], ["Good.\n\nVery."], [1.0])]
    assert sum(dropped.values()) == 1


@pytest.mark.parametrize("name", ["hh", "imdb"])
def test_a_file_of_another_dataset(tmp_path, name):
    path = write(tmp_path / "other.jsonl", [{"question": "q"}])
    refused(f"{name}={path}", f"{path}:1: ")
