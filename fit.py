"""What the device decides of a run where no flag does: how many tokens a micro-batch has, and what is
recomputed in the backward pass. Neither changes what is trained beyond the order of sums.

    resolve   what it computes in, before anything is read
    settle    put both into the flags of a run, the same on all ranks
    report    --plan, with what would be chosen
    choose    the choice, by memory.py's count

On a CPU TOKENS and "full", whatever its memory: larger micro-batches are no faster there. On a GPU the first
way to recompute, the cheapest in time first, with which ENOUGH tokens fit, and with it the most tokens that
do; where ENOUGH fit with none, the way that takes most. So nothing is recomputed as long as micro-batches are
large enough to keep the GPU busy: what a larger one saves is less than another forward. No micro-batch is
larger than a rank's share of a step. A run that goes on takes what it was begun with if that fits, for sums
in another order are not the same to the bit.
"""

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch

import checkpoint
import config
import estimate
import files
import fsdp
import memory
import precision

TOKENS, MOST = 4096, 65_536  # of a micro-batch
ENOUGH = 8192
TIGHT = 0.98  # of what there is: until estimate.refuse asks again, the libraries of a run take some
DTYPES = ("bfloat16", "float32")
# What is chosen from, the cheapest in time first. "ops" keeps as much as "selective", and Python sees each of
# its operations, 5 ms a block on an H200: more than what it saves in models of 1B and less.
ORDER = ("none", "selective", "full")


class Choice(NamedTuple):
    tokens: int  # --tokens-per-microbatch
    way: str  # --activation-checkpointing


def resolve(args: argparse.Namespace) -> None:
    """What the flags alone decide, in place: --dtype where none says it. Fails in one line."""
    os.environ |= fsdp.allocator_settings(os.environ)  # before the device is asked for anything
    args.dtype = args.dtype or _dtype(args)
    if args.compile and args.activation_checkpointing == "ops":
        config.fail("--activation-checkpointing ops knows no compiled products", right="--compile false")


def _dtype(args: argparse.Namespace) -> str:
    """Of a run that goes on, or is there, its own; else what the device multiplies, and of a plan what GPUs
    do."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        before = files.read_json(Path(args.out) / "args.json").get("dtype") if args.resume else None
        if before in DTYPES:
            return before
    return precision.usual("cuda" if args.plan is not None else args.device)


def settle(
    args: argparse.Namespace, lengths: Any, device: torch.device, ranks: int, objective: Any = None
) -> None:
    """Give the flags that are None their values, in place. Rank 0 chooses, for the smallest memory of all.
    `lengths` are tokens of each group, `objective` that of align.py."""
    if None not in (args.tokens_per_microbatch, args.activation_checkpointing):
        return
    room = TIGHT * estimate.room(args, device) if device.type == "cuda" else None
    said = 0
    if fsdp.ranks()[0] == 0:
        found = choose(args, lengths, ranks, objective, room, _before(args))
        said = found.tokens * len(estimate.WAYS) + estimate.WAYS.index(found.way)
    tokens, index = divmod(fsdp.from_rank_zero(said, device), len(estimate.WAYS))
    vars(args).update(vars(_with(args, Choice(tokens, estimate.WAYS[index]))))


def report(args: argparse.Namespace, say: Callable[..., None], objective: Any = None) -> None:
    """--plan: estimate.report of what would be chosen; raises what that does."""
    lengths, ranks, cuda = planned = _planned(args, objective)
    room = estimate.limit_of(args, cuda) if cuda else None
    chosen = _with(args, choose(args, lengths, ranks, objective, room))
    estimate.report(chosen, say, objective, _with(args, Choice(TOKENS, ORDER[-1])), planned)


def _planned(args: argparse.Namespace, objective: Any) -> tuple[list[int], int, bool]:
    """Of a plan, which reads no data: the longest groups that the flags allow, ranks, whether they are GPUs.
    Raises ValueError for a --replicate that divides no ranks."""
    ranks = args.gpus or int(os.environ.get("WORLD_SIZE", 1))
    fsdp.groups(ranks, args.replicate)
    cuda = args.memory is not None or (args.device != "cpu" and torch.cuda.is_available())
    several = 1 if objective is None or not (objective.pairs or objective.scores) else 2
    prompt = 0 if objective is not None and objective.scores else args.max_prompt_length
    return [several * args.max_length - (several - 1) * prompt] * args.batch_size, ranks, cuda


def choose(
    args: argparse.Namespace,
    lengths: Any,
    ranks: int,
    objective: Any,
    room: float | None,
    before: Choice | None = None,
) -> Choice:
    """Of a rank with `room` bytes on its GPU, None on a CPU. What `args` give stays; `before` is what the run
    that goes on was begun with."""
    least = before or _given(args, Choice(TOKENS, ORDER[-1]))
    if room is None:
        return least
    try:
        whole, other = memory.bodies(args, objective)
    except ValueError:  # it cannot be counted, as estimate.refuse will say
        return least

    def run(tokens: int, way: str) -> memory.Run:
        return memory.run_of(_with(args, Choice(tokens, way)), objective, lengths, ranks, True)

    def fits(tokens: int, way: str) -> bool:
        return sum(memory.need(whole, run(tokens, way), other).values()) <= room

    if before and fits(*before):
        return before
    sizes = [args.tokens_per_microbatch or TOKENS]
    while not args.tokens_per_microbatch and sizes[-1] < run(MOST, ORDER[-1]).tokens and sizes[-1] < MOST:
        sizes.append(2 * sizes[-1])
    ways = [args.activation_checkpointing] if args.activation_checkpointing else ORDER
    most = {way: max((tokens for tokens in sizes if fits(tokens, way)), default=0) for way in ways}
    best = max(ways, key=lambda way: min(most[way], ENOUGH))  # the first of those that are alike
    return Choice(most[best], best) if most[best] else Choice(sizes[0], ways[-1])


def _given(args: argparse.Namespace, choice: Choice) -> Choice:
    """A choice with what the flags give instead of its own."""
    return Choice(args.tokens_per_microbatch or choice.tokens, args.activation_checkpointing or choice.way)


def _with(args: argparse.Namespace, choice: Choice) -> argparse.Namespace:
    """A copy of the flags with a choice where they give nothing."""
    tokens, way = _given(args, choice)
    chosen = {"tokens_per_microbatch": tokens, "activation_checkpointing": way}
    return argparse.Namespace(**vars(args) | chosen)


def _before(args: argparse.Namespace) -> Choice | None:
    """What the checkpoint that --resume names was written with; a damaged one is not this module's matter."""
    for path in checkpoint.complete(args.out) if args.resume else []:
        if args.resume in ("auto", path.name):
            with contextlib.suppress(ValueError, OSError):
                made = checkpoint.read_record(path)["args"]
                tokens, way = made.get("tokens_per_microbatch"), made.get("activation_checkpointing")
                if type(tokens) is int and tokens > 0 and way in estimate.WAYS:
                    return _given(args, Choice(tokens, way))
    return None
