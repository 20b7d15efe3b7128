"""Which completions of an example train, and which are compared: by their scores alone.

usable_pair, usable_feedback, best_completion     Example -> what a loss learns from of it, or why not
pair_indices, pair_counts                         scores -> pairs; of one list, of all lists at once
pairs_by_subset                                   examples -> how many pairs each subset has
desirable                                         scores -> labels
"""

from collections import Counter
from itertools import combinations
from typing import Any, Sequence

import numpy as np

from formats import Example

PAIRS = ("best-worst", "adjacent", "all")
# why a row is left out
NO_BETTER = "no completion is the better one"
ALONE = "one answer alone is better than none (--group-by prompt gathers those of a prompt)"


def pair_indices(scores: Sequence[float], pairs: str) -> list[tuple[int, int]]:
    """(better, worse) of a ranked list: "best-worst" one pair, "adjacent" neighbours in rank, "all" any two.

    Equal scores make no pair. Raises ValueError for another word.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if pairs not in PAIRS:
        raise ValueError(f"--pairs must be {', '.join(PAIRS[:-1])} or {PAIRS[-1]}, got {pairs}")
    ends = [(order[0], order[-1])]
    found = {"best-worst": ends, "adjacent": zip(order, order[1:]), "all": combinations(order, 2)}[pairs]
    return [(better, worse) for better, worse in found if scores[better] > scores[worse]]


def pair_counts(scores: np.ndarray, sizes: np.ndarray, pairs: str) -> np.ndarray:
    """How many pairs each list has: scores (c,) of all lists end to end, sizes (n,) of each -> (n,)."""
    owners = np.repeat(np.arange(len(sizes)), sizes)  # (c,)
    ranked = scores[np.lexsort((-scores, owners))]  # (c,) every list from its best to its worst
    same = owners[1:] == owners[:-1]  # (c - 1,)
    falls = np.concatenate(
        [[False], same & (ranked[1:] < ranked[:-1])]
    )  # (c,) is it worse than the one before
    drops = np.bincount(owners[falls], minlength=len(sizes))  # (n,)
    if pairs == "adjacent":
        return drops
    if pairs == "best-worst":
        return np.minimum(drops, 1)
    ties = np.cumsum(falls | np.concatenate([[True], ~same])) - 1  # (c,) runs of equal scores in a list
    runs = np.bincount(ties)  # completions of each
    within = np.bincount(
        owners[np.searchsorted(ties, np.arange(len(runs)))], runs * (runs - 1) // 2, len(sizes)
    )
    return sizes * (sizes - 1) // 2 - within.astype(np.int64)


def compared(scores: Sequence[float], pairs: str) -> list[int]:
    """The completions of a ranked list that some pair compares, in their order."""
    return sorted({index for pair in pair_indices(scores, pairs) for index in pair})


def pairs_by_subset(examples: Sequence[Any], pairs: str) -> dict[str, int]:
    """How many pairs the examples (with `scores` and a `subset`) of each subset have, in the order of names;
    of those with a name that have any."""
    found = Counter()
    for example in examples:
        found[example.subset] += len(pair_indices(example.scores, pairs))
    return {name: found[name] for name in sorted(found) if name and found[name]}


def usable_pair(example: Example, *, pairs: str = "best-worst") -> Example | str:
    """The example with the completions that some pair compares, or the reason why there is no pair."""
    if not example.completions:
        return "it has no answer"
    used = compared(example.scores, pairs)
    if not used:
        return ALONE if len(example.scores) == 1 else NO_BETTER
    completions = [example.completions[index] for index in used]
    return example._replace(completions=completions, scores=[example.scores[index] for index in used])


def usable_feedback(example: Example) -> Example | str:
    """The example, or the reason why its completions are not known to be good or bad."""
    if not example.completions:
        return "it has no answer"
    return example if example.labelled else "it has no label"


def usable_group(example: Example) -> Example | str:
    """The example, or the reason why its completions cannot be measured against each other, which is what a
    loss of the scores within a prompt does."""
    if example.labelled and len(set(example.scores)) == 1:
        return ALONE if len(example.scores) == 1 else NO_BETTER
    return usable_feedback(example)


def desirable(scores: Sequence[float]) -> list[bool]:
    """The label of each completion of a prompt: several are compared with the mean of their scores, one alone
    (or several of the same score) with 0."""
    middle = sum(scores) / len(scores) if len(set(scores)) > 1 else 0.0
    return [score > middle for score in scores]


def best_completion(example: Example) -> Example | str:
    """The example with its highest-scored completion alone, for supervised fine-tuning, or the reason why
    none is worth it."""
    if not example.completions:
        return "it has no answer"
    if not any(desirable(example.scores)):
        return "labelled undesirable" if len(example.scores) == 1 else NO_BETTER
    best = max(range(len(example.scores)), key=lambda index: example.scores[index])
    return example._replace(completions=[example.completions[best]], scores=[example.scores[best]])
