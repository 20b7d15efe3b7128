"""The cache of encoded rows against encoding them one by one. `red:` names a change that turns a test red."""

import functools
import json
import os
import random
import threading

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
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
    thinned = whole.only(batch.thin(whole.labels, 3, keep_desirable=good, keep_undesirable=bad))
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


# ---- gathered by prompt


ANSWER = st.tuples(st.lists(st.integers(5, 9), min_size=1, max_size=4), st.integers(0, 2))  # ids, score
ROW = st.tuples(st.integers(0, 4), st.lists(ANSWER, min_size=1, max_size=5))  # prompt, answers
ROWS = st.lists(ROW, min_size=1, max_size=12)


def stored(rows, **options):
    examples = []
    for prompt, answers in rows:
        scores = [float(score) for _, score in answers]
        masks = [[True] * len(ids) for ids, _ in answers]
        row = data.Encoded([1] * prompt, [ids for ids, _ in answers], masks, scores, **options)
        examples.append(row._replace(labels=data.desirable(scores)))
    flat = store._flat(examples)
    return store.Store(flat._replace(first=np.concatenate([[0], flat.first]))), examples


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(rows=ROWS)
def test_rows_of_one_prompt_become_one_list(rows):
    """Against a loop over a dictionary. red: an unstable sort; prompts in the order of their keys; labels
    made anew of all the scores; the prompt of a row left among the completions"""
    flat, examples = stored(rows)
    lists = {}
    for example in examples:
        mine = lists.setdefault(tuple(example.prompt), [[], [], [], []])
        for all_, own in zip(mine, (example.completions, example.trained, example.scores, example.labels)):
            all_ += own
    expected = [
        data.Encoded(list(prompt), answers, trained, scores, labels=labels)
        for prompt, (answers, trained, scores, labels) in lists.items()
    ]
    found = flat.by_prompt()
    assert list(found) == expected
    assert found.lengths.tolist() == [example.tokens for example in expected]
    assert found.arrays.prompts.tolist() == [example.prompt_key for example in expected]
    assert found.arrays.ids is flat.arrays.ids  # no copy of the tokens
    assert list(found.by_prompt()) == expected


def test_a_list_has_one_weight_and_no_margin():
    rows = [(1, [([5], 1)]), (2, [([6], 0)]), (1, [([7], 0)])]
    assert stored(rows, weight=0.5, margin=0.3)[0].by_prompt().arrays.weights.tolist() == [0.5, 0.5]
    assert not stored(rows, margin=0.3)[0].by_prompt().arrays.margins.any()
    mixed = stored(rows)[0]
    mixed.arrays.weights[2] = 2.0
    with pytest.raises(ValueError, match="different weights"):
        mixed.by_prompt()
    mixed.arrays.weights[1:] = (2.0, 1.0)  # of another prompt
    assert mixed.by_prompt().arrays.weights.tolist() == [1.0, 2.0]


def test_what_a_loss_learns_from_is_chosen_and_the_rest_counted():
    # red: offsets of the whole store; the same answer twice compared with itself
    flat, _ = stored([(1, [([5], 2), ([6], 0), ([7], 1)]), (2, [([5], 1)]), (3, [([5, 6], 1), ([5, 6], 0)])])
    assert [flat.alike(index, 0, 1) for index in (0, 2)] == [False, True]
    answers = {0: [0, 1], 1: "alone", 2: "alike"}
    found, words = flat.chosen(lambda index, scores: answers[index])
    assert [(row.completions, row.scores) for row in found] == [([[5], [6]], [2.0, 0.0])]
    assert words == "1 left out: alone; 1 left out: alike"
    assert flat.chosen(lambda index, scores: range(len(scores))) == (flat, "")
    with pytest.raises(ValueError, match=r"no example is left \(3 left out: none\)"):
        flat.chosen(lambda index, scores: "none")


def test_whole_conversations_are_gathered_by_the_text_of_their_prompt(tokenizer, tmp_path):
    """What ids two conversations share depends on both answers: no row alone can say."""
    rows = [{"prompt": "q", "completions": [text], "scores": [len(text)]} for text in ("a", "a b", "c")]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row | {"prompt": p}) + "\n" for p in "qr" for row in rows))
    found = load(str(source), tmp_path / "c", tokenizer, data.usable_feedback, data.encode_whole).by_prompt()
    read = one_by_one(str(source), tokenizer, data.usable_feedback, data.encode_rendered)
    whole = [row.prompt + row.completions[0] for row in read]
    assert [row.completions for row in found] == [whole[:3], whole[3:]]
    assert [row.prompt for row in found] == [[], []] and found[1].scores == [1.0, 3.0, 1.0]
    assert [mask[:2] for mask in found[0].trained] == [[False, True]] * 3
