"""The rows of metrics.jsonl in tensorboard, wandb or trackio, by processes that training never waits for.

    check    a missing package is an error before anything is loaded
    start    one process a tracker, beside rank 0; it ends with the run

    python trackers.py TRACKER RUN OFFSET STEP      what that process is; not for people

The process reads metrics.jsonl as it grows and hands each row on: numbers only, "train/loss", "eval/loss",
the step as the x axis. So no library of a tracker is ever loaded into training, and one that raises, hangs or
has no network costs one warning line; metrics.jsonl has every row anyway. It knows of the run's end, however
that came about, by the end of its stdin, and is gone GRACE seconds later at the latest.

A run that is resumed goes on under the id that its directory keeps. Rows that are written again are logged
again: tensorboard hides the old ones, in wandb they are points of the same step.
"""

import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

GRACE = 8.0  # seconds that a tracker has for what it has not sent when the run ends
PAUSE = 0.5  # seconds between two looks at metrics.jsonl


class Tracker(NamedTuple):
    """How a process hands rows on."""

    log: Callable[[dict[str, float], int, float], Any]  # numbers by key, step, seconds since 1970
    flush: Callable[[], Any]
    finish: Callable[[], Any]


# ---- on the side of training
# ---------------------------------------------------------------------------------------------------------


def check(names: Sequence[str] | None) -> None:
    """Raises ValueError for a tracker whose package is not installed."""
    for name in names or ():
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as wandb leaves behind, is none
            raise ValueError(f"--log-to {name}: the package is missing (pip install {name})")


def start(args: argparse.Namespace, rank: int, step: int) -> None:
    """On rank 0 a process for each of --log-to, for the rows that follow from `step` on."""
    if rank != 0 or not args.log_to:
        return
    out = Path(args.out)
    kept, log = out / "run_id", out / "metrics.jsonl"
    try:
        if step == 0 or not kept.exists():
            kept.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    except OSError as error:
        return _warn(" ".join(args.log_to), f"{kept}: {error.strerror or error}")
    offset = log.stat().st_size if log.exists() else 0
    started = {}
    for name in dict.fromkeys(args.log_to):
        command = [sys.executable, __file__, name, str(out), str(offset), str(step)]
        # stdout is the run's; its own session, for Ctrl-C is for the run
        started[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, start_new_session=True)
    atexit.register(_end, started)


def _end(started: dict[str, subprocess.Popen]) -> None:
    for process in started.values():
        process.stdin.close()
    until = time.monotonic() + GRACE + 1
    for name, process in started.items():
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:  # stopped, or in a library that holds the interpreter's lock
            process.kill()
            _warn(name, f"killed {GRACE + 1:g} s after the end of the run")


def _warn(name: str, what: str) -> None:
    said = f"warning: --log-to {name}: {' '.join(what.split())}; metrics.jsonl has every row"
    with contextlib.suppress(OSError):  # stderr may go to a disk that is full
        print(f"{said}\n", end="", file=sys.stderr)  # in one write: others speak at the same moment


# ---- on the side of the tracker
# ---------------------------------------------------------------------------------------------------------


def _tensorboard(out: Path, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step)

    def log(values: dict[str, float], step: int, seconds: float) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step, seconds)

    return Tracker(log, writer.flush, writer.close)


def _wandb(out: Path, step: int) -> Tracker:
    import wandb

    settings = {"name": out.name, "id": _id(out), "resume": "allow", "dir": str(out), "config": _flags(out)}
    wandb.init(project=_project(out, "WANDB_PROJECT"), **settings)
    # not wandb's own count of steps, which lets none come twice
    wandb.define_metric("*", step_metric="step")
    return Tracker(lambda values, step, _: wandb.log({**values, "step": step}), lambda: None, wandb.finish)


def _trackio(out: Path, step: int) -> Tracker:
    import trackio

    settings = {"name": f"{out.name}-{_id(out)}", "resume": "allow", "config": _flags(out)}
    trackio.init(project=_project(out, "TRACKIO_PROJECT"), **settings)
    return Tracker(lambda values, step, _: trackio.log(values, step=step), lambda: None, trackio.finish)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def _id(out: Path) -> str:
    return (out / "run_id").read_text(encoding="utf-8").strip()


def _flags(out: Path) -> dict[str, Any]:
    return json.loads((out / "args.json").read_text(encoding="utf-8"))


def _project(out: Path, variable: str) -> str:
    """What the environment says, else the folder that the run directory lies in."""
    return os.environ.get(variable) or out.parent.name or "runs"


def _rows(path: Path, offset: int, ended: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """What is new in metrics.jsonl, look by look, until the run has ended; a line is read when it is
    whole."""
    while True:
        last = ended.wait(PAUSE)
        if path.exists():
            with open(path, "rb") as file:
                file.seek(offset)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                offset += len(whole) + 1
                yield [json.loads(line) for line in whole.splitlines()]
        if last:
            return


def _follow(name: str, out: Path, offset: int, step: int, ended: threading.Event) -> None:
    tracker = TRACKERS[name](out, step)
    for rows in _rows(out / "metrics.jsonl", offset, ended):
        for row in rows:
            numbers = {k: v for k, v in row.items() if type(v) in (int, float) and k != "step"}
            tracker.log({f"{row['split']}/{key}": v for key, v in numbers.items()}, row["step"], row["time"])
        tracker.flush()
    tracker.finish()


def _watch(name: str, ended: threading.Event) -> None:
    """Wait for the end of stdin, which is that of the run; then end this process too, whatever it does."""
    while os.read(0, 4096):
        pass
    ended.set()
    time.sleep(GRACE)
    _warn(name, f"not done {GRACE:g} s after the end of the run")
    os._exit(1)


def child() -> None:
    """The process of one tracker: its name, the run directory, where in the file to begin, the first step."""
    name, out, offset, step = sys.argv[1:]
    ended = threading.Event()
    threading.Thread(target=_watch, args=(name, ended), daemon=True).start()
    try:
        _follow(name, Path(out).resolve(), int(offset), int(step), ended)
    except (Exception, SystemExit) as error:  # a library's, of any kind
        _warn(name, f"stopped by {type(error).__name__}: {error}")
    sys.stdout.flush()
    os._exit(0)  # past the threads and the exit handlers that the library may have left


if __name__ == "__main__":
    child()
