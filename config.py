"""Command lines and errors: what a user typed, and the one line that says what is wrong with it.

argparse is the only schema. A config file, given as the first argument, is turned into tokens placed before
the rest of the command line, so that its values pass the very same checks and the command line wins. A table
named after a flag, such as [loss], holds keys by the flag's value: `simpo = {lr = 2e-6}` is for --loss simpo.
"""

import argparse
import contextlib
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, Sequence

import files

MAX_CONFIG = 2**20  # bytes
MAX_NUMBER = 1e30  # of a flag: fp32 ends at 3e38


def fail(where: str, what: str = "", right: str = "") -> NoReturn:
    """One line on stderr, `error: where: what (right)`, and exit code 2. Rank 0 speaks; the others wait for
    the launcher to end them, lest their exit ends rank 0 before it has spoken."""
    message = ": ".join(part for part in (where, what) if part) + (f" ({right})" if right else "")
    if int(os.environ.get("RANK", 0)) != 0:
        time.sleep(5)
    complain(f"error: {' '.join(message.split())[:1000]}")
    sys.exit(2)


def tell(*parts: Any) -> None:
    """Print a line. A reader that has gone away, such as `head`, ends the printing and nothing else, and a
    full disk that stdout goes to costs lines."""
    try:
        print(*parts, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


def warn(text: str) -> None:
    complain(f"warning: {text}")


def complain(line: str) -> None:
    """On stderr, the line and its end in one write: print's two let lines of two processes run together."""
    with contextlib.suppress(OSError):  # stderr may go to the disk that is full
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A ValueError or OSError within is the user's mistake: one line instead of a traceback."""
    try:
        yield
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(str(error.filename or ""), error.strerror or str(error))


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """A ValueError within says where: what."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# ---- flags
# -----------------------------------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """An ArgumentParser that takes no abbreviations and whose errors are one line."""
    made = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [CONFIG.toml|CONFIG.json] [flags]",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.error = functools.partial(_explain, made)
    return made


def _explain(made: argparse.ArgumentParser, message: str) -> NoReturn:
    found = re.search(r"unrecognized arguments: (\S+)", message)
    near = difflib.get_close_matches(found[1].split("=")[0], _options(made), 1) if found else []
    fail(message.removeprefix("argument "), right=f"did you mean {near[0]}?" if near else "")


def _options(made: argparse.ArgumentParser) -> list[str]:
    return [option for action in made._actions for option in action.option_strings]


def positive(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text[:40]}")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text[:40]!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text[:40]}")
    if value and not 1 / MAX_NUMBER <= abs(value) <= MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"must be 0 or between 1e-30 and 1e30, got {text[:40]}")
    return value


def not_negative(text: str) -> float:
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {text}")
    return value


def count(text: str, least: int = 1) -> int:
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text[:40]!r}")
    if not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(
            f"must be >= {least}" + " and < 2**31" * (int(text) > least) + f", got {text}"
        )
    return int(text)


def count_or_zero(text: str) -> int:
    return count(text, 0)


def boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text == "true"


def text(value: str) -> str:
    """A path or a name: not empty, nothing that no file system takes."""
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    if "\0" in value:
        raise argparse.ArgumentTypeError("must not hold a NUL character")
    if len(os.fsencode(value)) > 4095 or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise argparse.ArgumentTypeError(f"is too long for a path: {value[:40]}...")
    return value


def directory(value: str) -> str:
    """A directory that is there or can be made, and can be written to."""
    path = Path(text(value)).absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{value}: {path} is not a directory")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{value}: {path} cannot be written to")
    return value


def _resumable(value: str) -> str:
    if not re.fullmatch(r"auto|step-\d+", value):
        raise argparse.ArgumentTypeError(f"must be auto or step-N, got {value!r}")
    return value


def add_run_flags(made: argparse.ArgumentParser) -> None:
    """Flags that do not change training: where it is written, how often, and how it goes on."""
    group = made.add_argument_group("run")
    out = "run directory; logs, checkpoints and final/ go there"
    group.add_argument("--out", type=directory, required=True, help=out)
    auto = "auto: the newest complete checkpoint, if any"
    group.add_argument("--resume", type=_resumable, default=None, metavar="auto|step-N", help=auto)
    group.add_argument(
        "--save-every", type=count_or_zero, default=0, help="optimiser steps between checkpoints; 0: none"
    )
    behind = "write a checkpoint behind the training, from a copy in the host's memory"
    group.add_argument("--save-async", type=boolean, default=False, metavar="true|false", help=behind)
    group.add_argument(
        "--keep-last", type=functools.partial(count, least=2), default=2, help="checkpoints kept"
    )
    group.add_argument(
        "--final-dtype",
        choices=("float32", "bfloat16"),
        default=None,
        help="of final/; None: bfloat16 if the model came in it, else float32",
    )
    group.add_argument("--log-every", type=count, default=1, help="optimiser steps between progress lines")
    trackers = ("tensorboard", "wandb", "trackio")
    group.add_argument(
        "--log-to", choices=trackers, default=None, nargs="+", help="beside metrics.jsonl; None: nowhere"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sync = "gradients summed over the ranks after every micro-batch, or once a step, held whole until then"
    group.add_argument("--micro-batch-sync", choices=("every", "last"), default="every", help=sync)
    copies = "groups of ranks, each with the whole model in its shards (HSDP); 1: all ranks are one"
    group.add_argument("--replicate", type=count, default=1, help=copies)
    lost = "a rank waits for another so long, then the run fails"
    group.add_argument("--timeout-minutes", type=positive, default=60.0, help=lost)
    group.add_argument(
        "--token-cache",
        type=directory,
        default=os.environ.get("TOKEN_CACHE", "cache/tokens"),
        help="encoded rows, kept and shared",
    )
    group.add_argument("--trust-remote-code", type=boolean, default=False, metavar="true|false")


    check = "say what can be known without training, and end; only --token-cache is written"
    group.add_argument(
        "--check", type=boolean, nargs="?", const=True, default=False, metavar="true|false", help=check
    )


# What does not change what is trained: where and how often a run writes, and how it computes.
HOW_FLAGS = (
    "out", "resume", "save_every", "keep_last", "final_dtype", "log_every", "log_to", "device", "token_cache",
    "timeout_minutes", "trust_remote_code", "strict_data", "tokens_per_microbatch",
    "activation_checkpointing", "eval_data", "eval_every", "eval_examples", "sample_prompts", "check", "plan",
    "plan_examples", "gpus", "memory", "yes", "cache_reference_only", "micro_batch_sync",
    "replicate", "offload", "save_async",
)  # fmt: skip
# What a resumed run may change: that, and how long and how fast it goes on.
FREE_FLAGS = (
    *HOW_FLAGS, "epochs", "steps", "lr", "warmup_steps", "max_grad_norm", "max_value_grad_norm",
    "skip_non_finite",
)  # fmt: skip


def add_hyperparameters(made: argparse.ArgumentParser, functions: dict[str, Callable], title: str) -> None:
    """A flag for every keyword-only parameter of the functions; one that is not given keeps its function's
    default."""
    group = made.add_argument_group(title)
    takers = {}
    for name, function in functions.items():
        for parameter in _hyperparameters(function):
            takers.setdefault(parameter.name, []).append((name, parameter.default))
    for key, found in takers.items():
        sample = found[0][1]
        kind = {bool: boolean, float: number, int: count_or_zero}.get(type(sample), type(sample))
        which = ", ".join(f"{name} {default}" for name, default in found)
        group.add_argument(
            f"--{key.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=f"of {which}"
        )


def resolve_hyperparameters(
    args: argparse.Namespace, who: str, chosen: Sequence[Callable], functions: Sequence[Callable]
) -> None:
    """Put the defaults of the chosen functions into args; fail, in the name of `who` chose them, for a flag
    that none of them takes. `functions` are all that could have been chosen: their flags exist."""
    defaults = {p.name: p.default for function in chosen for p in _hyperparameters(function)}
    existing = {p.name for function in functions for p in _hyperparameters(function)}
    for key in sorted(existing & set(vars(args)) - set(defaults)):
        takes = ", ".join(f"--{name.replace('_', '-')}" for name in defaults) or "none"
        fail(f"{who} takes no --{key.replace('_', '-')}", right=f"it takes {takes}")
    for key, default in defaults.items():
        setattr(args, key, getattr(args, key, default))


def hyperparameter_names(function: Callable) -> list[str]:
    """The names of a function's keyword-only parameters."""
    return [parameter.name for parameter in _hyperparameters(function)]


def _hyperparameters(function: Callable) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def positional(function: Callable) -> list[str]:
    """The names of the statistics a loss asks for."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def functions_returning(module: Any, record: type) -> dict[str, Callable]:
    """The public functions of a module annotated `-> record`, by name: what a flag may choose from."""
    members = inspect.getmembers(module, inspect.isfunction)
    return {
        name: f
        for name, f in members
        if not name.startswith("_") and f.__annotations__.get("return") is record
    }


def parse(made: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line whose first argument may be a .toml or .json file of flags. No text may be empty
    or unfit for a path."""
    tokens = list(argv)
    if tokens and tokens[0].endswith((".toml", ".json")) and not tokens[0].startswith("-"):
        tokens = _tokens(made, Path(tokens[0]), tokens[1:]) + tokens[1:]
    if bare := [token for token in tokens if token == "--" or token.endswith("=--")]:
        fail(bare[0], "a flag without its value")  # argparse would make it an empty list
    args = made.parse_args(tokens)
    for key, value in vars(args).items():
        for part in value if isinstance(value, list) else [value]:
            try:
                text(part) if isinstance(part, str) else None
            except argparse.ArgumentTypeError as error:
                fail(f"--{key.replace('_', '-')}", str(error))
    return args


def _by_value(made: argparse.ArgumentParser, path: Path, values: dict, typed: list[str]) -> dict:
    """Values with each table named after a flag of choices replaced by its keys for the choice that is typed,
    or the default; they win over those beside the table."""
    flags = {action.dest: action for action in made._actions if action.choices}
    tables = {key: value for key, value in values.items() if isinstance(value, dict) and _dest(key) in flags}
    found = {key: value for key, value in values.items() if key not in tables}
    for key, table in tables.items():
        flag, action = f"--{key.replace('_', '-')}", flags[_dest(key)]
        for name, entry in table.items():
            if name not in action.choices or not isinstance(entry, dict) or action.dest in map(_dest, entry):
                fail(f"{path}: [{key}] {name}", f"must be a value of {flag} and its own keys")
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        peek.error = made.error
        peek.add_argument(flag, default=found.get(action.dest, action.default))
        entry = table.get(getattr(peek.parse_known_args(typed)[0], action.dest), {})
        own = set(map(_dest, entry))
        found = {name: value for name, value in found.items() if _dest(name) not in own} | entry
    return found


def _dest(key: str) -> str:
    return key.replace("-", "_")


def _tokens(made: argparse.ArgumentParser, path: Path, typed: list[str]) -> list[str]:
    with user_errors():
        text = files.read_text(path, MAX_CONFIG)
        if path.suffix == ".json":
            values = files.read_json(path)
        else:
            with files.parsing(path, "TOML"):
                values = tomllib.loads(text)
    tokens, given = [], set()
    options = _options(made)
    lists = {name for action in made._actions if action.nargs == "+" for name in action.option_strings}
    for key, value in _by_value(made, path, values, typed).items():
        if key.endswith("_state"):  # of parts.py and rundir.py: what a flag named then
            continue
        flag = f"--{key.replace('_', '-')}"
        line = next(
            (
                i
                for i, row in enumerate(text.splitlines(), 1)
                if re.match(rf"(?:[^#]*[{{,])?\s*\"?{re.escape(key)}\"?\s*[=:]", row)
            ),
            1,
        )
        if flag in given:
            fail(f"{path}:{line}", f'"{key}" stands there twice, with - and with _')
        given.add(flag)
        if flag not in options or flag == "--help":
            near = difflib.get_close_matches(flag, options, 1)
            fail(f"{path}:{line}", f'unknown key "{key}"', f"did you mean {near[0][2:]}?" if near else "")
        several = flag in lists and isinstance(value, list) and len(value) > 0
        if not all(isinstance(part, (bool, int, float, str)) for part in (value if several else [value])):
            kind = "a string or a list of strings" if flag in lists else "a string, a number or a boolean"
            fail(f"{path}:{line}", f'"{key}" must be {kind}, got {_shown(value)}')
        words = [_word(part) for part in (value if several else [value])]
        if flag in lists and any(word.startswith("-") for word in words):
            fail(f"{path}:{line}", f'"{key}" begins with -, as a flag does')
        tokens += [flag, *words] if flag in lists else [f"{flag}={words[0]}"]
    return tokens


def _word(value: bool | int | float | str) -> str:
    """A value as it would be typed. TOML has integers of any length in base 16, which str refuses."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{value:#x}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)[:80]
    except (ValueError, RecursionError):
        return type(value).__name__


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a complete one. Raises OSError, and then nothing is left beside it."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
