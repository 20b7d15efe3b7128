"""Readers, encode, pack and plan against oracles written from what they promise: loops over characters, ids.

The tokenizer of examples/tiny is byte-level and writes ChatML. `red:` names a change that turns a test red.
"""
import collections
import gzip
import json
import random

import datasets as hub
import pytest
import torch
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import batch
import data


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")


def turns(*contents, system=None):
    opening = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(contents)
    return opening + [{"role": role, "content": content} for role, content in zip(roles, contents)]


def example(prompt, *completions):
    return data.Example(prompt, list(completions), [float(-i) for i in range(len(completions))], where="f:7")


def write(path, rows):
    rows = [row if isinstance(row, dict) else {"chosen": row[0], "rejected": row[1]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


USER = turns("q")
ANSWER = [{"role": "assistant", "content": "a"}]
CHAT = turns("q", "a", "r", "b", system="s")
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "q", "completions": ["a", "b", ANSWER], "scores": [1, -2.5, 3]}
FORMS = [
    (PAIR, (USER, ["a", "b"], [1.0, 0.0])),
    ({"prompt": USER, "chosen": ANSWER, "rejected": "b", "weight": 2}, (USER, ["a", "b"], [1.0, 0.0], 2.0)),
    ({"prompt": "", "chosen": "a", "rejected": "b", "margin": 0.5}, ([], ["a", "b"], [1.0, 0.0], 1.0, 0.5)),
    (RANKED, (USER, ["a", "b", "a"], [1.0, -2.5, 3.0])),
    ({"prompt": CHAT[:4], "completion": " b\n"}, (CHAT[:4], [" b\n"], [1.0])),
    ({"prompt": "q", "completion": "b", "label": False}, (USER, ["b"], [0.0])),
    ({"prompt": "q", "completion": "b", "label": True}, (USER, ["b"], [1.0])),
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
    bare = [not {"label", "chosen", "scores"} & set(row) for row, _ in FORMS]  # no word on what is good
    expected = [example._replace(labelled=not plain) for example, plain in zip(expected, bare)]
    assert data.load(str(path), "train") == (expected, {})


def row(base=PAIR, **change):
    return json.dumps(base | change).encode()


MISTAKES = {  # what the message must hold: rows
    "not ": [b"{'prompt': 'q'}", b"{", row().replace(b"q", b"\xff"), b"[1]", b'"q"'],  # JSON, UTF-8, object
    '"prompt': [b'{"chosen": "a", "rejected": "b"}', row(prompt=1), row(prompt=None)],
    '"chosen': [row(chosen=value) for value in (1, "", USER, turns("q", "a"), "\ud83d")],
    '"rejected': [b'{"prompt": "q", "chosen": "a"}', row(rejected=" \n")],
    '"text': [b'{"text": ["a"]}', b'{"text": ""}'],
    "prompt[0]": [row(prompt=[turn]) for turn in ("q", {"role": "user"}, {"role": "user", "text": "q"})],
    "prompt[0].": [row(prompt=[{"role": "bot", "content": "q"}]), row(prompt=turns(""))],
    "assistant": [row({}, messages=USER)],
    '"weight': [row(weight=value) for value in (float("nan"), float("inf"), -1, "1", True, None, 10**400)],
    '"margin': [row(margin=float("nan"))],
    "scores": [row(RANKED, scores=value) for value in ([1, 2], [], [1, 2, float("nan")], ["1", 2, 3], 1)],
    "completions": [row(RANKED, completions=value) for value in (["a", "", "b"], ["a", "b", 1], "abc", [])],
}
FILES = {"none.jsonl": None, "a.txt": row(), "blank.jsonl": b"\n \n", "empty.json": b"[]", "one.json": row()}
FILES |= {"plain.jsonl.gz": row(), "cut.jsonl.gz": gzip.compress(row() * 50)[:-9], "hh=no/directory": None}
FILES |= {"hh=other.jsonl": b'{"question": "q"}', "imdb=other.jsonl": b'{"question": "q"}'}


def refused(source, *words, split="train"):
    """One line that starts with the first of the words and holds the others."""
    with pytest.raises(ValueError) as caught:
        data.load(str(source), split)
    message = str(caught.value)
    assert message.startswith(words[0]) and "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize(("word", "content"), [(word, bad) for word in MISTAKES for bad in MISTAKES[word]])
def test_a_mistake_is_named_with_its_line(tmp_path, word, content):
    # red: any check of _example, _turns, _string or _number left out; `number = 1` before the loop
    path = tmp_path / "a.jsonl"
    path.write_bytes(row() + b"\n\n" + content + b"\n" + row())
    refused(path, f"{path}:3: ", word)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    dataset, _, file = name.rpartition("=")
    if FILES[name] is not None:
        (tmp_path / file).write_bytes(FILES[name])
    refused(f"{dataset}={tmp_path}/{file}" if dataset else tmp_path / file, f"{tmp_path}/{file}")


ASKED = "\n\nHuman: p\n\nAssistant: "
LONG = ASKED + "o\n\nHuman: n\n\nAssistant: "
STRAY = ["\n\nHuman: o" + ASKED, "\n\nAssistant: o" + ASKED, "preamble" + ASKED, "\n\nAssistant: ", ""]
DIRT = {
    "differ": [(ASKED + "a", LONG + "b"), (LONG + "a", LONG.replace("o", "m") + "b")],
    "alternate": [(text + "a", text + "b") for text in STRAY],
    "empty": [(ASKED + " ", ASKED + "b"), (ASKED + "a", ASKED)],
    "": [(LONG.replace("o", "") + "a", LONG.replace("o", "") + "b")],  # an empty turn in the prompt
    "Human": [(ASKED + "a\n\nHuman: o", ASKED + "b\n\nHuman: o")],  # ends with a turn of the human
}
CLEAN = [(ASKED + "a\n\nmore", ASKED + " b"), (LONG + "f():\n    x", LONG + "b")]
PAIRS = [(turns("p"), ["a\n\nmore", "b"]), (turns("p", "o", "n"), ["f():\n    x", "b"])]
READ = [data.Example(prompt, answers, [1.0, 0.0]) for prompt, answers in PAIRS]


@pytest.mark.parametrize("kind", DIRT)
def test_hh_counts_each_kind_of_dirt(tmp_path, tmp_path_factory, monkeypatch, kind):
    # red: roles by parity; the rejected dialogue's prompt ignored; rows dropped in silence; split="train"
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    path = write(tmp_path / "train.jsonl", CLEAN[:1] + DIRT[kind])
    write(tmp_path / "test.jsonl", CLEAN[1:])
    for source, split in ((path, "train"), (tmp_path, "train"), (tmp_path, "test")):
        examples, dropped = data.load(f"hh={source}", split)
        assert [found._replace(where="") for found in examples] == [READ[split == "test"]]
        assert all(kind in reason for reason in dropped)
        assert dropped.total() == len(DIRT[kind]) * (split == "train")
    refused(f"hh={tmp_path}", str(tmp_path), "validation", split="validation")


def test_imdb_from_a_file(tmp_path):
    # red: characters for texts; <br /> kept
    path = write(tmp_path / "a.jsonl", [{"text": "A.<br /><br />B. ", "label": 1}, {"text": " ", "label": 0}])
    examples, dropped = data.load(f"imdb={path}", "train")
    assert [found[:3] for found in examples] == [([], ["A.\n\nB."], [1.0])] and dropped.total() == 1


TALK = turns("one two three", "four", "five six seven", system="Be brief.")
OPENING = "<|im_start|>assistant\n"
TEXTS = ["yes", "def f():\n    return  1", "  two\t", "\nline\n", "naïve 日本語 🙂 e\u0301", ">"]
DIALOGUES = {"user": TALK, "newline": TALK + turns("\n\n" + "n m o p q " * 9)}
DIALOGUES["tool"] = [*TALK, {"role": "tool", "content": "t u v w x y z " * 9}]


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
    assert encoded.prompt == tokenizer.encode(PROMPTS[template])
    assert encoded.completions[0] == tokenizer.encode(answer) and all(map(all, encoded.trained))


def test_the_end_of_turn_is_trained_exactly_when_nothing_was_cut(tokenizer):
    # red: an end after the cut; a budget that forgets the end; a prompt cut to fit; an Example changed
    pair = example(TALK, "a b c d e " * 9, "f g h i j k l m " * 5)
    before = repr(pair)
    whole = data.encode(pair, tokenizer, 500, 400, OWN)
    prompt = len(whole.prompt)
    for max_length in reversed(range(1, prompt + 50)):
        encoded = data.encode(pair, tokenizer, max_length, 400, OWN)
        assert (encoded, before) == (data.encode(pair, tokenizer, max_length, 400, OWN), repr(pair))
        if max_length <= prompt:
            assert isinstance(encoded, str), max_length
            continue
        assert encoded.prompt == whole.prompt
        for found, full, trained in zip(encoded.completions, whole.completions, encoded.trained):
            assert found == full[: max_length - prompt] and trained == [True] * len(found)
            assert (found[-1] == tokenizer.eos_token_id) == (prompt + len(full) <= max_length)


@pytest.mark.parametrize("name", DIALOGUES)
def test_truncation_keeps_the_end_of_a_dialogue_in_whole_turns(tokenizer, name):
    """For every limit the prompt is well-formed: the system turn, and as many of the last turns as fit."""
    # red: the oldest turns kept; the system turn dropped; a header cut
    dialogue = DIALOGUES[name]
    first = f"{chatml(dialogue[:1])}<|im_start|>{dialogue[-1]['role']}\n"
    last = f"<|im_end|>\n{OPENING}"
    frame = len(tokenizer.encode(first + last))
    starts = [start for start, turn in enumerate(dialogue) if turn["role"] == "user" or turn is dialogue[-1]]
    shorter = [chatml(dialogue[:1] + dialogue[start:]) + OPENING for start in starts]
    for limit in reversed(range(1, 120)):
        encoded = data.encode(example(dialogue, "b", "c"), tokenizer, 500, limit, OWN)
        if limit <= frame:
            assert isinstance(encoded, str) or limit == frame, limit
            continue
        text = tokenizer.decode(encoded.prompt)
        whole = [kept for kept in shorter if len(tokenizer.encode(kept)) <= limit]
        middle = text.removeprefix(first).removesuffix(last)
        assert text == (whole[0] if whole else first + middle + last), limit
        assert whole or len(encoded.prompt) == limit and dialogue[-1]["content"].endswith(middle), limit


@pytest.mark.parametrize("first", [0, 1, 2], ids=["system first", "user first", "assistant first"])
def test_exactly_the_assistant_turns_of_a_conversation_are_trained(tokenizer, tmp_path, first):
    # red: headers trained; the end untrained; only the last turn trained; the turn after the last answer kept
    talk = turns("one", "a", "two  ", " three\n    x ", "more", system="s")[first:]
    wanted = []
    for turn in talk[:-1]:
        role, said = turn["role"], turn["content"] + "<|im_end|>"
        parts = ((f"<|im_start|>{role}\n", False), (said, role == "assistant"), ("\n", False))
        wanted += [(character, trained) for part, trained in parts for character in part]
    path = write(tmp_path / "a.jsonl", [{"messages": talk}])
    encoded = data.encode(next(data.read(path)), tokenizer, 500, 400, OWN)
    marks = [(token, False) for token in encoded.prompt] + [*zip(encoded.completions[0], encoded.trained[0])]
    assert [(c, trained) for token, trained in marks for c in tokenizer.decode([token])] == wanted[:-1]


@pytest.mark.parametrize("kind", ["none", "named", "added"])
def test_the_beginning_of_a_text(tokenizer, kind):
    # red: a first token trained without a BOS; BOS twice; BOS lost in truncation
    tokenizer.bos_token = None if kind == "none" else "<|endoftext|>"  # id 0
    answers = [tokenizer.encode(text + "<|im_end|>") for text in ("better", "worse")]
    if kind == "added":
        start = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = start
    encoded = data.encode(example([], "better", "worse"), tokenizer, 99, 50, OWN)
    assert (encoded.prompt, encoded.completions) == ([0] * (kind != "none"), answers)
    assert all(mark == [kind != "none"] + [True] * (len(mark) - 1) for mark in encoded.trained)
    for template, limit in ((OWN, 400), (PLAIN, 400), (PLAIN, 30)):  # a chat template writes its own
        given = template if template == OWN else data.chat_template(tokenizer, "plain")
        prompt = data.encode(example(TALK, "a"), tokenizer, 500, limit, given).prompt
        assert (prompt[0] == 0, 0 in prompt[1:]) == (kind == "added" and template == PLAIN, False)
    tokenizer.chat_template = "{{ bos_token or '' }}" + tokenizer.chat_template
    for talk in (USER, []):
        encoded = data.encode(example(talk, ANSWER), tokenizer, 99, 50, OWN)
        assert (encoded.prompt + encoded.completions[0]).count(0) == (kind != "none")


def test_the_choice_of_a_template(tokenizer, tmp_path):
    # red: startswith() not checked
    forget = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ messages[-1].role }}"
    (tmp_path / "forget.jinja").write_text(forget)
    named = data.chat_template(tokenizer, str(tmp_path / "forget.jinja"))
    with pytest.raises(ValueError, match=r"^f:7: [^\n]*forget.jinja[^\n]*prefix[^\n]*$"):
        data.encode(example(CHAT[:2], CHAT[2:]), tokenizer, 99, 50, named)
    with pytest.raises(ValueError, match="nowhere.jinja"):
        data.chat_template(tokenizer, "nowhere.jinja")
    assert (data.chat_template(tokenizer, None)[1], data.chat_template(tokenizer, "raw")) == (None, RAW)
    tokenizer.chat_template = tokenizer.eos_token = None
    assert data.chat_template(tokenizer, None) == PLAIN
    with pytest.raises(ValueError, match="eos"):
        data.encode(example(USER, "a"), tokenizer, 99, 50, PLAIN)


@pytest.mark.parametrize("seed", range(20))
def test_pack_is_what_a_loop_says(seed):
    # red: `begin + index - 1` for a first token; positions or responses that run on; worst and best swapped
    rng = random.Random(seed)
    groups = []
    for size in [rng.randrange(1, 5) for _ in range(rng.randrange(1, 6))]:
        lengths = rng.choices(range(1, 7), k=size)
        prompt, *completions = (rng.choices(range(99), k=length) for length in [rng.randrange(6), *lengths])
        trained = [[rng.random() < 0.7 and i + len(prompt) > 0 for i in range(length)] for length in lengths]
        scores = rng.choice([[0.5] * size, rng.sample([-1.5, 0.0, 2.0, 7.0], size)])
        groups.append(data.Encoded(prompt, completions, trained, scores, rng.randrange(4), rng.randrange(4)))
    want = collections.defaultdict(list)
    for group in groups:
        prompt = range(len(want["ids"]), len(want["ids"]) + len(group.prompt))
        first = len(want["ends"])
        want["ids"] += group.prompt
        want["positions"] += range(len(prompt))
        for completion, trained in zip(group.completions, group.trained):
            places = [*prompt, *range(len(want["ids"]), len(want["ids"]) + len(completion))]  # of each token
            want["ids"] += completion
            want["positions"] += range(len(prompt), len(places))
            want["predict"] += [places[len(prompt) + i - 1] for i, wanted in enumerate(trained) if wanted]
            want["targets"] += [token for token, wanted in zip(completion, trained) if wanted]
            want["response"] += [len(want["ends"])] * sum(trained)
            want["ends"].append(places[-1])
            want["weights"].append(group.weight * (seed % 2))
        want["scores"] += group.scores
        if len(set(group.scores)) > 1:
            want["pairs"] += [[first + group.scores.index(pick(group.scores)) for pick in (max, min)]]
            want["margins"].append(group.margin)
            want["pair_weights"].append(group.weight * (seed % 2))
    found = batch.pack(groups, counted=bool(seed % 2))
    assert found.ids.shape == (1, len(want["ids"])) and found.ids.dtype == found.pairs.dtype == torch.long
    actual = {name: getattr(found, name) for name in want}
    actual |= {"ids": found.ids[0], "positions": found.positions[0], "pairs": found.pairs.t()}
    assert {name: actual[name].tolist() for name in want} == want
    assert found.groups == [(len(group.prompt), list(map(len, group.completions))) for group in groups]


@pytest.mark.parametrize("seed", range(40))
def test_plan_gives_every_group_once_and_every_rank_as_many_micro_batches(seed):
    # red: drop_last; an order that depends on world_size; a filler that counts
    rng = random.Random(seed)
    lengths = [rng.randrange(1, rng.choice([50, 600])) for _ in range(rng.randrange(1, 70))]
    batch_size, budget = rng.randrange(1, 30), rng.choice([20, 300, 2000])
    sizes = [min(batch_size, len(lengths) - start) for start in range(0, len(lengths), batch_size)]
    steps = []
    for world_size in (1, 2, 5):
        plan = batch.plan(lengths, batch_size, world_size, budget, seed)
        assert plan == batch.plan(lengths, batch_size, world_size, budget, seed)
        assert all(len(step) == world_size and len({len(rank) for rank in step}) == 1 for step in plan)
        for work in [work for step in plan for rank in step for work in rank]:
            load = sum(lengths[group] for group in work.groups)
            assert work.groups and (load <= budget or len(work.groups) == 1)
            assert work.counted or (len(work.groups) == 1 and load == min(lengths))
        counted = [[work for rank in step for work in rank if work.counted] for step in plan]
        steps.append([sorted(group for work in works for group in work.groups) for works in counted])
        assert list(map(len, steps[-1])) == sizes and sorted(sum(steps[-1], [])) == list(range(len(lengths)))
    assert steps[0] == steps[1] == steps[2]


def test_plan_orders_and_balances():
    # red: a seed or an epoch ignored; groups dealt in order instead of by length
    lengths = random.Random(7).choices(range(60, 500), k=256)
    plans = [batch.plan(lengths, 64, 4, 4096, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(map(str, plans))) == 4
    assert [sorted(step[0][0].groups) for step in batch.plan([5] * 5, 2, 1, 99, None)] == [[0, 1], [2, 3], [4]]
    for step in plans[0]:
        loads = [sum(lengths[group] for work in rank for group in work.groups) for rank in step]
        assert max(loads) < 1.02 * sum(loads) / 4 and all(work.counted for rank in step for work in rank)
        assert len(step[0]) <= 1.2 * sum(loads) / (4 * 4096) + 1  # nearly as few micro-batches as fit
    for step in batch.plan([5000] + [50] * 7, 8, 2, 512, None):  # no micro-batch of fillers alone
        assert all(any(work.counted for work in micro_batch) for micro_batch in zip(*step))
