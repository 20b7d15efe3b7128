"""Weights into shards: what every rank holds, on one and two processes, against the whole model as
transformers loads it, to the bit.

    python tests/test_load.py BASE      (under torchrun too) loads each case and writes what differs to BASE

A comment `red:` names a one-line change that turns a test red.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import attention
import fsdp
import loading
import lora
import model

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = SIZES | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
LLAMA = COMMON | {"intermediate_size": 49, "num_key_value_heads": 2, "initializer_range": 0.3}
# kernels of experts want rows of 16 bytes
MOE = LLAMA | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 48}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_group": 1, "topk_group": 1, "n_routed_experts": 3, "first_k_dense_replace": 1}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**COMMON, intermediate_size=49),
    "gpt2": lambda: hf.GPT2Config(**COMMON),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "gemma2": lambda: hf.Gemma2Config(**LLAMA, head_dim=8),
    "phi": lambda: hf.PhiConfig(**COMMON, intermediate_size=49),  # a head with a bias
    "phi3": lambda: hf.Phi3Config(**LLAMA),
    "apertus": lambda: hf.ApertusConfig(**LLAMA),  # persistent buffers, parameters of one row
    "mixtral": lambda: hf.MixtralConfig(**LLAMA | {"intermediate_size": 48}, num_local_experts=3),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**MOE, num_experts=3, shared_expert_intermediate_size=16),
    "deepseek": lambda: hf.DeepseekV3Config(**MOE | LATENT | GROUPS, n_shared_experts=1),
}
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_from": None}
LORA |= {"lora_targets": "all-linear"}
# Of a case: the configuration that it starts from, and what is asked of outline.
CASES = {name: (name, {}) for name in CONFIGS} | {
    "bfloat16 file": ("llama", {}),
    "several files": ("qwen2", {}),
    "hub/name": ("llama", {}),
    "without its prefix": ("gpt2", {}),
    "tied, an equal head": ("qwen2", {}),
    "tied, another head": ("qwen2", {}),
    "tied, the head alone": ("qwen2", {}),
    "grown": ("llama", {"vocabulary": 103}),
    "grown, tied": ("qwen2", {"vocabulary": 151}),
    "grown, biased": ("phi", {"vocabulary": 103}),
    "grown, mixture": ("mixtral", {"vocabulary": 103}),
    "random": ("gemma2", {"weights": "random", "seed": 5}),
    "adapters": ("llama", {}),
    "adapters, transposed": ("gpt2", {}),
    "adapters, mixture": ("mixtral", {}),
    "reward model": ("llama", {"reward_model": True}),
    "value head": ("qwen2", {}),
}
WHOLE = {"mixtral", "qwen2-moe", "deepseek", "grown, mixture", "adapters, mixture"}  # rank 0 loads


def write(base: Path) -> None:
    """A directory for every case."""
    for name, (kind, _) in CASES.items():
        config = CONFIGS[kind]()
        torch.manual_seed(1)
        place = base / name
        if name == "reward model":
            config.num_labels = 1
            lm = hf.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        else:
            lm = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for tensor in (*lm.parameters(), *(b for n, b in lm.named_buffers() if n in lm.state_dict())):
            tensor.data += 0.1 * torch.randn_like(tensor)  # biases and norms too
        if name == "hub/name":
            hub = base / "hub-cache" / "models--hub--name"
            place = hub / "snapshots" / "123"
            (hub / "refs").mkdir(parents=True)
            (hub / "refs" / "main").write_text("123")
        if name == "bfloat16 file":
            lm.to(torch.bfloat16)
        lm.save_pretrained(place, max_shard_size="20KB" if name in ("several files", "hub/name") else "1GB")
        file = place / "model.safetensors"
        if name == "without its prefix":
            edit(file, lambda given: {key.removeprefix("transformer."): t for key, t in given.items()})
        if name == "tied, an equal head":
            edit(file, lambda given: given | {"lm_head.weight": given["model.embed_tokens.weight"].clone()})
        if name == "tied, another head":
            edit(file, lambda given: given | {"lm_head.weight": given["model.embed_tokens.weight"] + 1})
        if name == "tied, the head alone":
            edit(file, lambda given: given | {"lm_head.weight": given.pop("model.embed_tokens.weight")})


def edit(file: Path, change) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


@torch.no_grad()
def oracle(path: str, name: str, options: dict, dtype: torch.dtype) -> hf.PreTrainedModel:
    """The whole model by transformers alone, grown row by row."""
    if options.get("weights") == "random":
        torch.manual_seed(options["seed"])
        lm = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(path), dtype=torch.float32)
    else:
        lm = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if "vocabulary" in options:
        old = lm.get_input_embeddings().weight.shape[0]
        lm.resize_token_embeddings(options["vocabulary"], mean_resizing=False)
        for part in {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}:
            for row in range(old, options["vocabulary"]):
                noise = torch.randn(32, generator=torch.Generator().manual_seed(row))
                part[row] = part[:old].mean(0) + getattr(lm.config, "initializer_range", 0.02) * noise
        if (bias := lm.get_output_embeddings().bias) is not None:
            bias[old:] = bias[:old].mean(0)
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(dtype)
    return lm


def differences(base: Path, name: str) -> list[str]:
    """What one rank holds and should not, or the other way round."""
    rank, world_size = fsdp.ranks()
    path = name if name == "hub/name" else str(base / name)
    options = CASES[name][1]
    adapted = name.startswith("adapters")
    dtype = torch.bfloat16 if adapted else torch.float32
    policy = model.outline(path, dtype, 64, **options)
    said = [] if options or not any(not p.is_meta for p in policy.parameters()) else ["memory before fill"]
    reference = model.copied(policy, torch.bfloat16)
    want = model.LanguageModel(oracle(path, name, options, dtype))
    args = argparse.Namespace(**LORA, seed=3, model=path)
    for one in (policy, want):
        if name == "reward model":
            model.add_score(one, path, 0)
        if name == "value head":
            model.add_value_head(one, path, 7)
        if adapted:
            lora.add(one, args, lambda text: None)
    twins = model.LanguageModel(oracle(path, name, options, torch.bfloat16))
    cpu = torch.device("cpu")
    model.place(policy, torch.float32, cpu)
    pairs = [(policy, want)]
    if not adapted:
        model.place(reference.requires_grad_(False), torch.float32, cpu, policy)
        pairs.append((reference, twins))
    if (policy.source is not None and policy.source.places is None) != (name in WHOLE):
        said.append("the other way")
    for got, want in pairs:
        ours, theirs = dict(got.named_parameters()), dict(want.named_parameters())
        skip = {"lm.lm_head.weight"} if name == "reward model" else set()  # transformers draws it at random
        said += sorted(ours.keys() ^ theirs.keys())
        for key in (ours.keys() & theirs.keys()) - skip:
            local, whole = ours[key].to_local(), theirs[key]
            axis = ours[key].placements[0].dim  # 0, but of experts and of heads of one row
            parts = whole.split(-(-whole.shape[axis] // world_size), axis)
            part = parts[rank] if rank < len(parts) else whole.narrow(axis, 0, 0)
            if local.dtype != part.dtype or not torch.equal(local, part):
                said.append(f"{key} {local.dtype} {tuple(local.shape)}")
            if ours[key].requires_grad != (got is policy and theirs[key].requires_grad):
                said.append(f"{key} requires_grad {ours[key].requires_grad}")
        ours, theirs = dict(got.named_buffers()), dict(want.named_buffers())
        said += sorted(ours.keys() ^ theirs.keys())
        said += [key for key in ours if ours[key].dtype != theirs[key].dtype]
        said += [key for key in ours if not torch.equal(ours[key], theirs[key])]
        parts = [(one.lm.get_output_embeddings(), one.lm.get_input_embeddings()) for one in (got, want)]
        heads = [head.weight is embedding.weight for head, embedding in parts]
        if heads[0] != heads[1] or got.lm.config.tie_word_embeddings != heads[0]:
            said.append(f"tied {heads}")
        if got.lm.generation_config.to_dict() != want.lm.generation_config.to_dict():
            said.append("generation_config")
    return said + trained(policy, name)


def trained(policy: model.LanguageModel, name: str) -> list[str]:
    """A forward and a backward: numbers, and a gradient of every weight that is trained."""
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1))
    inputs = (ids, torch.tensor([[*range(9), *range(5, 8)]]), attention.layout([(5, [4, 3])]), torch.arange(12))
    states = policy(*inputs)
    logits = states.float() @ policy.head.weight.float().T
    if policy.head.bias is not None:
        logits = logits + policy.head.bias
    (logits.logsumexp(-1).mean() + states.float().square().mean()).backward()
    if not torch.isfinite(logits).all():
        return ["logits"]
    still = [key for key, p in policy.lm.named_parameters() if p.requires_grad and p.grad is None]
    return [f"no gradient: {key}" for key in still if key != "score.weight"]


REFUSED = {
    "missing": "1 weights missing or misshapen (first: model.layers.0.mlp.up_proj.weight)",
    "misshapen": "1 weights missing or misshapen (first: ",
    "not finite": "1 weights hold numbers that are not finite (first: model.layers.1.mlp.down_proj.weight)",
    "not finite mixture": "1 weights hold numbers that are not finite (first: ",
    "unexpected": "",
}


def spoil(base: Path) -> None:
    """Directories that are refused."""
    for name in REFUSED:
        kind = "mixtral" if "mixture" in name else "llama"
        torch.manual_seed(1)
        hf.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).save_pretrained(base / name)
        file = base / name / "model.safetensors"
        given = load_file(file)
        if name == "missing":
            del given["model.layers.0.mlp.up_proj.weight"]
        elif name == "misshapen":
            given["model.norm.weight"] = torch.ones(31)
        elif name == "unexpected":
            given["model.more.weight"] = torch.ones(3)
        else:  # in the last rows: rank 1 has them alone
            ends = ("layers.1.mlp.down_proj.weight", "layers.1.block_sparse_moe.experts.2.w2.weight")
            key = next(key for key in given if key.endswith(ends))
            given[key][-1, 2] = float("nan")
        save_file(given, file, {"format": "pt"})


def refusal(path: str) -> str:
    try:
        policy = model.outline(path, torch.float32, 64)
        model.place(policy, torch.float32, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


ROOM = {  # what is refused of a machine that has not the room for it in fp32
    "llama": ("pretrained", False), "llama, drawn": ("random", True), "mixtral": ("pretrained", True)
}  # fmt: skip


@pytest.mark.parametrize("hub", [False, True], ids=["directory", "hub name"])
@pytest.mark.parametrize("name", ROOM)
def test_what_is_never_whole_in_memory_need_not_fit_into_it(name, hub, tmp_path, monkeypatch):
    # red: size that refuses whatever has no headers to count (a hub name); outline without refuse_larger
    weights, refused = ROOM[name]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--hub--name" / "snapshots" / "123"
    lm = hf.AutoModelForCausalLM.from_config(CONFIGS[name.split(",")[0]](), dtype=torch.float32)
    lm.save_pretrained(snapshot)
    (tmp_path / "models--hub--name" / "refs").mkdir()
    (tmp_path / "models--hub--name" / "refs" / "main").write_text("123")
    numbers = sum(parameter.numel() for parameter in lm.parameters())
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 3 * numbers}.__getitem__)
    path = "hub/name" if hub else str(snapshot)
    if refused:
        with pytest.raises(ValueError, match=f"^{path}: its {numbers} parameters take .* in fp32, this machine"):
            model.outline(path, torch.bfloat16, 64, weights)
    else:
        model.outline(path, torch.bfloat16, 64, weights)
        assert loading.load_plain(path, torch.bfloat16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("load")
    write(place)
    spoil(place)
    return place


@pytest.fixture(scope="module", params=[1, 2])
def found(base, request):
    """What each rank says."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(base / "hub-cache")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(torchrun if request.param == 2 else []), __file__, base]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [base / f"found-{rank}-of-{request.param}.json" for rank in range(request.param)]
    return [json.loads(file.read_text()) for file in said]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_its_rows_of_the_whole_model(found, name):
    # red: fsdp.piece rounding down; _untie left out; _receive without its broadcast of buffers;
    # _new_rows without its noise; standing_in left out; _materialise without `made`
    assert [one[name] for one in found] == [[]] * len(found)


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses_with_the_same_line(base, found, name):
    # red: not_finite without its all_reduce; _receive without `gathered`
    for one in found:
        if REFUSED[name]:
            assert one[name].startswith(f"{base / name}: {REFUSED[name]}") and "\n" not in one[name]
        else:
            assert one[name] == ""


if __name__ == "__main__":
    rank, world_size, _ = fsdp.init("cpu")
    where = Path(sys.argv[1])
    hf.utils.logging.set_verbosity_error()
    said = {name: differences(where, name) for name in CASES}
    said |= {name: refusal(str(where / name)) for name in REFUSED}
    (where / f"found-{rank}-of-{world_size}.json").write_text(json.dumps(said))
    fsdp.finish()
