"""The cache of encoded rows against encoding them one by one; what is said of the rows; arrays.Store.

`red:` names a change of store.py or arrays.py that turns a test red.
"""

import functools
import json
import os
import random
import re
import socket
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import arrays
import batch
import chat
import data
import encode
import files
import formats
import ranking
import store
import values
from formats import Example, Fault

PAIRS = functools.partial(ranking.usable_pair, pairs="best-worst")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")


def bare(examples):
    """Without where their tokens are stored."""
    return [example._replace(places=[]) for example in examples]


def kept(examples):
    """As a store."""
    flat = store._flat(examples)
    return arrays.Store(flat._replace(first=np.concatenate([[0], flat.first])))


def pair(**change):
    return {"prompt": "q", "chosen": "a", "rejected": "b"} | change


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(number, seed=0):
    """Rows with pairs of odd texts, some of whose answers are the same, and a ranked list."""
    rng = random.Random(seed)
    rows = []
    for index in range(number):
        texts = ["".join(rng.choices("abc é🙂", k=rng.randrange(1, 40))) + "x" for _ in range(3)]
        row = {"prompt": texts[0], "chosen": texts[1], "rejected": texts[2] if index != 7 else texts[1]}
        rows.append(row | ({"weight": 0.5, "margin": 1.5} if index % 3 == 0 else {}))
    rows.append({"prompt": "ranked", "completions": ["u", "vv", "www"], "scores": [0.5, -2, 1.25]})
    return rows


def write(path, number, seed=0):
    return lines(path, rows_of(number, seed))


def encoding(tokenizer, select=PAIRS, encoder=encode.encode, lengths=(64, 32), choice=None):
    return store.Encoding(select, encoder, tokenizer, *lengths, chat.chat_template(tokenizer, choice))


def load(sources, cache, tokenizer, say=None, strict=False, seed=0, split="train", **how):
    sources = [sources] if isinstance(sources, str) else sources
    options = {"cache": str(cache), "strict": strict, "seed": seed, "say": say or (lambda text: None)}
    return store.load(sources, split, encoding(tokenizer, **how), **options)


def one_by_one(source, tokenizer, select=PAIRS, encoder=encode.encode, lengths=(64, 32)):
    template = chat.chat_template(tokenizer, None)
    selected = [select(example) for example in data.load(source, "train")[0]]
    encoded = [encoder(e, tokenizer, *lengths, template) for e in selected if not isinstance(e, str)]
    groups = [[found] if isinstance(found, encode.Encoded) else found for found in encoded]
    return [group for found in groups if not isinstance(found, str) for group in found]


def about(cache):
    """What the one cache in a directory says of itself."""
    (path,) = cache.glob("*/about.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("select", "encoder"),
    [
        (PAIRS, encode.encode),
        (ranking.usable_feedback, encode.encode),
        (PAIRS, encode.encode_rendered),
        (ranking.best_completion, encode.encode_turns),
    ],
)
def test_what_is_stored_is_what_encode_says(tokenizer, tmp_path, select, encoder):
    # red: the prompt's mask forgotten; scores of the next piece; int16 ids
    source = write(tmp_path / "a.jsonl", 30)
    found = load(source, tmp_path / "c", tokenizer, select=select, encoder=encoder, lengths=(128, 64))
    expected = one_by_one(source, tokenizer, select, encoder, (128, 64))
    assert bare(found) == expected and len(found) > 10
    assert found.lengths.tolist() == [example.tokens for example in expected]
    assert found.scores.tolist() == [score for example in expected for score in example.scores]
    assert (found.arrays.prompts == [example.prompt_key for example in expected]).all()
    with pytest.raises(IndexError):
        found[len(found)]


def test_conversations_keep_their_masks(tokenizer, tmp_path):
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    source = lines(tmp_path / "a.jsonl", [{"messages": turns}, {"text": "plain"}])
    how = {"select": ranking.best_completion, "encoder": encode.encode_turns}
    found = load(source, tmp_path / "c", tokenizer, **how)
    assert bare(found) == one_by_one(source, tokenizer, **how)
    assert 0 < sum(found[0].trained[0]) < len(found[0].trained[0])


HIDES = "{% for m in messages %}<{{ m.role }}>"
HIDES += "{{ '-' if m.role == 'assistant' and not loop.last else m.content }}{{ eos_token }}{% endfor %}"
HIDES += "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_row_may_be_several_groups(tokenizer, tmp_path):
    # red: rows counted by their groups; the first group alone kept
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    (tmp_path / "a.jinja").write_text(HIDES)
    source = lines(tmp_path / "a.jsonl", [{"messages": turns}, {"text": "plain"}])
    how = {
        "select": ranking.best_completion,
        "encoder": encode.encode_turns,
        "choice": str(tmp_path / "a.jinja"),
    }
    found = load(source, tmp_path / "c", tokenizer, **how)
    assert len(found) == 3 and about(tmp_path / "c")["rows"] == 2


def test_more_rows_than_one_process_takes(tokenizer, tmp_path, monkeypatch):
    # red: chunks in the order in which they are done; offsets that start again with every chunk; the first
    # place of a reason that of the last chunk; counts of the first chunk alone; a process a core where there are many
    source = write(tmp_path / "a.jsonl", 60)
    rows = [json.loads(line) for line in open(source, encoding="utf-8")]
    for index in (12, 40, 55):
        rows[index]["chosen"] = " "
    rows[33]["chosen"] = "a<|im_end|>"
    rows[47] = {"prompt": "q", "completion": "a", "extra": 1}
    lines(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(store, "_report", lambda *_: None)
    monkeypatch.setattr(store, "WORKERS", 2)
    monkeypatch.setattr(store.os, "sched_getaffinity", lambda _: range(99))
    told, abouts = [], []
    for chunk, inline in ((3, 2), (256, 8)):
        monkeypatch.setattr(store, "CHUNK", chunk)
        monkeypatch.setattr(store, "INLINE", inline)
        told.append([])
        found = load(source, tmp_path / f"c{chunk}", tokenizer, say=told[-1].append)
        assert bare(found) == one_by_one(source, tokenizer)
        abouts.append(about(tmp_path / f"c{chunk}"))
    assert any("with 2 processes" in line for line in told[0]) and not any("processes" in line for line in told[1])
    assert abouts[0] == abouts[1]
    special = "the text holds <|im_end|>, a special token of the model; if it is rendered already, "
    assert abouts[0]["faults"] == {
        encode.SAME: [1, f"{source}:8"],
        "an answer is empty": [3, f"{source}:13"],
        f"{special}--chat-template none takes it as it is": [1, f"{source}:34"],
    }
    assert abouts[0]["left_out"] == {ranking.ALONE: 1}
    assert (abouts[0]["rows"], abouts[0]["unread"]) == (61, ["extra"])


def test_a_broken_row_in_another_process_is_the_users_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 3)
    monkeypatch.setattr(store, "INLINE", 1)
    source = lines(tmp_path / "a.jsonl", [*rows_of(20), {"prompt": "q", "chosen": "a"}])
    with pytest.raises(ValueError, match=r'a.jsonl:22: missing "rejected"'):
        load(source, tmp_path / "c", tokenizer)
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".lock"]


def test_rows_are_read_as_they_are_needed(tokenizer, tmp_path, monkeypatch):
    # red: all rows read before the first is encoded
    monkeypatch.setattr(store, "CHUNK", 4)
    read = 0

    def rows():
        nonlocal read
        for example in data.stream(write(tmp_path / "a.jsonl", 24), "train"):
            read += 1
            yield example

    for number, _ in enumerate(store._encoded(rows(), encoding(tokenizer), print)):
        assert read <= 4 * (number + 1)


def test_a_second_run_reads_nothing(tokenizer, tmp_path, monkeypatch):
    source = lines(tmp_path / "a.jsonl", [*rows_of(24), pair(id=1)])
    said = [[], []]
    first = load(source, tmp_path / "c", tokenizer, say=said[0].append, select=ranking.usable_feedback)
    monkeypatch.setattr(data, "stream", lambda *_: pytest.fail("read again"))
    again = load(source, tmp_path / "c", tokenizer, say=said[1].append, select=ranking.usable_feedback)
    assert list(again) == list(first) and again.digest == first.digest
    assert said[0] == said[1]
    assert isinstance(first.arrays.ids, np.memmap)


def test_whatever_the_ids_depend_on_makes_another_cache(tokenizer, tmp_path, monkeypatch):
    # red: any line of _name left out
    source = write(tmp_path / "a.jsonl", 10)
    cache = tmp_path / "c"
    folders = lambda: len([path for path in cache.iterdir() if path.is_dir()])  # noqa: E731
    expected = one_by_one(source, tokenizer)
    load(source, cache, tokenizer)
    ways = [
        {"lengths": (64, 31)},
        {"lengths": (63, 32)},
        {"encoder": encode.encode_rendered},
        {"split": "test"},
    ]
    ways += [{"select": functools.partial(ranking.usable_pair, pairs="all")}, {"choice": "plain"}]
    ways += [{"select": ranking.usable_feedback}]
    for number, how in enumerate(ways, 2):
        load(source, cache, tokenizer, **how)
        assert folders() == number, how
    number = folders()
    other = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")
    other.add_tokens(["abc"])
    load(source, cache, other)
    assert folders() == number + 1
    other.chat_template = other.chat_template + "\n"
    load(source, cache, other)
    assert folders() == number + 2
    other.eos_token = "<|endoftext|>"
    load(source, cache, other)
    assert folders() == number + 3
    for module in (arrays, chat, data, encode, files, formats, ranking, store, values):
        changed = tmp_path / f"{module.__name__}.py"
        changed.write_text(open(module.__file__, encoding="utf-8").read() + "# changed\n", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            before = folders()
            load(source, cache, tokenizer)
            assert folders() == before + 1, module.__name__
    write(tmp_path / "a.jsonl", 10, seed=1)
    before = folders()
    assert bare(load(source, cache, tokenizer)) == one_by_one(source, tokenizer) != expected
    assert folders() == before + 1
    for how in ({}, {"strict": True}, {"seed": 7}):  # what the ids do not depend on
        with pytest.raises(ValueError) if "strict" in how else monkeypatch.context():
            load(source, cache, tokenizer, **how)
    assert folders() == before + 1


def test_a_name_does_not_depend_on_the_order_of_a_set(tokenizer, tmp_path):
    # red: repr() of special_ids, whose order differs between processes
    source = write(tmp_path / "a.jsonl", 3)
    one, other = (set(), set())
    one.update([0, 8, 16])
    for token in (16, 8, 0):
        other.add(token)
    assert repr(one) != repr(other)
    how = encoding(tokenizer)
    names = {
        store._name(source, "train", how._replace(template=how.template._replace(special_ids=frozenset(ids))))
        for ids in (one, other)
    }
    assert len(names) == 1


@pytest.mark.parametrize("name", ["ids", "labels", "about.json"])
def test_a_damaged_cache_is_made_again(tokenizer, tmp_path, name):
    # red: _complete that only looks for the directory
    source = write(tmp_path / "a.jsonl", 10)
    expected = list(load(source, tmp_path / "c", tokenizer))
    place = next(path for path in (tmp_path / "c").iterdir() if path.is_dir())
    mine, others = (place.with_name(f"{place.name}.{host}-7.tmp") for host in (socket.gethostname(), "another"))
    for left in (mine, others):  # of a killed writer, of one of another machine
        left.mkdir()
    with open(place / name, "rb+") as file:
        file.truncate(3)
    assert list(load(source, tmp_path / "c", tokenizer)) == expected
    assert not mine.exists() and others.exists()


def test_processes_that_ask_at_once_wait_for_the_first(tokenizer, tmp_path, monkeypatch):
    # red: the lock taken after the look
    source = write(tmp_path / "a.jsonl", 10)
    written = []
    write_it = store._write

    def slowly(place, *rest):
        written.append(place)
        threading.Event().wait(0.3)
        write_it(place, *rest)

    monkeypatch.setattr(store, "_write", slowly)
    threads = [threading.Thread(target=load, args=(source, tmp_path / "c", tokenizer)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1


def test_machines_that_know_no_common_lock_do_not_meet(tokenizer, tmp_path, monkeypatch):
    # red: one name for all writers; OSError not caught; _complete not asked (a damaged cache would be opened)
    source = write(tmp_path / "a.jsonl", 10)
    monkeypatch.setattr(store.fcntl, "flock", lambda *_: None)
    encode_them, written = store._encoded, []

    def meanwhile(*given):
        if not written:  # the other machine begins while this one writes, and is done first
            written.append("ours")
            with monkeypatch.context() as there:
                there.setattr(socket, "gethostname", lambda: "another")
                written.append(list(load(source, tmp_path / "c", tokenizer)))
        return encode_them(*given)

    monkeypatch.setattr(store, "_encoded", meanwhile)
    assert list(load(source, tmp_path / "c", tokenizer)) == written[1]
    assert [path.suffix for path in (tmp_path / "c").iterdir() if path.is_dir()] == [""]


# What is said of the rows.


def test_what_is_said(tokenizer, tmp_path):
    # red: a reason without its first place; keys named once a row; remarks left out
    (tmp_path / "a.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    )
    rows = [pair(prompt=f"q{index}", id=index, source="x") for index in range(60)]
    rows[20] |= {"completions": ["a", "b"], "chosen": None, "rejected": None, "scores": [1, 1]}
    rows[30]["chosen"] = ""
    rows[40]["rejected"] = None
    rows[44]["rejected"] = None
    rows[50]["system"] = rows[51]["system"] = "Be brief."
    source, said = lines(tmp_path / "a.jsonl", rows), []
    found = load(source, tmp_path / "c", tokenizer, say=said.append, choice=str(tmp_path / "a.jinja"))
    assert len(found) == 56
    middle, most = sorted(found.lengths)[28], max(found.lengths)
    assert re.fullmatch(
        rf"{source}: 60 rows read, 56 examples, tokens {middle} \(median\), \d+ \(95 %\), {most} \(most\)",
        said[0],
    )
    assert sorted(said[1:-1]) == sorted([
        f"  1 cannot be used: an answer is empty (first: {source}:31)",
        f'  2 cannot be used: "rejected" is null (first: {source}:41)',
        "  1 left out: no completion is the better one",
        f"  2 changed: {encode.MERGED} (first: {source}:51)",
        "  keys not read: id, source",
    ])  # fmt: skip
    assert said[-1] == "  ...'q0<|im_end|>' -> 'a<|im_end|>'"
    kept = about(tmp_path / "c")
    assert kept["rows"] == 60 and kept["left_out"] == {"no completion is the better one": 1}
    assert kept["faults"] == {
        "an answer is empty": [1, f"{source}:31"],
        '"rejected" is null': [2, f"{source}:41"],
    }
    assert kept["remarks"] == {encode.MERGED: [2, f"{source}:51"]}
    assert kept["unread"] == ["id", "source"] and kept["digest"] == found.digest


def test_many_keys_that_are_not_read(tokenizer, tmp_path):
    said = []
    row = pair(**{f"key{index:02}": 1 for index in range(30)})
    load(lines(tmp_path / "a.jsonl", [row]), tmp_path / "c", tokenizer, say=said.append)
    assert said[1] == "  keys not read: " + ", ".join(f"key{index:02}" for index in range(20)) + ", ..."


def faulty(number, of):
    """Rows of which the last ones have an empty answer."""
    return [pair(prompt=f"q{index}", chosen="a" if index < of - number else " ") for index in range(of)]


@pytest.mark.parametrize(
    ("number", "of", "refused"),
    [
        (1, 20, False),
        (2, 20, True),
        (18, 19, False),
        (5, 100, False),
        (6, 100, True),
        (1, 21, False),
        (2, 40, False),
    ],
)
def test_one_row_in_twenty_may_be_unusable(tokenizer, tmp_path, number, of, refused):
    # red: >= for >; 20 rows for fewer; faults among the rest counted as rows
    source = lines(tmp_path / "a.jsonl", faulty(number, of))
    if refused:
        place = f"{source}:{of - number + 1}"
        message = f"{place}: an answer is empty; {number} of {of} rows cannot be used, more than 5 %"
        for _ in range(2):  # from the cache too
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                load(source, tmp_path / "c", tokenizer)
    else:
        assert len(load(source, tmp_path / "c", tokenizer)) == of - number


def test_rows_that_are_not_wanted_are_no_faults(tokenizer, tmp_path):
    # red: left out and faulty rows added up
    source = lines(tmp_path / "a.jsonl", [*faulty(1, 20), *[{"prompt": "q", "completion": "a"}] * 20])
    assert len(load(source, tmp_path / "c", tokenizer)) == 19


def test_the_limit_is_of_each_source(tokenizer, tmp_path):
    # red: the rows of all sources added up
    good = lines(tmp_path / "a.jsonl", faulty(0, 100))
    bad = lines(tmp_path / "b.jsonl", faulty(2, 20))
    with pytest.raises(ValueError, match=f"^{bad}:19: an answer is empty; 2 of 20 rows"):
        load([good, bad], tmp_path / "c", tokenizer)


def test_strict_data(tokenizer, tmp_path):
    # red: --strict-data a part of the cache's name; strict only where there are 20 rows
    source = lines(tmp_path / "a.jsonl", [*faulty(1, 3), pair(rejected="a")])
    assert len(load(source, tmp_path / "c", tokenizer)) == 2
    message = f"{source}:3: an answer is empty; 2 of 4 rows cannot be used, --strict-data true allows none"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(source, tmp_path / "c", tokenizer, strict=True)
    unwanted = lines(tmp_path / "b.jsonl", [pair(), {"prompt": "q", "completion": "a", "id": 1}])
    assert len(load(unwanted, tmp_path / "c", tokenizer, strict=True)) == 1


def test_nothing_left_is_an_error_that_says_why(tokenizer, tmp_path):
    rows = [pair(rejected="a", id=1), pair(chosen=""), {"prompt": "q", "completion": "a"}]
    source = lines(tmp_path / "a.jsonl", rows)
    message = f"{source}: no example is left at --max-length 64 (1 cannot be used: {encode.SAME} "
    message += f"(first: {source}:1); 1 cannot be used: an answer is empty (first: {source}:2); "
    message += f"1 left out: {ranking.ALONE}; keys not read: id)"
    with pytest.raises(ValueError) as caught:
        load(source, tmp_path / "c", tokenizer)
    assert str(caught.value) == message


def test_faults_of_a_file_stop_and_leave_no_cache(tokenizer, tmp_path):
    # red: what was read before the fault kept as a whole cache
    source = tmp_path / "a.jsonl"
    write(source, 10)
    with open(source, "a", encoding="utf-8") as file:
        file.write("{")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{source}:12: not JSON"):
            load(str(source), tmp_path / "c", tokenizer)
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".lock"]


def test_examples_and_reasons_of_a_dataset_function(tokenizer, tmp_path, monkeypatch):
    # red: an example without `where` refused; reasons as faults
    def mine(split: str) -> data.Rows:
        yield Example([{"role": "user", "content": "q"}], ["a", "b"], [1.0, 0.0])
        yield "not wanted"
        yield Fault("here:3", "an answer is empty")

    monkeypatch.setattr(data, "mine", mine, raising=False)
    said = []
    assert len(load("mine", tmp_path / "c", tokenizer, say=said.append)) == 1
    assert said[1:3] == ["  1 cannot be used: an answer is empty (first: here:3)", "  1 left out: not wanted"]


# The digest.


CHANGES = {  # of the second of two rows: does the digest change
    "ids of the prompt": (pair(prompt="r"), True),
    "ids of an answer": (pair(chosen="c"), True),
    "scores": ({"prompt": "q", "completions": ["a", "b"], "scores": [2, 0]}, True),
    "order of the answers": ({"prompt": "q", "completions": ["b", "a"], "scores": [0, 1]}, True),
    "weight": (pair(weight=0.5), True),
    "margin": (pair(margin=1), True),
    "a mask": (
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "name": "x"}], "rejected": "b"},
        False,
    ),
    "the same in another layout": ({"question": "q", "chosen": "a", "rejected": "b"}, False),
    "the same in turns": (pair(prompt=[{"role": "human", "content": "q"}]), False),
    "an unread key": (pair(id=7), False),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_digest_is_of_what_is_trained(tokenizer, tmp_path, case):
    # red: an array left out of the digest; the name or the file's time in it
    row, changes = CHANGES[case]
    digests = []
    for second in (pair(), row):
        source = lines(tmp_path / "a.jsonl", [pair(prompt="p"), second])
        digests.append(load(source, tmp_path / "c", tokenizer).digest)
    assert (digests[0] != digests[1]) == changes


def test_masks_are_in_the_digest(tokenizer, tmp_path):
    """The same ids, of which other ones are trained."""
    # red: `trained` left out of the digest
    spoken = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    digests = set()
    for weight in (1, 0):
        rest = [spoken[0] | {"weight": weight}, *spoken[1:]]
        source = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "q"}, *rest]}])
        found = load(source, tmp_path / "c", tokenizer, select=ranking.best_completion)
        assert sum(found[0].trained[0]) == 4 - 2 * (not weight)
        digests.add(found.digest)
    assert len(digests) == 2


def test_a_touched_or_moved_file_keeps_its_digest(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", 30)
    digest = load(source, tmp_path / "c", tokenizer).digest
    os.utime(source, ns=(1, 1))
    assert load(source, tmp_path / "c", tokenizer).digest == digest
    os.rename(source, tmp_path / "b.json")
    assert load(str(tmp_path / "b.json"), tmp_path / "other", tokenizer).digest == digest


def test_chunks_and_processes_change_no_digest(tokenizer, tmp_path, monkeypatch):
    # red: a digest of each chunk's own offsets
    source = write(tmp_path / "a.jsonl", 24)
    digests = set()
    for chunk in (256, 7, 1):
        monkeypatch.setattr(store, "CHUNK", chunk)
        monkeypatch.setattr(store, "INLINE", 100)
        digests.add(load(source, tmp_path / f"c{chunk}", tokenizer).digest)
    assert len(digests) == 1


def test_rows_that_cannot_be_used_are_not_in_the_digest(tokenizer, tmp_path):
    digests = []
    for rows in (faulty(0, 10), [*faulty(0, 10), pair(chosen="")]):
        digests.append(load(lines(tmp_path / "a.jsonl", rows), tmp_path / "c", tokenizer).digest)
    assert digests[0] == digests[1]


# Several sources.


def test_sources_end_to_end(tokenizer, tmp_path):
    # red: offsets of the second that begin at 0; the same rows of two sources made one
    one, other = write(tmp_path / "a.jsonl", 5), write(tmp_path / "b.jsonl", 7, seed=1)
    parts = [load(source, tmp_path / "c", tokenizer) for source in (one, other)]
    found = load([one, other, one], tmp_path / "c", tokenizer)
    expected = [*parts[0], *parts[1], *parts[0]]
    assert bare(found) == bare(expected)
    assert found.lengths.tolist() == [example.tokens for example in expected]
    assert found.scores.tolist() == [score for example in expected for score in example.scores]
    assert (found.arrays.prompts == [example.prompt_key for example in expected]).all()
    assert found.digest not in (parts[0].digest, load([other, one, one], tmp_path / "c", tokenizer).digest)
    alike = lines(tmp_path / "c.jsonl", [pair()]), lines(tmp_path / "d.jsonl", [pair(chosen="c")])
    both = load(list(alike), tmp_path / "c", tokenizer)
    assert len(both) == 2 and both[0].prompt == both[1].prompt


@pytest.mark.parametrize("weight", ["0.5", ".33", "1", "2", "2.5", "3.0"])
def test_weights_draw_a_share_by_the_seed(tokenizer, tmp_path, weight):
    # red: rows in the order in which they are drawn; the same rows whatever the seed; the first rows
    source = write(tmp_path / "a.jsonl", 29)
    whole = list(load(source, tmp_path / "c", tokenizer))
    found = load(f"{source}:{weight}", tmp_path / "c", tokenizer, seed=3)
    times = [sum(example == other for other in found) for example in whole]
    assert len(set(map(str, whole))) == len(whole)
    least, part = divmod(float(weight), 1)
    assert set(times) <= {int(least), int(least) + 1}
    assert len(found) == sum(times) == int(least) * len(whole) + round(part * len(whole))
    assert list(found) == [example for example, number in zip(whole, times) for _ in range(number)]
    assert found.lengths.tolist() == [example.tokens for example in found]
    assert list(found) == list(load(f"{source}:{weight}", tmp_path / "c", tokenizer, seed=3))
    if part:
        assert list(found) != list(load(f"{source}:{weight}", tmp_path / "c", tokenizer, seed=4))
        assert times[: round(part * len(whole))] != [int(least) + 1] * round(part * len(whole))


def test_weights_are_in_the_digest_and_not_in_the_cache(tokenizer, tmp_path):
    # red: two caches of the same rows; a resumed run whose weights changed
    source = write(tmp_path / "a.jsonl", 9)
    drawn = [
        (f"{source}:0.5", 0),
        (f"{source}:0.5", 1),
        (f"{source}:2", 0),
        (source, 0),
        (f"{source}:1.0", 0),
    ]
    digests = [load(spec, tmp_path / "c", tokenizer, seed=seed).digest for spec, seed in drawn]
    assert len(set(digests)) == 4 and digests[3] == digests[4]
    assert len(list((tmp_path / "c").glob("*/about.json"))) == 1


def test_a_share_of_joined_and_thinned_stores(tokenizer, tmp_path):
    # red: pieces looked up in the store they no longer belong to
    one, other = write(tmp_path / "a.jsonl", 9), write(tmp_path / "b.jsonl", 12, seed=1)
    found = load([f"{one}:2", f"{other}:0.5"], tmp_path / "c", tokenizer, select=ranking.usable_feedback)
    shared = found.share(1.5, 0)
    shared = shared.only(shared.labels)
    kept = [example for example in found.share(1.5, 0) if any(example.labels)]
    assert [example.prompt for example in shared] == [example.prompt for example in kept]
    assert all(all(example.labels) for example in shared)
    assert bare(arrays.joined([shared, found])) == bare([*shared, *found])


def test_a_share_of_no_row(tokenizer, tmp_path):
    source = lines(tmp_path / "a.jsonl", [pair()])
    with pytest.raises(ValueError, match="a weight of 0.25 leaves none of 1 rows"):
        load(f"{source}:0.25", tmp_path / "c", tokenizer)


def test_mismatched_answers_are_cut_and_borrowed_in_turn():
    # red: no `%`; no minimum; `index or prompt` forgotten; places of the own completions
    answers = [([1, 2, 3], [[4], [5], [6]]), ([9], [[10, 11, 12], [13]]), ([], [[4]])]
    masks = [[[True] * len(ids) for ids in given] for _, given in answers]
    ones = [[1.0] * len(given) for _, given in answers]
    whole = [
        encode.Encoded(*answer, trained, scores, labels=[True] * len(scores))
        for answer, trained, scores in zip(answers, masks, ones)
    ]
    flat = kept(whole)
    found = flat.mismatched(np.array([1, 0, 1]), 5)
    lent = [[[10, 11], [13], [10, 11]], [[4], [5]], [[10, 11, 12]]]
    assert [example.completions for example in found] == lent
    assert [example.prompt for example in found] == [example.prompt for example in whole]
    assert [example.scores for example in found] == [example.scores for example in whole]
    assert bare(flat) == whole and [example.places for example in flat] == [[0, 1, 2], [3, 6], [7]]
    assert [example.places for example in found] == [[0, 2, 3], [5, 6], [7]]
    last = batch.pack([found[2]])
    assert (last.predict.tolist(), last.targets.tolist(), last.tokens.tolist()) == ([0, 1], [11, 12], [7, 8])
    joined = arrays.joined([flat, flat.only(np.array([0, 1, 1, 0, 1, 1], bool))])
    assert [example.places for example in joined] == [[0, 1, 2], [3, 6], [7], [9, 10], [14], [15]]


def test_a_subset_is_the_same_in_every_run():
    # red: the first rows; a seed
    whole = kept([encode.Encoded([k], [[k]], [[True]], [0.0]) for k in range(100)])
    ids = lambda found: [example.prompt[0] for example in found]  # noqa: E731
    found = ids(whole.subset(10))
    torch.manual_seed(5)
    assert ids(whole.subset(10)) == found == sorted(found) and len(set(found)) == 10
    assert found != list(range(10)) and ids(whole.subset(5).subset(9)) == ids(whole.subset(5))


@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (0.3, 0.2)])
def test_thinned_examples_keep_what_is_theirs(tokenizer, tmp_path, good, bad):
    # red: labels made anew from what is left; examples without completions kept; offsets of the whole store
    source = write(tmp_path / "a.jsonl", 30)
    whole = load(source, tmp_path / "c", tokenizer, select=ranking.usable_feedback)
    thinned = whole.only(batch.thin(whole.labels, 3, keep_desirable=good, keep_undesirable=bad))
    flat = np.array([label for example in whole for label in example.labels])
    stays = iter(batch.thin(flat, 3, keep_desirable=good, keep_undesirable=bad).tolist())
    expected = []
    for example in whole:
        wanted = [j for j in range(len(example.labels)) if next(stays)]
        parts = (example.completions, example.trained, example.scores)
        parts = [[values[j] for j in wanted] for values in parts]
        labels = [example.labels[j] for j in wanted]
        if wanted:
            expected.append(encode.Encoded(example.prompt, *parts, example.weight, example.margin, labels))
    assert bare(thinned) == expected
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
        row = encode.Encoded([1] * prompt, [ids for ids, _ in answers], masks, scores, **options)
        examples.append(row._replace(labels=ranking.desirable(scores)))
    return kept(examples), examples


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
        encode.Encoded(list(prompt), answers, trained, scores, labels=labels)
        for prompt, (answers, trained, scores, labels) in lists.items()
    ]
    found = flat.by_prompt()
    assert bare(found) == expected
    assert found.lengths.tolist() == [example.tokens for example in expected]
    assert found.arrays.prompts.tolist() == [example.prompt_key for example in expected]
    assert found.arrays.ids is flat.arrays.ids  # no copy of the tokens
    assert bare(found.by_prompt()) == expected


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
    found, words = flat.chosen(lambda index, scores: answers[index], np.arange(3))
    assert [(row.completions, row.scores) for row in found] == [([[5], [6]], [2.0, 0.0])]
    assert words == "1 left out: alone; 1 left out: alike"
    assert flat.chosen(lambda index, scores: range(len(scores)), np.arange(3)) == (flat, "")
    with pytest.raises(ValueError, match=r"no example is left \(3 left out: none\)"):
        flat.chosen(lambda index, scores: "none", np.arange(3))


def test_whole_conversations_are_gathered_by_the_text_of_their_prompt(tokenizer, tmp_path):
    """What ids two conversations share depends on both answers: no row alone can say."""
    rows = [{"prompt": "q", "completions": [text], "scores": [len(text)]} for text in ("a", "a b", "c")]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row | {"prompt": p}) + "\n" for p in "qr" for row in rows))
    found = load(
        str(source), tmp_path / "c", tokenizer, select=ranking.usable_feedback, encoder=encode.encode_whole
    ).by_prompt()
    read = one_by_one(str(source), tokenizer, select=ranking.usable_feedback, encoder=encode.encode_rendered)
    whole = [row.prompt + row.completions[0] for row in read]
    assert [row.completions for row in found] == [whole[:3], whole[3:]]
    assert [row.prompt for row in found] == [[], []] and found[1].scores == [1.0, 3.0, 1.0]
    assert [mask[:2] for mask in found[0].trained] == [[False, True]] * 3
