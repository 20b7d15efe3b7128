"""Checkpoints that are complete or absent: save, resume, prune, and a reader that runs no code.

A checkpoint `step-N` holds every parameter that is trained, AdamW's state, the random state of each rank and
`trainer.json` (step, arguments, a checksum of every file). It is written under another name and renamed when
complete, so a kill at any moment leaves the one before. Its tensors go through torch.distributed.checkpoint,
sharded, so any number of ranks reads it. Loading runs no code: the reader takes only the classes a
tensor-only checkpoint needs.

Left out: object stores, optimisers other than AdamW.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

import config
import files
import fsdp
import metadata
import staging

FORMAT = 1
GROUP = 2**26  # numbers, 0.27 GB in fp32
NONE, REFUSED = -1, -2  # what rank 0 says instead of a step
# What a digest in the record stands for, and how to say that it changed.
DIGESTS = {
    "data": "other rows than --data has",
    "model": "another --model than there is",
    "reference": "another --reference than there is",
    "lora_from": "another --lora-from than there is",
}


def save(
    out: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    args: dict[str, Any],
    keep_last: int,
    extra: dict[str, Any] | None = None,
    behind: bool = False,
) -> str:
    """Write out/step-N, all ranks together, then prune to the newest `keep_last`. A complete step-N is left
    alone, an incomplete one put aside. `extra` are further tensors by name (or dicts of them) that change
    during training.

    Returns, on all ranks, why it could not be written, else an empty string. Then nothing of it is left, and
    the checkpoints before it are as they were. With `behind` it returns as soon as the state is copied, and
    staging.wait says why.
    """
    staging.wait()
    target, device = Path(out) / f"step-{step}", fsdp.meeting(next(model.parameters()))
    leads = fsdp.ranks()[0] == 0
    if fsdp.from_rank_zero(int(leads and _is_complete(target)), device):
        return ""
    state = _state(model, optimizer) | (extra or {})
    about = {"step": step, "args": args, "world_size": fsdp.ranks()[1]}
    if not behind:
        return _save(state, target, about, keep_last, (device, None))
    where = torch.device("cpu"), fsdp.side_group()
    staging.start(step, functools.partial(_save, staging.copied(state), target, about, keep_last, where))
    return ""


def _save(state: dict[str, Any], target: Path, about: dict[str, Any], keep_last: int, where: tuple) -> str:
    """`save`, of a state, whose collectives are of tensors on a device, in a group (None: the usual one)."""
    beside, leads = target.with_name(f".tmp-{target.name}"), fsdp.ranks()[0] == 0
    mine, sums = {}, {}

    def begin() -> None:
        if leads:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

    def write() -> None:
        dcp.save(state, checkpoint_id=str(beside), process_group=where[1])
        # each rank reads its own file again, for rank 0 would take minutes over all of a large model's
        own = sorted(beside.glob(f"__{fsdp.ranks()[0]}_*")) + [beside / ".metadata"] * leads
        mine.update({path.name: [path.stat().st_size, _checksum(path)] for path in own})

    def publish() -> None:
        if leads:
            _publish(beside, target, about | {"files": sums})
            _prune(target.parent, keep_last)

    problem = _tried(begin, *where) or _tried(write, *where)
    if not problem:
        for said in fsdp.gathered(json.dumps(mine), where[1]):
            sums |= json.loads(said)
        problem = _tried(publish, *where)
    if problem:
        shutil.rmtree(beside, ignore_errors=True)  # on every rank: --out may be on a disk of its own
    fsdp.barrier(where[1])
    return problem


def _tried(work: Callable[[], None], *where: Any) -> str:
    """Do this rank's part of a save. Why some rank could not do its own, on all ranks, or an empty string."""
    problem = ""
    try:
        work()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    except CheckpointException as error:  # a BaseException, on all ranks where one fails
        rank, (cause, _) = next(iter(error.failures.items()))
        problem = f"rank {rank}: {str(cause).strip().splitlines()[0]}"
    failed = fsdp.ranks_where(bool(problem), *where)
    return (problem or f"rank {failed[0]} could not") if failed else ""


def _publish(beside: Path, target: Path, about: dict[str, Any]) -> None:
    """Give a written checkpoint its record and its name. Raises ValueError if files of it are not here: a
    rank wrote them to a disk of its own."""
    named = {info.relative_path for info in metadata.read(beside).storage_data.values()}
    missing = [name for name in sorted(named) if not fsdp.becomes((beside / name).exists)]
    if missing:
        raise ValueError(f"{missing[0]} is not there: is {target.parent} a disk that all nodes share?")
    record = {"format": FORMAT, **about}
    with open(beside / "trainer.json", "w", encoding="utf-8") as file:
        json.dump(record | {"checksum": _record_checksum(record)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        aside = _put_aside(target)
        config.warn(f"{target} is incomplete; it is {aside.name} now, and {target.name} is written again")
    os.replace(beside, target)


def _prune(out: Path, keep_last: int) -> None:
    """Keep the newest. Renamed before it is removed: a kill leaves no half of a checkpoint under its name."""
    for old in complete(out)[keep_last:]:
        with contextlib.suppress(OSError):
            os.replace(old, out / f".removed-{old.name}")
        shutil.rmtree(out / f".removed-{old.name}", ignore_errors=True)


def remove_leftovers(out: str | Path) -> None:
    """What saves, prunes and exports that were killed have left in a run directory that nobody else uses."""
    staging.wait()  # this process may
    for pattern in (".tmp-*", ".removed-*"):
        for path in Path(out).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def size(model: nn.Module, extra: dict[str, Any] | None = None) -> int:
    """Bytes of a checkpoint, all ranks together: what is trained, AdamW's two moments, and what `extra`
    holds."""
    parameters = [p for p in model.parameters() if p.requires_grad for _ in "pmv"]
    for value in (extra or {}).values():
        parameters += value.values() if isinstance(value, dict) else [value]
    return sum(value.numel() * value.element_size() for value in parameters)


def complete(out: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first. A directory counts once it was renamed into place with its
    record."""
    found = [path for path in _steps(Path(out)) if _is_complete(path)]
    return sorted(found, key=_number, reverse=True)


def _steps(out: Path) -> list[Path]:
    return [path for path in out.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_complete(path: Path) -> bool:
    return (path / ".metadata").exists() and (path / "trainer.json").exists()


def _put_aside(path: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one; its new path."""
    names = (f".aside-{path.name}{mark}" for mark in ("", *(f"-{k}" for k in range(2, 1000))))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.replace(path, aside)
    return aside


def resume(
    out: str | Path,
    choice: str | None,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    args: dict[str, Any],
    free: Sequence[str],
    device: torch.device,
    extra: dict[str, Any] | None = None,
    total: int | None = None,
) -> int:
    """Load what `--resume` names into model, optimizer and the `extra` of `save`, sharded as they are now,
    and return its step.

    `choice` None starts at 0; "auto" takes the newest whole checkpoint, or starts at 0 where there is none;
    "step-N" must be whole, and newer ones, of the course that is left, are put aside. Rank 0 chooses. Raises
    ValueError on all ranks if there is none, a rank sees another one, it is beyond the `total` steps of this
    run, or was made with other flags than `args`, those in `free` excepted. What `args` has a digest of is
    compared by that and not by its path.
    """
    path = _find(Path(out), choice, device) if choice else None
    if path is None:
        return 0
    record = read_record(path)
    if total is not None and record["step"] > total:
        raise ValueError(f"--steps {total}: {path} is beyond that; choose another --out")
    _compare(path, record["args"], args, free)
    state = _state(model, optimizer) | (extra or {})
    same = record["world_size"] == fsdp.ranks()[1]
    held = metadata.read(path).state_dict_metadata
    # of other ranks' random numbers none; a run on a CPU has none of a GPU's
    asked = (k for k in state if not k.startswith("rng_") or (same and (k in held or "cuda" not in k)))
    state = {key: state[key] for key in asked}
    _read(path, state)
    for name, value in state.items():
        if name.startswith("rng_"):
            torch.cuda.set_rng_state(value) if name.endswith("_cuda") else torch.set_rng_state(value)
    if choice != "auto" and fsdp.ranks()[0] == 0:
        for newer in sorted((p for p in _steps(Path(out)) if _number(p) > record["step"]), key=_number):
            aside = _put_aside(newer).name
            config.warn(f"{newer} is newer than {choice}, which was asked for; it is {aside} now")
    return record["step"]


def _compare(path: Path, made: dict[str, Any], now: dict[str, Any], free: Sequence[str]) -> None:
    """Raises ValueError unless a checkpoint was made with the flags, data and models of this run."""
    digested = {key for key in DIGESTS if f"{key}_digest" in made and f"{key}_digest" in now}
    skipped = {*free, *digested, *(f"{key}_digest" for key in DIGESTS)}
    new = {key for key in now if key not in made and not now[key]}  # flags of a later version, not in use
    both = {key: (made.get(key), now.get(key)) for key in sorted((set(made) | set(now)) - skipped - new)}
    changed = [key for key, (then, wanted) in both.items() if then != wanted]
    # first what both have: another --loss says more than the parameters that one of the two has not
    for key in sorted(changed, key=lambda key: None in both[key]):
        flag, (then, wanted) = f"--{key.replace('_', '-')}", both[key]
        raise ValueError(f"{path} was made with {flag} {then}, this run has {flag} {wanted}")
    # after the flags, on some of which they depend
    for key, what in DIGESTS.items():
        if key in digested and made[f"{key}_digest"] != now[f"{key}_digest"]:
            raise ValueError(f"{path} was made from {what} now; choose another --out")


def _read(path: Path, state: dict[str, Any], **options: Any) -> None:
    """Fill a state from a checkpoint. Raises ValueError for anything but tensors of its names and shapes."""
    metadata.read(path)  # by itself first: within dcp.load its refusal would be wrapped
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it was meant
            dcp.load(state, storage_reader=metadata.SafeReader(str(path)), **options)
    except CheckpointException as error:  # a BaseException
        cause = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise ValueError(f"{path}: does not fit this model: {cause}") from error


def outline(path: Path) -> dict[str, Tensor]:
    """The parameters of a whole checkpoint, by name, without memory. Raises ValueError if it is not whole."""
    if path.name not in [found.name for found in complete(path.parent)]:
        raise ValueError(f"{path}: no complete checkpoint")
    if problem := _damage(path):
        raise ValueError(f"{path}: {problem}")
    saved = metadata.read(path).state_dict_metadata
    shapes = {name.removeprefix("model."): it.size for name, it in saved.items() if name.startswith("model.")}
    with metadata.unreadable(path):
        numbers, room = sum(map(math.prod, shapes.values())), sum(f.stat().st_size for f in path.iterdir())
        if numbers > room:  # memory would be taken for them
            raise ValueError(f"{path}: its metadata has {numbers} numbers, its files {room} bytes")
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read(path: Path, named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The parameters that `outline` has named, one after another, in one process. As many are in memory as
    hold GROUP numbers, and one more. Raises ValueError if they cannot be read."""
    group, last = {}, next(reversed(named), None)
    for name, value in named.items():
        group[name] = torch.empty(value.shape)
        if name == last or sum(part.numel() for part in group.values()) >= GROUP:
            _read(path, {"model": group}, no_dist=True)
            yield from group.items()
            group = {}


def _find(out: Path, choice: str, device: torch.device) -> Path | None:
    """The checkpoint to resume from: rank 0 chooses, every rank must see that very one and reads a share of
    its files; with "auto" one that is damaged for any of them is passed over."""
    rank, world_size = fsdp.ranks()
    damage = ""
    while True:
        step, problem = NONE, ""
        if rank == 0:
            try:
                step = _choose(out, choice, damage)
            except (ValueError, OSError) as error:
                step, problem = REFUSED, str(error)
        step = fsdp.from_rank_zero(step, device)
        if step == REFUSED:
            raise ValueError(problem or f"{out}: refused by rank 0")
        if step == NONE:
            return None
        path = out / f"step-{step}"
        seen = _checksum(path / "trainer.json") if fsdp.becomes((path / "trainer.json").exists) else -1
        others = fsdp.ranks_where(seen != fsdp.from_rank_zero(seen, device), device)
        if others:
            raise ValueError(f"{path}: rank 0 goes on from it, and ranks {others} do not see it there")
        problem = ""
        try:
            problem, unread = _damage(path, rank, world_size), ""
        except OSError as error:  # of a disk, and no reason to put a checkpoint aside
            unread = f"{error.filename or path}: {error.strerror or error}"
        said = [json.loads(text) for text in fsdp.gathered(json.dumps([problem, unread]))]
        for _, unread in said:
            if unread:
                raise ValueError(unread)
        damage = next((problem for problem, _ in said if problem), "")
        if not damage:
            return path


def _choose(out: Path, choice: str, damage: str) -> int:
    """The step to resume from, of those that a rank has not found damaged, which it said of the last one.
    With "auto" that one, and one without a record, is put aside, so that the step can be written again.
    Raises ValueError if a named one is not whole."""
    candidates = complete(out)
    if choice != "auto":
        names = ", ".join(path.name for path in candidates) or "none"
        candidates = [path for path in candidates if path.name == choice]
        if not candidates:
            raise ValueError(f"no complete checkpoint at {out / choice} (complete: {names})")
    for path in candidates:
        problem, damage = damage, ""
        try:
            read_record(path)
        except ValueError as error:
            problem = f"trainer.json: {error}"
        if not problem:
            return _number(path)
        if choice != "auto" or "this program reads" in problem:
            raise ValueError(f"{path}: {problem}")
        config.warn(f"{path}: {problem}; passed over, it is {_put_aside(path).name} now")
    return NONE


def read_record(path: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. Raises ValueError if it is not one, or of a newer format."""
    record = files.read_json(path / "trainer.json")
    kinds = {"format": int, "step": int, "world_size": int, "args": dict, "files": dict}
    wrong = [key for key, kind in kinds.items() if type(record.get(key)) is not kind]
    if wrong:
        raise ValueError(f'not a checkpoint\'s record: "{wrong[0]}" is missing or of a wrong type')
    if record["format"] > FORMAT:
        raise ValueError(f"format {record['format']}, this program reads <= {FORMAT}")
    if record["step"] != _number(path):
        raise ValueError(f"the record of step {record['step']}")
    for name, entry in record["files"].items():  # of this directory, and nothing outside it
        if name != Path(name).name or not isinstance(entry, list) or list(map(type, entry)) != [int, int]:
            raise ValueError(f"not a checkpoint's record: file {name[:80]!r}")
    if record.get("checksum", expected := _record_checksum(record)) != expected:  # older ones have none
        raise ValueError("it has changed since it was written")
    return record


def _record_checksum(record: dict[str, Any]) -> int:
    """Of all else that a record holds."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Tensors only, of what is trained. AdamW's state is made here where no step has been taken, as its
    first step would make it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    moments = {}
    for name, parameter in trained.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # fused, it is where they are
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        moments |= {f"{name}.{key}": value for key, value in state.items()}
    rank = fsdp.ranks()[0]
    random = {f"rng_{rank}": torch.get_rng_state()}
    if fsdp.meeting(next(model.parameters())).type == "cuda":
        random[f"rng_{rank}_cuda"] = torch.cuda.get_rng_state()
    return {"model": trained, "optim": moments, **random}


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _damage(path: Path, rank: int = 0, world_size: int = 1) -> str:
    """What is wrong with the files of a checkpoint that a rank verifies, or an empty string: with as many
    ranks as wrote it, those that it wrote itself."""
    try:
        named = read_record(path)["files"]
    except ValueError as error:
        return f"trainer.json: {error}"
    for name, (size, checksum) in named.items():
        writer = re.match(r"__(\d+)_", name)
        if int(writer[1] if writer else 0) % world_size != rank:
            continue
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _checksum(file) != checksum:
            return f"{name} has changed since it was written"
    return ""
