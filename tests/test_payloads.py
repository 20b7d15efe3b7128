"""No file that somebody is handed runs code: real payloads, each of which would make a file, read by the real
scripts by a user who answers every question with yes.

Pickles in a checkpoint's metadata: test_checkpoint.py. `red:` names a change that turns a test red.
"""

import io
import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_config import exit_code, write_model

import align
import export
import sample
import sft

PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
"""


class Payload:
    """Pickled, it makes a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a random model, rows and the weights of a run; yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    write_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(6 * (json.dumps(PAIR) + "\n"))
    return tmp_path


def command(place, *more):
    argv = ["--model", place / "model", "--data", place / "rows.jsonl", "--out", place / "run", "--max-length", "64"]
    return [str(part) for part in [*argv, "--steps", "1", "--batch-size", "2", *more]]


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bin_weights(place):
    torch.save({"lm_head.weight": Payload(place / "ran")}, place / "model" / "pytorch_model.bin")


def index_of_pickles(place):
    torch.save({"lm_head.weight": Payload(place / "ran")}, place / "model" / "weights.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "weights.bin"}}
    (place / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def index_beyond(place):
    save_file({"lm_head.weight": torch.zeros(1)}, place / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../other.safetensors"}}
    (place / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def own_model(place):
    (place / "model" / "mine.py").write_text(CODE.format(marker=str(place / "ran")))
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    change(place / "model" / "config.json", model_type="mine", auto_map=names)


def own_tokenizer(place):
    own_code_of_tokenizer(place / "model", place / "ran")


def own_code_of_tokenizer(folder, marker):
    (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map=names)


def kernel(place):
    change(place / "model" / "config.json", attn_implementation="somebody/attention")


def template(place):
    code = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % (place / "ran")
    for name in ("chat_template.jinja", "template.jinja"):
        (place / "model" / name).write_text(code)


# What is said of each; None: it is not looked at, and the run ends well
PAYLOADS = {
    bin_weights: "model: ",
    index_of_pickles: "names 'weights.bin' (safetensors beside it only)",
    index_beyond: "names '../other.safetensors' (safetensors beside it only)",
    own_model: "model: ",
    own_tokenizer: None,
    kernel: None,  # the name is not asked for
    template: "",
}


@pytest.mark.parametrize("script", [sft, align, sample])
@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.__name__)
def test_no_handed_file_runs_code(payload, script, place, capfd):
    # red: use_safetensors=False, trust_remote_code=None in loading.py; local without its loops
    payload(place)
    argv = command(place)
    if script is sample:
        argv = [*argv[:4], "--out", f"{place}/answers.jsonl", "--max-new-tokens", "2"]
    elif payload in (own_tokenizer, template, kernel):
        argv += ["--weights", "random"]
    code = exit_code(script.main, argv)
    stderr = capfd.readouterr().err
    assert not (place / "ran").exists()
    if PAYLOADS[payload] is not None:
        assert code == 2 and re.fullmatch(r"error: .+\n", stderr) and PAYLOADS[payload] in stderr, stderr


def test_an_export_runs_no_code_of_the_tokenizer(place, monkeypatch, capfd):
    # red: _export_offline with AutoTokenizer.from_pretrained(kept)
    assert exit_code(sft.main, command(place, "--weights", "random", "--save-every", "1")) is None
    own_code_of_tokenizer(place / "run" / "tokenizer", place / "ran")
    monkeypatch.setattr(sys, "argv", ["export.py", f"{place}/run/step-1", f"{place}/exported"])
    exit_code(lambda _: export.main(), [])
    assert not (place / "ran").exists()


def test_a_value_head_is_nothing_else(place, capfd):
    # red: add_value_head with strict=False on the whole model
    assert exit_code(align.main, command(place, "--weights", "random", "--loss", "ppo")) is None
    made = shutil.copytree(place / "run" / "final", place / "critic")
    path = made / "value_head.safetensors"
    values = load_file(path)
    argv = command(place, "--loss", "ppo", "--model", made, "--out", place / "again")
    shape = {**values, "value_head.4.weight": torch.zeros(2, 32)}
    for wrong in ({**values, "lm.lm_head.weight": torch.zeros(1)}, dict(list(values.items())[1:]), shape):
        save_file(wrong, path)
        capfd.readouterr()
        assert exit_code(align.main, argv) == 2
        stderr = capfd.readouterr().err
        assert re.fullmatch(r"error: \S+/value_head.safetensors: not this model's value head: .+\n", stderr), stderr
    save_file(values, path)
    assert exit_code(align.main, argv) is None
