"""From a row in a file to token ids: Example -> Encoded.

    read / load    files and named datasets -> Example (text)
    encode         Example -> Encoded (token ids; the prompt once, each completion with its trained mask)

JSONL rows (also a .json list of them); a prompt is a string (one user turn) or a list of {"role", "content"}
turns, a completion a string or a list with one assistant turn:

    {"prompt", "chosen", "rejected"}            a pair; optional "weight", "margin"
    {"prompt", "completions", "scores"}         a ranked list, higher is better
    {"prompt", "completion", "label"}           one completion, desirable or not: true or false
    {"prompt", "completion"}                    one completion, for sft.py
    {"messages"}                                a conversation, every assistant turn trained
    {"text"}                                    plain text

Adding a dataset = adding one public function here, annotated `-> Iterator[Example | str]`: it yields an
Example, or, for a row that cannot be used, the reason as a string, which is counted and printed. `--data
NAME` finds it.

A mistake in a file is a ValueError that reads "file:line: what is wrong; what would be right".

Left out: tools and images in turns, special tokens spelled out inside user text (they are tokenised as
special, as transformers' chat templates do).
"""

import gzip
import inspect
import json
import os
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, NamedTuple, Sequence

import torch

MAX_LINE_BYTES = 2**24
ROLES = ("system", "user", "assistant", "tool")
# For tokenizers without a chat template: the form of Anthropic's HH dialogues, which DPO's authors trained
# on.
PLAIN = (
    "{% for m in messages %}"
    "{{ '\n\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(m.role, m.role | capitalize) }}"
    "{{ ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
# Prompt and completion are one running text, as for continuing a film review.
RAW = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {"plain": PLAIN, "raw": RAW}
# Of conditional SFT: before desirable and undesirable completions; sampling asks for a desirable one.
CONTROL_TOKENS = ("<|good|>", "<|bad|>")
ASK_FOR_GOOD = "{% if add_generation_prompt %}" + CONTROL_TOKENS[0] + "{% endif %}"
NO_BETTER = "no completion is the better one"  # why a row is left out


class Example(NamedTuple):
    prompt: list[dict[str, str]]  # turns; [] for plain text
    completions: list[str | list[dict[str, str]]]  # answers; a list of turns is the rest of a conversation
    scores: list[float]  # one per completion, higher is better
    weight: float = 1.0  # of this example in the loss
    margin: float = 0.0  # how much better the best is than the worst, for losses that use it
    where: str = ""  # file:line, for error messages
    labelled: bool = True  # False: the scores say nothing


class Encoded(NamedTuple):
    prompt: list[int]  # token ids
    completions: list[list[int]]  # token ids
    trained: list[list[bool]]  # per completion token: is it predicted by the loss
    scores: list[float]
    weight: float = 1.0
    margin: float = 0.0
    labels: list[bool] = []  # per completion: is it desirable; empty: by the scores
    key: int | None = None  # of the prompt, where `prompt` is not all of it

    @property
    def prompt_key(self) -> int:
        """Equal for equal prompts, and in 2**-64 of all cases for others."""
        return hash(tuple(self.prompt)) if self.key is None else self.key

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def trained_tokens(self) -> int:
        return sum(map(sum, self.trained))


# ---- readers
# ---------------------------------------------------------------------------------------------------------


def load(source: str, split: str) -> tuple[list[Example], Counter]:
    """The whole `stream` at once: examples, and a count of the rows left out by reason."""
    examples = []
    dropped = Counter()
    for row in stream(source, split):
        if isinstance(row, str):
            dropped[row] += 1
        else:
            examples.append(row)
    return examples, dropped


def stream(source: str, split: str) -> Iterator[Example | str]:
    """Rows of `NAME`, `NAME=SOURCE` (a dataset function and where its files are) or a .jsonl or .json file,
    one at a time: an Example, or the reason why there is none.

    Raises ValueError (see the module) for anything that cannot be read, and if there are no examples.
    """
    name, _, place = source.partition("=")
    if name in datasets():
        rows = getattr(sys.modules[__name__], name)(split, *([place] if place else []))
    elif source.removesuffix(".gz").endswith((".jsonl", ".json")):
        rows = read(source)
    else:
        known = ", ".join(datasets())
        raise ValueError(
            f"{source}: neither a dataset ({known}; NAME=DIR reads local files) nor a .jsonl or .json file"
        )
    empty = True
    for row in rows:
        empty = empty and isinstance(row, str)
        yield row
    if empty:
        raise ValueError(f"{source}: no examples")


def state(source: str, split: str) -> str:
    """Changes when the rows of a source may have changed: the sizes and times of its files, or the version of
    a dataset of the hub. What a dataset function reads from elsewhere is not known here."""
    name, _, place = source.partition("=")
    if name in datasets():
        default = inspect.signature(getattr(sys.modules[__name__], name)).parameters.get("source")
        place = place or (default.default if default else "")
    path = Path(place or source)
    if path.exists():
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{name} {found}"
    if name not in datasets() or place.count("/") != 1:
        return source
    return f"{name} {_hub(place, lambda hub: hub.load_dataset_builder(place).cache_dir, split)}"


def datasets() -> list[str]:
    """Names of the dataset functions of this file, by their annotation."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return [name for name, f in functions if f.__annotations__.get("return") == Iterator[Example | str]]


def hh(split: str, source: str = "Anthropic/hh-rlhf") -> Iterator[Example | str]:
    """Anthropic's helpful and harmless dialogues (arXiv:2204.05862), from the hub, a directory or a
    .jsonl(.gz) file.

    A row is two whole dialogues "\\n\\nHuman: ...\\n\\nAssistant: ...". The prompt is what stands before the
    last "\\n\\nAssistant:". Left out, with the reason: prompts that differ, roles that do not alternate,
    empty answers. Differs from the published code, which assigns roles by parity and ignores the rejected
    dialogue's prompt.
    """
    for row in _published_rows(source, split, ("chosen", "rejected")):
        chosen, rejected = (row[key].rpartition("\n\nAssistant:") for key in ("chosen", "rejected"))
        turns = _dialogue(chosen[0])
        answers = [chosen[2].strip(), rejected[2].strip()]
        if chosen[0] != rejected[0]:
            yield "the two dialogues differ before the last answer"
        elif any("\n\nHuman:" in answer for answer in (chosen[2], rejected[2])):
            yield "an answer holds another Human turn"
        elif turns is None:
            yield "roles do not alternate"
        elif not all(answers):
            yield "an answer is empty"
        else:
            yield Example(turns, answers, [1.0, 0.0])


def imdb(split: str, source: str = "stanfordnlp/imdb") -> Iterator[Example | str]:
    """Film reviews (Maas et al. 2011) as plain text, for supervised fine-tuning before alignment on
    sentiment."""
    for row in _published_rows(source, split, ("text",)):
        text = row["text"].replace("<br />", "\n").strip()
        yield Example([], [text], [1.0]) if text else "a review is empty"


def _published_rows(source: str, split: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a dataset in its published form: a .jsonl(.gz) file, a local directory or a name on the hub."""
    path = Path(source)
    if path.is_file():
        rows = _rows(path)
    elif os.sep in source and source.count("/") != 1 and not path.exists():
        raise ValueError(f"{source}: no such file or directory")
    else:
        rows = enumerate(_hub(source, lambda hub: hub.load_dataset(source, split=split), split))
    for where, row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            where = where if isinstance(where, str) else f"{source}[{where}]"
            raise ValueError(f"{where}: not a row of the published dataset, which has {', '.join(keys)}")
        yield row


def _hub(source: str, ask: Callable[[Any], Any], split: str) -> Any:
    import datasets as hub

    try:
        return ask(hub)
    except Exception as error:  # the library raises a dozen unrelated types for one user's mistake
        cause = str(error).splitlines()[0]
        raise ValueError(f"{source}: cannot load split {split!r}: {cause}") from error


def _dialogue(text: str) -> list[dict[str, str]] | None:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", or None unless they alternate from Human to Human."""
    turns = []
    for part in text.split("\n\nHuman:")[1:]:
        user, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": user.strip()})
        turns.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    alternate = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    complete = alternate and len(turns) % 2 == 1 and not text.split("\n\nHuman:")[0].strip()
    return turns if complete and all(turn["content"] for turn in turns) else None


def read(path: str | Path) -> Iterator[Example]:
    """Examples of a .jsonl file (or a .json list, or either with .gz) in the forms of the module's
    docstring."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    for where, row in _rows(path):
        yield _example(row, where)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of every non-blank line, or ("file[i]", value) of every item of a .json list."""
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    try:
        yield from _parsed(path, opened)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def _parsed(path: Path, opened: BinaryIO) -> Iterator[tuple[str, Any]]:
    with opened as file:
        if path.name.removesuffix(".gz").endswith(".json"):
            rows = _parse(file.read(), str(path))
            if not isinstance(rows, list):
                raise ValueError(f"{path}: not a JSON list of rows; use .jsonl for one row a line")
            yield from ((f"{path}[{index}]", row) for index, row in enumerate(rows))
            return
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            where = f"{path}:{number}"
            if len(line) == MAX_LINE_BYTES:
                raise ValueError(f"{where}: a line longer than {MAX_LINE_BYTES} bytes")
            if line.strip():
                yield where, _parse(line, where)


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not valid UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise ValueError(
            f'{where}: not an object; a row is {{"prompt": ..., "chosen": ..., "rejected": ...}}'
        )
    if "text" in row:
        return Example([], [_string(row["text"], "text", where)], [1.0], where=where, labelled=False)
    if "messages" in row:
        turns = _turns(row["messages"], "messages", where)
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise ValueError(f'{where}: "messages" has no assistant turn to train on')
        return Example(turns[: answers[0]], [turns[answers[0] :]], [1.0], where=where, labelled=False)
    prompt = _turns(_value(row, "prompt", where), "prompt", where)
    options = {key: _number(row[key], key, where) for key in ("weight", "margin") if key in row}
    if options.get("weight", 1.0) < 0:
        raise ValueError(f'{where}: "weight" must be >= 0, got {row["weight"]}')
    if "completion" in row:
        label = row.get("label", True)
        if not isinstance(label, bool):
            raise ValueError(f'{where}: "label" must be true or false, got {json.dumps(label)[:40]}')
        answer = _answer(row["completion"], "completion", where)
        return Example(prompt, [answer], [float(label)], where=where, labelled="label" in row, **options)
    if "completions" in row:
        answers = row["completions"]
        scores = _value(row, "scores", where)
        if (
            not isinstance(answers, list)
            or not isinstance(scores, list)
            or len(answers) != len(scores)
            or not answers
        ):
            raise ValueError(f'{where}: "completions" and "scores" must be lists of one length, at least 1')
        answers = [_answer(answer, f"completions[{i}]", where) for i, answer in enumerate(answers)]
        scores = [_number(score, f"scores[{i}]", where) for i, score in enumerate(scores)]
        return Example(prompt, answers, scores, where=where, **options)
    answers = [_answer(_value(row, key, where), key, where) for key in ("chosen", "rejected")]
    return Example(prompt, answers, [1.0, 0.0], where=where, **options)


def _value(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f'{where}: missing "{key}" (keys: {", ".join(sorted(row)) or "none"})')
    return row[key]


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" must be a string, got {json.dumps(value)[:40]}')
    if not value.strip():
        raise ValueError(f'{where}: "{key}" is empty')
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f'{where}: "{key}" has half a surrogate pair, which is no character')
    return value


def _answer(value: Any, key: str, where: str) -> str:
    if isinstance(value, list):
        turns = _turns(value, key, where)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise ValueError(f'{where}: "{key}" must be a string or one assistant turn')
        return turns[0]["content"]
    return _string(value, key, where)


def _turns(value: Any, key: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value else []
    if not isinstance(value, list):
        raise ValueError(
            f'{where}: "{key}" must be a string or a list of turns, got {json.dumps(value)[:40]}'
        )
    for index, turn in enumerate(value):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise ValueError(f'{where}: {key}[{index}] must have "role" and "content"')
        if turn["role"] not in ROLES:
            raise ValueError(
                f"{where}: {key}[{index}].role is {json.dumps(turn['role'])} ({', '.join(ROLES)})"
            )
        _string(turn["content"], f"{key}[{index}].content", where)
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise ValueError(f'{where}: "{key}" must be a finite number, got {json.dumps(value)[:40]}')
    return float(value)


# ---- encode
# ----------------------------------------------------------------------------------------------------------


def subset(examples: Sequence[Encoded], size: int) -> list[Encoded]:
    """The same `size` examples in every run, whatever its seed."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return [examples[index] for index in sorted(order[:size])]


def held_out_source(source: str, named: str | None) -> str | None:
    """Where held-out examples come from: what the user named, or the test split of a named dataset, or
    nowhere."""
    return named or (source if source.partition("=")[0] in datasets() else None)


def chat_template(tokenizer: Any, choice: str | None) -> tuple[str, str | None]:
    """(name, template) from a flag: None is the tokenizer's own, or "plain" where it has none; a name of
    TEMPLATES; or a file. A template of None means the tokenizer's own; to another one the BOS is added where
    the tokenizer would write it. Raises ValueError for a file that
    cannot be read."""
    own = tokenizer.chat_template
    if choice is None and own is not None:
        asks = own.endswith(ASK_FOR_GOOD)
        return "the tokenizer's own" + ", without its control token" * asks, own[
            : -len(ASK_FOR_GOOD)
        ] if asks else None
    choice = choice or "plain"
    try:
        text = TEMPLATES[choice] if choice in TEMPLATES else Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--chat-template {choice}: not one of {', '.join(TEMPLATES)} and not a readable file"
        ) from error
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
    return choice, "{{ bos_token }}" * (begins and "bos_token" not in text) + text


def encode(
    example: Example,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    template: tuple[str, str | None],
) -> Encoded | str:
    """Token ids of an example, at most max_length for the prompt and one completion together; or, where
    nothing of a completion is left, the reason as a string.

    The prompt is rendered and tokenised once. Too long a prompt loses its oldest turns (never the system
    turn), then the beginning of its last turn; what the template writes before that turn (BOS, system, role)
    stays. A completion is the text the template adds to the prompt's, tokenised on its own as sampling would
    see it, its end-of-turn token included, and is cut on the right.

    Raises ValueError if the prompt's text is not a prefix of the conversation's, or without an end-of-turn
    token.
    """
    prompt_text, prompt = _encode_prompt(example, tokenizer, max_prompt_length, template)
    if len(prompt) > max_prompt_length:
        return "nothing of the prompt fits"
    budget = max(0, max_length - len(prompt))
    completions = []
    masks = []
    for completion in example.completions:
        ids, trained = _encode_completion(example, completion, prompt_text, tokenizer, template)
        if not example.prompt and prompt == ids[: len(prompt)] and isinstance(completion, list):
            ids, trained = ids[len(prompt) :], trained[len(prompt) :]  # the template wrote the BOS itself
        if not prompt:
            trained[0] = False  # nothing predicts the first token of all
        completions.append(ids[:budget])
        masks.append(trained[:budget])
        if not any(masks[-1]):
            return "nothing of a completion fits"
    labels = desirable(example.scores)
    return Encoded(prompt, completions, masks, example.scores, example.weight, example.margin, labels)


def encode_conditioned(
    example: Example,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    template: tuple[str, str | None],
) -> Encoded | str:
    """`encode`, with the control token of its label before each completion, trained like it; for conditional
    SFT. The id follows the prompt's ids at once, whatever the template writes before an answer."""
    if not all(isinstance(completion, str) for completion in example.completions):
        return "a conversation has no label"
    found = encode(example, tokenizer, max_length - 1, max_prompt_length, template)
    if isinstance(found, str):
        return found
    good, bad = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
    completions = [[good if label else bad, *ids] for label, ids in zip(found.labels, found.completions)]
    masks = [[bool(found.prompt), *[True] * len(ids)] for ids in found.completions]
    return found._replace(completions=completions, trained=masks)


def encode_rendered(
    example: Example,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    template: tuple[str, str | None],
) -> Encoded | str:
    """Token ids of whole conversations, as a classifier of transformers would read them; for reward models.

    Each is the template's rendering, tokenised at once, up to the last token that is not padding: the one
    AutoModelForSequenceClassification scores. What all begin with is the group's prompt. Conversations that
    are too long lose their oldest turns (never the system turn); the reason is returned where that is not
    enough. Raises ValueError as `encode`.
    """
    turns = example.prompt
    system, starts = _whole_turns(turns)
    for start in [len(system), *starts]:
        kept = [*system, *turns[start:]]
        rendered = [
            _render(tokenizer, [*kept, {"role": "assistant", "content": answer}], template, False)
            for answer in example.completions
        ]
        conversations = [_ids(tokenizer, text) for text in rendered]
        if max(map(len, conversations)) <= max_length:
            break
    else:
        return "the last turn and the answer are longer than --max-length"
    for ids in conversations:
        while len(ids) > 2 and ids[-1] == padding_id(tokenizer):
            ids.pop()
    shared = os.path.commonprefix([ids[:-1] for ids in conversations])
    answers = [ids[len(shared) :] for ids in conversations]
    trained = [[bool(shared) or index > 0 for index in range(len(ids))] for ids in answers]
    labels = desirable(example.scores)
    return Encoded(shared, answers, trained, example.scores, example.weight, example.margin, labels)


def encode_whole(
    example: Example,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    template: tuple[str, str | None],
) -> Encoded | str:
    """`encode_rendered` with every conversation whole and no prompt before them, for rows that are gathered
    by prompt: what ids they share is not known yet. The key is of the prompt's own ids. Raises ValueError as
    `encode`."""
    found = encode_rendered(example, tokenizer, max_length, max_prompt_length, template)
    if isinstance(found, str):
        return found
    whole = [found.prompt + ids for ids in found.completions]
    trained = [[index > 0 for index in range(len(ids))] for ids in whole]
    key = hash(tuple(_ids(tokenizer, _render(tokenizer, example.prompt, template, True))))
    return found._replace(prompt=[], completions=whole, trained=trained, key=key)


def padding_id(tokenizer: Any) -> int:
    """The id that pads a batch of conversations: the tokenizer's, else its end of text."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise ValueError("tokenizer has neither a padding nor an eos token, and a classifier needs one")
    return found


def _whole_turns(turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
    """The system turn, if there is one, and where a dialogue that loses its oldest turns may begin again."""
    system = turns[: bool(turns) and turns[0]["role"] == "system"]
    return system, [index for index in range(len(system) + 1, len(turns)) if turns[index]["role"] == "user"]


def _render(
    tokenizer: Any, turns: list[dict[str, str]], template: tuple[str, str | None], generation: bool
) -> str:
    if not turns:
        return ""
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation, chat_template=template[1]
        )
    except (
        Exception
    ) as error:  # jinja's own errors, and whatever a template raises for turns it does not like
        raise ValueError(f"chat template ({template[0]}): {str(error).splitlines()[0]}") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _encode_prompt(
    example: Example, tokenizer: Any, limit: int, template: tuple[str, str | None]
) -> tuple[str, list[int]]:
    """The prompt's whole text, and its ids cut to at most `limit` (more only if not even the frame fits)."""
    turns = example.prompt
    text = _render(tokenizer, turns, template, True)
    ids = _ids(tokenizer, text) if turns or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if len(ids) <= limit or not turns:
        return text, ids
    system, starts = _whole_turns(turns)
    for start in starts + [len(turns) - 1]:
        shorter = _render(tokenizer, system + turns[start:], template, True)
        ids = _ids(tokenizer, shorter)
        if len(ids) <= limit:
            return text, ids
    blank = _render(tokenizer, [*system, {**turns[-1], "content": "\0"}], template, True)
    before, _, after = blank.partition("\0")
    frame = [_ids(tokenizer, before), _ids(tokenizer, after)]
    room = limit - len(frame[0]) - len(frame[1])
    content = _ids(tokenizer, shorter[len(before) : len(shorter) - len(after)])
    return text, frame[0] + content[-room:] + frame[1] if room > 0 else ids


def _encode_completion(
    example: Example,
    completion: str | list[dict[str, str]],
    prompt_text: str,
    tokenizer: Any,
    template: tuple[str, str | None],
) -> tuple[list[int], list[bool]]:
    """Ids and trained mask of what follows the prompt: assistant turns and their ends of turn are trained."""
    if not example.prompt and isinstance(completion, str):
        ids = _ids(tokenizer, completion) + [_eos(tokenizer)]
        return ids, [True] * len(ids)
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    history = list(example.prompt)
    ids = []
    trained = []
    done = opened = prompt_text
    for turn in turns:
        if turn["role"] == "assistant":
            closed = _render(tokenizer, [*history, turn], template, False)
            blank = _render(tokenizer, [*history, {**turn, "content": "\0"}], template, False)
            before, _, after = blank.partition("\0")
            if not history:
                opened = before
            elif len(history) > len(example.prompt):  # else it is the prompt's own text
                opened = _render(tokenizer, history, template, True)
            between = _ids(tokenizer, _continued(done, opened, example, template)[len(done) :])
            ends_itself = bool(after.strip())  # else the template writes no end-of-turn token
            answer = closed.rstrip() if ends_itself else closed[: len(closed) - len(after)]
            answer = _continued(opened, answer, example, template)[len(opened) :]
            learned = _ids(tokenizer, answer) + ([] if ends_itself else [_eos(tokenizer)])
            ids += between + learned
            trained += [False] * len(between) + [True] * len(learned)
            done = opened + answer
        history.append(turn)
    return ids, trained


def _continued(before: str, after: str, example: Example, template: tuple[str, str | None]) -> str:
    if not after.startswith(before):
        raise ValueError(
            f"{example.where or 'example'}: chat template ({template[0]}): the text of the prompt is not a "
            "prefix of the text of the conversation; pass a --chat-template that renders turns in order"
        )
    return after


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos token, and the chat template writes no end of turn")
    return tokenizer.eos_token_id


# ---- which completions train
# ------------------------------------------------------------------------------------------------


def pair_indices(scores: Sequence[float], pairs: str) -> list[tuple[int, int]]:
    """(better, worse) of a ranked list: "best-worst" one pair, "adjacent" neighbours in rank, "all" any two.

    Equal scores make no pair. Raises ValueError for another word.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    if pairs not in ("best-worst", "adjacent", "all"):
        raise ValueError(f"--pairs must be best-worst, adjacent or all, got {pairs}")
    ends = [(order[0], order[-1])]
    found = {"best-worst": ends, "adjacent": zip(order, order[1:]), "all": combinations(order, 2)}[pairs]
    return [(better, worse) for better, worse in found if scores[better] > scores[worse]]


def compared(scores: Sequence[float], pairs: str) -> list[int]:
    """The completions of a ranked list that some pair compares, in their order."""
    return sorted({index for pair in pair_indices(scores, pairs) for index in pair})


def usable_pair(example: Example, *, pairs: str = "best-worst") -> Example | str:
    """The example with the completions that some pair compares, or the reason why there is no pair."""
    used = compared(example.scores, pairs)
    if not used:
        return NO_BETTER
    best, worst = (example.completions[index] for index in pair_indices(example.scores, "best-worst")[0])
    if best == worst:
        return "chosen and rejected are the same"
    completions = [example.completions[index] for index in used]
    return example._replace(completions=completions, scores=[example.scores[index] for index in used])


def usable_feedback(example: Example) -> Example | str:
    """The example, or the reason why its completions are not known to be good or bad."""
    return example if example.labelled else "it has no label"


def usable_group(example: Example) -> Example | str:
    """The example, or the reason why its completions cannot be measured against each other, which is what a
    loss of the scores within a prompt does."""
    return NO_BETTER if example.labelled and len(set(example.scores)) == 1 else usable_feedback(example)


def desirable(scores: Sequence[float]) -> list[bool]:
    """The label of each completion of a prompt: several are compared with the mean of their scores, one alone
    (or several of the same score) with 0."""
    middle = sum(scores) / len(scores) if len(set(scores)) > 1 else 0.0
    return [score > middle for score in scores]


def best_completion(example: Example) -> Example | str:
    """The example with its highest-scored completion alone, for supervised fine-tuning, or the reason why
    none is worth it."""
    if not any(desirable(example.scores)):
        return "labelled undesirable" if len(example.scores) == 1 else "no completion is the better one"
    best = max(range(len(example.scores)), key=lambda index: example.scores[index])
    return example._replace(completions=[example.completions[best]], scores=[example.scores[best]])
