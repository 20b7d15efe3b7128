"""Experts that no number of ranks divides: how they are split, and that nothing else changes by it.

A comment `red:` names a one-line change of fsdp.py that turns a test red.
"""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

import fsdp
import model

SIZES = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "initializer_range": 0.1}
# Of published models: Mixtral 8x7B, Qwen3-30B-A3B, Qwen1.5-MoE; an embedding, a norm, a router, adapters.
SHAPES = [(8, 28_672, 4096), (8, 4096, 14_336), (128, 1536, 2048), (60, 2816, 2048), (60, 2048, 1408)]
SHAPES += [(50_257, 768), (4096, 4096), (4096,), (60, 2048), (16, 4096), (1, 2048)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_no_rank_holds_much_more_than_its_share(world_size):
    # red: `return 0`: Mixtral's experts on 64 ranks are 8 times the share
    for shape in SHAPES:
        axis = fsdp.split_axis(shape, world_size)
        most = -(-shape[axis] // world_size) * math.prod(shape) // shape[axis]
        even = [size for index, size in enumerate(shape) if index == 0 or size % world_size == 0]
        best = min(-(-size // world_size) * world_size / size for size in even)  # 3 ranks divide no power of 2
        assert most * world_size / math.prod(shape) <= max(1.05, best)
        assert axis == 0 or shape[axis] % world_size == 0  # else FSDP2 refuses
    # the cheapest to gather where it is fair enough. red: min without the floor of 1.05
    assert fsdp.split_axis((50_257, 768), 8) == fsdp.split_axis((128, 1536, 2048), 64) == 0
    assert fsdp.split_axis((8, 28_672, 4096), 64) == 1


def train(tmp_path, out, processes, steps, *more):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    argv = {"--model": tmp_path / "moe", "--weights": "random", "--data": tmp_path / "pairs.jsonl", "--loss": "dpo"}
    argv |= {"--out": tmp_path / out, "--batch-size": 4, "--epochs": 9, "--steps": steps, "--save-every": 1}
    argv |= {"--dtype": "float32", "--device": "cpu", "--max-length": 128, "--lr": 1e-2, "--max-grad-norm": 0.1}
    argv |= {"--warmup-steps": 0, "--adam-eps": 1e-3}
    flags = [str(word) for pair in argv.items() for word in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "align.py", *flags, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if row["split"] == "train"}


def test_training_does_not_depend_on_how_experts_are_split(tmp_path):
    """2 processes with 3 experts, which are split within each expert; the same of 1; and what 2 have saved goes
    on in 1."""
    # red: Shard(0) in shard, for the layout; clip_gradients without its all_reduce
    shutil.copytree(ROOT / "examples" / "tiny", tmp_path / "moe")
    config = hf.MixtralConfig(**SIZES, **EXPERTS, router_jitter_noise=0.5)
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config.to_dict()))
    lines = (ROOT / "examples" / "hh_test.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join(sorted(lines, key=len)[:8]), encoding="utf-8")

    two = train(tmp_path, "two", 2, 2)
    one = train(tmp_path, "one", 1, 2)
    saved = FileSystemReader(tmp_path / "two" / "step-2").read_metadata().state_dict_metadata
    chunks = next(part.chunks for name, part in saved.items() if name.endswith("0.mlp.experts.down_proj"))
    assert [list(chunk.sizes) for chunk in chunks] == [[3, 16, 48]] * 2
    (tmp_path / "on").mkdir()
    shutil.copytree(tmp_path / "two" / "step-1", tmp_path / "on" / "step-1")
    on = train(tmp_path, "on", 1, 2, "--resume", "auto")
    assert set(one) == {0, 1} and set(on) >= {1} and one[0][1] > 0.1  # it was clipped
    for runs in (two, on):
        for step in runs:
            torch.testing.assert_close(runs[step], one[step], rtol=1e-4, atol=1e-6)
    whole = load_file(tmp_path / "one" / "final" / "model.safetensors")
    for name in ("two", "on"):
        found = load_file(tmp_path / name / "final" / "model.safetensors")
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(found[key].float(), value.float(), rtol=1e-2, atol=1e-3)
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final")


def test_the_jitter_of_a_router_is_off():
    # red: model.in_training without "jitter"
    torch.manual_seed(0)
    lm = hf.AutoModelForCausalLM.from_config(hf.MixtralConfig(**SIZES, **EXPERTS, router_jitter_noise=0.5))
    ids = torch.arange(3, 30)[None]
    trained = model.in_training(lm).lm
    with torch.no_grad():
        first, second = (trained(ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
