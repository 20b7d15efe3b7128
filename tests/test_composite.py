"""Composite models, whose text alone is trained: what is counted of one, adapters, what is exported.

`red:` names a change that turns a test red.
"""

import argparse
import importlib.util
import json
import shutil

import pytest
import torch
import transformers as hf
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_config import exit_code

import align
import checkpoint
import export
import loading
import lora
import memory
import model
import sft

TEXT = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64, "initializer_range": 0.1}
TEXT |= {"layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
# a tower whose blocks are larger than the text's, and three
IMAGES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
IMAGES |= {"image_size": 28, "patch_size": 14}
TOKENS = {"image_token_id": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4}
PROCESSOR = {"preprocessor_config.json": {"image_mean": [0.5]}, "processor_config.json": {"image_seq_length": 4}}
TOWER = ("vision_tower.", "multi_modal_projector.")
RUNS = {
    "dpo": (align, ["--save-every", "1"]),
    "sft": (sft, ["--save-every", "1"]),
}
if importlib.util.find_spec("peft"):  # an extra
    RUNS["lora"] = align, ["--lora-rank", "4", "--save-every", "2"]
needs_peft = pytest.mark.skipif("lora" not in RUNS, reason="peft, an extra, is not installed")


def gemma3():
    return hf.Gemma3Config(text_config=dict(TEXT), vision_config=dict(IMAGES), **TOKENS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny Gemma 3 with a tower, short pairs of HH, and runs from it."""
    root = tmp_path_factory.mktemp("composite")
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(gemma3()).save_pretrained(root / "base")
    hf.AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny").save_pretrained(root / "base")
    for name, said in PROCESSOR.items():
        (root / "base" / name).write_text(json.dumps(said))
    rows = (ROOT / "examples" / "hh_test.jsonl").read_text(encoding="utf-8").splitlines()
    (root / "rows.jsonl").write_text("".join(f"{row}\n" for row in sorted(rows, key=len)[:8]), encoding="utf-8")
    for name, (script, more) in RUNS.items():
        assert exit_code(script.main, flags(root, root / name, *more)) is None
    return root


def flags(root, out, *more):
    argv = ["--model", root / "base", "--data", root / "rows.jsonl", "--out", out, "--steps", 2]
    argv += ["--batch-size", 4, "--lr", 1e-2, "--warmup-steps", 0, "--max-length", 128, "--device", "cpu"]
    return [str(part) for part in [*argv, "--dtype", "float32", "--token-cache", root / "cache", *more]]


def tensors(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def logits(lm):
    with torch.no_grad():
        return lm.eval()(input_ids=torch.arange(100, 140)[None]).logits


# ---- what is counted


@pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=needs_peft)], ids=["all", "adapters"])
def test_what_is_counted_is_the_text_and_a_tower_that_rests(adapters):
    # red: memory.body without in_training; the tower's blocks among those that run; not among the weights;
    # frozen weights in bf16 although no adapters are there
    given = {**memory.ADAPTERS, "lora_rank": 4, "model": ""}
    adapt = (lambda lm: lora.insert(lm, argparse.Namespace(**given))) if adapters else None
    found, text = (memory.body(config, adapt=adapt) for config in (gemma3(), gemma3().text_config))
    for key in ("blocks", "head", "head_trained", "saved", "products", "widest", "flops", "attention"):
        assert getattr(found, key) == getattr(text, key), key
    trained = [[w for w in body.weights if w.trained] for body in (found, text)]
    assert trained[0] == trained[1]
    lm = hf.AutoModelForCausalLM.from_config(gemma3())
    tower = sum(p.numel() for n, p in lm.named_parameters() if n.removeprefix("model.").startswith(TOWER))
    assert memory.numbers(found.weights) == memory.numbers(text.weights) + tower
    parts, plain = (memory.need(body, memory.Run(512)) for body in (found, text))
    assert parts["weights"] == plain["weights"] + (2 if adapters else 4) * tower
    assert parts["moments"] == plain["moments"] and parts["gradients"] == plain["gradients"]
    assert plain["gathered"] < parts["gathered"] < plain["gathered"] + 2 * tower  # the tower's blocks are not


def test_a_plan_of_a_composite_model(root, tmp_path, capsys):
    # red: memory._units that returns all as running
    assert exit_code(align.main, [*flags(root, tmp_path / "run"), "--plan"]) is None
    assert "; 2 blocks, width 32, 8192 ids" in capsys.readouterr().out


# ---- what is trained and exported


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_the_text_and_leaves_the_tower(root, name):
    # red: the whole model frozen, or trained; loading.processor left out of export._write
    before, after = tensors(root / "base"), tensors(root / name / "final")
    assert before.keys() == after.keys()
    tower = {key for key in before if key.startswith(TOWER)}
    assert same({key: before[key] for key in tower}, {key: after[key] for key in tower}) and len(tower) > 40
    assert not torch.equal(*(found["language_model.model.layers.1.self_attn.q_proj.weight"] for found in (before, after)))
    lm, report = hf.Gemma3ForConditionalGeneration.from_pretrained(root / name / "final", output_loading_info=True)
    assert not any(report.values())
    assert {key: json.loads((root / name / "final" / key).read_text()) for key in PROCESSOR} == PROCESSOR
    assert not torch.allclose(logits(lm), logits(hf.Gemma3ForConditionalGeneration.from_pretrained(root / "base")))


@pytest.mark.parametrize("name", RUNS)
def test_the_checkpoint_exports_what_the_run_did(root, name, tmp_path):
    # red: model.untrained left out of _export_offline
    export.main([f"{root}/{name}/step-2", f"{tmp_path}/out"])
    final, out = root / name / "final", tmp_path / "out"
    names = sorted(path.name for path in final.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    assert [name for name in names if (final / name).read_bytes() != (out / name).read_bytes()] == []


LAYOUTS = ["as saved", "named as parameters", "read by transformers", "random"]


@pytest.mark.parametrize("how", LAYOUTS)
def test_the_tower_is_the_base_s_however_that_holds_it(root, how, tmp_path, monkeypatch):
    # red: names of the file taken for those of the model; fill() left out of untrained; the record's weights
    # or seed ignored
    path, options, read = root / "base", {}, []
    whole = hf.AutoModelForCausalLM.from_pretrained(path).state_dict()
    if how == "named as parameters":
        path = shutil.copytree(path, tmp_path / "base")
        given = {key: value for key, value in whole.items() if key != "lm_head.weight"}
        save_file(given, path / "model.safetensors", {"format": "pt"})
    if how == "read by transformers":
        monkeypatch.setattr("shards.find", lambda *_: None)
    if how == "random":
        options = {"weights": "random", "seed": 5}
        whole = {n.removeprefix("lm."): p for n, p in model.load(str(path), torch.float32, 64, **options).named_parameters()}
    tower = {f"lm.{key}": value for key, value in whole.items() if key.removeprefix("model.").startswith(TOWER)}
    assert same(model.untrained({"model": str(path), **options}, list(tower)), tower) and len(tower) > 40


def test_another_base_has_another_tower(root, tmp_path):
    # red: untrained without its digest
    shutil.copytree(root / "base", tmp_path / "base")
    shutil.copy(root / "sft" / "final" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    made = checkpoint.read_record(root / "dpo" / "step-2")["args"] | {"model": str(tmp_path / "base")}
    with pytest.raises(ValueError, match="trained from another model than .*/base is now"):
        model.untrained(made, ["lm.model.vision_tower.post_layernorm.bias"])


def test_a_processor_that_cannot_be_had_costs_nothing(tmp_path):
    # red: processor without suppress; of text-only models too
    config = gemma3()
    for path in ("nobody/nothing", f"{tmp_path}/gone", ""):
        config.name_or_path = path
        assert loading.processor(config) == []
    (tmp_path / "processor_config.json").write_text("{}")
    config.name_or_path = config.text_config.name_or_path = str(tmp_path)
    assert loading.processor(config) == [tmp_path / "processor_config.json"]
    assert loading.processor(config.text_config) == []


# ---- adapters


@needs_peft
def test_adapters_go_into_the_text_alone_and_peft_reads_them(root):
    # red: base_model.modules() for the decoder's in lora._targets; no exclude_modules, or in peft's own order
    import peft

    adapter = load_file(root / "lora" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in adapter)
    told = json.loads((root / "lora" / "adapter" / "adapter_config.json").read_text())
    excluded = told["exclude_modules"]
    assert excluded == sorted(excluded) and all(key.startswith("model.vision_tower.") for key in excluded)
    assert len(excluded) == 3 * 3
    base = hf.Gemma3ForConditionalGeneration.from_pretrained(root / "base")
    merged = logits(hf.Gemma3ForConditionalGeneration.from_pretrained(root / "lora" / "final"))
    assert not torch.allclose(logits(base), merged, atol=1e-3)
    whole = peft.PeftModel.from_pretrained(base, root / "lora" / "adapter")
    torch.testing.assert_close(logits(whole), merged, rtol=1e-4, atol=1e-4)
    assert {key.rpartition(".lora_")[0] for key in whole.state_dict() if ".lora_" in key} == {
        key.rpartition(".lora_")[0] for key in adapter
    }


@needs_peft
def test_a_run_goes_on_from_its_adapters(root, tmp_path):
    # red: exclude_modules missing from peft_files.SETTINGS
    argv = flags(root, tmp_path / "run", "--lora-from", root / "lora" / "adapter", "--steps", "1")
    assert exit_code(align.main, argv) is None
    kept = [(place / "adapter" / "adapter_config.json").read_bytes() for place in (root / "lora", tmp_path / "run")]
    assert kept[0] == kept[1]


@needs_peft
@pytest.mark.parametrize("chosen, layers", [("q_proj", 2), ("q_proj,mlp.down_proj", 4), ("all-linear", 14)])
def test_targets_by_name_are_the_text_s_too(chosen, layers):
    # red: base_model.modules() for the decoder's in lora._targets; no exclude_modules
    with torch.device("meta"):
        lm = model.in_training(loading.skeleton(gemma3())).lm
    given = memory.ADAPTERS | {"lora_targets": chosen, "lora_rank": 4, "model": ""}
    assert lora.insert(lm, argparse.Namespace(**given)) > 0
    adapted = [name for name, _ in lora._named_layers(lm)]
    assert len(adapted) == layers and all(name.startswith("model.language_model.layers.") for name in adapted)


REFUSED = {"tower": ("fc1", "fc1: model.vision_tower"), "head": ("lm_head", "lm_head: lm_head")}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_outside_the_text_are_refused(name):
    # red: `names & linear` never asked
    lm = loading.skeleton(gemma3())
    with pytest.raises(ValueError, match=f"{REFUSED[name][1]}.* is no linear layer of the body"):
        lora._targets(lm, REFUSED[name][0])


@needs_peft
def test_a_model_of_text_excludes_nothing():
    # red: exclude_modules=[] of every model
    lm = loading.skeleton(gemma3().text_config)
    made = lora._settings(lm, argparse.Namespace(**memory.ADAPTERS, model=""))
    assert made.exclude_modules is None and len(made.target_modules) == 7
