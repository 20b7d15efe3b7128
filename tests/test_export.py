"""What a run leaves in final/, and `export.py` of its checkpoint: where generation stops, heads.

`red:` names a change that turns a test red.
"""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_config import exit_code, write_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import align
import export
import sft

LR = 1e-3
SAMPLING = {"do_sample": True, "top_k": 7}
RUNS = {"align": (align, []), "sft": (sft, []), "plain": (align, ["--chat-template", "plain"])}
PLACES = ["final", "offline"]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with `model`, whose eos is not ChatML's end of turn and which has a head of its own, its
    configuration says tied; and runs of one step from it, each with its export of the checkpoint."""
    root = tmp_path_factory.mktemp("export")
    model = write_model(root / "model", tie_word_embeddings=False, eos_token_id=0)
    edit(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    save_file(
        {name: value.clone() for name, value in lm.state_dict().items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    edit(model / "config.json", tie_word_embeddings=True)
    (model / "generation_config.json").write_text(json.dumps(SAMPLING | {"eos_token_id": 0}))
    rows = [{"prompt": f"q{k}", "chosen": f"yes {k}", "rejected": f"no {k}"} for k in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", model, "--data", root / "rows.jsonl", "--steps", "1", "--batch-size", "4", "--lr", LR]
    argv += ["--warmup-steps", "0", "--save-every", "1", "--dtype", "float32", "--max-length", "64"]
    for name, (script, more) in RUNS.items():
        assert exit_code(script.main, [*map(str, argv), "--out", f"{root}/{name}", *more]) is None
        with pytest.MonkeyPatch.context() as patch:
            command = ["export.py", f"{root}/{name}/step-1", f"{root}/{name}/offline"]
            patch.setattr(sys, "argv", command)
            export.main()
    return root


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RUNS)
def test_generation_stops_at_the_end_of_turn_that_was_trained(root, name, place):
    # red: model.stop_at left out; the checkpoint's export with the source's generation_config.json; the
    # model's own ends forgotten; its settings lost
    path = root / name / place
    found = json.loads((path / "generation_config.json").read_text())
    ends = [0] if name == "plain" else [0, 2]  # <|endoftext|>, and <|im_end|>
    assert found["eos_token_id"] == (ends if len(ends) > 1 else ends[0])
    assert {key: found[key] for key in SAMPLING} == SAMPLING
    lm = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    for token in (0, 2):
        with torch.no_grad():  # whatever is said, this token is next
            lm.lm_head.weight.zero_()
            lm.lm_head.register_forward_hook(lambda *_, token=token: torch.eye(8192)[token].expand(1, 1, -1))
        said = lm.generate(asked, max_new_tokens=2, do_sample=False, top_k=None)[0, asked.shape[1] :].tolist()
        assert said == ([token] if token in ends else [token] * 2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RUNS)
def test_a_head_of_its_own_is_exported_although_the_configuration_says_tied(root, name, place):
    """The trained values are near those it began with: a step of AdamW moves a number by LR at most."""
    # red: _untie left out; the head taken for a copy of the embedding; the untrained model exported
    before = load_file(root / "model" / "model.safetensors")
    after = load_file(root / name / place / "model.safetensors")
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert 0 < (value - before[key]).abs().max() < 1.01 * LR, key
    assert not torch.allclose(after["lm_head.weight"], after["model.embed_tokens.weight"], atol=5 * LR)
    lm, report = AutoModelForCausalLM.from_pretrained(root / name / place, output_loading_info=True)
    assert not any(report.values()) and lm.config.tie_word_embeddings is False
    for key, parameter in lm.named_parameters():
        assert torch.equal(parameter, after[key]), key


@pytest.mark.parametrize("name", RUNS)
def test_the_checkpoint_exports_what_the_run_did(root, name):
    final, offline = (root / name / place for place in PLACES)
    names = sorted(path.name for path in final.iterdir())
    assert names == sorted(path.name for path in offline.iterdir())
    assert [name for name in names if (final / name).read_bytes() != (offline / name).read_bytes()] == []


def test_a_tied_model_stays_tied(root, tmp_path):
    # red: every model untied
    model = write_model(tmp_path / "model")
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is True
    argv = ["--model", model, "--weights", "random", "--data", root / "rows.jsonl", "--steps", "1"]
    argv += ["--out", tmp_path / "run", "--max-length", "64"]
    assert exit_code(sft.main, list(map(str, argv))) is None
    assert "lm_head.weight" not in load_file(tmp_path / "run" / "final" / "model.safetensors")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
