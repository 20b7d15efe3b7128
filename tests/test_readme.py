"""What the README says, done: its recipe for a loss, its table of methods."""

import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "bench"))

import methods  # noqa: E402


def recipe(title: str) -> str:
    """The first indented block after a bold title."""
    after = README.split(f"**{title}** is one function", 1)[1]
    return textwrap.dedent(re.search(r"\n\n((?:    .*\n|\n)+)", after)[1])


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the scripts whose losses.py ends with the README's loss."""
    path = tmp_path_factory.mktemp("recipe")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, path)
    with open(path / "losses.py", "a", encoding="utf-8") as file:
        file.write(f"\n\n{recipe('A loss')}")
    return path


def run(path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "align.py", "--model", ROOT / "examples" / "tiny", "--weights", "random"]
    command += ["--data", ROOT / "examples" / "hh_test.jsonl", "--out", path / "run", "--max-length", "128"]
    command += ["--device", "cpu", "--batch-size", "4", "--lr", "1e-3", "--dtype", "float32", *flags]
    return subprocess.run(list(map(str, command)), cwd=path, capture_output=True, text=True, timeout=120)


def test_the_recipe_for_a_loss_trains(extended):
    done = run(extended, "--loss", "my_dpo", "--beta", "2", "--steps", "3", "--warmup-steps", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (extended / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)  # it got a live reference
    assert rows[-1]["rewards/margins"] != 0 and rows[-1]["pairs"] == 4
    assert json.loads((extended / "run" / "args.json").read_text())["beta"] == 2


def test_the_recipe_takes_only_its_own_flags(extended):
    done = run(extended, "--loss", "my_dpo", "--alpha", "1")
    assert done.returncode == 2
    assert "--loss my_dpo takes no --alpha (it takes --beta, --pairs, --sft-weight)" in done.stderr


def test_the_table_of_methods_is_printed_by_its_script():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert methods.table() in page, "put the output of bench/methods.py into docs/methods.md"
