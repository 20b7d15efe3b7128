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
    """JSON lines; a pair of texts is a row of HH."""
    rows = [row if isinstance(row, dict) else {"chosen": row[0], "rejected": row[1]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Readers.

USER = turns("q")
ANSWER = [{"role": "assistant", "content": "a"}]
CHAT = turns("q", "a", "r", "b", system="s")
RANKED = {"prompt": "q", "completions": ["a", "b", ANSWER], "scores": [1, -2.5, 3]}
FORMS = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, (USER, ["a", "b"], [1.0, 0.0])),
    ({"prompt": USER, "chosen": ANSWER, "rejected": "b", "weight": 2}, (USER, ["a", "b"], [1.0, 0.0], 2.0)),
    ({"prompt": "", "chosen": "a", "rejected": "b", "margin": 0.5}, ([], ["a", "b"], [1.0, 0.0], 1.0, 0.5)),
    (RANKED, (USER, ["a", "b", "a"], [1.0, -2.5, 3.0])),
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


def row(base=FORMS[0][0], **change):
    return json.dumps(base | change).encode()


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
    "scores": [row(RANKED, scores=value) for value in ([1, 2], [], [1, 2, float("nan")], ["1", 2, 3], 1)],
    "completions": [row(RANKED, completions=value) for value in (["a", "", "b"], ["a", "b", 1], "abc", [])],
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


OTHER = b'{"question": "q"}'  # a row of another dataset
FILES = {"none.jsonl": None, "suffix.txt": row(), "blank.jsonl": b"\n \n", "empty.json": b"[]", "one.json": row()}
FILES |= {"plain.jsonl.gz": row(), "cut.jsonl.gz": gzip.compress(row() * 50)[:-9]}
FILES |= {"hh=no/directory": None, "hh=other.jsonl": OTHER, "imdb=other.jsonl": OTHER}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    dataset, _, file = name.rpartition("=")
    if FILES[name] is not None:
        (tmp_path / file).write_bytes(FILES[name])
    refused(f"{dataset}={tmp_path}/{file}" if dataset else tmp_path / file, f"{tmp_path}/{file}")


ASKED = "\n\nHuman: p\n\nAssistant: "
STRAY = ["\n\nHuman: o" + ASKED, "\n\nAssistant: o" + ASKED, "preamble" + ASKED, "\n\nAssistant: ", ""]
LONG = ASKED + "o\n\nHuman: n\n\nAssistant: "
DIRT = {
    "differ": [(ASKED + "a", LONG + "b"), (LONG + "a", LONG.replace("o", "m") + "b")],
    "alternate": [(text + "a", text + "b") for text in STRAY],
    "empty": [(ASKED + " ", ASKED + "b"), (ASKED + "a", ASKED)],
    "": [(LONG.replace("o", "") + "a", LONG.replace("o", "") + "b")],  # an empty turn in the prompt
    "Human": [(ASKED + "a\n\nHuman: o", ASKED + "b\n\nHuman: o")],  # ends with a turn of the human
}
CLEAN = [(ASKED + "a\n\nmore", ASKED + " b"), (LONG + "f():\n    x", LONG + "b")]
READ = [(turns("p"), ["a\n\nmore", "b"]), (turns("p", "o", "n"), ["f():\n    x", "b"])]


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
    write(tmp_path / "train.jsonl", CLEAN[:1] + DIRT["empty"])
    write(tmp_path / "test.jsonl", CLEAN[1:])
    for split, expected, left_out in (("train", READ[:1], 2), ("test", READ[1:], 0)):
        examples, dropped = data.load(f"hh={tmp_path}", split)
        assert [(found.prompt, found.completions) for found in examples] == expected
        assert sum(dropped.values()) == left_out
    refused(f"hh={tmp_path}", str(tmp_path), "validation", split="validation")


@pytest.mark.parametrize("extra", [{}, {"label": 1}], ids=["text", "with the published label"])
def test_imdb_from_a_file(tmp_path, extra):
    # red: characters for texts; <br /> kept
    rows = [{"text": text} | extra for text in ("Good.<br /><br />Very. ", " ")]
    examples, dropped = data.load(f"imdb={write(tmp_path / 'imdb.jsonl', rows)}", "train")
    assert [tuple(found)[:3] for found in examples] == [([], ["Good.\n\nVery."], [1.0])]
    assert sum(dropped.values()) == 1


# Encode.

TALK = turns("one two three", "four", "five six seven", system="Be brief.")
OPENING = "<|im_start|>assistant\n"
TEXTS = ["yes", "def f():\n    return  1", "  two\t", "\nline\n", "naïve 日本語 🙂 e\u0301", ">"]


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chatml(dialogue):
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in dialogue)


SPOKEN = "\n\nSystem: Be brief.\n\nHuman: one two three\n\nAssistant: four<|im_end|>\n\nHuman: five six seven"
TRIM = "{% for m in messages %}{{ m.role + ':' + m.content | trim + '\n' }}{% endfor %}"
TRIM += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
PROMPTS = {
    ("the tokenizer's own", None): chatml(TALK) + OPENING,
    ("plain", data.PLAIN): SPOKEN + "\n\nAssistant:",
    ("raw", data.RAW): "Be brief.one two threefourfive six seven",
    ("trim", TRIM): "system:Be brief.\nuser:one two three\nassistant:four\nuser:five six seven\nassistant:",
}
OWN, PLAIN, RAW, TRIMMING = PROMPTS


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("template", PROMPTS, ids=["own", "plain", "raw", "trim"])
def test_every_character_survives_and_one_end_is_appended(tokenizer, template, content):
    # red: closed.strip(); runs of blanks made one; prompt and answer tokenised in one piece; eos left out
    encoded = data.encode(example(TALK, content, "b"), tokenizer, 500, 400, template)
    answer = " " * (template == PLAIN) + (content.strip() if template == TRIMMING else content) + "<|im_end|>"
    assert encoded.prompt == tokens_of(tokenizer, PROMPTS[template])
    assert encoded.completions[0] == tokens_of(tokenizer, answer)
    assert all(map(all, encoded.trained)) and encoded.scores == [0.0, -1.0]


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


DIALOGUES = {
    "user": TALK,
    "newline": TALK + turns("\n\n" + "n m o p q " * 9),
    "tool": [*TALK, {"role": "tool", "content": "t u v w x y z " * 9}],
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_truncation_keeps_the_end_of_a_dialogue_in_whole_turns(tokenizer, name):
    """For every limit the prompt is well-formed: the system turn, and as many of the last turns as fit."""
    # red: the oldest turns kept; the system turn dropped; a header cut
    dialogue = DIALOGUES[name]
    header, end = f"{chatml(dialogue[:1])}<|im_start|>{dialogue[-1]['role']}\n", f"<|im_end|>\n{OPENING}"
    starts = [start for start in range(2, len(dialogue)) if dialogue[start]["role"] == "user"]
    candidates = [dialogue] + [dialogue[:1] + dialogue[start:] for start in starts]
    for limit in range(len(tokens_of(tokenizer, header + end)) + 1, 120):
        prompt = data.encode(example(dialogue, "b", "c"), tokenizer, 500, limit, OWN).prompt
        text = tokenizer.decode(prompt)
        shorter = [chatml(kept) + OPENING for kept in candidates]
        whole = [kept for kept in shorter if len(tokens_of(tokenizer, kept)) <= limit]
        if whole:
            assert text == whole[0], limit
        else:
            assert text.startswith(header) and text.endswith(end) and len(prompt) == limit, (limit, text)
            assert dialogue[-1]["content"].endswith(text[len(header) : -len(end)]), (limit, text)


@pytest.mark.parametrize("what", ["frame", "completion"])
def test_a_limit_that_leaves_no_room_is_said(tokenizer, what):
    kept = [TALK[0], {**TALK[-1], "content": ""}] if what == "frame" else TALK
    needed = len(tokens_of(tokenizer, chatml(kept) + OPENING))
    for limit in range(1, needed + (what == "completion")):
        limits = (500, limit) if what == "frame" else (limit, 400)
        assert isinstance(data.encode(example(TALK, "a b c " * 30), tokenizer, *limits, OWN), str), limit


@pytest.mark.parametrize("first", [0, 1, 2], ids=["system first", "user first", "assistant first"])
def test_exactly_the_assistant_turns_of_a_conversation_are_trained(tokenizer, tmp_path, first):
    # red: headers trained; END untrained; only the last turn trained; the turn after the last answer kept
    talk = turns("one", "x = 1\n    y", "two  ", " three ", "more", system="s")[first:]
    wanted = []  # (character, trained)
    for turn in talk[:-1]:
        said = turn["content"] + "<|im_end|>"
        for part in (f"<|im_start|>{turn['role']}\n", said, "\n"):
            wanted += [(character, turn["role"] == "assistant" and part == said) for character in part]
    found = next(data.read(write(tmp_path / "a.jsonl", [{"messages": talk}])))
    encoded = data.encode(found, tokenizer, 500, 400, OWN)
    marks = zip(encoded.prompt + encoded.completions[0], [False] * len(encoded.prompt) + encoded.trained[0])
    assert [(c, trained) for token, trained in marks for c in tokenizer.decode([token])] == wanted[:-1]


@pytest.mark.parametrize("kind", ["none", "named", "added"])
def test_the_beginning_of_a_text(tokenizer, kind):
    """A tokenizer without BOS, with one, and one that puts it before whatever it tokenises."""
    # red: a first token trained without a BOS; BOS twice; BOS lost in truncation
    tokenizer.bos_token = None if kind == "none" else "<|endoftext|>"  # id 0
    if kind == "added":
        start = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = start
    encoded = data.encode(example([], "better", "worse"), tokenizer, 99, 50, OWN)
    assert encoded.prompt == ([] if kind == "none" else [0])
    assert encoded.completions == [[*tokens_of(tokenizer, text), END] for text in ("better", "worse")]
    assert all(mark == [kind != "none"] + [True] * (len(mark) - 1) for mark in encoded.trained)
    for template, limit in ((OWN, 400), (PLAIN, 400), (PLAIN, 30)):  # a chat template writes its own
        prompt = data.encode(example(TALK, "a"), tokenizer, 500, limit, template).prompt
        assert (prompt[0] == 0, 0 in prompt[1:]) == (kind == "added" and template == PLAIN, False)
    tokenizer.chat_template = "{{ bos_token or '' }}" + tokenizer.chat_template
    for talk in (USER, []):
        encoded = data.encode(data.Example(talk, [ANSWER], [1.0]), tokenizer, 99, 50, OWN)
        assert (encoded.prompt + encoded.completions[0]).count(0) == (kind != "none")


def test_the_choice_of_a_template(tokenizer, tmp_path):
    # red: startswith() not checked
    forget = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ messages[-1].content }}"
    wrong = {"forget.jinja": (forget, "prefix"), "bad.jinja": ("{{ raise_exception('no tools') }}", "no tools")}
    for name, (text, word) in wrong.items():
        (tmp_path / name).write_text(text)
        named = data.chat_template(tokenizer, str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"{name}[^\n]*{word}[^\n]*$"):
            data.encode(data.Example(CHAT[:2], [CHAT[2:]], [1.0]), tokenizer, 99, 50, named)
    with pytest.raises(ValueError, match="nowhere.jinja"):
        data.chat_template(tokenizer, "nowhere.jinja")
    assert (data.chat_template(tokenizer, None)[1], data.chat_template(tokenizer, "raw")) == (None, RAW)
    tokenizer.chat_template = tokenizer.eos_token = None
    assert data.chat_template(tokenizer, None) == PLAIN
    with pytest.raises(ValueError, match="eos"):
        data.encode(example(USER, "a"), tokenizer, 99, 50, PLAIN)


# Pack and plan.


def draw_group(rng):
    lengths = [rng.randrange(1, 7) for _ in range(rng.randrange(1, 5))]
    prompt, *completions = ([rng.randrange(99) for _ in range(size)] for size in [rng.randrange(6), *lengths])
    trained = [[rng.random() < 0.7 and (i > 0 or prompt != []) for i in range(size)] for size in lengths]
    scores = [0.5] * len(lengths) if rng.random() < 0.3 else rng.sample([-1.5, 0.0, 2.0, 7.0], len(lengths))
    return data.Encoded(prompt, completions, trained, scores, rng.randrange(4), rng.randrange(4))


@pytest.mark.parametrize("seed", range(20))
def test_pack_is_what_a_loop_says(seed):
    # red: `begin + index - 1` for a first token; positions or responses that run on; worst and best swapped
    rng = random.Random(seed)
    groups = [draw_group(rng) for _ in range(rng.randrange(1, 6))]
    ids, positions, predict, targets, response, ends, scores, pairs, margins, weights = [[] for _ in range(10)]
    for group in groups:
        prompt = range(len(ids), len(ids) + len(group.prompt))
        first = len(ends)
        ids += group.prompt
        positions += range(len(prompt))
        for completion, trained in zip(group.completions, group.trained):
            places = [*prompt, *range(len(ids), len(ids) + len(completion))]  # of each token, in the row
            ids += completion
            positions += range(len(prompt), len(places))
            predict += [places[len(prompt) + i - 1] for i, wanted in enumerate(trained) if wanted]
            targets += [token for token, wanted in zip(completion, trained) if wanted]
            response += [len(ends)] * sum(trained)
            ends.append(places[-1])
            weights.append(group.weight * (seed % 2))
        scores += group.scores
        if len(set(group.scores)) > 1:
            pairs.append([first + group.scores.index(pick(group.scores)) for pick in (max, min)])
            margins.append(group.margin)
    found = data.pack(groups, counted=bool(seed % 2))
    assert len(ids) == sum(group.tokens for group in groups)  # no padding
    expected = [[ids], [positions], predict, targets, response, ends, scores, margins, weights]
    names = ["ids", "positions", "predict", "targets", "response", "ends", "scores", "margins", "weights"]
    assert [getattr(found, name).tolist() for name in names] == expected
    assert found.pairs.t().tolist() == pairs and found.pairs.shape == (2, len(pairs))
    assert found.pair_weights.tolist() == [weights[best] for best, _ in pairs]
    assert found.groups == [(len(group.prompt), list(map(len, group.completions))) for group in groups]


@pytest.mark.parametrize("seed", range(40))
def test_plan_gives_every_group_once_and_every_rank_as_many_micro_batches(seed):
    # red: drop_last; an order that depends on world_size; a filler that counts
    rng = random.Random(seed)
    lengths = [rng.randrange(1, rng.choice([50, 600])) for _ in range(rng.randrange(1, 70))]
    batch_size, budget = rng.randrange(1, 30), rng.choice([20, 300, 2000])
    unions = []
    for world_size in (1, 2, 5):
        plan = data.plan(lengths, batch_size, world_size, budget, seed)
        assert plan == data.plan(lengths, batch_size, world_size, budget, seed)
        unions.append([])
        for step in plan:
            assert len(step) == world_size and len({len(rank) for rank in step}) == 1
            works = [work for rank in step for work in rank]
            for work in works:
                load = sum(lengths[group] for group in work.groups)
                assert work.groups and (load <= budget or len(work.groups) == 1)
                assert work.counted or (len(work.groups) == 1 and load == min(lengths))
            unions[-1].append({group for work in works if work.counted for group in work.groups})
            assert sum(len(work.groups) for work in works if work.counted) == len(unions[-1][-1])
        sizes = [min(batch_size, len(lengths) - start) for start in range(0, len(lengths), batch_size)]
        assert list(map(len, unions[-1])) == sizes and set().union(*unions[-1]) == set(range(len(lengths)))
    assert unions[0] == unions[1] == unions[2]


def test_no_micro_batch_is_made_of_fillers_alone():
    for step in data.plan([5000] + [50] * 7, 8, 2, 512, None):
        assert all(any(work.counted for work in micro_batch) for micro_batch in zip(*step))


def test_plan_orders_and_balances():
    # red: a seed or an epoch ignored; groups dealt in order instead of by length
    rng = random.Random(7)
    lengths = [rng.randrange(60, 500) for _ in range(256)]
    plans = [data.plan(lengths, 64, 4, 4096, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(map(str, plans))) == 4
    assert [sorted(step[0][0].groups) for step in data.plan(lengths[:5], 2, 1, 999, None)] == [[0, 1], [2, 3], [4]]
    for step in plans[0]:
        loads = [sum(lengths[group] for work in rank for group in work.groups) for rank in step]
        assert max(loads) < 1.05 * sum(loads) / 4 and all(work.counted for rank in step for work in rank)
        assert len(step[0]) <= 1.2 * sum(loads) / (4 * 4096) + 1  # nearly as few micro-batches as fit
