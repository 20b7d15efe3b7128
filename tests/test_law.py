"""The law of the encoders: template x tokenizer x conversation, against models of templates written by hand.

A family is a chat template twice: in jinja, for the code, and as a function that yields its text in pieces,
for the tests; a test compares the two. A tokenizer has a twin that writes no space of its own: what the twin
makes of a text is what the text has to be wherever it follows other text.

`red:` names a change of the code that turns a test red.
"""

import functools
import itertools
import json
import string
import time
import unicodedata
import zlib
from types import MappingProxyType
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import chat
import encode
import formats

Turn = dict[str, Any]
Piece = tuple[str, int | None]  # text, and the index of the assistant turn that is written there
WIDE = 100_000  # a limit that cuts nothing


def law(examples: int, name: str) -> Callable:
    """The same conversations in every run, and others for another name."""
    kept = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    return lambda test: kept(seed(zlib.crc32(name.encode()))(test))


# ---- tokenizers

CORPUS = [
    "hello world how are you", "the cat sat on the mat, the dog did not", "def f(x):\n    return x + 1\n",
    "user\nassistant\nsystem\nAnswer: no.  yes", "one two three\n\nfour five", string.printable,
    " ".join(string.printable), "think about what the answer is",
    "==== ======== 1111 11111111 abab abababab \n\n\n\n x        y",
] * 3  # fmt: skip


@functools.cache
def trained(kind: str) -> str:
    """A tokenizer's JSON: <s>, </s> and <unk> are its only special tokens."""
    if kind.startswith("bytes") or kind == "nfc":
        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        if kind == "nfc":
            found.normalizer = normalizers.NFC()
    elif kind == "unigram":
        found = Tokenizer(models.Unigram())
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        found.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        )
    else:
        found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        found.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
        )
    found.train_from_iterator(CORPUS, trainer)
    if kind == "prepend":
        found.pre_tokenizer = None
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "always":
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    single = {"unigram": "$A </s>", "bytes": None, "bytes-one": None}.get(kind, "<s> $A")
    if single:
        marks = [(name, found.token_to_id(name)) for name in ("<s>", "</s>")]
        found.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=marks
        )
    made = json.loads(found.to_str())
    made["added_tokens"] = made["added_tokens"][:3]  # the bytes of SentencePiece's kind are plain tokens
    return json.dumps(made)


KINDS = ("bytes", "bytes-bos", "bytes-one", "nfc", "first", "always", "prepend", "unigram")
SPACED = ("always", "prepend", "unigram")  # a space where the text has none, after every special token
BOS = {"bytes": None, "bytes-one": "</s>", "unigram": None}  # others: <s>
WRITES_BOS = ("bytes-bos", "nfc", "first", "always", "prepend")


def wrapped(made: str, kind: str, tokens: Iterable[str | AddedToken], eos: str, jinja: str | None) -> Any:
    bos = {"bos_token": BOS.get(kind, "<s>")} if BOS.get(kind, "<s>") else {}
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made), eos_token=eos, unk_token="<unk>", chat_template=jinja, **bos
    )  # fmt: skip
    found.add_special_tokens({"additional_special_tokens": list(tokens)})
    return found


@functools.cache
def tokenizer_of(kind: str, tokens: tuple = (), eos: str = "</s>", jinja: str | None = None) -> Any:
    return wrapped(trained(kind), kind, tokens, eos, jinja)


@functools.cache
def twin_of(kind: str, tokens: tuple = (), eos: str = "</s>") -> Any:
    """The same ids, and no space before a text."""
    made = json.loads(trained(kind))
    if kind in ("first", "always", "unigram"):
        made["pre_tokenizer"]["prepend_scheme"] = "never"
    elif kind == "prepend":
        made["normalizer"] = made["normalizer"]["normalizers"][1]
    return wrapped(json.dumps(made), kind, tokens, eos, None)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decoded_within(tokenizer: Any, ids: list[int]) -> str:
    """What ids say after other ids: decoders of SentencePiece's kind strip a space at the very beginning."""
    anchor = tokenizer.convert_tokens_to_ids("a")
    assert isinstance(anchor, int) and decoded(tokenizer, [anchor]) == "a"
    return decoded(tokenizer, [anchor, *ids])[1:]


# ---- templates


class Refused(Exception):
    pass


class Family(NamedTuple):
    jinja: str
    pieces: Callable[..., Iterator[Piece]]
    tokens: tuple[str, ...] = ()
    eos: str = "</s>"
    system: str = "kept"  # or "refused", "dropped"
    ends: bool = True  # it writes an end of turn
    appends: bool = True  # it never rewrites what it wrote
    thinks: bool = False  # answers may hold thoughts
    said: Callable[[str], str] = str  # what it writes of an answer's content


def spoken(turns: list[Turn], index: int) -> int | None:
    return index if turns[index]["role"] == "assistant" else None


def split_system(turns: list[Turn]) -> tuple[str, list[Turn]]:
    return (turns[0]["content"], turns[1:]) if turns and turns[0]["role"] == "system" else ("", turns)


def must_alternate(turns: list[Turn]) -> None:
    for index, turn in enumerate(turns):
        if turn["role"] != ("user", "assistant")[index % 2]:
            raise Refused("alternate")


def chatml(turns, generation, bos, eos):
    for index, turn in enumerate(turns):
        yield f"<|im_start|>{turn['role']}\n", None
        yield f"{turn['content']}<|im_end|>", spoken(turns, index)
        yield "\n", None
    if generation:
        yield "<|im_start|>assistant\n", None


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def default_system(turns, generation, bos, eos):
    if turns[0]["role"] != "system":
        yield "<|im_start|>system\nYou help.<|im_end|>\n", None
    yield from chatml(turns, generation, bos, eos)


DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + CHATML
)


def mute(turns, generation, bos, eos):
    for index, turn in enumerate(turns):
        if turn["role"] != "system":
            yield f"<|im_start|>{turn['role']}\n", None
            yield f"{turn['content']}<|im_end|>", spoken(turns, index)
            yield "\n", None
    if generation:
        yield "<|im_start|>assistant\n", None


MUTE = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


def llama2(turns, generation, bos, eos):
    system, rest = split_system(turns)
    must_alternate(rest)
    offset = len(turns) - len(rest)
    for index, turn in enumerate(rest):
        content = turn["content"]
        if turn["role"] == "user":
            if index == 0 and offset:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
            yield f"{bos}[INST] {content.strip()} [/INST]", None
        else:
            yield f" {content.strip()} {eos}", index + offset


LLAMA2 = (
    "{% set ns = namespace(first='', i=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.first = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% else %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}{{ '[INST] ' + (ns.first + m.content).strip() + ' [/INST]' }}"
    "{% set ns.first = '' %}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}"
)


def llama3(turns, generation, bos, eos):
    yield bos, None
    for index, turn in enumerate(turns):
        yield f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n", None
        yield f"{turn['content'].strip()}<|eot_id|>", spoken(turns, index)
    if generation:
        yield "<|start_header_id|>assistant<|end_header_id|>\n\n", None


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def mistral(turns, generation, bos, eos):
    must_alternate(turns)
    yield bos, None
    for index, turn in enumerate(turns):
        if turn["role"] == "user":
            yield f"[INST] {turn['content']}[/INST]", None
        else:
            yield f"{turn['content']}{eos}", index


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant') }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def gemma(turns, generation, bos, eos):
    must_alternate(turns)
    yield bos, None
    for index, turn in enumerate(turns):
        role = {"assistant": "model"}.get(turn["role"], turn["role"])
        yield f"<start_of_turn>{role}\n", None
        yield f"{turn['content'].strip()}<end_of_turn>", spoken(turns, index)
        yield "\n", None
    if generation:
        yield "<start_of_turn>model\n", None


GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<start_of_turn>'"
    " + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def phi(turns, generation, bos, eos):
    """The eos is of the conversation's end, not of a turn's."""
    for index, turn in enumerate(turns):
        yield f"<|{turn['role']}|>\n", None
        yield f"{turn['content']}<|end|>", spoken(turns, index)
        yield "\n", None
    yield "<|assistant|>\n" if generation else eos, None


PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def zephyr(turns, generation, bos, eos):
    for index, turn in enumerate(turns):
        yield f"<|{turn['role']}|>\n", None
        yield f"{turn['content']}{eos}", spoken(turns, index)
        yield "\n", None
    if generation:
        yield "<|assistant|>\n", None


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def zephyr_open(turns, generation, bos, eos):
    """Sampling starts before the line break of the header."""
    for index, turn in enumerate(turns):
        yield f"<|{turn['role']}|>", None
        yield f"\n{turn['content']}{eos}", spoken(turns, index)
        yield "\n", None
    if generation:
        yield "<|assistant|>", None


def alpaca(turns, generation, bos, eos):
    headers = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    yield bos, None
    for index, turn in enumerate(turns):
        yield headers[turn["role"]], None
        yield turn["content"] + (eos if turn["role"] == "assistant" else ""), spoken(turns, index)
        yield "\n\n", None
    if generation:
        yield headers["assistant"], None


ALPACA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' }}{% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


def endless(turns, generation, bos, eos):
    return alpaca(turns, generation, bos, "")


ENDLESS = ALPACA.replace("{{ eos_token }}", "")


def after_thought(content: str) -> str:
    return content.split("</think>")[-1].lstrip("\n")


def thought(content: str) -> str:
    return content.split("</think>")[0].split("<think>")[-1].strip("\n") if "</think>" in content else ""


def last_question(turns: list[Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)


def rethinking(turns, generation, bos, eos, enable_thinking=True):
    """Thoughts of the last round only, an empty one where there is none."""
    for index, turn in enumerate(turns):
        yield f"<|im_start|>{turn['role']}\n", None
        said = turn["content"]
        if turn["role"] == "assistant":
            said = after_thought(said)
            if index > last_question(turns):
                said = f"<think>\n{thought(turn['content'])}\n</think>\n\n{said}"
        yield f"{said}<|im_end|>", spoken(turns, index)
        yield "\n", None
    if generation:
        yield "<|im_start|>assistant\n" + ("" if enable_thinking else "<think>\n\n</think>\n\n"), None


RETHINKING = (
    "{% set ns = namespace(q=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.q = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role != 'assistant' %}{{ m.content }}"
    "{% else %}{% if loop.index0 > ns.q %}{% set t = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{{ '<think>\n' + (t.strip('\n') if '</think>' in m.content else '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def forgetting(turns, generation, bos, eos):
    """Thoughts of earlier turns are dropped, the last turn's stay."""
    for index, turn in enumerate(turns):
        yield f"<|im_start|>{turn['role']}\n", None
        last = index == len(turns) - 1 or turn["role"] != "assistant"
        yield (
            (turn["content"] if last else after_thought(turn["content"])) + "<|im_end|>",
            spoken(turns, index),
        )
        yield "\n", None
    if generation:
        yield "<|im_start|>assistant\n", None


FORGETTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def empty_thought(turns, generation, bos, eos):
    """An empty thought for the last answer only."""
    for index, turn in enumerate(turns):
        yield f"<|im_start|>{turn['role']}\n", None
        blank = turn["role"] == "assistant" and index == len(turns) - 1 and "<think>" not in turn["content"]
        yield (
            ("<think>\n\n</think>\n\n" if blank else "") + f"{turn['content']}<|im_end|>",
            spoken(turns, index),
        )
        yield "\n", None
    if generation:
        yield "<|im_start|>assistant\n", None


EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def opening(turns, generation, bos, eos):
    """A thought is opened for the answer, by the header."""
    for index, turn in enumerate(turns):
        yield f"<|im_start|>{turn['role']}\n", None
        said = turn["content"]
        if turn["role"] == "assistant":
            yield "<think>\n", None
            said = said.removeprefix("<think>\n")
        yield f"{said}<|im_end|>", spoken(turns, index)
        yield "\n", None
    if generation:
        yield "<|im_start|>assistant\n<think>\n", None


OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not m.content.startswith('<think>\n') %}{{ '<think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def thoughtless(turns, generation, bos, eos):
    """No thought of any answer."""
    said = [
        turn | {"content": after_thought(turn["content"])} if turn["role"] == "assistant" else turn
        for turn in turns
    ]
    return zephyr(said, generation, bos, eos)


THOUGHTLESS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def opening_and_dropping(turns, generation, bos, eos):
    """A thought is opened for sampling, and no answer shows one."""
    yield from thoughtless(turns, False, bos, eos)
    if generation:
        yield "<|assistant|>\n<think>\n", None


OPENING_AND_DROPPING = THOUGHTLESS.replace("'<|assistant|>\n'", "'<|assistant|>\n<think>\n'")


def tooled(turns, generation, bos, eos, tools=()):
    head, rest = split_system(turns)
    if tools:
        shown = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        yield f"<|im_start|>system\n{head}Tools:\n{shown}<|im_end|>\n", None
    elif head:
        yield f"<|im_start|>system\n{head}<|im_end|>\n", None
    for index, turn in enumerate(rest, len(turns) - len(rest)):
        yield f"<|im_start|>{turn['role']}\n", None
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
        said = turn["content"] + "".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
        yield f"{said}<|im_end|>", spoken(turns, index)
        yield "\n", None
    if generation:
        yield "<|im_start|>assistant\n", None


TOOLED = (
    "{% set head = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools %}{{ '<|im_start|>system\n' + head + 'Tools:\n' }}"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif head %}{{ '<|im_start|>system\n' + head + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' }}{{ call.function | tojson }}"
    "{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

IM = ("<|im_start|>", "<|im_end|>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
THINK = ("<think>", "</think>")
FAMILIES = {
    "chatml": Family(CHATML, chatml, IM, "<|im_end|>"),
    "chatml, another eos": Family(CHATML, chatml, IM),
    "chatml in letters": Family(CHATML, chatml),
    "default system": Family(DEFAULT, default_system, IM, "<|im_end|>"),
    "mute": Family(MUTE, mute, IM, "<|im_end|>", system="dropped"),
    "llama2": Family(LLAMA2, llama2, said=str.strip),
    "llama3": Family(
        LLAMA3, llama3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
        said=str.strip,
    ),
    "mistral": Family(MISTRAL, mistral, ("[INST]", "[/INST]"), system="refused"),
    "gemma": Family(
        GEMMA, gemma, ("<start_of_turn>", "<end_of_turn>"), system="refused", said=str.strip
    ),
    "phi": Family(PHI, phi, ("<|end|>", *ROLES)),
    "zephyr": Family(ZEPHYR, zephyr),
    "zephyr, open header": Family(ZEPHYR.replace("'<|assistant|>\n'", "'<|assistant|>'"), zephyr_open),
    "alpaca": Family(ALPACA, alpaca),
    "endless": Family(ENDLESS, endless, ends=False),
    "rethinking": Family(
        RETHINKING, rethinking, IM + THINK, "<|im_end|>", appends=False, thinks=True, said=after_thought
    ),
    "forgetting": Family(FORGETTING, forgetting, IM, "<|im_end|>", appends=False, thinks=True),
    "empty thought": Family(EMPTY_THOUGHT, empty_thought, IM, "<|im_end|>", appends=False, thinks=True),
    "opening": Family(OPENING, opening, IM + THINK, "<|im_end|>", thinks=True),
    "thoughtless": Family(THOUGHTLESS, thoughtless, ROLES, thinks=True, said=after_thought),
    "opening and dropping": Family(
        OPENING_AND_DROPPING, opening_and_dropping, ROLES, appends=False, thinks=True, said=after_thought
    ),
    "tooled": Family(TOOLED, tooled, IM + ("<tool_call>", "</tool_call>"), "<|im_end|>"),
}  # fmt: skip


class Setting(NamedTuple):
    """A family on a tokenizer."""

    family: Family
    kind: str
    tokenizer: Any
    twin: Any
    template: chat.Template
    rendering: Any = MappingProxyType({})

    def pieces(self, turns: list[Turn], generation: bool) -> list[Piece]:
        ends = (self.tokenizer.bos_token or "", self.tokenizer.eos_token)
        return list(self.family.pieces(turns, generation, *ends, **self.rendering))

    def text(self, turns: list[Turn], generation: bool) -> str:
        return "".join(text for text, _ in self.pieces(turns, generation))

    def normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.kind == "nfc" else text

    def contents(self) -> st.SearchStrategy[str]:
        return contents(self.kind, ("<unk>", "<s>", "</s>", *THINK, *self.family.tokens))

    def answers(self) -> st.SearchStrategy[str]:
        content = self.contents()
        thinking = st.builds("<think>\n{}\n</think>\n\n{}".format, content, content)
        return st.one_of(content, thinking) if self.family.thinks else content


@functools.cache
def setting(name: str, kind: str) -> Setting:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(kind, family.tokens, family.eos, family.jinja)
    twin = twin_of(kind, family.tokens, family.eos)
    return Setting(family, kind, tokenizer, twin, chat.chat_template(tokenizer, None))


# ---- conversations

FRAGMENTS = [
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "hello", " world", "the cat", "Ünïcödé", "é", "e\u0301", "🙂", "👩‍👩‍👧",
    "日本語", "\u00a0", "\u2028", "\x00", "[INST]", "[/INST]", "<<SYS>>", "<|im", "_start|>", "<|user", "</", "s>",
    "### Response:\n", "\n\nHuman: ", "def f(x):\n    return x\n", "{{ x }}", "{% if %}", "<", "|>", "'", "\\n",
    "0", "1234567", "...", "<0x0A>", "## ", "&amp;", "assistant", "user\n", "think",
]  # fmt: skip


def contents(kind: str, banned: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Texts with anything in them but special tokens; of the letters a tokenizer knows, and begun by no mark
    that its normalizer would join with what the template writes before."""
    fragments, alphabet = FRAGMENTS, st.characters(exclude_categories=["Cs"], exclude_characters="▁")
    if kind == "unigram":  # it writes <unk> for letters that it did not see
        fragments = [fragment for fragment in FRAGMENTS if set(fragment) <= set(string.printable)]
        alphabet = st.sampled_from(string.printable)
    part = st.one_of(st.sampled_from(fragments), st.sampled_from(fragments), st.text(alphabet, max_size=8))
    made = st.lists(part, min_size=1, max_size=6).map("".join)

    def possible(text: str) -> bool:
        if not text.strip() or any(token in text for token in banned):
            return False
        return kind != "nfc" or not unicodedata.combining(text.lstrip()[0])

    return made.filter(possible)


@st.composite
def conversations(draw: Any, made: Setting) -> tuple[list[Turn], list]:
    """A prompt, and answers to it: texts, or the rest of a conversation."""
    content, answer = made.contents(), made.answers()
    prompt = [system(draw(content))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(content)), assistant(draw(answer))]
    prompt.append(user(draw(content)))
    found: list[Any] = draw(st.lists(answer, min_size=1, max_size=3, unique=True))
    if draw(st.integers(0, 3)) == 0:
        more = [user(draw(content)), assistant(draw(answer))]
        found = [[assistant(text), *more] for text in found]
    return prompt, found


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}


def system(content: str) -> Turn:
    return {"role": "system", "content": content}


def example_of(prompt: list[Turn], answers: list, **more: Any) -> formats.Example:
    """By way of a row."""
    if len(answers) == 1:
        row = {"prompt": prompt, "completion": answers[0], **more}
    else:
        scores = [float(-i) for i in range(len(answers))]
        row = {"prompt": prompt, "completions": answers, "scores": scores, **more}
    found = formats.parse(row)
    assert isinstance(found, formats.Example), found
    return found


def turns_of(answer: str | list[Turn]) -> list[Turn]:
    return [assistant(answer)] if isinstance(answer, str) else answer


def merged(made: Setting, prompt: list[Turn]) -> list[Turn]:
    """Where a template has no place for a system turn."""
    if made.family.system == "kept" or prompt[0]["role"] != "system":
        return prompt
    first = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
    return [user(first), *prompt[2:]]


# ---- what has to come out

Runs = list[tuple[str, bool]]


def expected(made: Setting, prompt: list[Turn], answer: list[Turn]) -> Runs | None:
    """What follows the prompt's text, in runs that are trained or not; None if the template does not write it
    after that."""
    start = made.text(prompt, True)
    written = made.pieces(prompt + answer, False)
    if not "".join(text for text, _ in written).startswith(start):
        return None
    position, runs = 0, []
    for text, index in written:
        trained = index is not None and index >= len(prompt)
        if trained and not made.family.ends:
            text += made.tokenizer.eos_token
        skipped = min(max(len(start) - position, 0), len(text))
        assert not (trained and skipped), "sampling starts within an answer"
        position += len(text)
        if text[skipped:]:
            runs.append((text[skipped:], trained))
    while not runs[-1][1]:
        runs.pop()
    joined = itertools.groupby(runs, key=lambda run: run[1])
    return [("".join(text for text, _ in group), trained) for trained, group in joined]


def runs_of(made: Setting, ids: list[int], mask: list[bool]) -> Iterator[tuple[list[int], bool]]:
    assert len(ids) == len(mask)
    for trained, group in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
        yield [token for token, _ in group], trained


def normal_runs(made: Setting, runs: Runs) -> Runs:
    return [(made.normal(text), trained) for text, trained in runs]


def check_prompt(made: Setting, ids: list[int], text: str) -> None:
    assert ids == ids_of(made.tokenizer, text)
    if made.kind not in SPACED:  # those decode their own ids of a text with further spaces in it
        assert decoded(made.tokenizer, ids) == made.normal(text)


def check_completion(made: Setting, prompt: list[int], ids: list[int], mask: list[bool], runs: Runs) -> None:
    found = [(decoded_within(made.tokenizer, run), flag) for run, flag in runs_of(made, ids, mask)]
    assert found == normal_runs(made, runs)
    whole = made.normal("".join(text for text, _ in runs))
    assert decoded(made.tokenizer, prompt + ids) == decoded(made.tokenizer, prompt) + whole
    for (run, _), (text, _) in zip(runs_of(made, ids, mask), runs):
        assert run == ids_of(made.twin, text)  # as sampling would have written it


def check_ends(made: Setting, ids: list[int], text: str) -> None:
    """Special tokens as often as the text has them: none doubled, none of them spelled in letters."""
    for token in (made.tokenizer.bos_token, made.tokenizer.eos_token, *made.family.tokens):
        if token:
            assert ids.count(made.tokenizer.convert_tokens_to_ids(token)) == text.count(token), token


EXAMPLES = 5
GRID = list(itertools.product(FAMILIES, KINDS))
FEW = list(itertools.product(FAMILIES, ("bytes-bos", "nfc", "first", "prepend", "unigram")))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_of_templates_write_what_the_templates_write(name):
    made = setting(name, "bytes-bos")
    thinking = "<think>\nt\n</think>\n\n c " if made.family.thinks else " c "
    for head, count, generation in itertools.product((0, 1), (1, 2, 3, 4), (False, True)):
        turns = [user("\nq "), assistant(thinking), user("r"), assistant("d")][:count]
        turns = [system(" s ")] * head + turns
        if made.family.system == "refused" and head or generation and count % 2 == 0:
            continue
        shown = made.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
        assert made.text(turns, generation) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_are_what_they_stand_for(kind):
    tokenizer, twin = tokenizer_of(kind), twin_of(kind)
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) == (kind in WRITES_BOS)
    text = "</s> the cat</s>\nthe  dog"
    assert decoded(twin, ids_of(twin, text)) == text
    assert (decoded(tokenizer, ids_of(tokenizer, text)) == text) == (kind not in SPACED)
    assert tokenizer.get_vocab() == twin.get_vocab()


# ---- the prompt is what sampling starts from, the rest what the template writes then


@pytest.mark.parametrize("name, kind", GRID)
def test_prompt_and_answers_are_the_templates_text(name, kind):
    """red: train the header; add the eos again; take `ids` for what follows the prompt."""
    made = setting(name, kind)

    @law(EXAMPLES, name + kind)
    @given(conversations(made))
    def check(conversation):
        prompt, answers = conversation
        example = example_of(prompt, answers)
        found = encode.encode(example, made.tokenizer, WIDE, WIDE, made.template)
        written = merged(made, prompt)
        runs = [expected(made, written, turns_of(answer)) for answer in answers]
        if None in runs or len(set(map(str, runs))) < len(runs):
            assert isinstance(found, str) and found
            return
        several = not isinstance(answers[0], str)
        if isinstance(found, str):  # of a template that rewrites what it wrote: encode_turns is for it
            assert several and not made.family.appends, found
            return
        check_prompt(made, found.prompt, made.text(written, True))
        assert len(found.completions) == len(answers)
        for ids, mask, want in zip(found.completions, found.trained, runs):
            check_completion(made, found.prompt, ids, mask, want)
            check_ends(made, found.prompt + ids, made.text(written, True) + "".join(text for text, _ in want))
        assert found.scores == example.scores
        check_remark(made, written is not prompt, [turns_of(answer) for answer in answers], found.remark)

    check()


def check_remark(made: Setting, was_merged: bool, answers: list[list[Turn]], remark: str) -> None:
    """What the template leaves out of the row is said, and nothing is said of a row that is whole."""
    said = [turn["content"] for turns in answers for turn in turns if turn["role"] == "assistant"]
    if was_merged:
        assert "system" in remark
    elif made.family.pieces is thoughtless and any("</think>" in text for text in said):
        assert "leaves out" in remark
    else:
        assert remark == ""


# ---- conversations


def whole_conversations(made: Setting) -> st.SearchStrategy[tuple[list[Turn], list[Turn]]]:
    """A beginning, and the rest: from the assistant's first turn to its last."""
    content = made.contents()
    rounds = st.lists(st.tuples(content, made.answers()), min_size=1, max_size=3)

    def split(head: str | None, said: list[tuple[str, str]]) -> tuple[list[Turn], list[Turn]]:
        turns = [turn for question, reply in said for turn in (user(question), assistant(reply))]
        return [system(head)] * (head is not None) + turns[:1], turns[1:]

    return st.builds(split, st.one_of(st.none(), content), rounds)


@pytest.mark.parametrize("name, kind", GRID)
def test_every_turn_of_a_conversation_is_trained_once_as_it_would_be_sampled(name, kind):
    """red: one group for a template that rewrites; a turn left out; a group's history rendered to its end."""
    made = setting(name, kind)

    @law(EXAMPLES, name + kind)
    @given(whole_conversations(made))
    def check(conversation):
        prompt, rest = conversation
        example = formats.parse({"messages": prompt + rest})
        assert (example.prompt, len(example.completions)) == (prompt, 1)
        found = encode.encode_turns(example, made.tokenizer, WIDE, WIDE, made.template)
        turns = merged(made, prompt) + rest
        first = len(turns) - len(rest)
        spoken_turns = [index for index in range(first, len(turns)) if turns[index]["role"] == "assistant"]
        starts = [made.text(turns[:index], True) for index in spoken_turns]
        runs = [expected(made, turns[:index], [turns[index]]) for index in spoken_turns]
        if None in runs:
            assert isinstance(found, str)
            return
        said = ["".join(text for text, _ in run) for run in runs]
        appended = all(
            after.startswith(before + text) for before, text, after in zip(starts, said, starts[1:])
        )
        groups = found if isinstance(found, list) else [found]
        assert len(groups) == (1 if appended else len(runs))
        due = iter(zip(starts, runs))
        for group in groups:
            (ids,), (mask,) = group.completions, group.trained
            start, text = None, ""
            for run, trained in runs_of(made, ids, mask):
                if trained:
                    want_start, want = next(due)
                    if start is None:
                        check_prompt(made, group.prompt, want_start)
                        start = made.normal(want_start)
                    assert start + text == made.normal(want_start)
                    assert [(decoded_within(made.tokenizer, run), True)] == normal_runs(made, want)
                assert run == ids_of(made.twin, decoded_within(made.tokenizer, run))
                text += decoded_within(made.tokenizer, run)
        assert next(due, None) is None

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_take_white_space_take_it_everywhere(kind):
    """red: what stands between turns tokenised without the end of turn before it.

    The library decodes no text of these, for the white space is in no id: the ids are compared.
    """
    family = FAMILIES["phi"]
    tokens = tuple(AddedToken(token, rstrip=True, normalized=False) for token in family.tokens)
    tokenizer = wrapped(trained(kind), kind, tokens, "</s>", family.jinja)
    twin = wrapped(twin_of(kind).backend_tokenizer.to_str(), kind, tokens, "</s>", None)
    said = ("hello", "the cat", "r", "the\ndog ", "s", "x")
    turns = [turn(text) for turn, text in zip((user, assistant) * 3, said)]
    example = formats.parse({"messages": turns})
    found = encode.encode_turns(example, tokenizer, WIDE, WIDE, chat.chat_template(tokenizer, None))
    made = Setting(family, kind, tokenizer, twin, None)
    start, whole = made.text(turns[:1], True), made.text(turns, False).removesuffix("\n</s>")
    assert ids_of(twin, "<|end|>\n\n") == ids_of(twin, "<|end|>")
    assert found.prompt == ids_of(tokenizer, start)
    assert found.completions == [ids_of(twin, whole)[len(ids_of(twin, start)) :]]
    learned = [token for token, flag in zip(found.completions[0], found.trained[0]) if flag]
    assert learned == [token for text in said[1::2] for token in ids_of(twin, f"{text}<|end|>")]


# ---- beginnings and ends, with templates that are not the tokenizer's own


def plain(turns, generation, bos, eos):
    yield bos, None
    for index, turn in enumerate(turns):
        names = {"user": "Human", "assistant": "Assistant", "system": "System"}
        yield f"\n\n{names[turn['role']]}:", None
        yield f" {turn['content']}" + (eos if turn["role"] == "assistant" else ""), spoken(turns, index)
    if generation:
        yield "\n\nAssistant:", None


def as_it_is(turns, generation, bos, eos):
    yield bos if not turns[0]["content"].startswith(bos) else "", None
    for index, turn in enumerate(turns):
        yield turn["content"], spoken(turns, index)


def begun(pieces: Callable) -> Callable:
    """A template in a file, and the BOS where the tokenizer writes it."""

    def found(turns, generation, bos, eos):
        yield bos, None
        yield from pieces(turns, generation, bos, eos)

    return found


CHOICES = {
    "plain": Family("", plain),
    "none": Family("", as_it_is, ends=False),
    "raw": Family("", as_it_is, ends=False),
    "a file without BOS": Family(CHATML, begun(chatml), IM, "<|im_end|>"),
    "a file with a BOS": Family(LLAMA3, llama3, FAMILIES["llama3"].tokens, "<|eot_id|>", said=str.strip),
    "a file that spells the BOS": Family("{{ '<s>' }}" + ZEPHYR, begun(zephyr)),
}


def chosen(name: str, kind: str, folder: Any, own: str | None = None) -> Setting:
    """The setting of a template that is named, and not the tokenizer's own."""
    family = CHOICES[name]
    choice = name
    if family.jinja:
        choice = folder / "template.jinja"
        choice.write_text(family.jinja, encoding="utf-8")
    if kind not in WRITES_BOS and name in ("plain", "none", "raw", "a file without BOS"):
        family = family._replace(
            pieces=lambda turns, generation, bos, eos, made=family.pieces: made(turns, generation, "", eos)
        )
    tokenizer = tokenizer_of(kind, family.tokens, family.eos, own)
    twin = twin_of(kind, family.tokens, family.eos)
    return Setting(family, kind, tokenizer, twin, chat.chat_template(tokenizer, str(choice)))


@pytest.mark.parametrize("name, kind", itertools.product(CHOICES, KINDS))
def test_named_templates_write_one_beginning_and_one_end(name, kind, tmp_path):
    """red: a BOS before every named template; before none."""
    if name == "a file that spells the BOS" and kind not in WRITES_BOS:
        pytest.skip("it spells the BOS of another tokenizer")
    made = chosen(name, kind, tmp_path, own=GEMMA)

    @law(EXAMPLES, name + kind)
    @given(conversations(made))
    def check(conversation):
        prompt, answers = conversation
        found = encode.encode(example_of(prompt, answers), made.tokenizer, WIDE, WIDE, made.template)
        runs = [expected(made, prompt, turns_of(answer)) for answer in answers]
        if len(set(map(str, runs))) < len(runs):
            assert isinstance(found, str)
            return
        check_prompt(made, found.prompt, made.text(prompt, True))
        for ids, mask, want in zip(found.completions, found.trained, runs):
            check_completion(made, found.prompt, ids, mask, want)
            check_ends(made, found.prompt + ids, made.text(prompt, True) + "".join(text for text, _ in want))
        if kind in WRITES_BOS:
            assert found.prompt[0] == made.tokenizer.bos_token_id
            assert found.prompt.count(made.tokenizer.bos_token_id) == 1

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_rendered_already_is_taken_as_it_is(kind, tmp_path):
    """red: the BOS or the eos of the text not seen."""
    made = chosen("none", kind, tmp_path)
    tokenizer = made.tokenizer
    bos = "<s>" if kind in WRITES_BOS else ""
    for start, end in itertools.product(("", bos), ("", "</s>", "</s>\n")):
        row = {"prompt": f"{start}[INST] hello [/INST]", "completion": f" the cat{end}"}
        found = encode.encode(formats.parse(row), tokenizer, WIDE, WIDE, made.template)
        check_prompt(made, found.prompt, f"{bos}[INST] hello [/INST]")
        check_completion(made, found.prompt, found.completions[0], found.trained[0], [(" the cat</s>", True)])
        whole = f"{start}[INST] hello [/INST] the cat"
        found = encode.encode_turns(
            formats.parse({"text": whole + end}), tokenizer, WIDE, WIDE, made.template
        )
        begin = [] if start or tokenizer.bos_token is None else [tokenizer.bos_token_id]
        assert found.prompt + found.completions[0] == begin + ids_of(tokenizer, whole + "</s>")
        # nothing comes before the first token of all
        assert found.trained[0] == [bool(found.prompt)] + [True] * (len(found.completions[0]) - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_is_a_token_that_ends_something(kind):
    """red: any special token taken for an end."""
    tokenizer, twin = tokenizer_of(kind, THINK), twin_of(kind, THINK)
    template = chat.chat_template(tokenizer, "none")
    for answer in ("the cat</think>", "the cat</think>\n", "the cat <unk>", "the cat é"):
        found = encode.encode(example_of([user("q")], [answer]), tokenizer, WIDE, WIDE, template)
        assert found.completions == [ids_of(twin, answer + "</s>")]


@pytest.mark.parametrize("name, kind", itertools.product(["chatml", "llama3", "plain"], KINDS))
def test_plain_text_is_trained_whole(name, kind, tmp_path):
    """red: no eos; the first token of all trained; the text tokenised as what follows."""
    made = chosen(name, kind, tmp_path) if name == "plain" else setting(name, kind)

    @law(EXAMPLES, name + kind)
    @given(made.contents())
    def check(text):
        found = encode.encode_turns(formats.parse({"text": text}), made.tokenizer, WIDE, WIDE, made.template)
        (ids,), (mask,) = found.completions, found.trained
        bos, eos = made.tokenizer.bos_token_id, made.tokenizer.eos_token_id
        assert found.prompt == ([] if bos is None else [bos])
        assert found.prompt + ids == [*found.prompt, *ids_of(made.tokenizer, text), eos]
        assert mask == [bos is not None] + [True] * (len(ids) - 1)

    check()


# ---- thoughts that a template drops

T, U = "<think>\nt\n</think>\n\n", "<think>\nu\n</think>\n\n"


@pytest.mark.parametrize("name", ["thoughtless", "opening and dropping"])
@pytest.mark.parametrize(
    "answers",
    [
        [T + "a", U + "a"], ["a", T + "a"], [T + "a", U + "a", "b"], [T, "b"], [T, U], [T + "\n", T + "a"],
        [[assistant(T + "a"), user("r"), assistant(T)]], [[assistant(T), user("r"), assistant("a")]],
    ],
)  # fmt: skip
def test_answers_of_which_nothing_or_the_same_is_left_are_refused(name, answers):
    """red: only the first two completions compared; the check of an empty answer dropped."""
    made = setting(name, "bytes-bos")
    for encoder in (encode.encode, encode.encode_turns):
        found = encoder(example_of([user("q")], answers), made.tokenizer, WIDE, WIDE, made.template)
        assert isinstance(found, str) and found


def test_the_switch_of_thinking_is_the_rows():
    """red: chat_template_kwargs not passed on."""
    made = setting("rethinking", "bytes")._replace(rendering={"enable_thinking": False})
    row = {"chat_template_kwargs": {"enable_thinking": False}}
    found = encode.encode(
        example_of([user("q")], ["a", "b"], **row), made.tokenizer, WIDE, WIDE, made.template
    )
    check_prompt(made, found.prompt, made.text([user("q")], True))
    assert decoded(made.tokenizer, found.prompt).endswith("<think>\n\n</think>\n\n")
    for ids, mask, answer in zip(found.completions, found.trained, "ab"):
        check_completion(made, found.prompt, ids, mask, [(f"{answer}<|im_end|>", True)])
    # the header is for an answer without a thought
    found = encode.encode(
        example_of([user("q")], [T + "a", "b"], **row), made.tokenizer, WIDE, WIDE, made.template
    )
    assert isinstance(found, str)


# ---- turns that templates do not take as they are


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
@pytest.mark.parametrize(
    "prompt", [[user("q"), user("r")], [user("q"), assistant("a"), user("r"), user("s")], [assistant("a"), user("q")]]
)  # fmt: skip
def test_turns_that_do_not_alternate_are_a_reason(name, prompt):
    """red: what a template raises not caught."""
    made = setting(name, "bytes-bos")
    for head in ([], [system("s")]):
        if head and prompt[0]["role"] == "assistant" and made.family.system == "refused":
            continue  # the system turn becomes the user turn that is missing
        for encoder in (encode.encode, encode.encode_turns, encode.encode_rendered):
            found = encoder(example_of(head + prompt, ["a", "b"]), made.tokenizer, WIDE, WIDE, made.template)
            assert isinstance(found, str) and ("alternate" in found or "user and assistant" in found)
    long = [
        turn for _ in range(30) for turn in (user("q"), assistant("a"))
    ]  # also where the cause is cut off
    found = encode.encode(
        example_of(prompt + long + [user("q")], ["a", "b"]), made.tokenizer, 100, 50, made.template
    )
    assert isinstance(found, str)


@pytest.mark.parametrize("name, kind", FEW)
def test_an_open_turn_is_continued(name, kind):
    """red: the header written again; the open turn closed."""
    made = setting(name, kind)
    content = made.contents()

    @law(EXAMPLES, name + kind)
    @given(content, content, st.lists(content, min_size=1, max_size=3, unique=True), st.booleans())
    def check(question, begun, answers, several):
        prompt = [user(question), assistant(begun)]
        rest = [user("r"), assistant("s")] if several else []
        found = encode.encode(
            example_of(prompt, [[assistant(answer), *rest] for answer in answers]),
            made.tokenizer, WIDE, WIDE, made.template,
        )  # fmt: skip
        marked = [user(question), assistant(begun + "@#@")]
        start = made.text(marked, False).partition("@#@")[0]
        wholes = [[user(question), assistant(begun + answer), *rest] for answer in answers]
        written = [made.pieces(turns, False) for turns in wholes]
        shown = ["".join(text for text, _ in pieces) for pieces in written]
        if len({text for text in shown}) < len(answers):
            assert isinstance(found, str)
            return
        if isinstance(found, str):
            assert several and not made.family.appends, found
            return
        check_prompt(made, found.prompt, start)
        for ids, mask, pieces in zip(found.completions, found.trained, written):
            runs, position = [], 0
            for text, index in pieces:
                text += made.tokenizer.eos_token if index is not None and not made.family.ends else ""
                left = text[max(len(start) - position, 0) :]
                position += len(text)
                runs += [(left, index is not None)] * bool(left)
            while not runs[-1][1]:
                runs.pop()
            joined = itertools.groupby(runs, key=lambda run: run[1])
            want = [("".join(text for text, _ in group), trained) for trained, group in joined]
            check_completion(made, found.prompt, ids, mask, want)

    check()


@pytest.mark.parametrize("name", ["forgetting", "rethinking", "empty thought", "endless"])
def test_an_open_turn_is_continued_in_a_conversation_that_is_rewritten(name):
    """red: encode_turns begins after the prompt."""
    made = setting(name, "bytes-bos")
    prompt = [user("q"), assistant(T + "o" if made.family.thinks else "o")]
    example = example_of(prompt, [[assistant("p"), user("r"), assistant("s"), user("t"), assistant("u")]])
    first, *later = encode.encode_turns(example, made.tokenizer, WIDE, WIDE, made.template)
    start = made.text([prompt[0], assistant(prompt[1]["content"] + "@#@")], False).partition("@#@")[0]
    check_prompt(made, first.prompt, start)
    end = made.tokenizer.eos_token
    check_completion(made, first.prompt, *first.completions, *first.trained, [(f"p{end}", True)])
    turns = [prompt[0], assistant(prompt[1]["content"] + "p"), *example.completions[0][1:]]
    assert len(later) == 2
    for group, index in zip(later, (3, 5)):
        check_prompt(made, group.prompt, made.text(turns[:index], True))
        runs = expected(made, turns[:index], [turns[index]])
        check_completion(made, group.prompt, *group.completions, *group.trained, runs)


# ---- tools

ZOOM = {
    "type": "function",
    "function": {"name": "zoom", "description": "närer", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"by": "2 <x> é"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "done"}


@pytest.mark.parametrize("kind", KINDS)
def test_tools_and_their_calls_are_written(kind):
    """red: the tools not passed on; calls not trained; a tool's turn trained."""
    if kind == "unigram":
        tool, calling = json.loads(
            json.dumps([ZOOM, CALLING]).replace("\\u00e4", "a").replace("\\u00e9", "e")
        )
    else:
        tool, calling = ZOOM, CALLING
    made = setting("tooled", kind)._replace(rendering={"tools": [tool]})
    for prompt in ([user("q")], [system("s"), user("q")], [user("q"), calling, RESULT]):
        for rest in ([calling], [calling, RESULT, assistant("a")], [assistant("a"), user("r"), calling]):
            example = example_of(prompt, [rest], tools=[tool])
            for encoder in (encode.encode, encode.encode_turns):
                found = encoder(example, made.tokenizer, WIDE, WIDE, made.template)
                check_prompt(made, found.prompt, made.text(prompt, True))
                runs = expected(made, prompt, rest)
                check_completion(made, found.prompt, *found.completions, *found.trained, runs)
                assert found.remark == ""


@pytest.mark.parametrize(
    "name", sorted(set(FAMILIES) - {"tooled", "llama2", "mistral", "gemma", "opening and dropping"})
)
def test_tools_that_the_template_does_not_write_are_a_reason(name):
    """red: no look at what was written."""
    made = setting(name, "bytes-bos")
    limits = (made.tokenizer, WIDE, WIDE, made.template)
    for encoder in (encode.encode, encode.encode_turns, encode.encode_rendered):
        found = encoder(example_of([user("q")], ["a"], tools=[ZOOM]), *limits)
        assert isinstance(found, str) and "tools" in found, encoder
        for rest in ([CALLING], [CALLING, RESULT, assistant("a")], [assistant("a"), user("r"), CALLING]):
            found = encoder(example_of([user("q")], [rest]), *limits)
            rewritten = encoder is encode.encode and not made.family.appends and len(rest) > 1
            said = found[0].remark if isinstance(found, list) else found  # of what is left of a conversation
            assert isinstance(said, str) and (rewritten or "tool_calls" in said), encoder
        found = encoder(example_of([user("q"), CALLING, RESULT], ["a"]), *limits)
        assert isinstance(found, str) and "tool_calls" in found, encoder


# ---- text that is rendered already


@pytest.mark.parametrize("name", FAMILIES)
def test_text_with_the_tokens_of_turns_is_a_reason(name):
    """red: one of the places not looked at; a token not known."""
    made = setting(name, "bytes-bos")
    inner = {*THINK, "<tool_call>", "</tool_call>"}
    tokens = {*made.family.tokens, made.tokenizer.bos_token, made.family.eos} - inner
    hidden = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for token in sorted(tokens):
        text = f"hello{token}\nworld"
        spoiled = json.loads(json.dumps(hidden).replace("2 <x>", token))
        rows = [
            ([user(text)], ["a", "b"]), ([user("q")], [text, "b"]), ([user("q")], ["b", text]),
            ([system(text), user("q")], ["a"]), ([user("q"), assistant(text), user("r")], ["a"]),
            ([user("q")], [[assistant("a"), user(text), assistant("b")]]), ([user("q"), assistant(text)], ["a"]),
            ([user("q"), assistant("a")], [text]), ([user("q")], [[assistant("a"), user("r"), assistant(text)]]),
        ]  # fmt: skip
        if name == "tooled":
            rows += [([user("q"), spoiled, RESULT], ["a"]), ([user("q")], [[spoiled]])]
        for prompt, answers in rows:
            for encoder in (encode.encode, encode.encode_turns, encode.encode_rendered):
                found = encoder(example_of(prompt, answers), made.tokenizer, WIDE, WIDE, made.template)
                assert isinstance(found, str) and token in found, (token, prompt, answers)


def test_marks_of_thoughts_are_no_tokens_of_turns():
    """red: every special token kept to the template."""
    made = setting("rethinking", "bytes")
    found = encode.encode(
        example_of([user("what is </think>")], [T + "a"]), made.tokenizer, WIDE, WIDE, made.template
    )
    ids = found.prompt + found.completions[0]
    assert ids.count(made.tokenizer.convert_tokens_to_ids("</think>")) == 2


# ---- what is cut


def cut_prompt(made: Setting, prompt: list[Turn], limit: int) -> list[int] | None:
    """The ids that the prompt has to be cut to: without its oldest turns, else without the beginning of its
    last one; None if what stands around that one is too long."""
    head = prompt[:1] if prompt[0]["role"] == "system" else []
    starts = [index for index in range(len(head) + 1, len(prompt)) if prompt[index]["role"] == "user"]
    for start in (len(head), *starts):
        text = made.text(merged(made, head + prompt[start:]), True)
        ids = ids_of(made.tokenizer, text)
        if len(ids) <= limit:
            return ids
    marked = made.text(merged(made, [*head, user("@#@")]), True)
    before, _, after = marked.partition("@#@")
    frame = ids_of(made.tokenizer, before)
    room = limit - len(frame)
    return frame + ids[-room:] if room > len(ids_of(made.twin, after)) else None


CUT_FAMILIES = [
    "chatml", "default system", "llama2", "llama3", "mistral", "gemma", "phi", "alpaca", "endless", "zephyr, open header",
    "rethinking", "forgetting", "mute",
]  # fmt: skip


@pytest.mark.parametrize(
    "name, kind", itertools.product(CUT_FAMILIES, ["bytes", "nfc", "first", "always", "unigram"])
)
def test_what_is_too_long_loses_its_oldest_turns_and_the_end_of_its_answers(name, kind):
    """red: a turn more or less dropped; the frame not counted; the eos behind a cut answer."""
    made = setting(name, kind)

    @law(EXAMPLES, name + kind)
    @given(conversations(made), st.data())
    def check(conversation, data):
        prompt, answers = conversation
        example = example_of(prompt, answers)
        whole = encode.encode(example, made.tokenizer, WIDE, WIDE, made.template)
        assume(isinstance(whole, encode.Encoded))
        limit = data.draw(st.integers(1, len(whole.prompt) + 2), "max_prompt_length")
        longest = max(map(len, whole.completions))
        length = limit + data.draw(st.integers(0, longest + 2), "max_length - max_prompt_length")
        found = encode.encode(example, made.tokenizer, length, limit, made.template)
        start = cut_prompt(made, prompt, limit)
        room = length - len(start or ())
        kept = [ids[:room] for ids in whole.completions]
        trains = all(any(mask[:room]) for mask in whole.trained)
        if start is None or not trains or len(set(map(tuple, kept))) < len(kept):
            assert isinstance(found, str) and found
            return
        assert found.prompt == start
        assert found.completions == kept
        assert found.trained == [mask[:room] for mask in whole.trained]
        assert found.remark == whole.remark

    check()


@pytest.mark.parametrize("name, kind", itertools.product(CUT_FAMILIES, ["bytes", "always"]))
def test_conversations_that_are_too_long(name, kind):
    """red: a group longer than the limit; a history cut where it need not be."""
    made = setting(name, kind)

    @law(EXAMPLES, name + kind)
    @given(whole_conversations(made), st.data())
    def check(conversation, data):
        prompt, rest = conversation
        example = formats.parse({"messages": prompt + rest})
        whole = encode.encode_turns(example, made.tokenizer, WIDE, WIDE, made.template)
        assume(not isinstance(whole, str))
        groups = whole if isinstance(whole, list) else [whole]
        longest = max(len(group.prompt) + len(group.completions[0]) for group in groups)
        limit = data.draw(st.integers(1, max(len(group.prompt) for group in groups) + 2), "max_prompt_length")
        length = data.draw(st.integers(limit + 1, max(limit, longest) + 2), "max_length")
        found = encode.encode_turns(example, made.tokenizer, length, limit, made.template)
        if limit >= longest:
            assert found == whole
        if isinstance(found, encode.Encoded) or not isinstance(whole, list):
            assert found == encode.encode(example, made.tokenizer, length, limit, made.template)
            if isinstance(whole, list):  # it was not seen to be rewritten as far as there was room
                assert len(found.prompt) + len(found.completions[0]) == length
            return
        turns = prompt + rest
        indices = [index for index in range(len(prompt), len(turns)) if turns[index]["role"] == "assistant"]
        due = []
        for index, group in zip(indices, whole):
            start = cut_prompt(made, turns[:index], limit)
            kept = group.completions[0][: length - len(start or ())]
            if start is not None and kept:
                due.append((start, kept))
        if not due:
            assert isinstance(found, str)
            return
        assert [(group.prompt, group.completions[0]) for group in found] == due

    check()


def test_a_prompt_of_users_alone_loses_its_first_turns_first():
    """red: a dialogue that may only begin again after an answer."""
    made = setting("chatml", "bytes")
    prompt = [system("s"), *(user(f"{word} " * 20) for word in ("hello", "world", "the", "cat"))]
    whole = ids_of(made.tokenizer, made.text(prompt, True))
    for limit in range(30, len(whole) + 1):
        found = encode.encode(example_of(prompt, ["a"]), made.tokenizer, WIDE, limit, made.template)
        assert found.prompt == cut_prompt(made, prompt, limit)


@pytest.mark.parametrize("name", ["rethinking", "forgetting"])
def test_a_conversation_that_is_rewritten_is_a_group_a_turn_also_if_its_first_answer_is_cut(name):
    """red: nothing after the cut looked at."""
    made = setting(name, "bytes")
    first = assistant(T + "hello world " * 50)
    turns = [user("q"), first, user("r"), assistant("the cat"), user("s"), assistant("the dog")]
    limits = (made.tokenizer, 100, 60, made.template)
    found = encode.encode_turns(formats.parse({"messages": turns}), *limits)
    assert [group.prompt for group in found] == [cut_prompt(made, turns[:index], 60) for index in (1, 3, 5)]
    assert len(found[0].completions[0]) == 100 - len(found[0].prompt)
    for index, group in zip((3, 5), found[1:]):
        want = expected(made, turns[:index], [turns[index]])
        check_completion(made, group.prompt, *group.completions, *group.trained, want)


WORDS = "hello world the cat sat on mat, and: (x) = 12345 -> é 🙂 日本語 \n \n\n \t ... def f(x): a.b.c  --  ' \"".split(
    " "
)


def long_text(length: int, seed: int) -> str:
    state, parts, size = seed, [], 0
    while size < length:
        state = (state * 1103515245 + 12345) % 2**31
        parts.append(WORDS[state // 65536 % len(WORDS)])
        size += len(parts[-1]) + 1
    return " ".join(parts)[:length].strip() + "."


# A Unigram model decides by the rounding of sums over all of a run where its odd ones stand: no runs for it.
HUGE = [
    (name, kind, text)
    for name, kind in itertools.product(("chatml", "llama3"), ("bytes", "nfc", "first", "always", "unigram"))
    for text in ("text", "=", "ab", "\n", " ", "\u0301e")
    if text == "text" or kind != "unigram" and (name == "chatml" or text == " ")
]


@pytest.mark.parametrize("name, kind, text", HUGE)
def test_a_huge_text_is_cut_as_if_all_of_it_were_tokenised(name, kind, text):
    """red: a window of a character or two an id; one look at a run."""
    made = setting(name, kind)
    text = long_text(100_000, 7) if text == "text" else f"a{text * (100_000 // len(text))}b."
    if kind == "unigram":
        text = "".join(letter for letter in text if letter in string.printable)
    prompt = [system("s"), user(text)]
    start = cut_prompt(made, prompt, 256)
    found = encode.encode(example_of(prompt, [text]), made.tokenizer, 512, 256, made.template)
    kept = ids_of(made.twin, expected(made, prompt, [assistant(text)])[0][0])[:256]
    assert len(start) == 256
    assert (found.prompt, found.completions, found.trained) == (start, [kept], [[True] * len(kept)])


def seconds(work: Callable, *args: Any) -> tuple[float, Any]:
    begun = time.process_time()
    result = work(*args)
    return time.process_time() - begun, result


def long_conversation(count: int) -> list[Turn]:
    return [
        turn for i in range(count // 2) for turn in (user(f"question {i}?"), assistant(f"the answer {i}."))
    ]


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("name", ["chatml", "llama2", "opening"])
def test_a_conversation_of_4000_turns_takes_no_time(name, length):
    """red: every history rendered, whatever has room."""
    made = setting(name, "bytes-bos")
    example = formats.parse({"messages": long_conversation(4000)})
    limits = (made.tokenizer, length, length // 2, made.template)
    took, found = seconds(encode.encode_turns, example, *limits)
    assert took < 2
    assert len(found.prompt) + len(found.completions[0]) == length


@pytest.mark.parametrize("length, count", [(512, 1200), (2048, 600)])
def test_a_conversation_that_is_rewritten_takes_time_in_proportion(length, count):
    """red: each history looked at from its beginning.

    Every turn is a group with a prompt of up to half the length: 4,000 turns at a length of 4,096 are four
    million ids, and that is no matter of two seconds.
    """
    made = setting("rethinking", "bytes-bos")
    took = []
    for turns in (count // 2, count):
        example = formats.parse({"messages": long_conversation(turns)})
        limits = (made.tokenizer, length, length // 2, made.template)
        spent, found = seconds(encode.encode_turns, example, *limits)
        took.append(spent)
        assert len(found) == turns // 2
        assert all(len(group.prompt) <= length // 2 for group in found)
        assert all(len(group.prompt) + len(group.completions[0]) <= length for group in found)
    assert took[1] < 3.2 * took[0]


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("name", ["chatml", "llama2", "rethinking", "endless"])
def test_a_prompt_of_4000_turns_takes_no_time(name, length):
    """red: the turns dropped one by one."""
    made = setting(name, "bytes-bos")
    example = example_of([*long_conversation(4000), user("q")], ["a", "b"])
    limits = (made.tokenizer, length, length // 2, made.template)
    took, found = seconds(encode.encode, example, *limits)
    assert took < 2
    assert length // 2 - 40 < len(found.prompt) <= length // 2


@pytest.mark.parametrize("kind", ["bytes", "prepend"])
def test_ten_megabytes_are_not_tokenised_to_be_cut(kind):
    """red: all of a text tokenised."""
    made = setting("chatml", kind)
    huge = long_text(1000, 7) * 10_000
    limits = (made.tokenizer, 512, 256, made.template)
    for prompt, answer in (([user("q")], huge), ([user(huge)], "a")):
        example = example_of(prompt, [answer])
        took, found = seconds(encode.encode, example, *limits)
        assert took < 2
        assert len(found.prompt) + len(found.completions[0]) <= 512
    example = formats.parse({"text": huge})
    took, found = seconds(encode.encode_turns, example, *limits)
    assert took < 2
    assert len(found.completions[0]) + len(found.prompt) == 512


# ---- whole conversations


@pytest.mark.parametrize("name, kind", FEW)
def test_whole_conversations_are_tokenised_at_once(name, kind):
    """red: the answers tokenised apart; an end that is no padding cut off."""
    made = setting(name, kind)
    padding = chat.padding_id(made.tokenizer)

    @law(EXAMPLES, name + kind)
    @given(conversations(made))
    def check(conversation):
        prompt, answers = conversation
        example = example_of(prompt, answers)
        found = encode.encode_rendered(example, made.tokenizer, WIDE, WIDE, made.template)
        texts = [made.text(merged(made, prompt) + turns_of(answer), False) for answer in answers]
        if len(set(texts)) < len(texts):
            assert isinstance(found, str)
            return
        assert len(found.completions) == len(answers)
        for ids, mask, text in zip(found.completions, found.trained, texts):
            whole = ids_of(made.tokenizer, text)
            while whole[-1] == padding:  # a classifier reads the last token that is none
                whole.pop()
            assert found.prompt + ids == whole
            assert mask == [bool(found.prompt)] + [True] * (len(ids) - 1)
        if len(answers) > 1:
            assert len({ids[0] for ids in found.completions}) > 1 or min(map(len, found.completions)) == 1

    check()


@pytest.mark.parametrize("name", ["llama2", "llama3", "zephyr", "chatml"])
def test_a_whole_conversation_ends_before_its_padding(name):
    """red: every special token at the end taken for padding."""
    family = FAMILIES[name]
    tokenizer = wrapped(
        trained("bytes-bos"), "bytes-bos", (*family.tokens, "<pad>"), family.eos, family.jinja
    )
    made = setting(name, "bytes-bos")._replace(tokenizer=tokenizer)
    text = made.text([user("q"), assistant("a")], False)
    for padding in ("<pad>", family.eos):
        tokenizer.pad_token = padding
        found = encode.encode_rendered(
            example_of([user("q")], ["a"]), tokenizer, WIDE, WIDE, chat.chat_template(tokenizer, None)
        )
        assert found.prompt + found.completions[0] == ids_of(tokenizer, text.removesuffix(padding))
