"""Answers and what they are worth: the answers to a prompt from any data, and a number for each.

    prompts, chunks      rows of any layout -> the answers to each prompt, some prompts at a time
    add_flags, load      a scorer by its name; score, the scores of some prompts' answers by it
    state                changes when a scorer may have changed
    lower_tail           the mean of the worst scores

A scorer is a function: examples of one answer each in, and the ids of the answers; for each a score, higher
is better, or the reason why there is none. By its name it is

    DIRECTORY, org/name    a classifier of transformers: the logit of a reward model, or the log-probability
                           of one label
    module:function        of a Python file: function(prompt turns, completion text) -> a number

A classifier reads the conversation as its own tokenizer's chat template writes it (what reward models of
align.py are trained on), without the oldest turns where it is too long. One of several labels whose tokenizer
has no template reads prompt and completion run together.

Left out: classifiers that do not fit one device; reward models with heads of their own kind.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import math
import numbers
import os
import re
import sys
import traceback
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

import chat
import config
import data
import encode
import formats
import loading
import precision
import values
from formats import Example, Fault

Scorer = Callable[[Sequence[Example], Sequence[str]], list[float | str]]  # of examples and of their ids
PART = 128  # answers scored between two writes; batches are made within them
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
RANDOM = "its scores would be random"


class Prompt(NamedTuple):
    """A prompt and its answers."""

    name: str  # of the prompt: the number of its row, or that of an id "17-0"
    ids: list[str]  # of the answers
    example: Example  # the prompt and the answers, with the scores of the data
    text: str | None = None  # the prompt, where the data has a string; None: it has turns
    subset: str = ""  # what the row says under that key
    places: Sequence[str] = ()  # of the answers: file:line


# ---- answers
# ---------------------------------------------------------------------------------------------------------


def prompts(sources: Sequence[str], split: str, left_out: Counter) -> Iterator[Prompt]:
    """The prompts of all sources in their order, each with its answers; the reasons of rows that have none
    are counted.

    A row of several answers is a prompt, and so are rows of one answer that follow each other and have the
    same prompt; where ids are "prompt-answer", as sample.py writes them, only if that says so too. An answer
    has its row's "id", or "row-answer". Raises ValueError as data.stream does.
    """
    found = _answered(sources, split, left_out)
    for _, rows in groupby(found, key=lambda row: row[0]):
        yield _joined([prompt for _, prompt in rows])


def _answered(sources: Sequence[str], split: str, left_out: Counter) -> Iterator[tuple[str, Prompt]]:
    """Each row with an answer, and what rows of the same prompt have in common."""
    rows = (row for source in sources for row in _rows(source, split))
    for number, (source, found, row) in enumerate(rows):
        if not isinstance(found, Example) or not found.completions:
            reason = "it has no answer" if isinstance(found, Example) else found
            left_out[reason.reason if isinstance(reason, Fault) else reason] += 1
            continue
        count = len(found.completions)
        given = row.get("id") if count == 1 and isinstance(row.get("id"), str) else None
        sampled = re.fullmatch(r"(\d+)-\d+", given or "")
        name = sampled[1] if sampled else str(number)
        ids = [given] if given else [f"{number}-{index}" for index in range(count)]
        alone = count > 1 or not (sampled or found.prompt)
        said = (source, sampled and name, found.prompt, found.rendering)
        key = str(number) if alone else json.dumps(said, default=repr)
        subset = row.get("subset") if isinstance(row.get("subset"), str) else ""
        yield key, Prompt(name, ids, found, _prompt_text(found, row), subset, [found.where] * count)


def _rows(source: str, split: str) -> Iterator[tuple[str, Example | Fault | str, dict[str, Any]]]:
    """(source, what it is read as, row) of every row; of a named dataset the row is not known."""
    empty = True
    if source.partition("=")[0] in data.datasets():
        found = ((source, example, {}) for example in data.stream(source, split))
    else:
        found = ((source, formats.parse(row, where), row) for where, row in data.rows(source, split))
    for row in found:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{source}: no examples")


def _prompt_text(example: Example, row: dict[str, Any]) -> str | None:
    said = row.get("prompt")
    if not example.prompt:
        return ""
    return said if isinstance(said, str) and values.prompt(said) == example.prompt else None


def _joined(rows: list[Prompt]) -> Prompt:
    examples = [row.example for row in rows]
    whole = examples[0]._replace(
        completions=[answer for example in examples for answer in example.completions],
        scores=[score for example in examples for score in example.scores],
        labelled=all(example.labelled for example in examples),
    )
    ids, places = ([it for row in rows for it in getattr(row, name)] for name in ("ids", "places"))
    return rows[0]._replace(ids=ids, example=whole, places=places)


def chunks(found: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts that have about PART answers together, whatever scores them."""
    chunk, size = [], 0
    for prompt in found:
        chunk.append(prompt)
        size += len(prompt.ids)
        if size >= PART:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def score(chunk: Sequence[Prompt], scorer: Scorer) -> list[list[float | str]]:
    """For each prompt the scores of its answers, a reason in the place of one that cannot be had. Raises
    ValueError, with the place and the id of the answer, for a score that is not a finite number, or where a
    function of the user's raises."""
    single = [
        prompt.example._replace(completions=[answer], scores=[0.0], where=place)
        for prompt in chunk
        for place, answer in zip(prompt.places, prompt.example.completions)
    ]
    found = iter(scorer(single, [id for prompt in chunk for id in prompt.ids]))
    return [[next(found) for _ in prompt.ids] for prompt in chunk]


def lower_tail(scores: np.ndarray, weights: np.ndarray | None = None, share: float = 0.05) -> float:
    """The mean of the worst (lowest) `share` of the scores (n,), by their weights (n,): the CVaR of their
    distribution, the score at the threshold split exactly; with fewer than 1 / share scores the lowest."""
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(scores)
    target = share * weights.sum()
    after = np.minimum(np.cumsum(weights[order]), target)  # (n,) mass up to and with each
    return float(np.diff(after, prepend=0.0) @ scores[order] / target)


# ---- scorers
# ---------------------------------------------------------------------------------------------------------


def add_flags(made: argparse.ArgumentParser) -> None:
    """The flags of a scorer."""
    group = made.add_argument_group("scorer")
    add = group.add_argument
    add("--by", default=None, help="a reward model or classifier (directory or hub name), module:function")
    add("--label", default=None, help="of a classifier: the label whose log-probability is the score")
    add("--chat-template", default=None, help="plain, none, a name or a file; None: the classifier's own")
    add("--max-length", type=config.count, default=None, help="tokens; None: the classifier's positions")
    add("--batch-size", type=config.count, default=16, help="answers at a time")
    add("--dtype", choices=("bfloat16", "float32"), default="float32", help="of a classifier")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--trust-remote-code", type=config.boolean, default=False, metavar="true|false")


def load(args: argparse.Namespace) -> Scorer | None:
    """The scorer that --by names; None without. Raises ValueError: there is none of that name, or no scorer;
    weights of it are missing; a label that it does not have, or several and none is named."""
    if args.by and not _is_function(args.by):
        return _classifier(args)
    refuse_flags(args)
    return _function(args.by) if args.by else None


def refuse_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag of classifiers where --by is none."""
    for flag in ("label", "chat_template", "max_length"):
        if getattr(args, flag) is not None:
            flag = flag.replace("_", "-")
            raise ValueError(f"--{flag}: --by {args.by} is no classifier (leave it out)")


def state(name: str) -> str:
    """Changes when a scorer may have changed: the sizes and times of the files of a directory, the code of a
    module (not of what it imports). A name on the hub stands for itself."""
    if _is_function(name):
        found = _specification(name.partition(":")[0])
        place = Path(found.origin or "") if found else None
        return hashlib.sha256(place.read_bytes()).hexdigest() if place and place.is_file() else name
    return data.state(name, "") if Path(name).exists() else name


def _is_function(name: str) -> bool:
    return FUNCTION.fullmatch(name) is not None and not Path(name).exists()


def _specification(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there must not stand for one of ours
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a package around it
        return None
    except Exception as error:  # of the code of that package
        raise ValueError(f"--by {module}: {_raised(error)}") from error


def _raised(error: Exception) -> str:
    """What code that is the user's own has raised, and where in it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f" (in {Path(last.filename).name}:{last.lineno})" * (not last.filename.startswith("<"))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _function(name: str) -> Scorer:
    module, _, attribute = name.partition(":")
    if _specification(module) is None:
        raise ValueError(f"--by {name}: no module {module} in this folder or on Python's path")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise ValueError(f"--by {name}: {_raised(error)}") from error
    if not callable(function):
        raise ValueError(f"--by {name}: no function {attribute} in {module}")

    def scores(examples: Sequence[Example], ids: Sequence[str]) -> list[float | str]:
        found = []
        for example, id in zip(examples, ids):
            answer, where = example.completions[0], f"{example.where}: answer {id}: {name}"
            turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            try:
                value = function([*example.prompt, *turns[:-1]], turns[-1]["content"])
            except Exception as error:
                raise ValueError(f"{where}: {_raised(error)}") from error
            if not isinstance(value, numbers.Real) or not abs(value) <= sys.float_info.max:
                raise ValueError(f"{where} gave {values.shown(value)} (a finite number)")
            found.append(float(value))
        return found

    return scores


def _classifier(args: argparse.Namespace) -> Scorer:
    device = precision.device(args.device, args.dtype, config.tell)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is visible")
    tokenizer = loading.load_tokenizer(args.by, args.trust_remote_code)
    classifier = _load_classifier(args).to(device).eval()
    label = _label(args, classifier.config)
    template = _template(args, tokenizer, classifier.config)
    limit = _longest(args, tokenizer, classifier.config)

    def scores(examples: Sequence[Example], ids: Sequence[str]) -> list[float | str]:
        found = [_ids(example, tokenizer, template, limit) for example in examples]
        order = [index for index, ids in enumerate(found) if not isinstance(ids, str)]
        order.sort(key=lambda index: len(found[index]))  # little padding
        for first in range(0, len(order), args.batch_size):
            batch = order[first : first + args.batch_size]
            for index, value in zip(batch, _logits(classifier, [found[index] for index in batch], label)):
                if not math.isfinite(value):
                    where = f"{examples[index].where}: answer {ids[index]}"
                    raise ValueError(f"{where}: {args.by} gave {value} (a finite number)")
                found[index] = value
        return found

    return scores


def _load_classifier(args: argparse.Namespace) -> Any:
    loading.check(args.by, "random")  # the files of its weights follow: a language model is told so first
    settings = loading.settings(args.by, args.trust_remote_code)
    with loading.one_line(args.by):
        kinds = [*(settings.architectures or []), *(getattr(settings, "auto_map", None) or {})]
        if kinds and not any("SequenceClassification" in kind for kind in kinds):
            raise ValueError(f"not a classifier but {kinds[0]}: {RANDOM}")
        loading.check(args.by)
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            args.by,
            config=settings,
            dtype=getattr(torch, args.dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **loading.options(args.by, args.trust_remote_code),
        )
        wrong = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
        if wrong:
            raise ValueError(f"{len(wrong)} weights missing or misshapen (first: {wrong[0]}): {RANDOM}")
    return classifier


def _label(args: argparse.Namespace, settings: Any) -> int | None:
    """The index of the label whose log-probability is the score; None: the one logit is."""
    if settings.num_labels == 1:
        if args.label is not None:
            raise ValueError(f"--label {args.label}: {args.by} has one label (leave it out)")
        return None
    known = settings.label2id
    if args.label not in known:
        said = f"--label {args.label}: no label of {args.by}"
        said = f"{args.by}: has {len(known)} labels, one must be named" if args.label is None else said
        raise ValueError(f"{said} (--label {', '.join(sorted(known, key=known.get))})")
    return known[args.label]


def _template(args: argparse.Namespace, tokenizer: Any, settings: Any) -> chat.Template | None:
    """How a conversation is written; None: prompt and completion run together."""
    if args.chat_template is None and tokenizer.chat_template is None:
        if settings.num_labels == 1:
            raise ValueError(f"{args.by}: has no chat template (--chat-template plain, none or a file)")
        return None
    return None if args.chat_template == "none" else chat.chat_template(tokenizer, args.chat_template)


def _longest(args: argparse.Namespace, tokenizer: Any, settings: Any) -> int:
    """Tokens that a classifier reads at most."""
    positions = getattr(settings.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    longest = min(positions, tokenizer.model_max_length, 2**20)
    if args.max_length is not None and args.max_length > longest:
        raise ValueError(f"--max-length {args.max_length} exceeds the {longest} tokens of {args.by}")
    return args.max_length or longest


def _ids(example: Example, tokenizer: Any, template: chat.Template | None, limit: int) -> list[int] | str:
    """What a classifier reads, or the reason why there is nothing to read."""
    if template is not None:
        try:
            return encode.conversation_ids(example, tokenizer, limit, template)[0]
        except ValueError as error:
            return str(error)
    answer = example.completions[0]
    turns = [*example.prompt, *([{"content": answer}] if isinstance(answer, str) else answer)]
    ids = tokenizer("".join(turn["content"] for turn in turns), verbose=False)["input_ids"]
    return ids if len(ids) <= limit else f"longer than the {limit} tokens that the classifier reads"


@torch.no_grad()
def _logits(classifier: Any, rows: list[list[int]], label: int | None) -> list[float]:
    """The score of each row of ids, padded on the right."""
    settings = classifier.config.get_text_config()
    own = settings.pad_token_id
    # Such a classifier reads the last token that is not padding: where none is set, the last of all. Then any
    # id pads that ends no row.
    ends = {ids[-1] for ids in rows}
    padding = next(id for id in range(len(rows) + 1) if id not in ends) if own is None else own
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)  # (B, L)
    mask = torch.zeros_like(ids)  # (B, L)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    settings.pad_token_id = padding
    try:
        logits = classifier(ids.to(classifier.device), attention_mask=mask.to(classifier.device)).logits
    finally:
        settings.pad_token_id = own
    logits = logits.float()  # (B, labels)
    if label is None:
        return logits[:, 0].tolist()
    if classifier.config.problem_type == "multi_label_classification":  # labels do not exclude each other
        return torch.nn.functional.logsigmoid(logits)[:, label].tolist()
    return logits.log_softmax(-1)[:, label].tolist()
