"""Chat templates and tokenizers: what a flag names, what is written for turns, the ids of a part of a text.

The tokenizer of examples/tiny is byte-level and writes ChatML. `red:` names a change of chat.py that turns a
test red.
"""

import random
import re

import pytest
import transformers as hf
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

import chat


@pytest.fixture
def tokenizer():
    return hf.AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")


def turns(*contents, system=None):
    opening = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(contents)
    return opening + [{"role": role, "content": content} for role, content in zip(roles, contents)]


TALK = turns("one two three", "four", "five six seven", system="Be brief.")
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none two three<|im_end|>\n"
CHATML += "<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>user\nfive six seven<|im_end|>\n"
SPOKEN = "\n\nSystem: Be brief.\n\nHuman: one two three\n\nAssistant: four<|im_end|>\n\nHuman: five six seven"
TRIM = "{% for m in messages %}{{ m.role + ':' + m.content | trim + '\n' }}{% endfor %}"
TRIM += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
RENDERED = {  # what is chosen: its name, the prompt, the header of an answer
    None: ("the tokenizer's own", CHATML, "<|im_start|>assistant\n"),
    "plain": ("plain", SPOKEN, "\n\nAssistant:"),
    "none": ("none", "Be brief.one two threefourfive six seven", ""),
    "raw": ("raw", "Be brief.one two threefourfive six seven", ""),
}


@pytest.mark.parametrize("choice", RENDERED, ids=str)
def test_what_a_template_writes(tokenizer, choice):
    # red: a header without generation; "none" a template of its own
    template = chat.chat_template(tokenizer, choice)
    name, text, header = RENDERED[choice]
    assert template.name == name
    assert chat.render(tokenizer, TALK, template, False) == text
    assert (
        chat.render(tokenizer, TALK, template, True)
        == chat.opening(tokenizer, TALK, template, {})
        == text + header
    )
    assert chat.render(tokenizer, [], template, True) == ""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


SHOWN = {  # a template: how it ends an answer, whether a system turn is merged, what turns may not hold
    "own": (None, "<|im_end|>\n", False, ["<|im_start|>", "<|im_end|>"]),
    "plain": ("plain", "<|im_end|>", False, ["<|im_end|>"]),
    "none": ("none", "", False, []),
    "no system": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '[' + m.role + ']' + m.content + '<|pad|>' }}{% endfor %}",
        "<|pad|>",
        True,
        ["<|pad|>", "<|im_end|>"],
    ),
    "system forgotten": (
        "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}",
        "<|im_end|>",
        True,
        ["<|im_end|>"],
    ),
}


@pytest.mark.parametrize("case", SHOWN)
def test_what_a_trial_shows(tokenizer, tmp_path, case):
    # red: any field of Template left at its default
    choice, ending, merges, reserved = SHOWN[case]
    if choice and choice.startswith("{"):
        choice = write(tmp_path / "a.jinja", choice)
    template = chat.chat_template(tokenizer, choice)
    assert (template.ending, template.merges_system) == (ending, merges)
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"):
        found = re.search(template.reserved, f"a{token}b") if template.reserved else None
        assert bool(found) == (token in reserved), token
    assert template.special_ids == {0, 1, 2, 3} and not template.spaced
    assert template.longest == max(map(len, tokenizer.get_vocab()))


def test_marks_of_thoughts_and_tools_are_text(tokenizer, tmp_path):
    # red: every special token that the template writes reserved: answers hold <think> themselves
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<tool_call>"]})
    text = (
        "{% for m in messages %}{{ '<|im_start|><think>' + m.content }}<tool_call>{{ eos_token }}{% endfor %}"
    )
    template = chat.chat_template(tokenizer, write(tmp_path / "a.jinja", text))
    assert not re.search(template.reserved, "<think> <tool_call>")
    assert re.search(template.reserved, "<|im_start|>")


def test_a_system_turn_opens_the_first_user_turn_where_there_is_no_place_for_it(tokenizer, tmp_path):
    # red: the system turn left out; merged where the template has a place
    template = chat.chat_template(tokenizer, write(tmp_path / "a.jinja", SHOWN["system forgotten"][0]))
    text = chat.render(tokenizer, TALK, template, False)
    assert text == "Be brief.\n\none two three<|im_end|>four<|im_end|>five six seven<|im_end|>"
    assert TALK[1]["content"] == "one two three"
    alone = chat.render(tokenizer, [TALK[0], TALK[2]], template, False)
    assert alone == "Be brief.<|im_end|>four<|im_end|>"


def test_the_tokenizers_own_templates(tokenizer):
    # red: the first of several; a name looked for among files first
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tools": TRIM}
    assert chat.chat_template(tokenizer, None)[:2] == ("the tokenizer's own", own)
    assert chat.chat_template(tokenizer, "tools")[:2] == ("tools", TRIM)
    tokenizer.chat_template = {"rag": own, "tools": TRIM}
    with pytest.raises(
        ValueError, match="^--chat-template: the tokenizer has several, choose one of rag, tools$"
    ):
        chat.chat_template(tokenizer, None)
    assert chat.chat_template(tokenizer, "rag").text == own
    tokenizer.chat_template = None
    assert chat.chat_template(tokenizer, None)[:2] == ("plain", chat.PLAIN)


def test_the_request_for_a_good_answer_is_not_trained_again(tokenizer):
    # red: a template with its control token used as it is
    own = tokenizer.chat_template
    tokenizer.chat_template = own + chat.ASK_FOR_GOOD
    template = chat.chat_template(tokenizer, None)
    assert template.text == own and "without its control token" in template.name


FORGETS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ messages[-1].role }}"
REFUSED = {
    "nowhere.jinja": (
        None,
        "--chat-template nowhere.jinja: not one of plain, none, raw and not a readable file",
    ),
    "answers forgotten": (FORGETS, "does not write what the assistant says"),
    "no template": ("{% for m in messages %}{{ m.content }}", "chat template ("),
    "raises": ("{{ raise_exception('two\nlines') }}", "): two"),
    "another variable": ("{{ messages[0].content + nothing.at_all }}", "chat template ("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_used(tokenizer, tmp_path, case):
    # red: jinja's error not caught; the trial left out
    text, message = REFUSED[case]
    choice = case if text is None else write(tmp_path / "a.jinja", text)
    with pytest.raises(ValueError) as caught:
        chat.chat_template(tokenizer, choice)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_template(tokenizer, tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ValueError, match="a.jinja: not one of .* and not a readable file"):
        chat.chat_template(tokenizer, str(tmp_path / "a.jinja"))


def test_nothing_ends_a_turn(tokenizer):
    # red: eos None among the ids
    tokenizer.eos_token = None
    assert chat.chat_template(tokenizer, None).ending == "<|im_end|>\n"
    for choice in ("none", "raw"):
        with pytest.raises(
            ValueError, match="tokenizer has no eos token, and the chat template writes no end"
        ):
            chat.chat_template(tokenizer, choice)


@pytest.mark.parametrize("kind", ["none", "named", "added"])
def test_bos_is_written_where_the_tokenizer_would_write_it(tokenizer, tmp_path, kind):
    # red: BOS twice; BOS in every turn; BOS although the tokenizer writes none
    tokenizer.bos_token = None if kind == "none" else "<|endoftext|>"
    if kind == "added":
        start = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = start
    own = write(tmp_path / "a.jinja", "{{ bos_token or '' }}" + TRIM)
    for choice in ("plain", "none", own):
        template = chat.chat_template(tokenizer, choice)
        text = chat.render(tokenizer, TALK, template, True)
        number = int(kind == "added" or kind == "named" and choice == own)
        assert text.count("<|endoftext|>") == text.startswith("<|endoftext|>") == number
        again = chat.render(tokenizer, [{"role": "user", "content": text}], template, False)
        assert choice != "none" or again == text  # rendered elsewhere, with its BOS
    assert chat.ids(tokenizer, "text")[0] != 0


def test_a_template_that_spells_its_own_bos(tokenizer, tmp_path):
    # red: only the name of the variable looked for
    tokenizer.bos_token = "<|endoftext|>"
    start = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = start
    template = chat.chat_template(tokenizer, write(tmp_path / "a.jinja", "{{ '<|endoftext|>' }}" + TRIM))
    assert chat.render(tokenizer, TALK, template, True).count("<|endoftext|>") == 1


def test_what_stands_around_a_turn(tokenizer):
    template = chat.chat_template(tokenizer, None)
    before, after = chat.around(tokenizer, TALK, template, True, {})
    assert (before, after) == (
        CHATML.removesuffix("five six seven<|im_end|>\n"),
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    open_turn = turns("q", "The answer is")
    assert chat.opening(tokenizer, open_turn, template, {}) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nThe answer is"
    )


@pytest.mark.parametrize("said", ["a\0b", "\0", "\0\1\2", "a"])
def test_a_content_may_hold_any_character(tokenizer, said):
    # red: the mark looked for in what the user wrote
    template = chat.chat_template(tokenizer, None)
    before, after = chat.around(tokenizer, turns("q", said), template, False, {}, said)
    assert (before, after) == (
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{said}",
        "<|im_end|>\n",
    )


def test_further_arguments_reach_the_template(tokenizer, tmp_path):
    own = TRIM + "{{ '[' ~ enable_thinking ~ tools[0].name ~ ']' }}"
    template = chat.chat_template(
        tokenizer,
        write(tmp_path / "a.jinja", own.replace("tools[0].name", "(tools or [{'name': 0}])[0].name")),
    )
    rendering = {"enable_thinking": False, "tools": [{"name": "add"}]}
    assert chat.render(tokenizer, turns("q"), template, False, rendering).endswith("[Falseadd]")


# Ids.


WORDS = ["▁the", "▁cat", "▁", "t", "h", "e", "c", "a", "\n", "<0x0A>", "dog", "▁dog", "é"]


def sentencepiece(tmp_path):
    """A tokenizer of Llama 2's kind: a space before any text, spaces written as U+2581."""
    vocabulary = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *WORDS]
    model = models.Unigram(
        [(word, 0.0 if k < 5 else -float(1 + k / 100)) for k, word in enumerate(vocabulary)], 0
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = hf.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    found.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    return found


TEXTS = [
    "the cat",
    " the cat",
    "dog",
    "dog the dog",
    "\nthe",
    "the\n",
    "cat[/INST]dog",
    "[INST]the",
    "the</s>",
    "é the",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_space_appears_within_a_text(tmp_path, text):
    """After other text there is no space that nobody wrote: the pieces of `text` decode to itself."""
    # red: ids() for ids_within(); a space before what follows a special token
    tokenizer = sentencepiece(tmp_path)
    template = chat.Template("x", None, spaced=True, longest=8)
    assert tokenizer.convert_ids_to_tokens(chat.ids(tokenizer, "dog")) == ["▁dog"]
    found = chat.ids_within(tokenizer, text, template)
    pieces = "".join(tokenizer.convert_ids_to_tokens(found))
    assert pieces.replace("▁", " ") == text
    assert chat.ids_within(tokenizer, "", template) == []


def test_the_longest_of_the_added_tokens_is_found(tmp_path):
    # red: the first that matches
    tokenizer = sentencepiece(tmp_path)
    tokenizer.add_tokens(["[INST]>"], special_tokens=True)
    (longer,) = tokenizer.convert_tokens_to_ids(["[INST]>"])
    template = chat.Template("x", None, spaced=True, longest=8)
    assert chat.ids_within(tokenizer, "dog[INST]>dog", template)[1:2] == [longer]


def test_a_line_break_that_is_joined_with_the_text(tmp_path):
    # red: the first letter lost where the vocabulary has a token of it and the line break
    made = Tokenizer(
        models.BPE(
            {
                "<unk>": 0,
                "▁": 1,
                "\n": 2,
                "s": 3,
                ">": 4,
                "▁\n": 5,
                "▁\ns": 6,
                "a": 7,
                "▁a": 8,
                ".": 9,
                "▁.": 10,
            },
            [("▁", "\n"), ("▁\n", "s"), ("▁", "a"), ("▁", ".")],
            unk_token="<unk>",
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token=">")
    template = chat.Template("x", None, spaced=True, longest=3)
    assert chat.ids(tokenizer, "\ns>") == [6, 4]
    assert chat.ids_within(tokenizer, "ss", template) == [3, 3]


def test_an_unknown_letter_is_no_end(tmp_path):
    # red: <unk> among the tokens that end a text
    tokenizer = sentencepiece(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = chat.chat_template(tokenizer, "none")
    unknown, eos = tokenizer.unk_token_id, tokenizer.eos_token_id
    assert chat.ids(tokenizer, "the cat 🙂")[-1] == unknown
    assert chat.ended([7, unknown], tokenizer, template) == [7, unknown, eos]


def test_the_space_is_seen(tmp_path):
    # red: spaced=False for every tokenizer
    tokenizer = sentencepiece(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' }}{% endfor %}"
    assert chat.chat_template(tokenizer, None).spaced


@pytest.mark.parametrize("seed", range(10))
def test_the_first_and_the_last_ids_of_a_long_text(tokenizer, seed):
    # red: cut by characters as if each were a token
    rng = random.Random(seed)
    template = chat.chat_template(tokenizer, None)
    text = "".join(rng.choices(["the ", "river", " 日本", "🙂", "\n", "x" * 9, " Elbe."], k=4000))
    whole = chat.ids(tokenizer, text)
    for count in (1, 7, 100):
        assert chat.first_ids(tokenizer, text, count, template)[:count] == whole[:count]
        assert chat.last_ids(tokenizer, text, count, template) == whole[-count:]
    assert chat.first_ids(tokenizer, text[:9], 999, template) == chat.ids(tokenizer, text[:9])
    assert chat.last_ids(tokenizer, text[:9], 999, template) == chat.ids(tokenizer, text[:9])


@pytest.mark.parametrize("text", ["a" * 5001, "ab" * 2501, "b" + "\n" * 4999 + "x", "é" * 3333])
def test_the_last_ids_of_one_character_again_and_again(tokenizer, text):
    # red: a part of the text taken, which begins at another place of the run
    template = chat.chat_template(tokenizer, None)
    for count in (1, 7, 100):
        assert chat.last_ids(tokenizer, text, count, template) == chat.ids(tokenizer, text)[-count:]


def test_a_long_text_is_not_tokenised_whole(tokenizer):
    # red: text for text[: ...]
    template = chat.chat_template(tokenizer, None)
    seen = []

    class Looking:
        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

    for cut in (chat.first_ids, chat.last_ids):
        cut(Looking(), "word " * 200_000, 20, template)
    assert sum(seen) <= 6 * (20 + chat.MARGIN) * template.longest


def test_what_no_tokenizer_takes(tokenizer):
    # red: TypeError
    with pytest.raises(ValueError, match="half a surrogate pair"):
        chat.ids(tokenizer, "a\ud800")


def test_an_end_is_written_once(tokenizer):
    template = chat.chat_template(tokenizer, "none")
    assert chat.ended([5, 6], tokenizer, template) == [5, 6, 2]
    for last in (2, 0, 3):
        assert chat.ended([5, last], tokenizer, template) == [5, last]
    assert chat.ended([], tokenizer, template) == [2]


def test_what_pads(tokenizer):
    assert chat.padding_id(tokenizer) == 3
    tokenizer.pad_token = None
    assert chat.padding_id(tokenizer) == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an eos token"):
        chat.padding_id(tokenizer)
