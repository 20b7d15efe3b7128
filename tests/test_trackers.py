"""--log-to: tensorboard for real, and fakes of wandb and trackio that record, raise or hang.

`red:` names one-line changes that turn a test red.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_config import command, exit_code, write_model

import align
import sft

# A library of a tracker: what it is asked goes to a file; FAKE says where it raises or hangs.
FAKE = """
import json, os, sys, threading, time

def told(what, *values, **named):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps([what, values, named]) + "\\n")
    print("a library that talks")
    if what == os.environ.get("RAISES"):
        raise SystemExit("no api key") if what == "init" else RuntimeError("two\\nlines")
    if what == os.environ.get("HANGS"):
        threading.Thread(target=time.sleep, args=(1000,)).start()  # no daemon: it would hold an exit up
        time.sleep(1000)

def init(**named): told("init", **named)
def define_metric(*values, **named): told("define_metric", *values, **named)
def log(*values, **named): told("log", *values, **named)
def finish(): told("finish")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("trackers")
    write_model(path / "model")
    rows = (ROOT / "examples" / "hh_test.jsonl").read_bytes().split(b"\n")[:6]
    (path / "pairs.jsonl").write_bytes(b"\n".join(rows))
    (path / "fakes").mkdir()
    for name in ("wandb", "trackio"):
        (path / "fakes" / f"{name}.py").write_text(FAKE)
    return path


def environment(root, out, **variables):
    told = {"TOLD": str(root / f"{out.name}.told"), "PYTHONPATH": str(root / "fakes"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **told, **variables}


def argv(root, out, *extra):
    held_out = ["--eval-data", root / "pairs.jsonl"]
    return command(root, out, "--steps", "2", "--lr", "1e-3", "--save-every", "1", *held_out, *extra)


def train(script, root, out, *extra, **variables):
    """(stdout, stderr) of a run of two steps."""
    line = [sys.executable, script, *argv(root, out, *extra)]
    env = environment(root, out, **variables)
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def told(root, out):
    return [json.loads(line) for line in (root / f"{out.name}.told").read_text().splitlines()]


def numbers(found):
    """What a tracker is to get of rows: (step, numbers by key)."""
    kept = [{k: v for k, v in row.items() if type(v) in (int, float) and k != "step"} for row in found]
    named = [{f"{row['split']}/{k}": v for k, v in values.items()} for row, values in zip(found, kept)]
    return [(row["step"], values) for row, values in zip(found, named)]


def scalars(folder):
    """{(step, key): value} of what tensorboard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {(e.step, key): e.value for key in events.Tags()["scalars"] for e in events.Scalars(key)}


def expected(found):
    """The same of rows; it keeps fp32."""
    near = {step: {} for step, _ in numbers(found)}
    for step, values in numbers(found):
        near[step] |= values
    return {(step, k): pytest.approx(v, rel=1e-6) for step, part in near.items() for k, v in part.items()}


def test_each_tracker_gets_every_row_also_after_a_resume(root):
    # red: purge_step away (rows of the lost steps stay), an offset of 0 (all rows a second time), a new id on
    # every start, step_metric away, values of any type, stdout=None
    out = root / "run"
    more = ["--log-to", "tensorboard", "wandb", "trackio", "wandb"]
    stdout, stderr = train("align.py", root, out, *more)
    assert "warning" not in stderr and "a library that talks" in stderr and "talks" not in stdout
    first, shown, calls = rows(out), scalars(out / "tensorboard"), told(root, out)
    assert shown == expected(first) and len(shown) > 40
    inits = [named for what, _, named in calls if what == "init"]
    assert len(inits) == 2 and len([call for call in calls if call[0] == "finish"]) == 2
    for init in inits:
        assert init["resume"] == "allow" and init["project"] == root.name and init["config"]["lr"] == 1e-3
    (ours,), (theirs,) = [n for n in inits if "id" in n], [n for n in inits if "id" not in n]
    assert ours["id"] == (out / "run_id").read_text().strip() and theirs["name"] == f"run-{ours['id']}"
    assert ["define_metric", ["*"], {"step_metric": "step"}] in calls
    logs = [(values[0], named) for what, values, named in calls if what == "log"]
    wandb = [(values.pop("step"), values) for values, named in logs if not named]
    trackio = [(named["step"], values) for values, named in logs if named]
    assert wandb == trackio == numbers(first) and len(wandb) == 4

    # a resumed run is the same one; its step 2 was an evaluation, and is a step of training now
    (out / "final").rename(root / "gone")
    train("align.py", root, out, *more, "--steps", "3", "--eval-every", "0", "--resume", "step-1")
    later = [row for row in rows(out) if row["step"] >= 1]
    again = scalars(out / "tensorboard")
    assert again == {key: v for key, v in shown.items() if key[0] < 1} | expected(later)
    assert (2, "train/loss") in again and (2, "eval/loss") in shown and (2, "eval/loss") not in again
    calls = told(root, out)[len(calls) :]
    assert [n["id"] for what, _, n in calls if what == "init" and "id" in n] == [ours["id"]]
    steps = [values[0]["step"] for what, values, named in calls if what == "log" and not named]
    assert steps == [row["step"] for row in later] == [1, 2, 3]


def test_trackers_that_hang_change_nothing_and_cost_a_few_seconds(root):
    # red: the waits one after the other, os._exit of _watch away, the rows sent by training itself
    plain, out = root / "plain", root / "hangs"
    assert exit_code(sft.main, argv(root, plain)) is None
    began = time.time()
    stdout, stderr = train("sft.py", root, out, "--log-to", "wandb", "trackio", HANGS="log")
    assert "wrote" in stdout
    warnings = [line for line in stderr.splitlines() if "warning" in line]
    end = "not done 8 s after the end of the run; metrics.jsonl has every row"
    assert sorted(warnings) == [f"warning: --log-to {name}: {end}" for name in ("trackio", "wandb")]
    timed = ("time", "mem_gb", "step_s", "tok_per_s", "pairs_per_s", "responses_per_s")
    both = [[{k: v for k, v in row.items() if k not in timed} for row in rows(run)] for run in (plain, out)]
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (plain, out)]
    assert both[0] == both[1] and weights[0] == weights[1]
    ended = json.loads((out / "status.json").read_text())["time"]
    assert ended - began < 60 and time.time() - ended < 8 + 6


def test_a_tracker_that_fails_or_hangs_says_so_once_and_ends(root):
    # red: `except Exception` alone, os._exit(0) at the end away, _watch not started
    cases = {
        ("RAISES", "init"): "stopped by SystemExit: no api key; metrics.jsonl has every row",
        ("RAISES", "log"): "stopped by RuntimeError: two lines; metrics.jsonl has every row",
        ("HANGS", "init"): "not done 8 s after the end of the run; metrics.jsonl has every row",
        ("HANGS", "finish"): "not done 8 s after the end of the run; metrics.jsonl has every row",
        ("RAISES", "nothing"): None,
    }
    row = {"split": "train", "step": 0, "time": 1.0, "loss": 2.0, "note": "nan", "flag": True}
    started = {}
    for how, what in cases:
        out = root / f"{how}-{what}"
        out.mkdir()
        (out / "args.json").write_text("{}")
        (out / "run_id").write_text("abc\n")
        line = [sys.executable, "trackers.py", "wandb", str(out), "0", "0"]
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
        env = environment(root, out, **{how: what})
        started[how, what] = subprocess.Popen(line, cwd=ROOT, env=env, text=True, **pipes)
        # the last line is being written
        (out / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    time.sleep(2)
    for run in started.values():
        run.stdin.close()
        run.stdin = None
    for case, said in cases.items():
        _, stderr = started[case].communicate(timeout=30)
        assert stderr == (f"warning: --log-to wandb: {said}\n" if said else "")
    calls = told(root, root / "RAISES-nothing")
    logged = [{"train/time": 1.0, "train/loss": 2.0, "step": 0}]
    assert calls[-2:] == [["log", logged, {}], ["finish", [], {}]]


def test_a_missing_package_is_one_line_before_anything_is_loaded(root, monkeypatch, capfd):
    # red: check away; `found.origin is None` away (the folder passes for the package)
    (root / "folder" / "wandb").mkdir(parents=True)
    monkeypatch.syspath_prepend(root / "folder")
    for name in ("wandb", "trackio"):
        line = argv(root, root / "missing", "--model", "absent", "--log-to", name)
        assert exit_code(align.main, line) == 2 and not (root / "missing").exists()
        right = f"error: --log-to {name}: the package is missing (pip install {name})\n"
        assert capfd.readouterr().err == right
