"""What is said of what a run takes: the plan before it, and the line at its start.

    python align.py ... --plan             of one run, and end; a config.json is enough, no data are read
    python align.py ... --plan 0.3 --gpus 8 --memory 80      on 8 GPUs of 80 GB, at 30 % of their peak rate
    python bench/how_big.py                how big can one go: a table

    report    --plan, of flags that fit.py has completed: memory of a rank, tokens, FLOPs, time, disk, GPUs
    refuse    the start of a run: what it needs in one line, and none that cannot fit
    room      what a rank may take

The numbers are memory.py's.
"""

import argparse
import contextlib
import math
import os
from pathlib import Path, PurePosixPath
from typing import Any, Callable

import torch

import config
import fsdp
import lora
from memory import (
    ADAPTERS, CARDS, MOST_RANKS, SPARE, Body, Run, balance, bodies, fewest, flops, holes, need, numbers,
    run_of,
)  # fmt: skip

# Beside the tensors, of a process on a CPU: the tokenizer, code that is loaded late, compiled products and
# stacks; and the holes of its heap, twice where glibc keeps small blocks for each thread (fsdp.py). Measured
# by bench/peak.py.
RUNTIME = 0.07e9
WAYS = ("none", "ops", "selective", "full")  # --activation-checkpointing
SHARE = 0.5  # of the tokens that are trained, where no data say it
ROW_BYTES = 5  # of a token in --token-cache: its id and whether it is trained


def add_flags(made: argparse.ArgumentParser) -> None:
    """The flags of a plan, for a training script."""
    group = made.add_argument_group("plan")
    add = group.add_argument
    # fmt: off
    plan = "say what a run would need, and end; the rate is that of the GPUs' peak which time is counted at"
    add("--plan", type=config.positive, nargs="?", const=0.4, default=None, metavar="RATE", help=plan)
    add("--plan-examples", type=config.count, default=None, help="what --batch-size counts, of all the data")
    add("--gpus", type=config.count, default=None, help="of a plan; None: as many as ranks")
    add("--memory", type=config.positive, default=None, help="GB that a rank has; None: of this machine")
    yes = "start what cannot fit into memory or on a disk"
    add("--yes", type=config.boolean, nargs="?", const=True, default=False, metavar="true|false", help=yes)
    # fmt: on


def report(
    args: argparse.Namespace, say: Callable, objective: Any, least: argparse.Namespace, planned: tuple
) -> None:
    """--plan: say what a run of these flags would take; no data are read. `objective` None: sft.py; `least`
    are the flags with which it takes the least; `planned` are tokens of each group, ranks, and whether those
    are GPUs. Raises ValueError for a model directory without a configuration."""
    whole, other = bodies(args, objective)
    lengths, ranks, cuda = planned
    run = run_of(args, objective, lengths, ranks, cuda)
    total, trained = numbers(whole.weights), numbers([w for w in whole.weights if w.trained])
    say(f"{args.model}: {total:,} parameters, {trained:,} of them trained; {len(whole.blocks)} blocks, "
        f"width {whole.head[1]}, {whole.head[0]} ids")  # fmt: skip
    parts = _parts(whole, run, other)
    say(f"memory of a rank, {ranks} in all: {_gb(parts)} = " + _listed(parts))
    say(f"shards: {balance(whole, run.ranks):.3f} times an equal share of the weights")
    tokens = sum(lengths)
    work = flops(whole, run, tokens, SHARE * tokens, args.max_length / 2)
    steps, groups = _extent(args)
    more = "its steps: with --plan-examples N" if steps is None else f"{steps} steps, {steps * work:.3g} FLOP"
    say(f"a step: up to {tokens} tokens in {run.microbatches} micro-batches a rank, {work:.3g} FLOP; {more}")
    ways = (f"{way} {_gb(_parts(whole, run._replace(checkpointing=way), other))}" for way in WAYS)
    say("by --activation-checkpointing: " + ", ".join(ways))
    say(f"with {_chosen(args)}")
    disk = f"disk: a checkpoint {12 * trained / 1e9:.3g} GB, final/ up to {4 * total / 1e9:.3g} GB"
    if groups is not None:
        rows = groups * tokens / len(lengths)
        disk += f", rows in --token-cache about {rows * ROW_BYTES / 1e9:.2g} GB"
    if groups is not None and run.reference in ("cached", "hidden"):
        each = 4 + run.size * (other or whole).head[1] * (run.reference == "hidden")  # a trained token's
        disk += f", --cache-reference about {SHARE * rows * each / 1e9:.2g} GB"
    say(disk)
    alone = run_of(least, objective, lengths, 1, True)
    for size, (card, rate) in CARDS.items():
        least = fewest(whole, alone, size, other)
        if least is None:
            say(f"{card}, {size} GB: not on {MOST_RANKS}")
            continue
        least *= args.replicate
        seconds = work / (args.plan * rate * 1e12 * least)
        time = f"{seconds:.3g} s a step" + (f", {steps * seconds / 3600:.3g} h" if steps else "")
        say(f"{card}, {size} GB: {least} at least, {time} at {args.plan:.0%} of {rate} TFLOP/s (computed)")
    limit = limit_of(args, cuda)
    if sum(parts.values()) > limit:
        say(f"does not fit into {limit / 1e9:.3g} GB: {_advice(args, objective, lengths, run, limit)}")


def _extent(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """(optimiser steps, groups of the data), each None where the flags do not say it. Of --steps alone: the
    groups that so many steps see at most."""
    updates, groups, steps = getattr(args, "ppo_epochs", 1), args.plan_examples, args.steps
    if steps is None and groups is not None:
        steps = args.epochs * math.ceil(groups / args.batch_size) * updates
    if groups is None and steps is not None:
        groups = math.ceil(steps / updates) * args.batch_size
    return steps, groups


def refuse(
    args: argparse.Namespace, lengths: Any, device: torch.device, ranks: int, say: Callable, objective: Any
) -> None:  # fmt: skip
    """Say what a rank of a run needs; `lengths` are tokens of each group. Raises ValueError for one that
    cannot fit into its memory, unless --yes."""
    try:
        whole, other = bodies(args, objective)
    except ValueError as error:  # an operation that needs numbers: the model may train all the same
        return say(f"what it needs cannot be counted ({error})")
    run = run_of(args, objective, lengths, ranks, device.type == "cuda")
    parts, limit = _parts(whole, run, other), room(args, device)
    say(f"needs about {_gb(parts)} a rank of {limit / 1e9:.3g} with {_chosen(args)}: {_listed(parts)}")
    if sum(parts.values()) > limit and not args.yes:
        advice = _advice(args, objective, lengths, run, limit)
        raise ValueError(f"needs {_gb(parts)} a rank, there are {limit / 1e9:.3g} ({advice}; or --yes true)")


def _parts(body: Body, run: Run, other: Body | None) -> dict[str, float]:
    """What a rank needs of its GPU's memory, or of the machine's."""
    parts = need(body, run, other)
    gaps = holes(body, run) * (1 if fsdp.NO_THREAD_CACHE in os.environ.get("GLIBC_TUNABLES", "") else 2)
    return parts | ({} if run.cuda else {"runtime": RUNTIME + gaps})


def limit_of(args: argparse.Namespace, cuda: bool) -> float:
    """Bytes that a rank may take: of a GPU what others leave (a plan: all) less SPARE; of a host its part."""
    if args.memory is not None:
        return args.memory * 1e9 * (1 - SPARE)
    if cuda:
        free, total = torch.cuda.mem_get_info()
        return (total if args.plan is not None else free + torch.cuda.memory_reserved()) * (1 - SPARE)
    return host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that all processes here may take: those of the machine, or the least of what the control groups
    of this process, v2 or v1, allow, as of a container or a job. `root` holds proc and sys."""
    found, groups = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")], root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):  # no Linux
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kind, path = line.split(":", 2)
            if kind not in ("", "memory"):
                continue
            base, name = (groups / kind, "memory.limit_in_bytes") if kind else (groups, "memory.max")
            own = PurePosixPath(path.lstrip("/"))  # a container may see it alone, as the base
            for place in (own, *own.parents):
                with contextlib.suppress(OSError, ValueError):  # "max"
                    found.append(int((base / place / name).read_text(encoding="utf-8")))
    return min(found)


def room(args: argparse.Namespace, device: torch.device) -> float:
    """The least that a rank of a run may take, the same on all: none refuses alone, while others go on."""
    return -fsdp.largest(-int(limit_of(args, device.type == "cuda")), device)


def _advice(args: argparse.Namespace, objective: Any, lengths: Any, run: Run, limit: float) -> str:
    """What makes a run fit, the cheapest in time first: one change after another until it does."""
    whole, other = bodies(args, objective)
    ranks, said = run.ranks * args.replicate, []
    more = [{"gpus": 2**k} for k in range(MOST_RANKS.bit_length()) if 2**k > ranks]
    steps = [{"tokens_per_microbatch": args.max_length}, {"activation_checkpointing": "full"}]
    for change in [*steps, *[ADAPTERS] * (not lora.wanted(args)), *more]:
        key, value = next(iter(change.items()))
        if getattr(args, key) == value:
            continue
        args = argparse.Namespace(**vars(args) | change)
        said = [word for word in said if not word.startswith("--gpus")]
        said.append(f"--{key.replace('_', '-')} {value}")
        if change is ADAPTERS:
            whole, other = bodies(args, objective)
        run = run_of(args, objective, lengths, args.gpus or ranks, run.cuda)
        if sum(_parts(whole, run, other).values()) <= limit:
            return "fits with " + " ".join(said)
    return "fits with nothing known here"


def _chosen(args: argparse.Namespace) -> str:
    flags = ("tokens_per_microbatch", "activation_checkpointing")
    return " ".join(f"--{key.replace('_', '-')} {getattr(args, key)}" for key in flags)


def _gb(parts: dict[str, float]) -> str:
    return f"{sum(parts.values()) / 1e9:.2f} GB"


def _listed(parts: dict[str, float]) -> str:
    return " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
