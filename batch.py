"""From encoded examples to packed batches, and the plan that says who trains on what. Index arithmetic alone.

    pack           Encoded, ... -> Pack (one row of ids without padding, and the indices the head and losses
    need)
    partners       whose answers an example's prompt gets, for KTO's estimate of the KL
    packs          the micro-batches of a rank
    plan           lengths -> every optimiser step's groups, rank by rank, micro-batch by micro-batch

Left out: groups split over micro-batches or ranks.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

import attention
import ranking
from arrays import Rows, Store
from encode import Encoded


class Pack(NamedTuple):
    """Groups end to end in one row of T tokens: R responses, N trained tokens, B pairs."""

    ids: Tensor  # (1, T)
    positions: Tensor  # (1, T) restart at 0 with every group and at the prompt's length with every completion
    groups: list[tuple[int, list[int]]]  # (prompt length, completion lengths)
    predict: Tensor  # (N,) index into T of the state that predicts each trained token
    targets: Tensor  # (N,) its token id
    response: Tensor  # (N,) its response
    tokens: np.ndarray | None  # (N,) its place among the trained tokens of a store, if the groups are of one
    ends: Tensor  # (R,) index into T of each response's last token
    scores: Tensor  # (R,)
    desirable: Tensor  # (R,) bool
    group: Tensor  # (R,) its prompt
    pairs: Tensor  # (2, B) responses of each pair, the better first
    margins: Tensor  # (B,)
    weights: Tensor  # (R,) of each response in the loss; 0 for a filler
    counted: bool  # False for a filler, whose statistics are not the batch's
    layout: attention.Layout

    @property
    def pair_weights(self) -> Tensor:  # (B,)
        return self.weights[self.pairs[0]]

    def to(self, device: torch.device | str) -> "Pack":
        """All of it on a device, by one copy."""
        if self.ids.device == torch.device(device):
            return self
        there = iter(copied([part for part in (*self, *self.layout) if isinstance(part, Tensor)], device))
        parts = [next(there) if isinstance(part, Tensor) else part for part in self]
        segments = [next(there) if isinstance(part, Tensor) else part for part in self.layout]
        return Pack(*parts)._replace(layout=attention.Layout(*segments))


class Work(NamedTuple):
    groups: list[int]  # indices of the groups of one micro-batch of one rank
    counted: bool  # False for a filler, run with weight 0 so that all ranks meet in every collective


def copied(parts: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors on a device, as views of one buffer. It goes there in one piece, and out of pinned memory where
    that is a GPU's, so that the host need not wait for what the GPU still does."""
    rooms = [-(-part.nbytes // 16) * 16 for part in parts]  # no view begins within a number of another's
    begins = np.cumsum([0, *rooms]).tolist()
    here = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")

    def views(room: Tensor) -> list[Tensor]:
        spans = [room[begin : begin + part.nbytes] for begin, part in zip(begins, parts)]
        return [span.view(part.dtype).view(part.shape) for span, part in zip(spans, parts)]

    for view, part in zip(views(here), parts):
        view.copy_(part)
    return views(here.to(device, non_blocking=True))


def pack(groups: Sequence[Encoded], counted: bool = True, pairs: str = "best-worst") -> Pack:
    """Groups end to end in one row, nothing padded. `counted` False makes every weight 0 (a filler)."""
    ids = [token for group in groups for piece in (group.prompt, *group.completions) for token in piece]
    masks = [mask for group in groups for mask in ([False] * len(group.prompt), *group.trained)]
    labels = [flag for g in groups for flag in (False, *(g.labels or ranking.desirable(g.scores)))]
    placed = all(group.places for group in groups)
    found = Rows(
        np.array(ids, np.int64),
        np.array([wanted for mask in masks for wanted in mask], bool),
        np.array([1 + len(group.completions) for group in groups]),
        np.array([len(mask) for mask in masks]),
        np.array([score for group in groups for score in (0.0, *group.scores)]),
        np.array(labels),
        np.array([place for group in groups for place in (0, *group.places)]) if placed else None,
        np.array([group.weight for group in groups]),
        np.array([group.margin for group in groups]),
    )
    return _packed(found, counted, pairs)


def _packed(rows: Rows, counted: bool, how: str) -> Pack:
    """`pack` of examples that lie end to end."""
    firsts = rows.counts.cumsum() - rows.counts  # (G,) the piece that is each prompt
    owners = np.repeat(np.arange(len(firsts)), rows.counts)  # (P,)
    starts = rows.sizes.cumsum() - rows.sizes  # (P,)
    prompts = rows.sizes[firsts]  # (G,)
    answers = np.delete(np.arange(len(owners)), firsts)  # (R,) pieces
    before = prompts[owners]  # (P,) position of each piece's first token
    before[firsts] = 0
    positions = np.arange(len(rows.ids)) - np.repeat(starts - before, rows.sizes)  # (T,)
    at = np.flatnonzero(rows.trained & (positions > 0))  # (N,) nothing predicts the first token of all
    pieces = np.searchsorted(starts + rows.sizes, at, "right")  # (N,)
    # the prompt's last state predicts the first token of every completion
    last = (starts[firsts] + prompts - 1)[owners]  # (P,)
    predict = np.where(at == starts[pieces], last[pieces], at - 1)
    tokens = None
    if rows.places is not None:
        tokens = rows.places[pieces] + np.arange(len(at)) - np.searchsorted(pieces, pieces)
    sizes, scores, borders = rows.sizes.tolist(), rows.scores.tolist(), [*firsts.tolist(), len(owners)]
    groups, pairs, margins = [], [], []
    for g, (begin, end) in enumerate(zip(borders, borders[1:])):
        groups.append((sizes[begin], sizes[begin + 1 : end]))
        own = scores[begin + 1 : end]
        reach = max(own) - min(own)
        for better, worse in ranking.pair_indices(own, how):
            pairs.append((begin - g + better, begin - g + worse))
            # the row's margin is the best's over the worst; other pairs have their share of the scores' reach
            margins.append(rows.margins[g] * ((own[better] - own[worse]) / reach))
    return Pack(
        torch.from_numpy(rows.ids.astype(np.int64))[None],
        torch.from_numpy(positions)[None],
        groups,
        torch.from_numpy(predict),
        torch.from_numpy(rows.ids[at].astype(np.int64)),
        torch.from_numpy(pieces - owners[pieces] - 1),
        tokens,
        torch.from_numpy((starts + rows.sizes - 1)[answers]),
        torch.from_numpy(rows.scores[answers].astype(np.float32)),
        torch.from_numpy(rows.labels[answers]),
        torch.from_numpy(owners[answers]),
        torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t(),
        torch.tensor(margins, dtype=torch.float32),
        torch.from_numpy((rows.weights * counted)[owners[answers]].astype(np.float32)),
        counted,
        attention.layout(groups),
    )


def summed(values: Tensor, pack: Pack, where: Tensor | None = None) -> Tensor:
    """(sum, count) in fp64, for fsdp.mean_over_ranks, of all values or of those `where` (like values) holds;
    (0, 0) for a filler. Chosen by a mask, not by an index, for whose size the host would wait for a GPU."""
    wide, counted = values.double(), float(pack.counted)
    if where is None:
        return torch.stack([wide.sum() * counted, wide.new_full((), values.numel() * counted)])
    return torch.stack([torch.where(where, wide, 0.0).sum() * counted, where.double().sum() * counted])


def thin(
    labels: np.ndarray, seed: int, *, keep_desirable: float = 1.0, keep_undesirable: float = 1.0
) -> np.ndarray:
    """A fraction of the desirable completions and one of the undesirable, chosen by the seed: labels (c,)
    bool -> which stay (c,) bool.

    Raises ValueError unless both are in (0, 1], or [0, 1] for one of them, or if nothing stays.
    """
    fractions = {True: keep_desirable, False: keep_undesirable}
    if not all(0 <= fraction <= 1 for fraction in fractions.values()) or not any(fractions.values()):
        raise ValueError(f"--keep-desirable and --keep-undesirable are fractions, got {fractions}")
    generator = torch.Generator().manual_seed(seed)
    kept = np.zeros(len(labels), bool)
    for label, fraction in fractions.items():
        places = np.flatnonzero(labels == label)
        chosen = torch.randperm(len(places), generator=generator)[: round(fraction * len(places))]
        kept[places[chosen.numpy()]] = True
    if len(labels) and not kept.any():
        raise ValueError(
            f"nothing is left at --keep-desirable {keep_desirable}, --keep-undesirable {keep_undesirable}"
        )
    return kept


def partners(prompts: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """For every example the next one in the order, which wraps, whose prompt differs; `prompts` are equal
    where prompts are: (n,) -> (n,).

    Raises ValueError if all prompts are the same.
    """
    order = np.asarray(order)
    keys = np.asarray(prompts)[order]  # (n,)
    borders = np.flatnonzero(keys != np.roll(keys, -1))  # places whose successor has another prompt
    if not len(borders):
        raise ValueError("the KL estimate needs two different prompts")
    last = borders[np.searchsorted(borders, np.arange(len(order))) % len(borders)]  # (n,) of the same prompt
    found = np.empty_like(order)
    found[order] = order[(last + 1) % len(order)]
    return found


def packs(examples: Store, works: Sequence["Work"], how: str, device: torch.device) -> list[Pack]:
    """The micro-batches of a rank, of the store's arrays; `how` are pairs made."""
    return [_packed(examples.rows(work.groups), work.counted, how).to(device) for work in works]


def plan(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    tokens_per_microbatch: int,
    seed: int | None,
    epoch: int = 0,
    units: Sequence[int] | None = None,
) -> "Plan":
    """Every optimiser step of an epoch: plan[step][rank] is that rank's micro-batches in order.

    `lengths` are tokens of each group. A step takes groups of batch_size units on average (pairs or
    responses; `units` None: every group is one) over all ranks: the group that crosses a border goes to the
    next step, and the last step of the epoch takes what is left. A group of more than batch_size units counts
    for batch_size of them, so that it makes no other step larger than its own. All ranks have the same number
    of micro-batches in a step, as collectives demand; a rank without work runs the smallest group uncounted.
    No micro-batch exceeds the budget unless a single group does. A pure function: every rank computes the
    same plan, and resuming at a step is looking it up.
    """
    lengths = np.asarray(lengths)
    order = np.asarray(epoch_order(len(lengths), seed, epoch))  # (n,)
    units = np.ones(len(lengths), np.int64) if units is None else np.asarray(units)
    done = np.minimum(units, batch_size)[order].cumsum()  # (n,) units at the end of each group
    steps = steps_per_epoch(units, batch_size)
    starts = np.searchsorted((done - 1) // batch_size, np.arange(1, steps))
    smallest = int(order[lengths[order].argmin()])
    return Plan(np.split(order, starts), lengths, world_size, tokens_per_microbatch, smallest)


@dataclass
class Plan(Sequence):
    """The steps of an epoch, each put together when it is asked for."""

    batches: list[np.ndarray]  # groups of each step
    lengths: np.ndarray  # (n,)
    world_size: int
    budget: int
    smallest: int  # the group that a rank without work runs

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> list[list[Work]]:
        bins = _balance(self.batches[step].tolist(), self.lengths, self.world_size, self.budget)
        works = [Work(groups, True) if groups else Work([self.smallest], False) for groups in bins]
        return [works[rank :: self.world_size] for rank in range(self.world_size)]


def epoch_order(size: int, seed: int | None, epoch: int) -> list[int]:
    """The permutation of an epoch by (seed, epoch); a seed of None keeps the order of the data."""
    if seed is None:
        return list(range(size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


def steps_per_epoch(units: Sequence[int], batch_size: int) -> int:
    """Optimiser steps of an epoch. No group counts for more than a step, so none of them is empty, whatever
    the order."""
    return ceil(int(np.minimum(units, batch_size).sum()) / batch_size)


def _balance(groups: list[int], lengths: Sequence[int], world_size: int, budget: int) -> list[list[int]]:
    """Groups into the fewest multiple of world_size bins within the budget, longest first into the emptiest
    bin.

    Bins come sorted by tokens, so that the ranks of one micro-batch carry nearly the same load.
    """
    sizes = {index: int(lengths[index]) for index in groups}
    by_length = sorted(groups, key=lambda index: -sizes[index])
    rounds = max(1, ceil(sum(min(size, budget) for size in sizes.values()) / (world_size * budget)))
    while True:
        bins = [[] for _ in range(rounds * world_size)]
        loads = [0] * len(bins)
        for index in by_length:
            target = loads.index(min(loads))
            bins[target].append(index)
            loads[target] += sizes[index]
        if all(load <= budget or len(members) == 1 for load, members in zip(loads, bins)):
            ranked = sorted(range(len(bins)), key=lambda position: -loads[position])
            return [bins[position] for position in ranked]
        rounds += 1
