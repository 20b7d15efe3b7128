"""Accuracy by subset: of the rows of --eval-data that name one, from the row to metrics.jsonl.

`red:` names one-line changes that turn a test red.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_config import exit_code
from test_store import load, tokenizer  # noqa: F401  a fixture
from test_train import base  # noqa: F401  a fixture

import align
import formats
import plot
import ranking
from formats import Example

LOSSES = {"bradley_terry": "rewards", "dpo": "rewards", "simpo": "logps", "kto": "rewards"}
NAMES = ["zeta", "a/b c", None, "zeta", "ü" * 20, "a/b c", "a/b c"]  # of the rows in turn
CUT = "ü" * 16  # 32 bytes


def argv(base, loss, number, out, *more):  # noqa: F811
    """A command line; the loss "same" is dpo against itself."""
    found = ["--model", base / "policy", "--data", base / "train.jsonl", "--out", out]
    found += ["--eval-data", base / f"rows{number}.jsonl", "--loss", "dpo" if loss == "same" else loss]
    found += ["--tokens-per-microbatch", "300", "--dtype", "float32", "--max-length", "128"]
    found += ["--reference", base / "reference"] * (loss in ("dpo", "kto"))
    return list(map(str, [*found, *more]))


@pytest.fixture(scope="module")
def runs(base):  # noqa: F811
    """{(loss, rows, processes): the evaluation of a run of no steps}."""
    rows = (ROOT / "examples" / "hh_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(row) for row in sorted(rows, key=len)[1:78:3]]
    files = {"all": []}
    for number, row in enumerate(rows):
        name = NAMES[number % len(NAMES)]
        files["all"].append(row | {"subset": name, "id": number})
        files.setdefault(name, []).append(row)
    for number, found in enumerate(files.values()):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (base / f"rows{number}.jsonl").write_text(text, encoding="utf-8")
    trained = base / "subset-reward"  # a new reward model says 0 of everything
    line = argv(base, "bradley_terry", 0, trained, "--steps", "2", "--lr", "1e-2")
    assert exit_code(align.main, line) is None
    wanted = [(loss, name, 1) for loss in ("bradley_terry", "dpo") for name in files]
    wanted += [(loss, name, 1) for loss in ("simpo", "kto") for name in ("all", "a/b c")]
    wanted += [("same", "all", 1), *[(loss, "all", 2) for loss in ("bradley_terry", "dpo", "kto")]]
    outs, jobs = {}, []
    for loss, name, processes in wanted:
        number = list(files).index(name)
        outs[loss, name, processes] = out = base / f"subset-{loss}-{number}-{processes}"
        line = argv(base, loss, number, out, "--steps", "0")
        if loss == "bradley_terry":
            line += ["--model", str(trained / "final")]
        if processes == 1:
            assert exit_code(align.main, line) is None
        else:
            jobs.append({"script": "align.py", "argv": line})
    (base / "subset.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tests/drive.py", str(base / "subset.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {key: (out, json.loads((out / "metrics.jsonl").read_text())) for key, out in outs.items()}


@pytest.mark.parametrize("loss", LOSSES)
def test_accuracy_by_subset_is_that_of_the_subset_alone(runs, loss):
    # red: a name for a group of another micro-batch, pairs of all subsets, the count of all pairs, names of
    # one micro-batch alone
    kind = LOSSES[loss]
    _, row = runs[loss, "all", 1]
    alone = {name: runs[loss, name, 1][1][f"{kind}/accuracies"] for l, name, n in runs if (l, n) == (loss, 1)}
    whole, rest = alone.pop("all"), alone.pop(None, None)
    alone = {name.replace("ü" * 20, CUT): value for name, value in alone.items()}
    names = {key.split("/", 2)[2]: key for key in row if key.startswith(f"{kind}/accuracies/")}
    found = {name: row[key] for name, key in names.items()}
    assert {name: found[name] for name in alone} == pytest.approx(alone, abs=1e-12)
    assert list(found) == ["a/b c", "zeta", CUT] and len({*found.values(), whole}) > 1
    numbers = {key.split("/", 1)[1]: value for key, value in row.items() if key.startswith("pairs/")}
    assert numbers == {"a/b c": 10, "zeta": 8, CUT: 4} and list(numbers) == list(found)
    if rest is not None:
        told = sum(found[name] * numbers[name] for name in found) + rest * 4
        assert told / 26 == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("loss", ["bradley_terry", "dpo", "kto"])
def test_two_processes_say_the_same(runs, loss):
    # red: names in the order of a rank's own examples
    one, two = [runs[loss, "all", processes][1] for processes in (1, 2)]
    assert list(one) == list(two) and len([key for key in one if "accuracies/" in key]) == 3
    both = [{k: v for k, v in row.items() if "accur" in k or "pairs" in k} for row in (one, two)]
    assert both[0] == pytest.approx(both[1], abs=1e-12)


def test_ties_are_half_right_and_plot_shows_the_table(runs, capsys, tmp_path):
    # red: a tie counted as wrong
    out, row = runs["same", "all", 1]
    values = {key: value for key, value in row.items() if "accuracies" in key}
    assert len(values) == 4 and set(values.values()) == {0.5}
    plot.main([str(out), "--html", str(tmp_path / "page.html")])
    assert "| a/b c | 10 | 0.500 |" in capsys.readouterr().out


# ---- on the way there


PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}


def test_rows_of_rewardbench_are_read(tmp_path):
    # red: subset not among the keys of preferences, its type not looked at, read of labelled answers
    row = PAIR | {"chosen_model": "a", "rejected_model": "b", "subset": "alpacaeval-easy", "id": 7}
    found = formats.parse(row)
    assert found == Example(formats.parse(PAIR).prompt, ["yes", "no"], [1.0, 0.0], subset="alpacaeval-easy")
    assert formats.unread_keys(row) == {"chosen_model", "rejected_model", "id"}
    assert formats.parse(PAIR | {"subset": None}) == formats.parse(PAIR)
    assert formats.parse(PAIR | {"subset": 3}).subset == "3"
    with pytest.raises(ValueError, match='"subset" must be a string, got'):
        formats.parse(PAIR | {"subset": ["a"]})
    labelled = {"prompt": "q", "completion": "yes", "label": True, "subset": ["a"]}
    assert formats.parse(labelled).subset == "" and formats.unread_keys(labelled) == {"subset"}


def test_the_cache_keeps_subsets_and_training_does_not_depend_on_them(tokenizer, tmp_path):  # noqa: F811
    # red: subsets in the digest (no run from before could be resumed), the column left out of EXAMPLES
    names = ["", "a", "ü" * 20, "x" * 40, "\ud800", "a"]
    plain = [PAIR | {"prompt": f"Question {number // 2}", "chosen": f"yes {number}"} for number in range(6)]
    stores = []
    for number, rows in enumerate((plain, [row | {"subset": name} for row, name in zip(plain, names)])):
        source = tmp_path / f"{number}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        stores.append(load(str(source), tmp_path / "cache", tokenizer))
    assert stores[0].digest == stores[1].digest
    assert [example.subset for example in stores[0]] == [""] * 6
    kept = ["", "a", CUT, "x" * 32, "?", "a"]
    assert [example.subset for example in stores[1]] == kept
    half = list(stores[1].share(0.5, 0))
    assert len(half) == 3 and all(example in list(stores[1]) for example in half)
    assert [example.subset for example in stores[1].by_prompt()] == kept[::2]


def test_pairs_are_counted_by_name_where_there_are_any():
    # red: names without pairs kept; the order of the rows
    rows = [Example([], [], [2.0, 1.0, 0.0], subset="b"), Example([], [], [1.0, 0.0], subset="a")]
    rows += [Example([], [], [1.0], subset="c"), Example([], [], [1.0, 0.0])]
    assert list(ranking.pairs_by_subset(rows, "all").items()) == [("a", 1), ("b", 3)]
    assert ranking.pairs_by_subset(rows, "best-worst") == {"a": 1, "b": 1}
