"""Bad input of every kind: one line `error: where: what`, exit code 2, nothing left behind, no person asked.

Tables of cases, each through `main` of the real script in this process. A case is (what is done to a folder,
words of the line). The folder holds `model`, whole and tiny, `pairs.jsonl`, and `run`, a finished run.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import time
import zlib

import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_config import command, exit_code, tree, write_model

import align
import chat
import export
import judge
import label
import loading
import plot
import preview
import sample
import sft

SCRIPTS = {"align": align, "export": export, "judge": judge, "label": label, "plot": plot}
SCRIPTS |= {"preview": preview, "sample": sample, "sft": sft}
DEEP = "[" * 100_000
DIGITS = "9" * 5000
PAIR = '{"prompt": "Name a colour.", "chosen": "Blue is one.", "rejected": "No."}\n'
SECONDS = 20  # what no bad input takes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with a model and its weights, six pairs, and a finished run with a checkpoint."""
    path = tmp_path_factory.mktemp("whole")
    write_model(path / "random")
    lm = loading.AutoModelForCausalLM.from_config(loading.settings(str(path / "random")))
    shutil.copytree(path / "random", path / "model")
    lm.save_pretrained(path / "model")
    rows = (ROOT / "examples" / "hh_test.jsonl").read_bytes().split(b"\n")[:6]
    (path / "pairs.jsonl").write_bytes(b"\n".join(rows))
    argv = [*command(path, path / "run"), "--weights", "pretrained", "--save-every", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert exit_code(align.main, argv) is None
    return path


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of that directory to spoil, which is where the script runs."""
    shutil.copytree(whole, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def too_long(number, frame):
    raise AssertionError(f"more than {SECONDS} s")


@pytest.fixture
def refused(capfd, caplog, monkeypatch):
    """refused(script, argv, folder, *words): one line of error that holds the words, and no change."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")

    def check(script, argv, folder, *words, leaves=()):
        before = tree(folder)
        capfd.readouterr()
        handler = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            code = exit_code(SCRIPTS[script].main, [str(part) for part in argv])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
        stderr = capfd.readouterr().err
        assert code == 2, stderr
        assert re.fullmatch(r"error: .+\n", stderr) and len(stderr) < 1200, stderr
        assert [word for word in words if word not in stderr] == [], stderr
        assert [record for record in caplog.records if record.levelname != "DEBUG"] == [] == asked
        changed = set(tree(folder).items()) ^ set(before.items())
        assert {os.path.relpath(path, folder).split("/")[0] for path, _ in changed} <= {*leaves}, changed

    return check


def train(*extra, script="align"):
    argv = ["--model", "model", "--data", "pairs.jsonl", "--out", "new", "--steps", "1", "--batch-size", "2"]
    return script, [*argv, *extra]


# ---- models


def edit(name, **changes):
    """Change keys of a JSON file of the model; one that is Ellipsis goes."""

    def change(model):
        found = json.loads((model / name).read_text()) | changes
        found = {key: value for key, value in found.items() if value is not ...}
        (model / name).write_text(json.dumps(found))

    return change


def write(name, content):
    def change(model):
        path = model / name
        if path.exists():
            path.unlink()
        if content is None:
            path.mkdir()
        elif content is not ...:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def both(*changes):
    return lambda model: [change(model) for change in changes]


NO_OBJECT = {
    "empty": "", "a list": "[]", "a number": "3", "null": "null", "a string": '"a"', "cut": '{"model_type": "lla',
    "binary": b"\x00\xff\xfe\x80" * 9, "nested": DEEP, "digits": '{"vocab_size": ' + DIGITS + "}",
    "twice": '{"vocab_size": 8192, "vocab_size": 8192}', "a directory": None,
}  # fmt: skip
JSON_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
MODELS = {f"{name}: {what}": (write(name, content), name) for name in JSON_FILES for what, content in NO_OBJECT.items()}
MODELS |= {
    f"tokenizer.json: {what}": (write("tokenizer.json", content), "no tokenizer")
    for what, content in {**NO_OBJECT, "an object": "{}", "no model": '{"version": "1.0", "model": 3}', "gone": ...}.items()
    if what != "twice"
}
MODELS |= {
    f"config.json: {key} {value!r:.20}": (edit("config.json", **{key: value}), "model")
    for key, values in {
        "model_type": ("unknown", 3, [], None, ..., "t5", "bert"),
        "hidden_size": ("a", -1, 0, 10**9, None, 1.5, [3], 33),
        "num_hidden_layers": ("a", -1, 10**9, None, 2, 1.5, []),
        "num_attention_heads": (0, -2, "a", 10**9, [], 3),
        "num_key_value_heads": (0, 3, "a", 10**7),
        "vocab_size": ("a", -1, 10**12, 0, 5, []),
        "head_dim": (10**9, "a", 15),
        "intermediate_size": (10**9, "a", -1),
        "hidden_act": ("nope", 3, []),
        "max_position_embeddings": ("a", 4, [], -1),
        "rope_parameters": ({"rope_type": "nope"}, {"rope_type": "default", "rope_theta": "a"}, "a", [1]),
        "rms_norm_eps": ("a", []),
        "dtype": ("float99", 3, []),
        "architectures": (3, [3]),
        "quantization_config": ({"quant_method": "gptq"}, {"load_in_4bit": True}, "a"),
        "layer_types": (["nope"], 3),
    }.items()
    for value in values
}
HEADER = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
OTHER = "00001.safetensors"


def packed(header, size=None):
    return struct.pack("<Q", len(header) if size is None else size) + header


def cut(model):
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def index(content):
    return both(write("model.safetensors", ...), write("model.safetensors.index.json", json.dumps(content)))


def pickled(model):
    os.rename(model / "model.safetensors", model / "pytorch_model.bin")


def adapter(model):
    os.unlink(model / "config.json")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "model"}')


def without(key):
    def change(model):
        state = load_file(model / "model.safetensors")
        save_file({k: v for k, v in state.items() if key not in k}, model / "model.safetensors", {"format": "pt"})

    return change


CUSTOM = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
MODELS |= {
    "weights: cut": (cut, "model.safetensors"),
    "weights: empty": (write("model.safetensors", b""), "model.safetensors"),
    "weights: garbage": (write("model.safetensors", b"\xff" * 4000), "model.safetensors"),
    "weights: a directory": (write("model.safetensors", None), "model.safetensors"),
    "weights: a long header": (write("model.safetensors", packed(HEADER, 2**62)), "model.safetensors"),
    "weights: no JSON": (write("model.safetensors", packed(b"{" * 500)), "model.safetensors"),
    "weights: no bytes": (write("model.safetensors", packed(HEADER)), "model.safetensors"),
    "weights: other": (write("model.safetensors", packed(HEADER) + bytes(8)), "model"),
    "weights: none": (write("model.safetensors", ...), "no model.safetensors"),
    "weights: a pickle": (pickled, "no model.safetensors", "pickle"),
    "weights: an adapter": (adapter, "holds adapters"),
    "weights: one missing": (without("layers.0.mlp.up_proj"), "1 weights missing", "up_proj"),
    "stops": (edit("generation_config.json", eos_token_id=1.5), "eos_token_id"),
    "stops of a list": (edit("generation_config.json", eos_token_id=[1, "a"]), "eos_token_id"),
    "index: pickles": (index({"weight_map": {"a": "pytorch_model.bin"}}), "safetensors beside it only"),
    "index: outside": (index({"weight_map": {"a": "../model.safetensors"}}), "safetensors beside it only"),
    "index: absolute": (index({"weight_map": {"a": "/x.safetensors"}}), "safetensors beside it only"),
    "index: missing": (index({"weight_map": {"a": OTHER}}), f"{OTHER} is missing"),
    "index: a list": (index([]), "must be one object"),
    "index: no map": (index({}), "no weight_map"),
    "index: a wrong map": (index({"weight_map": {"a": 3}}), "no weight_map"),
    "index: empty": (index({"weight_map": {}}), "no weight_map"),
    "custom model": (edit("config.json", model_type="x", auto_map=CUSTOM), "--trust-remote-code true"),
    "custom config": (edit("config.json", auto_map={"AutoConfig": 3}, model_type="y"), "model"),
    "custom tokenizer": (
        edit("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "--trust-remote-code true",
    ),
    "template: binary": (write("chat_template.jinja", b"\xff\xfe\x00"), "model"),
    "template: unended": (write("chat_template.jinja", "{% for m in messages %}"), "chat template"),
    "template: undefined": (write("chat_template.jinja", "{{ a.b.c }}"), "chat template"),
    "template: code": (write("chat_template.jinja", "{{ ''.__class__.__mro__ }}"), "chat template"),
    "template: no answer": (write("chat_template.jinja", "a"), "does not write what the assistant says"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_model_directory_is_refused(case, place, refused):
    # red: load_tokenizer without read_json; check without _header; one_line without MemoryError
    change, *words = MODELS[case]
    change(place / "model")
    refused(*train(), place, *words)


QUANTISED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "load_in_4bit": {"load_in_4bit": True},
}


@pytest.mark.parametrize("extra", [[], ["--check", "true"], ["--lora-rank", "2"]], ids=["run", "check", "lora"])
@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_base_is_refused(method, extra, place, refused):
    """And not for the number of its packed weights, nor only when they are read."""
    # red: outline, or preflight.report, without refuse_quantised; size that counts packed weights
    edit("config.json", quantization_config=QUANTISED[method])(place / "model")
    lm = load_file(place / "model" / "model.safetensors")
    few = {name: value[:1] for name, value in lm.items()}
    save_file(few, place / "model" / "model.safetensors", {"format": "pt"})
    refused(*train(*extra), place, f"model: its weights are quantised ({method}): dequantise it first")


# ---- command lines and config files

HUGE = "1e300"
FLAGS = {
    **{f"{flag} {HUGE}": ([flag, HUGE], f"{flag}: must be 0 or between") for flag in ("--lr", "--adam-eps", "--beta")},
    "tiny eps": (["--adam-eps", "1e-300"], "--adam-eps: must be 0 or between"),
    "digits": (["--seed", DIGITS], "--seed: must be a whole number"),
    "digits of a float": (["--lr", DIGITS], "--lr: must be a finite number"),
    "other digits": (["--batch-size", "\u0663"], "--batch-size: must be a whole number"),
    "digits of a loss": (["--loss", "simpo", "--gamma", DIGITS], "--gamma"),
    "long model": (["--model", "a" * 300], "--model", "too long"),
    "long data": (["--data", "b/" * 3000], "--data", "too long"),
    "long out": (["--out", "c" * 300], "--out", "too long"),
    "long template": (["--chat-template", "d" * 300], "--chat-template", "too long"),
    "no model": (["--model", "run/finall"], "run/finall: no such model directory"),
    "no model in runs/": (["--model", "runs/x"], "runs/x: no such model directory"),
    "no data in runs/": (["--data", "runs/x"], "runs/x: no such file or directory"),
    "data in a file": (["--data", "pairs.jsonl/x"], "pairs.jsonl/x: no such file or directory"),
    "no model in ~": (["--model", "~/x"], "~/x: no such model directory"),
    "model a file": (["--model", "pairs.jsonl"], "pairs.jsonl: not a model directory but a file"),
    "reference": (["--reference", "run/none"], "run/none: no such model directory"),
    "reference a run": (["--reference", "run"], "run/config.json: no such file"),
    "data an empty folder": (["--data", "empty"], "empty: no .jsonl"),
    "data of folders": (["--data", "run/step-1"], "run/step-1"),
    "template a folder": (["--chat-template", "model"], "--chat-template model"),
    "template binary": (["--chat-template", "model/model.safetensors"], "--chat-template model/model.safetensors"),
    "check": (["--check", "maybe"], "--check: must be true or false"),
    "loop": (["--model", "loop"], "loop: no such model directory"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_flag_is_refused(case, place, refused):
    # red: number without its bounds; looks_local without FOLDERS, or without the first part of a path
    extra, *words = FLAGS[case]
    (place / "empty").mkdir()
    (place / "loop").symlink_to("loop")
    refused(*train(*extra), place, *words)


CONFIGS = {
    "json: nested": ("a.json", '{"lr": ' + DEEP, "nested too deeply"),
    "json: digits": ("a.json", '{"seed": ' + DIGITS + "}", "a.json: not JSON"),
    "json: twice": ("a.json", '{"lr": 1, "lr": 2}', "'lr' stands there twice"),
    "json: empty": ("a.json", "", "a.json: not JSON"),
    "json: binary": ("a.json", b"\xff\xfe", "a.json: not UTF-8"),
    "json: a list": ("a.json", "[1]", "must be one object, got [1]"),
    "json: large": ("a.json", '{"lr": ' + " " * 2**20 + "1}", "more than 1048576 bytes"),
    "json: NaN": ("a.json", '{"lr": NaN}', "--lr: must be a finite number"),
    "json: two spellings": ("a.json", '{"batch_size": 2,\n "batch-size": 3}', 'a.json:2: "batch-size" stands there twice'),
    "json: null": ("a.json", '{"lr": null}', '"lr" must be a string, a number or a boolean, got null'),
    "json: a flag in a list": ("a.json", '{"data": ["a", "--seed=3"]}', '"data" begins with -'),
    "json: a folder": ("a.json", None, "a.json: not a file"),
    "toml: nested": ("a.toml", "lr = " + DEEP, "nested too deeply"),
    "toml: digits": ("a.toml", "seed = " + DIGITS, "a.toml: not TOML"),
    "toml: long hexadecimal": ("a.toml", "seed = 0x" + DIGITS, "--seed: must be a whole number"),
    "toml: a list of them": ("a.toml", f"seed = [0x{DIGITS}]", '"seed" must be'),
    "toml: two spellings": ("a.toml", "batch_size = 2\nbatch-size = 3", 'a.toml:2: "batch-size" stands there twice'),
    "toml: twice": ("a.toml", "lr = 1\nlr = 2", "a.toml: not TOML"),
    "toml: a date": ("a.toml", "lr = 2020-01-01", '"lr" must be a string, a number or a boolean'),
    "toml: a NUL": ("a.toml", 'chat_template = "a\\u0000b"', "--chat-template", "NUL"),
    "toml: a surrogate": ("a.toml", b'model = "\xed\xa0\x80"', "not UTF-8"),
    "toml: help": ("a.toml", "help = true", 'unknown key "help"'),
    "missing": ("a.toml", ..., "a.toml: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_file_is_refused(case, place, refused):
    # red: tomllib.loads outside files.parsing; json.loads without _once; `given` left out; str(value) in _word
    name, content, *words = CONFIGS[case]
    write(name, content)(place)
    script, argv = train()
    for script in ("align", "sft", "preview"):
        refused(script, [name, *argv], place, *words)


def test_a_pipe_is_not_waited_for(place, refused):
    # red: read_text without S_ISREG
    os.mkfifo(place / "a.toml")
    refused("align", ["a.toml", *train()[1]], place, "a.toml: not a file")


# ---- rows

BOMB = gzip.compress(b'{"prompt": "' + b"a" * 2**26)
ROWS = {
    "a bomb": ("a.jsonl.gz", BOMB, "a row of more than 16777216 characters"),
    "a bomb of a table": ("a.csv.gz", BOMB, "a line of more than 16777216 characters"),
    "damaged deflate": ("a.jsonl.gz", gzip.compress(PAIR.encode() * 99)[:40] + b"\x00" * 40, "a.jsonl.gz"),
    "damaged zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "a.jsonl.zst"),
    "no zstd": ("a.jsonl.zst", PAIR, "a.jsonl.zst"),
    "no gzip": ("a.jsonl.gz", PAIR, "a.jsonl.gz"),
    "no parquet": ("a.parquet", PAIR, "a.parquet"),
    "nested": ("a.jsonl", DEEP, "a.jsonl:1: not JSON"),
    "a key twice": ("a.jsonl", PAIR + '{"prompt": "a", "prompt": "b"}', "a.jsonl:2: not JSON (the key 'prompt' stands there twice"),
    "a key of the first twice": ("a.json", '{"prompt": "a", "prompt": "b"}', "a.json:1: the key 'prompt' stands there twice"),
    "digits": ("a.jsonl", '{"prompt": "a", "weight": ' + DIGITS + "}", "a.jsonl:1"),
    "a large weight": ("a.jsonl", PAIR + PAIR.replace("}", ', "weight": 1e18}'), 'a.jsonl:2: "weight" must be >= 0 and <= 1e+06'),
    "binary": ("a.jsonl", bytes(range(256))[::-1], "a.jsonl:1"),
    "no suffix": ("a.bin", PAIR, "a.bin"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_refused(case, place, refused):
    # red: DECODER without _once; _first_object without its look at the key; MAX_ROW = 2**40; zlib.error not caught; the weight without its bound
    name, content, *words = ROWS[case]
    write(name, content)(place)
    for script in ("align", "preview"):
        refused(*train("--data", name, script=script), place, *words)
    if case not in ("a large weight", "a key twice"):  # of a second row: sample.py answers the first meanwhile
        refused("sample", ["--model", "model", "--data", name, "--out", "o.jsonl"], place, name)
    refused("judge", ["--data", name, "--against", "pairs.jsonl"], place, name)


# ---- runs

RECORD = {"empty": "", "a list": "[]", "nested": DEEP, "digits": f'{{"step": {DIGITS}}}', "binary": b"\xff\x00"}


def record(**changes):
    return edit("step-1/trainer.json", **changes)


RECORDS = {what: write("step-1/trainer.json", content) for what, content in RECORD.items()}
RECORDS |= {
    f"{key} {value!r:.30}": record(**{key: value})
    for key, values in {
        "format": (2, "a", None, 1.5, True),
        "step": ("a", 7, -1, None, 10**400),
        "args": ([], "a", None),
        "files": ([], None, {"a": 3}, {"../x": [1, 1]}, {"a": [1]}, {"a": ["b", "c"]}, {"/etc/passwd": [1, 2]}),
        "world_size": ("a", None, []),
    }.items()
    for value in values
}


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def metadata(content):
    def change(run):
        raw = content if isinstance(content, bytes) else pickle.dumps(content)
        (run / "step-1" / ".metadata").write_bytes(raw)
        told = json.loads((run / "step-1" / "trainer.json").read_text())
        told["files"][".metadata"] = [len(raw), zlib.crc32(raw)]
        (run / "step-1" / "trainer.json").write_text(json.dumps(told))

    return change


RECORDS |= {
    f"metadata {content!r:.30}": metadata(content)
    for content in (b"", b"\x80", b"\xff" * 99, b"\x80\x04\x8e" + b"\xff" * 8, 3, None, [], {}, {"a": 1}, Evil())
}
RECORDS["metadata nested"] = metadata(b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".")


@pytest.mark.parametrize("case", RECORDS)
def test_a_checkpoint_is_refused(case, place, refused):
    # red: read_record without `kinds` or the names of files; _unreadable with `except ValueError`
    RECORDS[case](place / "run")
    shutil.rmtree(place / "run" / "final")
    argv = train("--out", "run", "--resume", "step-1", "--save-every", "1")[1]
    words = ["not a checkpoint's record: file"] * case.startswith("files {")
    refused("align", argv, place, "run/step-1", *words, leaves=("run",))
    assert not (place / "evil").exists()
    refused("export", ["run/step-1", "out"], place, "run/step-1")


FINISHED = {
    "args.json": [*NO_OBJECT.values()],
    "final": [None, b"", "a"],
}


@pytest.mark.parametrize("name, content", [(name, content) for name in FINISHED for content in FINISHED[name]])
def test_a_run_directory_is_refused(name, content, place, refused):
    # red: _changed_flags with json.loads
    path = place / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(name, content)(place / "run")
    argv = train("--out", "run", "--resume", "auto", "--lr", "1")[1]
    refused("align", argv, place, "run", leaves=("run",))


LOGS = [b"", b"\xff\x00\n", "[]\n3\n", f"{DEEP}\n", f'{{"step": {DIGITS}}}\n', '{"step": "a", "split": "train"}\n', None]


@pytest.mark.parametrize("content", LOGS, ids=lambda content: f"{content!r:.20}")
def test_what_is_no_log_is_refused_or_passed_over(content, place, refused, capfd):
    # red: rewind_log without TypeError, or with read_text of the path
    write("metrics.jsonl", content)(place / "run")
    shutil.rmtree(place / "run" / "final")
    if content != b"":
        refused("plot", ["run", "--html", "p.html"], place, "metrics.jsonl")
    argv = [*command(place, place / "run"), "--weights", "pretrained", "--save-every", "1", "--resume", "auto"]
    if content is None or isinstance(content, bytes) and content:
        refused("align", argv, place, "metrics.jsonl", leaves=("run",))
    else:
        assert exit_code(align.main, argv) is None


PLOTS = {
    "nothing": (["none"], "none"),
    "a file": (["pairs.jsonl"], "pairs.jsonl"),
    "a long name": (["a" * 300], "aaa"),
    "a status": (["run"], "status.json"),
    "out a folder": (["run", "--out", "model"], "model"),
    "live": (["run", "--live", "nan"], "--live"),
    "a NUL": (["a\0b"], "a"),
    "a loop": (["loop"], "loop"),
}


@pytest.mark.parametrize("case", PLOTS)
def test_what_plot_cannot_draw_is_refused(case, place, refused):
    # red: _object without RecursionError
    argv, *words = PLOTS[case]
    (place / "loop").symlink_to("loop")
    if case == "a status":
        (place / "run" / "status.json").write_text(DEEP)
    refused("plot", argv, place, *words)


def test_what_is_wrong_with_a_model_of_any_name(place, refused):
    # red: one_line with `path in what`; no PanicException there; an export that warns
    shutil.copytree(place / "model", place / "m")
    edit("config.json", model_type="x", auto_map=CUSTOM)(place / "m")
    refused(*train("--model", "m"), place, "error: m: needs code of its own")
    shutil.rmtree(place / "m")
    shutil.copytree(place / "model", place / "m")
    edit("config.json", intermediate_size=16)(place / "m")
    refused(*train("--model", "m"), place, "(first: model.layers.0.mlp.down_proj.weight)\n")
    with pytest.raises(ValueError, match="m: range end"), loading.one_line("m"):
        raise type("PanicException", (BaseException,), {})("range end")
    refused("export", ["run/step-1", "/proc/out"], place, "/proc")


# ---- the other scripts


@pytest.mark.parametrize("case", ["config.json: nested", "weights: cut", "weights: a pickle", "index: outside", "custom model"])
def test_every_reader_of_models_refuses(case, place, refused):
    # red: load_plain or _load_classifier without loading.check
    change, *words = MODELS[case]
    shutil.copytree(place / "model", place / "good")
    change(place / "model")
    refused("sample", ["--model", "model", "--data", "pairs.jsonl", "--out", "o.jsonl"], place, *words)
    shutil.copytree(place / "model", place / "rm")
    if not case.startswith("config"):
        edit("config.json", architectures=["LlamaForSequenceClassification"])(place / "rm")
    refused("label", ["--data", "pairs.jsonl", "--by", "rm", "--out", "o.jsonl"], place, *words)
    refused(*train(script="sft"), place, *words)
    refused(*train("--model", "good", "--reference", "model"), place, *words)


# ---- what is not an error


def test_no_kernel_of_a_hub_is_asked_for(place):
    # red: settings keeps _attn_implementation: transformers would fetch the kernel, or fail without its package
    edit("config.json", _attn_implementation="evil/kernel", attn_implementation="evil/kernel")(place / "model")
    assert loading.settings("model")._attn_implementation is None
    assert exit_code(align.main, train("--steps", "0")[1]) is None


def test_a_template_that_does_not_end_is_stopped(place, refused, monkeypatch):
    # red: render without _soon
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (place / "loop.jinja").write_text(loop)
    began = time.monotonic()
    refused(*train("--chat-template", "loop.jinja"), place, "does not end within 0.5 s")
    assert time.monotonic() - began < SECONDS / 2
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


HEADS = {
    "align": train()[1],
    "sft": train("--check")[1],
    "preview": train()[1],
    "sample": ["--model", "model", "--data", "pairs.jsonl", "--out", "o.jsonl", "--max-new-tokens", "2"],
    "judge": ["--data", "pairs.jsonl", "--against", "pairs.jsonl"],
    "label": ["--data", "pairs.jsonl", "--ask", "o.jsonl"],
    "plot": ["run", "--html", "p.html"],
    "export": ["run/step-1", "out"],
}


@pytest.mark.parametrize("script", HEADS)
def test_a_reader_that_goes_away_ends_nothing(script, place, monkeypatch, capfd):
    # red: print instead of config.tell
    read, written = os.pipe()
    os.close(read)  # as `| head -0` would
    with open(written, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert exit_code(SCRIPTS[script].main, HEADS[script]) is None
        monkeypatch.undo()
    assert "error" not in capfd.readouterr().err


# ---- --check


@pytest.mark.parametrize("script", ["align", "sft"])
def test_check_tells_and_writes_nothing(script, place, capfd):
    # red: rundir.take before it; model.load before it
    before = tree(place)
    assert exit_code(SCRIPTS[script].main, train("--check", "--epochs", "3", script=script)[1]) is None
    said = capfd.readouterr().out
    for words in ("6 examples", "3 batches an epoch, 1 steps", "llama, ", "tensors of", "GB free"):
        assert words in said
    assert tree(place) == before
    assert "parameters" in said and f" {sum(v.numel() for v in load_file('model/model.safetensors').values())} " in said


CHECKS = {
    "positions": (["--max-length", "4096"], "--max-length 4096 exceeds its 2048 positions"),
    "disk": (["--save-every", "1"], "one checkpoint needs about"),
    "weights": (["--model", "run"], "run/config.json: no such file"),
    "rows": (["--data", "none.jsonl"], "none.jsonl: no such file"),
    "done": (["--out", "run"], "already holds"),
}


def test_check_of_adapters_asks_for_no_model_named_base(place, capfd):
    # red: _models with --reference whatever shares the policy: a hub is asked for "base"
    argv = train("--check", "--lora-rank", "2", "--reference", "base")[1]
    assert exit_code(align.main, argv) is None, capfd.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "4"], ["--loss", "ppo", "--lora-rank", "4"]], ids=" ".join)
def test_check_says_what_a_checkpoint_takes(flags, place, capfd):
    # red: report without lora.numbers, or without critic
    said = []
    for more in (["--check"], ["--save-every", "1"]):
        assert exit_code(align.main, train(*flags, *more)[1]) is None
        said.append(re.search(r"one checkpoint needs about [0-9.e-]+ GB", capfd.readouterr().out)[0])
    assert said[0] == said[1]


@pytest.mark.parametrize("case", CHECKS)
def test_check_refuses_what_a_run_would(case, place, refused, monkeypatch):
    # red: report without check_positions, or without the need of a checkpoint
    extra, *words = CHECKS[case]
    if case == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    refused(*train("--check", *extra), place, *words)


def test_a_checked_run_may_be_run_and_its_flags_be_a_config(place):
    # red: "check" not among HOW_FLAGS
    argv = train("--save-every", "1", "--check")[1]
    assert exit_code(align.main, argv) is None
    assert exit_code(align.main, argv[:-1]) is None
    assert json.loads((place / "new" / "args.json").read_text())["check"] is False
    assert exit_code(align.main, ["new/args.json", "--check", "--resume", "auto"]) == 0  # nothing to do
