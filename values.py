"""What rows hold: prompts, turns, answers, labels and numbers, each in the forms that tools write them.

A value of another type than it must have is a ValueError that names the key and shows the value; what a text
says is not looked at, but by `text_fault`.
"""

import json
import re
from typing import Any, Iterable

Turn = dict[str, Any]
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
# Parameters of transformers' own method, which a row must not set.
RESERVED = {
    "conversation", "messages", "tokenize", "chat_template", "add_generation_prompt", "tools",
    "continue_final_message", "return_tensors", "return_dict", "padding", "truncation", "max_length",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip


# What a string looks like that holds turns as JSON, or as Python prints them.
TURNS = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|from|content|value|tool_calls)["']\s*:""")
PYTHON = re.compile(r"\s*(\[\s*)?\{\s*'")
UNTRAINED = ("weight", "train", "training", "loss")  # names of what says that a turn is not trained


def prompt(value: Any) -> list[Turn]:
    """The turns of a prompt: a string, a dialogue of Anthropic's, a turn or turns, or these as JSON."""
    value = _loaded(value)
    if not isinstance(value, str):
        return turn_list(value, "prompt")
    if value.lstrip().startswith("Human:") and value.rstrip().endswith("\n\nAssistant:"):
        turns = dialogue(value.rstrip().removesuffix("\n\nAssistant:"))
        if turns is not None:
            return turns
    return [{"role": "user", "content": value}] if value else []


def text_or_turns(value: Any, key: str) -> str | list[Turn]:
    """A string as it is, anything else as turns."""
    value = _loaded(value)
    return value if isinstance(value, str) else turn_list(value, key)


def _loaded(value: Any) -> Any:
    """Turns as JSON in a string, as rows that came through a table have them."""
    if not isinstance(value, str) or not TURNS.match(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        if PYTHON.match(value):
            raise ValueError(f"turns as Python prints them, which is no JSON: {shown(value)}") from None
        return value
    turns = [found] if isinstance(found, dict) else found
    speak = (isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in turns)
    return turns if all(speak) and any({"content", "value"} & set(turn) for turn in turns) else value


def turn_list(value: Any, key: str) -> list[Turn]:
    """Turns as {"role", "content"} and what else they hold; a system turn that says nothing is left out."""
    value = _loaded(value)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list):
        raise ValueError(f'"{key}" must be a string or a list of turns, got {shown(value)}')
    found = [one_turn(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]
    return [turn for turn in found if turn["role"] != "system" or turn["content"]]


def one_turn(turn: Any, where: str) -> Turn:
    """A turn in its common form: roles by their usual names, content a string (or None), the rest kept."""
    if isinstance(turn, dict) and {"role", "from"} <= set(turn):
        raise ValueError(f'{where}: two readings: "role" and "content", or "from" and "value"')
    if isinstance(turn, dict) and "from" in turn:
        turn = {"role": turn["from"], "content": turn.get("value")} | {
            key: value for key, value in turn.items() if key not in ("from", "value")
        }
    if not isinstance(turn, dict) or "role" not in turn or not {"content", "tool_calls"} & set(turn):
        raise ValueError(f'{where} must have "role" and "content"')
    role = turn["role"]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"{where}.role is {shown(role)} (system, user, assistant, tool)")
    content = _content(turn.get("content"), f"{where}.content")
    found = {"role": ROLES[role.lower()], "content": content}
    found |= {key: value for key, value in turn.items() if key not in found and value not in (None, [], "")}
    for key in UNTRAINED:
        if found.get(key, True) not in (0, 1):
            raise ValueError(
                f'{where}: "{key}" of a turn must be 0, 1, true or false, got {shown(turn[key])}'
            )
    if role.lower() == "function_call":
        called = _json(content, f"{where}.content")
        found |= {"content": "", "tool_calls": called if isinstance(called, list) else [called]}
    elif "function_call" in found:  # OpenAI's older name
        found["tool_calls"] = [found.pop("function_call")]
    if "tool_calls" in found:
        found["content"] = found["content"] or ""
        calls = found["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"{where}.tool_calls must be a list of objects, got {shown(calls)}")
        found["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    return found


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call in the form that chat templates expect: its arguments an object, where they are one as JSON."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where}: a call must have a name, got {shown(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        function = function | {"arguments": _json(arguments, f"{where}.arguments")}
    return {"type": "function", **(call if "function" in call else {}), "function": function}


def _content(value: Any, where: str) -> str | None:
    if isinstance(value, list):
        kinds = (None, "text", "input_text", "output_text")
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") in kinds else part
            for part in value
        ]
        parts = [part if isinstance(part, str) else None for part in texts]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where} has a part that is not text, got {shown(value)}")
        return "".join(parts)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {shown(value)}")
    return value


def answer(value: Any, key: str) -> str | list[Turn]:
    """A string, or turns from an assistant's to an assistant's; one plain turn is its text."""
    value = "" if value is None else text_or_turns(value, key)
    if isinstance(value, str):
        return value
    if not value or value[0]["role"] != "assistant" or value[-1]["role"] != "assistant":
        raise ValueError(f'"{key}" must be a string, or turns that begin and end with the assistant\'s')
    return value[0]["content"] or "" if len(value) == 1 and set(value[0]) == {"role", "content"} else value


def dialogue(text: str) -> list[Turn] | None:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", or None unless they alternate from Human to Human."""
    before, *rest = ("\n\n" + text.lstrip()).split("\n\nHuman:")
    turns = []
    for part in rest:
        user, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": user.strip()})
        turns.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    alternate = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    complete = alternate and len(turns) % 2 == 1 and not before.strip()
    return turns if complete and all(turn["content"] for turn in turns) else None


def instruction(instruction: Any, input: Any, history: Any) -> list[Turn]:
    """Instruction and input as one user turn, after the history's [question, answer] pairs."""
    if not isinstance(instruction, str):
        turns = prompt(instruction)
    else:
        if input is not None and not isinstance(input, str):
            raise ValueError(f'"input" must be a string, got {shown(input)}')
        turns = prompt(f"{instruction}\n{input}" if input and input.strip() else instruction)
    before = []
    if history is not None and not isinstance(history, list):
        raise ValueError(f'"history" must be a list of [question, answer], got {shown(history)}')
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f'"history[{index}]" must be [question, answer], got {shown(pair)}')
        before += [
            one_turn({"role": role, "content": content}, f"history[{index}]")
            for role, content in zip(("user", "assistant"), pair)
        ]
    return before + turns


def tools(value: Any) -> list[Any]:
    """Descriptions of tools: a list of objects, or that as JSON."""
    value = _json(value, '"tools"') if isinstance(value, str) and value.strip() else value
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f'"tools" must be a list of objects, got {shown(value)}')
    return value


def template_arguments(value: Any) -> dict[str, Any]:
    """Further arguments of the chat template; none may be one of transformers' own."""
    if not isinstance(value, dict) or RESERVED & set(value):
        raise ValueError(
            f'"chat_template_kwargs" must be an object of names for the template, got {shown(value)}'
        )
    return {key: part for key, part in value.items() if part is not None}


def _json(value: Any, where: str) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON: {shown(value)}") from None


def label(value: Any, key: str) -> bool:
    """true, false, 1, 0, or these as strings."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError(f'"{key}" must be true or false, got {shown(value)}')


def number(value: Any, key: str) -> float:
    """A finite number, or one as a string."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        found = None
    if found is None or not abs(found) < 1e30:
        raise ValueError(f'"{key}" must be a finite number, got {shown(value)}')
    return found


def text_fault(turn: Turn, what: str) -> str:
    """What is wrong with the text of a turn, or an empty string."""
    content = turn["content"]
    if content is None:
        return f"{what} is null"
    if not content.strip() and not turn.get("tool_calls"):
        return f"{what} is empty"
    if not content.isascii() and any("\ud800" <= letter <= "\udfff" for letter in content):
        return f"{what} has half a surrogate pair, which is no character"
    return ""


def names(keys: Iterable[Any]) -> str:
    """Keys as a line of text names them."""
    plain = (str(key) if str(key).isprintable() else shown(key) for key in keys)
    return ", ".join(sorted(plain))[:200] or "none"


def shown(value: Any) -> str:
    """A value as an error shows it."""
    try:
        return json.dumps(value)[:40]
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__
