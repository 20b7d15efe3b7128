"""A bar for what takes long, where a person looks on."""

import os
import sys
from typing import Iterable, Iterator

from tqdm import tqdm

DELAY = 10  # seconds before a bar shows


def bar(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """The items, one by one; on the stderr of rank 0, if that is a terminal, how many of `total` (None:
    unknown) have been taken and how fast."""
    hidden = int(os.environ.get("RANK", 0)) != 0 or not sys.stderr.isatty()
    return iter(tqdm(items, what, total, delay=DELAY, disable=hidden, leave=False))
