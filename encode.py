"""From an Example to token ids: truncation and trained masks.

    encode             Example -> Encoded (token ids; the prompt once, each completion with its trained mask)
    encode_turns       the same for conversations that are all trained: one group, or one a turn
    encode_conditioned, encode_rendered      for conditional SFT, for reward models
    conversation_ids   what a reward model reads

What every encoder keeps to: the prompt's ids are those of the text that sampling starts from; the trained
ids are the template's own text of the answer and its end of turn, tokenised apart from the prompt, as
sampling would have produced them; ids are never decoded and encoded again. An encoder returns the reason, a
string, for an example that cannot be used.

Left out: images; templates that need more than turns, tools and the row's own "chat_template_kwargs".
"""

import functools
import os
import re
from collections import deque
from typing import Any, Callable, NamedTuple, Sequence

import chat
from chat import Template
from formats import Example
from ranking import desirable
from values import UNTRAINED, Turn

REWRITES = "the chat template rewrites earlier turns when a turn is added"
NO_BEGINNING = (
    "the chat template does not write the answer where its generation prompt leaves off (a thought that is "
    "opened there, and that the answer lacks or the template drops?)"
)
CUT = "nothing of an answer fits"
SAME = "the answers are the same once encoded"
MERGED = "its system turn opens the first user turn, for the chat template has none"


class Encoded(NamedTuple):
    prompt: list[int]  # token ids
    completions: list[list[int]]  # token ids
    trained: list[list[bool]]  # per completion token: is it predicted by the loss
    scores: list[float]
    weight: float = 1.0
    margin: float = 0.0
    labels: list[bool] = []  # per completion: is it desirable; empty: by the scores
    key: int | None = None  # of the prompt, where `prompt` is not all of it
    remark: str = ""  # what was done to the row that its owner may not expect
    subset: str = ""  # of the held-out examples
    places: list[int] = []  # per completion: trained tokens before it, where values of tokens are kept

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


# ---- encoders
# --------------------------------------------------------------------------------------------------------


def encode(
    example: Example,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    template: Template,
    opened: tuple[str, list[int]] | None = None,
) -> Encoded | str:
    """Token ids of an example, at most max_length for the prompt and one completion together; or the reason
    why it cannot be used.

    The prompt is rendered and tokenised once. Too long a prompt loses its oldest turns (never the system
    turn), then the beginning of its last turn; what the template writes before that turn (BOS, system, role)
    stays. A prompt that ends with an assistant turn is continued. A completion is the text the template adds
    to the prompt's, its end of turn included, and is cut on the right. `opened` is the text and the ids of a
    prompt that is known to fit.
    """
    try:
        return _encode(example, tokenizer, max_length, max_prompt_length, template, opened)
    except ValueError as error:
        return str(error)


def encode_turns(
    example: Example, tokenizer: Any, max_length: int, max_prompt_length: int, template: Template
) -> list[Encoded] | Encoded | str:
    """`encode`, for conversations whose every assistant turn is trained as it would have been sampled: as one
    group where the template only ever appends, else one group a turn, its history rendered as the template
    renders it then."""
    limits = (tokenizer, max_length, max_prompt_length, template)
    found = encode(example, *limits)
    # an eos token that the template does not write is not in what it writes of the turn later
    rewrites = found == REWRITES or isinstance(found, Encoded) and not template.ending.strip()
    if not rewrites or len(example.completions) > 1 or isinstance(example.completions[0], str):
        return found
    answers = example.completions[0]
    turns = _continued_by(example.prompt, answers)
    first = len(turns) - len(answers)
    system, starts = _whole_turns(turns)
    later = deque(starts)
    start = 0  # of what still fits: it only moves on, so that a long conversation takes time in proportion
    groups = []
    for index in range(first, len(turns)):
        if turns[index]["role"] != "assistant" or index > first and turns[index - 1]["role"] == "assistant":
            continue
        while True:
            history = [*system, *turns[start:index]] if start else turns[:index]
            open_turn = example.prompt[index:]
            one = example._replace(prompt=history + open_turn, completions=[[answers[index - first]]])
            try:
                opened = _opened(one, tokenizer, max_prompt_length, template)
            except ValueError as error:
                groups.append(str(error))
                break
            if opened or not later or later[0] >= index:
                groups.append(encode(one, *limits, opened))
                break
            start = later.popleft()
    usable = [group for group in groups if isinstance(group, Encoded)]
    refused = [group for group in groups if isinstance(group, str) and group != CUT]
    if usable and refused:
        usable[0] = usable[0]._replace(remark=f"an answer is left out: {refused[0]}")
    return usable or groups[0]


def prompt_ids(
    example: Example, tokenizer: Any, max_prompt_length: int, template: Template
) -> list[int] | str:
    """What sampling starts from: the ids that `encode` puts before an answer to this prompt; or the reason
    why there are none."""
    try:
        _refuse_reserved(example._replace(completions=[]), template)
        found = _fitting_prompt(example, tokenizer, max_prompt_length, template)[1]
    except ValueError as error:
        return str(error)
    return found or "an empty prompt, and the tokenizer has no token that begins a text"


def encode_conditioned(
    example: Example, tokenizer: Any, max_length: int, max_prompt_length: int, template: Template
) -> Encoded | str:
    """`encode`, with the control token of its label before each completion, trained like it; for conditional
    SFT. The id follows the prompt's ids at once, whatever the template writes before an answer."""
    found = encode(example, tokenizer, max_length - 1, max_prompt_length, template)
    if isinstance(found, str):
        return found
    good, bad = tokenizer.convert_tokens_to_ids(list(chat.CONTROL_TOKENS))
    completions = [[good if label else bad, *ids] for label, ids in zip(found.labels, found.completions)]
    masks = [[bool(found.prompt), *trained] for trained in found.trained]
    if not found.prompt:
        masks = [[False, True, *mask[2:]] for mask in masks]  # what was first of all has a predecessor now
    return found._replace(completions=completions, trained=masks)


def encode_rendered(
    example: Example, tokenizer: Any, max_length: int, max_prompt_length: int, template: Template
) -> Encoded | str:
    """Token ids of whole conversations, as a classifier of transformers would read them; for reward models.

    Each is the template's rendering, tokenised at once, up to the last token that is not padding: the one
    AutoModelForSequenceClassification scores. What all begin with is the group's prompt.
    """
    if not example.completions:
        return "it has no answer"
    try:
        found = conversation_ids(example, tokenizer, max_length, template)
    except ValueError as error:
        return str(error)
    for ids in found:
        while len(ids) > 2 and ids[-1] == chat.padding_id(tokenizer):
            ids.pop()
    if _are_same(example, found):
        return SAME
    shared = os.path.commonprefix([ids[:-1] for ids in found])
    answers = [ids[len(shared) :] for ids in found]
    trained = [[bool(shared) or index > 0 for index in range(len(ids))] for ids in answers]
    return _encoded(example, shared, answers, trained, _merge_remark(example, template))


def conversation_ids(
    example: Example, tokenizer: Any, max_length: int, template: Template
) -> list[list[int]]:
    """The ids of the template's rendering of the prompt with each completion, tokenised at once: what
    `apply_chat_template` gives. Conversations that are too long lose their oldest turns (never the system
    turn). Raises ValueError where that is not enough, and for what the template does not write."""
    system, starts = _whole_turns(example.prompt)

    def conversations(start: int) -> list[list[int]] | None:
        """Of the turns from `start`; None if one is too long."""
        kept = [*system, *example.prompt[start:]]
        found = []
        for completion in example.completions:
            turns = _continued_by(kept, completion)
            text = chat.render(tokenizer, turns, template, False, example.rendering)
            write = functools.partial(chat.render, tokenizer, template=template, generation=False)
            chat.check_written(turns, example.rendering, text, write)
            ids = chat.ids(tokenizer, text) if len(text) <= max_length * template.longest else None
            if ids is None or len(ids) > max_length:
                return None
            found.append(ids)
        return found

    _refuse_reserved(example, template)
    found = _first_that_fits([len(system), *starts], conversations)
    if found is None:
        raise ValueError("the last turn and the answer are longer than --max-length")
    return found


def encode_whole(
    example: Example, tokenizer: Any, max_length: int, max_prompt_length: int, template: Template
) -> Encoded | str:
    """`encode_rendered` with every conversation whole and no prompt before them, for rows that are gathered
    by prompt: what ids they share is not known yet. The key is of the prompt's own ids."""
    found = encode_rendered(example, tokenizer, max_length, max_prompt_length, template)
    if isinstance(found, str):
        return found
    whole = [found.prompt + ids for ids in found.completions]
    trained = [[index > 0 for index in range(len(ids))] for ids in whole]
    own = chat.ids(tokenizer, chat.opening(tokenizer, example.prompt, template, example.rendering))
    return found._replace(prompt=[], completions=whole, trained=trained, key=hash(tuple(own)))


def _encode(
    example: Example,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    template: Template,
    opened: tuple[str, list[int]] | None,
) -> Encoded | str:
    if not example.completions:
        return "it has no answer"
    _refuse_reserved(example, template)
    prompt_text, prompt = opened or _fitting_prompt(example, tokenizer, max_prompt_length, template)
    budget = max(0, max_length - len(prompt))
    completions = []
    masks = []
    remark = _merge_remark(example, template)
    for completion in example.completions:
        found = _encode_completion(example, completion, prompt_text, tokenizer, template, budget + 1)
        ids, trained, changed = found
        remark = remark or changed
        if not example.prompt and prompt and prompt == ids[: len(prompt)]:
            ids, trained = ids[len(prompt) :], trained[len(prompt) :]  # the text has the BOS itself
        if not prompt:
            trained[0] = False  # nothing predicts the first token of all
        if not any(trained):
            return "no turn of an answer is trained"
        completions.append(ids[:budget])
        masks.append(trained[:budget])
        if not any(masks[-1]):
            return CUT
    if _are_same(example, completions):
        return SAME
    return _encoded(example, prompt, completions, masks, remark)


def _encoded(
    example: Example, prompt: list[int], completions: list[list[int]], masks: list[list[bool]], remark: str
) -> Encoded:
    labels = desirable(example.scores)
    about = (example.scores, example.weight, example.margin, labels)
    return Encoded(prompt, completions, masks, *about, remark=remark, subset=example.subset)


def _are_same(example: Example, encoded: list[list[int]]) -> bool:
    """Whether nothing is left to compare, or answers that differ are the same once encoded."""
    different = set(map(repr, example.completions))
    return len(set(map(tuple, encoded))) < max(len(different), min(len(encoded), 2))


def _refuse_reserved(example: Example, template: Template) -> None:
    """Raises ValueError for text of turns that holds the template's own tokens."""
    if not template.reserved:
        return
    texts = ["\n".join(map(str, turn.values())) for turn in example.prompt]
    for completion in example.completions:
        if isinstance(completion, list):
            texts += ["\n".join(map(str, turn.values())) for turn in completion]
        elif example.prompt:
            texts.append(completion)
    if example.rendering:
        texts.append(str(example.rendering))
    for text in texts:
        if found := re.search(template.reserved, text):
            raise ValueError(
                f"the text holds {found[0]}, a special token of the model; if it is rendered already, "
                "--chat-template none takes it as it is"
            )


def _merge_remark(example: Example, template: Template) -> str:
    return MERGED if template.merges_system and _whole_turns(example.prompt)[0] else ""


def _whole_turns(turns: list[Turn]) -> tuple[list[Turn], list[int]]:
    """The system turn, if there is one, and where a dialogue that loses its oldest turns may begin again."""
    system = turns[: bool(turns) and turns[0]["role"] == "system"]
    return system, [index for index in range(len(system) + 1, len(turns)) if turns[index]["role"] == "user"]


def _first_that_fits(starts: Sequence[int], attempt: Callable[[int], Any]) -> Any:
    """The result of the first start whose attempt is not None, of ascending ones that leave ever less; by
    bisection."""
    low, high, found = 0, len(starts), None
    while low < high:
        middle = (low + high) // 2 if low else 0  # mostly the first one fits
        result = attempt(starts[middle])
        if result is None:
            low = middle + 1
        else:
            found, high = result, middle
    return found


def _fitting_prompt(
    example: Example, tokenizer: Any, limit: int, template: Template
) -> tuple[str, list[int]]:
    """The whole text of a prompt and at most `limit` ids of it. Raises ValueError."""
    found = _opened(example, tokenizer, limit, template)
    text, ids = found or _cut_prompt(example, tokenizer, limit, template)
    if len(ids) > limit:
        raise ValueError("nothing of the prompt fits")
    return text, ids


def _opened(example: Example, tokenizer: Any, limit: int, template: Template) -> tuple[str, list[int]] | None:
    """The text and ids that sampling would start from; None if there are more than `limit`. Raises
    ValueError."""
    if not example.prompt:
        return "", [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text = chat.opening(tokenizer, example.prompt, template, example.rendering)
    write = functools.partial(chat.opening, tokenizer, template=template)
    chat.check_written(example.prompt, example.rendering, text, write)
    if len(text) > limit * template.longest:
        return None
    ids = chat.ids(tokenizer, text)
    return (text, ids) if len(ids) <= limit else None


def _cut_prompt(example: Example, tokenizer: Any, limit: int, template: Template) -> tuple[str, list[int]]:
    """The whole text of a prompt that is too long, and its ids cut to at most `limit` (more only if not even
    the frame of its last turn fits)."""
    turns, rendering = example.prompt, example.rendering
    text = chat.opening(tokenizer, turns, template, rendering)
    system, starts = _whole_turns(turns)
    starts = starts if len(turns) - 1 in [0, *starts] else [*starts, len(turns) - 1]

    def shortened(start: int) -> tuple[str, list[int]] | None:
        return _opened(example._replace(prompt=[*system, *turns[start:]]), tokenizer, limit, template)

    found = _first_that_fits(starts, shortened)
    if found is not None:
        return text, found[1]
    generation = turns[-1]["role"] != "assistant"
    kept = [*system, turns[-1]]
    before, after = chat.around(tokenizer, kept, template, generation, rendering)
    frame, after = chat.ids(tokenizer, before), after if generation else ""
    room = limit - len(frame)
    if room <= len(chat.ids_within(tokenizer, after, template)):
        return text, [0] * (limit + 1)
    shown = chat.opening(tokenizer, kept, template, rendering)
    return text, frame + chat.last_ids(tokenizer, shown, room, template)


def _continued_by(history: list[Turn], completion: str | list[Turn]) -> list[Turn]:
    """A conversation and its answer; an open assistant turn at its end and the answer's first are one."""
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if history and history[-1]["role"] == "assistant":
        joined = {**history[-1], **turns[0], "content": history[-1]["content"] + turns[0]["content"]}
        return [*history[:-1], joined, *turns[1:]]
    return [*history, *turns]


def _encode_completion(
    example: Example,
    completion: str | list[Turn],
    prompt_text: str,
    tokenizer: Any,
    template: Template,
    room: int,
) -> tuple[list[int], list[bool], str]:
    """Ids and trained mask of what follows the prompt, at least `room` of them if there are as many, and a
    remark: assistant turns and their ends of turn are trained. Raises ValueError."""
    if not example.prompt and isinstance(completion, str):
        text = chat.without_tail(tokenizer, completion, template)
        ids = chat.ids(tokenizer, text[: (room + chat.MARGIN) * template.longest])
        ids = chat.ended(ids, tokenizer, template)
        return ids, [True] * len(ids), ""
    conversation = _continued_by(example.prompt, completion)
    rendering = example.rendering
    open_turn = example.prompt[-1:] if example.prompt and example.prompt[-1]["role"] == "assistant" else []
    first = len(example.prompt) - len(open_turn)
    ids = []
    trained = []
    remark = ""
    done = opened = prompt_text
    for index, turn in enumerate(conversation[first:], first):
        if turn["role"] != "assistant":
            continue
        history = conversation[:index]
        if index > first:
            opened = chat.render(tokenizer, history, template, True, rendering)
        elif not history and not open_turn:
            opened = chat.around(tokenizer, [turn], template, False, rendering)[0]
        header = _added(done, opened, REWRITES)
        if len(ids) >= room:
            break
        before = tokenizer.convert_ids_to_tokens(ids[-1:]) if ids and ids[-1] in template.special_ids else []
        # behind the end of the turn before, which may be a token that takes white space with it
        between = chat.ids_within(tokenizer, "".join(before) + header, template)[len(before) :]
        closed = chat.render(tokenizer, [*history, turn], template, False, rendering)
        if turn.get("tool_calls"):
            fewer = [*history, chat.with_fewer_calls(turn)]
            if closed == chat.render(tokenizer, fewer, template, False, rendering):
                raise ValueError(chat.NO_CALLS)
        closed, ending = closed.removesuffix(template.closing), template.ending
        if not closed.endswith(ending):
            ending = chat.around(tokenizer, [*history, turn], template, False, rendering)[1]
            ending = ending.removesuffix(template.closing)
        # a tail of white space is not the end of a turn, which is then the eos token's to write
        ends_itself = bool(ending.strip())
        answer = closed.rstrip() if ends_itself else closed[: len(closed) - len(ending)]
        added = _added(opened, answer, NO_BEGINNING)
        said = turn["content"][len(open_turn[0]["content"]) if open_turn and index == first else 0 :]
        tail = closed[max(0, len(opened) - len(said)) :]  # the generation prompt may open the answer
        changed = chat.change(said, turn, added, tail, ending)
        remark = remark or changed
        if not ends_itself:
            added = chat.without_tail(tokenizer, added, template)
        learned = chat.first_ids(tokenizer, added, room, template)
        if not ends_itself:
            learned = chat.ended(learned, tokenizer, template)
        ids += between + learned
        trained += [False] * len(between) + [_is_trained(turn)] * len(learned)
        done = opened + added
    return ids, trained, remark


def _is_trained(turn: Turn) -> bool:
    """Not if the row says so of this turn, by any of the names that tools have for it."""
    return all(turn.get(key, True) not in (0, False) for key in UNTRAINED)


def _added(before: str, after: str, otherwise: str) -> str:
    if not after.startswith(before):
        raise ValueError(otherwise)
    return after[len(before) :]
