"""Encoded rows as flat arrays, mapped from files or made of others, and never all in memory as objects.

    Store    a sequence of encode.Encoded, and what the batch plan needs of all of them as arrays
    joined   several as one

An example is a run of pieces, its prompt and then its completions; a piece is a run of tokens. Choosing among
examples or completions moves pieces, never tokens.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch

from encode import Encoded


class Arrays(NamedTuple):
    """n examples of m pieces of t tokens."""

    ids: np.ndarray  # (t,)
    trained: np.ndarray  # (t,) is the token predicted by the loss
    starts: np.ndarray  # (m,) index into t of each piece's first token
    sizes: np.ndarray  # (m,) tokens of each piece
    scores: np.ndarray  # (m,) of completions; 0 for a prompt
    labels: np.ndarray  # (m,) is the completion desirable; False for a prompt
    places: np.ndarray  # (m,) how many trained tokens stand before each piece, of all that were written
    learned: np.ndarray  # (m,) trained tokens of each piece
    first: np.ndarray  # (n + 1,) index into m of each example's prompt, and m
    weights: np.ndarray  # (n,)
    margins: np.ndarray  # (n,)
    prompts: np.ndarray  # (n,) equal for equal prompts
    subsets: np.ndarray  # (n,) UTF-8, the first 32 bytes of a longer name


class Rows(NamedTuple):
    """G examples of P pieces of T tokens, end to end."""

    ids: np.ndarray  # (T,)
    trained: np.ndarray  # (T,)
    counts: np.ndarray  # (G,) pieces of each example: its prompt and its completions
    sizes: np.ndarray  # (P,) tokens of each piece
    scores: np.ndarray  # (P,)
    labels: np.ndarray  # (P,)
    places: np.ndarray | None  # (P,)
    weights: np.ndarray  # (G,)
    margins: np.ndarray  # (G,)


PIECES = ("starts", "sizes", "scores", "labels", "places", "learned")
EXAMPLES = ("weights", "margins", "prompts", "subsets")
TYPES = Arrays("<i4", "?", "<i8", "<i4", "<f8", "?", "<i8", "<i4", "<i8", "<f8", "<f8", "<i8", "S32")


class Store(Sequence):
    """A sequence of Encoded, each made from the arrays when it is asked for."""

    def __init__(self, arrays: Arrays, digest: str = "", source: str = "") -> None:
        self.arrays = arrays
        self.digest = digest  # of the caches it comes from, and what was chosen of them
        self.source = source or digest  # of the caches alone: what `places` belong to

    def __len__(self) -> int:
        return len(self.arrays.weights)

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = self.arrays
        prompt, *completions = range(found.first[index], found.first[index + 1])
        spans = [self._span(piece) for piece in completions]
        return Encoded(
            found.ids[self._span(prompt)].tolist(),
            [found.ids[span].tolist() for span in spans],
            [found.trained[span].tolist() for span in spans],
            found.scores[completions].tolist(),
            float(found.weights[index]),
            float(found.margins[index]),
            found.labels[completions].tolist(),
            subset=found.subsets[index].decode(errors="ignore"),
            places=found.places[completions].tolist(),
        )

    def rows(self, chosen: Sequence[int]) -> Rows:
        """Some examples, by index, end to end: copies of their spans, and no object a token."""
        found = self.arrays
        chosen = np.asarray(chosen)
        counts = found.first[chosen + 1] - found.first[chosen]  # (G,)
        pieces = np.repeat(found.first[chosen] - counts.cumsum() + counts, counts) + np.arange(counts.sum())
        texts = [np.concatenate(self._texts(name, pieces)) for name in ("ids", "trained")]
        named = [getattr(found, name)[pieces] for name in ("sizes", "scores", "labels", "places")]
        return Rows(*texts, counts, *named, found.weights[chosen], found.margins[chosen])

    @functools.cached_property
    def trained_tokens(self) -> np.ndarray:
        """Of each example, and no mask is read: (n,)."""
        return np.add.reduceat(self.arrays.learned, self.arrays.first[:-1], dtype=np.int64)

    def _texts(self, name: str, pieces: np.ndarray) -> list[np.ndarray]:
        """The tokens' array of this name, cut into pieces."""
        text = getattr(self.arrays, name)
        text = np.asarray(text) if isinstance(text, np.ndarray) else text  # a slice of a memmap takes 3 us
        starts = self.arrays.starts[pieces]
        ends = starts + self.arrays.sizes[pieces]
        return [text[begin:end] for begin, end in zip(starts.tolist(), ends.tolist())]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example: (n,)."""
        return np.add.reduceat(self.arrays.sizes, self.arrays.first[:-1], dtype=np.int32)

    @property
    def slots(self) -> int:
        """Trained tokens of all that was written, chosen or not: what `places` count."""
        return sum(map(np.count_nonzero, getattr(self.arrays.trained, "parts", [self.arrays.trained])))

    @property
    def sizes(self) -> np.ndarray:
        """Completions of each example: (n,)."""
        return np.diff(self.arrays.first) - 1

    @property
    def scores(self) -> np.ndarray:
        """Of all completions: (c,)."""
        return self.arrays.scores[self.completions]

    @property
    def completions(self) -> np.ndarray:
        """Which pieces are completions, of all examples: (c,)."""
        return np.delete(np.arange(len(self.arrays.sizes)), self.arrays.first[:-1])

    @property
    def labels(self) -> np.ndarray:
        """Of all completions: (c,) bool."""
        return self.arrays.labels[self.completions]

    def alike(self, index: int, one: int, other: int) -> bool:
        """Are two completions of an example the same?"""
        begin = self.arrays.first[index] + 1
        return np.array_equal(*[self.arrays.ids[self._span(begin + place)] for place in (one, other)])

    def _span(self, piece: int) -> slice:
        """Where the tokens of a piece are."""
        begin = self.arrays.starts[piece]
        return slice(begin, begin + self.arrays.sizes[piece])

    def _made_of(self, first: np.ndarray, pieces: np.ndarray, examples: np.ndarray, digest: str) -> "Store":
        """Of these pieces and these examples, by index or by mask; the tokens stay where they are."""
        found = self.arrays
        moved = {name: getattr(found, name)[pieces] for name in PIECES}
        moved |= {name: getattr(found, name)[examples] for name in EXAMPLES}
        return Store(found._replace(first=first, **moved), digest, self.source)

    def by_prompt(self) -> "Store":
        """Examples of one prompt as one, which stands where the first of them stood: the prompt and the
        subset of the first, the completions of all in their order, each with its own score and label.

        The arrays are made anew but for those of the tokens. A margin says how much better the best of its
        own row is: a list has none, 0. Raises ValueError if examples of one prompt have different weights,
        for a list has one.
        """
        found = self.arrays
        _, leaders, groups = np.unique(found.prompts, return_index=True, return_inverse=True)  # (g,), (n,)
        order = leaders.argsort()  # (g,)
        leaders = leaders[order]  # (g,) the first example of each group, ascending
        groups = order.argsort()[groups]  # (n,) of each example
        if (found.weights != found.weights[leaders][groups]).any():
            raise ValueError("rows of one prompt with different weights cannot be one list")
        owners = groups.repeat(np.diff(found.first) - 1)  # (c,) of each completion
        arrangement = owners.argsort(kind="stable")  # (c,)
        first = np.concatenate([[0], (np.bincount(owners) + 1).cumsum()])  # (g + 1,)
        pieces = np.empty(first[-1], np.int64)  # (g + c,)
        pieces[first[:-1]] = found.first[leaders]
        pieces[np.arange(len(owners)) + owners[arrangement] + 1] = self.completions[arrangement]
        made = self._made_of(first, pieces, leaders, f"{self.digest} by prompt")
        return Store(made.arrays._replace(margins=np.zeros(len(leaders))), made.digest, self.source)

    def chosen(
        self, used: Callable[[int, list[float]], Sequence[int] | str], unsure: np.ndarray
    ) -> tuple["Store", str]:
        """The completions that `used` says of the index and the scores of each unsure example, or the reason
        why it is left out, and all of the others; and these reasons, counted, in words. Raises ValueError if
        nothing is left."""
        stays = np.ones(len(self.completions), bool)  # (c,)
        dropped = Counter()
        first = self.arrays.first
        for index in unsure.tolist():
            span = slice(first[index] + 1, first[index + 1])
            found = used(index, self.arrays.scores[span].tolist())
            if isinstance(found, str):
                dropped[found] += 1
                found = []
            own = np.zeros(span.stop - span.start, bool)
            own[list(found)] = True
            stays[span.start - index - 1 : span.stop - index - 1] = own
        reasons = "; ".join(f"{number} left out: {reason}" for reason, number in dropped.items())
        if not stays.any():
            raise ValueError(f"no example is left ({reasons})")
        return self if stays.all() else self.only(stays), reasons

    def only(self, stays: np.ndarray) -> "Store":
        """The completions that stay, of all (c,) bool; an example that loses them all is left out."""
        found = self.arrays
        kept = np.ones(len(found.sizes), bool)  # (m,)
        kept[self.completions] = stays
        left = np.add.reduceat(kept, found.first[:-1], dtype=np.int64)  # (n,) pieces, the prompt among them
        full = left > 1  # (n,)
        kept &= np.repeat(full, np.diff(found.first))
        first = np.concatenate([[0], left[full].cumsum()])  # (n + 1,)
        return self._made_of(first, kept, full, self.digest)

    def share(self, weight: float, seed: int) -> "Store":
        """As many times its rows: a weight of 2.5 is every example twice and half of them, drawn by the seed,
        once more. In the order of the rows. Raises ValueError if no row is left."""
        whole, part = divmod(weight, 1)
        drawn = np.random.default_rng(seed).permutation(len(self))[: round(part * len(self))]
        chosen = np.sort(np.concatenate([np.tile(np.arange(len(self)), int(whole)), drawn]).astype(np.int64))
        if not len(chosen):
            raise ValueError(f"a weight of {weight} leaves none of {len(self)} rows")
        return self._examples(chosen, f"{self.digest} x {weight}, seed {seed}")

    def subset(self, size: int) -> "Store":
        """The same `size` examples in every run, whatever its seed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).numpy()
        return self._examples(np.sort(order[:size]), f"{self.digest}, {size} of them")

    def _examples(self, chosen: np.ndarray, digest: str) -> "Store":
        """These examples, by index."""
        found = self.arrays
        counts = np.diff(found.first)[chosen]  # (k,) pieces
        first = np.concatenate([[0], counts.cumsum()])  # (k + 1,)
        pieces = np.repeat(found.first[chosen] - first[:-1], counts) + np.arange(first[-1])
        return self._made_of(first, pieces, chosen, digest)

    def mismatched(self, partners: np.ndarray, max_length: int) -> "Store":
        """Every prompt with completions of its partner's (n,), as many as its own, in turn, cut on the right
        to max_length; scores and labels stay. Their places and what is learned are counted in all tokens of
        completions."""
        found = self.arrays
        pieces = self.completions  # (c,)
        owners = np.repeat(np.arange(len(self)), self.sizes)  # (c,)
        lenders = partners[owners]  # (c,) examples
        turns = pieces - found.first[owners] - 1  # (c,) 0, 1, ... of each example
        borrowed = found.first[lenders] + 1 + turns % self.sizes[lenders]  # (c,) pieces
        starts, sizes = np.array(found.starts), np.array(found.sizes)
        starts[pieces] = found.starts[borrowed]
        sizes[pieces] = np.minimum(found.sizes[borrowed], max_length - found.sizes[found.first[owners]])
        counts = np.zeros(len(sizes), np.int64)
        counts[pieces] = sizes[pieces]
        moved = found._replace(starts=starts, sizes=sizes, places=counts.cumsum() - counts, learned=counts)
        return Store(moved, f"{self.digest} mismatched", self.source)


@dataclass
class Chained:
    """Arrays end to end, for slices that lie in one of them: nothing is copied."""

    parts: list[np.ndarray]

    def __post_init__(self) -> None:
        self.borders = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.borders[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        part = int(np.searchsorted(self.borders, span.start, "right")) - 1
        begin = self.borders[part]
        return self.parts[part][span.start - begin : span.stop - begin]


def joined(stores: Sequence[Store]) -> Store:
    """Several stores as one, in their order."""
    arrays = [store.arrays for store in stores]
    tokens = np.cumsum([0, *[len(found.ids) for found in arrays]])
    pieces = np.cumsum([0, *[len(found.sizes) for found in arrays]])
    ends = [found.first[1:] + begin for found, begin in zip(arrays, pieces)]
    plain = {
        name: np.concatenate([getattr(found, name) for found in arrays]) for name in (*PIECES, *EXAMPLES)
    }
    trained = np.cumsum([0, *[store.slots for store in stores]])
    for name, before in (("starts", tokens), ("places", trained)):
        plain[name] = np.concatenate([getattr(found, name) + begin for found, begin in zip(arrays, before)])
    texts = {name: Chained([getattr(found, name) for found in arrays]) for name in ("ids", "trained")}
    first = np.concatenate([[0], *ends])
    digests = ["; ".join(getattr(store, name) for store in stores) for name in ("digest", "source")]
    return Store(Arrays(**texts, **plain, first=first), *digests)
