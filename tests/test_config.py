"""Bad input costs one line that starts with `error:`, exit code 2, and nothing in the run directory.

Most cases call `main` of align.py or sft.py in this process, a few run as a user runs them. The model is
examples/tiny made smaller still, with random weights. `red:` names one-line changes that turn a test red.
"""

import contextlib
import fcntl
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import align
import config
import fsdp
import rundir
import sft
import trackers

# what fit.py chooses on a CPU
CHOSEN = ["--tokens-per-microbatch", "4096", "--activation-checkpointing", "full"]
REQUIRED = ["--model", "m", "--data", "d.jsonl", "--out", "o"]
PAIR = b'{"prompt": "Name a colour.", "chosen": "Blue is one.", "rejected": "No."}\n'


def write_model(path, **changes):
    """A copy of examples/tiny with another config.json."""
    shutil.copytree(ROOT / "examples" / "tiny", path)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"head_dim": 16, "intermediate_size": 32, **changes}
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | small))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with the models `model` and `wide`, and six pairs of HH."""
    path = tmp_path_factory.mktemp("config")
    write_model(path / "model")
    write_model(path / "wide", vocab_size=9000)
    rows = (ROOT / "examples" / "hh_test.jsonl").read_bytes().split(b"\n")[:6]
    (path / "pairs.jsonl").write_bytes(b"\n".join(rows))
    return path


def command(root, out, *extra):
    argv = ["--model", root / "model", "--weights", "random", "--data", root / "pairs.jsonl", "--out", out]
    return [str(part) for part in [*argv, "--steps", "1", "--batch-size", "2", *extra]]


@pytest.fixture(scope="module")
def finished(root):
    """(run directory, command line, stdout) of a run of two steps with a checkpoint after each."""
    argv = command(root, root / "run", "--steps", "2", "--save-every", "1", "--loss", "ra_dpo2")
    argv += ["--risk", "published", "--split", "false", "--alpha", "0.25", "--lr", "1e-3"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert exit_code(align.main, argv) is None
    return root / "run", argv, out.getvalue()


def stopped(finished, path):
    """A copy of the run as a kill after its last checkpoint would leave it, and its command line."""
    shutil.copytree(finished[0], path, ignore=shutil.ignore_patterns("final"))
    return path, [*finished[1], "--out", str(path)]


def exit_code(main, argv):
    """None where main returns. Nothing here keeps the frames of main alive, and with them its lock."""
    try:
        main(argv)
    except SystemExit as end:
        return end.code
    finally:
        fsdp.finish()


def tree(path):
    found = [path, *sorted(path.rglob("*"))]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in found if p.exists()}


@pytest.fixture
def refused(capfd, caplog):
    """refused(script, argv, out, *words): the first line of this file, and the words in the error line."""

    def check(script, argv, out, *words):
        before = tree(out)
        capfd.readouterr()
        assert exit_code(script.main, argv) == 2
        stderr = capfd.readouterr().err
        assert re.fullmatch(r"error: .+\n", stderr), stderr
        assert [word for word in words if word not in stderr] == [], stderr
        assert caplog.text == ""  # libraries log to the stderr of the import, which capfd does not see
        assert tree(out) == before

    return check


# Flags: what is given, and what the line must say.
ERM = ["--loss", "ra_dpo1", "--risk", "erm"]
FLAGS = {
    "missing": (["--model"], "--model: expected one argument"),
    "unknown": (["--betaa", "0.1"], "unrecognized arguments: --betaa", "did you mean --beta?"),
    "abbreviated": (["--batch", "2"], "unrecognized arguments: --batch", "did you mean --batch-size?"),
    "other loss": (["--alpha", "0.5"], "--loss dpo takes no --alpha", "it takes --beta"),
    "other risk": ([*ERM, "--confidence-level", "0.5"], "--risk erm takes no --confidence-level"),
    "risk": (["--risk", "cvar"], "--loss dpo takes no --risk"),
    "beta": (["--beta", "0"], "beta must be a finite number > 0, got 0"),
    "level": (["--loss", "ra_dpo1", "--confidence-level", "1.5"], "confidence_level must be", "1.5"),
    "aversion": ([*ERM, "--risk-aversion", "0.001"], "risk_aversion must be", "0.001"),
    "nan": (["--lr", "nan"], "--lr: must be a finite number, got nan"),
    "negative": (["--lr", "-1"], "--lr: must be > 0, got -1"),
    "boolean": (["--trust-remote-code", "yes"], "--trust-remote-code: must be true or false, got 'yes'"),
    "loss": (["--loss", "dpoo"], "--loss: invalid choice: 'dpoo'", "dpo", "ra_dpo2"),
    "no preference": (["--loss", "sft"], "--loss: invalid choice", "'sft'", "'dpo'"),
    "data": (["--data", "{root}/none.jsonl"], "{root}/none.jsonl: no such file"),
    "eval data": (["--eval-data", "{root}/none.jsonl"], "{root}/none.jsonl: no such file"),
    "dataset": (["--data", "hhh"], "hhh: neither a dataset (", "hh, "),
    "template": (["--chat-template", "{root}/none.jinja"], "--chat-template {root}/none.jinja"),
    "short": (["--max-length", "2"], "no example is left at --max-length 2", "6 cannot be used: "),
    "long": (["--max-length", "4096"], "--max-length 4096 exceeds its 2048 positions"),
    "prompt": (["--max-length", "40", "--max-prompt-length", "60"], "--max-prompt-length 60"),
    "model": (["--model", "{root}/none"], "{root}/none: no such model directory"),
    "reference": (["--reference", "{root}/wide"], "--reference has vocabulary 9000, the policy 8192"),
    "out": (["--out", "{root}/pairs.jsonl/run"], "--out: {root}/pairs.jsonl/run: {root}/pairs.jsonl is not a directory"),
    "resume": (["--resume", "step-300"], "no complete checkpoint at", "step-300 (complete: none)"),
    "device": (["--device", "cuda"], "--device cuda", "0 CUDA devices"),
    "sft unknown": (["--beta", "0.1"], "unrecognized arguments: --beta"),
    "sft lr": (["--lr", "0"], "--lr: must be > 0, got 0"),
    "sft resume": (["--resume", "step-300"], "no complete checkpoint at", "step-300 (complete: none)"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flag_is_refused(case, root, tmp_path, refused):
    # red: allow_abbrev=True; exit code 1; hyperparameters() without fail; rundir.take before the data is read.
    if case == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    extra, *words = FLAGS[case]
    argv = command(root, tmp_path / "run", *(part.format(root=root) for part in extra))
    script = sft if case.startswith("sft") else align
    refused(script, argv, tmp_path, *(word.format(root=root) for word in words))


# Data files: the bad row stands between two good ones.
ROWS = {
    "not JSON": (b'{"prompt": "a", "chosen": }', "not JSON (Expecting value, column 27)"),
    "not an object": (b"[1]", "not an object"),
    "key": (b'{"prompt": "a", "chosen": "b"}', 'missing "rejected" (keys: chosen, prompt)'),
    "type": (b'{"prompt": "a", "completion": 5}', '"completion" must be a string', "got 5"),
    "number": (b'{"prompt": 3, "completion": "b"}', '"prompt" must be a string or a list of turns'),
    "role": (b'{"prompt": [{"role": "usr", "content": "a"}], "completion": "b"}', 'prompt[0].role is "usr"'),
    "content": (b'{"prompt": [{"role": "user", "name": "a"}], "completion": "b"}', "prompt[0]", "content"),
    "Latin-1": (b'{"prompt": "\xe9", "completion": "b"}', "not valid UTF-8 (byte 0xe9 at column 13)"),
    "weight": (b'{"prompt": "a", "completion": "b", "weight": 1' + 400 * b"0" + b"}", '"weight"'),
}
FILES = {case: ("a.jsonl", PAIR + row + b"\n" + PAIR, ":2: ", *words) for case, (row, *words) in ROWS.items()}
FILES |= {
    "no row": ("a.jsonl", b"", ": no examples"),
    "blank": ("a.jsonl", b"\n \n\n", ": no examples"),
    "object": ("a.json", b'{"rows": {"prompt": "q"}}', ":1: missing"),
    "split": ("a.json", b'{"test": [{"prompt": "q"}]}', ": no split 'train'; it has test"),
    "not gzip": ("a.jsonl.gz", PAIR, ""),
    "cut gzip": ("a.jsonl.gz", gzip.compress(PAIR)[:-12], ""),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_file_is_refused_by_line(case, root, tmp_path, refused):
    # red: files.py counts lines from 0, or decodes with errors="replace".
    name, content, where, *words = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    refused(align, command(root, tmp_path / "run", "--data", path), tmp_path, f"error: {path}{where}", *words)


FAULTS = {  # rows that cannot be used, and why
    "empty": (b'{"prompt": "a", "chosen": " ", "rejected": "b"}', "an answer is empty"),
    "null": (b'{"prompt": "a", "chosen": "b", "rejected": null}', '"rejected" is null'),
    "surrogate": (
        b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}',
        "an answer has half a surrogate pair",
    ),
    "alike": (b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "the answers are the same once encoded"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_row_that_cannot_be_used_stops_where_that_is_asked_for(case, root, tmp_path, refused):
    # red: --strict-data not passed on.
    row, reason = FAULTS[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(PAIR + row + b"\n" + PAIR)
    argv = command(root, tmp_path / "run", "--data", path, "--strict-data", "true")
    words = (f"error: {path}:2: {reason}", "1 of 3 rows cannot be used, --strict-data true allows none")
    for script in (align, sft) if case != "alike" else (align,):
        refused(script, argv, tmp_path, *words)


def test_too_many_rows_that_cannot_be_used_stop(root, tmp_path, refused):
    path = tmp_path / "a.jsonl"
    path.write_bytes(PAIR * 19 + FAULTS["empty"][0] + b"\n" + FAULTS["null"][0])
    argv = command(root, tmp_path / "run", "--data", path)
    words = ("an answer is empty; 2 of 21 rows cannot be used, more than 5 %",)
    refused(align, argv, tmp_path, f"error: {path}:20: ", *words)


@pytest.mark.parametrize("case", ["cut", "missing", "shape", "pickle"])
def test_bad_weights_are_refused(case, root, finished, tmp_path, refused):
    changes = {"missing": {"num_hidden_layers": 2}, "shape": {"head_dim": 8}}
    path = write_model(tmp_path / "model", **changes.get(case, {}))
    weights = (finished[0] / "final" / "model.safetensors").read_bytes()
    name = "pytorch_model.bin" if case == "pickle" else "model.safetensors"
    (path / name).write_bytes(weights[:5000] if case == "cut" else weights)
    argv = command(root, tmp_path / "run", "--model", path, "--weights", "pretrained")
    refused(align, argv, tmp_path, f"error: {path}")


def test_directory_of_another_run(finished, tmp_path, refused):
    # red: check_run without its fail.
    out, argv = stopped(finished, tmp_path / "run")
    refused(align, argv, out, f"{out} already holds step-", "pass --resume auto")
    refused(align, [*argv, "--resume", "step-3"], out, "no complete checkpoint", "(complete: step-2, step-1)")
    refused(align, [*argv, "--resume", "auto", "--seed", "1"], out, "with --seed 0, this run has --seed 1")


def test_rows_that_changed(root, finished, tmp_path, refused):
    # red: the digest left out of the record; the file's time in the digest.
    out, argv = stopped(finished, tmp_path / "run")
    rows = (root / "pairs.jsonl").read_bytes()
    more = [*argv, "--resume", "auto", "--steps", "3"]
    try:
        for changed in (
            b"\n".join(rows.split(b"\n")[::-1]),
            rows.replace(b'"rejected": "', b'"rejected": "x', 1),
            rows + b"\n" + PAIR,
        ):
            (root / "pairs.jsonl").write_bytes(changed)
            refused(align, more, out, "step-2 was made from other rows than --data has now", "another --out")
    finally:
        (root / "pairs.jsonl").write_bytes(rows)
    os.utime(root / "pairs.jsonl", ns=(1, 1))
    assert exit_code(align.main, more) is None


def test_directory_in_use(root, tmp_path, refused):
    # red: rundir.take without its flock.
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(sft, command(root, tmp_path), tmp_path, f"{tmp_path}: in use by another run")
    assert exit_code(sft.main, command(root, tmp_path)) is None


def test_finished_run_is_left_alone(finished, capfd):
    # red: check_run returns where it should exit.
    before = tree(finished[0])
    assert exit_code(align.main, [*finished[1], "--resume", "auto"]) == 0
    assert tree(finished[0]) == before
    assert capfd.readouterr().err == ""


def copied(finished, path):
    """A copy of a finished run, and its command line, which goes on."""
    shutil.copytree(finished[0], path)
    return path, [*finished[1], "--out", str(path), "--resume", "auto"]


def test_finished_run_goes_on_for_more_steps(finished, tmp_path):
    # red: "nothing to do" whatever --steps says; the log begun anew.
    out, argv = copied(finished, tmp_path / "run")
    before = (out / "final" / "model.safetensors").read_bytes()
    assert exit_code(align.main, [*argv, "--steps", "3"]) is None
    assert [row["step"] for row in read_log(out)] == [0, 1, 2]
    assert read_log(out)[:2] == read_log(finished[0])
    assert (out / "final" / "model.safetensors").read_bytes() != before
    assert json.loads((out / "status.json").read_text())["step"] == 3
    assert json.loads((out / "args.json").read_text())["steps"] == 3
    assert exit_code(align.main, [*argv, "--steps", "3"]) == 0


FINISHED = {  # further flags, and what the line must say
    "other loss": (["--alpha", "0.5"], "is finished and was made with --alpha 0.25, this run has 0.5"),
    "other rate": (["--lr", "0.5"], "was made with --lr 0.001, this run has 0.5", "choose another --out"),
    "more, and another seed": (["--steps", "9", "--seed", "1"], "was made with --seed 0, this run has 1"),
    "other data": (["--data", "{root}/none.jsonl"], "was made with --data ['{root}/pairs.jsonl']"),
    "fewer": (["--steps", "1"], "--steps 1: ", "has gone to step 2"),
}


@pytest.mark.parametrize("case", FINISHED)
def test_finished_run_of_other_flags(case, root, finished, tmp_path, refused):
    # red: check_run without the look at args.json.
    out, argv = copied(finished, tmp_path / "run")
    extra, *words = FINISHED[case]
    argv += [part.format(root=root) for part in extra]
    refused(align, argv, out, *(word.format(root=root) for word in words))


def test_a_finished_run_is_known_by_what_its_flags_name(root, finished, tmp_path, refused, capfd):
    # red: contents without model, or without data; `skipped` without them: their paths differ
    moved = tmp_path / "moved"
    shutil.copytree(root / "model", moved / "model")
    shutil.copy(root / "pairs.jsonl", moved)
    out, argv = copied(finished, tmp_path / "run")
    argv += ["--model", str(moved / "model"), "--data", str(moved / "pairs.jsonl")]
    assert exit_code(align.main, argv) == 0 and "nothing to do" in capfd.readouterr().out
    (moved / "pairs.jsonl").write_bytes((moved / "pairs.jsonl").read_bytes().replace(b"a", b"b"))
    refused(align, argv, out, "is finished and was made from another --data than there is now", "another --out")
    shutil.copy(root / "pairs.jsonl", moved)
    (moved / "model" / "config.json").write_text((root / "wide" / "config.json").read_text())
    refused(align, argv, out, "was made from another --model than there is now")


def test_finished_run_without_a_checkpoint(finished, tmp_path, refused):
    out, argv = copied(finished, tmp_path / "run")
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    refused(align, [*argv, "--steps", "3"], out, "is finished: --steps 3 needs a checkpoint to go on from")


def test_finished_run_of_flags_that_do_not_train(finished, tmp_path, capfd):
    # red: every flag compared.
    out, argv = copied(finished, tmp_path / "run")
    before = tree(out)
    for extra in (
        ["--log-every", "5"],
        ["--eval-every", "7"],
        ["--save-every", "2"],
        ["--strict-data", "true"],
    ):
        assert exit_code(align.main, [*argv, *extra]) == 0
    assert tree(out) == before and capfd.readouterr().out.count("nothing to do") == 4


def test_several_sources(root, tmp_path, capfd):
    # red: the first source alone; a weight taken for a part of the name.
    rows = (root / "pairs.jsonl").read_bytes().split(b"\n")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows[:3]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(rows[2:]))
    argv = command(root, tmp_path / "run", "--steps", "2", "--batch-size", "5", "--save-every", "1")
    argv += ["--data", f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl:0.5", "--eval-data", f"{tmp_path}/b.jsonl"]
    assert exit_code(align.main, argv) is None
    out = capfd.readouterr().out
    assert "start at step 0 of 2: dpo, 5 pairs" in out  # 3 and half of 4
    told = [
        out.index(f"{tmp_path}/{name}.jsonl: {n} rows read, {n} examples") for name, n in (("a", 3), ("b", 4))
    ]
    assert told == sorted(told)
    done = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [(row["split"], row["pairs"]) for row in done] == [
        ("eval", 4),
        ("train", 5),
        ("train", 5),
        ("eval", 4),
    ]
    args = align.parse_args([str(tmp_path / "run" / "args.json")])
    assert args == align.parse_args([*argv, *CHOSEN]) and args.data[1] == f"{tmp_path}/b.jsonl:0.5"
    assert exit_code(align.main, [*argv, "--resume", "auto"]) == 0


def test_no_chat_template_means_plain(root, tmp_path, capfd):
    path = write_model(tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    assert exit_code(align.main, command(root, tmp_path / "run", "--model", path)) is None
    out, err = capfd.readouterr()
    assert "chat template: plain" in out and "Human: " in out and err == ""


def run(*argv):
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=90, env=one)


def test_process_refuses_in_one_line(root, tmp_path):
    (tmp_path / "a.toml").write_text("lr = 1e-3\nbetaa = 0.1\n")
    done = run(ROOT / "align.py", tmp_path / "a.toml", *command(root, tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'error: {tmp_path}/a.toml:2: unknown key "betaa" (did you mean beta?)\n'
    done = run(ROOT / "sft.py", *command(root, tmp_path / "run", "--max-length", "4096"))
    assert done.returncode == 2
    assert done.stderr == f"error: {root}/model: --max-length 4096 exceeds its 2048 positions\n"
    assert not (tmp_path / "run").exists()


def test_two_processes_refuse_in_one_line(root, tmp_path):
    # red: fail() prints on every rank. torchrun's own report follows the line.
    (tmp_path / "bad.jsonl").write_bytes(PAIR + b"{\n")
    argv = command(root, tmp_path / "run", "--data", tmp_path / "bad.jsonl")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "align.py", *argv)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith(f"error: {tmp_path}/bad.jsonl:2: not JSON"), done.stderr
    assert not (tmp_path / "run").exists()


# The config file.
CONFIGS = {
    "key": ("a.toml", b"lr = 1e-3\n\nbetaa = 1\n", 'a.toml:3: unknown key "betaa" (did you mean beta?)'),
    "comment above": ("a.toml", b"# betaa of the paper\n\nbetaa = 1\n", "a.toml:3: unknown key"),
    "list": ("a.toml", b"seed = 1\nlr = [1]\n", 'a.toml:2: "lr" must be a string, a number or a', "got [1]"),
    "null": ("a.json", b'{"lr": null}', 'a.json:1: "lr" must be', "got null"),
    "no source": ("a.toml", b"data = []\n", 'a.toml:1: "data" must be a string or a list of strings, got []'),
    "source in a list": (
        "a.toml",
        b'data = [["a"]]\n',
        'a.toml:1: "data" must be a string or a list of strings',
    ),
    "word": ("a.toml", b'batch_size = "many"\n', "--batch-size: must be a whole number, got 'many'"),
    "boolean": ("a.toml", b"steps = true\n", "--steps: must be a whole number, got 'true'"),
    "infinite": ("a.toml", b"lr = inf\n", "--lr: must be a finite number, got inf"),
    "no such loss": ("a.toml", b"[loss]\ndpoo = {lr = 1}\n", "a.toml: [loss] dpoo: must be a value of --loss"),
    "loss alone": ("a.toml", b"[loss]\ndpo = 1\n", "a.toml: [loss] dpo: must be a value of --loss and its"),
    "a loss of a loss": ("a.toml", b"[loss]\ndpo = {loss = 'kto'}\n", "a.toml: [loss] dpo: must be a value of --loss"),
    "key of a loss": ("a.toml", b"[loss]\ndpo = {lrr = 1}\n", 'a.toml:2: unknown key "lrr"'),
    "table": ("a.toml", b"[model]\na = {lr = 1}\n", 'a.toml:1: "model" must be a string, a number'),
    "not TOML": ("a.toml", b"lr = \n", "a.toml: not TOML: ", "line 1"),
    "not JSON": ("a.json", b'{"lr": }', "a.json: not JSON: ", "line 1"),
    "not an object": ("a.json", b"[1]", "a.json: must be one object"),
    "not UTF-8": ("a.toml", b'model = "\xe9"\n', "a.toml"),
    "absent": ("a.toml", None, "a.toml: no such file"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config_is_refused(case, tmp_path, refused):
    name, content, *words = CONFIGS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(align, [str(tmp_path / name), *REQUIRED], tmp_path, *words)


def test_lists_of_sources(tmp_path):
    # red: str(list); a list for a flag that takes one value; the command line's sources added to the file's.
    lists = {"data": ["a", "hh=b c:0.5"], "eval_data": ["d"], "out": "o", "model": "m"}
    (tmp_path / "a.toml").write_text(
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in lists.items())
    )
    (tmp_path / "a.json").write_text(json.dumps(lists))
    flags = ["--data", "a", "hh=b c:0.5", "--eval-data", "d", "--out", "o", "--model", "m"]
    for script in (align, sft):
        for name in ("a.toml", "a.json"):
            assert script.parse_args([str(tmp_path / name)]) == script.parse_args(flags)
            assert script.parse_args([str(tmp_path / name), "--data", "x"]).data == ["x"]
    (tmp_path / "a.toml").write_text('data = "a"\n')
    assert align.parse_args([str(tmp_path / "a.toml"), "--out", "o", "--model", "m"]).data == ["a"]


@pytest.mark.parametrize("script", [align, sft], ids=["align", "sft"])
def test_config_is_the_command_line(script, tmp_path):
    # red: str(value) without lower(); _tokens after the command line.
    values = {"out": "a b", "lr": 1e-3, "batch-size": 4, "adam_eps": 1, "steps": 0, "trust_remote_code": True}
    (tmp_path / "a.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items()))
    (tmp_path / "a.json").write_text(json.dumps(values, indent=1))
    flags = [f"--{key.replace('_', '-')}={str(value).lower()}" for key, value in values.items()]
    wanted = script.parse_args(REQUIRED[:4] + flags)
    for name in ("a.toml", "a.json"):
        assert script.parse_args([str(tmp_path / name), *REQUIRED[:4]]) == wanted
    args = script.parse_args([str(tmp_path / name), *REQUIRED, "--lr", "0.5", "--trust-remote-code", "false"])
    assert (args.lr, args.trust_remote_code, args.out, args.batch_size) == (0.5, False, "o", 4)


def test_shipped_configs_parse():
    for path in sorted(ROOT.glob("configs/*.toml")):
        script = sft if "sft" in path.name else align
        args = script.parse_args([str(path), "--out", "o"])
        assert script is sft or align.make_objective(args)


def test_args_json_reproduces_the_run(finished, root, tmp_path):
    # red: "false" made bool("false") by add_hyperparameters.
    args = align.parse_args([str(finished[0] / "args.json")])
    assert args == align.parse_args([*finished[1], *CHOSEN]) and args.split is False
    argv = command(root, tmp_path / "run", "--steps", "0", "--trust-remote-code", "true")
    assert exit_code(sft.main, argv) is None
    assert sft.parse_args([str(tmp_path / "run" / "args.json")]) == sft.parse_args([*argv, *CHOSEN])


def test_yes_needs_no_value(tmp_path):
    # red: --yes without nargs; a bare one that is False.
    (tmp_path / "a.toml").write_text("yes = true")
    (tmp_path / "b.toml").write_text("yes = false")
    given = [["--yes"], ["--yes", "true"], ["--yes", "false"], ["--yes", "--lr", "1e-3"], []]
    said = [align.parse_args([*REQUIRED, *more]).yes for more in given]
    said += [sft.parse_args([str(tmp_path / name), *REQUIRED, *more]).yes
             for name, more in (("a.toml", []), ("b.toml", []), ("b.toml", ["--yes"]))]  # fmt: skip
    assert said == [True, True, False, True, False, True, False, True]


def test_free_flags_are_flags():
    # red: a misspelled entry of FREE_FLAGS, which would make that flag binding.
    known = {**vars(align.parse_args(REQUIRED)), **vars(sft.parse_args(REQUIRED))}
    assert set(config.FREE_FLAGS) <= set(known)
    assert not {"model", "data", "loss", "seed", "batch_size", "max_length", "dtype"} & set(config.FREE_FLAGS)


# The metrics log and the progress line.


def read_log(out):
    return [json.loads(line, parse_constant=pytest.fail) for line in open(out / "metrics.jsonl")]


def test_metrics_log(tmp_path):
    # red: `<= step` in rewind_log; JSONDecodeError not suppressed; log_row without str(v).
    rows = [{"step": step, "split": split} for step in range(4) for split in ("eval", "train")]
    for row in rows:
        rundir.log_row(tmp_path, row | {"a": float("nan"), "b": float("-inf"), "c": 1.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "spl')
    rundir.rewind_log(tmp_path, 2)
    assert read_log(tmp_path) == [row | {"a": "nan", "b": "-inf", "c": 1.5} for row in rows[:4]]
    rundir.rewind_log(tmp_path / "none", 2)


def test_resumed_log_has_every_step_once(finished, tmp_path):
    out, argv = stopped(finished, tmp_path / "run")
    shutil.rmtree(out / "step-2")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "spl')
    assert exit_code(align.main, [*argv, "--resume", "auto"]) is None
    rows = [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(out)]
    assert rows == [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(finished[0])]
    assert [row[0] for row in rows] == [0, 1]


def test_progress_line(finished):
    number = r"-?\d\S*"
    parts = ["train step 0/2", r"loss 0\.6931", r"acc 0\.5", "margin 0", "kl 0", "risk 0", f"lr {number}"]
    parts += [f"gnorm {number}", r"[\d,]+ tok/s", f"{number} s/it", r"mem \d+\.\d\dG", r"eta \d+:\d\d:\d\d"]
    lines = [line for line in finished[2].splitlines() if line.startswith("train step")]
    assert len(lines) == 2 and re.fullmatch(r" \| ".join(parts), lines[0]), lines


@pytest.mark.parametrize("say", [config.warn, lambda text: trackers._warn("wandb", text)])
def test_a_warning_is_one_write(say, monkeypatch):
    # red: print(text): what two processes say at the same moment stood on one line, two ends after it
    class Pipe(io.StringIO):
        def write(self, text):
            writes.append(text)

    writes = []
    monkeypatch.setattr("sys.stderr", Pipe())
    say("something")
    assert len([text for text in writes if text]) == 1 and "something" in writes[0] and writes[0].endswith("\n")
