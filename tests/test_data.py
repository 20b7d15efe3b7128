"""Readers, encode, pack and plan against oracles written from what they promise: loops over characters, tokens.

The tokenizer is that of examples/tiny: byte-level, ChatML turns ended by <|im_end|>. A comment `red:` names a
one-line change of data.py that turns a test red.
"""
import copy
import gzip
import json
import random
import re

import datasets as hub
import pytest
import torch
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import data

END = 2  # <|im_end|>
OWN = ("the tokenizer's own", None)
PLAIN = ("plain", data.PLAIN)
RAW = ("raw", data.RAW)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")


def turns(*contents, system=None):
    """User and assistant in turn, after a system turn if there is one."""
    opening = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(contents)
    return opening + [{"role": role, "content": content} for role, content in zip(roles, contents)]


def example(prompt, *completions):
    return data.Example(prompt, list(completions), [float(-rank) for rank in range(len(completions))], where="f:7")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Readers.

USER = turns("q")
ANSWER = [{"role": "assistant", "content": "a"}]
CHAT = turns("q", "a", "r", "b", system="s")
LIST = {"prompt": "q", "completions": ["a", "b", ANSWER], "scores": [1, -2.5, 3]}
FORMS = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, (USER, ["a", "b"], [1.0, 0.0])),
    ({"prompt": USER, "chosen": ANSWER, "rejected": "b", "weight": 2}, (USER, ["a", "b"], [1.0, 0.0], 2.0)),
    ({"prompt": "", "chosen": "a", "rejected": "b", "margin": 0.5}, ([], ["a", "b"], [1.0, 0.0], 1.0, 0.5)),
    (LIST, (USER, ["a", "b", "a"], [1.0, -2.5, 3.0])),
    ({"prompt": CHAT[:4], "completion": " b\n"}, (CHAT[:4], [" b\n"], [1.0])),
    ({"messages": CHAT}, (CHAT[:2], [CHAT[2:]], [1.0])),
    ({"text": "  two\n\u2028lines 🙂 "}, ([], ["  two\n\u2028lines 🙂 "], [1.0])),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_every_form_in_every_container(tmp_path, name):
    # red: str.splitlines() on the file; a blank line that is not counted
    rows = [json.dumps(row, ensure_ascii=False) for row, _ in FORMS]
    lines = ".jsonl" in name
    raw = ("\r\n\r\n".join(rows) if lines else f"[{','.join(rows)}]").encode("utf-8")
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    places = [f"{path}:{2 * i + 1}" if lines else f"{path}[{i}]" for i in range(len(FORMS))]
    expected = [data.Example(*fields)._replace(where=place) for (_, fields), place in zip(FORMS, places)]
    assert data.load(str(path), "train") == (expected, {})


def row(**change):
    return json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"} | change).encode()


def ranked(**change):
    return json.dumps({"prompt": "q", "completions": ["a"], "scores": [1]} | change).encode()


MISTAKES = {  # what the message must hold: rows
    "not JSON": [b"{'prompt': 'q'}", b"{"],
    "UTF-8": [row().replace(b"q", b"\xff")],
    "object": [b"[1]", b'"q"'],
    '"prompt': [b'{"chosen": "a", "rejected": "b"}', row(prompt=1), row(prompt=None)],
    '"chosen': [row(chosen=1), row(chosen=""), row(chosen=USER), row(chosen=turns("q", "a")), row(chosen="\ud83d")],
    '"rejected': [b'{"prompt": "q", "chosen": "a"}', row(rejected=" \n")],
    '"text': [b'{"text": ["a"]}', b'{"text": ""}'],
    "prompt[0]": [row(prompt=["q"]), row(prompt=[{"role": "user"}]), row(prompt=turns(""))],
    "content": [row(prompt=[{"role": "user", "text": "q"}])],
    '"bot"': [row(prompt=[{"role": "bot", "content": "q"}])],
    "assistant": [json.dumps({"messages": USER}).encode()],
    '"weight': [row(weight=value) for value in (float("nan"), float("inf"), -1, "1", True, None, 10**400)],
    '"margin': [row(margin=float("nan"))],
    "scores": [ranked(scores=value) for value in ([1, 2], [], [float("nan")], ["1"], 1)],
    "completions": [ranked(completions=value) for value in ([""], [1], "a")] + [ranked(completions=[], scores=[])],
}


def refused(source, *words, split="train"):
    """One line that starts with the first of the words and holds the others."""
    with pytest.raises(ValueError) as caught:
        data.load(str(source), split)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(words[0])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("word", "content"), [(word, bad) for word, rows in MISTAKES.items() for bad in rows])
def test_a_mistake_is_named_with_its_line(tmp_path, word, content):
    # red: any check of _example, _turns, _string or _number left out; `number = 1` before the loop
    path = tmp_path / "a.jsonl"
    path.write_bytes(row() + b"\n\n" + content + b"\n" + row())
    refused(path, f"{path}:3: ", word)


FILES = [
    ("none.jsonl", None),
    ("blank.jsonl", b"\n \n"),
    ("empty.json", b"[]"),
    ("object.json", row()),
    ("lines.json", row() + b"\n" + row()),
    ("plain.jsonl.gz", row()),
    ("cut.jsonl.gz", gzip.compress(row() * 50)[:-9]),
]


@pytest.mark.parametrize(("name", "content"), FILES, ids=[name for name, _ in FILES])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, str(tmp_path / name))


@pytest.mark.parametrize("source", ["a.txt", "imbd", "hh=/no/such/place", "hh=no/such/file.jsonl"])
def test_a_source_that_is_not_there(source):
    refused(source, source.removeprefix("hh="))


def published(chosen, rejected):
    """Contents of Human and Assistant in turn, or a whole text."""
    texts = []
    for side in (chosen, rejected):
        spoken = zip(["Human", "Assistant"] * 9, [side] if isinstance(side, str) else side)
        texts.append(side if isinstance(side, str) else "".join(f"\n\n{who}: {what}" for who, what in spoken))
    return dict(zip(("chosen", "rejected"), texts))


PARITY = "\n\nHuman: p\n\nHuman: o\n\nAssistant: "
STRAY = ["\n\nAssistant: o\n\nHuman: p\n\nAssistant: ", "preamble\n\nHuman: p\n\nAssistant: ", "\n\nAssistant: ", ""]
DIRT = {
    "differ": [published(["p", "a"], ["o", "b"]), published(["p", "a", "o", "b"], ["p", "b", "o", "b"])],
    "alternate": [published(text + "a", text + "b") for text in [PARITY, *STRAY]],
    "empty": [published(["p", " "], ["p", "b"]), published(["p", "a"], ["p", ""])],
    "": [published(["p", " ", "o", "a"], ["p", " ", "o", "b"])],  # an empty turn
    "Human": [published(["p", "a", "o"], ["p", "b", "o"])],  # ends with a turn of the human
}
CLEAN = [published([" p? ", "a\n\nmore"], [" p? ", " b"]), published(["p", "o", "n", "f():\n    x"], ["p", "o", "n", "b"])]
READ = [(turns("p?"), ["a\n\nmore", "b"]), (turns("p", "o", "n"), ["f():\n    x", "b"])]


@pytest.mark.parametrize("kind", DIRT)
def test_hh_counts_each_kind_of_dirt(tmp_path, kind):
    # red: roles by parity; the rejected dialogue's prompt ignored; rows dropped in silence
    path = write(tmp_path / "hh.jsonl", CLEAN[:1] + DIRT[kind] + CLEAN[1:])
    examples, dropped = data.load(f"hh={path}", "train")
    assert [(found.prompt, found.completions) for found in examples] == READ
    assert all(found.scores == [1.0, 0.0] for found in examples)
    assert sum(dropped.values()) == len(DIRT[kind]) and all(kind in reason for reason in dropped)


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
    # red: characters for texts; <br /> kept
    path = write(tmp_path / "imdb.jsonl", [{"text": text} | extra for text in ("Good.<br /><br />Very. ", " ")])
    examples, dropped = data.load(f"imdb={path}", "train")
    assert [tuple(found)[:3] for found in examples] == [([], ["Good.\n\nVery."], [1.0])]
    assert sum(dropped.values()) == 1


@pytest.mark.parametrize("name", ["hh", "imdb"])
def test_a_file_of_another_dataset(tmp_path, name):
    path = write(tmp_path / "other.jsonl", [{"question": "q"}])
    refused(f"{name}={path}", f"{path}:1: ")


# Encode.
