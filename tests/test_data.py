"""Readers, encode, pack and plan against oracles written from what they promise: loops over characters, ids.

The tokenizer is that of examples/tiny: byte-level, ChatML turns ended by <|im_end|>. A comment `red:` names a
one-line change of data.py that turns a test red.
"""
import copy
import gzip
import json
import random

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
    return data.Example(prompt, list(completions), [float(-i) for i in range(len(completions))], where="f:7")


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
    '"chosen': [row(chosen=value) for value in (1, "", USER, turns("q", "a"), "\ud83d")],
    '"rejected': [b'{"prompt": "q", "chosen": "a"}', row(rejected=" \n")],
    '"text': [b'{"text": ["a"]}', b'{"text": ""}'],
    "prompt[0]": [row(prompt=["q"]), row(prompt=[{"role": "user"}]), row(prompt=turns(""))],
    "content": [row(prompt=[{"role": "user", "text": "q"}])],
    '"bot"': [row(prompt=[{"role": "bot", "content": "q"}])],
    "assistant": [json.dumps({"messages": USER}).encode()],
    '"weight': [row(weight=value) for value in (float("nan"), float("inf"), -1, "1", True, None, 10**400)],
    '"margin': [row(margin=float("nan"))],
    "scores": [ranked(scores=value) for value in ([1, 2], [], [float("nan")], ["1"], 1)],
    "completions": [ranked(completions=value) for value in ([""], [1], "a")] + [ranked(completions=[])],
}


def refused(source, *words, split="train"):
    """One line that starts with the first of the words and holds the others."""
    with pytest.raises(ValueError) as caught:
        data.load(str(source), split)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(words[0])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("word", "content"), [(word, bad) for word in MISTAKES for bad in MISTAKES[word]])
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


STRAY = ["\n\nHuman: p\n\nHuman: o\n\nAssistant: ", "\n\nAssistant: o\n\nHuman: p\n\nAssistant: "]
STRAY += ["preamble\n\nHuman: p\n\nAssistant: ", "\n\nAssistant: ", ""]
DIRT = {
    "differ": [published(["p", "a"], ["o", "b"]), published(["p", "a", "o", "b"], ["p", "b", "o", "b"])],
    "alternate": [published(text + "a", text + "b") for text in STRAY],
    "empty": [published(["p", " "], ["p", "b"]), published(["p", "a"], ["p", ""])],
    "": [published(["p", " ", "o", "a"], ["p", " ", "o", "b"])],  # an empty turn
    "Human": [published(["p", "a", "o"], ["p", "b", "o"])],  # ends with a turn of the human
}
CLEAN = [published([" p? ", "a\n\nmore"], [" p? ", " b"])]
CLEAN += [published(["p", "o", "n", "f():\n    x"], ["p", "o", "n", "b"])]
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
    rows = [{"text": text} | extra for text in ("Good.<br /><br />Very. ", " ")]
    examples, dropped = data.load(f"imdb={write(tmp_path / 'imdb.jsonl', rows)}", "train")
    assert [tuple(found)[:3] for found in examples] == [([], ["Good.\n\nVery."], [1.0])]
    assert sum(dropped.values()) == 1


@pytest.mark.parametrize("name", ["hh", "imdb"])
def test_a_file_of_another_dataset(tmp_path, name):
    path = write(tmp_path / "other.jsonl", [{"question": "q"}])
    refused(f"{name}={path}", f"{path}:1: ")


# Encode.

TALK = turns("one two three", "four", "five six seven eight nine ten", system="Be brief.")
OPENING = "<|im_start|>assistant\n"
TEXTS = ["yes", "def f():\n    return  1", "  two\t", "\nline\n", "naïve 日本語 🙂 e\u0301", ">"]


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chatml(dialogue):
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in dialogue)


SPOKEN = "\n\nSystem: Be brief.\n\nHuman: one two three\n\nAssistant: four<|im_end|>\n\nHuman: five six seven"
PROMPTS = {
    OWN: chatml(TALK) + OPENING,
    PLAIN: SPOKEN + " eight nine ten\n\nAssistant:",
    RAW: "Be brief.one two threefourfive six seven eight nine ten",
}


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("template", PROMPTS, ids=["own", "plain", "raw"])
def test_every_character_survives_and_one_end_is_appended(tokenizer, template, content):
    # red: closed.strip(); runs of blanks made one; prompt and answer tokenised in one piece; eos left out
    encoded = data.encode(example(TALK, content, "b"), tokenizer, 500, 400, template)
    answer = (" " if template == PLAIN else "") + content + "<|im_end|>"
    assert encoded.prompt == tokens_of(tokenizer, PROMPTS[template])
    assert encoded.completions[0] == tokens_of(tokenizer, answer)
    assert all(map(all, encoded.trained)) and encoded.scores == [0.0, -1.0]


@pytest.mark.parametrize("content", ["yes", "  yes", "yes  "])
def test_a_template_that_trims_and_writes_no_end(tokenizer, content):
    trim = "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '\n' }}{% endfor %}"
    trim += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    encoded = data.encode(example(USER, content), tokenizer, 99, 50, ("trim", trim))
    assert encoded.completions == [[*tokens_of(tokenizer, "yes"), END]]


def test_the_end_of_turn_is_trained_exactly_when_nothing_was_cut(tokenizer):
    # red: an END after the cut; a budget that forgets END; a prompt cut to fit the completion
    pair = example(TALK, "a b c d e", "f g h i j k l m")
    before = copy.deepcopy(pair)
    whole = data.encode(pair, tokenizer, 500, 400, OWN)
    prompt = len(whole.prompt)
    for max_length in range(prompt + 1, prompt + 20):
        encoded = data.encode(pair, tokenizer, max_length, 400, OWN)
        assert data.encode(pair, tokenizer, max_length, 400, OWN) == encoded and pair == before  # no trace
        assert encoded.prompt == whole.prompt
        for found, full, trained in zip(encoded.completions, whole.completions, encoded.trained):
            assert found == full[: max_length - prompt] and trained == [True] * len(found)
            assert (found[-1] == END) == (prompt + len(full) <= max_length)


def test_a_prompt_that_leaves_no_room(tokenizer):
    prompt = len(tokens_of(tokenizer, PROMPTS[OWN]))
    for max_length in range(1, prompt + 1):
        assert isinstance(data.encode(example(TALK, "a b c d e " * 20), tokenizer, max_length, 400, OWN), str)


DIALOGUES = {
    "user": TALK,
    "newline": TALK + turns("\n\n" + "n m o p q " * 9),
    "tool": [*TALK, {"role": "tool", "content": "t u v w x y z " * 9}],
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_truncation_keeps_the_end_of_a_dialogue_in_whole_turns(tokenizer, name):
    """For every limit the prompt is well-formed, with the system turn and as many of the last turns as fit."""
    # red: the oldest turns kept; the system turn dropped; a header cut
    dialogue = DIALOGUES[name]
    system, last = chatml(dialogue[:1]), dialogue[-1]
    room = len(tokens_of(tokenizer, system + chatml([{**last, "content": ""}]) + OPENING))
    starts = [start for start in range(2, len(dialogue)) if dialogue[start]["role"] == "user"]
    fitting = [chatml(dialogue) + OPENING] + [system + chatml(dialogue[start:]) + OPENING for start in starts]
    for limit in range(room + 1, 120):
        prompt = data.encode(example(dialogue, "b", "c"), tokenizer, 500, limit, OWN).prompt
        text = tokenizer.decode(prompt)
        whole = [shorter for shorter in fitting if len(tokens_of(tokenizer, shorter)) <= limit]
        if whole:
            assert text == whole[0], limit
            continue
        header = f"{system}<|im_start|>{last['role']}\n"
        end = f"<|im_end|>\n{OPENING}"
        assert text.startswith(header) and text.endswith(end) and len(prompt) == limit, (limit, text)
        assert last["content"].endswith(text[len(header) : -len(end)]), (limit, text)


def test_a_limit_below_the_frame_is_said(tokenizer):
    room = len(tokens_of(tokenizer, chatml([TALK[0], {**TALK[-1], "content": ""}]) + OPENING))
    for limit in range(1, room):
        assert isinstance(data.encode(example(TALK, "b"), tokenizer, 500, limit, OWN), str), limit


@pytest.mark.parametrize("first", [0, 1, 2], ids=["system first", "user first", "assistant first"])
def test_exactly_the_assistant_turns_of_a_conversation_are_trained(tokenizer, tmp_path, first):
    # red: headers trained; END untrained; only the last turn trained; the turn after the last answer kept
    talk = turns("one", "x = 1\n    y", "two  ", " three ", "more", system="s")[first:]
    text = ""
    wanted = []
    for turn in talk[:-1]:
        said = turn["content"] + "<|im_end|>"
        for part in (f"<|im_start|>{turn['role']}\n", said, "\n"):
            text += part
            wanted += [turn["role"] == "assistant" and part == said] * len(part)
    found = next(data.read(write(tmp_path / "a.jsonl", [{"messages": talk}])))
    encoded = data.encode(found, tokenizer, 500, 400, OWN)
    trained = [False] * len(encoded.prompt) + encoded.trained[0]
    place = 0
    for token, mark in zip(encoded.prompt + encoded.completions[0], trained):
        piece = tokenizer.decode([token])
        assert text.startswith(piece, place) and wanted[place : place + len(piece)] == [mark] * len(piece)
        place += len(piece)
    assert text[place:] == "\n"


@pytest.mark.parametrize("kind", ["none", "named", "added"])
def test_the_beginning_of_a_text(tokenizer, kind):
    """A tokenizer without BOS, with one, and one that puts it before whatever it tokenises."""
    # red: a first token trained without a BOS; BOS twice; BOS lost in truncation
    tokenizer.bos_token = None if kind == "none" else "<|endoftext|>"
    if kind == "added":
        start = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = start
    for texts in (["some text"], ["better", "worse"]):
        encoded = data.encode(example([], *texts), tokenizer, 99, 50, OWN)
        assert encoded.prompt == ([] if kind == "none" else [0])
        assert encoded.completions == [[*tokens_of(tokenizer, text), END] for text in texts]
        assert all(mark == [kind != "none"] + [True] * (len(mark) - 1) for mark in encoded.trained)
    assert data.encode(example(USER, "a"), tokenizer, 99, 50, OWN).prompt.count(0) == 0  # the template's affair
    for limit in (400, 35):
        prompt = data.encode(example(TALK, "a"), tokenizer, 500, limit, PLAIN).prompt
        assert (prompt[:1] == [0], prompt.count(0)) == (kind == "added", kind == "added")
    tokenizer.chat_template = "{{ bos_token if bos_token else '' }}" + tokenizer.chat_template
    for talk in (turns("q", "a"), turns("q", "a")[1:]):
        encoded = data.encode(data.Example(talk[:-1], [talk[-1:]], [1.0]), tokenizer, 99, 50, OWN)
        assert (encoded.prompt + encoded.completions[0]).count(0) == (kind != "none")


def test_the_choice_of_a_template(tokenizer, tmp_path):
    assert data.chat_template(tokenizer, None)[1] is None
    assert data.chat_template(tokenizer, "raw") == RAW
    (tmp_path / "a.jinja").write_text("{{ raise_exception('no system turn') }}")
    named = data.chat_template(tokenizer, str(tmp_path / "a.jinja"))
    with pytest.raises(ValueError, match=r"a\.jinja.*no system turn"):
        data.encode(example(USER, "a"), tokenizer, 99, 50, named)
    with pytest.raises(ValueError, match="nowhere.jinja"):
        data.chat_template(tokenizer, "nowhere.jinja")
    tokenizer.chat_template = None
    assert data.chat_template(tokenizer, None) == PLAIN
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos"):
        data.encode(example(USER, "a"), tokenizer, 99, 50, PLAIN)


def test_a_template_that_rewrites_history_is_named(tokenizer):
    # red: startswith() not checked
    forget = "{% for m in messages if loop.last or m.role == 'user' %}{{ m.content + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match=r"^f:7: .*forget.*prefix") as caught:
        data.encode(data.Example(USER, [CHAT[2:]], [1.0], where="f:7"), tokenizer, 99, 50, ("forget", forget))
    assert "\n" not in str(caught.value)


# Pack.


def draw_groups(rng):
    groups = []
    for _ in range(rng.randrange(1, 6)):
        lengths = [rng.randrange(1, 7) for _ in range(rng.randrange(1, 5))]
        prompt = [rng.randrange(99) for _ in range(rng.randrange(6))]
        completions = [[rng.randrange(99) for _ in range(length)] for length in lengths]
        trained = [[rng.random() < 0.7 and (i > 0 or prompt != []) for i in range(length)] for length in lengths]
        scores = [0.5] * len(lengths) if rng.random() < 0.3 else rng.sample([-1.5, 0.0, 2.0, 7.0], len(lengths))
        groups.append(data.Encoded(prompt, completions, trained, scores, rng.random(), rng.random()))
    return groups


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_pack_is_what_a_loop_says(seed, counted):
    # red: `begin + index - 1` for a first token; positions or responses that run on; worst and best swapped
    groups = draw_groups(random.Random(seed))
    row, positions, predict, targets, response, ends, scores, pairs, margins, weights = ([] for _ in range(10))
    for group in groups:
        start, first = len(row), len(ends)
        row += group.prompt
        positions += range(len(group.prompt))
        for completion, trained in zip(group.completions, group.trained):
            chain = [*range(start, start + len(group.prompt)), *range(len(row), len(row) + len(completion))]
            row += completion  # chain: where each token of prompt + completion lies in the row
            positions += range(len(group.prompt), len(chain))
            for place, token, wanted in zip(range(len(group.prompt), len(chain)), completion, trained):
                if wanted:
                    predict.append(chain[place - 1])
                    targets.append(token)
                    response.append(len(ends))
            ends.append(chain[-1])
            weights.append(group.weight if counted else 0.0)
        scores += group.scores
        if len(set(group.scores)) > 1:
            pairs.append([first + group.scores.index(score) for score in (max(group.scores), min(group.scores))])
            margins.append(group.margin)
    found = data.pack(groups, counted)
    expected = [[row], [positions], predict, targets, response, ends]
    integers = [found.ids, found.positions, found.predict, found.targets, found.response, found.ends]
    assert [tensor.tolist() for tensor in integers] == expected
    assert found.ids.shape[1] == sum(group.tokens for group in groups)  # no padding
    assert len(targets) == sum(group.trained_tokens for group in groups)
    assert found.pairs.t().tolist() == pairs and found.pairs.shape == (2, len(pairs))
    torch.testing.assert_close([found.scores, found.margins, found.weights], [torch.tensor(x) for x in (scores, margins, weights)])
    assert found.pair_weights.tolist() == [found.weights[best] for best, _ in pairs] and found.counted == counted
    assert found.groups == [(len(group.prompt), list(map(len, group.completions))) for group in groups]


# Plan.


@pytest.mark.parametrize("seed", range(40))
def test_plan(seed):
    # red: sizes by rank; drop_last; an order that depends on world_size; a filler that counts
    rng = random.Random(seed)
    lengths = [rng.randrange(1, rng.choice([50, 600])) for _ in range(rng.randrange(1, 70))]
    batch_size, budget = rng.randrange(1, 30), rng.choice([20, 300, 2000])
    steps = [range(i, min(i + batch_size, len(lengths))) for i in range(0, len(lengths), batch_size)]
    unions = []
    for world_size in (1, 2, 5):
        arguments = (lengths, batch_size, world_size, budget, seed)
        plan = data.plan(*arguments)
        assert plan == data.plan(*arguments) and len(plan) == len(steps)
        unions.append([])
        for step, expected in zip(plan, steps):
            rounds = list(zip(*step, strict=True))  # every rank has the same number of micro-batches
            works = [work for micro_batch in rounds for work in micro_batch]
            assert len(step) == world_size
            for work in works:
                load = sum(lengths[group] for group in work.groups)
                assert work.groups and (load <= budget or len(work.groups) == 1)
                assert work.counted or work.groups == [min(work.groups)] and load == min(lengths)
            unions[-1].append(sorted(group for work in works if work.counted for group in work.groups))
            assert len(unions[-1][-1]) == len(expected)
        assert sorted(sum(unions[-1], [])) == list(range(len(lengths)))  # each once
    assert unions[0] == unions[1] == unions[2]


@pytest.mark.parametrize("lengths", [[1000, 1, 1, 1], [5000] + [50] * 7], ids=["one huge", "one among many"])
def test_no_micro_batch_is_made_of_fillers_alone(lengths):
    for world_size in (1, 2):
        (step,) = data.plan(lengths, len(lengths), world_size, 512, None)
        assert all(any(work.counted for work in micro_batch) for micro_batch in zip(*step))


def test_plan_orders_and_balances():
    # red: a seed or an epoch ignored; groups dealt in order instead of by length
    lengths = [random.Random(7).randrange(60, 400) + i % 90 for i in range(256)]
    order = {(seed, epoch): str(data.plan(lengths, 64, 4, 4096, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(order.values())) == 4
    assert [work.groups for rank in data.plan([5] * 6, 6, 1, 10, None)[0] for work in rank] == [[0, 3], [1, 4], [2, 5]]
    for step in data.plan(lengths, 64, 4, 4096, 0):
        loads = [sum(lengths[group] for work in rank for group in work.groups) for rank in step]
        assert max(loads) < 1.05 * sum(loads) / 4 and all(work.counted for rank in step for work in rank)
        assert len(step[0]) <= 1 + sum(loads) / (4 * 4096) * 1.2
