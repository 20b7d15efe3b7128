"""Sources: files, folders, names on the hub, and one function a named dataset; each a stream of Examples.

    stream     the rows of one source: an Example, the Fault of a row, or the reason why a row is not wanted
    state      changes when they may have changed

A source is one of

    NAME, NAME=PLACE        a dataset function of this file, reading its published place or another
    rows.jsonl              JSON: lines, a list, objects one after another, {"data": [...]}, {"train": [...]}
    rows.csv, rows.parquet  tables; all but Parquet also with .gz or .zst
    FOLDER, FOLDER:split    shards, split folders, a copy of a hub dataset, what `save_to_disk` wrote
    org/name, org/name:config, org/name:split, org/name:config:split        the hub

and with ":0.5" after it half of its rows are used, with ":2" each twice. formats.py reads the rows.

Adding a dataset = adding one public function here, annotated `-> Rows`: it takes a split and a place, and
yields an Example, or, for a row that is not wanted, the reason as a string, which is counted and printed.
`--data NAME` finds it.

A fault of a file (no JSON, not UTF-8, cut off) is a ValueError that reads "file:line: what is wrong". Rows
are read one at a time: memory does not grow with their number.

Left out: reading from object stores.
"""

import inspect
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import files
import formats
from formats import Example, Fault

Rows = Iterator[Example | str]  # what a dataset function yields


def stream(source: str, split: str, unread: set[str] | None = None) -> Iterator[Example | Fault | str]:
    """The rows of a source, without its weight, one at a time; the keys of examples that nothing read are
    added to `unread`.

    Raises ValueError (see the module) for anything that cannot be read, and if there are no rows.
    """
    name, _, place = source.partition("=")
    empty = True
    if name in datasets():
        for row in getattr(sys.modules[__name__], name)(split, *([place] if place else [])):
            empty = False
            yield row
    else:
        for where, row in rows(source, split):
            empty = False
            example = formats.parse(row, where)
            if unread is not None and isinstance(example, Example):
                unread |= formats.unread_keys(row)
            yield example
    if empty:
        raise ValueError(f"{source}: no examples")


def load(source: str, split: str) -> tuple[list[Example], Counter]:
    """The whole `stream` at once: examples, and a count of the other rows by reason."""
    found = list(stream(source, split))
    reasons = [row.reason if isinstance(row, Fault) else row for row in found if not isinstance(row, Example)]
    return [row for row in found if isinstance(row, Example)], Counter(reasons)


def weighted(source: str) -> tuple[str, float]:
    """("hh", 0.5) of "hh:0.5"; 1 where no weight is given. Raises ValueError unless it is > 0 and <= 100."""
    found = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", source)
    if not found or Path(source).exists():
        return source, 1.0
    if not 0 < float(found[2]) <= 100:
        raise ValueError(f"--data {source}: a weight must be > 0 and <= 100")
    return found[1], float(found[2])


def held_out(sources: Sequence[str], named: Sequence[str] | None) -> list[str]:
    """Where held-out examples come from: what the user named, or the whole test splits of named datasets."""
    return list(named or [s for s, _ in map(weighted, sources) if s.partition("=")[0] in datasets()])


def datasets() -> list[str]:
    """Names of the dataset functions of this file, by their annotation."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return [name for name, f in functions if f.__annotations__.get("return") == Rows]


def state(source: str, split: str) -> str:
    """Changes when the rows of a source may have changed: the sizes and times of its files, or the version of
    a dataset of the hub. What a dataset function reads from elsewhere is not known here."""
    name, _, place = source.partition("=")
    if name in datasets():
        default = inspect.signature(getattr(sys.modules[__name__], name)).parameters.get("source")
        place = place or (default.default if default else "")
    path, *suffixes = _parts(place or source)
    if Path(path).exists():
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
        found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{name} {suffixes} {found}"
    if path.count("/") != 1:
        return source

    def where_it_is_kept(hub: Any) -> str:
        config, _ = _config_and_split(hub, path, suffixes, split)
        return hub.load_dataset_builder(path, config).cache_dir

    return f"{name} {suffixes} {_hub(path, where_it_is_kept)}"


# ---- named datasets
# ---------------------------------------------------------------------------------------------------------


def hh(split: str, source: str = "Anthropic/hh-rlhf") -> Rows:
    """Anthropic's helpful and harmless dialogues (arXiv:2204.05862), from the hub, a directory or a file.

    A row is two whole dialogues "\\n\\nHuman: ...\\n\\nAssistant: ...". The prompt is what stands before the
    last "\\n\\nAssistant:". Left out, with the reason: prompts that differ, roles that do not alternate,
    empty answers. Differs from the published code, which assigns roles by parity and ignores the rejected
    dialogue's prompt.
    """
    for where, row in published(source, split, ("chosen", "rejected")):
        pair = formats.hh_pair(row["chosen"], row["rejected"])
        yield pair if isinstance(pair, str) else formats.unusable(pair) or pair._replace(where=where)


def imdb(split: str, source: str = "stanfordnlp/imdb") -> Rows:
    """Film reviews (Maas et al. 2011) as plain text, for supervised fine-tuning before alignment on
    sentiment."""
    for where, row in published(source, split, ("text",)):
        text = row["text"].replace("<br />", "\n").strip()
        yield Example([], [text], [1.0], where=where, labelled=False) if text else "a review is empty"


def published(source: str, split: str, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a dataset in its published form. Raises ValueError for a row without its texts."""
    for where, row in rows(source, split):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise ValueError(f"{where}: not a row of the published dataset, which has {', '.join(keys)}")
        yield where, row


# ---- where rows come from
# ---------------------------------------------------------------------------------------------------------


def rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file, a folder or a name on the hub. Raises ValueError."""
    path, *suffixes = _parts(source)
    if len(suffixes) > 2:
        raise ValueError(f"{source}: at most a configuration and a split may follow a name")
    if Path(path).is_file():
        yield from files.rows(Path(path), split, _named_split(path, suffixes))
    elif path and Path(path).is_dir():
        yield from _folder_rows(Path(path), suffixes, split)
    elif files.suffix(Path(path)) in files.SUFFIXES or path.startswith((".", os.sep, "~")):
        raise ValueError(f"{path}: no such file or directory")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        yield from _hub_rows(path, suffixes, split)
    else:
        raise ValueError(
            f"{source}: neither a dataset ({', '.join(datasets())}; NAME=DIR reads local files) nor a file, "
            "a folder or org/name of the hub"
        )


def _parts(source: str) -> list[str]:
    """A path or name, and what follows it after colons."""
    return [source] if Path(source).exists() else source.split(":")


def _folder_rows(folder: Path, suffixes: list[str], split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a folder: what `save_to_disk` wrote, a hub-style folder whose README names its files, or all
    data files of the split, in the order of their names."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        named = _named_split(folder, suffixes)
        found = _hub(str(folder), lambda hub: hub.load_from_disk(str(folder)))
        if isinstance(found, dict):
            found = found[_split_among(folder, list(found), named, split)]
        elif named:
            raise ValueError(f"{folder}: no split {named!r}: it is one dataset without splits")
        yield from ((f"{folder}[{index}]", row) for index, row in enumerate(found))
        return
    readme = folder / "README.md"
    if readme.exists() and re.search(
        r"^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.M
    ):
        yield from _hub_rows(str(folder), suffixes, split)
        return
    by_split = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        about = path.name in ("dataset_info.json", "dataset_infos.json")
        if files.suffix(path) in files.SUFFIXES and not hidden and not about:
            by_split.setdefault(_split_of(path, folder), []).append(path)
    if not by_split:
        raise ValueError(f"{folder}: no {', '.join(files.SUFFIXES)} file in it")
    chosen = _split_among(folder, list(by_split), _named_split(folder, suffixes), split)
    for path in by_split[chosen]:
        yield from files.rows(path, split)


def _split_of(path: Path, folder: Path) -> str:
    """The split that a file's own name or its folder's says, e.g. data/train_prefs-00000-of-00001.parquet;
    "train" where they say none."""
    known = {word for words in files.SPLITS.values() for word in words}
    for name in (path.name, *reversed(path.relative_to(folder).parts[:-1])):
        stem = re.sub(r"([-_.]?\d+([-_.]of[-_.]\d+)?)?(\.\w+)*$", "", name)
        if re.split(r"[-_.]", stem)[0] in known:
            return stem
    return "train"


def _named_split(place: Any, suffixes: list[str]) -> str | None:
    """What follows a file or folder after a colon. Raises ValueError for more than a split."""
    if len(suffixes) > 1:
        raise ValueError(f"{place}: only a split may follow it, not {':'.join(suffixes)}")
    return suffixes[0] if suffixes else None


def _split_among(place: Any, found: Sequence[str], named: str | None, split: str) -> str:
    """The split of those found that was named, or is a synonym of the one that is needed. Raises
    ValueError."""
    for name in [named] if named is not None else files.SPLITS.get(split, (split,)):
        if name in found:
            return name
    wanted = split if named is None else named
    raise ValueError(
        f"{place}: no split {wanted!r}; it has {', '.join(sorted(found))}: add one after a colon"
    )


# ---- the hub
# ---------------------------------------------------------------------------------------------------------


def _hub_rows(name: str, suffixes: list[str], split: str) -> Iterator[tuple[str, Any]]:
    def load(hub: Any) -> Any:
        config, chosen = _config_and_split(hub, name, suffixes, split)
        return hub.load_dataset(name, config, split=chosen)

    for index, row in enumerate(_hub(name, load)):
        yield f"{name}[{index}]", row


def _config_and_split(hub: Any, name: str, suffixes: list[str], split: str) -> tuple[str | None, str]:
    """What follows a name: a configuration and a split, or one of the two."""
    configs = hub.get_dataset_config_names(name)
    config = suffixes[0] if suffixes and (len(suffixes) == 2 or suffixes[0] in configs) else None
    if config and config not in configs:
        raise ValueError(f"no configuration {config!r}; it has {', '.join(configs)}")
    if config is None and len(configs) > 1 and "default" not in configs:
        raise ValueError(f"several configurations; add one of {', '.join(configs)} after a colon")
    named = suffixes[1:] if config else suffixes
    splits = hub.get_dataset_split_names(name, config)
    return config, _split_among(name, splits, _named_split(name, named), split)


def _hub(source: str, ask: Callable[[Any], Any]) -> Any:
    import datasets as hub

    hub.disable_progress_bars()
    try:
        return ask(hub)
    except Exception as error:  # the library raises a dozen unrelated types for one user's mistake
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source}: {cause.removeprefix(f'{source}: ')}") from error
