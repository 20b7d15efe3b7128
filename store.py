"""Tokenised examples on disk, memory-mapped: encoded once, by every core, and never all in memory.

    load     rows of data.py -> Store, from the cache where it holds these very rows under these very flags
    Store    a sequence of data.Encoded, and what the batch plan needs of all of them as arrays

A cache is one directory of flat arrays. An example is a run of pieces, its prompt and then its completions;
a piece is a run of tokens. Its name is a hash of everything the ids depend on (source files by size and time,
split, tokenizer, chat template, lengths, encoder, and data.py itself), so nothing stale is ever read: an
edited dataset function or a changed flag makes another directory. Old ones may be deleted at any time.

Left out: sharing between machines without a common file system (each tokenises once), compression.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import data

CHUNK = 256  # rows encoded at a time
INLINE = 8  # chunks encoded before other processes are worth their start of a few seconds


class Arrays(NamedTuple):
    """n examples of m pieces of t tokens."""

    ids: np.ndarray  # (t,)
    trained: np.ndarray  # (t,) is the token predicted by the loss
    starts: np.ndarray  # (m,) index into t of each piece's first token
    sizes: np.ndarray  # (m,) tokens of each piece
    scores: np.ndarray  # (m,) of completions; 0 for a prompt
    labels: np.ndarray  # (m,) is the completion desirable; False for a prompt
    first: np.ndarray  # (n + 1,) index into m of each example's prompt, and m
    weights: np.ndarray  # (n,)
    margins: np.ndarray  # (n,)
    prompts: np.ndarray  # (n,) equal for equal prompts


TYPES = Arrays("<i4", "?", "<i8", "<i4", "<f8", "?", "<i8", "<f8", "<f8", "<i8")


class Store(Sequence):
    """A sequence of data.Encoded, each made from the arrays when it is asked for."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays.weights)

    def __getitem__(self, index: int) -> data.Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = self.arrays
        prompt, *completions = range(found.first[index], found.first[index + 1])
        spans = [
            slice(found.starts[piece], found.starts[piece] + found.sizes[piece]) for piece in completions
        ]
        begin = found.starts[prompt]
        return data.Encoded(
            found.ids[begin : begin + found.sizes[prompt]].tolist(),
            [found.ids[span].tolist() for span in spans],
            [found.trained[span].tolist() for span in spans],
            found.scores[completions].tolist(),
            float(found.weights[index]),
            float(found.margins[index]),
            found.labels[completions].tolist(),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example: (n,)."""
        return np.add.reduceat(self.arrays.sizes, self.arrays.first[:-1], dtype=np.int32)

    @property
    def scores(self) -> Iterator[list[float]]:
        """The scores of each example's completions."""
        first = self.arrays.first
        for index in range(len(self)):
            yield self.arrays.scores[first[index] + 1 : first[index + 1]].tolist()

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
        found = self.arrays
        spans = [
            slice(found.starts[piece], found.starts[piece] + found.sizes[piece])
            for piece in (found.first[index] + 1 + one, found.first[index] + 1 + other)
        ]
        return np.array_equal(*[found.ids[span] for span in spans])

    def by_prompt(self) -> "Store":
        """Examples of one prompt as one, which stands where the first of them stood: the prompt of the first,
        the completions of all in their order, each with its own score and label.

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
        margins = np.zeros(len(leaders))  # (g,)
        chosen = {name: getattr(found, name)[pieces] for name in ("starts", "sizes", "scores", "labels")}
        kept = {name: getattr(found, name)[leaders] for name in ("weights", "prompts")}
        return Store(found._replace(first=first, margins=margins, **chosen, **kept))

    def chosen(self, used: Callable[[int, list[float]], Sequence[int] | str]) -> tuple["Store", str]:
        """The completions that `used` says of the index and the scores of each example, or the reason why it
        is left out; and these reasons, counted, in words. Raises ValueError if nothing is left."""
        stays = []
        dropped = Counter()
        for index, scores in enumerate(self.scores):
            found = used(index, scores)
            if isinstance(found, str):
                dropped[found] += 1
                found = ()
            members = set(found)
            stays += [place in members for place in range(len(scores))]
        if not any(stays):
            raise ValueError(f"no example is left ({_words(dropped)})")
        return self if all(stays) else self.only(np.array(stays)), _words(dropped)

    def only(self, stays: np.ndarray) -> "Store":
        """The completions that stay, of all (c,) bool; an example that loses them all is left out."""
        found = self.arrays
        kept = np.ones(len(found.sizes), bool)  # (m,)
        kept[self.completions] = stays
        left = np.add.reduceat(kept, found.first[:-1], dtype=np.int64)  # (n,) pieces, the prompt among them
        full = left > 1  # (n,)
        kept &= np.repeat(full, np.diff(found.first))
        pieces = {name: getattr(found, name)[kept] for name in ("starts", "sizes", "scores", "labels")}
        examples = {name: getattr(found, name)[full] for name in ("weights", "margins", "prompts")}
        first = np.concatenate([[0], left[full].cumsum()])  # (n + 1,)
        return Store(found._replace(first=first, **pieces, **examples))


def load(
    source: str,
    split: str,
    select: Callable[[data.Example], data.Example | str],
    encoder: Callable[..., data.Encoded | str],
    tokenizer: Any,
    template: tuple[str, str | None],
    max_length: int,
    max_prompt_length: int | None,
    cache: str,
    say: Callable[[str], None],
) -> Store:
    """Every row that `select` keeps and `encoder` can use, from the cache or encoded into it; says what was
    kept, what was left out and why, and shows one example with its trained part.

    Processes that ask for the same rows at once, the ranks of a run among them, wait for the first. A cache
    is complete or not there. Raises ValueError for a row that cannot be read, or if nothing is left.
    """
    flags = (tokenizer, max_length, max_prompt_length, template)
    place = Path(cache) / _name(source, split, select, encoder, *flags)
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _complete(place):
            rows = data.stream(source, split)
            _write(place, rows, (select, encoder, flags), lambda text: say(f"{source}: {text}"))
    store, dropped = _open(place)
    reasons = _words(dropped)
    if not len(store):
        raise ValueError(f"{source}: no example is left at --max-length {max_length} ({reasons})")
    lengths = np.sort(store.lengths)
    middle, high = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
    say(
        f"{source}: {len(store)} examples, tokens {middle} (median), {high} (95 %), {lengths[-1]} (most). "
        f"{reasons}"
    )
    first = store[0]
    shown = [token for token, wanted in zip(first.completions[0], first.trained[0]) if wanted]
    say(f"  ...{tokenizer.decode(first.prompt)[-120:]!r} -> {tokenizer.decode(shown)[:200]!r}")
    return store


def _words(dropped: dict[str, int]) -> str:
    return "; ".join(f"{number} left out: {reason}" for reason, number in dropped.items())


def _name(source: str, split: str, select: Callable, encoder: Callable, tokenizer: Any, *flags: Any) -> str:
    """A hash of everything that the ids depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    chosen = (select.func.__name__, select.keywords) if hasattr(select, "func") else select.__name__
    code = [Path(file).read_text(encoding="utf-8") for file in (data.__file__, __file__)]
    libraries = [version(name) for name in ("transformers", "tokenizers")]
    told = [data.state(source, split), split, chosen, encoder.__name__, type(tokenizer).__name__, words]
    told += [tokenizer.chat_template, tokenizer.special_tokens_map, flags, code, libraries]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


# ---- writing
# ---------------------------------------------------------------------------------------------------------


def _write(
    place: Path, rows: Iterator[data.Example | str], encode: tuple, say: Callable[[str], None]
) -> None:
    """The directory of a cache, from rows that are read once and never all held."""
    beside = place.with_suffix(".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    beside.mkdir()
    dropped = Counter()
    tokens = pieces = 0
    try:
        with contextlib.ExitStack() as stack:
            files = Arrays(*[stack.enter_context(open(beside / name, "wb")) for name in Arrays._fields])
            files.first.write(np.zeros(1, TYPES.first).tobytes())
            for arrays, reasons in _encoded(rows, encode, say):
                dropped.update(reasons)
                arrays = arrays._replace(starts=arrays.starts + tokens, first=arrays.first + pieces)
                tokens += len(arrays.ids)
                pieces += len(arrays.sizes)
                for file, array, kind in zip(files, arrays, TYPES):
                    file.write(np.ascontiguousarray(array, kind).tobytes())
        sizes = {name: (beside / name).stat().st_size for name in Arrays._fields}
        (beside / "about.json").write_text(json.dumps({"bytes": sizes, "dropped": dropped}), encoding="utf-8")
        os.replace(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _encoded(rows: Iterator, encode: tuple, say: Callable[[str], None]) -> Iterator[tuple[Arrays, Counter]]:
    """Chunks of rows, encoded in their order: the first few here, more by a process a core."""
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    for chunk in islice(chunks, INLINE):
        yield _encode_chunk(encode, chunk)
    following = next(chunks, None)
    if following is None:
        return
    workers = len(os.sched_getaffinity(0))
    say(f"tokenising with {workers} processes")
    # spawned: a fork would copy the locks of the threads that torch has started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encode,)) as pool:
        waiting = deque()
        try:
            for chunk in chain([following], chunks):
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:  # rows are read no faster than they are encoded
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(encode: tuple) -> None:
    _work.encode = encode


def _work(rows: list[data.Example | str]) -> tuple[Arrays, Counter]:
    return _encode_chunk(_work.encode, rows)


def _encode_chunk(encode: tuple, rows: list[data.Example | str]) -> tuple[Arrays, Counter]:
    """The arrays of some rows, their indices from 0, and why others were left out."""
    select, encoder, flags = encode
    dropped = Counter()
    kept = []
    for row in rows:
        for step in (select, lambda example: encoder(example, *flags)):
            row = row if isinstance(row, str) else step(row)
        if isinstance(row, str):
            dropped[row] += 1
        else:
            kept.append(row)
    return _flat(kept), dropped


def _flat(examples: Iterable[data.Encoded]) -> Arrays:
    found = Arrays(*[[] for _ in Arrays._fields])
    for example in examples:
        blank = [False] * len(example.prompt)
        for ids, trained in zip([example.prompt, *example.completions], [blank, *example.trained]):
            found.starts.append(len(found.ids))
            found.sizes.append(len(ids))
            found.ids.extend(ids)
            found.trained.extend(trained)
        found.scores.extend([0.0, *example.scores])
        found.labels.extend([False, *(example.labels or data.desirable(example.scores))])
        found.first.append(len(found.sizes))
        found.weights.append(example.weight)
        found.margins.append(example.margin)
        found.prompts.append(example.prompt_key)
    return Arrays(*[np.array(values, kind) for values, kind in zip(found, TYPES)])


# ---- reading
# ---------------------------------------------------------------------------------------------------------


def _complete(place: Path) -> bool:
    """Is everything there that was written? A crash of the machine may have kept the names and lost bytes."""
    try:
        sizes = json.loads((place / "about.json").read_text(encoding="utf-8"))["bytes"]
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _open(place: Path) -> tuple[Store, dict[str, int]]:
    arrays = []
    for name, kind in zip(Arrays._fields, TYPES):
        path = place / name  # an empty file cannot be mapped
        arrays.append(np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind))
    return Store(Arrays(*arrays)), json.loads((place / "about.json").read_text(encoding="utf-8"))["dropped"]
