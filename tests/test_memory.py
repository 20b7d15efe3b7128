"""memory.py against what it counts: autograd, FSDP2, the process that ran; and what it says to a user."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_config import exit_code
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen2Config

import align
import attention
import estimate
import lora
import memory
import model
import sft

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import peak  # noqa: E402

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=600, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=600),
    "gpt_neox": GPTNeoXConfig(**SMALL, vocab_size=600),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=600, bos_token_id=0, eos_token_id=0),
}


def flags(**changes):
    return argparse.Namespace(model="", **memory.ADAPTERS | changes)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("adapters", [False, True], ids=["all", "adapters"])
def test_what_blocks_keep_is_what_autograd_saves_of_the_model_that_trains(name, adapters, tmp_path, monkeypatch):
    """red: saved[-1] += 2 * _bytes(value); keep() without `held`, so that weights count; GPT-2's dropout;
    no attention saved"""
    CONFIGS[name].save_pretrained(tmp_path)
    tokens = 256
    monkeypatch.setattr(memory, "PROBE", tokens)
    adapt = (lambda lm: lora.insert(lm, flags(lora_rank=4))) if adapters else None
    found = memory.body(CONFIGS[name], torch.bfloat16, adapt)
    live = model.load(str(tmp_path), torch.float32, 64, "random")
    if adapters:
        live.lm.requires_grad_(False)
        lora._inject(live.lm, lora._settings(live.lm, flags(lora_rank=4)), 0.0, 0)
    for parameter in live.parameters():
        parameter.data = parameter.data.bfloat16()
    held = {part.untyped_storage().data_ptr() for part in (*live.parameters(), *live.buffers())}
    kept = {}

    def keep(value):
        if value.untyped_storage().data_ptr() not in held:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    ids = torch.zeros(1, tokens, dtype=torch.long)
    groups = [(tokens // 4, [tokens // 4] * 3)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        live(ids, torch.arange(tokens)[None], attention.layout(groups), torch.arange(2))
    real = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert sum(found.saved) * tokens == pytest.approx(real, rel=0.05)
    assert memory.numbers(found.weights) == sum(parameter.numel() for parameter in live.parameters())
    trained = sum(parameter.numel() for name, parameter in live.named_parameters() if parameter.requires_grad)
    assert memory.numbers([weight for weight in found.weights if weight.trained]) == trained


SHARDS = """
import sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import fsdp, model
dist.init_process_group("fake", rank=int(sys.argv[2]), world_size=64, store=FakeStore())
lm = model.load(sys.argv[1], torch.float32, 64, "random")
fsdp.shard(lm, lm.blocks, torch.bfloat16, torch.device("cpu"))
print(sum(p.to_local().numel() for p in lm.parameters()),
      sum(g.fsdp_params[k]._sharded_param_data.numel() for m in lm.modules()
          for g in [getattr(m, "_get_fsdp_state", lambda: None)() and m._get_fsdp_state()._fsdp_param_group]
          if g for k in range(len(g.fsdp_params))))
"""


def test_shards_of_64_ranks_are_those_of_fsdp(tmp_path):
    """red: math.floor instead of math.ceil in numbers()"""
    CONFIGS["llama"].save_pretrained(tmp_path)
    said = subprocess.run(
        [sys.executable, "-c", SHARDS, str(tmp_path), "0"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    found = memory.body(CONFIGS["llama"])
    assert int(said[-1]) == memory.numbers(found.weights, 64)
    assert memory.balance(found, 64) == pytest.approx(int(said[-1]) * 64 / memory.numbers(found.weights))
    assert memory.balance(found, 1) == 1


def test_flops_are_those_of_the_products():
    """red: 2 * math.prod -> math.prod; experts not shared out"""
    found = memory.body(CONFIGS["llama"])
    wide, narrow, inner = 64, 32, 96
    assert found.flops == 3 * 2 * (2 * wide * wide + 2 * wide * narrow + 3 * wide * inner)
    assert found.attention == 3 * 2 * 2 * wide
    # queries, keys and values, attention, its product, two of the gated layer, and one back
    assert found.products == [2 * (wide + 2 * narrow + wide + wide + 2 * inner + wide)] * 3
    mixture = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=99)
    found = memory.body(mixture)
    assert found.flops == 3 * 2 * (2 * wide * wide + 2 * wide * narrow + 2 * 3 * wide * inner + 8 * wide)
    # forward, recomputed forward and twice a forward backward; the head once, once again and twice
    run = memory.Run(100)
    step = memory.flops(found, run, 100, 10, 50)
    assert step == pytest.approx(4 * 100 * (found.flops + 50 * found.attention) + 4 * 2 * 99 * 64 * 10)


SIZES = {
    "llama": {"num_key_value_heads": 1, "hidden_size": 320, "num_hidden_layers": 8, "intermediate_size": 960},
    "qwen2": {"num_key_value_heads": 1, "hidden_size": 320, "num_hidden_layers": 6, "intermediate_size": 1280},
    "gpt_neox": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024},
    "gpt2": {"n_embd": 320, "n_layer": 6, "n_head": 5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four models of 18 to 30 million parameters; the embedding is the head but in GPT-NeoX."""
    base = tmp_path_factory.mktemp("made")
    for kind, sizes in SIZES.items():
        heads = {} if kind == "gpt2" else {"num_attention_heads": sizes["hidden_size"] // 64}
        tied = {} if kind == "gpt_neox" else {"tie_word_embeddings": True}
        peak.make_model(kind, heads | tied | sizes, base / kind)
    return base


@pytest.mark.parametrize("case", ["all, live", "all, cached", "LoRA, adapters off", "LoRA, cached"])
@pytest.mark.parametrize("kind", SIZES)
def test_a_run_takes_what_it_said(kind, case, made):
    """red: moments at 4 bytes; no reference; the head's fp32 copies left out; what a tied matrix's gradients
    take; holes of the heap"""
    within(kind, case, made)


def test_a_run_with_cached_states_takes_what_it_said(made):
    """red: the reference's weights counted beside its states"""
    within("llama", "all, cached states", made)


def within(kind, case, made):
    found = peak.run(str(made / kind), [*peak.CASES[case], "--dtype", "float32"], length=16, fill=False)
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.15), found


@pytest.fixture
def folder(tmp_path):
    """A configuration without weights or a tokenizer."""
    CONFIGS["llama"].save_pretrained(tmp_path / "model")
    return tmp_path


def planned(main, folder, capsys, *more):
    given = ["--model", f"{folder}/model", "--data", "nowhere.jsonl", "--out", f"{folder}/run", "--plan", *more]
    main([*given, "--max-length", "64"])
    assert not (folder / "run").exists()
    return capsys.readouterr().out


def gigabytes(said):
    return float(re.search(r"in all: ([\d.]+) GB", said)[1])


def test_a_plan_needs_a_configuration_alone(folder, capsys):
    """red: preflight.begin looking for weights; data read before the plan; one way of recomputing for all; states
    counted for log-probabilities"""
    disk = []
    for loss in ("dpo", "ra_dpo1"):
        kept = ["--loss", loss, "--cache-reference", f"{folder}/kept", "--steps", "1000", "--dtype", "float32"]
        said = planned(align.main, folder, capsys, "--batch-size", "512", "--device", "cpu", *kept)
        disk.append(float(re.search(r"--cache-reference about ([\d.]+) GB", said)[1]))
    assert disk[1] == pytest.approx(disk[0] * (1 + CONFIGS["llama"].hidden_size), rel=0.05)
    ways = {way: float(gb) for way, gb in re.findall(r" (none|ops|selective|full) ([\d.]+) GB", said)}
    assert len(ways) == 4 and ways["none"] > ways["ops"] >= ways["full"] == gigabytes(said)
    said = planned(align.main, folder, capsys, "0.3", "--gpus", "64", "--memory", "80", "--steps", "10")
    assert "memory of a rank, 64 in all" in said and "reference" in said and "30%" in said
    assert re.search(r"H100, 80 GB: 1 at least", said) and "does not fit" not in said
    assert "reference" not in planned(align.main, folder, capsys, "--loss", "simpo")
    assert "reference" not in planned(sft.main, folder, capsys)
    for loss in ("ppo", "kto", "ra_dpo1", "reward"):
        if loss in align.LOSSES:
            planned(align.main, folder, capsys, "--loss", loss)


def test_a_plan_of_epochs_has_steps_where_it_knows_how_much_there_is(folder, capsys):
    """red: floor for ceil; updates on a batch not counted; rows of an epoch counted again in the next; --epochs
    in place of --steps; a reference's states in the policy's width"""
    said = {}
    for main in (align.main, sft.main):
        given = ["--plan-examples", "1000", "--batch-size", "64", "--epochs", "3", "--plan", "0.4"]
        said[main] = planned(main, folder, capsys, *given)
        assert "FLOP; 48 steps, " in said[main] and re.search(r"at least, .* s a step, \S+ h at 40%", said[main])
        assert "FLOP; 5 steps, " in planned(main, folder, capsys, *given, "--steps", "5")
        assert "FLOP; its steps: with --plan-examples N\n" in planned(main, folder, capsys, *given[2:])
    kept = ["--cache-reference", f"{folder}/kept", "--loss", "ra_dpo1", "--reference", f"{folder}/wide", "--dtype", "float32"]
    LlamaConfig(**SMALL | {"hidden_size": 128, "vocab_size": 600}).save_pretrained(folder / "wide")
    more = [*given, *kept]
    assert "FLOP; 96 steps, " in planned(align.main, folder, capsys, *given, "--ppo-epochs", "2")
    once, thrice = (planned(align.main, folder, capsys, *more, "--epochs", n) for n in "13")
    (disk,), (again,) = (re.findall(r"disk: .*", text) for text in (once, thrice))
    rows, states = (float(size) for size in re.findall(r"about ([\d.]+) GB", disk))
    assert disk == again and (rows, states) == pytest.approx((1000 * 96 * 5e-9, 1000 * 48 * 516e-9), rel=0.05)


def test_a_plan_of_a_configuration_without_end_is_one_line(tmp_path, capsys):
    """red: bodies() that builds its layers"""
    settings = {"model_type": "llama", **SMALL, "num_hidden_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    given = ["--model", str(tmp_path), "--data", "none", "--out", f"{tmp_path}/run", "--plan"]
    assert exit_code(sft.main, given) == 2
    assert "has 1000000000 layers" in capsys.readouterr().err


def test_a_plan_says_what_to_change(folder, capsys):
    """red: limit never compared; the order of the changes"""
    few = ["--memory", "0.06", "--batch-size", "256", "--tokens-per-microbatch", "8192"]
    said = planned(align.main, folder, capsys, *few, "--activation-checkpointing", "none")
    assert "does not fit into 0.0552 GB: fits with --tokens-per-microbatch 64\n" in said
    said = planned(align.main, folder, capsys, "--memory", "0.0001")
    assert said.endswith("fits with nothing known here\n")


def test_a_run_that_cannot_fit_is_one_line_and_leaves_nothing(tmp_path, capsys):
    """red: refuse() without the raise, or after the run directory is made; --yes ignored, or not taken bare"""
    peak.make_model("llama", SMALL, tmp_path / "model")
    peak.write_pairs(tmp_path / "pairs.jsonl", 8, 16)
    given = ["--model", f"{tmp_path}/model", "--data", f"{tmp_path}/pairs.jsonl", "--out", f"{tmp_path}/run"]
    given += ["--steps", "0", "--device", "cpu", "--token-cache", f"{tmp_path}/cache", "--memory", "0.01"]
    command = [sys.executable, "align.py", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert re.fullmatch(r"error: needs [\d.]+ GB a rank, there are 0.0092 \(.*; or --yes true\)\n", done.stderr)
    assert "needs about" in done.stdout
    done = subprocess.run([*command, "--yes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run" / "status.json").exists(), done.stderr


@pytest.mark.parametrize("main", [align.main, sft.main])
def test_what_cannot_fit_is_not_made(main, tmp_path, monkeypatch, capsys):
    """red: outline that calls `allowed` once random weights are there; refused as a fault of the directory"""
    peak.make_model("llama", SMALL, tmp_path / "model")
    peak.write_pairs(tmp_path / "pairs.jsonl", 8, 16)
    monkeypatch.setattr(model.shards, "refuse_not_finite", None)  # what is asked of random weights first
    given = ["--model", f"{tmp_path}/model", "--data", f"{tmp_path}/pairs.jsonl", "--out", f"{tmp_path}/run"]
    given += ["--weights", "random", "--device", "cpu", "--token-cache", f"{tmp_path}/cache", "--memory", "0.01"]
    assert exit_code(main, given) == 2
    assert capsys.readouterr().err.startswith("error: needs")


def test_memory_is_what_the_control_groups_leave(tmp_path, monkeypatch):
    """red: the group itself alone, or the topmost alone; "max" read as a number; v1's file not looked for;
    its no limit, 2**63 less a page, taken; not shared out among local ranks"""
    whole = estimate.host_memory(tmp_path)  # neither proc nor sys
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def allowed(own, limits):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        given = {"proc/self/cgroup": own} | {f"sys/fs/cgroup/{key}": of for key, of in limits.items()}
        for name, text in given.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n")
        return estimate.host_memory(root)

    limits = {"memory.max": "7000", "job/memory.max": "5000", "job/step/memory.max": "max"}
    assert allowed("0::/job/step", limits) == 5000
    assert allowed("0::/job/step", limits | {"job/step/memory.max": "3000"}) == 3000
    assert allowed("0::/", limits) == 7000 and allowed("0::/other", {"memory.max": "max"}) == whole
    old = "9:name=systemd:/\n4:memory:/docker/1\n2:cpu:/"
    assert allowed(old, {"memory/memory.limit_in_bytes": "6000"}) == 6000
    assert allowed(old, {"memory/docker/1/memory.limit_in_bytes": str(2**63 - 4096)}) == whole
    monkeypatch.setattr(estimate, "host_memory", lambda: 6000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert estimate.limit_of(argparse.Namespace(memory=None), False) == 3000


def test_more_ranks_and_less_kept_take_less(monkeypatch):
    """red: shards of weights, moments or gradients not divided by the ranks; selective as full; a
    copy of the weights alone for a checkpoint; the cached head of the policy's width, without its bias, or for
    numbers too"""
    found = memory.body(CONFIGS["llama"])
    run = memory.Run(200_000, ranks=4, microbatches=2, reference="live", cuda=True)
    total = lambda **changes: sum(memory.need(found, run._replace(**changes)).values())  # noqa: E731
    assert total(ranks=1) > total() > total(ranks=64)
    assert total(checkpointing="none") > total(checkpointing="selective") > total()
    assert total(checkpointing="none") > total(checkpointing="ops") > total()
    assert total() > total(reference="hidden") > total(reference="none") == total(reference="cached")
    assert total(reference="hidden") >= total(reference="adapters")
    assert total(drift=True) >= total() == total(staged=True)
    on_host = run._replace(cuda=False, ranks=1)
    copied = memory.need(found, on_host._replace(staged=True))["staging"]
    assert copied == 3 * memory.need(found, on_host)["weights"] and memory.need(found, on_host)["staging"] == 0
    cache = {kind: memory.need(found, run._replace(reference=kind))["cache"] for kind in ("live", "cached", "hidden")}
    assert cache == {"live": 0, "cached": 0, "hidden": 2 * 600 * 64}
    other = found._replace(head=(600, 32), root=[memory.Weight((600, 32), True), memory.Weight((600,), True)])
    parts = memory.need(found, run._replace(reference="hidden", size=4), other)
    assert parts["cache"] == 4 * 600 * (32 + 1)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    how_big = importlib.import_module("how_big")
    monkeypatch.setattr(how_big, "SIZES", {"1B": how_big.SIZES["1B"]})
    rows = how_big.table().splitlines()
    assert len(rows) == 2 + 4 and "| 1B | all | dpo |" in rows[2]
