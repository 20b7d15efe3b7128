"""Reference values computed once, kept on disk, and read in place of a reference model by every later run.

    find     the caches of a run's examples, made where they are not there, and what each of them lacks
    ready    what is missing computed by a live reference, all ranks together -> frozen.Cached

A cache is a directory of flat arrays over the trained tokens of one store (Pack.tokens):

    logps    (n,) float32, the reference's log-probability of each token in nats, NaN where not yet computed
    states   (n, D) in --dtype, its last hidden states, where distributions are wanted: with the reference's
             head, a file beside the caches, they are exact, for the head makes the distribution

Its name is a hash of all that the values depend on: the ids of the rows, the contents of the reference, its
dtype. So nothing stale is read, and runs of other losses, betas and seeds share it. What a killed run has
computed stays; the next one goes on from there. Mismatched answers (kto) have a cache of their own, with
partners in the order of the data instead of the epoch's.

Left out: sharing between machines without a common file system; a reference that changes in training.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import batch
import config
import files
import fsdp
import loading
import lora
import model
import peft_files
import progress
import vocab
from arrays import Store
from frozen import Cached, hidden_states
from objective import LOSSES, Objective

FORMAT = 1  # of the files, and of how values are computed
BLOCK = 2**20  # numbers written at a time
PAUSE = 60.0  # seconds between two writes to the disk
WAIT = 5.0  # seconds between two tries of a lock that another run has
HELD = "another run fills caches of this reference"
# By which a policy may differ from its cached start, nats a token: they went through other batches.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
Reference = model.LanguageModel | lora.Reference | Cached | None
KINDS = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2")}  # numpy has no bfloat16: its bits


class Cache(NamedTuple):
    folder: Path
    store: Store
    size: int  # slots
    width: int  # of a state; 0: log-probabilities alone
    kind: np.dtype  # of a state


class Found(NamedTuple):
    caches: dict[tuple[str, bool], Cache]  # by (split, mismatched)
    lacking: int  # examples without a value
    head: Path  # of the reference
    lock: Any  # of rank 0, held until all is there


def resolve(args: argparse.Namespace) -> None:
    """What goes with --cache-reference; a loss of distributions sets --cache-hidden. Fails in one line, also
    for --offload reference where that is no model of its own."""
    if args.offload == "reference" and lora.shared(args) is not None:
        config.fail("--offload reference: the reference is the policy with other adapters, and takes no room")
    for flag in ("cache_hidden", "cache_reference_only"):
        if getattr(args, flag) and not args.cache_reference:
            config.fail(f"--{flag.replace('_', '-')} true needs --cache-reference DIR")
    if args.cache_reference:
        if args.sync_reference_every:
            config.fail("--cache-reference goes not with --sync-reference-every: what is cached stays")
        args.cache_hidden |= bool({"kl", "risk"} & set(config.positional(LOSSES[args.loss])))


def find(
    args: argparse.Namespace,
    objective: Objective,
    train: Store,
    evaluated: Store | list,
    policy: model.LanguageModel,
    say: Callable[..., None],
) -> Found | None:
    """The caches of the examples, all ranks together; None without --cache-reference. `policy` is the model
    that a run starts from.

    Waits for another run that fills caches of the same reference. Raises ValueError if less than twice of
    what is to be written is free (with --yes: than that), or a rank cannot read what rank 0 has made.
    """
    if not args.cache_reference:
        return None
    root, rank = Path(args.cache_reference), fsdp.ranks()[0]
    told = {"format": FORMAT, "reference": _contents(args), "dtype": args.dtype}
    told["ids"] = len(policy.lm.get_input_embeddings().weight)
    width = policy.head.weight.shape[1] if args.cache_hidden else 0
    caches = {}
    for split, store in (("train", train), ("eval", evaluated)):
        if not store:
            continue
        name = _hash({**told, "rows": store.source, "width": width})
        caches[split, False] = Cache(root / name, store, store.slots, width, KINDS[args.dtype])
        if objective.mismatches:
            others = strangers(store, args.max_length)
            name = _hash({**told, "rows": store.source, "pieces": _pieces(others)})
            size = int(others.arrays.sizes[others.completions].sum())
            caches[split, True] = Cache(root / name, others, size, 0, KINDS[args.dtype])
    lock, failed, lacking = None, "", 0
    head = root / f"{_hash(told)}.head.safetensors"
    try:
        if rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            lock = open(head.with_suffix(".lock"), "a")
    except OSError as error:
        failed = str(error)
    _agree(root, failed)
    _take(root, lock, say)
    try:
        if rank == 0:
            absent = {cache.folder: cache for cache in caches.values() if not cache.folder.exists()}
            _make(list(absent.values()), root, args.yes, say)
    except (OSError, ValueError) as error:
        failed = str(error)
    _agree(root, failed)
    try:
        lacking = sum(len(_missing(cache)) for cache in caches.values())
    except (OSError, ValueError) as error:
        failed = f"rank {rank} cannot read what rank 0 has made, all need the same disk ({error})"
    _agree(root, failed)
    return Found(caches, lacking, head, lock)


def ready(
    found: Found | None,
    live: Reference,
    args: argparse.Namespace,
    device: torch.device,
    say: Callable[..., None],
) -> tuple[Reference, Reference]:
    """What stands for the reference in training and evaluation: itself without caches. `live` computes what
    is missing. Raises ValueError if it gives a number that is not finite, or the disk is full."""
    if found is None:
        return live, live
    root, failed = Path(args.cache_reference), ""
    for (split, mismatched), cache in found.caches.items():
        short = _missing(cache) if found.lacking else np.arange(0)
        what = f"{split}, answers of other prompts" if mismatched else split
        number = len(cache.store)
        say(f"reference values of {what}: {number - len(short)} of {number} examples cached")
        if len(short):
            failed = _fill(cache, short, live, found.head, args, device)
            _agree(root, failed)
            left = _missing(cache)
            if len(left):
                raise ValueError(f"the reference gives numbers that are not finite in {len(left)} examples")
    if live is not None:
        fsdp.reshard(getattr(live, "policy", live))
    if found.lock is not None:
        found.lock.close()
    wide = any(cache.width for cache in found.caches.values())
    head = _read_head(found.head, device) if wide else None  # one, whatever it is read for
    return _cached(found, "train", head), _cached(found, "eval", head)


def strangers(store: Store, max_length: int) -> Store:
    """Every prompt with the answers of the next example of another prompt, in the order of the data."""
    return store.mismatched(batch.partners(store.arrays.prompts, range(len(store))), max_length)


# ---- which
# -----------------------------------------------------------------------------------------------------------


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _contents(args: argparse.Namespace) -> dict[str, Any]:
    """What the reference is, whatever its path."""
    shared = lora.shared(args)
    path = args.model if shared is not None else args.reference or args.model
    if args.weights == "pretrained":
        loading.weight_files(path)  # of a hub name: they must be here to be read
    found = {"model": model.fingerprint(path, args.weights)}
    if args.weights == "random":
        found["seed"] = args.seed
    if shared:
        found["adapter"] = files.fingerprint(Path(args.lora_from) / name for name in peft_files.FILES)
    return found


def _pieces(store: Store) -> list[str]:
    """Which tokens follow which prompts."""
    parts = (store.arrays.first, store.arrays.starts, store.arrays.sizes)
    return [hashlib.sha256(np.ascontiguousarray(part)).hexdigest() for part in parts]


# ---- files
# -----------------------------------------------------------------------------------------------------------


def _make(caches: list[Cache], root: Path, yes: bool, say: Callable[..., None]) -> None:
    """Caches without a value. Raises ValueError if there is not the room."""
    many = [int(cache.store.arrays.sizes[cache.store.completions].sum()) for cache in caches]
    need = sum(4 * c.size + most * c.width * c.kind.itemsize for c, most in zip(caches, many))
    free = shutil.disk_usage(root).free
    if caches:
        say(f"{root}: up to {need / 1e9:.2g} GB of reference values, {free / 1e9:.2g} GB free")
    if need > (free if yes else free / 2):
        what = "the disk has" if yes else "half of what is free, which --yes true allows,"
        raise ValueError(f"up to {need / 1e9:.2g} GB of values, more than {what} ({free / 1e9:.2g} GB free)")
    for cache in caches:
        beside = cache.folder.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        with open(beside / "logps", "wb") as file:
            for begin in range(0, cache.size, BLOCK):
                file.write(np.full(min(BLOCK, cache.size - begin), np.nan, "<f4").tobytes())
            os.fsync(file.fileno())
        with open(beside / "states", "wb") as file:  # of nothing but holes: what is never asked takes no room
            file.truncate(cache.size * cache.width * cache.kind.itemsize)
        os.replace(beside, cache.folder)


def _open(cache: Cache, mode: str = "r") -> tuple[np.ndarray, np.ndarray | None]:
    """(log-probabilities (n,), states (n, D) or None). Raises ValueError for files of another size."""
    logps = np.memmap(cache.folder / "logps", "<f4", mode, shape=(cache.size,))
    if not cache.width:
        return logps, None
    return logps, np.memmap(cache.folder / "states", cache.kind, "r", shape=(cache.size, cache.width))


def _missing(cache: Cache) -> np.ndarray:
    """The examples that lack a value of a trained token: (k,)."""
    logps, found = _open(cache)[0], cache.store.arrays
    if all(np.isfinite(logps[begin : begin + BLOCK]).all() for begin in range(0, cache.size, BLOCK)):
        return np.arange(0)
    lacking = []
    for index in range(len(cache.store)):
        for piece in range(found.first[index] + 1, found.first[index + 1]):
            begin, place = found.starts[piece], found.places[piece]
            number = np.count_nonzero(found.trained[begin : begin + found.sizes[piece]])
            if not np.isfinite(logps[place : place + number]).all():
                lacking.append(index)
                break
    return np.array(lacking, np.int64)


def _take(root: Path, lock: Any, say: Callable[..., None]) -> None:
    """Rank 0 takes its lock. As long as another run has it all ranks meet again and again, for a collective
    that one of them comes to after hours has given up. Raises ValueError where there are no locks."""
    for turn in itertools.count():
        found = fsdp.gathered(_tried(lock))[0]
        if found != HELD:
            break
        if not turn:
            say(f"{root}: {HELD}; waiting for it")
        time.sleep(WAIT)
    _agree(root, found)


def _tried(lock: Any) -> str:
    """An empty string if the lock is taken, or is another rank's; else why not."""
    try:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return HELD
    except OSError as error:
        return str(error)


def _agree(root: Path, failed: str) -> None:
    """Raises ValueError on every rank for what has failed on one."""
    if found := [text for text in fsdp.gathered(failed) if text]:
        raise ValueError(f"--cache-reference {root}: {found[0]}")


def _fill(
    cache: Cache,
    short: np.ndarray,
    live: Reference,
    head: Path,
    args: argparse.Namespace,
    device: torch.device,
) -> str:
    """Compute and write the values of some examples. Rank 0 writes; what fails there is returned."""
    rank, world_size = fsdp.ranks()
    lengths, budget = cache.store.lengths[short], args.tokens_per_microbatch
    many = max(1, int(4 * world_size * budget / lengths.mean()))
    steps = batch.plan(lengths, many, world_size, budget, None)
    waiting, written, failed = [], time.monotonic(), ""
    for step, works in enumerate(progress.bar(steps, "reference", len(steps))):
        for work in works[rank]:
            mine = [work._replace(groups=short[work.groups].tolist())]
            (pack,) = batch.packs(cache.store, mine, "best-worst", device)
            with torch.no_grad():
                states = hidden_states(live, pack)  # (N, D)
                logps = vocab.token_statistics(states, live.head, pack.targets).logps  # (N,)
            kept = _bits(states, cache.kind) if cache.width else None
            if cache.width and rank == 0 and not head.exists():
                _save_head(live.head, head)
            waiting += fsdp.at_rank_zero((pack.tokens, logps.cpu().numpy(), kept))
        if waiting and (time.monotonic() - written > PAUSE or step == len(steps) - 1):
            failed = failed or _write(cache, waiting)
            waiting, written = [], time.monotonic()
    return failed


def _write(cache: Cache, waiting: list[tuple]) -> str:
    """States before log-probabilities, which say that they are there; what went wrong, or an empty string."""
    try:
        # not to the map: a full disk would kill the process
        with open(cache.folder / "states", "r+b", buffering=0) as file:
            for places, _, rows in waiting:
                if rows is not None:
                    borders = np.flatnonzero(np.diff(places) != 1) + 1  # (runs - 1,)
                    for begin, part in zip([0, *borders], np.split(rows, borders)):
                        file.seek(int(places[begin]) * rows[0].nbytes)
                        file.write(part.tobytes())
            os.fsync(file.fileno())
        logps = _open(cache, "r+")[0]
        for places, values, _ in waiting:
            logps[places] = values
        logps.flush()
        return ""
    except OSError as error:
        return f"{cache.folder}: {error.strerror}"


def _bits(states: torch.Tensor, kind: np.dtype) -> np.ndarray:
    rows = states.detach().cpu()
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows.float()).numpy().astype(kind)


def _save_head(head: vocab.Head, path: Path) -> None:
    beside = path.with_suffix(".tmp")
    kept = {"weight": head.weight, "bias": head.bias}
    kept = {name: part.detach().cpu().contiguous() for name, part in kept.items() if part is not None}
    save_file(kept, beside, {"softcap": json.dumps(head.softcap), "scale": json.dumps(head.scale)})
    os.replace(beside, path)


def _read_head(path: Path, device: torch.device) -> vocab.Head:
    with safe_open(path, "pt", str(device)) as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}
        said = {name: json.loads(word) for name, word in file.metadata().items()}
    return vocab.Head(parts["weight"], parts.get("bias"), **said)


def _cached(found: Found, split: str, head: vocab.Head | None) -> Cached | None:
    if (split, False) not in found.caches:
        return None
    logps, states = _open(found.caches[split, False])
    other = found.caches.get((split, True))
    return Cached(logps, states, head, _open(other)[0] if other else None)
