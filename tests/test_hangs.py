"""No rank waits for ever: of two, one is stopped, killed or never comes, and the other says so in one line.

The real script, forked twice by a process that has imported it (bench/chaos.py). `red:` names a change that
turns a test red.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
TIMEOUT = 4.0  # seconds
CASES = {"stopped": ("SIGSTOP", 1), "first stopped": ("SIGSTOP", 0), "killed": ("SIGKILL", 1)}
CASES |= {"absent": ("SIGKILL", 1), "told": ("SIGKILL", 1)}


def disturbed(chaos, base, name):
    """Seconds that the other rank goes on, whether it ends by itself, what it says, the run's status."""
    number, rank = CASES[name]
    out, log = base / name, base / f"{name}.log"
    argv = [*chaos.command(base, "dpo", out), "--timeout-minutes", str(TIMEOUT / 60), "--steps", "100000"]
    pids = chaos.fork(argv, 2, log)
    limit = time.time() + 60
    while name not in ("absent", "told") and chaos.rows(out) < 2 and time.time() < limit:
        time.sleep(0.01)
    os.kill(pids[rank], getattr(signal, number))
    began, other = time.time(), pids[1 - rank]
    if name == "told":
        time.sleep(1)
        os.kill(other, signal.SIGTERM)
    while chaos.alive(other) and time.time() < began + 4 * TIMEOUT:
        time.sleep(0.02)
    seconds, ended = time.time() - began, not chaos.alive(other)
    for pid in pids:
        if chaos.alive(pid):
            os.kill(pid, signal.SIGKILL)
    status = json.loads((out / "status.json").read_text()) if (out / "status.json").exists() else None
    return {"seconds": seconds, "ended": ended, "log": log.read_text(), "status": status}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    base = tmp_path_factory.mktemp("hangs")
    done = subprocess.run([sys.executable, __file__, base], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((base / "found.json").read_text())


@pytest.mark.parametrize("name", ["stopped", "first stopped", "killed"])
def test_a_rank_that_is_lost_is_named(name, found):
    # red: _join without its thread (stopped); without its excepthook (first stopped, killed); begin without "report"
    case, rank = found[name], CASES[name][1]
    assert case["ended"] and case["seconds"] < 1.5 * TIMEOUT
    said = re.findall(r"^error: .+", case["log"], re.M)
    assert len(said) == 1 and re.match(rf"error: rank {rank} is lost: ", said[0]), case["log"]
    assert "Traceback" not in case["log"]
    assert case["status"]["state"] == "failed" and case["status"]["reason"] == said[0].removeprefix("error: ")


def test_a_rank_that_never_comes(found):
    # red: _join without `except`
    case = found["absent"]
    assert case["ended"] and case["seconds"] < 2 * TIMEOUT and case["status"] is None
    assert re.findall(r"^error: .+", case["log"], re.M) == ["error: a rank has not come within --timeout-minutes"]


WAITING = """
import contextlib, datetime, fsdp
clone = fsdp.dist.TCPStore.clone
class Slow:  # nearly always within a call
    def __init__(self, store):
        self.set = store.set
        self.wait = store.wait
    def multi_get(self, keys):
        while not fsdp.OVER.is_set():
            with contextlib.suppress(RuntimeError):
                self.wait(["never"], datetime.timedelta(milliseconds=1))
        return [b"0 0"] * len(keys)
fsdp.dist.PrefixStore.clone = fsdp.dist.TCPStore.clone = lambda store: Slow(clone(store))
fsdp.init("cpu")
fsdp.barrier()
raise ValueError("of the user's")
"""


def test_a_rank_that_fails_ends_as_its_error_says(tmp_path):
    # red: _join without its atexit: the interpreter ends under a thread within a call and is aborted, as may be a
    # run that has ended well (seen once in a hundred)
    (tmp_path / "waiting.py").write_text(WAITING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "waiting.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=100, env=env)
    assert "ValueError: of the user's" in done.stderr and "terminate called" not in done.stderr
    assert "exitcode  : 1 " in done.stderr and "SIGABRT" not in done.stderr


def test_a_signal_ends_a_rank_that_waits_for_another(found):
    # red: listen with Python's own handlers
    assert found["told"]["ended"] and found["told"]["seconds"] < 3
    assert "stopped by SIGTERM (before the first step" in found["told"]["log"]


if __name__ == "__main__":
    import chaos

    base = Path(sys.argv[1])
    chaos.prepare(base)
    (base / "found.json").write_text(json.dumps({name: disturbed(chaos, base, name) for name in CASES}))
