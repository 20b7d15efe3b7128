"""Row layouts: one function a layout, keys in, Example out.

    parse          a row of any layout -> Example, or the Fault that makes it unusable
    unread_keys    the keys of a row that its layout does not read

A layout asks for the keys it needs by naming them: a row has the layout if every parameter without a default
is one of its keys, null counted as absent. What it takes beside them are its parameters with a default, and
the keys that every conversation may have: "system" (or "system_prompt"), "tools", "chat_template_kwargs",
"weight" and "margin", and of a preference "subset", the name under which its accuracy is told. Layouts stand
in four ranks, preferences before labelled answers before answers before prompts, and the first rank that a
row fits wins: chosen and rejected are read, messages and text beside them are not. Within a rank the layout
that reads more wins; where neither does and the two readings differ, the row is an error that names both.

A prompt is a string (one user turn; a dialogue "\\n\\nHuman: ...\\n\\nAssistant:"; a JSON list of turns), a
turn or a list of turns; an answer a string, a turn or a list of turns that ends with the assistant's. A turn
is {"role", "content"} or {"from", "value"}, its content a string or a list of text parts; further keys of it
are kept, for the chat template.

Wrong structure (a missing key, a type, a role) is a ValueError, "where: what is wrong"; wrong content (an
empty or null answer, half a character) is a Fault of that row alone.

Adding a layout = adding one function to a rank below.

Left out: images and audio.
"""

import functools
import inspect
from typing import Any, Callable, NamedTuple, Sequence

import values
from values import Turn


class Example(NamedTuple):
    prompt: list[Turn]  # turns; [] for plain text
    completions: list[str | list[Turn]]  # answers; a list of turns is the rest of a conversation
    scores: list[float]  # one per completion, higher is better
    weight: float = 1.0  # of this example in the loss
    margin: float = 0.0  # how much better the best is, for losses that use it
    where: str = ""  # file:line, for messages
    labelled: bool = True  # False: the scores say nothing
    rendering: dict[str, Any] = {}  # further arguments of the chat template: tools, enable_thinking, ...
    subset: str = ""  # of the held-out rows: accuracy is told of each


class Fault(NamedTuple):
    """Why a row cannot be used; it is counted, and the others are."""

    where: str
    reason: str


def parse(row: Any, where: str = "") -> Example | Fault:
    """The Example of a row in any layout of this file, or the Fault that makes it unusable.

    Raises ValueError ("where: what is wrong; what would be right") if the row has no layout, has two that
    read it differently, or holds values of other types than its layout's.
    """
    if not isinstance(row, dict):
        raise ValueError(
            f'{where}: not an object; a row is {{"prompt": ..., "chosen": ..., "rejected": ...}}'
        )
    try:
        found = _parsed(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if isinstance(found, Example):
        reason = unusable(found)
        found = reason or found
    return Fault(where, found) if isinstance(found, str) else found._replace(where=where)


def unread_keys(row: dict[str, Any]) -> set[str]:
    """The keys that hold something and that the row's layout does not read."""
    keys = _present(row)
    layouts = _layouts(keys)
    read = (
        set().union(*[_parameters(layout)[1] for layout in layouts], _common(layouts[0])) if layouts else keys
    )
    return set(keys) - read


def unusable(example: Example) -> str:
    """What is wrong with the texts of an example, or an empty string."""
    for turn in example.prompt:
        if fault := values.text_fault(turn, "a turn of the prompt"):
            return fault
    for completion in example.completions:
        turns = [{"content": completion}] if isinstance(completion, str) else completion
        for turn in turns:
            if fault := values.text_fault(turn, "an answer"):
                return fault
    return ""


# ---- preferences: two answers or more, one better
# ---------------------------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected) -> Example | str:
    """TRL's explicit prompt, ours, UltraFeedback binarized (whose answers are whole conversations)."""
    answers = [
        values.text_or_turns(value, key) for value, key in ((chosen, "chosen"), (rejected, "rejected"))
    ]
    said = values.prompt(prompt)
    texts = [answer for answer in answers if isinstance(answer, str)]
    dialogues = [text.lstrip().startswith("Human:") and "\n\nAssistant:" in text for text in texts]
    turns = [answer for answer in answers if not isinstance(answer, str) and answer]
    if all(dialogues) and texts == answers or any(first["role"] != "assistant" for first, *_ in turns):
        found = implicit_pair(chosen, rejected)
        if isinstance(found, Example) and not all(turn in found.prompt for turn in said):
            raise ValueError(
                'two readings: the prompt is "prompt", or what "chosen" and "rejected" both begin with; '
                "remove one of them"
            )
        return found
    return Example(said, _answers({"chosen": chosen, "rejected": rejected}), [1.0, 0.0])


def implicit_pair(chosen, rejected, messages=None) -> Example | str:
    """Two conversations: what they have in common, in whole turns, is the prompt (TRL, OpenRLHF, ms-swift);
    or two of Anthropic's dialogues as strings."""
    both = [values.text_or_turns(value, key) for value, key in ((chosen, "chosen"), (rejected, "rejected"))]
    if messages is not None and all(isinstance(value, (str, dict)) for value in (chosen, rejected)):
        return Example(
            values.turn_list(messages, "messages"),
            _answers({"chosen": chosen, "rejected": rejected}),
            [1.0, 0.0],
        )
    if all(isinstance(text, str) for text in both):
        if not all(text.lstrip().startswith("Human:") for text in both):
            raise ValueError('missing "prompt": "chosen" and "rejected" are strings without a common one')
        return hh_pair(*both)
    if not all(isinstance(turns, list) for turns in both):
        raise ValueError('one of "chosen" and "rejected" is a string, the other a list of turns')
    shared = 0
    for one, other in zip(*[turns[:-1] for turns in both]):
        if one != other:
            break
        shared += 1
    while shared and any(turns[shared]["role"] != "assistant" for turns in both):
        shared -= 1
    if not shared:
        raise ValueError('"chosen" and "rejected" begin with no common turn; add a "prompt"')
    rest = {key: turns[shared:] for key, turns in zip(("chosen", "rejected"), both)}
    return Example(both[0][:shared], _answers(rest), [1.0, 0.0])


def ranked_list(prompt, completions, scores) -> Example | str:
    """Ours: a list of answers and one of scores, higher is better."""
    if not isinstance(completions, list) or not isinstance(scores, list) or len(completions) != len(scores):
        raise ValueError('"completions" and "scores" must be lists of one length')
    return _scored(values.prompt(prompt), completions, scores)


def ultrafeedback(instruction, completions) -> Example | str:
    """UltraFeedback as published: completions of several models, each with its "overall_score" (or the
    "fine-grained_score", the mean of its aspects)."""
    answers = _records(completions, "completions")
    scores = [
        _value(answer, "overall_score" if answer.get("overall_score") is not None else "fine-grained_score")
        for answer in answers
    ]
    return _scored(values.prompt(instruction), [_value(answer, "response") for answer in answers], scores)


def nectar(prompt, answers) -> Example | str:
    """Nectar: up to seven answers, "rank" 1 the best."""
    found = _records(answers, "answers")
    ranks = [-values.number(_value(answer, "rank"), "rank") for answer in found]
    return _scored(values.prompt(prompt), [_value(answer, "answer") for answer in found], ranks)


def shp(history, human_ref_A, human_ref_B, labels) -> Example | str:
    """Stanford Human Preferences: labels 1 if A is preferred."""
    return _pair_of(values.prompt(history), human_ref_A, human_ref_B, values.label(labels, "labels"))


def orca_pair(question, chosen, rejected) -> Example | str:
    """Orca DPO pairs."""
    return pair(question, chosen, rejected)


def input_pair(input, chosen, rejected) -> Example | str:
    """OpenRLHF's and distilabel's name for the prompt."""
    return pair(input, chosen, rejected)


def alpaca_pair(instruction, chosen, rejected, input=None, history=None) -> Example | str:
    """LLaMA-Factory, alpaca form."""
    return pair(values.instruction(instruction, input, history), chosen, rejected)


def sharegpt_pair(conversations, chosen, rejected) -> Example | str:
    """LLaMA-Factory, sharegpt form: the conversation so far, and two turns that could follow."""
    return Example(
        values.turn_list(conversations, "conversations"),
        _answers({"chosen": chosen, "rejected": rejected}),
        [1.0, 0.0],
    )


def swift_pair(messages, rejected_response) -> Example | str:
    """ms-swift: a conversation whose last turn is the chosen one, and the rejected answer."""
    turns = values.turn_list(messages, "messages")
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError('"messages" must end with the chosen assistant turn')
    answers = {"messages": turns[-1:], "rejected_response": rejected_response}
    return Example(turns[:-1], _answers(answers), [1.0, 0.0])


def swift_messages_pair(messages, rejected_messages) -> Example | str:
    """ms-swift: two whole conversations."""
    return implicit_pair(messages, rejected_messages)


def swift_query_pair(query, response, rejected_response, history=None) -> Example | str:
    """ms-swift before version 3."""
    return pair(values.instruction(query, None, history), response, rejected_response)


def halos_pair(prompt, output_A, output_B, label, reward_A=None, reward_B=None) -> Example | str:
    """HALOs' pairwise_feedback: label 1 if A is better; the rewards are kept if they say the same."""
    found = _pair_of(values.prompt(prompt), output_A, output_B, values.label(label, "label"))
    rewards = [values.number(reward, "reward") for reward in (reward_A, reward_B) if reward is not None]
    ordered = sorted(rewards, reverse=True)
    agree = len(set(rewards)) == 2 and (rewards == ordered) == values.label(label, "label")
    return found._replace(scores=ordered) if agree else found


# ---- answers with a label or a score
# ---------------------------------------------------------------------------------------------------------


def labelled(prompt, completion, label) -> Example | str:
    """TRL's unpaired preference, ours: desirable or not."""
    return _labelled(values.prompt(prompt), completion, label, "label")


def scored(prompt, completion, score) -> Example | str:
    """One answer and its score."""
    return _scored(values.prompt(prompt), [completion], [score])


def alpaca_kto(instruction, output, kto_tag, input=None, history=None) -> Example | str:
    """LLaMA-Factory's KTO rows, alpaca form."""
    return _labelled(values.instruction(instruction, input, history), output, kto_tag, "kto_tag")


def sharegpt_kto(conversations, kto_tag) -> Example | str:
    """LLaMA-Factory's KTO rows, sharegpt form: the last turn is labelled."""
    return _labelled_conversation(conversations, kto_tag, "conversations", "kto_tag")


def messages_kto(messages, kto_tag) -> Example | str:
    """The same with OpenAI's names."""
    return _labelled_conversation(messages, kto_tag, "messages", "kto_tag")


def swift_kto(messages, label) -> Example | str:
    """ms-swift's KTO rows: the last turn is labelled."""
    return _labelled_conversation(messages, label, "messages", "label")


def halos_binary(prompt, output, label, reward=None) -> Example | str:
    """HALOs' binary_feedback; the label counts, its reward does not."""
    return _labelled(values.prompt(prompt), output, label, "label")


def halos_scalar(prompt, output, reward) -> Example | str:
    """HALOs' samples and scalar feedback: one answer and its reward."""
    return _scored(values.prompt(prompt), [output], [reward])


def openrlhf_kto(input, output, label) -> Example | str:
    """OpenRLHF's unpaired rows."""
    return _labelled(values.prompt(input), output, label, "label")


# ---- answers alone
# ---------------------------------------------------------------------------------------------------------


def completion(prompt, completion) -> Example | str:
    """TRL's prompt-completion, ours."""
    return _unlabelled(values.prompt(prompt), completion, "completion")


def prompt_response(prompt, response) -> Example | str:
    """Prompt and response."""
    return _unlabelled(values.prompt(prompt), response, "response")


def prompt_output(prompt, output) -> Example | str:
    """HALOs' samples without a reward."""
    return _unlabelled(values.prompt(prompt), output, "output")


def input_output(input, output) -> Example | str:
    """OpenRLHF's supervised rows."""
    return _unlabelled(values.prompt(input), output, "output")


def alpaca(instruction, output, input=None, history=None) -> Example | str:
    """LLaMA-Factory, alpaca form; an output of two answers is a pair, the better first."""
    turns = values.instruction(instruction, input, history)
    if isinstance(output, list) and len(output) == 2 and all(isinstance(answer, str) for answer in output):
        return Example(turns, output, [1.0, 0.0])
    return _unlabelled(turns, output, "output")


def query_response(query, response, history=None) -> Example | str:
    """ms-swift before version 3."""
    return _unlabelled(values.instruction(query, None, history), response, "response")


def messages(messages) -> Example | str:
    """A conversation, every assistant turn trained."""
    return _conversation(messages, "messages")


def sharegpt(conversations) -> Example | str:
    """ShareGPT: a conversation, every assistant turn trained."""
    return _conversation(conversations, "conversations")


def text(text) -> Example | str:
    """Plain text, every token trained."""
    if not isinstance(text, str):
        raise ValueError(f'"text" must be a string, got {values.shown(text)}')
    return Example([], [text], [1.0], labelled=False)


# ---- prompts alone, for sampling
# ---------------------------------------------------------------------------------------------------------


def prompt(prompt) -> Example | str:
    """A prompt."""
    return Example(values.prompt(prompt), [], [], labelled=False)


def instruction(instruction, input=None) -> Example | str:
    """An instruction, alpaca form."""
    return Example(values.instruction(instruction, input, None), [], [], labelled=False)


RANKS = (
    (
        pair, implicit_pair, ranked_list, ultrafeedback, nectar, shp, orca_pair, input_pair, alpaca_pair,
        sharegpt_pair, swift_pair, swift_messages_pair, swift_query_pair, halos_pair,
    ),
    (
        labelled, scored, alpaca_kto, sharegpt_kto, messages_kto, swift_kto, halos_binary, halos_scalar,
        openrlhf_kto,
    ),
    (
        completion, prompt_response, prompt_output, input_output, alpaca, query_response, messages, sharegpt,
    ),
    (text,),
    (prompt, instruction),
)  # fmt: skip
MAX_WEIGHT = 1e6
CONVERSATION_KEYS = {"system", "system_prompt", "tools", "chat_template_kwargs", "weight", "margin"}


# ---- which layout a row has
# ---------------------------------------------------------------------------------------------------------


def _parsed(row: dict[str, Any]) -> Example | str:
    keys = _present(row)
    layouts = _layouts(keys)
    if not layouts or layouts[0] in RANKS[-1]:
        missing = _missing(keys, frozenset(row))
        if missing is not None:
            return missing
    try:
        readings = [_read(layout, row) for layout in layouts]
    except ValueError:
        null = _null(keys, frozenset(row))
        if null and set(_parameters(layouts[0])[0]) < set(_parameters(_layouts(frozenset(row))[0])[0]):
            return null  # "prompt" beside "chosen" and "rejected", which are no conversations
        raise
    if any(reading != readings[0] for reading in readings[1:]):
        both = " or ".join(f'"{", ".join(_parameters(layout)[0])}"' for layout in layouts)
        raise ValueError(f"two readings: {both}; remove the keys of one of them")
    return readings[0]


def _read(layout: Callable, row: dict[str, Any]) -> Example | str:
    found = layout(**{key: row[key] for key in _parameters(layout)[1] if row.get(key) is not None})
    return found if isinstance(found, str) else _with_common(found, row, _common(layout))


def _present(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(key for key, value in row.items() if value is not None)


@functools.cache
def _parameters(layout: Callable) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the keys a layout needs, all that it reads)."""
    found = inspect.signature(layout).parameters.values()
    return tuple(p.name for p in found if p.default is p.empty), tuple(p.name for p in found)


@functools.lru_cache(maxsize=4096)
def _layouts(keys: frozenset[str]) -> list[Callable]:
    """The layouts of a row with these keys that read most, of the first rank that has any."""
    for rank in RANKS:
        fits = [layout for layout in rank if keys.issuperset(_parameters(layout)[0])]
        for part in (0, 1):  # by what they need, then by all that they read
            reads = {layout: keys.intersection(_parameters(layout)[part]) for layout in fits}
            fits = [a for a in fits if not any(reads[a] < reads[b] for b in fits)]
        if fits:
            return fits
    return []


@functools.lru_cache(maxsize=4096)
def _missing(keys: frozenset[str], everything: frozenset[str]) -> str | None:
    """Of a row that is a prompt at most: the reason if a null is what is wrong with it; None if it is meant
    to be one. Raises ValueError for a key that is missing."""
    layouts = [layout for rank in RANKS[:-1] for layout in rank]
    prompts = {key for layout in RANKS[-1] for key in _parameters(layout)[1]}
    begun = [layout for layout in layouts if keys.intersection(_parameters(layout)[0]) - prompts]
    null = _null(keys, everything)
    if null and (not begun or _layouts(everything)[0] not in RANKS[-1]):
        return null
    if _layouts(keys) and not begun:
        return None
    lacking = {
        layout: [key for key in _parameters(layout)[0] if key not in keys] for layout in begun or layouts
    }
    nearest = min(lacking, key=lambda layout: len(lacking[layout]))
    named = ", ".join(f'"{key}"' for key in (lacking[nearest] if begun else ["prompt", "chosen", "rejected"]))
    raise ValueError(f"missing {named} (keys: {values.names(keys)})")


def _null(keys: frozenset[str], everything: frozenset[str]) -> str:
    """Which null keeps a row from the layout it would have otherwise; an empty string if none does."""
    needed = _parameters(layouts[0])[0] if (layouts := _layouts(everything)) else ()
    return next((f'"{key}" is null' for key in needed if key not in keys), "")


def _common(layout: Callable) -> set[str]:
    if layout in RANKS[0]:
        return CONVERSATION_KEYS | {"subset"}
    return {"weight"} if layout is text else CONVERSATION_KEYS


def _with_common(example: Example, row: dict[str, Any], common: set[str]) -> Example:
    """What any layout takes: a system turn, what the chat template is given, weight, margin and subset."""
    given = {key: row[key] for key in common if row.get(key) is not None}
    system = given.get("system", given.get("system_prompt"))
    if {"system", "system_prompt"} <= set(given) and given["system"] != given["system_prompt"]:
        raise ValueError('two readings: "system" or "system_prompt"; remove one of them')
    if system is not None and not isinstance(system, str):
        raise ValueError(f'"system" must be a string, got {values.shown(system)}')
    if system and system.strip():
        first = example.prompt[:1]
        if first and first[0]["role"] == "system" and first[0]["content"] != system:
            raise ValueError('two readings: the system turn is "system", or that of the conversation')
        rest = example.prompt[bool(first) and first[0]["role"] == "system" :]
        example = example._replace(prompt=[{"role": "system", "content": system}, *rest])
    rendering = dict(values.template_arguments(given.get("chat_template_kwargs") or {}))
    if tools := values.tools(given.get("tools")):
        rendering["tools"] = tools
    options = {key: values.number(given[key], key) for key in ("weight", "margin") if key in given}
    if not 0 <= options.get("weight", 1.0) <= MAX_WEIGHT:  # one that drowns all others is a mistake
        raise ValueError(f'"weight" must be >= 0 and <= {MAX_WEIGHT:g}, got {given["weight"]}')
    if not isinstance(subset := given.get("subset", ""), (str, int)):
        raise ValueError(f'"subset" must be a string, got {values.shown(subset)}')
    return example._replace(rendering=rendering, subset=str(subset), **options)


# ---- values
# ---------------------------------------------------------------------------------------------------------


def hh_pair(chosen: str, rejected: str) -> Example | str:
    """Two of Anthropic's dialogues: the prompt is what stands before the last "\\n\\nAssistant:"; or the
    reason why they are no pair."""
    parts = [text.rpartition("\n\nAssistant:") for text in (chosen, rejected)]
    turns = values.dialogue(parts[0][0])
    if parts[0][0] != parts[1][0]:
        return "the two dialogues differ before the last answer"
    if any("\n\nHuman:" in part[2] for part in parts):
        return "an answer holds another Human turn"
    if turns is None:
        return "roles do not alternate"
    return Example(turns, [part[2].strip() for part in parts], [1.0, 0.0])


def _answers(given: dict[str, Any]) -> list[str | list[Turn]]:
    return [values.answer(value, key) for key, value in given.items()]


def _scored(turns: list[Turn], answers: Sequence[Any], scores: Sequence[Any]) -> Example | str:
    if not answers:
        return "it has no answer"
    numbers = [values.number(score, f"scores[{index}]") for index, score in enumerate(scores)]
    return Example(turns, [values.answer(answer, "completions") for answer in answers], numbers)


def _pair_of(turns: list[Turn], first: Any, second: Any, first_is_better: bool) -> Example:
    better, worse = (first, second) if first_is_better else (second, first)
    return Example(turns, _answers({"the better answer": better, "the worse answer": worse}), [1.0, 0.0])


def _labelled(turns: list[Turn], answer: Any, label: Any, key: str) -> Example:
    return Example(turns, [values.answer(answer, "the answer")], [float(values.label(label, key))])


def _unlabelled(turns: list[Turn], answer: Any, key: str) -> Example:
    return Example(turns, [values.answer(answer, key)], [1.0], labelled=False)


def _conversation(value: Any, key: str) -> Example | str:
    """The turns before the first assistant's are the prompt; what follows the last one is not read."""
    turns = values.turn_list(value, key)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        return "a conversation without an assistant turn"
    return _unlabelled(turns[: answers[0]], turns[answers[0] : answers[-1] + 1], key)


def _labelled_conversation(value: Any, label: Any, key: str, label_key: str) -> Example | str:
    turns = values.turn_list(value, key)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f'"{key}" must end with the assistant turn that "{label_key}" is about')
    return _labelled(turns[:-1], turns[-1:], label, label_key)


def _records(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        shown = values.shown(value)
        raise ValueError(f'"{key}" must be a list of objects (or come with "scores"), got {shown}')
    return value


def _value(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        named = values.names(record)
        raise ValueError(f'missing "{key}" in an answer (keys: {named})')
    return record[key]
