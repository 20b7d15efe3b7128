"""label.py, judge.py and scoring.py: scores of answers, the rows made of them, what a kill leaves, two models.

`red:` names a change that turns a test red.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_config import ROOT, exit_code, write_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import align
import data
import formats
import judge
import label
import parts
import ranking
import scoring

WORDS = "the film was long and dull but its music made up for a lot of that".split()
RULES = '''
import os, time

def brevity(prompt, completion):
    return -len(completion)

def slow(prompt, completion):
    time.sleep(float(os.environ.get("LABEL_SLEEP", 0)))
    return len(completion) % 7

def shown(prompt, completion):
    return len(prompt) * 100 + len(completion)

def broken(prompt, completion):
    return {"nan": float("nan"), "word": "good", "digits": 10**400}.get(completion, 1)

def raises(prompt, completion):
    return {}[completion] if completion == "d" else 1.0
'''


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(main, *argv):
    """(exit code, stdout, stderr) of a script."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(main, [*map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def write_classifier(path, labels=1, padding=0, template=True, **changes):
    """A tiny Llama with a random head of some labels."""
    write_model(path, pad_token_id=padding, num_labels=labels, **changes)
    torch.manual_seed(0)
    lm = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(path))
    lm.score.weight.data *= 20
    lm.save_pretrained(path)
    if not template:
        (path / "chat_template.jinja").unlink()
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with `rm`, a reward model, `labels`, of the sentiments BAD and GOOD, without a template, and
    `rules`, a module; it is the current directory."""
    path = tmp_path_factory.mktemp("label")
    write_classifier(path / "rm")
    write_classifier(
        path / "labels", 2, template=False, id2label={0: "BAD", 1: "GOOD"}, label2id={"BAD": 0, "GOOD": 1}
    )
    (path / "label_rules.py").write_text(RULES)
    before = os.getcwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def conversations(count=7, turns=1):
    """Answers of several lengths to conversations of several turns."""
    rows = []
    for row in range(count):
        talk = [
            {"role": ("user", "assistant")[i % 2], "content": " ".join(WORDS[i : i + 3 + row])}
            for i in range(2 * turns - 1)
        ]
        for answer in range(2):
            text = " ".join(WORDS[row : row + 2 + 3 * answer])
            rows.append({"id": f"{row}-{answer}", "prompt": talk, "completion": text})
    return rows


def whole(row):
    return [*row["prompt"], {"role": "assistant", "content": row["completion"]}]


def plain_scores(path, rows):
    """What transformers itself gives for what its tokenizer makes of each conversation, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    lm = AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = []
    for row in rows:
        ids = tokenizer.apply_chat_template(whole(row), return_tensors="pt", return_dict=False)
        with torch.no_grad():
            found.append(lm(ids).logits[0, 0].item())
    return found


# ---- scorers
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["set", "none", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_reward_model_scores_as_plain_transformers_does(root, tmp_path, padding, batch_size):
    # red: without `- {last ids}`: padding = 0; width - len(row) zeros before a row; no sort undone
    path = root / "rm"
    if padding == "none":
        path = write_classifier(tmp_path / "rm", padding=None)
    if padding == "gpt2":
        path = write_model(tmp_path / "rm")
        torch.manual_seed(1)
        vocabulary = len(AutoTokenizer.from_pretrained(path))
        small = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=None)
        GPT2ForSequenceClassification(small).save_pretrained(path)
    if padding != "set":  # nor has its tokenizer one
        about = json.loads((path / "tokenizer_config.json").read_text())
        about.pop("pad_token", None)
        (path / "tokenizer_config.json").write_text(json.dumps(about))
        assert AutoConfig.from_pretrained(path).pad_token_id is None
        assert AutoTokenizer.from_pretrained(path).pad_token is None
    rows = conversations(turns=2)
    file = write_rows(tmp_path / "answers.jsonl", rows)
    out = tmp_path / "scored.jsonl"
    assert said(label.main, "--data", file, "--by", path, "--out", out, "--batch-size", batch_size)[0] is None
    scored = read_rows(out)
    assert [row["id"] for row in scored] == [row["id"] for row in rows]
    wanted = plain_scores(path, rows)
    assert np.std(wanted) > 0.01
    assert [row["score"] for row in scored] == pytest.approx(wanted, abs=2e-5)


def test_padding_never_ends_a_row(root):
    # red: padding = 0; rows padded on the left
    lm = AutoModelForSequenceClassification.from_pretrained(root / "rm", pad_token_id=None).eval()
    assert lm.config.pad_token_id is None
    rows = [[5, 6, 0], [7, 8, 9, 0, 1], [4, 2]]
    with torch.no_grad():
        wanted = [lm(torch.tensor([row])).logits.item() for row in rows]
    assert scoring._logits(lm, rows, None) == pytest.approx(wanted, abs=2e-5)
    assert lm.config.pad_token_id is None


def test_scores_are_what_training_computes(root, tmp_path):
    # red: of what is scored the last token cut off; add_generation_prompt
    rows = [
        {"prompt": f"{WORDS[k]}?", "chosen": " ".join(WORDS[: k + 1]), "rejected": " ".join(WORDS[k:])}
        for k in range(12)
    ]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    model = write_model(tmp_path / "model")
    flags = ["--model", model, "--weights", "random", "--data", pairs, "--eval-data", pairs, "--out"]
    flags += [tmp_path / "run", "--loss", "bradley_terry", "--steps", 3, "--batch-size", 12, "--lr", 3e-2]
    flags += ["--warmup-steps", 0, "--dtype", "float32", "--max-length", 64]
    assert said(align.main, *flags)[0] is None
    trained = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "eval"][-1]
    code, out, _ = said(label.main, "--data", pairs, "--by", tmp_path / "run" / "final", "--score-only")
    assert code is None
    lines = out.splitlines()
    assert lines[0] == "--device auto: no CUDA device is visible, so on the CPU, in float32" or torch.cuda.is_available()
    first = next(k for k, line in enumerate(lines) if line.startswith("|---")) + 1
    cells = [cell.strip() for cell in lines[first].split("|")[1:-1]]
    mean = (trained["rewards/chosen"] + trained["rewards/rejected"]) / 2
    assert abs(mean) > 1e-3
    assert float(cells[3]) == pytest.approx(mean, abs=1e-4)
    assert float(cells[7]) == pytest.approx(trained["rewards/accuracies"], abs=1e-4)


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(root, tmp_path):
    # red: cut from the left by tokens
    rows = conversations(turns=4)
    tokenizer = AutoTokenizer.from_pretrained(root / "rm")
    short = [{**row, "prompt": row["prompt"][-1:]} for row in rows]
    both = [
        [len(tokenizer.apply_chat_template(whole(row))["input_ids"]) for row in some] for some in (rows, short)
    ]
    limit = max(both[1])
    rows = [row for row, all_of_it in zip(rows, both[0]) if all_of_it > limit]
    assert rows
    file = write_rows(tmp_path / "answers.jsonl", rows)
    flags = ["--by", root / "rm", "--max-length", limit]
    out = tmp_path / "scored.jsonl"
    assert said(label.main, "--data", file, *flags, "--out", out)[0] is None
    # a turn more may fit where the answer is short: what is scored ends with the shortened one
    scores = [row["score"] for row in read_rows(out)]
    candidates = [
        plain_scores(root / "rm", [{**row, "prompt": row["prompt"][start:]} for row in rows]) for start in (6, 4, 2)
    ]
    for index, score in enumerate(scores):
        assert min(abs(score - some[index]) for some in candidates) < 2e-5
    code, _, err = said(label.main, "--data", file, "--by", root / "rm", "--max-length", 6, "--score-only")
    assert code == 2 and f"{len(rows)} the last turn and the answer are longer than --max-length" in err


def test_a_label_is_scored_by_its_log_probability(root, tmp_path):
    # red: the logit; label 0; prompt and completion with a space between
    rows = [{"prompt": "the film ", "completion": " ".join(WORDS[k : k + 3])} for k in range(5)]
    file = write_rows(tmp_path / "reviews.jsonl", rows)
    out = tmp_path / "scored.jsonl"
    flags = ["--data", file, "--by", root / "labels", "--out", out, "--batch-size", 2]
    assert said(label.main, *flags, "--label", "GOOD")[0] is None
    tokenizer = AutoTokenizer.from_pretrained(root / "labels")
    lm = AutoModelForSequenceClassification.from_pretrained(root / "labels").eval()
    for row, scored in zip(rows, read_rows(out)):
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]])
        with torch.no_grad():
            probability = lm(ids).logits.softmax(-1)[0, 1].item()
        assert np.exp(scored["score"]) == pytest.approx(probability, rel=1e-4)
        assert scored["id"] == f"{rows.index(row)}-0" and scored["prompt"] == "the film "


def test_a_function_gets_turns_and_text(root, tmp_path):
    # red: the whole conversation as completion; the last turn of a multi-turn answer alone as prompt
    user, bot = ({"role": role, "content": "abc"} for role in ("user", "assistant"))
    rows = [{"prompt": "abc", "completion": "x"}, {"prompt": [user, bot, user], "completion": "xy"}]
    rows += [{"messages": [user, bot, user, bot]}]
    out = tmp_path / "scored.jsonl"
    flags = ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--by", "label_rules:shown", "--out", out]
    assert said(label.main, *flags)[0] is None
    assert [row["score"] for row in read_rows(out)] == [101, 302, 303]


# ---- errors
# ---------------------------------------------------------------------------------------------------------


def test_a_function_that_raises_is_one_line(root, tmp_path):
    # red: _function without its except; the id of the prompt's first answer; parts.undone left out
    answers = [{"prompt": "a", "completion": text} for text in "bcd"]
    file, out = write_rows(tmp_path / "rows.jsonl", answers), tmp_path / "out.jsonl"
    flags = ["--by", "label_rules:raises", "--data", file]
    wanted = f"error: {file}:3: answer 2-0: label_rules:raises: KeyError: 'd' (in label_rules.py:18)\n"
    assert said(label.main, *flags, "--out", out)[::2] == (2, wanted)
    assert said(label.main, *flags, "--score-only")[::2] == (2, wanted)
    assert said(judge.main, *flags, "--against", file, "--out", tmp_path / "o.json")[::2] == (2, wanted)
    (root / "label_broken.py").write_text("import json\njson.loads('{')\n")
    code, _, err = said(label.main, "--by", "label_broken:f", "--data", file, "--out", out)
    assert code == 2 and err.startswith("error: --by label_broken:f: JSONDecodeError: ") and err.count("\n") == 1
    (root / "label_syntax.py").write_text("def f(:\n")
    code, _, err = said(label.main, "--by", "label_syntax:f", "--data", file, "--out", out)
    assert code == 2 and re.fullmatch(r"error: --by label_syntax:f: SyntaxError: .+ line 1\)\n", err)
    write_rows(file, [{"prompt": "a", "completion": "digits"}])
    code, _, err = said(label.main, "--by", "label_rules:broken", "--data", file, "--out", out)
    assert code == 2 and err.endswith("00 (a finite number)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


ERRORS = {
    "no directory": (["--by", "./none"], "./none: no such model directory"),
    "a language model": (["--by", "lm"], "lm: not a classifier but LlamaForCausalLM: its scores would be random"),
    "a head that is missing": (["--by", "headless"], "1 weights missing or misshapen (first: score.weight)"),
    "pickle": (["--by", "pickle"], "pickle: "),
    "no tokenizer": (["--by", "mute"], "mute: no tokenizer"),
    "several labels": (["--by", "labels"], "labels: has 2 labels, one must be named (--label BAD, GOOD)"),
    "another label": (["--by", "labels", "--label", "good"], "--label good: no label of labels (--label BAD, GOOD)"),
    "a label of one": (["--by", "rm", "--label", "GOOD"], "--label GOOD: rm has one label"),
    "no template": (["--by", "plain"], "plain: has no chat template"),
    "too long": (["--by", "rm", "--max-length", "100000"], "--max-length 100000 exceeds the 2048 tokens of rm"),
    "no module": (["--by", "label_none:f"], "--by label_none:f: no module label_none"),
    "no function": (["--by", "label_rules:none"], "--by label_rules:none: no function none in label_rules"),
    "label of a function": (["--by", "label_rules:slow", "--label", "A"], "--label: --by label_rules:slow is no"),
    "nan": (["--by", "label_rules:broken", "--data", "nan.jsonl"], "nan.jsonl:1: answer 5-1: label_rules:broken gave NaN (a finite"),
    "a word": (["--by", "label_rules:broken", "--data", "word.jsonl"], 'word.jsonl:1: answer 5-1: label_rules:broken gave "good"'),
    "no data": (["--by", "rm", "--data", "none.jsonl"], "none.jsonl: no such file or directory"),
    "no answer": (["--by", "rm", "--data", "asked.jsonl"], "asked.jsonl: no answer in it (1 it has no answer)"),
    "nothing named": ([], "--by must be given"),
    "margin alone": (["--by", "rm", "--least-margin", "1"], "--least-margin is of pairs"),
    "two things": (["--by", "rm", "--score-only"], "one of --out, --score-only and --ask must be given"),
}


@pytest.fixture(scope="module")
def places(root):
    """What the errors are about."""
    shutil.copytree(root / "rm", "mute")
    for file in root.glob("mute/tok*"):
        file.unlink()
    shutil.copytree(root / "rm", "plain")
    (root / "plain" / "chat_template.jinja").unlink()
    write_model(root / "lm")
    lm = AutoModelForSequenceClassification.from_pretrained(root / "rm")
    shutil.copytree(root / "rm", "headless")
    weights = {name: value.clone() for name, value in lm.state_dict().items()}
    without = {name: value for name, value in weights.items() if name != "score.weight"}
    save_file(without, "headless/model.safetensors", {"format": "pt"})
    shutil.copytree(root / "rm", "pickle", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights, "pickle/pytorch_model.bin")
    for answer in ("nan", "word"):
        write_rows(root / f"{answer}.jsonl", [{"id": "5-1", "prompt": "a", "completion": answer}])
    write_rows(root / "asked.jsonl", [{"prompt": "a"}])
    write_rows(root / "some.jsonl", [{"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_one_line(places, root, name):
    # red: no check of missing_keys (headless), of architectures (lm), of a finite number (nan)
    argv, wanted = ERRORS[name]
    argv = argv if "--data" in argv else ["--data", "some.jsonl", *argv]
    code, _, err = said(label.main, *argv, "--out", "never.jsonl")
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and wanted in lines[0], err
    assert not (root / "never.jsonl").exists()
    for place in (".never.jsonl.parts", "never.jsonl.args.json"):  # of what had begun
        shutil.rmtree(root / place, ignore_errors=True)
        (root / place).unlink(missing_ok=True)


def test_one_process_is_enough(root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it without torchrun" in said(label.main, "--data", "x", "--by", "a:b", "--out", "y")[2]


# ---- rows
# ---------------------------------------------------------------------------------------------------------


def scored_answers(root, tmp_path):
    """Answers whose scores, -length, are 3 1 1 2, a tie, and one alone; as turns and as strings."""
    texts = [["aaa", "a", "b", "aa"], ["cc", "dd"], ["e"]]
    rows = []
    for number, answers in enumerate(texts):
        talk = [{"role": "user", "content": f"q{number}"}]
        for index, answer in enumerate(answers):
            rows.append({"id": f"{number}-{index}", "prompt": talk, "completion": answer})
            rows[-1] |= {"tools": [{"name": "t"}], "chat_template_kwargs": {"k": 1}} if number == 0 else {}
    rows += [{"id": f"9-{index}", "prompt": "q ", "completion": answer} for index, answer in enumerate(["fff", "g"])]
    return write_rows(tmp_path / "answers.jsonl", rows)


WANTED = {  # kind -> pairs of prompt 0 by their ids, best first; prompt 9 always has 9-1>9-0
    "best-worst": ["0-1>0-0"],
    "adjacent": ["0-2>0-3", "0-3>0-0"],
    "all": ["0-1>0-3", "0-1>0-0", "0-2>0-3", "0-2>0-0", "0-3>0-0"],
}


@pytest.mark.parametrize("kind", WANTED)
def test_pairs_of_each_kind_are_read_back_as_they_were(root, tmp_path, kind):
    # red: >= for > in pair_indices; chosen and rejected exchanged; a string where turns are
    out = tmp_path / "pairs.jsonl"
    file = scored_answers(root, tmp_path)
    code, told, _ = said(label.main, "--data", file, "--by", "label_rules:brevity", "--pairs", kind, "--out", out)
    assert code is None and "2 prompts without a pair" in told
    rows = read_rows(out)
    assert sorted(row["id"] for row in rows) == sorted([*WANTED[kind], "9-1>9-0"])
    texts = {row["id"]: row["completion"] for row in read_rows(file)}
    for row in rows:
        better, worse = row["id"].split(">")
        found = formats.parse(row)
        assert found.completions == [texts[better], texts[worse]] and found.scores == [1.0, 0.0]
        assert (row["score_chosen"], row["score_rejected"]) == (-len(texts[better]), -len(texts[worse]))
        if better[0] == "9":  # all of TRL's three are strings, or none is
            assert row["prompt"] == "q " and row["chosen"] == "g"
        else:
            assert row["prompt"] == [{"role": "user", "content": "q0"}]
            assert row["chosen"] == [{"role": "assistant", "content": texts[better]}]
            assert found.rendering == {"tools": [{"name": "t"}], "k": 1}


def test_a_least_margin_and_a_random_pair(root, tmp_path):
    # red: > for >=; random.Random(seed) without the prompt; a choice among all pairs before the margin
    file = scored_answers(root, tmp_path)
    common = ["--data", file, "--by", "label_rules:brevity", "--pairs"]
    found = {}
    for name, more in {
        "margin": ["all", "--least-margin", 2],
        **{f"seed {seed}": ["random", "--seed", seed] for seed in range(6)},
        "both": ["random", "--least-margin", 2],
    }.items():
        out = tmp_path / f"{name}.jsonl"
        assert said(label.main, *common, *more, "--out", out)[0] is None
        found[name] = [row["id"] for row in read_rows(out)]
    assert found["margin"] == ["0-1>0-0", "0-2>0-0", "9-1>9-0"]
    assert found["both"][0] in found["margin"]
    drawn = {tuple(found[f"seed {seed}"]) for seed in range(6)}
    assert len(drawn) > 1 and all(pair[0] in WANTED["all"] and len(pair) == 2 for pair in drawn)
    alike = [{"id": f"{p}-{k}", "prompt": f"q{p}", "completion": "x" * (k + 1)} for p in range(9) for k in range(3)]
    many = write_rows(tmp_path / "many.jsonl", alike)
    assert said(label.main, "--data", many, *common[2:], "random", "--out", tmp_path / "m.jsonl")[0] is None
    assert len({row["id"][2:4] + row["id"][-1] for row in read_rows(tmp_path / "m.jsonl")}) > 1
    some = write_rows(tmp_path / "some.jsonl", read_rows(file)[:4])  # what else is there changes nothing
    out = tmp_path / "alone.jsonl"
    assert said(label.main, "--data", some, *common[2:], "random", "--seed", 3, "--out", out)[0] is None
    assert [row["id"] for row in read_rows(out)] == found["seed 3"][:1]


def test_labels_as_trl_reads_them(root, tmp_path):
    # red: the score under "score", which is two readings; labels by the sign; over all prompts
    out = tmp_path / "labelled.jsonl"
    file = scored_answers(root, tmp_path)
    assert said(label.main, "--data", file, "--by", "label_rules:brevity", "--layout", "trl", "--out", out)[0] is None
    rows = read_rows(out)
    assert [row["score_completion"] for row in rows] == [-len(row["completion"]) for row in read_rows(file)]
    for _, group in groupby(rows, key=lambda row: row["id"].split("-")[0]):
        group = list(group)
        assert [row["label"] for row in group] == ranking.desirable([row["score_completion"] for row in group])
    for row, given in zip(rows, read_rows(file)):
        found = formats.parse(row)
        assert found.completions == [given["completion"]] and found.scores == [float(row["label"])]
        strings = [isinstance(row[key], str) for key in ("prompt", "completion")]
        assert strings == [isinstance(given["prompt"], str)] * 2


def test_what_would_be_read_as_something_else_is_not_written(root, tmp_path):
    # red: without MISREAD
    texts = ["Human: a\n\nAssistant: b", "Human: a\n\nAssistant: bcd"]
    rows = [{"id": f"0-{index}", "prompt": "a", "completion": text} for index, text in enumerate(texts)]
    rows += [{"id": f"1-{index}", "prompt": "q", "completion": text} for index, text in enumerate(["x", "yy"])]
    out = tmp_path / "pairs.jsonl"
    flags = ["--data", write_rows(tmp_path / "a.jsonl", rows), "--by", "label_rules:brevity", "--pairs", "all"]
    code, told, _ = said(label.main, *flags, "--out", out)
    assert code is None and "1 as a row it would be read as something else" in told
    assert [row["id"] for row in read_rows(out)] == ["1-0>1-1"]


def test_answers_without_text_are_counted(root, tmp_path):
    # red: left_out not told; the empty answer scored
    rows = [{"id": f"0-{index}", "prompt": "q", "completion": text} for index, text in enumerate(["a", "", "bb"])]
    rows += [{"prompt": "q"}]
    flags = ["--data", write_rows(tmp_path / "a.jsonl", rows), "--by", "label_rules:brevity"]
    code, told, _ = said(label.main, *flags, "--pairs", "best-worst", "--out", tmp_path / "p.jsonl")
    assert code is None and "left out: 1 an answer is empty; 1 it has no answer" in told
    assert [row["id"] for row in read_rows(tmp_path / "p.jsonl")] == ["0-0>0-2"]


def test_rows_of_one_prompt_are_one_prompt_and_others_are_not():
    # red: groupby without the id of the prompt; without the prompt
    def names(rows):
        with contextlib.chdir(os.environ["TOKEN_CACHE"]):
            write_rows(data.Path("rows.jsonl"), rows)
            return [prompt.ids for prompt in scoring.prompts(["rows.jsonl"], "train", Counter())]

    assert names([{"prompt": "q", "completion": "a"}] * 2 + [{"prompt": "r", "completion": "a"}]) == [
        ["0-0", "1-0"], ["2-0"]
    ]
    assert names([{"id": f"{k}-0", "prompt": "q", "completion": "a"} for k in range(2)]) == [["0-0"], ["1-0"]]
    assert names([{"id": f"x{k}", "prompt": "q", "completion": "a"} for k in range(2)]) == [["x0", "x1"]]
    assert names([{"text": "a"}, {"text": "b"}]) == [["0-0"], ["1-0"]]
    pair = {"id": 7, "prompt": "q", "chosen": "a", "rejected": "b"}
    assert names([pair, pair]) == [["0-0", "0-1"], ["1-0", "1-1"]]


# ---- a table
# ---------------------------------------------------------------------------------------------------------


def test_the_table_by_hand(root, tmp_path):
    # red: ties whole or none; the standard error over answers; the best of all
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "bbb", "subset": "chat", "id": 3},
        {"prompt": "r", "chosen": "aa", "rejected": "bb", "subset": "chat", "id": 4},
        {"prompt": "s", "chosen": "aaaa", "rejected": "b", "subset": "code", "id": 5},
    ]
    file = write_rows(tmp_path / "bench.jsonl", rows)
    code, out, _ = said(label.main, "--data", file, "--by", "label_rules:brevity", "--score-only")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert code is None and [line[0] for line in table[2:5]] == ["all", "chat", "code"]
    means = np.array([-2.0, -2.0, -2.5])
    error = means.std(ddof=1) / np.sqrt(3)
    wanted = [6, 3, means.mean(), error, -4.0, np.mean([-1, -2, -1]), 1.5 / 3]
    assert [float(cell) for cell in table[2][1:]] == pytest.approx(wanted, abs=1e-4)
    assert [line[-1] for line in table[3:5]] == ["0.7500", "0.0000"]
    assert table[4][4] == "nan"  # of one prompt


def test_a_named_dataset_is_scored_too(root, tmp_path):
    # red: data.rows for a name
    asked = "\n\nHuman: q\n\nAssistant: "
    rows = [{"chosen": asked + better, "rejected": asked + worse} for better, worse in (("a", "bb"), ("cc", "d"))]
    file = write_rows(tmp_path / "hh.jsonl", [*rows, {"chosen": "x", "rejected": "y"}])
    out = tmp_path / "scored.jsonl"
    code, told, _ = said(label.main, "--data", f"hh={file}", "--by", "label_rules:brevity", "--out", out)
    assert code is None and "left out: 1 roles do not alternate" in told
    assert [(row["id"], row["completion"], row["score"]) for row in read_rows(out)] == [
        ("0-0", "a", -1), ("0-1", "bb", -2), ("1-0", "cc", -2), ("1-1", "d", -1)
    ]  # fmt: skip
    assert read_rows(out)[0]["prompt"] == [{"role": "user", "content": "q"}]


def test_the_lower_tail_splits_the_score_at_its_threshold():
    # red: floor or ceil of share * n; the upper tail
    scores = np.random.default_rng(0).normal(size=50)
    low = np.sort(scores)
    assert scoring.lower_tail(scores) == pytest.approx((low[0] + low[1] + 0.5 * low[2]) / 2.5)
    assert scoring.lower_tail(scores, share=1.0) == pytest.approx(scores.mean())
    assert scoring.lower_tail(scores[:3]) == scores[:3].min()
    weights = np.random.default_rng(1).integers(0, 4, 50)
    twice = np.repeat(scores, weights)
    assert scoring.lower_tail(scores, weights.astype(float)) == pytest.approx(scoring.lower_tail(twice))


# ---- a judge's verdicts
# ---------------------------------------------------------------------------------------------------------


def test_a_judge_is_asked_in_both_orders_and_heard(root, tmp_path):
    # red: combinations for permutations; the points of the second answer to the first
    rows = [{"id": f"{p}-{k}", "prompt": f"q{p}", "completion": f"{p}{k}"} for p in range(2) for k in range(3)]
    file = write_rows(tmp_path / "answers.jsonl", rows)
    asked = tmp_path / "asked.jsonl"
    code, told, _ = said(label.main, "--data", file, "--ask", asked)
    assert code is None and "12 questions" in told
    assert "exists" in said(label.main, "--data", file, "--ask", file)[2]
    questions = read_rows(asked)
    pairs = [(question["first"], question["second"]) for question in questions]
    assert sorted(pairs) == sorted({(f"{p}-{i}", f"{p}-{j}") for p in (0, 1) for i in range(3) for j in range(3) if i != j})
    assert questions[0] == {
        "first": "0-0", "second": "0-1", "prompt": "q0", "answer_first": "00", "answer_second": "01"
    }
    # of prompt 0 the higher number wins, ties but for 2; of prompt 1 the first place
    better = {("0-2", "0-0"): "first", ("0-2", "0-1"): "first", ("0-0", "0-2"): "second", ("0-1", "0-2"): "second"}
    given = [
        {"first": a, "second": b, "winner": "first" if a[0] == "1" else better.get((a, b), "tie")} for a, b in pairs
    ]
    heard = write_rows(tmp_path / "verdicts.jsonl", given)
    out = tmp_path / "scored.jsonl"
    assert said(label.main, "--data", file, "--by", heard, "--out", out)[0] is None
    assert [row["score"] for row in read_rows(out)] == [0.25, 0.25, 1.0, 0.5, 0.5, 0.5]
    out = tmp_path / "pairs.jsonl"
    assert said(label.main, "--data", file, "--by", heard, "--pairs", "all", "--out", out)[0] is None
    assert [row["id"] for row in read_rows(out)] == ["0-2>0-0", "0-2>0-1"]
    write_rows(heard, given[:2])  # of 0-0 against the others
    code, told, _ = said(label.main, "--data", file, "--by", heard, "--out", tmp_path / "some.jsonl")
    assert "3 answers" in told and "left out: 3 no verdict" in told


@pytest.mark.parametrize(
    "verdict, wanted",
    {
        "unknown": ({"first": "0-0", "second": "7-7", "winner": "tie"}, "--data has no answer 7-7"),
        "two": ({"first": "0-0", "second": "1-0", "winner": "tie"}, "0-0 and 1-0 are not two answers of one prompt"),
        "one": ({"first": "0-0", "second": "0-0", "winner": "tie"}, "0-0 and 0-0 are not two answers of one prompt"),
        "word": ({"first": "0-0", "second": "0-1", "winner": "both"}, "not a verdict"),
        "no id": ({"first": 0, "second": "0-1", "winner": "tie"}, "not a verdict"),
    }.values(),
)
def test_a_wrong_verdict_is_named_by_its_line(root, tmp_path, verdict, wanted):
    rows = [{"id": f"{p}-{k}", "prompt": f"q{p}", "completion": f"{p}{k}"} for p in range(2) for k in range(2)]
    good = {"first": "0-0", "second": "0-1", "winner": "tie"}
    file, heard = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "v.jsonl", [good, verdict])
    code, _, err = said(label.main, "--data", file, "--by", heard, "--out", tmp_path / "out.jsonl")
    assert code == 2 and err == err.splitlines()[0] + "\n" and f"{heard}:2: " in err and wanted in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "v.jsonl"]


# ---- kills
# ---------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(root, tmp_path):
    # red: parts.write into the final name at once; PART answers counted from what is left to do
    rows = [
        {"id": f"{p}-{k}", "prompt": f"q{p}", "completion": "x" * (1 + (7 * p + 3 * k) % 40)}
        for p in range(430)
        for k in range(3)
    ]
    file = write_rows(tmp_path / "answers.jsonl", rows)
    flags = ["--data", str(file), "--by", "label_rules:slow", "--pairs", "adjacent"]
    whole = tmp_path / "whole.jsonl"
    assert said(label.main, *flags, "--out", whole)[0] is None
    out = tmp_path / "killed.jsonl"
    folder = tmp_path / ".killed.jsonl.parts"
    command = [sys.executable, str(ROOT / "label.py"), *flags, "--out", str(out)]
    done = []
    for least in (2, 6):
        slow = {"env": {**os.environ, "LABEL_SLEEP": "0.002"}, "cwd": root}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **slow)
        deadline = time.time() + 120
        while len(list(folder.glob("[0-9]*.jsonl"))) < least:
            assert process.poll() is None and time.time() < deadline, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done.append({path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.jsonl")})
        assert not out.exists()
    assert 2 <= len(done[0]) < len(done[1]) < 10 and done[0].items() <= done[1].items()  # what was made stayed
    assert said(label.main, *flags, "--out", out)[0] is None
    assert out.read_bytes() == whole.read_bytes() and not folder.exists()
    folder.mkdir()  # a kill after the file stood, and before its parts were gone
    assert "nothing to do" in said(label.main, *flags, "--out", out)[1] and not folder.exists()


def test_a_part_or_a_file_is_complete_or_absent(root, tmp_path):
    # red: a part written in its place; an empty file for nothing
    out = str(tmp_path / "out.jsonl")
    lock = parts.begin(out, {})  # noqa: F841
    with pytest.raises(ZeroDivisionError):
        parts.write(out, 0, ({"number": 1 / number} for number in (1, 0)))
    assert not parts.is_done(out, 0)
    assert "another program is writing it" in said(lambda _: parts.begin(out, {}))[2]
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}] * 2)
    flags = ["--data", file, "--by", "label_rules:brevity", "--pairs", "all", "--out", tmp_path / "pairs.jsonl"]
    code, _, err = said(label.main, *flags)
    assert code == 2 and "nothing to write (1 prompts without a pair)" in err
    assert not (tmp_path / "pairs.jsonl").exists()


def test_other_flags_or_data_never_go_on_with_what_is_there(root, tmp_path):
    # red: without the states; parts kept where the flags of them were deleted
    file = scored_answers(root, tmp_path)
    out = tmp_path / "scored.jsonl"
    flags = ["--data", file, "--by", "label_rules:brevity", "--out", out]
    assert said(label.main, *flags)[0] is None
    first = out.read_bytes()
    about = tmp_path / "scored.jsonl.args.json"
    assert "nothing to do" in said(label.main, about)[1]  # it is a config
    assert "was made with --pairs None, this run has all" in said(label.main, *flags, "--pairs", "all")[2]
    file.write_text(file.read_text() + json.dumps({"prompt": "n", "completion": "new"}) + "\n")
    assert "was made from another --data than what is there now" in said(label.main, *flags)[2]
    assert out.read_bytes() == first
    folder = tmp_path / ".scored.jsonl.parts"
    out.unlink()
    about.unlink()
    folder.mkdir()
    (folder / "0.jsonl").write_text('{"of": "other flags"}\n')
    assert said(label.main, *flags)[0] is None and len(read_rows(out)) == len(first.splitlines()) + 1


# ---- two models
# ---------------------------------------------------------------------------------------------------------


def test_the_logistic_fit_is_that_of_an_independent_optimiser():
    # red: without the ridge in the slope, or in the second derivative's place twice; without weights
    random = np.random.default_rng(0)
    x = np.stack([np.ones(80), np.tanh(random.normal(size=80))], 1)
    y, weights, ridge = random.integers(0, 3, 80) / 2, random.integers(0, 4, 80).astype(float), np.array([0.0, 0.7])
    found = judge.logistic(x, y, weights, ridge)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    tensors = [torch.from_numpy(array) for array in (x, y, weights, ridge)]
    optimiser = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        features, targets, counts, penalty = tensors
        loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ w, targets, counts, reduction="sum")
        loss = loss + (penalty * w.square()).sum() / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    assert found == pytest.approx(w.detach().numpy(), abs=1e-7)
    hard = judge.logistic(x, (x[:, 1] > 0).astype(float), np.ones(80), np.array([0.0, 1e-3]))  # separable
    rates = judge.sigmoid(x @ hard)
    assert x.T @ (rates - (x[:, 1] > 0)) + np.array([0.0, 1e-3]) * hard == pytest.approx(0, abs=1e-8)


def test_length_control_takes_away_what_length_decides_and_nothing_else():
    # red: the length term not at zero; differences centred
    random = np.random.default_rng(1)
    ones = np.ones(2000)
    longer = random.normal(40, 60, 2000).round()  # A is mostly the longer one
    by_length = (longer > 0).astype(float)
    assert by_length.mean() > 0.7
    assert judge.length_controlled(by_length, longer, ones) == pytest.approx(0.5, abs=0.05)
    by_quality = (random.random(2000) < 0.7).astype(float)
    assert judge.length_controlled(by_quality, longer, ones) == pytest.approx(by_quality.mean(), abs=0.02)
    both = (random.random(2000) < judge.sigmoid(0.6 + 1.5 * np.tanh(longer / longer.std()))).astype(float)
    assert judge.length_controlled(both, longer, ones) == pytest.approx(judge.sigmoid(0.6), abs=0.04)
    assert judge.length_controlled(ones, longer, ones) == 1.0
    assert judge.length_controlled(by_quality, 0 * longer, ones) == by_quality.mean()
    exchanged = judge.length_controlled(1 - both, -longer, ones)
    assert exchanged == pytest.approx(1 - judge.length_controlled(both, longer, ones), abs=1e-9)


def test_two_models_by_hand(root, tmp_path):
    # red: ties whole; prompts of one side counted; joined by place; unpaired resamples
    texts = {"a": ["one two", "a", "three three three"], "b": ["one", "b", "four"]}
    scores = {"a": [1.0, 2.0, 0.0], "b": [0.0, 2.0, 3.0]}
    files = {}
    for side, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        rows = [{"prompt": f"q{k}", "completion": texts[side][k], "score": scores[side][k]} for k in order]
        rows += [{"prompt": f"only {side}", "completion": "x", "score": 9.0}]
        files[side] = write_rows(tmp_path / f"{side}.jsonl", rows)
    files["b"].write_text(files["b"].read_text() + '{"prompt": "q2", "completion": "y", "score": -1}\n')
    out = tmp_path / "found.json"
    code, told, _ = said(judge.main, "--data", files["a"], "--against", files["b"], "--out", out)
    assert code is None and "3 of its 4 prompts" in told
    found = json.loads(out.read_text())
    assert found["prompts"] == 3
    wanted = {
        "win rate": (1 + 0.5 + 0.5) / 3, "mean score A": 1.0, "mean score B": (0 + 2 + 1) / 3,
        "mean score A - B": 0.0, "worst 5 % A": 0.0, "worst 5 % B": -1.0, "worst 5 % A - B": 1.0,
        "words A": 2.0, "words B": 1.0, "characters A": (7 + 1 + 17) / 3, "characters B": (3 + 1 + 2.5) / 3,
        "distinct-1 A": 4 / 6, "distinct-1 B": 1.0, "distinct-2 A": 2 / 3, "distinct-2 B": 0.0,
    }  # fmt: skip
    assert {name: found[name][0] for name in wanted} == pytest.approx(wanted)
    assert f"| mean score | {found['mean score A'][0]:.4g} [" in told
    code, told, _ = said(judge.main, "--data", files["a"], "--against", files["a"])
    assert "| win rate, ties half | 0.5 [0.5, 0.5] |" in told and "| 0 [0, 0] |" in told  # paired
    scored = said(judge.main, "--data", files["a"], "--against", files["b"], "--by", "label_rules:brevity")[1]
    assert "| win rate, ties half | 0.1667 [" in scored  # one tie, two losses


def test_the_intervals_are_those_of_the_bootstrap():
    # red: quantiles of 0.05 and 0.95; a draw a side
    random = np.random.default_rng(2)
    sides = [[judge.Answers(["x" * 5], [score]) for score in random.normal(size=60)] for _ in range(2)]
    gap = np.array([a.scores[0] - b.scores[0] for a, b in zip(*sides)])
    value, low, high = judge.compare(sides, 0)["mean score A - B"]
    error = gap.std() / 60**0.5
    assert value == pytest.approx(gap.mean())
    assert (value - low, high - value) == pytest.approx((1.96 * error, 1.96 * error), rel=0.15)
    assert judge.compare(sides, 0) == judge.compare(sides, 0) != judge.compare(sides, 1)


def test_a_weight_of_a_prompt_is_how_often_it_counts():
    # red: answers of a prompt each count as much as those of another; weights left out of a mean or the fit
    random = np.random.default_rng(3)
    sides = [
        [judge.Answers(["x" * k for k in random.integers(1, 30, n)], [*random.normal(size=n)]) for n in sizes]
        for sizes in (random.integers(1, 5, 40), random.integers(1, 5, 40))
    ]
    counts = random.integers(0, 4, 40)
    again = [[one for one, count in zip(side, counts) for _ in range(count)] for side in sides]
    weighted = judge.estimates(judge.measures(sides), sides, counts.astype(float))
    assert weighted == pytest.approx(judge.estimates(judge.measures(again), again, np.ones(counts.sum())))
    one = [judge.Answers(["x"] * 10, [float(k) for k in range(-10, 0)])]
    side = one + [judge.Answers(["x"], [1.0])] * 9  # a twentieth of ten prompts is half of the first one's answers
    assert judge.estimates(judge.measures([side, side]), [side, side], np.ones(10))["worst 5 % A"] == pytest.approx(-8)


def test_what_cannot_be_compared_is_one_line(root, tmp_path):
    scored = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "score": 1}])
    other = write_rows(tmp_path / "b.jsonl", [{"prompt": "r", "completion": "a", "score": 1}])
    bare = write_rows(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "a"}])
    for argv, wanted in {
        (scored, "--against", other): "b.jsonl: no prompt of --data has an answer in it",
        (scored, "--against", bare): "c.jsonl: answers without a score (--by scores them)",
        (scored, "--against", other, "--out", tmp_path / "no" / "x.json"): "must be FILE.json in a folder that exists",
        (scored, "--against", other, "--out", scored): "must be FILE.json in a folder that exists",
        (scored, "--against", other, "--label", "GOOD"): "--label: --by None is no classifier",
    }.items():
        code, _, err = said(judge.main, "--data", *argv)
        assert code == 2 and wanted in err and len(err.splitlines()) == 1
