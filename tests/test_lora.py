"""Adapters against peft on plain transformers; the real scripts with them, on 1 and 2 processes.

A comment `red:` names a change that turns the test red.
"""

import functools
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import launch
from safetensors.torch import load_file
from test_attention import CONFIGS, GROUPED, PACK, POSITIONS, VOCABULARY, error, padded, softmax_in_fp64  # noqa: F401
from test_config import exit_code, write_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3MoeConfig,
)

import added
import align
import attention
import chat
import checkpoint
import export
import fsdp
import lora
import model
import sample
import sft
import vocab

peft = pytest.importorskip("peft", reason="peft, an extra, is not installed")
ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"lora_rank": 3, "lora_alpha": 12.0, "lora_dropout": 0.0, "lora_targets": "all-linear", "lora_from": None}
IDS = torch.arange(VOCABULARY - 40, VOCABULARY)[None]


def adapted(path, dtype=torch.float64, tokens=range(0), **changes):
    """model.load of a directory with adapters whose B is not 0, and rows of `tokens` that are others."""
    policy = model.load(str(path), dtype, POSITIONS)
    args = types.SimpleNamespace(**FLAGS | {"model": str(path), "seed": 3} | changes)
    lora.add(policy, args, lambda *_: None, tokens=tokens)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if ".lora_B." in name or added.is_row(name):
                torch.nn.init.normal_(parameter, std=0.1 if ".lora_" in name else 0.5)
    return policy


@pytest.fixture
def group():
    fsdp.init("cpu")
    yield
    fsdp.finish()


@functools.cache
def nothing_to_save():
    return types.SimpleNamespace(save_pretrained=lambda place: None)


# tied with a scale, tied, untied with names of its own
ADDED = [(name, range(VOCABULARY - 9, VOCABULARY - 6)) for name in ("gemma3", "gpt2", "gpt-neox")]


# a mixture whose first block is dense: peft takes its up_proj for the experts'
DENSE_FIRST = {"mlp_only_layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = CONFIGS | {"qwen3-moe": lambda: Qwen3MoeConfig(**GROUPED, **DENSE_FIRST, head_dim=8)}


@pytest.mark.parametrize("name, tokens", [(name, range(0)) for name in MODELS] + ADDED)
@pytest.mark.usefixtures("group", "softmax_in_fp64")
def test_gradients_reference_and_exports_equal_pefts_own(name, tokens, tmp_path, monkeypatch):
    """Of a packed batch in fp64 against padded rows through PeftModel; then what lies on disk, in fp32, and
    what a policy in training gives to generate from. With tokens, their rows are trained too."""
    # red: merge without the scaling; GPT-2's deltas not transposed; the adapters left on in Reference; the
    # head trained; alpha for alpha / r; embed_scale left out of added._embed; the head's hook left out; the
    # rows of an untied head taken for those of its embedding; every linear layer's name given to peft
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)  # not in fp64
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain.save_pretrained(tmp_path / "base")
    layout = attention.layout(PACK.groups)
    inputs = (PACK.ids, PACK.positions, layout, PACK.predict)
    with torch.no_grad():
        bare = model.load(str(tmp_path / "base"), torch.float64, POSITIONS)(*inputs)  # (N, D)
    policy = adapted(tmp_path / "base", tokens=tokens)
    if not tokens:
        reference = lora.Reference(policy, ())
        assert torch.equal(reference(*inputs), bare)
    states = policy(*inputs)  # (N, D)
    assert error(states, bare) > 1e-2
    coefficient = torch.linspace(-1, 2, len(PACK.targets), dtype=torch.float64)
    logps = vocab.token_statistics(states, policy.head, PACK.targets).logps  # (N,)
    (coefficient * logps).sum().backward()

    export.export(policy, nothing_to_save(), tmp_path / "final")
    oracle = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    ids, mask, labels = padded()
    chosen = labels[:, 1:] != -100  # (R, L - 1)
    with torch.no_grad():
        told = oracle(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", attn_implementation="eager").eval()
        assert error(merged(input_ids=IDS).logits, told) < 1e-5
        assert error(policy.generate(lambda lm: lm(input_ids=IDS).logits), told) < 1e-5
    oracle.double()
    expected = oracle(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)[chosen]  # (N, V)
    expected = expected.gather(-1, labels[:, 1:][chosen][:, None])[:, 0]  # (N,)
    (coefficient * expected).sum().backward()
    # the file is fp32: so are the oracle's adapters
    assert error(logps, expected) < 1e-5
    wanted = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    found = {f"base_model.model.{n[3:]}": p.grad for n, p in policy.named_parameters() if p.grad is not None}
    found = {n.replace(f".{added.NAME}", f".{added.PEFT}.default"): gradient for n, gradient in found.items()}
    rows = [n for n in found if ".lora_" not in n]
    assert wanted.keys() == found.keys() and len(found) >= 8
    assert len(rows) == bool(tokens) * (2 - (name != "gpt-neox"))
    floor = 1e-7 * max(gradient.norm() for gradient in wanted.values())  # softmax ignores a key bias: 0
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() < 1e-4 * gradient.norm() + floor, key


ROUTERS = {
    "phimoe": lambda: hf.PhimoeConfig(**GROUPED, num_local_experts=4, router_jitter_noise=0.0),
    "llama4": lambda: hf.Llama4TextConfig(**GROUPED, num_local_experts=4, intermediate_size_mlp=32, head_dim=8),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_that_is_a_linear_layer_by_name_alone_has_no_adapter(name):
    """It returns more than a product."""
    # red: isinstance(named[name], nn.Linear) in _targets
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(ROUTERS[name]())
    assert any(isinstance(m, torch.nn.Linear) for n, m in lm.named_modules() if n.endswith(".router"))
    ends = lora._targets(lm, "all-linear")[0]
    assert {"q_proj", "o_proj"} <= set(ends) and "router" not in ends
    with pytest.raises(ValueError, match="router is no linear layer of the body"):
        lora._targets(lm, "router")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("size", [0, 8])
def test_added_tokens_with_an_embedding_for_each_layer_are_refused(size):
    """Gemma 4's small ones: that grows too, and peft's form of adapters has no place for it."""
    # red: lora.add without its first condition; with `is not None`
    settings = GROUPED | {"head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0}
    settings |= {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": size}
    policy = model.in_training(AutoModelForCausalLM.from_config(hf.Gemma4TextConfig(**settings)))
    args = types.SimpleNamespace(**FLAGS | {"model": "", "seed": 3})
    if not size:
        return lora.add(policy, args, lambda *_: None, tokens=range(VOCABULARY - 2, VOCABULARY))
    with pytest.raises(ValueError, match="^Gemma4ForCausalLM: .* give a base that has these tokens"):
        lora.add(policy, args, lambda *_: None, tokens=range(VOCABULARY - 2, VOCABULARY))
    lora.add(policy, args, lambda *_: None)


# ---- the scripts, one process


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model, one that csft has given its tokens, one whose head is not its embedding, and short pairs
    of HH."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    base = write_model(root / "base", num_hidden_layers=2, initializer_range=0.1)
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    lm.save_pretrained(base)
    shutil.copytree(base, root / "conditioned")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(chat.CONTROL_TOKENS), special_tokens=True)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lm.save_pretrained(root / "conditioned")
    tokenizer.save_pretrained(root / "conditioned")
    untied = write_model(root / "untied", num_hidden_layers=2, initializer_range=0.1, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(untied)).save_pretrained(untied)
    rows = (ROOT / "examples" / "hh_test.jsonl").read_text(encoding="utf-8").splitlines()
    short = sorted(rows, key=len)[:20:2]
    (root / "rows.jsonl").write_text("".join(f"{row}\n" for row in short), encoding="utf-8")
    return root


def flags(root, out, *more, base="base", steps=2):
    argv = ["--model", root / base, "--data", root / "rows.jsonl", "--out", out, "--steps", steps]
    argv += ["--batch-size", 4, "--lr", 1e-2, "--warmup-steps", 0, "--adam-eps", 1e-6, "--max-length", 128]
    argv += ["--device", "cpu", "--token-cache", root / "cache", "--activation-checkpointing", "none"]
    return [str(part) for part in [*argv, *more]]


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dpo(root):
    """A run in fp32 with a checkpoint: where others go on from."""
    argv = flags(root, root / "dpo", "--lora-rank", 4, "--dtype", "float32", "--save-every", 2, steps=4)
    assert exit_code(align.main, argv) is None
    return root / "dpo"


RUNS = {  # script, flags, what is trained but adapters, the base
    "kto": (align, ["--loss", "kto"], 0, "base"),
    "ppo": (align, ["--loss", "ppo", "--ppo-epochs", 2], 6, "base"),
    "grpo": (align, ["--loss", "grpo"], 0, "base"),
    "ra_dpo1": (align, ["--loss", "ra_dpo1", "--lora-targets", "q_proj,mlp.down_proj"], 0, "base"),
    "bradley_terry": (align, ["--loss", "bradley_terry"], 1, "base"),
    "sft": (sft, [], 0, "base"),
    "csft": (sft, ["--method", "csft"], 0, "conditioned"),
    "csft, new tokens": (sft, ["--method", "csft"], 1, "base"),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_trains_adapters_alone_and_exports_them_both_ways(root, name, tmp_path, monkeypatch):
    # red: the base saved too; the score not trained, or not in adapter/; the value head frozen; a second
    # model loaded or copied; masters of the base in fp32; export.py of a checkpoint that forgets the scaling;
    # the rows of new tokens left out of what is trained, or started from 0
    script, more, others, base = RUNS[name]
    models, shard = [], fsdp.shard
    monkeypatch.setattr(fsdp, "shard", lambda lm, *rest: models.append(lm) or shard(lm, *rest))
    monkeypatch.setattr(model, "copied", None)
    out = tmp_path / "run"
    argv = flags(root, out, "--dtype", "bfloat16", "--lora-rank", 4, "--save-every", 2, *more, base=base)
    assert exit_code(script.main, argv) is None
    assert len(models) == 1
    kinds = {p.requires_grad: set() for p in models[0].parameters()}
    for parameter in models[0].parameters():
        kinds[parameter.requires_grad].add(parameter.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    row = rows_of(out)[0]
    for key in ("rewards/chosen", "kl/chosen", "kl_estimate"):
        assert row.get(key, 0) == 0 or name == "bradley_terry"

    saved = dict(checkpoint.read(out / "step-2", checkpoint.outline(out / "step-2")))
    adapters = [key for key in saved if ".lora_" in key]
    assert len(adapters) == (14 if name != "ra_dpo1" else 4) * 2 and len(saved) == len(adapters) + others
    assert sum(value.abs().sum() for key, value in saved.items() if ".lora_B." in key) > 0
    monkeypatch.setattr(sys, "argv", ["export.py", f"{out}/step-2", f"{out}/offline"])
    export.main()
    shutil.move(out / "offline-adapter", tmp_path / "adapter")
    for here, there in (("final", out / "offline"), ("adapter", tmp_path / "adapter")):
        names = sorted(path.name for path in (out / here).iterdir())
        assert names == sorted(path.name for path in there.iterdir())
        assert [n for n in names if (out / here / n).read_bytes() != (there / n).read_bytes()] == []

    kind = AutoModelForSequenceClassification if name == "bradley_terry" else AutoModelForCausalLM
    more = {"num_labels": 1} if name == "bradley_terry" else {}
    whole = kind.from_pretrained(out / "final").eval()
    start = kind.from_pretrained(root / base, **more)
    start.config.pad_token_id = whole.config.pad_token_id
    ids, old = IDS, len(start.get_input_embeddings().weight)
    if name == "csft, new tokens":
        ids = torch.cat((IDS, torch.tensor([[old, 7, old + 1]])), 1)
        rows = whole.get_input_embeddings().weight
        grown = model.load(str(root / base), torch.float32, 8, vocabulary=old + 2).head.weight
        frozen = models[0].lm.get_input_embeddings().weight.to_local()
        assert torch.equal(rows[:old], grown[:old]) and torch.equal(frozen, grown.bfloat16())
        assert rows.shape == grown.shape and whole.get_output_embeddings().weight is rows
        assert 1e-3 < (rows[old:] - grown[old:]).abs().max() < 0.1
        start.resize_token_embeddings(old + 2, mean_resizing=False)
    one = peft.PeftModel.from_pretrained(start, out / "adapter").eval()
    with torch.no_grad():
        assert error(whole(ids).logits, one(ids).logits) < 1e-5
        with one.disable_adapter():
            assert error(whole(ids).logits, one(ids).logits) > 1e-4
    if name == "ppo":
        assert load_file(out / "final" / "value_head.safetensors").keys() == {
            key for key in saved if ".lora_" not in key
        }
    if name == "bradley_terry":  # its score goes on too, and is named as peft names it
        assert json.loads((out / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
        losses = []
        for start in (["--lora-from", out / "adapter"], ["--model", out / "final"]):
            argv = flags(root, tmp_path / "next", "--loss", name, "--dtype", "float32", *start, steps=1)
            assert exit_code(align.main, argv) is None
            losses += [rows_of(tmp_path / "next")[0]["loss"]]
            shutil.rmtree(tmp_path / "next")
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) and abs(losses[0] - 0.6931) > 1e-3
    AutoTokenizer.from_pretrained(out / "adapter")


def test_going_on_from_adapters_against_their_start_or_their_base(root, dpo, tmp_path):
    # red: the reference's copy made before the adapters are read, or following them; "base" with them on
    found = {}
    for name, more in {"start": [], "base": ["--reference", "base"], "model": ["--reference", root / "base"]}.items():
        argv = flags(root, tmp_path / name, "--lora-from", dpo / "adapter", "--dtype", "float32", *more)
        assert exit_code(align.main, argv) is None
        found[name] = rows_of(tmp_path / name)
    first, second = found["start"]
    assert first["kl/chosen"] == first["rewards/chosen"] == 0 and second["kl/chosen"] > 0
    assert found["base"][0]["kl/chosen"] > 0
    assert [row["loss"] for row in found["base"]] == [row["loss"] for row in found["model"]]
    # merged into a model of its own it is the same policy
    argv = flags(root, tmp_path / "whole", "--reference", root / "base", "--dtype", "float32", steps=1)
    argv[1] = str(dpo / "final")
    assert exit_code(align.main, argv) is None
    assert rows_of(tmp_path / "whole")[0]["loss"] == pytest.approx(found["base"][0]["loss"], abs=1e-5)


def test_dpo_on_adapters_of_sft_has_the_sft_model_for_its_reference(root, tmp_path):
    # red: the reference of --lora-from the base; the adapters of sft.py not those of final/
    assert exit_code(sft.main, flags(root, tmp_path / "sft", "--lora-rank", "3", "--dtype", "float32", steps=3)) is None
    starts = {
        "adapters": ["--lora-from", tmp_path / "sft" / "adapter"],
        "base": ["--lora-from", tmp_path / "sft" / "adapter", "--reference", "base"],
        "final": ["--model", tmp_path / "sft" / "final"],
    }
    found = {}
    for name, start in starts.items():
        argv = flags(root, tmp_path / name, "--dtype", "float32", *start, steps=1)
        assert exit_code(align.main, argv) is None
        found[name] = rows_of(tmp_path / name)[0]
    assert found["adapters"]["kl/chosen"] == found["adapters"]["rewards/chosen"] == found["final"]["kl/chosen"] == 0
    assert found["adapters"]["logps/chosen"] == pytest.approx(found["final"]["logps/chosen"], rel=1e-5)
    assert found["base"]["logps/chosen"] == found["adapters"]["logps/chosen"] and found["base"]["kl/chosen"] > 1e-3


def test_a_run_goes_on_against_its_own_reference_and_adapters_alone(root, dpo, tmp_path, capfd):
    # red: `record` with the reference as it was given; without lora_from_digest
    shutil.copytree(dpo / "adapter", tmp_path / "adapter")
    more = ["--lora-from", tmp_path / "adapter", "--save-every", 1]
    assert exit_code(align.main, flags(root, tmp_path / "run", *more)) is None
    shutil.rmtree(tmp_path / "run" / "final")
    more += ["--resume", "auto"]
    assert exit_code(align.main, flags(root, tmp_path / "run", *more, "--reference", "base", steps=3)) == 2
    assert "was made with --reference start, this run has --reference base" in capfd.readouterr().err
    assert exit_code(align.main, flags(root, tmp_path / "run", *more, "--reference", "start", steps=3)) is None
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.copy(tmp_path / "run" / "adapter" / "adapter_model.safetensors", tmp_path / "adapter")
    assert exit_code(align.main, flags(root, tmp_path / "run", *more, steps=4)) == 2
    assert "made from another --lora-from than there is now" in capfd.readouterr().err


def test_nothing_is_dropped_out_where_no_gradient_is_taken(root, dpo, tmp_path):
    # red: nn.Dropout in place of lora.Dropout
    losses = []
    for rate in (0.0, 0.5):
        out = tmp_path / str(rate)
        more = ["--eval-data", root / "rows.jsonl", "--reference", "base", "--lora-dropout", rate]
        assert exit_code(align.main, flags(root, out, "--lora-from", dpo / "adapter", *more, steps=1)) is None
        losses.append([row["loss"] for row in rows_of(out)])
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


REFUSED = {  # flags, and what the line must say
    "head": (["--lora-rank", "4", "--lora-targets", "lm_head"], "lm_head is no linear layer of the body"),
    "embedding": (["--lora-rank", "4", "--lora-targets", "embed_tokens"], "no linear layer of the body"),
    "norm": (["--lora-rank", "4", "--lora-targets", "q_proj,norm"], "norm: model.norm is no linear layer"),
    "typo": (["--lora-rank", "4", "--lora-targets", "q_prj"], "q_prj: no module of that name (there are down_proj"),
    "no peft": (["--lora-rank", "4"], "adapters need peft (pip install peft)"),
    "no rank": (["--lora-alpha", "4"], "--lora-alpha needs --lora-rank"),
    "reference": (["--reference", "start"], "--reference start needs --lora-rank"),
    "random": (["--lora-rank", "4", "--weights", "random"], "--lora-rank needs --weights pretrained"),
    "sync": (["--lora-rank", "4", "--sync-reference-every", "2"], "--sync-reference-every goes not with"),
    "rate": (["--lora-rank", "4", "--lora-dropout", "1"], "--lora-dropout: must be less than 1"),
    "rank twice": (["--lora-from", "{dpo}/adapter", "--lora-rank", "4"], "--lora-from takes no --lora-rank"),
    "no adapters": (["--lora-from", "{dpo}/final"], "final: no adapter_config.json"),
    "adapters as model": (["--model", "{dpo}/adapter"], "adapter holds adapters (--model its base"),
    "other base": (["--lora-from", "{dpo}/adapter", "--model", "{dpo}/final"], "another model than --model"),
    "dora": (["--lora-from", "{dpo}/dora"], "sets use_dora = true, which is not supported"),
    "shapes": (["--lora-from", "{dpo}/wide"], "28 tensors are missing or of another shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_adapters_is_one_line(root, dpo, name, tmp_path, capfd, monkeypatch):
    # red: each check left out
    for which, change in (("dora", {"use_dora": True}), ("wide", {"r": 8})):
        if name in (which, "shapes") and not (dpo / which).exists():
            shutil.copytree(dpo / "adapter", dpo / which)
            path = dpo / which / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if name == "no peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    given, said = REFUSED[name]
    argv = flags(root, tmp_path / "run", *[part.replace("{dpo}", str(dpo)) for part in given])
    capfd.readouterr()
    assert exit_code(align.main, argv) == 2
    stderr = capfd.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and said in stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_not_merged_into_another_base(root, dpo, tmp_path, monkeypatch, capfd):
    # red: rebuilt without its digest
    shutil.copytree(root / "base", tmp_path / "base")
    argv = flags(root, tmp_path / "run", "--lora-rank", 2, "--save-every", 1, steps=1)
    argv[1] = str(tmp_path / "base")
    assert exit_code(align.main, argv) is None
    shutil.copy(dpo / "final" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    monkeypatch.setattr(sys, "argv", ["export.py", f"{tmp_path}/run/step-1", f"{tmp_path}/out"])
    with pytest.raises(SystemExit):
        export.main()
    assert "trained on another model" in capfd.readouterr().err and not (tmp_path / "out").exists()


# ---- two processes


@pytest.fixture(scope="module")
def pair(root):
    """Runs on 2 processes, without dropout, and with it whole, or cut after two steps and resumed with blocks
    recomputed and checkpoints written behind it; on 1 process the first again, from the start and from its checkpoint.
    Rank 3 is 2 rows on one process and 1 on the other. The same of csft, without dropout, whose new tokens have a row on each of two
    processes, in the embedding and in the head."""
    saved = "began = time.perf_counter()\n\n"
    cut = [saved, f"{saved}        if step == 2:\n            return\n"]

    def job(name, rate, mutation=None, *more):
        more = ["--lora-rank", 3, "--lora-dropout", rate, "--dtype", "float32", "--save-every", 2, *more]
        argv = flags(root, root / name, "--tokens-per-microbatch", 150, *more, steps=4)
        return {"script": "align.py", "argv": argv, "mutation": mutation}

    behind = ["--save-async", "true"]
    again = ["--resume", "auto", "--activation-checkpointing", "full", *behind]
    jobs = [job("two", 0), job("whole", 0.3), job("cut", 0.3, cut, *behind), job("cut", 0.3, None, *again)]

    def conditional(name, mutation=None, *more):
        more = ["--method", "csft", "--lora-rank", 3, "--dtype", "float32", "--save-every", 2, *more]
        argv = flags(root, root / name, "--tokens-per-microbatch", 150, *more, base="untied", steps=4)
        return {"script": "sft.py", "argv": argv, "mutation": mutation}

    jobs += [conditional("csft"), conditional("csft-cut", cut), conditional("csft-cut", None, *again)]
    launch(root, jobs, 2, timeout=300)
    shutil.copytree(root / "two", root / "moved", ignore=shutil.ignore_patterns("final", "adapter", "step-4"))
    jobs = [job("one", 0), job("moved", 0, None, "--resume", "auto"), conditional("csft-one")]
    launch(root, jobs, 1, timeout=300)
    return root


def adapters_of(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("names, rows", [(("one", "two"), 0), (("csft-one", "csft"), 2)])
def test_two_processes_are_one(pair, names, rows):
    # red: export._whole with to_local; the seed of the adapters by rank; (1 / number) for (world_size / number);
    # added.start that takes the first rows on every rank
    one, two = (torch.load(pair / name / "gradients.pt") for name in names)
    assert len(one) == 4 and sum(".lora_" not in key for key in one[0]) == rows
    for first, second in zip(one, two):
        assert first.keys() == second.keys() and len(first) == 28 + rows
        floor = 1e-6 * max(gradient.norm() for gradient in first.values())
        for key, gradient in first.items():
            assert (second[key] - gradient).norm() < 1e-4 * gradient.norm() + floor, key
    one, two = (adapters_of(pair / name) for name in names)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert value.shape == two[key].shape and (value - two[key]).abs().max() < 1e-4, key
    one, two = (load_file(pair / name / "final" / "model.safetensors") for name in names)
    assert all((value - two[key]).abs().max() < 1e-4 for key, value in one.items())


def test_a_resumed_run_is_the_run_to_the_bit(pair):
    # red: the random state left out of the checkpoint; a run that does not wait for a save; a mask that the recomputed block draws anew; fresh rows
    # of new tokens written after the checkpoint is read
    for whole, cut in (("whole", "cut"), ("csft", "csft-cut")):
        for name in ("adapter/adapter_model.safetensors", "final/model.safetensors"):
            assert (pair / whole / name).read_bytes() == (pair / cut / name).read_bytes()
        for file in (f"step-4/__{rank}_0.distcp" for rank in (0, 1)):  # written at once, and behind the training
            assert (pair / whole / file).read_bytes() == (pair / cut / file).read_bytes()
        assert [row["loss"] for row in rows_of(pair / whole)] == [row["loss"] for row in rows_of(pair / cut)]
    assert rows_of(pair / "whole")[2]["loss"] != rows_of(pair / "two")[2]["loss"]


def test_a_checkpoint_of_two_goes_on_at_one(pair):
    # red: AdamW's state of the adapters left out
    whole, moved = adapters_of(pair / "two"), adapters_of(pair / "moved")
    assert all((value - moved[key]).abs().max() < 1e-4 for key, value in whole.items())
    size = sum(file.stat().st_size for file in (pair / "two" / "step-4").iterdir())
    assert size < 0.5 * (pair / "two" / "final" / "model.safetensors").stat().st_size


def test_rows_of_new_tokens_go_on_and_answer(pair, tmp_path, capfd):
    """In sft.py --method csft alone; sampling asks the merged model and the adapters the same."""
    # red: _inside that leaves the name; `fresh` always true; end_of_rows always 0 in loading.py
    final, adapter = pair / "csft" / "final", pair / "csft" / "adapter"
    losses = []
    for start in (["--lora-from", adapter], ["--model", final]):
        more = ["--method", "csft", "--dtype", "float32", *start]
        assert exit_code(sft.main, flags(pair, tmp_path / "next", *more, base="untied", steps=1)) is None
        losses += [rows_of(tmp_path / "next")[0]["loss"]]
        shutil.rmtree(tmp_path / "next")
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    argv = flags(pair, tmp_path / "next", "--lora-from", adapter, base="untied")
    for script in (sft, align):
        assert exit_code(script.main, argv) == 2
        assert "has rows of added tokens, which sft.py --method csft goes on with" in capfd.readouterr().err
    answers = []
    for folder in (final, adapter):
        out = tmp_path / f"{folder.name}.jsonl"
        more = ["--prompts", 3, "--max-new-tokens", 8, "--dtype", "float32", "--device", "cpu"]
        sample.main([str(part) for part in ["--model", folder, "--data", pair / "rows.jsonl", "--out", out, *more]])
        answers += [out.read_text(encoding="utf-8")]
    assert answers[0] == answers[1] and answers[0].count("\n") == 3
