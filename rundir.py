"""The run directory: who may write into it, its status, its metrics log, its progress line."""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import resource
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from torch import nn

import checkpoint
import config
import files
import fsdp
import signals
import staging

MAX_LOG = 2**30  # bytes of metrics.jsonl
LOST = {"rows": 0}  # of this process: lines of it that could not be written


def check_run(args: argparse.Namespace) -> None:
    """Fail before any work if the run directory holds a run and --resume is not given, or a finished run of
    other flags; end with exit code 0 if this very run is finished. One that shall go on for more steps needs
    a checkpoint."""
    out = Path(args.out)
    held = [path.name for pattern in ("step-*", "final") for path in out.glob(pattern)]
    if held and args.resume is None:
        config.fail(f"{out} already holds {held[-1]}", right="pass --resume auto or another --out")
    if "final" not in held:
        # resume says this too, but by then the directory would have been made
        if args.resume not in (None, "auto", *held):
            whole = ", ".join(path.name for path in checkpoint.complete(out)) or "none"
            config.fail(f"no complete checkpoint at {out / args.resume}", right=f"complete: {whole}")
        return
    if not (out / "final" / "config.json").is_file():
        config.fail(f"{out}/final", "is no model, so nobody knows what this run is", "choose another --out")
    changed = _changed_flags(args, out / "args.json")
    if not changed:
        if int(os.environ.get("RANK", 0)) == 0:
            config.tell(f"{out}/final is there: nothing to do")
        sys.exit(0)
    others = [key for key in changed if key not in ("steps", "epochs")]
    key = (others or list(changed))[0]
    flag, (made, now) = f"--{key.replace('_', '-')}", changed[key]
    if others:
        config.fail(
            str(out),
            f"is finished and was made with {flag} {made}, this run has {now}",
            "choose another --out",
        )
    saved = [int(name[5:]) for name in held if re.fullmatch(r"step-\d+", name)]
    if not saved:
        config.fail(
            f"{out} is finished",
            f"{flag} {now} needs a checkpoint to go on from",
            "it was run without --save-every",
        )
    if args.steps is not None and max(saved) >= args.steps:
        config.fail(f"--steps {args.steps}", f"{out} has gone to step {max(saved)}")


def _changed_flags(args: argparse.Namespace, path: Path) -> dict[str, tuple[Any, Any]]:
    """Flags of training that are not those a run was made with: (then, now). What one names is compared by
    what it holds, where that was and is known."""
    try:
        made, held = files.read_json(path), contents(args)
    except (ValueError, OSError) as error:
        config.fail(str(error), right="choose another --out")
    known = {key for key in held if f"{key}_state" in made}
    for key in sorted(known):
        if made[f"{key}_state"] != held[key]:
            said = f"is finished and was made from another --{key.replace('_', '-')} than there is now"
            config.fail(str(path.parent), said, "choose another --out")
    skipped = known.union(config.HOW_FLAGS)
    now = json.loads(json.dumps({key: value for key, value in vars(args).items() if key not in skipped}))
    return {
        key: (made.get(key), value)
        for key, value in now.items()
        if made.get(key) != value and not (key not in made and value in (None, False))
    }


def contents(args: argparse.Namespace) -> dict[str, str]:
    """A hash of what the files hold that flags name, by flag, for directories of models and files of rows: a
    run of the same is the same, wherever they lie. Folders of rows, and what is on a hub, go by their names.
    Raises OSError."""
    found = {}
    for key in ("model", "reference", "lora_from"):
        if (name := getattr(args, key, None)) and Path(name).is_dir():
            kinds = (".json", ".jinja", ".safetensors")
            found[key] = files.fingerprint(path for path in Path(name).iterdir() if path.suffix in kinds)
    if all(Path(name).is_file() for name in args.data):
        found["data"] = " ".join(files.fingerprint([Path(name)]) for name in args.data)
    return found


def take(args: argparse.Namespace, rank: int, device: torch.device, need: int = 0) -> Any:
    """Take the run directory, before anything in it is changed: made, and locked by rank 0 as long as the
    returned file lives; what killed runs left in it is removed. A checkpoint takes `need` bytes.

    Raises ValueError or OSError if it cannot be written, another run holds it, or some ranks do not see what
    rank 0 writes there; before it is made if `room` refuses.
    """
    out = Path(args.out)
    lock, token = None, secrets.randbits(60)
    if rank == 0:
        if need and not out.exists():
            room(args, need)
        out.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(out / ".lock") and not (out / ".lock").is_file():
            raise ValueError(f"{out / '.lock'}: not a file")
        lock = open(out / ".lock", "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: in use by another run (choose another --out)") from None
        checkpoint.remove_leftovers(out)
    if fsdp.ranks()[1] == 1:
        return lock
    token = str(fsdp.from_rank_zero(token, device))
    if rank == 0:
        lock.truncate(0)
        lock.write(token)
        lock.flush()
        os.fsync(lock.fileno())
    fsdp.barrier()
    sees = fsdp.becomes(lambda: (out / ".lock").is_file() and (out / ".lock").read_text() == token)
    if blind := fsdp.ranks_where(not sees, device):
        raise ValueError(f"--out {out}: ranks {blind} do not see what rank 0 writes there; all must share it")
    return lock


def begin(
    args: argparse.Namespace, rank: int, start: int, model: nn.Module, extra: dict[str, Any] | None = None
) -> None:
    """The first words of a run that goes on at `start`: its flags, its log up to there, its status. Says what
    a checkpoint needs. Stops the run if the weights are not finite, or not one checkpoint fits where there
    shall be some."""
    skipped, LOST["rows"] = 0, 0
    if args.save_async:
        fsdp.side_group()  # where ranks cannot meet in it, that shows now
    with config.user_errors():
        check_weights(model, f"step-{start}")
        if rank == 0:
            config.tell(room(args, checkpoint.size(model, extra)))
            held = {f"{key}_state": value for key, value in contents(args).items()}  # no flags: config.py
            flags = {key: value for key, value in vars(args).items() if value is not None} | held
            skipped = rewind_log(args.out, start)
            config.write_json(Path(args.out) / "args.json", flags)
    write_status(args, rank, "running", start, skipped=skipped)
    fsdp.HEALTH["report"] = functools.partial(_report_lost, args)
    fsdp.HEALTH["word"] = signals.heard
    signals.wait()


def room(args: argparse.Namespace, need: int) -> str:
    """What is free on the disk of --out, which need not be there yet, and what one checkpoint needs, in
    bytes. Raises ValueError if not one fits where there shall be some."""
    place = Path(args.out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    said = f"{args.out} has {free / 1e9:.2g} GB free, one checkpoint needs about {need / 1e9:.2g} GB"
    if args.save_every and free < need:
        raise ValueError(said)
    return said


def save(
    args: argparse.Namespace, step: int, model: nn.Module, optimizer: torch.optim.AdamW, made: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """A checkpoint at a step, all ranks together. One that cannot be written costs nothing but itself: a
    warning, and the next interval tries again; returns why, or an empty string. Weights that are not finite
    stop the run before they are saved. With --save-async it is written behind the training: `settle` says
    why, before the next."""
    settle(args)
    with failing(args, fsdp.ranks()[0], step):
        check_weights(model, f"after step {step - 1}")
    problem = checkpoint.save(args.out, step, model, optimizer, made, args.keep_last, extra, args.save_async)
    return "" if args.save_async else _told(args, step, problem)


def settle(args: argparse.Namespace) -> str:
    """Wait for the checkpoint that is being written behind the training, if one is. Why it could not be, or
    an empty string."""
    step, problem = staging.wait()
    return "" if step is None else _told(args, step, problem)


def _told(args: argparse.Namespace, step: int, problem: str) -> str:
    said = f"no checkpoint at step {step}: {problem}" if problem else ""
    if said and fsdp.ranks()[0] == 0:
        config.warn(f"{said}; going on")
    write_status(args, fsdp.ranks()[0], "running", step, said)
    return problem


def leave_if_told(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    made: dict[str, Any],
    extra: dict[str, Any] | None,
    device: torch.device,
    step: int,
) -> None:
    """Where a signal came to any rank: save the step that all have reached, say so, and end the process. Not
    between PPO's steps on one batch, for what phase A froze of it is in no checkpoint. With several ranks one
    that comes after a step's means ends the next step."""
    if step % getattr(args, "ppo_epochs", 1) or not (number := fsdp.agreed(device)):
        return
    rank, why = fsdp.ranks()[0], signal.Signals(number).name
    fsdp.reshard(model)  # an evaluation has gathered some
    problem = (save(args, step, model, optimizer, made, extra) or settle(args)) if step else ""
    write_status(args, rank, "failed" if problem else "saved", step, f"{why}: {problem}" if problem else why)
    if rank == 0:
        config.tell(f"stopped by {why} at step {step}; --resume auto goes on from there")
    fsdp.finish()
    sys.exit(1 if problem else signals.exit_code(number))


def check_weights(model: nn.Module, where: str) -> None:
    """Raises ValueError, on all ranks, if a parameter is not finite on one of them."""
    if bad := fsdp.not_finite(model):
        raise ValueError(f"{where}: weights that are not finite (first: {bad[0].removeprefix('lm.')})")


@contextlib.contextmanager
def failing(args: argparse.Namespace, rank: int, step: int) -> Iterator[None]:
    """A ValueError or OSError within ends the run in one line, which its status tells too."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        settle(args)  # before the run's lock goes with its frame
        write_status(args, rank, "failed", step, said)
        config.fail(said)


def write_status(
    args: argparse.Namespace, rank: int, state: str, step: int, reason: str = "", skipped: int | None = None
) -> None:
    """status.json of the run: running, saved, done or failed, at which optimiser step that was written, why,
    the newest checkpoint, how many steps were skipped (None: as many as it says), and how many rows this
    process could not log. Where the disk is full the old one stays."""
    if rank == 0:
        status = {"state": state, "step": step, "time": time.time()}
        with contextlib.suppress(OSError, ValueError):
            old = files.read_json(Path(args.out) / "status.json")
            skipped = old.get("skipped", 0) if skipped is None else skipped
        told = {"skipped": skipped, "lost_rows": LOST["rows"], "reason": reason}
        status |= {key: value for key, value in told.items() if value}
        saved = checkpoint.complete(args.out)
        status |= {"last_checkpoint": saved[0].name} if saved else {}
        with contextlib.suppress(OSError):
            config.write_json(Path(args.out) / "status.json", status)


def _report_lost(args: argparse.Namespace, reason: str) -> None:
    """Of a run that ends because a rank is lost, by whichever rank is left."""
    with contextlib.suppress(OSError, ValueError):
        path = Path(args.out) / "status.json"
        status = files.read_json(path)
        if status.get("state") == "running":  # else a rank that failed by itself has said why
            config.write_json(path, status | {"state": "failed", "time": time.time(), "reason": reason})


def skips(
    args: argparse.Namespace,
    step: int,
    row: dict[str, Any],
    optimizer: torch.optim.AdamW,
    works: Sequence[Any],
    tallies: Sequence[dict[str, Any]],
    examples: Sequence[Any],
) -> bool:
    """Does a step make no update, for its loss or the norm of a gradient is not finite? The first
    --skip-non-finite such steps of a run make none, on all ranks, and the next one ends it. Either says where
    that began: `works` and `tallies` are the groups and the sums of this rank's micro-batches."""
    numbers = {name: row[name] for name in ("loss", "grad_norm", "value_grad_norm") if name in row}
    if math.isfinite(sum(numbers.values())):
        return False
    rank = fsdp.ranks()[0]
    found = [text for text in fsdp.gathered(_first_not_finite(rank, works, tallies, examples)) if text]
    reason = f"the loss or its gradient is not finite ({'; '.join(found) or 'the gradient alone'})"
    # AdamW counts its updates, so a run that was resumed knows too
    skipped = step + 1 - max((int(state["step"]) for state in optimizer.state.values()), default=0)
    if skipped > args.skip_non_finite:
        settle(args)
        write_status(args, rank, "failed", step, reason)
        config.fail(f"step {step}", reason, "weights left as they were")
    optimizer.zero_grad()
    said = f"step {step} skipped, {skipped} of at most {args.skip_non_finite}: {reason}"
    write_status(args, rank, "running", step, said, skipped)
    if rank == 0:
        config.warn(said)
        numbers |= {"skipped": skipped, "time": time.time()}
        log_row(args.out, {"split": "train", "step": step} | numbers)
    return True


def _first_not_finite(
    rank: int, works: Sequence[Any], tallies: Sequence[dict[str, Any]], examples: Sequence[Any]
) -> str:
    """Of this rank's micro-batches the first one of which a sum is not finite: its examples, and whose number
    that is; an empty string if there is none."""
    for work, sums in zip(works, tallies):
        bad = [name for name, (total, _) in sums.items() if not total.isfinite()]
        if not bad:
            continue
        kinds = {name.split("/")[0] for name in bad}
        told = "logps/chosen" in sums and "logps" not in kinds  # the policy's own numbers are finite
        what = "policy" if not told else "reference" if kinds & {"rewards", "kl", "risk"} else "loss"
        ids = hashlib.sha256(repr([examples[g][:2] for g in work.groups]).encode()).hexdigest()[:12]
        numbers = ", ".join(map(str, work.groups[:8])) + ", ..." * (len(work.groups) > 8)
        return f"{what}, rank {rank}, examples {numbers}, sha256 of their ids {ids}"
    return ""


def log_row(out: str | Path, row: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl; a number that is not finite becomes the string JSON has no number
    for. A line that cannot be written whole is not written at all and costs nothing but itself: the first of
    them a warning, and status.json counts them."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    path, rest = Path(out) / "metrics.jsonl", (json.dumps(plain) + "\n").encode()
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", buffering=0) as file:  # a full disk takes a part of what is written
            while rest:
                rest = rest[file.write(rest) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        LOST["rows"] += 1
        if LOST["rows"] == 1:
            config.warn(f"{path}: a row is lost: {error.strerror or error}; going on, status.json counts")


def write_row(args: argparse.Namespace, rank: int, total: int, row: dict[str, Any]) -> None:
    """Rank 0 logs a row and, every --log-every steps, prints it."""
    if rank == 0:
        row = {**row, "time": time.time(), "mem_gb": peak_memory_gb()}
        log_row(args.out, row)
        if row["split"] == "eval" or row["step"] % args.log_every == 0 or row["step"] == total - 1:
            config.tell(progress(row, total))


def rewind_log(out: str | Path, step: int) -> int:
    """Drop the rows of metrics.jsonl that a run resumed at `step` will write again. How many steps before it
    were skipped."""
    path = Path(out) / "metrics.jsonl"
    if not path.exists():
        return 0
    kept = []
    for line in files.read_text(path, MAX_LOG).splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # one cut by a kill, say
            kept += [line] * (json.loads(line)["step"] < step)
    beside = path.with_name(".metrics.tmp")
    beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)
    return sum("skipped" in json.loads(line) for line in kept)


def progress(row: dict[str, Any], total: int) -> str:
    """The console's one line per step, from a row of metrics.jsonl."""
    parts = [f"{row['split']} step {row['step']}/{total}", f"loss {row['loss']:.4f}"]
    named = {
        "acc": ("rewards/accuracies", "logps/accuracies"), "margin": ("rewards/margins", "logps/margins"),
        "kl": ("kl/chosen",), "risk": ("risk/chosen",),
    }  # fmt: skip
    for label, keys in named.items():
        parts += [f"{label} {row[key]:.4g}" for key in keys if key in row]
    if row["split"] == "train":
        parts.append(f"lr {row['lr']:.2e}")
        parts.append(f"gnorm {row['grad_norm']:.3g}")
        eta = int(row["step_s"] * (total - row["step"] - 1))
        parts.append(f"{row['tok_per_s']:,.0f} tok/s | {row['step_s']:.2f} s/it | mem {row['mem_gb']:.2f}G")
        parts.append(f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}")
    return " | ".join(parts)


def peak_memory_gb() -> float:
    """Peak memory in GB: of the GPU where one is used, else the resident set of the whole process."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
