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
`published` gives it its rows, formats.py reads most of them. `--data NAME` finds it.

A fault of a file (no JSON, not UTF-8, cut off) is a ValueError that reads "file:line: what is wrong". Rows
are read one at a time: memory does not grow with their number.

Left out: reading from object stores.
"""

import inspect
import re
import sys
from collections import Counter, defaultdict
from itertools import groupby
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
    name, named, place = source.partition("=")
    if name in datasets() and named and not place:
        raise ValueError(f"{source}: a place must follow the =, or leave both out")
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
    found = [name for name, function in functions if function.__annotations__.get("return") == Rows]
    return [name for name in found if not name.startswith("_")]


def state(source: str, split: str) -> str:
    """Changes when the rows of a source may have changed: the sizes and times of its files, or the commit of
    a dataset of the hub. What a dataset function reads from elsewhere is not known here."""
    name, _, place = source.partition("=")
    if name in datasets():
        default = inspect.signature(getattr(sys.modules[__name__], name)).parameters.get("source")
        place = place or (default.default if default else "")
    path, *suffixes = _parts(place or source)
    if Path(path).exists():
        inside = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
        stats = [(str(file.resolve()), file.stat()) for file in inside if file.is_file()]
        version = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    elif _on_hub(path):
        version = Path(_hub_file(path, ".gitattributes", "README.md")).parent.name
    else:
        return source
    return f"{name} {split} {suffixes} {version}"


# ---- named datasets
# ---------------------------------------------------------------------------------------------------------

HELPFUL = ("helpful-base", "helpful-online", "helpful-rejection-sampled")
HARMLESS = ("harmless-base",)
MIN_SCORE_RATIO = 2.0  # of shp
MAX_PAIRS = 5  # of one prompt of shp
DISORDER = "roles do not alternate"


def hh(split: str, source: str = "Anthropic/hh-rlhf") -> Rows:
    """Anthropic's helpful and harmless dialogues (arXiv:2204.05862), from the hub, a directory or a file.

    A row is two whole dialogues "\\n\\nHuman: ...\\n\\nAssistant: ...". The prompt is what stands before the
    last "\\n\\nAssistant:". Left out, with the reason: prompts that differ, roles that do not alternate,
    empty answers. The repository's red-team-attempts are no pairs and not read. Differs from the published
    code, which assigns roles by parity and ignores the rejected dialogue's prompt.
    """
    yield from _hh(split, source, (*HELPFUL, *HARMLESS))


def hh_helpful(split: str, source: str = "Anthropic/hh-rlhf") -> Rows:
    """The helpful dialogues of `hh`: base, online and rejection-sampled. Differs from HALOs, which reads
    helpful-base alone: that is hh_helpful=DIR/helpful-base here."""
    yield from _hh(split, source, HELPFUL)


def hh_harmless(split: str, source: str = "Anthropic/hh-rlhf") -> Rows:
    """The harmless dialogues of `hh`."""
    yield from _hh(split, source, HARMLESS)


def _hh(split: str, source: str, folders: Sequence[str]) -> Rows:
    """The pairs of some of the repository's folders; of a file, or a directory without any of them, all."""
    place, *suffixes = _parts(source)
    there = [folder for folder in (*HELPFUL, *HARMLESS) if (Path(place) / folder).is_dir()]
    places = [source]
    if there:
        places = [":".join([str(Path(place) / folder), *suffixes]) for folder in there if folder in folders]
    elif _on_hub(place) and set(folders) != {*HELPFUL, *HARMLESS}:
        name = suffixes[-1] if suffixes else split
        places = [_hub_file(place, f"{folder}/{name}.jsonl.gz") for folder in folders]
    if not places:
        raise ValueError(f"{place}: no {', '.join(folders)} in it")
    for each in places:
        for where, row in published(each, split, {"chosen": str, "rejected": str}):
            yield _example(where, formats.hh_pair, row["chosen"], row["rejected"])


def shp(split: str, source: str = "stanfordnlp/SHP") -> Rows:
    """Stanford Human Preferences (arXiv:2110.08420): two comments on a Reddit post, the better one by
    "labels" (1: A).

    Of pairs whose scores differ by a factor of 2 or more, the first five of each post. Differs from HALOs,
    which draws five at random, and leaves the test split as it is.
    """
    form = {"history": str, "human_ref_A": object, "human_ref_B": object, "labels": object}
    pairs = Counter()  # hash of a prompt -> how many pairs it has; the texts are not held
    for where, row in published(source, split, form | {"score_ratio": int | float}):
        prompt = hash(row["history"])
        if row["score_ratio"] < MIN_SCORE_RATIO:
            yield f"a score ratio below {MIN_SCORE_RATIO:g}"
        elif pairs[prompt] == MAX_PAIRS:
            yield f"more than {MAX_PAIRS} pairs of one prompt"
        else:
            found = _example(where, formats.shp, *[row[key] for key in form])
            pairs[prompt] += isinstance(found, Example)
            yield found


def oasst(split: str, source: str = "OpenAssistant/oasst1") -> Rows:
    """OpenAssistant's conversation trees (arXiv:2304.07327), from its flat list of messages.

    Each message of a prompter is one row: the conversation up to it is the prompt, its ranked answers are the
    completions, best first. Messages that are deleted or not in English are left out, and what follows them.
    Differs from HALOs, which makes pairs of neighbours in rank, those of two prompters too.
    """
    form = dict.fromkeys(("message_id", "message_tree_id", "role", "text", "lang"), str)
    for _, group in groupby(published(source, split, form), key=lambda item: item[1]["message_tree_id"]):
        tree = {message["message_id"]: (where, message) for where, message in group}
        answers = defaultdict(list)
        for _, message in tree.values():
            kept = message["lang"] == "en" and not message.get("deleted")
            if kept and message.get("rank") is not None:
                answers[message.get("parent_id")].append({"answer": message["text"], "rank": message["rank"]})
        for where, message in tree.values():
            if message["role"] == "prompter":
                ranked = sorted(answers[message["message_id"]], key=lambda answer: answer["rank"])
                found = _oasst_thread(message, tree)
                if not isinstance(found, str):
                    few = "fewer than two ranked answers"
                    found = _example(where, formats.nectar, found, ranked) if len(ranked) > 1 else few
                yield found


def _oasst_thread(message: dict[str, Any], tree: dict[str, tuple]) -> list[dict[str, str]] | str:
    """The turns of a tree down to a message, or the reason why they are no prompt."""
    thread = [message]
    while (parent := thread[0].get("parent_id")) is not None:
        if parent not in tree or len(thread) == len(tree):
            return "a message before it is missing"
        thread.insert(0, tree[parent][1])
    if any(message.get("deleted") for message in thread):
        return "deleted, or after a deleted message"
    if any(message["lang"] != "en" for message in thread):
        return "not in English, or after such a message"
    return [{"role": message["role"], "content": message["text"]} for message in thread]


def ultrabin(split: str, source: str = "HuggingFaceH4/ultrafeedback_binarized") -> Rows:
    """UltraFeedback as pairs (arXiv:2310.01377, 2310.16944): the best by GPT-4's score against one of the
    others. Splits are train_prefs and test_prefs. Pairs with equal scores are kept."""
    form = {"prompt": object, "chosen": list, "rejected": list}
    for where, row in published(source, f"{split}_prefs", form):
        yield _example(where, formats.pair, row["prompt"], row["chosen"], row["rejected"])


def ultrafeedback_hybrid(split: str, source: str = "wzhouad/gemma-2-ultrafeedback-hybrid") -> Rows:
    """UltraFeedback's prompts with answers of gemma-2-9b-it and of GPT-4-turbo, the best against the worst by
    a reward model (WPO, arXiv:2406.11827)."""
    for where, row in published(source, split, {"prompt": object, "chosen": list, "rejected": list}):
        yield _example(where, formats.pair, row["prompt"], row["chosen"], row["rejected"])


def nectar(split: str, source: str = "berkeley-nest/Nectar") -> Rows:
    """Nectar: seven answers a prompt, ranked by GPT-4. It has no split but train."""
    for where, row in published(source, split, {"prompt": str, "answers": object}):
        found = _example(where, formats.nectar, row["prompt"], row["answers"])
        first = found.prompt[0]["content"] if isinstance(found, Example) and found.prompt else ""
        yield DISORDER if first.lstrip().startswith("Human:") else found  # left as it was: no dialogue


def helpsteer(split: str, source: str = "nvidia/HelpSteer2") -> Rows:
    """HelpSteer2 (arXiv:2406.08673): the answers to a prompt, whose rows follow each other, best first by
    "helpfulness" (0 to 4), which may be equal. The other four attributes, and the later annotations in the
    repository's folder preference, are not read."""
    found = published(source, split, {"prompt": str, "response": object, "helpfulness": int | float})
    for prompt, group in groupby(found, key=lambda item: item[1]["prompt"]):
        places, answers = zip(*group)
        answers = sorted(answers, key=lambda row: -row["helpfulness"])
        lists = [[row[key] for row in answers] for key in ("response", "helpfulness")]
        turns = _helpsteer_turns(prompt)
        yield DISORDER if turns is None else _example(places[0], formats.ranked_list, turns, *lists)


def _helpsteer_turns(prompt: str) -> list[dict[str, str]] | None:
    """Turns of "question\\n<extra_id_1>Assistant\\nanswer\\n<extra_id_1>User\\nquestion", or None unless they
    alternate from user to user."""
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
    turns = [("user", first), *zip(map(str.lower, rest[::2]), rest[1::2])]
    alternate = all(role == ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns))
    complete = alternate and len(turns) % 2 == 1 and not any("<extra_id_1>" in text for _, text in turns)
    return [{"role": role, "content": text} for role, text in turns] if complete else None


def safe_rlhf(split: str, source: str = "PKU-Alignment/PKU-SafeRLHF") -> Rows:
    """PKU-SafeRLHF (arXiv:2406.15513). The label read is "better_response_id": which answer is more helpful,
    however harmful; "safer_response_id" and "is_response_*_safe" are not read. One label for both is in
    safe_rlhf=PKU-Alignment/PKU-SafeRLHF-single-dimension, which is what HALOs reads."""
    form = {"prompt": object, "response_0": object, "response_1": object, "better_response_id": int | None}
    for where, row in published(source, split, form):
        answers = (row["response_0"], row["response_1"])
        order = {0: answers, 1: answers[::-1]}.get(row["better_response_id"])
        yield _example(where, formats.pair, row["prompt"], *order) if order else "neither answer is better"


def ultrachat(split: str, source: str = "HuggingFaceH4/ultrachat_200k") -> Rows:
    """UltraChat's dialogues as filtered for Zephyr (arXiv:2310.16944), every answer trained. Splits are
    train_sft and test_sft."""
    for where, row in published(source, f"{split}_sft", {"messages": object}):
        yield _example(where, formats.messages, row["messages"])


def alpacaeval(split: str, source: str = "tatsu-lab/alpaca_eval") -> Rows:
    """AlpacaEval's 805 prompts, the same whatever the split, to sample answers to; the answers of other
    models that come with them are not read."""
    file = "alpaca_eval.json"
    if (Path(source) / file).is_file():
        source = str(Path(source) / file)
    elif _on_hub(source):  # where a script stands beside it, which `datasets` does not run
        source = _hub_file(source, file)
    for where, row in published(source, "test", {"instruction": object}):
        yield _example(where, formats.instruction, row["instruction"])


def imdb(split: str, source: str = "stanfordnlp/imdb") -> Rows:
    """Film reviews (Maas et al. 2011) as plain text, for supervised fine-tuning before alignment on
    sentiment."""
    for where, row in published(source, split, {"text": str}):
        yield _example(where, formats.text, row["text"].replace("<br />", "\n").strip())


def published(source: str, split: str, form: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a dataset in its published form: key -> type. Raises ValueError for any other row."""
    for where, row in rows(source, split, only_named=True):
        row = row if isinstance(row, dict) else {}
        wrong = [key for key, kind in form.items() if key not in row or not isinstance(row[key], kind)]
        if wrong:
            raise ValueError(
                f"{where}: not a row of the published dataset, which has {', '.join(form)}; it lacks, or has "
                f"as another type, {', '.join(wrong)}"
            )
        yield where, row


def _example(where: str, layout: Callable, *values: Any) -> Example | str:
    """What a layout of formats.py makes of the values of a row, or the reason why they are unusable."""
    try:
        found = layout(*values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return found if isinstance(found, str) else formats.unusable(found) or found._replace(where=where)


# ---- where rows come from
# ---------------------------------------------------------------------------------------------------------


def rows(source: str, split: str, only_named: bool = False) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file, a folder or a name on the hub; with `only_named` not of a folder's files whose
    names say no split, if there are others. Raises ValueError."""
    path, *suffixes = _parts(source)
    if len(suffixes) > 2:
        raise ValueError(f"{source}: at most a configuration and a split may follow a name")
    if Path(path).is_file():
        yield from files.rows(Path(path), split, _named_split(path, suffixes))
    elif path and Path(path).is_dir():
        yield from _folder_rows(Path(path), suffixes, split, only_named)
    elif _is_path(path):
        raise ValueError(f"{path}: no such file or directory")
    elif _on_hub(path):
        yield from _hub_rows(path, suffixes, split)
    else:
        raise ValueError(
            f"{source}: neither a dataset ({', '.join(datasets())}; NAME=DIR reads local files) nor a file, "
            "a folder or org/name of the hub"
        )


def _parts(source: str) -> list[str]:
    """A path or name, and what follows it after colons."""
    return [source] if Path(source).exists() else source.split(":")


def _is_path(name: str) -> bool:
    return files.suffix(Path(name)) in files.SUFFIXES or files.looks_local(name)


def _on_hub(name: str) -> bool:
    return not _is_path(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _folder_rows(
    folder: Path, suffixes: list[str], split: str, only_named: bool
) -> Iterator[tuple[str, Any]]:
    """Rows of a folder: what `save_to_disk` wrote, a hub-style folder whose README names its files, or all
    data files of the split, in the order of their names."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        named = _named_split(folder, suffixes)
        found = _hub(str(folder), lambda hub: hub.load_from_disk(str(folder)))
        if isinstance(found, dict):
            found = found[_split_among(folder, list(found), named, split)]
        elif named:
            raise ValueError(f"{folder}: no split {named!r}: it is one dataset without splits")
        yield from ((f"{folder}[{index}]", files.without_nulls(row)) for index, row in enumerate(found))
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
    unnamed = by_split.pop("", [])
    if unnamed and not (only_named and by_split):
        by_split["train"] = sorted(by_split.get("train", []) + unnamed)
    chosen = _split_among(folder, list(by_split), _named_split(folder, suffixes), split)
    for path in by_split[chosen]:
        yield from files.rows(path, split)


def _split_of(path: Path, folder: Path) -> str:
    """The split that a file's own name or its folder's says, e.g. data/train_prefs-00000-of-00001.parquet
    (or ...-of-00001-0123456789abcdef.parquet); empty where they say none."""
    known = {word for words in files.SPLITS.values() for word in words}
    for name in (path.name, *reversed(path.relative_to(folder).parts[:-1])):
        stem = re.sub(r"([-_.]?\d+([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?)?(\.\w+)*$", "", name)
        if re.split(r"[-_.]", stem)[0] in known:
            return stem
    return ""


def _named_split(place: Any, suffixes: list[str]) -> str | None:
    """What follows a file or folder after a colon. Raises ValueError for more than a split."""
    if len(suffixes) > 1:
        raise ValueError(f"{place}: only a split may follow it, not {':'.join(suffixes)}")
    return suffixes[0] if suffixes else None


def _split_among(place: Any, found: Sequence[str], named: str | None, split: str) -> str:
    """The split of those found that was named, or is a synonym of the one that is needed. Raises
    ValueError."""
    for name in [named] if named is not None else files.split_names(split):
        if name in found:
            return name
    wanted = split if named is None else named
    raise ValueError(
        f"{place}: no split {wanted!r}; it has {', '.join(sorted(found))}: add one after a colon"
    )


# ---- the hub
# ---------------------------------------------------------------------------------------------------------


def _hub_file(name: str, *names_of_files: str) -> str:
    """Where the first of these files that a dataset of the hub has was downloaded to: .../COMMIT/file."""

    def download(_: Any) -> str:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        for file in names_of_files:
            try:
                return huggingface_hub.hf_hub_download(name, file, repo_type="dataset")
            except EntryNotFoundError as error:
                missing = error
        raise missing

    return _hub(name, download)


def _hub_rows(name: str, suffixes: list[str], split: str) -> Iterator[tuple[str, Any]]:
    def load(hub: Any) -> Any:
        config, chosen = _config_and_split(hub, name, suffixes, split)
        return hub.load_dataset(name, config, split=chosen)

    for index, row in enumerate(_hub(name, load)):
        yield f"{name}[{index}]", files.without_nulls(row)


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
