"""The named datasets: rows in their published form, in the published files, against Examples written by hand.

Each dataset has dirt in its fixture, and files beside its rows that are not to be read. `red:` names a change
that turns a test red.
"""

import gzip
import inspect
import json
import os
from pathlib import Path

import datasets as hub
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

import data
from formats import Example


def write(folder, contents):
    """Files of rows: {"path": [row, ...]}, as their suffixes say."""
    for name, rows in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines))
        else:
            path.write_bytes(json.dumps(rows).encode() if name == "alpaca_eval.json" else lines)


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def pair(where, prompt, *answers):
    return Example(prompt, list(answers), [1.0, 0.0], where=where)


def ranked(where, prompt, **answers):
    """Answers by name, each with its score."""
    return Example(prompt, list(answers), [float(score) for score in answers.values()], where=where)


EMPTY = "an answer is empty"
DISORDER = "roles do not alternate"


# ---- Anthropic's dialogues
# --------------------------------------------------------------------------------------------------------


def dialogues(prompt, chosen, rejected):
    return {
        key: f"{prompt}\n\nAssistant: {text}" for key, text in (("chosen", chosen), ("rejected", rejected))
    }


HH_FILES = {
    "harmless-base/train.jsonl.gz": [
        dialogues("\n\nHuman: h1", "no", "yes"),
        dialogues("\n\nHuman: h2", "no", " "),
        dialogues("\n\nHuman: h3\n\nAssistant: a\n\nHuman: b", "so", "so what"),
    ],
    "harmless-base/test.jsonl.gz": [dialogues("\n\nHuman: ht", "no", "yes")],
    "helpful-base/train.jsonl.gz": [dialogues("\n\nHuman: b1", "better", "worse")],
    "helpful-base/test.jsonl.gz": [dialogues("\n\nHuman: bt", "better", "worse")],
    "helpful-online/train.jsonl.gz": [
        {"chosen": "\n\nHuman: o1\n\nAssistant: x", "rejected": "\n\nHuman: o2\n\nAssistant: y"}
    ],
    "helpful-online/test.jsonl.gz": [dialogues("\n\nHuman: ot", "better", "worse")],
    "helpful-rejection-sampled/train.jsonl.gz": [dialogues("\n\nHuman: r1\n\nHuman: r2", "x", "y")],
    "helpful-rejection-sampled/test.jsonl.gz": [dialogues("\n\nHuman: rt", "better", "worse")],
    # transcripts, no pairs: reading them would be an error
    "red-team-attempts/red_team_attempts.jsonl.gz": [{"transcript": "x", "rating": 4.0}],
}
HARMLESS_TRAIN = [
    pair("harmless-base/train.jsonl.gz:1", turns("h1"), "no", "yes"),
    EMPTY,
    pair("harmless-base/train.jsonl.gz:3", turns("h3", "a", "b"), "so", "so what"),
]
HARMLESS_TEST = [pair("harmless-base/test.jsonl.gz:1", turns("ht"), "no", "yes")]
HELPFUL_TRAIN = [
    pair("helpful-base/train.jsonl.gz:1", turns("b1"), "better", "worse"),
    "the two dialogues differ before the last answer",
    DISORDER,
]
HELPFUL_TEST = [
    pair("helpful-base/test.jsonl.gz:1", turns("bt"), "better", "worse"),
    pair("helpful-online/test.jsonl.gz:1", turns("ot"), "better", "worse"),
    pair("helpful-rejection-sampled/test.jsonl.gz:1", turns("rt"), "better", "worse"),
]
HH = {"train": HELPFUL_TRAIN + HARMLESS_TRAIN, "test": HELPFUL_TEST + HARMLESS_TEST}


# ---- posts and comments
# --------------------------------------------------------------------------------------------------------


def comments(history, a, b, labels, score_ratio):
    row = {"post_id": "p", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": history}
    row |= {"score_A": 2, "score_B": 3, "human_ref_A": a, "human_ref_B": b, "labels": labels}
    return row | {"seconds_difference": 10.0, "score_ratio": score_ratio}


SHP_TRAIN = "askculinary/train.json"
SHP_FILES = {
    SHP_TRAIN: [
        comments("one", "a", "b", 1, 2.0),
        comments("one", "a", "b", 0, 7.5),
        comments("one", "a", "b", 1, 1.99),
        comments("one", "", "b", 1, 3.0),
        *[comments("many", f"a{i}", f"b{i}", 1, 4) for i in range(7)],
        *[comments("one", f"c{i}", "d", 1, 2.0) for i in range(4)],
    ],
    "askculinary/validation.json": [comments("unread", "a", "b", 1, 2.0)],
    "askculinary/test.json": [comments("t", "a", "b", 0, 2.5), comments("t", "a", "b", 0, 1.5)],
    "legaladvice/train.json": [comments("many", "e", "f", 0, 2.0), comments("two", "e", "f", 0, 2.0)],
    "legaladvice/test.json": [comments("l", "a", "b", 1, 9.0)],
}
SHP = {
    "train": [
        pair(f"{SHP_TRAIN}:1", turns("one"), "a", "b"),
        pair(f"{SHP_TRAIN}:2", turns("one"), "b", "a"),
        "a score ratio below 2",
        EMPTY,
        *[pair(f"{SHP_TRAIN}:{5 + i}", turns("many"), f"a{i}", f"b{i}") for i in range(5)],
        *["more than 5 pairs of one prompt"] * 2,
        *[pair(f"{SHP_TRAIN}:{12 + i}", turns("one"), f"c{i}", "d") for i in range(3)],
        "more than 5 pairs of one prompt",
        "more than 5 pairs of one prompt",
        pair("legaladvice/train.json:2", turns("two"), "f", "e"),
    ],
    "test": [
        pair("askculinary/test.json:1", turns("t"), "b", "a"),
        "a score ratio below 2",
        pair("legaladvice/test.json:1", turns("l"), "a", "b"),
    ],
}


# ---- trees of messages
# --------------------------------------------------------------------------------------------------------


def message(name, parent, rank=None, text=None, lang="en", deleted=False, tree="t1"):
    """Names of prompters' messages begin with p, those of answers with a."""
    role = "prompter" if name[0] == "p" else "assistant"
    row = {"message_id": name, "parent_id": parent, "user_id": "u", "text": name if text is None else text}
    row |= {"role": role, "lang": lang, "review_result": True, "deleted": deleted, "rank": rank}
    return row | {"synthetic": False, "message_tree_id": tree, "tree_state": "ready_for_export"}


OASST_TRAIN = "data/train-00000-of-00001-b42a775f407cee45.parquet"
OASST_TEST = "data/validation-00000-of-00001-134b8fd0c89408b6.parquet"
TREES = [
    message("p1", None),
    message("a11", "p1", rank=1),
    message("p3", "a11", rank=1),
    message("a31", "p3", rank=0),
    message("p4", "a11", rank=0),
    message("a41", "p4", rank=0, text=" "),
    message("a42", "p4", rank=1),
    message("a12", "p1", rank=0),
    message("p2", "a12"),
    message("a21", "p2", rank=1),
    message("a22", "p2", rank=0),
    message("a13", "p1", rank=2),
    message("a14", "p1", rank=3, deleted=True),
    message("p5", "a14"),
    message("a51", "p5", rank=0),
    message("a52", "p5", rank=1),
    message("a15", "p1", rank=4, lang="de"),
    message("p6", "a15"),
    message("a61", "p6", rank=0),
    message("a62", "p6", rank=1),
    message("a16", "p1"),
    message("p7", None, lang="de", tree="t2"),
    message("a71", "p7", rank=0, lang="de", tree="t2"),
    message("a72", "p7", rank=1, lang="de", tree="t2"),
    message("p8", "gone", tree="t3"),
    message("a81", "p8", rank=0, tree="t3"),
    message("a82", "p8", rank=1, tree="t3"),
    message("p9", "a91", tree="t4"),
    message("a91", "p9", rank=0, tree="t4"),
    message("a92", "p9", rank=1, tree="t4"),
]
OASST_FILES = {
    OASST_TRAIN: TREES,
    OASST_TEST: [message("p1", None), message("a1", "p1", rank=1), message("a2", "p1", rank=0)],
    # what else is in the repository: the same messages once more
    "2023-04-12_oasst_all.messages.jsonl.gz": [message("p1", None)],
    "2023-04-12_oasst_ready.trees.jsonl.gz": [{"message_tree_id": "t1", "prompt": {"replies": []}}],
}
OASST = {
    "train": [
        ranked(f"{OASST_TRAIN}[0]", turns("p1"), a12=0, a11=-1, a13=-2),
        "fewer than two ranked answers",
        EMPTY,
        ranked(f"{OASST_TRAIN}[8]", turns("p1", "a12", "p2"), a22=0, a21=-1),
        "deleted, or after a deleted message",
        "not in English, or after such a message",
        "not in English, or after such a message",
        "a message before it is missing",
        "a message before it is missing",
    ],
    "test": [ranked(f"{OASST_TEST}[0]", turns("p1"), a2=0, a1=-1)],
}


# ---- UltraFeedback, UltraChat
# --------------------------------------------------------------------------------------------------------


def binarized(prompt, chosen, rejected, scores=(8.0, 6.0)):
    row = {
        "prompt": prompt,
        "prompt_id": "i",
        "chosen": turns(prompt, chosen),
        "rejected": turns(prompt, rejected),
    }
    return row | {"messages": row["chosen"], "score_chosen": scores[0], "score_rejected": scores[1]}


BINARIZED = "data/{}-00000-of-00001.parquet"
ULTRABIN_FILES = {
    BINARIZED.format("train_prefs"): [
        binarized("q1\n\nq1", "good", "bad"),
        binarized("q2", "good", ""),
        binarized("q3", "as good", "as bad", (7.0, 7.0)),
    ],
    BINARIZED.format("test_prefs"): [binarized("q4", "good", "bad")],
    **{BINARIZED.format(f"{split}_sft"): [binarized("unread", "a", "b")] for split in ("train", "test")},
}
ULTRABIN = {
    "train": [
        pair(f"{BINARIZED.format('train_prefs')}[0]", turns("q1\n\nq1"), "good", "bad"),
        EMPTY,
        pair(f"{BINARIZED.format('train_prefs')}[2]", turns("q3"), "as good", "as bad"),
    ],
    "test": [pair(f"{BINARIZED.format('test_prefs')}[0]", turns("q4"), "good", "bad")],
}
HYBRID_FILES = {
    BINARIZED.format("train"): [binarized("q1", "good", "bad"), binarized("q2", " \n", "bad")],
    BINARIZED.format("test"): [binarized("q3", "good", "bad")],
}
HYBRID = {
    "train": [pair(f"{BINARIZED.format('train')}[0]", turns("q1"), "good", "bad"), EMPTY],
    "test": [pair(f"{BINARIZED.format('test')}[0]", turns("q3"), "good", "bad")],
}


def conversation(*contents):
    return {"prompt": contents[0], "prompt_id": "i", "messages": turns(*contents)}


def trained(where, prompt, *contents):
    """A conversation whose answers are all trained, from its first answer on."""
    rest = turns(prompt, *contents)[1:]
    answer = rest if len(rest) > 1 else rest[0]["content"]
    return Example(turns(prompt), [answer], [1.0], where=where, labelled=False)


CHAT_1 = "data/train_sft-00000-of-00002-a3ecf92756993583.parquet"
CHAT_2 = "data/train_sft-00001-of-00002-0a1804bcb6ae68c6.parquet"
CHAT_TEST = "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet"
ULTRACHAT_FILES = {
    CHAT_1: [conversation("q", "a", "r", "b"), conversation("q", "a", "r", ""), conversation("q")],
    CHAT_2: [conversation("s", "c")],
    CHAT_TEST: [conversation("t", "d", "u", "e", "unanswered")],
    "data/train_gen-00000-of-00001-a6c9fb894be3e50b.parquet": [conversation("unread", "a")],
    "data/test_gen-00000-of-00001-3d4cd8309148a71f.parquet": [conversation("unread", "a")],
}
ULTRACHAT = {
    "train": [
        trained(f"{CHAT_1}[0]", "q", "a", "r", "b"),
        EMPTY,
        "a conversation without an assistant turn",
        trained(f"{CHAT_2}[0]", "s", "c"),
    ],
    "test": [trained(f"{CHAT_TEST}[0]", "t", "d", "u", "e")],
}


# ---- several answers with ranks or scores
# --------------------------------------------------------------------------------------------------------


def nectar(prompt, **ranks):
    answers = [{"answer": name.strip("_"), "model": "m", "rank": rank} for name, rank in ranks.items()]
    row = {"prompt": prompt, "answers": answers, "turns": 1, "num_responses": len(answers)}
    return row | {"source": ["anthropic-hh"], "good_natured": True}


NECTAR_FILES = {
    "data/rlaif.parquet": [
        nectar("\n\nHuman: q1\n\nAssistant: ", b=2.0, a=1.0, c=3.0),
        nectar("\n\nHuman: q2\n\nAssistant: x\n\nHuman: q3\n\nAssistant: ", a=1.0, b=1.0),
        nectar("\n\nHuman: q4\n\nHuman: q5\n\nAssistant: ", a=1.0, b=2.0),
        nectar("\n\nHuman: q6\n\nAssistant: ", a=1.0, _=2.0),
    ]
}
NECTAR = {
    "train": [
        ranked("data/rlaif.parquet[0]", turns("q1"), b=-2, a=-1, c=-3),
        ranked("data/rlaif.parquet[1]", turns("q2", "x", "q3"), a=-1, b=-1),
        DISORDER,
        EMPTY,
    ]
}


def steered(prompt, response, helpfulness):
    row = {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 4 - helpfulness}
    return row | {"coherence": 4, "complexity": 1, "verbosity": 4 - helpfulness}


TWICE = "q4\n<extra_id_1>User\nq5\n<extra_id_1>Assistant\nx"
MULTI = "q2 \n\n<extra_id_1>Assistant\n x\ny\n<extra_id_1>User\nq3"
HELPSTEER_FILES = {
    "train.jsonl.gz": [
        steered("q1", "worse", 1),
        steered("q1", "better", 4),
        steered(MULTI, "a", 3),
        steered(MULTI, "b", 3),
        steered(TWICE, "a", 3),
        steered(TWICE, "b", 2),
        steered("q6\n<extra_id_1>Assistant\n", "a", 3),
        steered("q7", "a", 0),
        steered("q7", " ", 3),
        steered("q8", "alone", 2),
        steered("q9<extra_id_1>", "a", 2),
    ],
    "validation.jsonl.gz": [steered("q1", "v", 2), steered("q1", "w", 3)],
    "preference/preference.jsonl.gz": [{"prompt": "q1", "response_1": "a", "response_2": "b"}],
    "disagreements/disagreements.jsonl.gz": [{"prompt": "q1", "response": "a", "helpfulness": [1, 2]}],
}
HELPSTEER = {
    "train": [
        ranked("train.jsonl.gz:1", turns("q1"), better=4, worse=1),
        ranked("train.jsonl.gz:3", turns("q2 \n", " x\ny", "q3"), a=3, b=3),
        DISORDER,
        DISORDER,
        EMPTY,
        ranked("train.jsonl.gz:10", turns("q8"), alone=2),
        DISORDER,
    ],
    "test": [ranked("validation.jsonl.gz:1", turns("q1"), w=3, v=2)],
}


def safe(prompt, first, second, better, safer):
    row = {"prompt": prompt, "response_0": first, "response_1": second, "prompt_source": "s"}
    row |= {f"is_response_{i}_safe": i == safer for i in (0, 1)}
    return row | {"better_response_id": better, "safer_response_id": safer}


SAFE_FILES = {
    "data/Alpaca-7B/train.jsonl": [
        safe("q1", "a", "b", 0, 1),
        safe("q2", "a", "b", 1, 0),
        safe("q3", "a", "b", None, 1),
        safe("q4", "a", "\t", 0, 0),
    ],
    "data/Alpaca-7B/test.jsonl": [safe("q5", "a", "b", 1, 1)],
    "data/Alpaca2-7B/train.jsonl": [safe("q6", "a", "b", 1, 1)],
    "data/Alpaca2-7B/test.jsonl": [safe("q7", "a", "b", 0, 0)],
}
SAFE = {
    "train": [
        pair("data/Alpaca-7B/train.jsonl:1", turns("q1"), "a", "b"),
        pair("data/Alpaca-7B/train.jsonl:2", turns("q2"), "b", "a"),
        "neither answer is better",
        EMPTY,
        pair("data/Alpaca2-7B/train.jsonl:1", turns("q6"), "b", "a"),
    ],
    "test": [
        pair("data/Alpaca-7B/test.jsonl:1", turns("q5"), "b", "a"),
        pair("data/Alpaca2-7B/test.jsonl:1", turns("q7"), "a", "b"),
    ],
}


# ---- prompts, texts
# --------------------------------------------------------------------------------------------------------


def instruction(text):
    return {
        "dataset": "helpful_base",
        "instruction": text,
        "output": "read by nobody",
        "generator": "davinci",
    }


ALPACA_FILES = {
    "alpaca_eval.json": [instruction("q1"), instruction(" "), instruction("q2\nq2")],
    "alpaca_eval_all_outputs.json": [instruction("unread")],
    "alpaca_farm_human_annotations.json": [{"instruction": "unread", "output_1": "a", "output_2": "b"}],
}
PROMPTS = [
    Example(turns("q1"), [], [], where="alpaca_eval.json[0]", labelled=False),
    "a turn of the prompt is empty",
    Example(turns("q2\nq2"), [], [], where="alpaca_eval.json[2]", labelled=False),
]
IMDB_PATH = "plain_text/{}-00000-of-00001.parquet"
IMDB_FILES = {
    IMDB_PATH.format("train"): [
        {"text": "A.<br /><br />B. ", "label": 1},
        {"text": "<br /> ", "label": 0},
        {"text": "C<br>D", "label": 0},
    ],
    IMDB_PATH.format("test"): [{"text": "E", "label": 0}],
    IMDB_PATH.format("unsupervised"): [{"text": "unread", "label": -1}],
}


def text(where, said):
    return Example([], [said], [1.0], where=where, labelled=False)


IMDB = {
    "train": [
        text(f"{IMDB_PATH.format('train')}[0]", "A.\n\nB."),
        EMPTY,
        text(f"{IMDB_PATH.format('train')}[2]", "C<br>D"),
    ],
    "test": [text(f"{IMDB_PATH.format('test')}[0]", "E")],
}

DATASETS = {  # name: its files, what is in its splits, the keys of a row that must be there
    "hh": (HH_FILES, HH, "chosen rejected"),
    "hh_helpful": (HH_FILES, {"train": HELPFUL_TRAIN, "test": HELPFUL_TEST}, "chosen rejected"),
    "hh_harmless": (HH_FILES, {"train": HARMLESS_TRAIN, "test": HARMLESS_TEST}, "chosen rejected"),
    "shp": (SHP_FILES, SHP, "history human_ref_A human_ref_B labels score_ratio"),
    "oasst": (OASST_FILES, OASST, "message_id message_tree_id role text lang"),
    "ultrabin": (ULTRABIN_FILES, ULTRABIN, "prompt chosen rejected"),
    "ultrafeedback_hybrid": (HYBRID_FILES, HYBRID, "prompt chosen rejected"),
    "ultrachat": (ULTRACHAT_FILES, ULTRACHAT, "messages"),
    "nectar": (NECTAR_FILES, NECTAR, "prompt answers"),
    "helpsteer": (HELPSTEER_FILES, HELPSTEER, "prompt response helpfulness"),
    "safe_rlhf": (SAFE_FILES, SAFE, "prompt response_0 response_1 better_response_id"),
    "alpacaeval": (ALPACA_FILES, {"train": PROMPTS, "test": PROMPTS}, "instruction"),
    "imdb": (IMDB_FILES, IMDB, "text"),
}
READS = {name: next(iter(files)) for name, (files, _, _) in DATASETS.items()}  # a file of its train split
READS["hh_helpful"] = "helpful-base/train.jsonl.gz"
ROWS = [(name, split) for name, (_, wanted, _) in DATASETS.items() for split in wanted]


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


def placed(rows, folder):
    """The expected rows with the places that they have in a folder."""
    return [row if isinstance(row, str) else row._replace(where=f"{folder}/{row.where}") for row in rows]


def bare(rows):
    """Rows without their places."""
    return [row if isinstance(row, str) else row._replace(where="") for row in rows]


def refused(source, split, *words):
    """One line that starts with the first of the words and holds the others."""
    with pytest.raises(ValueError) as caught:
        list(data.stream(source, split))
    message = str(caught.value)
    assert message.startswith(words[0]) and "\n" not in message and all(word in message for word in words)


# ---- what is read
# --------------------------------------------------------------------------------------------------------


def test_every_dataset_has_a_fixture_and_no_helper_is_a_dataset():
    # red: a dataset without a fixture; `-> Rows` on a helper
    assert set(data.datasets()) == set(DATASETS)
    assert not {"stream", "rows", "published", "load", "_hh", "_example", "_hub_rows"} & set(data.datasets())


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_is_one_short_function_of_a_split_and_a_place(name):
    # red: a parameter more; a default that is no org/name; no docstring; 26 lines
    function = getattr(data, name)
    split, source = inspect.signature(function).parameters.values()
    assert (split.name, split.annotation, source.name, source.annotation) == ("split", str, "source", str)
    assert split.default is split.empty and source.default.count("/") == 1 and data._on_hub(source.default)
    assert function.__doc__ and len(inspect.getsource(function).splitlines()) <= 25


@pytest.mark.parametrize(("name", "split"), ROWS)
def test_a_copy_of_the_repository_is_read_as_written_by_hand(tmp_path, name, split):
    # red: any line of a dataset function; `only_named=False`; a split called otherwise; a reason swallowed
    files, wanted, _ = DATASETS[name]
    write(tmp_path, files)
    assert list(data.stream(f"{name}={tmp_path}", split)) == placed(wanted[split], tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_files_need_not_be_called_as_the_published_ones(tmp_path, name):
    # red: train_prefs that may not be called train; a file that must say its split; alpacaeval's train split
    files, wanted, _ = DATASETS[name]
    expected = [
        row for row in wanted["train"] if isinstance(row, Example) and row.where.startswith(READS[name])
    ]
    suffix = {".gz": ".jsonl.gz", ".json": ".jsonl"}.get(Path(READS[name]).suffix, Path(READS[name]).suffix)
    split = "eval" if name == "alpacaeval" else "train"
    for place, file in ((f"mine{suffix}", f"mine{suffix}"), ("folder", f"folder/{split}-00000{suffix}")):
        write(tmp_path, {file: files[READS[name]]})
        found = [
            row for row in data.stream(f"{name}={tmp_path}/{place}", "train") if isinstance(row, Example)
        ]
        assert all(row.where.startswith(f"{tmp_path}/{file}") for row in found)
        assert expected and bare(found)[: len(expected)] == bare(expected)
    assert bare(data.stream(f"{name}={tmp_path}/mine{suffix}", "test"))  # one file is every split


MISSING = [(name, key) for name, (_, _, keys) in DATASETS.items() for key in keys.split()]


@pytest.mark.parametrize(("name", "key"), MISSING)
def test_a_row_without_a_key_is_an_error_that_names_file_and_row(tmp_path, name, key):
    # red: a key left out of `form`; rows that are skipped in silence
    rows = [dict(row) for row in DATASETS[name][0][READS[name]][:2]]
    del rows[-1][key]
    path = tmp_path / "mine.jsonl"
    write(tmp_path, {path.name: rows})
    refused(f"{name}={path}", "train", f"{path}:{len(rows)}: ", "published", key)
    write(tmp_path, {path.name: [*rows[:-1], "text"]})
    refused(f"{name}={path}", "train", f"{path}:{len(rows)}: ", "published")


WRONG = {  # what a row has instead, and what the message must hold
    "hh": ({"chosen": 1}, "chosen"),
    "shp": ({"score_ratio": "3"}, "score_ratio"),
    "oasst": ({"text": None}, "text"),
    "ultrabin": ({"chosen": "good"}, "chosen"),
    "ultrafeedback_hybrid": ({"rejected": [{"role": "robot", "content": "x"}]}, "robot"),
    "ultrachat": ({"messages": "hello"}, "messages"),
    "nectar": ({"answers": [{"answer": "a"}]}, "rank"),
    "helpsteer": ({"helpfulness": None}, "helpfulness"),
    "safe_rlhf": ({"prompt": 1}, "prompt"),
    "alpacaeval": ({"instruction": 1}, "prompt"),
    "imdb": ({"text": None}, "text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_an_error_that_names_file_and_row(tmp_path, name):
    # red: `from None` of a layout's error without its place; a type left out of `form`
    row = DATASETS[name][0][READS[name]][0]
    change, word = WRONG[name]
    write(tmp_path, {"mine.jsonl": [row, row | change]})
    refused(f"{name}={tmp_path}/mine.jsonl", "train", f"{tmp_path}/mine.jsonl:2: ", word)


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_read_one_at_a_time(tmp_path, name):
    # red: a list of the file's rows; sorted(trees)
    files, wanted, _ = DATASETS[name]
    rows = files[READS[name]]
    path = tmp_path / "mine.jsonl"
    write(tmp_path, {path.name: [*rows, *rows[:1]]})
    path.write_bytes(path.read_bytes() + b"no JSON\n")
    stream = data.stream(f"{name}={path}", "train")
    examples = [row for row in wanted["train"] if isinstance(row, Example)]
    first = next(row for row in examples if row.where.startswith(READS[name]))
    assert next(stream) == first._replace(where=f"{path}:1")
    refused(f"{name}={path}", "train", f"{path}:{len(rows) + 2}: not JSON")


# ---- where it is read from
# --------------------------------------------------------------------------------------------------------


def test_hh_reads_the_folders_that_are_there(tmp_path):
    # red: a folder of the other kind read where the wanted ones are missing; transcripts read as pairs
    files = {name: rows for name, rows in HH_FILES.items() if not name.startswith("helpful-on")}
    write(tmp_path, {name: rows for name, rows in files.items() if "harmless" not in name})
    assert list(data.stream(f"hh_helpful={tmp_path}", "test")) == placed(HELPFUL_TEST[::2], tmp_path)
    refused(f"hh_harmless={tmp_path}", "test", str(tmp_path), "harmless-base")
    for name in ("hh", "hh_harmless"):  # one subset, as a directory or as a file
        write(tmp_path / "copy", {name: rows for name, rows in files.items() if "harmless" in name})
        for place in ("harmless-base", "harmless-base/train.jsonl.gz"):
            found = list(data.stream(f"{name}={tmp_path}/copy/{place}", "train"))
            assert found == placed(HARMLESS_TRAIN, tmp_path / "copy")
    assert list(data.stream(f"hh={tmp_path}/copy:test", "train")) == placed(HARMLESS_TEST, tmp_path / "copy")
    (tmp_path / "copy" / "harmless-base" / "test.jsonl.gz").unlink()
    refused(f"hh={tmp_path}/copy", "test", f"{tmp_path}/copy/harmless-base", "no split 'test'")
    for name in ("hh", "hh_helpful", "alpacaeval"):
        refused(f"{name}={tmp_path}/nowhere", "train", f"{tmp_path}/nowhere: no such file")


@pytest.mark.parametrize("source", ["nectar", "ultrabin", "ultrachat", "imdb"])
def test_a_split_that_is_not_there_is_an_error(tmp_path, source):
    # red: the train split read where there is no other
    files = {path: rows for path, rows in DATASETS[source][0].items() if "test" not in path.split("/")[-1]}
    write(tmp_path, files)
    refused(f"{source}={tmp_path}", "test", str(tmp_path), "no split 'test", "train")


def test_a_folder_of_ones_own_is_read_whole(tmp_path):
    # red: files which say no split left out, as they are where a published dataset is read
    write(tmp_path, {name: [{"text": name}] for name in ("more.jsonl", "test.jsonl", "train.jsonl")})
    for split, names in (("train", ["more.jsonl", "train.jsonl"]), ("test", ["test.jsonl"])):
        expected = [text(name, name)._replace(where=f"{tmp_path}/{name}:1") for name in names]
        assert list(data.stream(str(tmp_path), split)) == expected


CARDS = {
    "oasst": {"train": OASST_TRAIN, "validation": OASST_TEST},
    "ultrabin": {name: BINARIZED.format(name) for name in ("train_prefs", "test_prefs", "train_sft")},
    "ultrachat": {name: f"data/{name}-*" for name in ("train_sft", "test_sft", "train_gen")},
    "nectar": {"train": "data/rlaif.parquet"},
    "imdb": {name: IMDB_PATH.format(name) for name in ("train", "test", "unsupervised")},
}


@pytest.mark.parametrize("name", CARDS)
def test_a_copy_whose_card_names_its_files_is_read_as_the_hub_would(tmp_path, name):
    # red: the split not passed on to the library; a configuration of another name than "default"
    files, wanted, _ = DATASETS[name]
    write(tmp_path, files)
    listed = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in CARDS[name].items())
    config = "plain_text" if name == "imdb" else "default"
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{listed}---\n"
    (tmp_path / "README.md").write_text(card)
    for split in wanted:
        found = list(data.stream(f"{name}={tmp_path}", split))
        assert all(isinstance(row, str) or row.where.startswith(f"{tmp_path}[") for row in found)
        assert bare(found) == bare(wanted[split])


def cached(folder, name, commit, contents):
    """The cache of a dataset of the hub, at a commit."""
    repository = folder / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    write(repository / "snapshots" / commit, contents)
    return repository / "snapshots" / commit


def test_what_the_library_cannot_read_is_downloaded_by_file(tmp_path, monkeypatch):
    # red: load_dataset for a repository with a script; the folders of the other kind; the split not in a name
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place = cached(tmp_path, "tatsu-lab/alpaca_eval", "a" * 40, ALPACA_FILES)
    assert list(data.stream("alpacaeval", "test")) == placed(PROMPTS, place)
    place = cached(tmp_path, "Anthropic/hh-rlhf", "b" * 40, HH_FILES)
    assert list(data.stream("hh_helpful", "train")) == placed(HELPFUL_TRAIN, place)
    assert list(data.stream("hh_harmless", "test")) == placed(HARMLESS_TEST, place)
    assert list(data.stream("hh_harmless=Anthropic/hh-rlhf:train", "test")) == placed(HARMLESS_TRAIN, place)
    refused("hh_harmless=org/nowhere", "train", "org/nowhere: ")


# ---- the fingerprint
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_the_state_of_a_local_copy_is_that_of_its_files(tmp_path, name):
    # red: a folder's own time counted; sizes or times left out; the hub asked; the file's rows read
    write(tmp_path, DATASETS[name][0])
    path = tmp_path / READS[name]
    source = f"{name}={tmp_path}"
    states = [data.state(source, "train"), data.state(source, "test")]
    (path.parent / "empty").mkdir()
    assert data.state(source, "train") == states[0] != states[1]
    os.utime(path, ns=(0, 0))
    states.append(data.state(source, "train"))
    path.write_bytes(b"damaged " + path.read_bytes())
    os.utime(path, ns=(0, 0))
    states.append(data.state(source, "train"))
    write(tmp_path, {"more.jsonl": [{}]})
    states.append(data.state(source, "train"))
    states.append(data.state(str(tmp_path), "train"))
    assert len(set(states)) == len(states)


@pytest.mark.parametrize("name", DATASETS)
def test_the_state_of_a_dataset_of_the_hub_is_its_commit(tmp_path, monkeypatch, name):
    # red: a split that is called otherwise asked of the hub; a builder for a repository with a script
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = inspect.signature(getattr(data, name)).parameters["source"].default
    states = []
    for letter, file in zip("abb", (".gitattributes", "README.md", "README.md")):
        place = cached(tmp_path, repository, letter * 40, {})
        place.mkdir(parents=True, exist_ok=True)
        (place / file).write_text("")
        states.append(data.state(name, "train"))
    assert states[0] != states[1] == states[2] and "b" * 40 in states[1]
