"""Chat templates and tokenizers: what is written for turns, and the ids of it.

    chat_template      the template a flag names, and what a trial shows of it
    render, opening    turns -> text: a conversation, what sampling would start from
    ids, ids_within    text -> token ids: of a beginning, of what follows other text
    answer_text        token ids -> what a sampled answer says

Nothing here knows an Example: encode.py does.
"""

import contextlib
import functools
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

Turn = dict[str, Any]
# For tokenizers without a chat template: the form of Anthropic's HH dialogues, which DPO's authors trained
# on.
PLAIN = (
    "{% for m in messages %}"
    "{{ '\n\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(m.role, m.role | capitalize) }}"
    "{{ ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
# Prompt and completion are one running text: for continuing a film review, or for text rendered elsewhere.
AS_IT_IS = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {"plain": PLAIN, "none": AS_IT_IS, "raw": AS_IT_IS}
# Of conditional SFT: before desirable and undesirable completions; sampling asks for a desirable one.
CONTROL_TOKENS = ("<|good|>", "<|bad|>")
ASK_FOR_GOOD = "{% if add_generation_prompt %}" + CONTROL_TOKENS[0] + "{% endif %}"
MARK = "\0"  # stands for a content, to see what a template writes around it
BEFORE = "\n\0.a0:(-"  # one of them stands before a text that is to be tokenised as what follows other text
WITHIN = "think|tool|reason"  # in the names of special tokens that stand within answers
NO_CALLS = "the chat template does not write tool_calls"
WORD = "zqmark"  # stands for a content, where the template may change its letters
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a turn beside its content
SECONDS = 10  # that a template may take to write a conversation
MARGIN = 64  # tokens beyond a cut that are tokenised all the same: what the cut changes is among them


class Template(NamedTuple):
    """A chat template and what a trial showed of it and of the tokenizer."""

    name: str
    text: str | None  # jinja; None: the tokenizer's own
    ending: str = ""  # what it writes after an answer
    closing: str = ""  # and then, where nothing follows: the end of a conversation, after that of a turn
    merges_system: bool = False  # it has no place for a system turn, which then opens the first user turn
    reserved: str = ""  # a regular expression of the tokens that only the template may write; "" for none
    special_ids: frozenset[int] = frozenset()  # of tokens that begin or end text or turns
    spaced: bool = False  # the tokenizer puts a space before any text
    longest: int = 1  # characters of its longest token


def chat_template(tokenizer: Any, choice: str | None) -> Template:
    """The template that a flag names: None is the tokenizer's own ("default" where it has several), or
    "plain" where it has none; a name of the tokenizer's; "plain"; "none" for text that is rendered already;
    or a file. To one that is not the tokenizer's own the BOS is added where the tokenizer would write it.

    Raises ValueError for a file that cannot be read, a template that is not one or renders no answer, or if
    nothing ends a turn: neither the template nor an eos token.
    """
    name, text = _chosen(tokenizer, choice)
    template = Template(name, text)
    asked = [{"role": "user", "content": "a"}]
    answered = [*asked, {"role": "assistant", "content": MARK}]
    shown = render(tokenizer, answered, template, False)
    if MARK not in shown:
        raise ValueError(f"chat template ({name}): it does not write what the assistant says")
    ending = shown.partition(MARK)[2]
    closing = _closing(tokenizer, template, [*answered, *asked], ending)
    if not ending.strip() and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos token, and the chat template writes no end of turn")
    try:
        headed = render(tokenizer, [{"role": "system", "content": MARK}, *asked], template, True)
    except ValueError:  # it has no place for a system turn
        headed = ""
    added = tokenizer.added_tokens_decoder
    special_ids = {
        id for id, token in added.items() if token.special and not re.search(WITHIN, token.content)
    }
    special_ids |= set(tokenizer.all_special_ids) - set(added)
    special_ids -= {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return template._replace(
        ending=ending.removesuffix(closing),
        closing=closing,
        merges_system=MARK not in headed,
        reserved="" if _is_verbatim(tokenizer, text) else _reserved(tokenizer, headed + shown),
        special_ids=frozenset(special_ids),
        spaced=tokenizer.convert_ids_to_tokens(ids(tokenizer, "a"))[:1][0].startswith("\u2581"),
        longest=max(map(len, tokenizer.get_vocab()), default=1),
    )


def _chosen(tokenizer: Any, choice: str | None) -> tuple[str, str | None]:
    """(name, text) of a template."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if choice is None and named and "default" not in named:
        raise ValueError(f"--chat-template: the tokenizer has several, choose one of {', '.join(named)}")
    own = named.get("default") if named else own
    if choice is None and own is not None:
        asks = own.endswith(ASK_FOR_GOOD)
        name = "the tokenizer's own" + ", without its control token" * asks
        return name, own[: -len(ASK_FOR_GOOD)] if asks else own if named else None
    choice = "plain" if choice is None else choice
    if choice in named:
        return choice, named[choice]
    try:
        text = TEMPLATES[choice] if choice in TEMPLATES else Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join([*TEMPLATES, *named])
        raise ValueError(f"--chat-template {choice}: not one of {known} and not a readable file") from error
    return choice, _with_bos(tokenizer, text)


def _with_bos(tokenizer: Any, text: str) -> str:
    bos = tokenizer.bos_token_id
    if bos is None or "bos_token" in text or tokenizer.bos_token in text:
        return text
    if tokenizer("a")["input_ids"][:1] != [bos]:
        return text
    begins = "messages and messages[0].content is string and messages[0].content.startswith(bos_token)"
    return "{% if not (" + begins + ") %}{{ bos_token }}{% endif %}" + text


def _is_verbatim(tokenizer: Any, text: str | None) -> bool:
    return text in (AS_IT_IS, _with_bos(tokenizer, AS_IT_IS))


def _closing(tokenizer: Any, template: Template, followed: list[Turn], ending: str) -> str:
    """What stands behind a special token that ends an answer, but only where no further turn follows."""
    try:
        after = render(tokenizer, followed, template, True).partition(MARK)[2]
    except ValueError:  # it takes one answer
        return ""
    common = os.path.commonprefix([ending, after])
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [common.rfind(token) + len(token) for token in special if token and token in common]
    return ending[max(ends) :].lstrip() if ends else ""


def _reserved(tokenizer: Any, shown: str) -> str:
    """Special tokens that begin or end text or turns; not what an answer may hold, such as marks of
    thoughts."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = {token for token in special if token in shown and not re.search(WITHIN, token)}
    ends = {tokenizer.bos_token, tokenizer.eos_token} - {None, ""}
    return "|".join(re.escape(token) for token in sorted(written | ends))


# ---- turns -> text
# --------------------------------------------------------------------------------------------------------


def render(
    tokenizer: Any,
    turns: list[Turn],
    template: Template,
    generation: bool,
    rendering: dict[str, Any] | None = None,
) -> str:
    """The template's text of a conversation, with the header of an answer if `generation`. Raises ValueError
    for turns it refuses."""
    if not turns:
        return ""
    if template.merges_system and turns[0]["role"] == "system":
        turns = _merged(turns)
    options = {"add_generation_prompt": generation, "chat_template": template.text, **(rendering or {})}
    try:
        with _soon():
            return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # jinja's own, and whatever a template raises for turns it does not like
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"chat template ({template.name}): {cause}") from error


@contextlib.contextmanager
def _soon() -> Iterator[None]:
    """A template is a program, and need not end: what takes longer than SECONDS is a TimeoutError. Signals
    reach the main thread alone; in another one there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"does not end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _merged(turns: list[Turn]) -> list[Turn]:
    system, *rest = turns
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{**system, "role": "user"}, *rest]


def opening(tokenizer: Any, turns: list[Turn], template: Template, rendering: dict[str, Any]) -> str:
    """What sampling would start from: the turns and the header of an answer, or, where they end with an
    assistant's, that turn left open. Raises ValueError."""
    if not turns or turns[-1]["role"] != "assistant":
        return render(tokenizer, turns, template, True, rendering)
    return around(tokenizer, turns, template, False, rendering, turns[-1]["content"])[0]


def around(
    tokenizer: Any,
    turns: list[Turn],
    template: Template,
    generation: bool,
    rendering: dict[str, Any],
    before: str = "",
) -> tuple[str, str]:
    """What the template writes before and after the content of the last turn; `before` is what stands of it
    already. Raises ValueError."""
    said = "".join(turn["content"] for turn in turns)
    mark = next((mark for mark in map(chr, range(9)) if mark not in said), MARK)
    marked = [*turns[:-1], {**turns[-1], "content": before + mark}]
    text, found, rest = render(tokenizer, marked, template, generation, rendering).partition(mark)
    if not found:
        raise ValueError("the chat template does not write the last turn as it stands")
    return text, rest


def check_written(turns: list[Turn], rendering: dict[str, Any], text: str, write: Callable[..., str]) -> None:
    """Raises ValueError if the chat template does not write a turn, a tool or a call of one: if the text that
    `write` gives would be the same without. Of an assistant's turn it may drop what it likes, thoughts."""
    if "tools" in rendering:
        without = {key: value for key, value in rendering.items() if key != "tools"}
        if write(turns=turns, rendering=without) == text:
            raise ValueError("the chat template does not write the tools")
    place = 0
    for index, turn in enumerate(turns):
        before, after = turns[:index], turns[index + 1 :]
        if turn.get("tool_calls"):
            if write(turns=[*before, with_fewer_calls(turn), *after], rendering=rendering) == text:
                raise ValueError(NO_CALLS)
        said = turn["content"].strip()
        found = text.find(said, place)
        if found >= 0:
            place = found + len(said)
        elif turn["role"] != "assistant":
            marked = write(turns=[*before, {**turn, "content": WORD}, *after], rendering=rendering)
            if WORD not in marked.casefold():
                raise ValueError(f"the chat template does not write a {turn['role']} turn")


def with_fewer_calls(turn: Turn) -> Turn:
    """A turn without the last of its calls."""
    calls = turn["tool_calls"][:-1]
    return {**turn, "tool_calls": calls} if calls else {k: v for k, v in turn.items() if k != "tool_calls"}


def change(said: str, turn: Turn, written: str, tail: str, ending: str) -> str:
    """A remark if the template leaves out some of what a turn says. Raises ValueError if it leaves out
    all."""
    if said not in tail:
        if not written.removesuffix(ending.rstrip()).strip():
            raise ValueError("the chat template writes nothing of an answer")
        if "".join(said.split()) not in "".join(tail.split()):
            return "the chat template leaves out or changes a part of an answer"
    for key in THOUGHTS:
        if isinstance(turn.get(key), str) and turn[key].strip() not in written:
            return f'the chat template leaves out the "{key}" of an answer'
    return ""


# ---- text -> ids
# --------------------------------------------------------------------------------------------------------


def ids(tokenizer: Any, text: str) -> list[int]:
    """Of a beginning: what the tokenizer makes of it, no special token added. Raises ValueError for text that
    is none."""
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    except TypeError:  # from a tool, say: of turns formats.py has seen to it
        raise ValueError("the text has half a surrogate pair, which is no character") from None


def ids_within(tokenizer: Any, text: str, template: Template) -> list[int]:
    """Of a text that follows other text: without the space that tokenizers of SentencePiece's kind put before
    whatever they are given."""
    if not template.spaced or not text:
        return ids(tokenizer, text)
    pattern, special = _pieces(tokenizer)
    found = []
    for index, piece in enumerate(re.split(pattern, text) if special else [text]):
        if index % 2:
            found.append(special[piece] if piece in special else special[piece.strip()])
        elif piece:
            found += _ids_after(tokenizer, piece)
    return found


@functools.lru_cache(maxsize=4)
def _pieces(tokenizer: Any) -> tuple[str, dict[str, int]]:
    """The added tokens as a regular expression, and their ids."""
    added = {
        token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if token.content
    }
    patterns = []
    for content in sorted(added, key=len, reverse=True):
        token = added[content][1]
        patterns.append(r"\s*" * token.lstrip + re.escape(content) + r"\s*" * token.rstrip)
    return f"({'|'.join(patterns)})", {content: id for content, (id, _) in added.items()}


def _ids_after(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text behind the first character that the tokenizer does not join with it. Raises
    ValueError."""
    for character in BEFORE:
        before, found = ids(tokenizer, character), ids(tokenizer, character + text)
        if found[: len(before)] == before and tokenizer.unk_token_id not in before:
            return found[len(before) :]
    raise ValueError("the tokenizer joins the text with whatever stands before it")


def first_ids(tokenizer: Any, text: str, count: int, template: Template) -> list[int]:
    """The first ids of a text, at least `count` if it has as many; the rest of a long text is not
    tokenised."""
    return ids_within(tokenizer, text[: (count + MARGIN) * template.longest], template)


def last_ids(tokenizer: Any, text: str, count: int, template: Template) -> list[int]:
    """The last `count` ids of what the tokenizer makes of a text; all of it is tokenised only where the
    beginning of a part that is long enough changes its end: one character again and again."""
    size = (count + MARGIN) * template.longest
    found = [ids(tokenizer, text[-size - shift :])[-count:] for shift in range(4 if len(text) > size else 1)]
    return found[0] if all(tail == found[0] for tail in found) else ids(tokenizer, text)[-count:]


def without_tail(tokenizer: Any, text: str, template: Template) -> str:
    """Without white space behind a special token that ends the text."""
    stripped = text.rstrip()
    last = ids(tokenizer, stripped[-template.longest :])[-1:] if stripped != text else []
    return stripped if template.special_ids.intersection(last) else text


def ended(found: list[int], tokenizer: Any, template: Template) -> list[int]:
    """With the eos token, unless a special token ends the text already."""
    return found if found and found[-1] in template.special_ids else [*found, tokenizer.eos_token_id]


def padding_id(tokenizer: Any) -> int:
    """The id that pads a batch of conversations: the tokenizer's, else its end of text."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise ValueError("tokenizer has neither a padding nor an eos token, and a classifier needs one")
    return found


# ---- ids -> text
# --------------------------------------------------------------------------------------------------------


def lead(tokenizer: Any, turns: list[Turn], template: Template, rendering: dict[str, Any]) -> str:
    """What the template writes between the header of an answer and what the answer says."""
    if not turns or turns[-1]["role"] == "assistant":
        return ""
    opened = opening(tokenizer, turns, template, rendering)
    try:
        answer = {"role": "assistant", "content": ""}
        before = around(tokenizer, [*turns, answer], template, False, rendering)[0]
    except ValueError:  # it does not write an answer as it stands
        return ""
    return before[len(opened) :] if before.startswith(opened) else ""


def answer_text(
    tokenizer: Any, prompt: list[int], answer: list[int], template: Template, lead: str = ""
) -> str:
    """What an answer says: the text of its ids as it stands after the prompt's, without tokens that begin or
    end text or turns, and without what the template writes around it; up to the end of a turn where the
    template spells that in letters, which generation does not stop at."""
    kept = [id for id in answer if id not in template.special_ids]
    before = prompt[-4:]  # some tokenizers drop a space at the beginning of a text
    shown, text = (
        tokenizer.decode(some, clean_up_tokenization_spaces=False) for some in (before, before + kept)
    )
    text, ending = text[len(shown) :].removeprefix(lead), template.ending
    if ending.strip() and not template.special_ids.intersection(ids(tokenizer, ending)):
        return text.partition(ending.rstrip())[0]
    return text.removesuffix(ending[: len(ending) - len(ending.lstrip())])
