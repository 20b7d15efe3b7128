"""What the pages say, done: commands parse, recipes train, rows are read, names and links exist.

Pages are README.md, docs/, bench/README.md and examples/README.md. Code stands in indented blocks, and every
block is of a kind that is tested here: lines of shell, rows, or a recipe. `red:` names a change that turns a
test red.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from torch.distributed import run as torchrun

import data
import objective

sys.path.insert(0, str(ROOT / "bench"))

import methods  # noqa: E402

PATHS = [ROOT / "README.md", ROOT / "bench" / "README.md", ROOT / "examples" / "README.md"]
PATHS += sorted(ROOT.glob("docs/*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
MODULES = {path.stem for path in ROOT.glob("*.py")}
# title in the README, the file that its block is added to, and the flags that choose it
RECIPES = {
    "A loss": ("losses.py", "--loss my_dpo --beta 2"),
    "A risk measure": ("risk.py", "--loss ra_dpo1 --risk my_risk --share 0.3"),
    "A dataset": ("data.py", "--data my_pairs=pairs.tsv"),
}


def blocks(text: str) -> list[str]:
    """The indented blocks of a page, that of a list's item too."""
    found = re.findall(r"(?:^|\n\n)((?: {4,}\S.*\n(?:\n(?= {4}))?)+)", text)
    return [textwrap.dedent(block) for block in found]


def kind(block: str) -> str:
    return {"{": "rows", "@": "recipe"}.get(block[0], "recipe" if block.startswith("def ") else "shell")


def spans(text: str) -> list[str]:
    """What stands between backticks."""
    paragraphs = re.split(r"\n\s*\n", text)
    return [" ".join(span.split()) for part in paragraphs for span in re.findall(r"`([^`]+)`", part)]


def section(title: str) -> str:
    """What stands under a heading of the README."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def programs(text: str) -> list[list[str]]:
    """The programs of lines of shell, each with its arguments; what $variable or $(program) says is 2."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(re.sub(r"\$\([^)]*\)|\$\w+", "2", line), comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            part = [word for word in shlex.split(part) if word != "..."]
            while re.match(r"[A-Z_]+=", part[0]):
                part.pop(0)
            found += programs(part[-1]) if part[0] == "srun" else [part]
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(page, program with its arguments) of all pages."""
    found = []
    for page, text in PAGES.items():
        lines = [block for block in blocks(text) if kind(block) == "shell"]
        lines += [span for span in spans(text) if re.match(r"(python|torchrun|bash|[A-Z_]+=\S+ bash) ", span)]
        found += [(page, program) for line in lines for program in programs(line)]
    return found


COMMANDS = commands()
SCRIPTS = [words for _, words in COMMANDS if words[0] in ("python", "torchrun") and words[1] != "-m"]
OTHERS = [command for command in COMMANDS if command[1] not in SCRIPTS]
# Runs in the copy below: the script's own parser on each command, and nothing after it. Prints what each said
# and the flags of all scripts.
PARSE = """
import argparse, contextlib, importlib, io, json, sys
from pathlib import Path
sys.path[:0] = [".", "bench", "examples"]
own = argparse.ArgumentParser.parse_known_args
said, flags = [], set()
def keep(parser, *given):
    flags.update(parser._option_string_actions)
    return own(parser, *given)
def stop(parser, *given):
    keep(parser, *given)
    raise StopIteration
for name, argv in json.load(sys.stdin):
    errors = io.StringIO()
    sys.argv = [name, *argv]
    argparse.ArgumentParser.parse_known_args = keep
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent, contextlib.redirect_stderr(errors), contextlib.suppress(StopIteration, SystemExit):
        module = importlib.import_module(Path(name).stem) if Path(name).is_file() else None
        if hasattr(module, "parse_args"):
            module.parse_args(argv)
        elif hasattr(module, "main"):
            argparse.ArgumentParser.parse_known_args = stop
            module.main()
            print("it has no parser", file=sys.stderr)
        elif argv or module is None:
            print("no such script, or it takes no arguments", file=sys.stderr)
    said.append(errors.getvalue())
print(json.dumps([said, sorted(flags)]))
"""


def recipe(title: str) -> str:
    """The first indented block after a bold title."""
    return blocks(README.split(f"**{title}** is one function", 1)[1])[0]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the scripts with the README's loss, risk measure and dataset."""
    path = tmp_path_factory.mktemp("recipe")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, path)
    for folder in ("bench", "configs", "examples"):
        shutil.copytree(ROOT / folder, path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for title, (script, _) in RECIPES.items():
        with open(path / script, "a", encoding="utf-8") as file:
            file.write(f"\n\n{recipe(title)}")
    rows = [f"What is {i} + {i}?\t{2 * i}\t{2 * i + 1}\n" for i in range(8)] + ["Is it?\tyes\tyes\n"]
    (path / "pairs.tsv").write_text("".join(rows), encoding="utf-8")
    return path


def python(path, argv: list[str], text: str = "") -> subprocess.CompletedProcess:
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=path, input=text, env=one, capture_output=True, text=True, timeout=120)


def run(path, out: str, *flags: str) -> subprocess.CompletedProcess:
    command = ["align.py", "--model", "examples/tiny", "--weights", "random", "--out", out]
    command += ["--data", "examples/hh_test.jsonl", "--max-length", "128", "--warmup-steps", "0"]
    command += ["--device", "cpu", "--batch-size", "4", "--lr", "1e-3", "--dtype", "float32", *flags]
    return python(path, command)


def logged(path, split: str = "train") -> list[dict]:
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.fixture(scope="module")
def trained(extended):
    """The run of the README's loss."""
    done = run(extended, "runs/x", *RECIPES["A loss"][1].split(), "--steps", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    return extended / "runs" / "x"


def test_the_recipe_for_a_loss_trains(trained):
    rows = logged(trained)
    assert rows[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)  # it got a live reference
    assert rows[-1]["rewards/margins"] != 0 and rows[-1]["pairs"] == 4
    assert json.loads((trained / "args.json").read_text())["beta"] == 2


def test_the_recipe_takes_only_its_own_flags(extended):
    done = run(extended, "refused", "--loss", "my_dpo", "--alpha", "1")
    assert done.returncode == 2
    assert "--loss my_dpo takes no --alpha (it takes --beta, --pairs, --sft-weight)" in done.stderr


def test_the_recipes_for_a_risk_measure_and_a_dataset_train(extended):
    flags = [*RECIPES["A risk measure"][1].split(), *RECIPES["A dataset"][1].split()]
    done = run(extended, "runs/risk", *flags, "--steps", "3", "--eval-every", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the answers are the same" in done.stdout  # the reason of the ninth row
    rows = logged(extended / "runs" / "risk")
    assert rows[0]["risk/chosen"] == 0 and rows[-1]["pairs"] == 4
    assert rows[-1]["risk/chosen"] > rows[-1]["kl/chosen"] > 0  # cvar is never below kl


def test_every_recipe_is_one_that_trains():
    found = [block for text in PAGES.values() for block in blocks(text) if kind(block) == "recipe"]
    assert found == [recipe(title) for title in RECIPES]
    for _, flags in RECIPES.values():
        assert f"`{flags}`" in README


@pytest.mark.parametrize("page", PAGES)
def test_every_row_is_read(page, tmp_path):
    # red: a misspelt key in a row of docs/data.md
    rows = [block for block in blocks(PAGES[page]) if kind(block) == "rows"]
    for block in rows:
        (tmp_path / "rows.jsonl").write_text(block, encoding="utf-8")
        found = list(data.stream(str(tmp_path / "rows.jsonl"), "train"))
        assert len(found) == len(block.splitlines()) and not any(isinstance(row, str) for row in found)
    assert "```" not in PAGES[page], "code stands in indented blocks, which these tests find"


@pytest.fixture(scope="module")
def said(extended, trained):  # noqa: ARG001  the run's args.json is the config of a command
    """What each script's own parser says to its command, nothing or why not; and the flags of all scripts."""
    jobs = []
    for words in SCRIPTS:
        script, *argv = words[1:]
        if words[0] == "torchrun":
            launched = torchrun.parse_args(words[1:])
            script, argv = launched.training_script, launched.training_script_args
        if script in ("align.py", "sft.py") and argv and argv[0].startswith("-"):
            for flag in ("--model", "--data", "--out"):  # an ellipsis stands for those that are needed
                argv = argv if flag in argv else [*argv, flag, "x"]
        jobs.append((script, argv))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("examples/*.py")]:
        if "\ndef main(" in path.read_text(encoding="utf-8"):
            jobs.append((str(path.relative_to(ROOT)), ["--help"]))
    done = python(extended, ["-c", PARSE], json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(SCRIPTS)), ids=[" ".join(words) for words in SCRIPTS])
def test_every_command_parses(index, said):
    # red: --betaa in a command; a config that is not there
    assert not said[0][index]


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_exists(page, said):
    # red: --keep-desirables in docs/methods.md
    known = {*said[1], *torchrun.get_args_parser()._option_string_actions}
    known |= set(re.findall(r"= (--\w+) \]", (ROOT / "run.sh").read_text(encoding="utf-8")))
    for span in spans(PAGES[page]):
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span)) <= known, span


@pytest.mark.parametrize(("page", "words"), OTHERS, ids=[" ".join(words) for _, words in OTHERS])
def test_every_other_command_is_known(page, words):
    # red: bash run.sh benchmark
    if words[:2] == ["bash", "run.sh"]:
        script = (ROOT / "run.sh").read_text(encoding="utf-8")
        modes = "|".join(re.findall(r"^    ([\w| -]+)\)", script, re.M)).replace(" ", "").split("|")
        assert set(words[2:3]) <= set(modes)
    elif words[0] in ("sbatch", "bash"):
        assert words[1].startswith("slurm/") and (ROOT / words[1]).is_file()
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / path).is_file() for path in words[3:])
    else:
        known = words[0] == "salloc" or words[:2] in (["source", ".venv/bin/activate"], ["pip", "install"])
        assert known, f"{page}: not tested"


PIP = """#!/usr/bin/env bash
echo "$*" >>asked
case "$*" in
    *--verbose*) printf '%s\\n' "  Guessing wheel URL:  there/x.whl" "  $FOUND" "  warning: noise" ;;
esac
exit "${CODE:-0}"
"""


def flash_attn(folder, **named) -> subprocess.CompletedProcess:
    paths = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "CUDA_HOME": f"{folder}/none"}
    command = ["bash", "run.sh", "flash-attn"]
    env = os.environ | paths | named
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_flash_attn_is_installed_by_its_own_command_alone(tmp_path):
    """Its pip is a stand-in, for there is no CUDA here; what refuses is not.
    red: setup that tries it; wheel not installed first; build isolation; pip's exit code lost in the pipe"""
    for path in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / path, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "installed.txt")
    python, nvcc = tmp_path / ".venv" / "bin" / "python", tmp_path / "bin" / "nvcc"
    python.write_text(PIP)
    python.chmod(0o755)
    if not shutil.which("nvcc", path="/usr/bin:/bin"):
        nothing = flash_attn(tmp_path, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
        assert (nothing.returncode, nothing.stdout) == (2, "") and "no nvcc" in nothing.stderr
        assert len(nothing.stderr.splitlines()) == 1 and not (tmp_path / "asked").exists()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    done = flash_attn(tmp_path, FOUND="Precompiled wheel not found. Building from source...")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "looking for the wheel there/x.whl", "wheel: none; compiling the source, up to an hour"
    ]  # fmt: skip
    first, second = (tmp_path / "asked").read_text().splitlines()[-2:]
    assert {"wheel", "setuptools", "ninja", "packaging"} <= set(first.split())
    assert second.endswith("--no-build-isolation flash-attn")
    assert flash_attn(tmp_path, FOUND="Raw wheel path x").stdout.endswith("wheel: found\n")
    failed = flash_attn(tmp_path, CODE="1")
    assert failed.returncode == 2 and "without CUDA" in failed.stderr
    python.write_text(PIP.replace("exit ", '[ "$1" = -c ] || [[ "$*" != *--verbose* ]] || exit 1\nexit '))
    failed = flash_attn(tmp_path)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1 and ".log" in failed.stderr
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    assert "flash" not in script.split("\nsetup() {")[1].split("\n}")[0]


def test_the_table_of_methods_is_printed_by_its_script():
    page = PAGES["docs/methods.md"]
    assert methods.table() in page, "put the output of bench/methods.py into docs/methods.md"
    words = {word for span in spans(section("Methods")) for word in span.split()}
    assert set(objective.LOSSES) | set(objective.RISKS) <= words
    assert f"{len(objective.LOSSES)} losses" in README


def test_the_readme_takes_five_minutes():
    assert len(README.splitlines()) <= 200
    assert MODULES <= {span.removesuffix(".py") for span in spans(section("Files"))}  # each has its row


def test_what_the_readme_quotes_is_in_the_tables():
    sentence = README.split("\nTime and memory on a real model", 1)[1].split("\n\n", 1)[0]
    quoted = re.findall(r"\d+\.\d+", sentence)
    assert len(quoted) == 4 and all(f"| {number} |" in PAGES["bench/README.md"] for number in quoted)


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_exists(page):
    for path, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", PAGES[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_every_name_exists(page):
    # red: a test or a function that was renamed
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py"))
    for span in spans(PAGES[page]):
        for path in re.findall(r"\b(?:tests|bench|configs|examples|docs)/[\w./-]+\.\w+", span):
            assert (ROOT / path).exists(), path
        script = span.split(" ")[0]
        if re.fullmatch(r"\w+\.py", script):
            folders = (ROOT, ROOT / "tests", (ROOT / page).parent)
            assert any((folder / script).exists() for folder in folders), span
        if re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in tests, span
        module, _, name = span.partition(".")
        if module in MODULES and name.isidentifier() and name not in ("py", "json", "toml"):
            source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
            assert re.search(rf"^(?:def |class )?{name}\b", source, re.M), span
