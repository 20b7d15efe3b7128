"""The cache of encoded rows against encoding them one by one. `red:` names a change that turns a test red."""

import functools
import json
import os
import random
import threading

import numpy as np
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import batch
import data
import store

PAIRS = functools.partial(data.usable_pair, pairs="best-worst")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")


def write(path, number, seed=0):
    rng = random.Random(seed)
    rows = []
    for index in range(number):
        texts = ["".join(rng.choices("abc é🙂", k=rng.randrange(1, 40))) + "x" for _ in range(3)]
        row = {"prompt": texts[0], "chosen": texts[1], "rejected": texts[2] if index % 5 else texts[1]}
        rows.append(row | ({"weight": 0.5, "margin": 1.5} if index % 3 == 0 else {}))
    rows.append({"prompt": "ranked", "completions": ["u", "vv", "www"], "scores": [0.5, -2, 1.25]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source, cache, tokenizer, select=PAIRS, encoder=data.encode, lengths=(64, 32), say=None):
    template = data.chat_template(tokenizer, None)
    return store.load(
        source, "train", select, encoder, tokenizer, template, *lengths, str(cache), say or (lambda text: None)
    )


def one_by_one(source, tokenizer, select=PAIRS, encoder=data.encode, lengths=(64, 32)):
    template = data.chat_template(tokenizer, None)
    selected = [select(example) for example in data.load(source, "train")[0]]
    encoded = [encoder(e, tokenizer, *lengths, template) for e in selected if not isinstance(e, str)]
    return [found for found in encoded if not isinstance(found, str)]


@pytest.mark.parametrize(
    ("select", "encoder"),
    [(PAIRS, data.encode), (data.usable_feedback, data.encode), (PAIRS, data.encode_rendered)],
)
def test_what_is_stored_is_what_encode_says(tokenizer, tmp_path, select, encoder):
    # red: the prompt's mask forgotten; scores of the next piece; int16 ids
    source = write(tmp_path / "a.jsonl", 30)
    found = load(source, tmp_path / "c", tokenizer, select, encoder)
    expected = one_by_one(source, tokenizer, select, encoder)
    assert list(found) == expected and len(found) > 10
    assert found.lengths.tolist() == [example.tokens for example in expected]
    assert list(found.scores) == [example.scores for example in expected]
    assert (found.arrays.prompts == [example.prompt_key for example in expected]).all()
    with pytest.raises(IndexError):
        found[len(found)]


def test_conversations_keep_their_masks(tokenizer, tmp_path):
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    found = load(str(source), tmp_path / "c", tokenizer, data.best_completion)
    assert list(found) == one_by_one(str(source), tokenizer, data.best_completion)
    assert 0 < sum(found[0].trained[0]) < len(found[0].trained[0])


def test_more_rows_than_one_process_takes(tokenizer, tmp_path, monkeypatch):
    # red: chunks in the order in which they are done; offsets that start again with every chunk
    monkeypatch.setattr(store, "CHUNK", 3)
    monkeypatch.setattr(store, "INLINE", 2)
    source = write(tmp_path / "a.jsonl", 40)
    said = []
    found = load(source, tmp_path / "c", tokenizer, say=said.append)
    assert list(found) == one_by_one(source, tokenizer)
    assert any("processes" in line for line in said) and "8 left out: chosen and rejected" in said[-2]


def test_a_bad_row_in_another_process_is_the_users_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 3)
    monkeypatch.setattr(store, "INLINE", 1)
    source = tmp_path / "a.jsonl"
    write(source, 20)
    with open(source, "a", encoding="utf-8") as file:
        file.write('{"prompt": "q"}\n')
    with pytest.raises(ValueError, match=r'a.jsonl:22: missing "chosen"'):
        load(str(source), tmp_path / "c", tokenizer)
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".lock"]


def test_rows_are_read_as_they_are_needed(tokenizer, tmp_path, monkeypatch):
    # red: all rows read before the first is encoded
    monkeypatch.setattr(store, "CHUNK", 4)
    read = 0

    def rows():
        nonlocal read
        for example in data.read(write(tmp_path / "a.jsonl", 24)):
            read += 1
            yield example

    flags = (tokenizer, 64, 32, data.chat_template(tokenizer, None))
    for number, _ in enumerate(store._encoded(rows(), (PAIRS, data.encode, flags), print)):
        assert read <= 4 * (number + 1)


def test_a_second_run_reads_nothing(tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", 10)
    first = load(source, tmp_path / "c", tokenizer)
    monkeypatch.setattr(data, "stream", lambda *_: pytest.fail("read again"))
    said = []
    assert list(load(source, tmp_path / "c", tokenizer, say=said.append)) == list(first)
    assert "2 left out: chosen and rejected are the same" in said[0]
    assert isinstance(first.arrays.ids, np.memmap)


def test_whatever_the_ids_depend_on_makes_another_cache(tokenizer, tmp_path):
    # red: any line of _name left out
    source = write(tmp_path / "a.jsonl", 10)
    cache = tmp_path / "c"
    folders = lambda: len([path for path in cache.iterdir() if path.is_dir()])  # noqa: E731
    load(source, cache, tokenizer)
    load(source, cache, tokenizer, lengths=(64, 31))
    assert folders() == 2
    load(source, cache, tokenizer, select=functools.partial(data.usable_pair, pairs="all"))
    assert folders() == 3
    load(source, cache, tokenizer, encoder=data.encode_rendered)
    assert folders() == 4
    other = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")
    other.add_tokens(["abc"])
    load(source, cache, other)
    assert folders() == 5
    write(tmp_path / "a.jsonl", 10, seed=1)
    assert list(load(source, cache, tokenizer)) == one_by_one(source, tokenizer)
    assert folders() == 6
    os.utime(source, ns=(1, 1))
    load(source, cache, tokenizer)
    assert folders() == 7


@pytest.mark.parametrize("name", ["ids", "labels", "about.json"])
def test_a_damaged_cache_is_made_again(tokenizer, tmp_path, name):
    # red: _complete that only looks for the directory
    source = write(tmp_path / "a.jsonl", 10)
    expected = list(load(source, tmp_path / "c", tokenizer))
    place = next(path for path in (tmp_path / "c").iterdir() if path.is_dir())
    place.with_suffix(".tmp").mkdir()  # of a killed writer
    with open(place / name, "rb+") as file:
        file.truncate(3)
    assert list(load(source, tmp_path / "c", tokenizer)) == expected


def test_processes_that_ask_at_once_wait_for_the_first(tokenizer, tmp_path, monkeypatch):
    # red: the lock taken after the look
    source = write(tmp_path / "a.jsonl", 10)
    written = []
    write_it = store._write

    def slowly(place, rows, encode, say):
        written.append(place)
        threading.Event().wait(0.3)
        write_it(place, rows, encode, say)

    monkeypatch.setattr(store, "_write", slowly)
    threads = [threading.Thread(target=load, args=(source, tmp_path / "c", tokenizer)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1


def test_nothing_left_is_an_error_that_says_why(tokenizer, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}\n')
    with pytest.raises(ValueError, match="no example is left .*chosen and rejected are the same"):
        load(str(source), tmp_path / "c", tokenizer)


@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (0.3, 0.2)])
def test_thinned_examples_keep_what_is_theirs(tokenizer, tmp_path, good, bad):
    # red: labels made anew from what is left; examples without completions kept; offsets of the whole store
    source = write(tmp_path / "a.jsonl", 30)
    whole = load(source, tmp_path / "c", tokenizer, data.usable_feedback)
    thinned = whole.only(functools.partial(batch.thin, seed=3, keep_desirable=good, keep_undesirable=bad))
    flat = np.array([label for example in whole for label in example.labels])
    stays = iter(batch.thin(flat, 3, keep_desirable=good, keep_undesirable=bad).tolist())
    expected = []
    for example in whole:
        wanted = [j for j in range(len(example.labels)) if next(stays)]
        lists = (example.completions, example.trained, example.scores)
        lists = [[values[j] for j in wanted] for values in lists]
        labels = [example.labels[j] for j in wanted]
        if wanted:
            expected.append(data.Encoded(example.prompt, *lists, example.weight, example.margin, labels))
    assert list(thinned) == expected
    assert thinned.lengths.tolist() == [example.tokens for example in expected]
