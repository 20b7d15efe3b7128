"""What a run leaves in final/, and `export.py` of its checkpoint: where generation stops, heads.

`red:` names a change that turns a test red.
"""

import json
import os
import re
import shutil
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_config import exit_code, tree, write_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import align
import checkpoint
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


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"]], ids=["whole", "adapters"])
def test_sampling_that_transformers_refuses_to_save_costs_no_training(flags, root, tmp_path):
    """Temperatures without do_sample, as published models have them: read with a warning, and refused at a
    save once anything else of them has changed, as the ends of turn have."""
    # red: skeleton.generation_config = lm.generation_config, saved by save_pretrained
    if flags:
        pytest.importorskip("peft", reason="peft, an extra, is not installed")
    base = shutil.copytree(root / "model", tmp_path / "base")
    odd = {"bos_token_id": 0, "eos_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(odd))
    argv = ["--model", base, "--data", root / "rows.jsonl", "--steps", "1", "--save-every", "1"]
    argv += ["--out", tmp_path / "run", "--max-length", "64", "--dtype", "float32", *flags]
    assert exit_code(sft.main, list(map(str, argv))) is None
    assert offline(tmp_path / "run" / "step-1", tmp_path / "out") is None
    for place in (tmp_path / "run" / "final", tmp_path / "out"):
        found = json.loads((place / "generation_config.json").read_text())
        assert found == odd | {"eos_token_id": [0, 2], "transformers_version": hf.__version__}


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


def test_a_checkpoint_is_exported_tensor_by_tensor(root, tmp_path, monkeypatch):
    # red: a model of from_config for the skeleton; the state read whole, or GROUP not asked
    read, write, held, made = checkpoint._read, export._write, [], []

    def counted(path, state, **how):
        held.append(len(state["model"]))
        read(path, state, **how)

    def seen(lm, state, *rest):
        made.extend([*lm.parameters(), *state.values()])
        write(lm, state, *rest)

    monkeypatch.setattr(checkpoint, "GROUP", 1)
    monkeypatch.setattr(checkpoint, "_read", counted)
    monkeypatch.setattr(export, "_write", seen)
    assert offline(root / "sft" / "step-1", tmp_path / "out") is None
    assert made and all(value.is_meta for value in made)
    assert held == [1] * len(tensors(tmp_path / "out"))
    assert weights(tmp_path / "out") == weights(root / "sft" / "final")


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


# ---- what an export may replace


TARGETS = {  # OUT, and what the line must say
    "base model": ("{base}/start", "{base}/start: holds the model that the run started from"),
    "around it": ("{base}", "{base}: holds the model that the run started from"),
    "link to it": ("{base}/link", "holds the model that the run started from"),
    "run": ("{base}/run", "{base}/run: is a run directory"),
    "model of others": ("{base}/hub", "{base}/hub: exists and was not written by an export"),
    "empty": ("{base}/empty", "{base}/empty: exists and was not written by an export"),
}


@pytest.fixture(scope="module")
def marked(root, tmp_path_factory):
    """A run from `start`, which is an export itself, and other directories; all but two bear the mark."""
    base = tmp_path_factory.mktemp("marked")
    shutil.copytree(root / "sft" / "final", base / "start")
    shutil.copytree(root / "model", base / "hub")
    (base / "empty").mkdir()
    (base / "link").symlink_to(base / "start")
    argv = ["--model", base / "start", "--data", root / "rows.jsonl", "--steps", "1", "--save-every", "1"]
    assert exit_code(sft.main, [*map(str, argv), "--out", f"{base}/run", "--max-length", "64"]) is None
    for place in (base, base / "run"):
        shutil.copy(base / "start" / export.MARK, place)
    return base


def offline(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, argv)])
        return exit_code(lambda _: export.main(), None)


@pytest.mark.parametrize("case", TARGETS)
def test_nothing_that_is_not_an_export_is_replaced(case, marked, capfd):
    # red: _check_target without its loop; without its second condition; without the mark
    out, said = (part.format(base=marked) for part in TARGETS[case])
    before = tree(marked)
    assert offline(marked / "run" / "step-1", out) == 2
    assert re.fullmatch(f"error: .*{re.escape(said)}; choose another name\n", capfd.readouterr().err)
    assert tree(marked) == before


def test_a_run_asks_before_it_trains_whether_it_may_write_its_model(marked, root, tmp_path, capfd):
    # red: export.prepare without _check_target
    run = shutil.copytree(marked / "run", tmp_path / "run")
    (run / "final" / export.MARK).unlink()
    argv = json.loads((run / "args.json").read_text()) | {"out": str(run), "steps": 2, "resume": "auto"}
    (tmp_path / "again.json").write_text(json.dumps(argv))
    before = tree(run)
    assert exit_code(sft.main, [f"{tmp_path}/again.json"]) == 2
    assert f"error: {run}/final: exists and was not written by an export" in capfd.readouterr().err
    assert tree(run) == before


def test_an_export_replaces_an_export(marked, tmp_path):
    # red: the mark left out
    for _ in "ab":
        assert offline(marked / "run" / "step-1", tmp_path / "out") is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- as its base came


TOKENS = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
SIZES = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
FUSED = ("mixtral", "glm4_moe")
BASES = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, tied": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED | {"head_dim": 16}),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED),
    "gemma3": lambda: hf.Gemma3TextConfig(**GROUPED),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=2),  # experts that are one parameter here
    "glm4_moe": lambda: hf.Glm4MoeConfig(**GROUPED, **EXPERTS),  # and a router's bias, which is no parameter
}


def tensors(path):
    return {name: (value.shape, value.dtype) for name, value in load_file(path / "model.safetensors").items()}


def weights(path):
    return {file.name: file.read_bytes() for file in path.glob("model*")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", BASES)
def test_a_model_leaves_as_it_came(name, dtype, root, tmp_path, monkeypatch):
    """Tensors, configuration, tokenizer: what reads the base reads this. And a checkpoint exports the same, to
    the bytes that transformers writes, in one file or in several."""
    # red: _dtype always float32; a tied head written twice; the skeleton's own model_type; names not sorted, or
    # the offset without the header's length (_lay_out); a parameter cast to another dtype; no model.untrained
    torch.manual_seed(0)
    base = tmp_path / "base"
    lm = hf.AutoModelForCausalLM.from_config(BASES[name](), dtype=getattr(torch, dtype))
    for key in set(lm.state_dict()) - {name for name, _ in lm.named_parameters()} - {"lm_head.weight"}:
        lm.get_buffer(key).normal_()
    lm.save_pretrained(base)
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(base)
    argv = ["--model", base, "--data", root / "rows.jsonl", "--steps", "1", "--out", tmp_path / "run"]
    argv += ["--max-length", "64", "--save-every", "1"]
    assert exit_code(sft.main, list(map(str, argv))) is None
    final = tmp_path / "run" / "final"
    assert tensors(final) == tensors(base)
    files = [{path.name for path in place.iterdir()} for place in (final, base)]
    assert files[0] - {export.MARK} == files[1]
    then, now = (json.loads((place / "config.json").read_text()) for place in (base, final))
    assert then == now
    assert AutoTokenizer.from_pretrained(final).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    lm = hf.AutoModelForCausalLM.from_pretrained(final)
    step = tmp_path / "run" / "step-1"
    trained = dict(checkpoint.read(step, checkpoint.outline(step)))
    for key, parameter in lm.named_parameters():
        assert torch.equal(parameter, trained[f"lm.{key}"].to(parameter.dtype)), key
    lm.save_pretrained(tmp_path / "whole")
    assert weights(final) == weights(tmp_path / "whole")
    if name not in FUSED:  # transformers keeps the parts of a fused parameter in one file
        with torch.device("meta"):
            plain = hf.AutoModelForCausalLM.from_config(lm.config, dtype=lm.dtype)
        held = {key: parameter.detach() for key, parameter in lm.named_parameters()}
        plain.save_pretrained(tmp_path / "parts", state_dict=held, max_shard_size="20KB")
        monkeypatch.setattr(export, "SHARD", "20KB")
    assert offline(tmp_path / "run" / "step-1", tmp_path / "out") is None
    assert weights(tmp_path / "out") == weights(tmp_path / ("whole" if name in FUSED else "parts"))
    assert len(weights(tmp_path / "out")) > 2 or name in FUSED


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_that_is_asked_for(dtype, marked, root, tmp_path):
    # red: --final-dtype not passed on, in prepare or in _export_offline
    argv = ["--model", marked / "start", "--data", root / "rows.jsonl", "--steps", "1", "--save-every", "1"]
    argv += ["--out", tmp_path / "run", "--max-length", "64", "--final-dtype", dtype]
    assert exit_code(align.main, list(map(str, argv))) is None
    assert offline(tmp_path / "run" / "step-1", tmp_path / "out") is None
    for place in (tmp_path / "run" / "final", tmp_path / "out"):
        assert {kind for _, kind in tensors(place).values()} == {getattr(torch, dtype)}
        assert json.loads((place / "config.json").read_text())["dtype"] == dtype


def test_files_have_the_mode_that_the_user_gives_files(marked, root, tmp_path):
    # red: _write without chmod: safetensors gives 0600
    before = os.umask(0o027)
    try:
        argv = ["--model", marked / "start", "--data", root / "rows.jsonl", "--steps", "1", "--save-every", "1"]
        argv += ["--out", tmp_path / "run", "--max-length", "64", "--loss", "ppo"]
        assert exit_code(align.main, list(map(str, argv))) is None
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    assert {path.name for path in found} >= {"model.safetensors", "value_head.safetensors", ".metadata"}
    assert {path.name for path, mode in found.items() if mode != (0o750 if path.is_dir() else 0o640)} == set()


def test_a_pipeline_answers_a_chat_and_stops(root, tmp_path):
    # red: the chat template not exported; model.stop_at left out
    row = {"prompt": "Name a colour.", "completion": "Blue is one."}
    (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
    model = write_model(tmp_path / "model", eos_token_id=0)
    edit(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    argv = ["--model", model, "--weights", "random", "--data", tmp_path / "row.jsonl", "--epochs", "60"]
    argv += ["--out", tmp_path / "run", "--max-length", "64", "--lr", "2e-2", "--warmup-steps", "0"]
    assert exit_code(sft.main, list(map(str, argv))) is None
    ask = hf.pipeline("text-generation", model=str(tmp_path / "run" / "final"), device="cpu")
    said = ask([{"role": "user", "content": row["prompt"]}], max_new_tokens=30, do_sample=False)
    assert said[0]["generated_text"][-1] == {"role": "assistant", "content": row["completion"]}
    chat = [{"role": "user", "content": row["prompt"]}]
    ids = ask(chat, max_new_tokens=30, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert ids[-1] == 2 and ids.count(2) == 2  # <|im_end|> of the prompt and of the answer, then nothing
