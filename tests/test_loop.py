"""What closes the loop: the reward and the report of examples/loop.py, and the published experiment on small
local directories of the published form.

`red:` names a change of the code that turns a test red.
"""

import importlib.util
import json
import os
import subprocess

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import transformers as hf
from conftest import ROOT

spec = importlib.util.spec_from_file_location("loop", ROOT / "examples" / "loop.py")
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)


def test_the_reward_can_be_seen_through():
    twelve = "one two three four five six seven eight nine ten eleven twelve."
    assert loop.score([], twelve) == 1
    assert loop.score([], twelve[:-1]) == 0
    assert loop.score([], "a b c d e f.") == 1 - 0.5
    assert loop.score([], " ".join(map(str, range(24)))) == -1
    assert loop.score([], "no " * 12) == -11 / 12
    assert loop.score([], "") == -2
    assert loop.score([], "x" + " y" * 999) < -3.9  # at most 3 for the length


def rounds_in(where, scores):
    for number, found in enumerate(scores):
        folder = where / ("sft", "round-1", "round-2")[number]
        (folder / "drift").mkdir(parents=True)
        rows = [
            {"id": f"{k // 2}-{k % 2}", "prompt": [{"role": "user", "content": f"<b>{k // 2}"}],
             "completion": f"said & done {k}", "score": score}
            for k, score in enumerate(found)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "heldout.jsonl").write_text(text, encoding="utf-8")
        if number:
            drift = json.dumps({"split": "eval", "step": 0, "rewards/mean": 3.0 * number})
            (folder / "drift" / "metrics.jsonl").write_text(drift + "\n", encoding="utf-8")
    return [where / name for name in ("sft", "round-1", "round-2")]


def test_the_report(tmp_path, monkeypatch, capsys):
    """red: the tail of the best; an interval over answers in place of prompts."""
    scores = [[k % 7 for k in range(80)], [1 + k % 7 for k in range(80)], [2.5] * 80]
    folders = rounds_in(tmp_path, scores)
    monkeypatch.setattr("sys.argv", ["loop.py", *map(str, folders), "--out", str(tmp_path)])
    loop.main()
    found = capsys.readouterr().out.splitlines()
    assert found == (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found[2:]]
    assert [row[0] for row in cells] == ["sft", "round-1", "round-2"]
    mean, tail = (sum(scores[0]) / 80, 0.0)
    assert cells[0][2].startswith(f"{mean:.3f} (") and cells[0][3].startswith(f"{tail:.3f} (")
    assert cells[2][2] == cells[2][3] == "2.500 (2.500 to 2.500)"
    assert [row[5] for row in cells] == ["0.0", "3.0", "6.0"]
    pairs = [[float(k)] * 2 for k in range(40)]  # the answers of a prompt are alike: 40 draws, not 80
    low, high = loop.interval(pairs, loop.fmean)
    spread = (high - low) / 2 / 1.96
    assert 0.85 < spread / (11.54 / 40**0.5) < 1.15
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;0" in page and "<b>" not in page and page.count("<article>") == 3 * loop.SHOWN
    assert page.count('class="good"') + page.count('class="bad"') > 10
    assert (tmp_path / "loop.png").stat().st_size > 5000


@pytest.fixture
def imdb(tmp_path):
    """A small GPT-2, reviews and a classifier, as directories of the published form."""
    tokenizer = hf.AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")
    tokenizer.chat_template = None
    tokenizer.eos_token = tokenizer.bos_token = "<|endoftext|>"
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    gpt2 = hf.GPT2Config(**size, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    hf.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    bert = hf.DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=3, **labels
    )
    hf.DistilBertForSequenceClassification(bert).save_pretrained(tmp_path / "classifier")
    for name in ("gpt2", "classifier"):
        tokenizer.save_pretrained(tmp_path / name)
    hh = (ROOT / "examples" / "hh_train.jsonl").read_text(encoding="utf-8").splitlines()[:80]
    (tmp_path / "imdb" / "plain_text").mkdir(parents=True)
    for split in ("train", "test", "unsupervised"):
        rows = {"text": [json.loads(line)["chosen"] for line in hh], "label": [k % 2 for k in range(80)]}
        table = pa.Table.from_pydict(rows)
        pyarrow.parquet.write_table(table, tmp_path / "imdb" / "plain_text" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_the_published_experiment_on_small_directories(imdb):
    """The very commands of `bash run.sh imdb`, then the same again, which finds everything there."""
    environment = os.environ | {
        "IMDB_MODEL": f"{imdb}/gpt2", "IMDB_DATA": f"imdb={imdb}/imdb", "IMDB_CLASSIFIER": f"{imdb}/classifier",
        "RUNS_IMDB": f"{imdb}/runs", "OMP_NUM_THREADS": "1", "NPROC": "1", "MPLBACKEND": "Agg",
    }  # fmt: skip
    command = ["bash", "run.sh", "imdb", "--small"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = imdb / "runs"
    pairs = [json.loads(line) for line in (runs / "pairs_train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [json.loads(line)["chosen"] for line in (ROOT / "examples" / "hh_train.jsonl").open(encoding="utf-8")]
    assert 15 <= len(pairs) <= 24
    for pair in pairs:
        assert pair["score_chosen"] > pair["score_rejected"]
        assert any(text.startswith(pair["prompt"]) for text in texts[:80])
    answers = (runs / "ra_dpo1_0.97" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 16 * 4
    rows = (runs / "ra_dpo1_0.97" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[-1])["step"] == 4 and json.loads(rows[-1])["split"] == "eval"
    assert (runs / "comparison.png").exists() and "mean" in (runs / "ra_dpo1_0.97" / "scores.md").read_text()
