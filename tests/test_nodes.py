"""Several nodes, as far as one machine shows them: the job script under stand-ins for Slurm, and two launchers with
separate folders that meet over loopback.

The tasks of a job and the workers of a launcher are the real scripts, forked by tests/warm.py. `red:` names a change
that turns a test red.
"""

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import align
import fsdp
import preflight

sys.path.insert(0, str(ROOT / "bench"))
import chaos  # noqa: E402

import warm  # noqa: E402

SBATCH = ROOT / "slurm" / "sft_align.sbatch"
# Two nodes, a task each. A task is killed where another one fails; what Slurm would call %n is in the log's name.
SRUN = """#!/bin/bash
log=/dev/stdout
for word in "$@"; do
    case $word in
        --output=*) log=${word#--output=} ;;
        --*) ;;
        *) break ;;
    esac
    shift
done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 SLURM_NTASKS=$SLURM_NNODES \\
        "$@" >> "${log//%n/$node}" 2>&1 &
    pids+=($!)
done
echo "${pids[@]}" > "$STAND_IN/pids"
for _ in "${pids[@]}"; do
    wait -n || { code=$?; kill -9 "${pids[@]}" 2>/dev/null; exit $code; }
done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$STAND_IN/scontrol"
case "$1 $2" in
    "show hostnames") printf '127.0.0.1\\nother\\n' ;;
    "show job") echo "   StartTime=2020-01-01T00:00:00 EndTime=$ENDS Deadline=N/A" ;;
esac
"""


def until(holds, seconds=120):
    limit = time.time() + seconds
    while not holds():
        assert time.time() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model, 40 pairs, and stand-ins: `python` that asks tests/warm.py, `srun`, `scontrol`."""
    base = tmp_path_factory.mktemp("nodes")
    chaos.prepare(base)
    (base / "bin").mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} -S {ROOT}/tests/warm.py {base}/socket "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (base / "bin" / name).write_text(text)
        (base / "bin" / name).chmod(0o755)
    if (server := os.fork()) == 0:  # chaos has imported the scripts
        try:
            warm.serve(str(base / "socket"))
        finally:
            os._exit(1)
    until((base / "socket").exists)
    yield base
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)


# ---- Slurm
# -----------------------------------------------------------------------------------------------------------


def job_environment(base, out):
    env = os.environ | {"PATH": f"{base}/bin:{os.environ['PATH']}", "PYTHON": f"{base}/bin/python"}
    env |= {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "STAND_IN": str(base)}
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), "RUNS": str(out), "TOKEN_CACHE": f"{base}/cache"}
    return env | {"SLURM_JOB_END_TIME": str(int(time.time()) + 14400)}


def batch(base, out, **more):
    """The job script as Slurm starts it: what it printed goes to a log, as there."""
    env = job_environment(base, out) | more
    with open(base / "job.log", "a") as log:
        return subprocess.Popen(["bash", SBATCH], env=env, stdout=log, stderr=log, cwd=base)


def flags(base, kind, steps, out):
    argv = chaos.command(base, kind, out)[1:]
    drop = [argv.index(name) for name in ("--out", "--resume", *["--model"] * (kind != "sft"))]
    kept = [word for k, word in enumerate(argv) if k not in drop and k - 1 not in drop]
    return " ".join([*kept[: -1 if kept[-1] == "--resume" else None], "--steps", str(steps)])


def test_a_job_is_told_to_leave_goes_back_into_the_queue_and_ends(base):
    # red: no requeue; no --resume; a port for each node; a requeue although final/ is there
    out = base / "slurm"
    stages = {"SFT": flags(base, "sft", 4, out), "ALIGN": flags(base, "dpo", 24, out)}
    job = batch(base, out, **stages)
    until(lambda: chaos.rows(out / "align") > 1 or job.poll() is not None)
    for pid in (base / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert job.wait(120) == 0, (base / "job.log").read_text()
    status = json.loads((out / "align" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("saved", "SIGUSR1")
    asked = (base / "scontrol").read_text().splitlines()
    assert asked == ["show hostnames node[1-2]", "requeue 4711"]
    written = (out / "sft" / "final" / "config.json").stat().st_mtime_ns
    assert batch(base, out, **stages).wait(120) == 0, (base / "job.log").read_text()
    assert (out / "align" / "final" / "model.safetensors").exists()
    assert (out / "sft" / "final" / "config.json").stat().st_mtime_ns == written
    steps = [json.loads(line)["step"] for line in (out / "align" / "metrics.jsonl").read_text().splitlines()
             if '"train"' in line]
    assert steps == list(range(24))
    logs = [(out / "align" / "logs" / f"node-{node}.log").read_text() for node in (0, 1)]
    assert f"start at step {status['step']} of 24" in logs[0] and "start at step" not in logs[1]
    assert (base / "scontrol").read_text().splitlines()[2:] == ["show hostnames node[1-2]"]


def test_a_stage_that_fails_ends_the_job(base, tmp_path):
    # red: set -e left out; the exit code of srun not asked
    job = batch(base, tmp_path, SFT=flags(base, "sft", 4, tmp_path) + " --beta 1", ALIGN="none")
    assert job.wait(120) == 2
    assert "error: " in (tmp_path / "sft" / "logs" / "node-0.log").read_text()
    assert "requeue" not in (base / "scontrol").read_text().split("\n")[-2] and not (tmp_path / "align").exists()


def test_a_stage_that_ends_without_a_model_is_not_queued_again(base, tmp_path):
    # red: no look at status.json; a look at what stood there before
    (tmp_path / "sft").mkdir()
    for told in ("", '{"state": "saved", "step": 2, "time": 0}'):
        (tmp_path / "sft" / "status.json").write_text(told)
        job = batch(base, tmp_path, SFT=flags(base, "sft", 4, tmp_path) + " --check", ALIGN="none")
        assert job.wait(120) == 1
        assert "sft.py has ended without" in (base / "job.log").read_text().splitlines()[-1]
    assert "requeue" not in (base / "scontrol").read_text().split("\n")[-2] and not (tmp_path / "align").exists()


# A clock that stands at what $STAND_IN/clock says, and seconds that are milliseconds.
DATE = '#!/bin/bash\n[ "$1" = +%s ] && cat "$STAND_IN/clock" || exec /bin/date "$@"\n'
TIMEOUT = '#!/bin/bash\nexec /usr/bin/timeout "$1" "$(($2 / 1000)).$(printf %03d $(($2 % 1000)))" "${@:3}"\n'
# What the first stage does, and the seconds that are left when it begins and ends; exit code of the job, requeued?
ENDINGS = {
    "told before it can save": ("exit 0", 9999, 179, 0, True),
    "told while it imports": ("kill -USR1 $$", 9999, 179, 0, True),
    "not told": ("exec sleep 60", 400, 30, 0, True),
    "no time for the next": ("mkdir -p $RUNS/sft/final", 9999, 179, 0, True),
    "no time": ("exit 3", 179, 179, 0, True),
    "no time, an old Slurm": ("exit 0", 9999, 179, 0, True),
    "fails then": ("exit 1", 9999, 179, 1, False),
    "leaves early": ("exit 0", 9999, 181, 1, False),
    "killed early": ("kill -USR1 $$", 9999, 181, 138, False),
    "no end, an old Slurm": ("exit 0", 9999, 0, 1, False),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDINGS)
def test_a_job_whose_time_is_up_goes_back_into_the_queue_and_not_twice_from_one_step(base, tmp_path, case):
    # red: any part of the last condition of `train` away, or its first look at the time; no `timeout`; `requeue` without
    # its comparison, or without what there is in it; an end that is not known taken for now
    does, begins, ends, code, requeued = ENDINGS[case]
    later = f'echo {10**9 - ends} > "$STAND_IN/$$" && mv "$STAND_IN/$$" "$STAND_IN/clock"'
    (tmp_path / "python").write_text(f"#!/bin/bash\n{later}\n{does}\n")
    for name, text in {"date": DATE, "timeout": TIMEOUT}.items():
        (tmp_path / name).write_text(text)
    for name in ("python", "date", "timeout"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{base}/bin:{os.environ['PATH']}", "PYTHON": f"{tmp_path}/python"}
    env |= {"STAND_IN": str(tmp_path), "SLURM_JOB_END_TIME": str(10**9), "TZ": "UTC", "ENDS": "2001-09-09T01:46:40"}
    if "Slurm" in case:
        env |= {"SLURM_JOB_END_TIME": "", "ENDS": "Unknown" if "no end" in case else env["ENDS"]}

    def job():
        (tmp_path / "scontrol").write_text("")
        (tmp_path / "clock").write_text(str(10**9 - begins))
        found = batch(base, tmp_path, SFT="", ALIGN="", **env).wait(20)
        return found, "requeue 4711" in (tmp_path / "scontrol").read_text()

    assert job() == (code, requeued), (base / "job.log").read_text()
    if not requeued:
        return
    if "next" not in case:
        (tmp_path / "sft").mkdir(exist_ok=True)
        (tmp_path / "sft" / "status.json").write_text('{"state": "running", "step": 2}')
        assert job() == (0, True)
    assert job() == (1, False) and "no step further" in (base / "job.log").read_text().splitlines()[-1]


def test_an_allocation_runs_a_script_on_every_process(base):
    # red: no RANK; the exit code of srun not handed on
    env = job_environment(base, base)
    argv = ["bash", ROOT / "slurm" / "interactive.sh", "align.py", "--loss", "none"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("error: ")) == (2, 1) and "--loss" in done.stdout
    del env["SLURM_JOB_NODELIST"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no allocation" in done.stderr


# ---- two launchers
# -----------------------------------------------------------------------------------------------------------


def agents(base, out, port):
    """Two torchruns, each with a folder and a cache of its own; what they say goes to NODE/log."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    found = []
    for node in (0, 1):
        folder = base / f"node{node}"
        folder.mkdir(exist_ok=True)
        argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", node]
        argv += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
        argv += [ROOT / "tests" / "warm.py", base / "socket", *chaos.command(base, "dpo", out)]
        argv[argv.index("--token-cache") + 1] = "cache"  # below the node's folder
        with open(folder / "log", "a") as log:
            found.append(subprocess.Popen(list(map(str, argv)), cwd=folder, env=env, stdout=log, stderr=log))
    return found


def cached(base):
    """When each node wrote which rows."""
    found = [(base / f"node{node}" / "cache").glob("*/about.json") for node in (0, 1)]
    return [{path.parent.name: path.stat().st_mtime_ns for path in paths} for paths in found]


def descendants(pid):
    return [pid, *(each for child in chaos.children(pid) for each in descendants(child))]


def test_two_launchers_end_as_one_does_and_so_after_one_was_killed(base):
    # red: batch.plan with a rank's own seed; _state without the moments; rng_ left out where ranks are
    pids = chaos.fork(chaos.command(base, "dpo", base / "one"), 2, base / "one.log")
    assert chaos.end(pids, False), (base / "one.log").read_text()
    wanted, out = chaos.outcome(base / "one"), base / "two"
    pair = agents(base, out, chaos.free_port())
    until(lambda: chaos.rows(out) > 3 or any(agent.poll() is not None for agent in pair))
    for pid in descendants(pair[1].pid):
        os.kill(pid, signal.SIGKILL)
    for agent in pair:
        agent.wait(120)
    assert chaos.rows(out) < chaos.STEPS and not (out / "final").exists()
    lost = (base / "node0" / "log").read_text()
    assert re.search("^error: rank 1 is lost: ", lost, re.M), lost
    held = cached(base)
    pair = agents(base, out, chaos.free_port())
    said = [agent.wait(120) for agent in pair]
    logs = [(base / f"node{node}" / "log").read_text() for node in (0, 1)]
    assert said == [0, 0], logs
    found = chaos.outcome(out)
    assert [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)] == []
    assert re.search(r"^start at step [24] of 12", logs[0], re.M)
    # each tokenised once, train and test, on its own disk, and the second start took it from there
    assert cached(base) == held and len(held[0]) == 2 and held[0].keys() == held[1].keys()


# ---- what must be alike on all of them
# -----------------------------------------------------------------------------------------------------------


def forked(base, name, ranks, work):
    """What `work(rank)` returns on each of so many ranks that are forked from here, or their exit code; what they
    print."""
    port, pids, log = str(chaos.free_port()), [], base / f"{name}.log"
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(own, "w", buffering=1, closefd=False) for own in (1, 2))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= group if ranks > 1 else {}
        try:
            found = work(rank)
        except SystemExit as end:
            found = end.code
        except BaseException:
            found = "failed"
            sys.excepthook(*sys.exc_info())
        (base / f"{name}-{rank}.json").write_text(json.dumps(found))
        os._exit(0)
    assert chaos.end(pids, False), log.read_text()
    return [json.loads((base / f"{name}-{rank}.json").read_text()) for rank in range(ranks)], log.read_text()


def test_what_differs_between_nodes_is_named(base, monkeypatch):
    # red: agree without `gathered`; a key of `told` left out; hosts not told
    changes = {"Python": [(platform, "python_version", lambda: "3.0")], "torch": [(torch, "__version__", "0.1")]}
    changes["transformers"] = [(preflight.metadata, "version", {"transformers": "0.2", "flash-attn": "none"}.get)]
    changes["code"] = [(Path, "read_bytes", lambda path: b"edited")]
    card = [("device_count", lambda: 2), ("get_device_name", lambda index: "H100")]
    changes["devices"] = [(torch.cuda, *change) for change in card]

    def work(rank):
        fsdp.init("cpu")
        preflight.agree()  # who is alike says nothing
        said = {}
        for key, change in changes.items():
            with monkeypatch.context() as there:
                if rank == 2:
                    for one in change:
                        there.setattr(*one)
                    there.setattr(socket, "gethostname", lambda: "node2")
                try:
                    preflight.agree()
                except ValueError as error:
                    said[key] = str(error)
        fsdp.finish()
        return said

    found, log = forked(base, "alike", 3, work)
    here = socket.gethostname()
    assert found[0] == found[1] == found[2], log
    for key, text in found[0].items():
        told = rf"{key} differs between ranks: \S+ on {here} \(rank 0, 1\); .+ on node2 \(rank 2\) \(all must be alike\)"
        assert re.fullmatch(told, text), text
    assert found[0].keys() == changes.keys() and "2 H100 on node2" in found[0]["devices"]
    assert "0.1 on node2" in found[0]["torch"] and platform.python_version() in found[0]["Python"]


def test_nodes_with_other_rows_stop_before_the_model(base):
    # red: agree not called by align.py; rows left out of `told`
    def work(rank):
        folder = base / f"other{rank}"
        folder.mkdir()
        rows = (base / "pairs.jsonl").read_text().splitlines(keepends=True)
        (folder / "pairs.jsonl").write_text("".join(rows[: 40 - rank]))
        os.chdir(folder)
        argv = chaos.command(base, "dpo", base / "never")[1:]
        argv = ["pairs.jsonl" if word == f"{base}/pairs.jsonl" else word for word in argv]
        argv[argv.index("--token-cache") + 1] = "cache"
        align.main(argv)

    found, log = forked(base, "other", 2, work)
    assert found == [2, 2]
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and errors[0] == errors[1]  # torchrun ends rank 1 before it speaks
    assert re.match(r"error: rows differs between ranks: \w{12} \w{12} on \S+ \(rank 0\); \w{12} \w{12} on ", errors[0])
    assert not (base / "never").exists() and "needs about" not in log


@pytest.fixture(scope="module")
def of_one(base):
    return driven(base, 1)


def driven(base, ranks):
    """(rows of the log, gradients before clipping of every step) of a short run."""

    def work(rank):
        import drive  # it replaces parts of fsdp.py, here alone

        argv = chaos.command(base, "ra_dpo1", base / f"ranks{ranks}")[1:]
        argv += ["--steps", "3", "--dtype", "float32", "--save-every", "0"]
        drive.run({"script": "align.py", "argv": argv})

    forked(base, f"ranks{ranks}", ranks, work)
    out = base / f"ranks{ranks}"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, torch.load(out / "gradients.pt")


@pytest.mark.parametrize("ranks", [4, 8])
def test_ranks_change_nothing(base, of_one, ranks):
    """Of 6 pairs a step, so that two of 8 ranks have none. red: the loss divided by the number of a rank's pairs; a
    rank without work whose smallest group counts"""
    rows, gradients = driven(base, ranks)
    assert len(rows) == len(of_one[0]) and len(gradients) == len(of_one[1]) == 3
    for row, wanted in zip(rows, of_one[0]):
        for key, value in wanted.items():
            if isinstance(value, float) and not key.endswith(chaos.CLOCKED):
                assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (row["step"], key)
    for step, wanted in zip(gradients, of_one[1]):
        assert step.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (step[name] - gradient).norm() <= max(1e-5 * gradient.norm(), 1e-7), name
