"""Progress bars: on a terminal, of rank 0, after a while, and never on stdout."""

import os
import pty
import subprocess
import sys
import termios

import pytest
from conftest import ROOT
from test_config import PAIR, command, write_model

SOON = "progress.DELAY = 0.01"
SHORT = """import time, progress
{}
print(sum(1 for _ in progress.bar(range(9), "things", 9) if not time.sleep(0.03)))"""


def on_a_terminal(source, *argv, **variables):
    """(stdout, what a terminal got on stderr) of Python source."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # else a bar has no room
    line = [sys.executable, "-c", source, *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    run = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    stdout = run.communicate()[0]
    assert run.returncode == 0, shown
    return stdout, shown.decode()


@pytest.mark.parametrize("line, rank, seen", [(SOON, "0", True), (SOON, "1", False), ("", "0", False)])
def test_a_bar_shows_on_rank_zero_after_a_while(line, rank, seen):
    # red: delay away, RANK not looked at
    stdout, shown = on_a_terminal(SHORT.format(line), RANK=rank)
    assert stdout == "9\n" and ("things" in shown and "/9" in shown) == seen == (shown != "")


def test_no_bar_without_a_terminal():
    # red: isatty away
    source = SHORT.format(SOON)
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("9\n", "")


def test_rows_and_evaluations_have_bars(tmp_path):
    # red: any call of progress.bar away; its iter away (rows are lost)
    write_model(tmp_path / "model")
    for name in ("pairs", "more"):
        (tmp_path / f"{name}.jsonl").write_bytes(PAIR * 300)  # two chunks
    source = "import progress, sys, align, sft, store\nprogress.DELAY = 0\n"
    for script in ("align", "sft"):
        argv = command(tmp_path, tmp_path / script, "--steps", "0", "--eval-data", tmp_path / "more.jsonl")
        argv += ["--token-cache", str(tmp_path / f"cache-{script}")]
        source += f"print('of {script}', file=sys.stderr)\n{script}.main({argv!r})\n"
    stdout, shown = on_a_terminal(source)
    assert stdout.count("300 rows read, 300 examples") == 4
    for part in shown.partition("of sft")[::2]:
        assert part.count("\rrows: ") >= 2 and "evaluation: " in part
    assert "rows: " not in stdout and "evaluation: " not in stdout
