"""Row layouts against Examples written by hand, and what is said of rows that are none.

`red:` names a change of formats.py that turns a test red.
"""

import inspect
import json
import re

import pytest
from transformers import PreTrainedTokenizerBase

import formats
import values
from formats import Example, Fault


def turns(*contents, system=None):
    opening = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(contents)
    return opening + [{"role": role, "content": content} for role, content in zip(roles, contents)]


def shared(*contents):
    """Turns as ShareGPT writes them."""
    return [{"from": who, "value": said} for who, said in zip(["human", "gpt"] * 9, contents)]


SKY = turns("Why is the sky blue?")
ASKED = turns("Name a river.", "The Elbe.", "Another one.")
RIVERS = shared("Name a river.", "The Elbe.", "Another one.")
PAIR = {"prompt": "Why is the sky blue?", "chosen": "Rayleigh scattering.", "rejected": "It is not."}
BOTH = ["Rayleigh scattering.", "It is not."]
# One row a layout, and what is to be made of it.
LAYOUTS = {
    "pair": (PAIR | {"margin": 0.5, "weight": 2}, Example(SKY, BOTH, [1.0, 0.0], 2.0, 0.5)),
    "implicit_pair": (
        {"chosen": [*ASKED, *turns("", "The Oder.")[1:]], "rejected": [*ASKED, *turns("", "No.")[1:]]},
        Example(ASKED, ["The Oder.", "No."], [1.0, 0.0]),
    ),
    "ranked_list": (
        {"prompt": ASKED, "completions": ["The Rhine", "Yes.", turns("", "Why?")[1]], "scores": [2, -0.5, 1]},
        Example(ASKED, ["The Rhine", "Yes.", "Why?"], [2.0, -0.5, 1.0]),
    ),
    "ultrafeedback": (
        {
            "source": "x",
            "instruction": "Add 2 and 3.",
            "completions": [
                {"model": "m", "response": "5", "overall_score": 8.5, "fine-grained_score": 1},
                {"model": "n", "response": "6", "overall_score": None, "fine-grained_score": 2.25},
            ],
        },
        Example(turns("Add 2 and 3."), ["5", "6"], [8.5, 2.25]),
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [{"answer": "Hello.", "rank": 2.0}, {"answer": "Good day!", "rank": 1}],
        },
        Example(turns("Hi"), ["Hello.", "Good day!"], [-2.0, -1.0]),
    ),
    "shp": (
        {"history": "How do I fry an egg?", "human_ref_A": "Ask.", "human_ref_B": "In a pan.", "labels": 0},
        Example(turns("How do I fry an egg?"), ["In a pan.", "Ask."], [1.0, 0.0]),
    ),
    "orca_pair": (
        {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "Four or five."},
        Example(turns("2 + 2?", system="Be brief."), ["4", "Four or five."], [1.0, 0.0]),
    ),
    "input_pair": (
        {"input": "Say yes.", "chosen": "Yes.", "rejected": "No."},
        Example(turns("Say yes."), ["Yes.", "No."], [1.0, 0.0]),
    ),
    "alpaca_pair": (
        {
            "instruction": "Translate.",
            "input": "Haus",
            "chosen": "house",
            "rejected": "mouse",
            "history": [["Translate. Hund", "dog"]],
        },
        Example(turns("Translate. Hund", "dog", "Translate.\nHaus"), ["house", "mouse"], [1.0, 0.0]),
    ),
    "sharegpt_pair": (
        {
            "conversations": RIVERS,
            "chosen": {"from": "gpt", "value": "The Oder."},
            "rejected": {"from": "gpt", "value": "Mars."},
        },
        Example(ASKED, ["The Oder.", "Mars."], [1.0, 0.0]),
    ),
    "swift_pair": (
        {"messages": turns("Hi", "Hello!", system="Greet."), "rejected_response": "Go away."},
        Example(turns("Hi", system="Greet."), ["Hello!", "Go away."], [1.0, 0.0]),
    ),
    "swift_messages_pair": (
        {"messages": turns("Hi", "Hello!"), "rejected_messages": turns("Hi", "Go away.")},
        Example(turns("Hi"), ["Hello!", "Go away."], [1.0, 0.0]),
    ),
    "swift_query_pair": (
        {
            "query": "And now?",
            "response": "Now.",
            "rejected_response": "Never.",
            "history": [["When?", "Soon."]],
        },
        Example(turns("When?", "Soon.", "And now?"), ["Now.", "Never."], [1.0, 0.0]),
    ),
    "halos_pair": (
        {
            "prompt": ASKED,
            "output_A": turns("", "Mars.")[1:],
            "output_B": turns("", "The Oder.")[1:],
            "label": 0,
            "reward_A": -1.5,
            "reward_B": 0.25,
        },
        Example(ASKED, ["The Oder.", "Mars."], [0.25, -1.5]),
    ),
    "labelled": (
        {"prompt": "Name a colour.", "completion": "Seven.", "label": False},
        Example(turns("Name a colour."), ["Seven."], [0.0]),
    ),
    "scored": (
        {"prompt": "Name a colour.", "completion": "Blue.", "score": "3.5"},
        Example(turns("Name a colour."), ["Blue."], [3.5]),
    ),
    "alpaca_kto": (
        {"instruction": "Spell it.", "input": "cat", "output": "c a t", "kto_tag": True},
        Example(turns("Spell it.\ncat"), ["c a t"], [1.0]),
    ),
    "sharegpt_kto": (
        {"conversations": [*RIVERS, {"from": "gpt", "value": "Mars."}], "kto_tag": False},
        Example(ASKED, ["Mars."], [0.0]),
    ),
    "messages_kto": (
        {"messages": turns("Hi", "Hello!"), "kto_tag": True},
        Example(turns("Hi"), ["Hello!"], [1.0]),
    ),
    "swift_kto": ({"messages": turns("Hi", "Ugh."), "label": 0}, Example(turns("Hi"), ["Ugh."], [0.0])),
    "halos_binary": (
        {"prompt": turns("Hi"), "output": turns("", "Ugh.")[1:], "label": 0, "reward": 0.9},
        Example(turns("Hi"), ["Ugh."], [0.0]),
    ),
    "halos_scalar": (
        {"prompt": turns("Hi"), "output": turns("", "Hello.")[1:], "reward": -0.75},
        Example(turns("Hi"), ["Hello."], [-0.75]),
    ),
    "openrlhf_kto": (
        {"input": "Hi", "output": "Hello.", "label": 1},
        Example(turns("Hi"), ["Hello."], [1.0]),
    ),
    "completion": (
        {"prompt": turns("Hi", "Hello.", "Bye"), "completion": " Bye.\n", "weight": 0},
        Example(turns("Hi", "Hello.", "Bye"), [" Bye.\n"], [1.0], 0.0, labelled=False),
    ),
    "prompt_response": (
        {"prompt": "Hi", "response": "Hello."},
        Example(turns("Hi"), ["Hello."], [1.0], labelled=False),
    ),
    "prompt_output": (
        {"prompt": "Hi", "output": "Hello."},
        Example(turns("Hi"), ["Hello."], [1.0], labelled=False),
    ),
    "input_output": (
        {"input": "Hi", "output": "Hello."},
        Example(turns("Hi"), ["Hello."], [1.0], labelled=False),
    ),
    "alpaca": (
        {"instruction": "Spell it.", "input": "", "output": "i t", "system": "Spell."},
        Example(turns("Spell it.", system="Spell."), ["i t"], [1.0], labelled=False),
    ),
    "query_response": (
        {"query": "And now?", "response": "Now.", "history": [["When?", "Soon."]]},
        Example(turns("When?", "Soon.", "And now?"), ["Now."], [1.0], labelled=False),
    ),
    "messages": (
        {"messages": turns("a", "b", "c", "d", "e", system="s")},
        Example(turns("a", system="s"), [turns("", "b", "c", "d")[1:]], [1.0], labelled=False),
    ),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "s"}, *RIVERS], "id": 7},
        Example(ASKED[:1], ["The Elbe."], [1.0], labelled=False)._replace(
            prompt=turns("Name a river.", system="s")
        ),
    ),
    "text": (
        {"text": "  two\n\u2028lines 🙂 ", "weight": 0.5},
        Example([], ["  two\n\u2028lines 🙂 "], [1.0], 0.5, labelled=False),
    ),
    "prompt": ({"prompt": "Hi"}, Example(turns("Hi"), [], [], labelled=False)),
    "instruction": (
        {"instruction": "Translate.", "input": "Haus"},
        Example(turns("Translate.\nHaus"), [], [], labelled=False),
    ),
}
NAMES = [layout.__name__ for rank in formats.RANKS for layout in rank]


def layouts_of(row):
    return [layout.__name__ for layout in formats._layouts(formats._present(row))]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_every_layout(name):
    # red: any line of a layout; a layout without a row in LAYOUTS
    row, expected = LAYOUTS[name]
    before = json.dumps(row)
    assert layouts_of(row) == [name]
    assert formats.parse(row, "f:7") == expected._replace(where="f:7")
    assert json.dumps(row) == before


def test_every_row_is_of_a_layout():
    assert sorted(LAYOUTS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_any_conversation_takes(name):
    # red: a key of CONVERSATION_KEYS left out; a tool for plain text
    row, expected = LAYOUTS[name]
    tool = {"type": "function", "function": {"name": "add"}}
    added = {"system_prompt": "Be kind.", "tools": json.dumps([tool]), "weight": 0.25, "margin": "1.5"}
    added["chat_template_kwargs"] = {"enable_thinking": False, "unset": None}
    wanted = expected._replace(weight=0.25)
    if name != "text":
        turn = {"role": "system", "content": "Be kind."}
        rest = [turn for turn in wanted.prompt if turn["role"] != "system"]
        rendering = {"enable_thinking": False, "tools": [tool]}
        wanted = wanted._replace(prompt=[turn, *rest], margin=1.5, rendering=rendering)
    plain = {key: value for key, value in row.items() if key != "system"}
    if name != "text" and expected.prompt[0]["role"] == "system" and "system" not in row:
        with pytest.raises(
            ValueError, match='two readings: the system turn is "system", or that of the conv'
        ):
            formats.parse(plain | added)
        added["system_prompt"] = expected.prompt[0]["content"]
        wanted = wanted._replace(prompt=expected.prompt)
    assert formats.parse(plain | added) == wanted
    nothing = {key: None for key in (*added, "unknown", "chosen_score")}
    assert formats.parse({**nothing, **row}) == expected
    assert formats.unread_keys({**row, **nothing}) == set(row) & {"source", "id"}
    odd = {"system"} if name == "text" else set()
    assert (
        formats.unread_keys({**row, "extra": 0, "system": "s"})
        == set(row) & {"source", "id"} | {"extra"} | odd
    )


ODD = [0, -1.5, True, "", " \n", "x", "\ud83d", [], {}, [[]], [{}], [None], ["a"], [["a", "b"]], [1, 2]]
ODD += [
    {"role": "user"},
    {"role": "usr", "content": "a"},
    [{"role": "user", "content": None}],
    "[{",
    '[{"a": 1}]',
]
ODD += [[{"role": "assistant", "content": [{"type": "text"}]}], [{"role": 7, "content": "a"}], float("nan")]
ODD += [float("inf"), 10**400, turns("a", "b"), [*turns("a"), 5], {"from": "gpt", "value": 5}, "\n\nHuman: a"]
ODD += [[{"role": "assistant", "content": "", "tool_calls": [5]}], [{"from": "function_call", "value": "{"}]]
ODD += [[{"response": "a", "overall_score": "N/A"}], [{"answer": 1, "rank": None}], "[" * 9999, [[["a"]]]]


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_any_key_is_read_counted_or_refused_in_one_line(name):
    # red: any check of a type left out, which would be a traceback
    row = LAYOUTS[name][0]
    kinds = set()
    common = set() if name == "text" else formats.CONVERSATION_KEYS
    for key in sorted({*row} | common):
        for value in [None, *ODD]:
            try:
                found = formats.parse({**row, key: value}, "f:3")
                assert isinstance(found, (Example, Fault)) and found.where == "f:3"
                if isinstance(found, Example):
                    assert formats.unusable(found) == ""
                    json.dumps(found, allow_nan=False)
                    assert all(isinstance(score, float) for score in [*found.scores, found.weight])
                kinds.add(type(found))
            except ValueError as error:
                assert re.fullmatch(r"f:3: .{5,400}", str(error)), (key, value)
                kinds.add(ValueError)
    assert kinds == {Example, Fault, ValueError}


# Which layout a row has.


TALK = turns("m", "n")
CHOICES = [  # a row, its layout, what is not read
    (
        PAIR | {"messages": TALK, "text": "t", "completion": "c", "label": True},
        "pair",
        "messages text completion label",
    ),
    (PAIR | {"score_chosen": 8.0, "score_rejected": 2.0}, "pair", "score_chosen score_rejected"),
    (
        {"prompt": "q", "completion": "a", "label": True, "response": "r", "text": "t"},
        "labelled",
        "response text",
    ),
    ({"prompt": "q", "completion": "a", "messages": None, "text": "t"}, "completion", "text"),
    ({"prompt": "q", "chosen": None, "rejected": None, "completion": "a"}, "completion", ""),
    ({"prompt": None, "messages": TALK, "chosen": None}, "messages", ""),
    ({"text": "t", "prompt": "q"}, "text", "prompt"),
    ({"note": None, "prompt": "q"}, "prompt", ""),
    ({"instruction": "i", "input": "n", "output": "o"}, "alpaca", ""),
    ({"prompt": "q", "output": "o", "label": 1, "reward": 0.5}, "halos_binary", ""),
    ({"messages": TALK, "label": None}, "messages", ""),
    ({"messages": TALK, "label": 1}, "swift_kto", ""),
    ({"question": "q", "response": "r", "prompt": "q"}, "prompt_response", "question"),
]


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: case[1])
def test_which_layout_wins(case):
    # red: ranks in another order; null for a value; the layout that reads less
    row, name, unread = case
    assert layouts_of(row) == [name]
    assert isinstance(formats.parse(row), Example)
    assert formats.unread_keys(row) == set(unread.split())


def test_an_unread_key_that_is_null_or_missing_is_not_named():
    assert formats.unread_keys({"prompt": "q", "id": 0, "note": None}) == {"id"}
    assert formats.unread_keys({"no": "layout"}) == set()


AGREEING = [
    (PAIR | {"question": PAIR["prompt"], "input": PAIR["prompt"]}, "pair"),
    ({"prompt": "q", "completion": "a", "response": "a", "output": "a"}, "completion"),
    ({"conversations": shared("m", "n"), "messages": TALK}, "messages"),
]
DIFFERING = [
    (PAIR | {"question": "another"}, '"prompt, chosen, rejected" or "question, chosen, rejected"'),
    ({"prompt": "q", "completion": "a", "response": "b"}, '"prompt, completion" or "prompt, response"'),
    ({"prompt": "q", "completion": "a", "label": True, "score": 0.5}, '"prompt, completion, label" or'),
    ({"conversations": shared("m", "o"), "messages": TALK}, '"messages" or "conversations"'),
    (PAIR | {"chosen": turns("x", "a"), "rejected": turns("x", "b")}, 'the prompt is "prompt", or what'),
]


@pytest.mark.parametrize("case", AGREEING, ids=lambda case: case[1])
def test_two_readings_that_agree_are_one(case):
    # red: an error whenever two layouts fit
    assert formats.parse(case[0]) == formats.parse(
        {key: case[0][key] for key in formats._parameters(getattr(formats, case[1]))[0]}
    )
    assert formats.unread_keys(case[0]) == set()


@pytest.mark.parametrize("case", DIFFERING, ids=lambda case: case[1][:30])
def test_two_readings_that_differ_are_named(case):
    # red: the first of them taken
    with pytest.raises(ValueError, match=re.escape("f:1: two readings: ") + ".*" + re.escape(case[1])):
        formats.parse(case[0], "f:1")


def test_reserved_names_are_those_of_transformers():
    # red: a name left out of RESERVED, which a row could then set
    taken = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert taken - {"self", "kwargs", "documents"} <= values.RESERVED


# Turns.


@pytest.mark.parametrize(
    ("said", "role"),
    [(said, role) for role in ("system", "user", "assistant", "tool") for said in {
        "system": ["system", "developer"], "user": ["user", "human", "prompter", "USER", "Human"],
        "assistant": ["assistant", "gpt", "model", "bot", "chatgpt", "Assistant", "GPT"],
        "tool": ["tool", "observation", "function", "ipython"],
    }[role]],
)  # fmt: skip
def test_names_of_roles(said, role):
    # red: a name left out of ROLES; .lower() left out
    talk = [{"role": said, "content": "x"}, *turns("q", "a")]
    wanted = [{"role": role, "content": "x"}, *turns("q", "a")]
    found = formats.parse({"messages": talk})
    spoken = [*found.prompt, *found.completions[0]] if isinstance(found.completions[0], list) else None
    assert (spoken or [*found.prompt, turns("", found.completions[0])[1]]) == wanted
    talk = [{"from": said, "value": "x"}, *shared("q", "a")]
    assert formats.parse({"conversations": talk}) == found


def test_a_call_and_what_it_returned():
    # red: the call kept as what the assistant says; its arguments not parsed
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    talk = [{"from": "human", "value": "1 + 2?"}, {"from": "function_call", "value": json.dumps(call)}]
    talk += [{"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3."}]
    found = formats.parse({"conversations": talk, "tools": json.dumps([{"name": "add"}])})
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    rest = [calling, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]
    tools = {"tools": [{"name": "add"}]}
    assert found == Example(turns("1 + 2?"), [rest], [1.0], labelled=False, rendering=tools)
    openai = [*turns("1 + 2?"), calling | {"content": None}, *rest[1:]]
    assert formats.parse({"messages": openai, "tools": [{"name": "add"}]}) == found


def test_what_a_turn_holds_beside_its_content_is_kept():
    # red: turns copied with two keys; null kept
    talk = [
        {"role": "user", "content": "q", "name": "Ann", "id": None},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
    ]
    found = formats.parse({"messages": talk})
    assert found.prompt == [{"role": "user", "content": "q", "name": "Ann"}]
    assert found.completions == [[talk[1]]]
    pair = {"prompt": "q", "chosen": talk[1:], "rejected": "b"}
    assert formats.parse(pair).completions == [[talk[1]], "b"]


def test_contents_in_parts():
    parts = [{"type": "text", "text": "one "}, "two ", {"text": "three"}]
    talk = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    assert formats.parse({"messages": talk}) == formats.parse({"messages": turns("one two three", "a")})
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(ValueError, match=r"messages\[0\].content has a part that is not text"):
        formats.parse({"messages": image + turns("", "a")[1:]})


def test_answers_of_several_turns():
    # red: the last turn alone; an answer that ends with the user's
    rest = turns("", "a", "more", "b")[1:]
    found = formats.parse({"prompt": "q", "chosen": rest, "rejected": "c"})
    assert found.completions == [rest, "c"]
    for wrong in (turns("q"), rest[:2], []):
        with pytest.raises(ValueError, match="begin and end with the assistant's"):
            formats.parse({"prompt": "q", "completion": wrong})


def test_turns_in_a_string_as_tables_hold_them():
    for prompt in (ASKED, RIVERS):
        found = formats.parse(PAIR | {"prompt": json.dumps(prompt), "chosen": json.dumps(turns("", "a")[1:])})
        assert found == Example(ASKED, ["a", "It is not."], [1.0, 0.0])
    for kept in ('[{"role": "x"}]', '[{"role": "user", "content": "x"}, 5]', "[{", '[{"a": ' * 9999):
        assert formats.parse(PAIR | {"prompt": kept}).prompt == turns(kept)


@pytest.mark.parametrize(
    ("yes", "no"), [(True, False), (1, 0), (1.0, 0.0), ("True", "False"), (" TRUE ", "false"), ("1", "0")]
)
def test_labels(yes, no):
    # red: bool("False"); `value is True`
    for row, key in (({"prompt": "q", "completion": "a"}, "label"), ({"messages": TALK}, "kto_tag")):
        assert formats.parse(row | {key: yes}).scores == [1.0]
        assert formats.parse(row | {key: no}).scores == [0.0]


@pytest.mark.parametrize("value", [2, -1, "yes", "", [], {}, 0.5, float("nan")])
def test_what_is_no_label(value):
    with pytest.raises(ValueError, match='f:1: "label" must be true or false, got '):
        formats.parse({"prompt": "q", "completion": "a", "label": value}, "f:1")


def test_a_pair_of_halos_keeps_rewards_that_agree():
    # red: rewards that say the opposite of the label kept
    row = LAYOUTS["halos_pair"][0]
    assert formats.parse(row | {"label": 1}).scores == [1.0, 0.0]
    assert formats.parse(row | {"label": 1}).completions == ["Mars.", "The Oder."]
    for label in (0, 1):  # equal rewards say nothing
        assert formats.parse(row | {"reward_A": 0.25, "label": label}).scores == [1.0, 0.0]
    assert formats.parse(row | {"reward_A": None}).scores == [1.0, 0.0]


def test_an_input_of_white_space_is_none():
    for blank in ("", " \n", None):
        row = {"instruction": "Spell it.", "input": blank, "output": "i t"}
        assert formats.parse(row).prompt == turns("Spell it.")


# What two conversations have in common.


@pytest.mark.parametrize(
    ("chosen", "rejected", "common"),
    [
        (turns("a", "b", "c", "d"), turns("a", "b", "c", "e"), 3),
        (turns("a", "b", "c", "d"), turns("a", "b", "x", "d"), 1),  # the next turn is not the assistant's
        (turns("a", "b", "c", "d"), turns("a", "e"), 1),
        (turns("a", "b", system="s"), turns("a", "c", system="s"), 2),
        (turns("a", "b", "c", "d"), turns("a", "b"), 1),  # one is the beginning of the other
        (turns("a", "b"), turns("a", "b"), 1),
    ],
)
def test_the_prompt_is_what_both_begin_with(chosen, rejected, common):
    # red: common turns up to the user's different ones; the last turn taken as common
    found = formats.parse({"chosen": chosen, "rejected": rejected})
    assert found.prompt == chosen[:common]
    for answer, talk in zip(found.completions, (chosen, rejected)):
        rest = talk[common:]
        assert answer == (rest[0]["content"] if len(rest) == 1 else rest)
    explicit = {"prompt": chosen[0]["content"] if common == 1 else chosen[:common]}
    assert formats.parse({"chosen": chosen, "rejected": rejected} | explicit) == found


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (turns("a", "b"), turns("x", "c"), "begin with no common turn"),
        ("a", "b", 'missing "prompt"'),
        (turns("a", "b"), "c", "is a string, the other a list of turns"),
    ],
)
def test_two_answers_with_nothing_in_common(chosen, rejected, message):
    with pytest.raises(ValueError, match=f"f:1: .*{message}"):
        formats.parse({"chosen": chosen, "rejected": rejected}, "f:1")


def test_conversation_so_far_and_two_turns():
    """LLaMA-Factory's pairs with OpenAI's names."""
    row = {"messages": ASKED, "chosen": turns("", "The Oder.")[1], "rejected": turns("", "Mars.")[1]}
    assert formats.parse(row) == Example(ASKED, ["The Oder.", "Mars."], [1.0, 0.0])


DIALOGUE = "\n\nHuman: p\n\nAssistant: o\n\nHuman: n\n\nAssistant:"


def test_dialogues_in_strings():
    # red: a prompt of one turn that holds the whole dialogue; roles by parity
    said = turns("p", "o", "n")
    assert formats.parse({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + "b "}) == Example(
        said, ["a", "b"], [1.0, 0.0]
    )
    for prompt in (DIALOGUE, DIALOGUE.strip(), DIALOGUE + " "):
        assert formats.parse(PAIR | {"prompt": prompt}).prompt == said
    for plain in ("Human: what is this?", DIALOGUE + " x", "\n\nHuman: p\n\nHuman: n\n\nAssistant:"):
        assert formats.parse(PAIR | {"prompt": plain}).prompt == turns(plain)


def test_an_answer_may_begin_as_a_dialogue_does():
    # red: one answer "Human: ..." made the row, and with it the file, an error
    for said in ("Human: not me", "Human: a\n\nHuman: b", DIALOGUE + " x"):
        assert formats.parse(PAIR | {"rejected": said}).completions[1] == said
    whole = {"prompt": "p"} | {key: f"\n\nHuman: p\n\nAssistant: {key[0]}" for key in ("chosen", "rejected")}
    assert formats.parse(whole) == Example(turns("p"), ["c", "r"], [1.0, 0.0])


# What is wrong.


MISTAKES = {  # what the message must hold: rows
    "not an object": [5, "q", [1], None, True],
    'missing "prompt"': [{"chosen": "a", "rejected": "b"}],
    'missing "rejected" (keys: chosen, prompt)': [{"prompt": "q", "chosen": "a"}],
    'missing "chosen" (keys: prompt, rejected)': [{"prompt": "q", "rejected": "a"}],
    'missing "scores"': [{"prompt": "q", "completions": ["a"]}],
    'missing "prompt", "chosen", "rejected" (keys: a, b)': [{"a": 1, "b": 2}],
    "(keys: none)": [{}, {"prompt ": None}],
    '"prompt" must be a string or a list of turns, got 1': [PAIR | {"prompt": 1}],
    "prompt[0] must have": [PAIR | {"prompt": [turn]} for turn in ("q", {"role": "user"}, {"text": "q"}, 5)],
    'prompt[0].role is "usr"': [PAIR | {"prompt": [{"role": "usr", "content": "q"}]}],
    "prompt[0].content must be a string": [PAIR | {"prompt": [{"role": "user", "content": 5}]}],
    '"chosen" must be': [PAIR | {"chosen": value} for value in (1, True, [], {})][:2],
    "must be a string": [{"text": ["a"]}, {"text": 5}, {"instruction": "i", "input": 5, "output": "o"}],
    '"history" must be a list': [
        {"query": "q", "response": "r", "history": value} for value in (5, True, "ab", {"a": 1})
    ],
    '"weight" must be': [
        PAIR | {"weight": value} for value in (float("nan"), float("inf"), -1, True, "x", 10**400)
    ],
    '"margin" must be': [PAIR | {"margin": float("nan")}],
    "scores[1]": [
        {"prompt": "q", "completions": ["a", "b"], "scores": [1, value]} for value in (None, True, "x")
    ],
    "lists of one length": [
        {"prompt": "q", "completions": value, "scores": [1]} for value in (["a", "b"], "a", [])
    ],
    '"system" must be a string': [PAIR | {"system": 5}],
    'two readings: "system" or "system_prompt"': [PAIR | {"system": "a", "system_prompt": "b"}],
    '"tools" must be a list of objects': [PAIR | {"tools": value} for value in ([1], {"a": 1}, "5")],
    '"tools" is not JSON': [PAIR | {"tools": "add"}],
    '"chat_template_kwargs" must be an object': [
        PAIR | {"chat_template_kwargs": value}
        for value in ("x", [1], *({name: 1} for name in sorted(values.RESERVED)))
    ],
    '"history[1]" must be [question, answer]': [
        {"instruction": "i", "output": "o", "history": [["a", "b"], value]} for value in (["a"], "ab", 5)
    ],
    "must end with": [
        {"messages": turns("q"), "label": True},
        {"messages": turns("q"), "rejected_response": "r"},
    ],
    "is not JSON": [{"conversations": [*shared("q"), {"from": "function_call", "value": "add(1)"}]}],
    "tool_calls must be a list": [{"messages": [{"role": "assistant", "tool_calls": "add"}]}],
    'missing "response" in an answer': [
        {"instruction": "q", "completions": [{"text": "a", "overall_score": 1}]}
    ],
    '"answers" must be a list of objects': [{"prompt": "q", "answers": ["a"]}],
}


@pytest.mark.parametrize(("words", "row"), [(words, row) for words in MISTAKES for row in MISTAKES[words]])
def test_wrong_structure_is_an_error_with_its_line(words, row):
    # red: any check left out
    with pytest.raises(ValueError) as caught:
        formats.parse(row, "f:3")
    assert str(caught.value).startswith("f:3: ") and "\n" not in str(caught.value)
    assert words in str(caught.value)


FAULTS = {  # the reason: rows
    "an answer is empty": [
        *(PAIR | {key: value} for key in ("chosen", "rejected") for value in ("", " \n\t")),
        PAIR | {"chosen": [{"role": "assistant", "content": ""}]},
        PAIR | {"chosen": {"role": "assistant", "content": None}},
        {"prompt": "q", "completion": " ", "label": True},
        {"prompt": "q", "completions": ["a", ""], "scores": [1, 2]},
        {"messages": turns("q", "a", "r", " ")},
        {"text": "\n"},
    ],
    "an answer is null": [
        {"messages": [*turns("q"), {"role": "assistant", "content": None, "id": 1}, *turns("r", "b")]}
    ],
    '"rejected" is null': [PAIR | {"rejected": None}],
    '"chosen" is null': [PAIR | {"chosen": None}],
    '"completion" is null': [{"prompt": "q", "completion": None}],
    '"prompt" is null': [PAIR | {"prompt": None}, {"prompt": None, "completion": "a"}, {"prompt": None}],
    '"text" is null': [{"text": None}, {"text": None, "prompt": "q"}],
    '"messages" is null': [{"messages": None}],
    "a turn of the prompt is empty": [
        PAIR | {"prompt": value}
        for value in (" ", turns(" "), turns("a", "", "b"), [{"role": "tool", "content": ""}])
    ],
    "a turn of the prompt is null": [PAIR | {"prompt": [{"role": "user", "content": None}]}],
    "an answer has half a surrogate pair, which is no character": [
        PAIR | {"chosen": "a\ud83d"},
        {"text": "\udc00 é"},
    ],
    "a turn of the prompt has half a surrogate pair, which is no character": [PAIR | {"prompt": "\ud83d"}],
    "it has no answer": [
        {"prompt": "q", "completions": [], "scores": []},
        {"instruction": "q", "completions": []},
    ],
    "a conversation without an assistant turn": [
        {"messages": turns("q")},
        {"messages": []},
        {"conversations": []},
    ],
    "the two dialogues differ before the last answer": [
        {"chosen": DIALOGUE + "a", "rejected": DIALOGUE.replace("p", "m") + "b"}
    ],
    "an answer holds another Human turn": [
        {"chosen": DIALOGUE + "a\n\nHuman: x", "rejected": DIALOGUE + "b\n\nHuman: x"}
    ],
    "roles do not alternate": [
        {"chosen": "\n\nHuman: p" + DIALOGUE + "a", "rejected": "\n\nHuman: p" + DIALOGUE + "b"}
    ],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason in FAULTS for row in FAULTS[reason]])
def test_wrong_content_is_a_fault_of_the_row(reason, row):
    # red: an error that stops the run; a row kept that trains on nothing
    assert formats.parse(row, "f:3") == Fault("f:3", reason)


def test_text_of_any_script_is_no_fault():
    for text in ("日本語 🙂 e\u0301", "\u200b", "\x00", "\ufeffa", "a\u2028b"):
        assert formats.parse({"text": text}).completions == [text]


def test_a_system_turn_that_says_nothing_is_left_out():
    # red: an empty system turn trained on, or counted as a fault
    for row in (PAIR | {"system": ""}, PAIR | {"system": " ", "system_prompt": " "}):
        assert formats.parse(row) == Example(SKY, BOTH, [1.0, 0.0])
    talk = [{"role": "system", "content": ""}, *turns("q", "a")]
    assert formats.parse({"messages": talk}) == formats.parse({"messages": turns("q", "a")})
