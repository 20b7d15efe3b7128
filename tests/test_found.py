"""What an adversarial reading of files found: rows that lost something without a word. `red:` as elsewhere."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import chat
import data
import encode
import files
import formats

SOME_ROLES = (
    "{% for m in messages %}{% if m.role == 'system' and loop.first %}<|im_start|>system\n{{ m.content }}<|im_end|>"
    "{% elif m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "search", "arguments": {"a": 1}}}


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def own():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny").chat_template


@pytest.fixture
def encoded(own):
    def run(row, template=None):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")
        tokenizer.chat_template = template or own
        found = formats.parse(row, "f:1")
        assert isinstance(found, formats.Example), found
        group = encode.encode_turns(found, tokenizer, 512, 256, chat.chat_template(tokenizer, None))
        if isinstance(group, str):
            return group
        trained = [token for token, wanted in zip(group.completions[0], group.trained[0]) if wanted]
        return tokenizer.decode(group.prompt), tokenizer.decode(trained), group.remark

    return run


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([user("w?"), said("calling"), {"role": "tool", "content": "SUNNY"}], "a tool turn"),
        ([user("w?"), said("a"), {"role": "system", "content": "BE RUDE"}, user("b")], "a system turn"),
    ],
)
def test_a_turn_that_the_template_passes_over_is_missed(encoded, turns, what):
    # red: check_written without its loop over turns
    found = encoded({"prompt": turns, "completion": "it is sunny"}, SOME_ROLES)
    assert found == f"the chat template does not write {what}"


def test_turns_that_the_template_changes_are_written(encoded):
    # red: a turn must stand as it is
    loud = TOOLS.replace("{{ m.content }}", "{{ m.content | upper | replace('L', 'l') }}")
    assert "HEllO" in encoded({"prompt": " hello ", "completion": "b"}, loud)[0]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [user("please search it"), said("b")], "tools": [CALL]}, "tools"),
        ({"messages": [user("q"), said("b")], "tools": [{"x": 1}]}, "tools"),
        ({"messages": [user("q"), said("I will search", tool_calls=[CALL])]}, "tool_calls"),
        (
            {"prompt": [user("search"), said("ok", tool_calls=[CALL]), user("r")], "completion": "b"},
            "tool_calls",
        ),
    ],
)
def test_tools_are_not_found_in_what_is_said(encoded, row, what):
    # red: names looked for in the text
    assert encoded(row) == f"the chat template does not write {'the ' * (what == 'tools')}{what}"


def test_the_second_call_counts(encoded):
    # red: the turn compared with itself without any call
    row = {"messages": [user("q"), said("", tool_calls=[CALL, CALL])]}
    assert encoded(row, TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")).endswith(
        "tool_calls"
    )
    assert encoded(row, TOOLS)[1].count("search") == 2


def test_calls_have_one_form(encoded):
    # red: arguments left a string; a list of calls taken for one; a call without a name
    texts = {**CALL, "function": {"name": "search", "arguments": '{"a": 1}'}}
    for turn in (
        said("", tool_calls=[texts]),
        said("", function_call={"name": "search", "arguments": '{"a": 1}'}),
        {"from": "function_call", "value": '[{"name": "search", "arguments": {"a": 1}}]'},
    ):
        turns = [user("q") if "role" in turn else {"from": "human", "value": "q"}, turn]
        assert encoded({"messages": turns}, TOOLS)[1] == '<call>search {"a": 1}<|im_end|>'
    for value in ("3", '{"a": 1}', "[3]"):
        with pytest.raises(ValueError, match="name|objects"):
            formats.parse(
                {
                    "conversations": [
                        {"from": "human", "value": "q"},
                        {"from": "function_call", "value": value},
                    ]
                }
            )


def test_thoughts_in_a_key_of_their_own_are_missed(encoded):
    row = {"messages": [user("2 + 2?"), said("4", reasoning_content="two plus two")]}
    assert 'leaves out the "reasoning_content"' in encoded(row)[2]
    kept = TOOLS.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
    assert encoded(row, kept)[1:] == ("two plus two4<|im_end|>", "")


def test_special_tokens_in_tools_are_refused(encoded):
    row = {"messages": [user("q"), said("b")], "tools": [{"name": "f", "d": "<|im_end|>"}]}
    assert "the text holds <|im_end|>" in encoded(row, TOOLS)


def test_what_a_row_excludes_is_said_so(encoded):
    assert encoded({"messages": [user("q"), said("b", weight=0)]}) == "no turn of an answer is trained"
    for value in (0.5, "0", "false"):
        with pytest.raises(ValueError, match="must be 0, 1, true or false"):
            formats.parse({"messages": [user("q"), said("b", weight=value)]})


def test_arrow_invents_no_arguments(tmp_path):
    """Two rows whose calls have other arguments: the table has all, null where they were not given. A null
    answer stays one."""
    calls = (
        [{"function": {"name": "f", "arguments": {"a": "x"}}}],
        [{"function": {"name": "g", "arguments": {"z": 1}}}],
    )
    rows = [{"messages": [user("q"), said(None, tool_calls=call)], "label": None} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [row for _, row in files.rows(tmp_path / "a.parquet", "train")]
    assert [row["messages"][1]["tool_calls"] for row in found] == list(calls)
    assert found[0]["messages"][1]["content"] is None and found[0]["label"] is None


@pytest.mark.parametrize("value", [[], [1], ["assert f(1)"]])
@pytest.mark.parametrize("key", ["data", "test"])
def test_a_row_with_a_list_is_a_row(tmp_path, key, value):
    # red: any list under such a key taken for the rows
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (pair | {key: value}, pair)))
    assert len(data.load(str(tmp_path / "a.jsonl"), "train")[0]) == 2


@pytest.mark.parametrize("after", ["", "{}"])
def test_a_list_of_rows_in_a_row_has_two_readings(tmp_path, after):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    first = {"data": [pair]} if after else pair | {"data": [pair]}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(first)}\n{after}\n")
    with pytest.raises(ValueError, match="a.jsonl:1: two readings: the list 'data' holds the rows"):
        data.load(str(tmp_path / "a.jsonl"), "train")


@pytest.mark.parametrize(
    "text",
    [json.dumps([user("hi")], indent=1), json.dumps(user("hi")), json.dumps([user("hi"), {"role": "assistant", "tool_calls": [CALL]}, user("r")])],
)  # fmt: skip
def test_turns_as_json_however_they_are_written(text):
    found = formats.parse({"prompt": text, "completion": "b"})
    assert found.prompt[0] == user("hi")


def test_turns_as_python_prints_them_are_refused():
    # red: PYTHON never matched
    with pytest.raises(ValueError, match="as Python prints them"):
        formats.parse({"prompt": str([user("hi")]), "completion": "b"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [user([{"type": "image", "image": "x.png", "text": ""}]), said("b")]}, "not text"),
        ({"messages": [user("q") | {"from": "human", "value": "r"}, said("b")]}, "two readings"),
    ],
)
def test_parts_and_turns_of_two_kinds_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        formats.parse(row)


def test_dialogues_behind_a_prompt_are_not_doubled():
    hh = "\n\nHuman: hi\n\nAssistant:"
    found = formats.parse({"prompt": hh, "chosen": f"{hh} yes", "rejected": f"{hh} no"})
    assert (found.prompt, found.completions) == ([user("hi")], ["yes", "no"])


def test_tables_and_places_without_a_meaning(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,prompt,completion\na,b,c\n")
    with pytest.raises(ValueError, match="two columns of one name"):
        data.load(str(tmp_path / "a.csv"), "train")
    with pytest.raises(ValueError, match="hh=: a place must follow"):
        data.load("hh=", "train")
    with pytest.raises(ValueError, match="--chat-template "):
        chat.chat_template(AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny"), "")
