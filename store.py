"""Tokenised examples on disk, memory-mapped: encoded once, by every core, and never all in memory.

    load     rows of data.py -> arrays.Store, from the cache where it holds these very rows under these flags

A cache is one directory of the flat arrays of arrays.py. Its name is a hash of everything the ids depend on
(source files by size and time, split, tokenizer, chat template, lengths, encoder, and the code that reads and
encodes), so nothing stale is ever read: an edited dataset function or a changed flag makes another directory.
Old ones may be deleted at any time.

Left out: sharing between machines without a common file system (each tokenises once), compression.
"""

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import arrays
import chat
import data
import encode
import files
import formats
import progress
import ranking
import values
from arrays import TYPES, Arrays, Store, joined
from chat import Template
from encode import Encoded
from formats import Example, Fault

CHUNK = 256  # rows encoded at a time
UNSEEN = ("places", "learned", "subsets")  # what training does not depend on
WORKERS = 32  # processes at most: rows are read by one, and each takes a third of a gigabyte
INLINE = 8  # chunks encoded before other processes are worth their start of a few seconds


class Encoding(NamedTuple):
    """How rows become token ids: everything that they depend on beside the rows."""

    select: Callable[[Example], Example | str]  # what is kept of a row, or why it is not wanted
    encoder: Callable[..., Encoded | list[Encoded] | str]  # of encode.py
    tokenizer: Any
    max_length: int
    max_prompt_length: int | None
    template: Template


class About(NamedTuple):
    """What a cache says of itself: counts by reason, and where each was met first."""

    rows: int  # read
    left_out: dict[str, int]  # rows that are not wanted
    faults: dict[str, tuple[int, str]]  # rows that cannot be used
    remarks: dict[str, tuple[int, str]]  # rows that were changed
    unread: list[str]  # keys
    digest: str  # of all ids, masks, scores and weights: what training depends on
    sample: str  # files.fingerprint of the arrays


def load(
    sources: Sequence[str],
    split: str,
    encoding: Encoding,
    *,
    cache: str,
    strict: bool,
    seed: int,
    say: Callable[[str], None],
) -> Store:
    """Every row of all sources that `encoding` keeps and can use, each source from the cache or encoded into
    it, as much of it as its weight says; tells what was kept, what was left out and why, and shows one.

    Processes of a machine that ask for the same rows at once, the ranks of a run among them, wait for the
    first. A cache is complete or not there. Raises ValueError for a file that cannot be read, if more than
    5 % of a source's rows cannot be used (if it has 20 or more; if `strict`: any), or if nothing is left.
    """
    found = []
    for spec in sources:
        source, weight = data.weighted(spec)
        store, about = _of_source(source, split, encoding, cache, say)
        _report(source, store, about, encoding, strict, say)
        found.append(store if weight == 1 else store.share(weight, seed))
    store = joined(found) if len(found) > 1 else found[0]
    first = store[0]
    shown = [token for token, wanted in zip(first.completions[0], first.trained[0]) if wanted]
    decode = encoding.tokenizer.decode
    say(f"  ...{decode(first.prompt)[-120:]!r} -> {decode(shown)[:200]!r}")
    return store


def _of_source(
    source: str, split: str, encoding: Encoding, cache: str, say: Callable[[str], None]
) -> tuple[Store, About]:
    """The rows of one source, its cache made if it is not there."""
    place = Path(cache) / _name(source, split, encoding)
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _complete(place):
            unread = set()
            rows = data.stream(source, split, unread)
            _write(place, rows, unread, encoding, lambda text: say(f"{source}: {text}"))
    return _open(place)


def _report(
    source: str, store: Store, about: About, encoding: Encoding, strict: bool, say: Callable[[str], None]
) -> None:
    """What became of the rows. Raises ValueError where too many cannot be used."""
    faulty = sum(number for number, _ in about.faults.values())
    faults = [
        f"{number} cannot be used: {why} (first: {where})" for why, (number, where) in about.faults.items()
    ]
    left_out = [f"{number} left out: {reason}" for reason, number in about.left_out.items()]
    if faulty and (strict or about.rows >= 20 and faulty > about.rows / 20):
        why, (_, where) = next(iter(about.faults.items()))
        limit = "--strict-data true allows none" if strict else "more than 5 %"
        raise ValueError(f"{where}: {why}; {faulty} of {about.rows} rows cannot be used, {limit}")
    if not len(store):
        reasons = "; ".join([*faults, *left_out])
        unread = f"; keys not read: {values.names(about.unread[:20])}" * bool(about.unread)
        raise ValueError(
            f"{source}: no example is left at --max-length {encoding.max_length} ({reasons}{unread})"
        )
    lengths = np.sort(store.lengths)
    middle, high = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
    read = f"{about.rows} rows read, {len(store)} examples"
    say(f"{source}: {read}, tokens {middle} (median), {high} (95 %), {lengths[-1]} (most)")
    for line in faults + left_out:
        say(f"  {line}")
    for remark, (number, where) in about.remarks.items():
        say(f"  {number} changed: {remark} (first: {where})")
    if about.unread:
        say(f"  keys not read: {values.names(about.unread[:20])}{', ...' * (len(about.unread) > 20)}")


def _name(source: str, split: str, encoding: Encoding) -> str:
    """A hash of everything that the ids depend on."""
    select, encoder, tokenizer, *lengths, template = encoding
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    chosen = (select.func.__name__, select.keywords) if hasattr(select, "func") else select.__name__
    modules = (arrays, chat, data, encode, files, formats, ranking, values)
    paths = [__file__, *[module.__file__ for module in modules]]
    code = [Path(path).read_text(encoding="utf-8") for path in paths]
    template = template._replace(special_ids=sorted(template.special_ids))  # a set is written in any order
    libraries = [version(name) for name in ("transformers", "tokenizers")]
    told = [data.state(source, split), split, chosen, encoder.__name__, type(tokenizer).__name__, words]
    told += [tokenizer.chat_template, tokenizer.special_tokens_map, lengths, template, code, libraries]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


# ---- writing
# ---------------------------------------------------------------------------------------------------------


def _write(
    place: Path,
    rows: Iterator[Example | Fault | str],
    unread: set[str],
    encoding: Encoding,
    say: Callable[[str], None],
) -> None:
    """The directory of a cache, from rows that are read once and never all held."""
    # not every shared disk knows locks between machines: each writes by itself, and the first to end is taken
    own = f"{place.name}.{socket.gethostname()}-"
    for left in place.parent.glob(f"{glob.escape(own)}*.tmp"):  # of one that was killed, for the lock is held
        shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    beside = place.with_name(f"{own}{os.getpid()}.tmp")
    beside.mkdir()
    total = Tally(0, Counter(), {}, {})
    tokens = pieces = trained = 0
    hashes = [hashlib.sha256() for _ in Arrays._fields]
    try:
        with contextlib.ExitStack() as stack:
            opened = Arrays(*[stack.enter_context(open(beside / name, "wb")) for name in Arrays._fields])
            opened.first.write(np.zeros(1, TYPES.first).tobytes())
            for part, tally in _encoded(progress.bar(rows, "rows"), encoding, say):
                total = total.plus(tally)
                moved = {"starts": part.starts + tokens, "places": part.places + trained}
                part = part._replace(**moved, first=part.first + pieces)
                tokens += len(part.ids)
                trained += np.count_nonzero(part.trained)
                pieces += len(part.sizes)
                for file, array, kind, digest in zip(opened, part, TYPES, hashes):
                    raw = np.ascontiguousarray(array, kind).tobytes()
                    file.write(raw)
                    digest.update(raw)
        sample = files.fingerprint(beside / name for name in Arrays._fields)
        depended = [one.hexdigest() for name, one in zip(Arrays._fields, hashes) if name not in UNSEEN]
        digest = hashlib.sha256("".join(depended).encode()).hexdigest()
        about = About(*total, sorted(map(str, unread)), digest, sample)
        (beside / "about.json").write_text(json.dumps(about._asdict()), encoding="utf-8")
        try:
            os.replace(beside, place)
        except OSError:  # another machine's may be there by now
            if not _complete(place):
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class Tally(NamedTuple):
    """The counts of About, of some rows."""

    rows: int
    left_out: Counter
    faults: dict[str, tuple[int, str]]
    remarks: dict[str, tuple[int, str]]

    def plus(self, other: "Tally") -> "Tally":
        """Of these rows and then the others."""
        counted = [dict(self.faults), dict(self.remarks)]
        for mine, theirs in zip(counted, other[2:]):
            for reason, (number, where) in theirs.items():
                before, first = mine.get(reason, (0, where))
                mine[reason] = (before + number, first)
        return Tally(self.rows + other.rows, self.left_out + other.left_out, *counted)


def _encoded(
    rows: Iterator[Example | Fault | str], encoding: Encoding, say: Callable[[str], None]
) -> Iterator[tuple[Arrays, Tally]]:
    """Chunks of rows, encoded in their order: the first few here, more by a process a core."""
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    for chunk in islice(chunks, INLINE):
        yield _encode_chunk(encoding, chunk)
    following = next(chunks, None)
    if following is None:
        return
    workers = min(WORKERS, len(os.sched_getaffinity(0)))
    say(f"tokenising with {workers} processes")
    # spawned: a fork would copy the locks of the threads that torch has started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encoding, os.getpid())) as pool:
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


def _start_worker(encoding: Encoding, parent: int) -> None:
    """A worker ends with its parent, however that ends: left alone it would wait for rows for ever."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has this
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before that call
        os._exit(1)
    _work.encoding = encoding


def _work(rows: list[Example | Fault | str]) -> tuple[Arrays, Tally]:
    return _encode_chunk(_work.encoding, rows)


def _encode_chunk(encoding: Encoding, rows: list[Example | Fault | str]) -> tuple[Arrays, Tally]:
    """The arrays of some rows, their indices from 0, and what became of them."""
    select, encoder, *flags = encoding
    tally = Tally(len(rows), Counter(), {}, {})
    kept = []
    for row in rows:
        row = select(row) if isinstance(row, Example) else row
        if isinstance(row, Example):
            found = encoder(row, *flags)
            found = [found] if isinstance(found, Encoded) else found
            row = Fault(row.where, found) if isinstance(found, str) else row
        if isinstance(row, str):
            tally.left_out[row] += 1
        elif isinstance(row, Fault):
            number, first = tally.faults.get(row.reason, (0, row.where))
            tally.faults[row.reason] = (number + 1, first)
        else:
            kept += found
            if found[0].remark:
                number, first = tally.remarks.get(found[0].remark, (0, row.where))
                tally.remarks[found[0].remark] = (number + 1, first)
    return _flat(kept), tally


def _flat(examples: Iterable[Encoded]) -> Arrays:
    found, place = Arrays(*[[] for _ in Arrays._fields]), 0
    for example in examples:
        blank = [False] * len(example.prompt)
        for ids, trained in zip([example.prompt, *example.completions], [blank, *example.trained]):
            found.starts.append(len(found.ids))
            found.places.append(place)
            found.learned.append(sum(trained))
            place += found.learned[-1]
            found.sizes.append(len(ids))
            found.ids.extend(ids)
            found.trained.extend(trained)
        found.scores.extend([0.0, *example.scores])
        found.labels.extend([False, *(example.labels or ranking.desirable(example.scores))])
        found.first.append(len(found.sizes))
        found.weights.append(example.weight)
        found.margins.append(example.margin)
        found.prompts.append(example.prompt_key)
        found.subsets.append(example.subset.encode(errors="replace"))
    return Arrays(*[np.array(values, kind) for values, kind in zip(found, TYPES)])


# ---- reading
# ---------------------------------------------------------------------------------------------------------


def _complete(place: Path) -> bool:
    """Is everything there that was written? A crash of the machine may have kept the names, or the sizes too,
    and lost bytes. Samples: a sum over all bytes takes a second a gigabyte and more, at every start."""
    try:
        sample = json.loads((place / "about.json").read_text(encoding="utf-8"))["sample"]
        return sample == files.fingerprint(place / name for name in Arrays._fields)
    except (OSError, ValueError, KeyError):
        return False


def _open(place: Path) -> tuple[Store, About]:
    mapped = []
    for name, kind in zip(Arrays._fields, TYPES):
        path = place / name  # an empty file cannot be mapped
        mapped.append(np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind))
    about = About(**json.loads((place / "about.json").read_text(encoding="utf-8")))
    return Store(Arrays(*mapped), about.digest), about
