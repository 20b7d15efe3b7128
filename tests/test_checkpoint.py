"""checkpoint.py in one process: step-N is whole or absent, loads bit for bit and runs no code; exports load.

The models have one layer of width 32. `red:` names one-line changes of checkpoint.py that turn a test red.
"""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import zlib

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import align
import batch
import checkpoint
import encode
import export
import fsdp
import metadata
import model
import staging
import vocab

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
ARCHITECTURES = {
    "llama": SIZES | {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "gpt_neox": SIZES | {"model_type": "gpt_neox", "tie_word_embeddings": False},
    "gpt2": SIZES | {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "gemma2": SIZES | {"model_type": "gemma2", "head_dim": 16, "num_key_value_heads": 1},  # has no sdpa
    "phi": SIZES | {"model_type": "phi", "tie_word_embeddings": False},  # its head has a bias
}
ARGS = {"model": "m", "beta": 0.1, "lr": 1e-3}
PACK = batch.pack([encode.Encoded([5, 6, 7], [[8, 9], [10, 11]], [[True] * 2] * 2, [1.0, 0.0])])


@pytest.fixture(scope="module", autouse=True)
def process_group():
    fsdp.init("cpu")
    yield
    fsdp.finish()


def source(path, name="llama", **changes):
    """A model directory without weights, with the tokenizer of examples/tiny."""
    shutil.copytree(ROOT / "examples" / "tiny", path)
    (path / "config.json").write_text(json.dumps(ARCHITECTURES[name] | changes))
    return path


def build(path, seed=0, weights="random"):
    policy = model.load(str(path), torch.float32, 64, weights, seed)
    fsdp.shard(policy, policy.blocks, torch.float32, torch.device("cpu"))
    return policy, torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)


def train(policy, optimizer):
    hidden = align.hidden_states(policy, PACK)
    (-vocab.token_statistics(hidden, policy.head, PACK.targets).logps.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(policy, optimizer):
    """Every parameter and all of AdamW's state, whole."""
    found = dict(policy.named_parameters())
    for name, parameter in policy.named_parameters():
        found |= {f"{name} {key}": value for key, value in optimizer.state[parameter].items()}
    return {k: getattr(v, "full_tensor", v.clone)().detach().clone() for k, v in found.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def resume(out, choice, lm, **changes):
    return checkpoint.resume(out, choice, *lm, ARGS | changes, ("lr", "model"), torch.device("cpu"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model directory, a run with its step-1 and step-2, and its tensors at each step."""
    root = tmp_path_factory.mktemp("saved")
    lm = build(source(root / "model"))
    states = {}
    for step in (1, 2):
        train(*lm)
        checkpoint.save(root / "run", step, *lm, ARGS | {"model": str(root / "model")}, 2)
        states[step] = tensors(*lm)
    return root, states


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved[0] / "run", tmp_path / "run")


@pytest.fixture
def fresh(saved):
    """Policy and optimizer with other weights."""
    return build(saved[0] / "model", 1)


def tree(path):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [path, *sorted(path.rglob("*"))]}


def names(path):
    return sorted(p.name for p in path.iterdir())


def forge(step, name, content):
    """Replace a file and its checksum, as somebody would who means harm."""
    (step / name).write_bytes(content)
    record = json.loads((step / "trainer.json").read_text())
    record["files"][name] = [len(content), zlib.crc32(content)]
    record["checksum"] = checkpoint._record_checksum(record)
    (step / "trainer.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_round_trip_is_bit_exact(name, tmp_path):
    # red: optim left out of _state; set_rng_state left out; moments saved as bfloat16.
    lm = build(source(tmp_path / "model", name))
    train(*lm)
    checkpoint.save(tmp_path, 1, *lm, ARGS, 2)
    at_one, draw = tensors(*lm), torch.rand(4)
    train(*lm)
    other = build(tmp_path / "model", 1)
    assert resume(tmp_path / "none", "auto", other) == resume(tmp_path, None, other) == 0
    assert not same(at_one, tensors(*other))
    assert resume(tmp_path, "auto", other) == 1
    assert same(tensors(*other), at_one) and torch.equal(torch.rand(4), draw)
    train(*other)
    assert same(tensors(*other), tensors(*lm))
    assert (other[0].lm.get_input_embeddings().weight is other[0].lm.lm_head.weight) == (name == "llama")


def test_a_save_behind_the_training_is_of_the_state_then(fresh, tmp_path, monkeypatch):
    """The bytes of plain saves, though steps are taken before anything is written; the second in the memory
    of the first. Until it is written there is nothing."""
    # red: copied without copy_, or a held tensor that is the parameter's; start without a thread
    go, real = threading.Event(), checkpoint.dcp.save
    held = []
    for step in (1, 2):
        train(*fresh)
        checkpoint.save(tmp_path / "plain", step, *fresh, ARGS, 2)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.dcp, "save", lambda *args, **options: go.wait(60) and real(*args, **options))
            assert checkpoint.save(tmp_path / "behind", step, *fresh, ARGS, 2, behind=True) == ""
            train(*fresh)
            torch.rand(4)
            assert len(checkpoint.complete(tmp_path / "behind")) == step - 1
            go.set()
            assert staging.wait() == (step, "") and staging.wait() == (None, "")
        go.clear()
        held.append({name: kept.data_ptr() for name, kept in staging.HELD.items()})
        ours, theirs = (metadata.read(tmp_path / name / f"step-{step}") for name in ("behind", "plain"))
        assert ours.storage_data == theirs.storage_data
        files = [tmp_path / name / f"step-{step}" / "__0_0.distcp" for name in ("behind", "plain")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert held[0] == held[1]
    assert resume(tmp_path / "behind", "auto", fresh) == 2


def test_a_checkpoint_of_a_cpu_is_one_for_a_gpu_too(run, fresh, monkeypatch):
    """It has none of a GPU's random numbers, which are asked for there. red: every rng_ of this rank asked for;
    none of them where one is missing"""
    made, state = torch.get_rng_state(), checkpoint._state
    monkeypatch.setattr(checkpoint, "_state", lambda *parts: state(*parts) | {"rng_0_cuda": torch.zeros(16)})
    torch.manual_seed(7)
    assert resume(run, "auto", fresh) == 2
    assert not torch.equal(torch.get_rng_state(), torch.manual_seed(7).get_state())
    torch.set_rng_state(made)


def test_the_step_of_adamw_is_made_where_its_parameter_is():
    """Fused AdamW on a GPU refuses one on the CPU. red: torch.tensor(0.0)"""
    policy = torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    checkpoint._state(policy, optimizer)
    assert {state["step"].device.type for state in optimizer.state.values()} == {"meta"}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("moment", ["dcp.save", "os.replace"])
def test_kill_during_a_save(moment, behind, run, fresh, monkeypatch):
    """Also in the thread of one behind the training: nothing of it comes after. red: dcp.save into target; beside not
    removed first; glob("*step-*") in complete(); what a thread has raised lost."""
    def die(*args, checkpoint_id=None, **options):
        (run / ".tmp-step-3" / "__9_0.distcp").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp if moment == "dcp.save" else checkpoint.os, moment.split(".")[1], die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(run, 3, *fresh, ARGS, 2, behind=behind)
            staging.wait()
    assert names(run) == [".tmp-step-3", "step-1", "step-2"]
    assert resume(run, "auto", fresh) == 2
    checkpoint.save(run, 3, *fresh, ARGS, 2, behind=behind)
    staging.wait()
    assert names(run) == ["step-2", "step-3"]
    assert names(run / "step-3") == [".metadata", "__0_0.distcp", "trainer.json"]


def test_a_checkpoint_of_before_a_flag_goes_on_where_that_is_not_used(run, fresh):
    # red: no `new` in _compare; `not now[key]` left out
    assert resume(run, "auto", fresh, compile=False) == 2
    with pytest.raises(ValueError, match="made with --compile None, this run has --compile True"):
        resume(run, "auto", fresh, compile=True)


def test_foreign_names_are_ignored(run, fresh, capfd):
    # red: re.match for re.fullmatch; either exists() gone.
    for name in ("step-x", "step-10.bak", "old-step-11", ".tmp-step-12"):
        shutil.copytree(run / "step-2", run / name)
    for name, missing in (("step-7", "trainer.json"), ("step-8", ".metadata")):
        shutil.copytree(run / "step-2", run / name, ignore=shutil.ignore_patterns(missing))
    assert [path.name for path in checkpoint.complete(run)] == ["step-2", "step-1"]
    assert resume(run, "auto", fresh) == 2 and capfd.readouterr().err == ""


def test_save_prunes_and_never_overwrites(run, fresh):
    # red: [:keep_last]; steps sorted as strings; target.exists() not asked.
    before = tree(run)
    checkpoint.save(run, 2, *fresh, ARGS, 2)
    assert tree(run) == before
    for step in (9, 10, 11):
        checkpoint.save(run, step, *fresh, ARGS, 3)
    assert names(run) == ["step-10", "step-11", "step-9"]


def test_other_flags_are_refused(run, fresh):
    # red: `key in free`; `args` compared with itself.
    with pytest.raises(ValueError, match=r"step-2 was made with --beta 0.1, this run has --beta 0.2$"):
        resume(run, "auto", fresh, beta=0.2)
    assert resume(run, "auto", fresh, lr=1.0) == 2


DAMAGE = {
    "byte": ("__0_0.distcp", lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]),
    "shard cut": ("__0_0.distcp", lambda b: b[:-1]),
    "shard deleted": ("__0_0.distcp", None),
    "metadata cut": (".metadata", lambda b: b[:100]),
    "record": ("trainer.json", lambda b: b"\xff\x00garbage"),
    "record list": ("trainer.json", lambda b: b"[]"),
    "record without args": ("trainer.json", lambda b: b'{"format": 1, "files": {}}'),
}


def damage(step, case):
    name, change = DAMAGE[case]
    content = (step / name).read_bytes()
    (step / name).unlink()
    if change:
        (step / name).write_bytes(change(content))


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_passed_over(case, run, fresh, saved, capfd):
    # red: _damage without the checksum; without the size and the checksum; range of candidates [:1].
    damage(run / "step-2", case)
    assert resume(run, "auto", fresh) == 1
    assert same(tensors(*fresh), saved[1][1])
    assert re.fullmatch(r"warning: \S+/step-2: .+\n", capfd.readouterr().err)
    with pytest.raises(ValueError, match="step-2") as refusal:
        resume(run, "step-2", fresh)
    assert "\n" not in str(refusal.value)


def test_damaged_step_is_written_again(run, fresh):
    damage(run / "step-2", "byte")
    assert resume(run, "auto", fresh) == 1
    checkpoint.save(run, 2, *fresh, ARGS, 2)
    assert resume(run, "step-2", fresh) == 2


def test_newer_format_is_refused(run, fresh, capfd):
    record = run / "step-2" / "trainer.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"step-2: .*format 2, this program reads <= 1"):
        resume(run, "step-2", fresh)
    assert capfd.readouterr().err == ""  # the caller prints the ValueError: that is the one line


class Payload:
    def __reduce__(self):
        return os.system, ("touch marker",)


def test_members_of_enumerations_and_nothing_else_are_got_by_name(tmp_path):
    """Python before 3.11.4 pickles a member as getattr(enumeration, name). red: getattr itself handed out"""

    class Asked:
        def __init__(self, *of):
            self.of = of

        def __reduce__(self):
            return getattr, self.of

    enumeration = _MEM_FORMAT_ENCODING
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Asked(enumeration, "TORCH_PRESERVE_FORMAT")))
    with pytest.raises(AttributeError, match="state_dict_metadata"):  # it was read, and is no record
        metadata.SafeReader(str(tmp_path)).read_metadata()
    for of in ((enumeration, "__class__"), (torch.Size, "__subclasses__")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Asked(*of)))
        with pytest.raises(ValueError, match="refusing to load it"):
            metadata.SafeReader(str(tmp_path)).read_metadata()


@pytest.mark.parametrize("content", [Payload(), None, {}], ids=["code", "nothing", "dict"])
def test_metadata_runs_no_code(content, run, fresh, monkeypatch, caplog):
    # red: SafeReader replaced by FileSystemReader; find_class without its raise.
    monkeypatch.chdir(run)
    forge(run / "step-2", ".metadata", b"" if content is None else pickle.dumps(content))
    with pytest.raises(ValueError, match=r"step-2.*posix\.system" if content else "step-2") as refusal:
        resume(run, "step-2", fresh)
    assert "\n" not in str(refusal.value) and "marker" not in names(run)
    assert [r for r in caplog.records if "NullHandler" not in r.name] == []  # no traceback of torch's


def test_only_tensors_are_read(run, fresh, monkeypatch):
    # red: SafeReader replaced by FileSystemReader.
    monkeypatch.chdir(run)
    state = checkpoint._state
    monkeypatch.setattr(checkpoint, "_state", lambda *lm: state(*lm) | {"extra": Payload()})
    assert "refusing" in checkpoint.save(run, 3, *fresh, ARGS, 2) and names(run) == ["step-1", "step-2"]
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "read", lambda path: FileSystemReader(str(path)).read_metadata())
        assert checkpoint.save(run, 3, *fresh, ARGS, 2) == ""
    with pytest.raises(ValueError, match="step-3.*refus"):
        resume(run, "step-3", fresh)
    assert "marker" not in names(run)


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 2}], ids=["shape", "names"])
def test_other_model_is_refused(changes, run, tmp_path):
    other = build(source(tmp_path / "model", **changes))
    with pytest.raises(ValueError, match="step-2") as refusal:
        resume(run, "step-2", other)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_loads(name, dtype, tmp_path):
    # red: `kept` without its filter; no .to(dtype); named_buffers for named_parameters.
    path = source(tmp_path / "model", name)
    lm = build(path)
    train(*lm)
    tokenizer = AutoTokenizer.from_pretrained(path)
    export.export(lm[0], tokenizer, tmp_path / "final", dtype)
    whole = {key[3:]: value.to(dtype) for key, value in tensors(*lm).items() if " " not in key}
    assert ("lm_head.bias" in whole) == (name == "phi") and whole.get("lm_head.bias", torch.ones(1)).any()
    written = load_file(tmp_path / "final" / "model.safetensors")
    assert len(written) == len(whole) and {v.dtype for v in written.values()} == {dtype}  # a tied head once
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report.values()) and loaded.config.dtype == dtype
    assert same(dict(loaded.named_parameters()), whole)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32).eval()
    for key, parameter in plain.named_parameters():  # not plain.to(): rotary frequencies stay fp32
        parameter.data = whole[key]
    assert torch.equal(loaded(PACK.ids).logits, plain(PACK.ids).logits)
    assert "generation_config.json" in names(tmp_path / "final")
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again.chat_template == tokenizer.chat_template and again.get_vocab() == tokenizer.get_vocab()


def test_export_leaves_the_model_as_it_was(saved, fresh, tmp_path):
    before = align.hidden_states(fresh[0], PACK)
    export.export(fresh[0], AutoTokenizer.from_pretrained(saved[0] / "model"), tmp_path / "final")
    assert torch.equal(align.hidden_states(fresh[0], PACK), before)


def test_an_export_without_a_parameter_is_refused(saved, tmp_path):
    # red: _matched without unfilled, without unplaced
    tokenizer = AutoTokenizer.from_pretrained(saved[0] / "model")
    policy = model.load(str(saved[0] / "model"), torch.float32, 64, "random", 0)
    attention = policy.lm.model.layers[0].self_attn
    adapted = torch.nn.ModuleDict({"base_layer": attention.q_proj, "lora_A": torch.nn.Linear(32, 2, bias=False)})
    attention.q_proj = adapted
    fsdp.shard(policy, [], torch.float32, torch.device("cpu"))
    said = "1 parameters without their tensor (first: model.layers.0.self_attn.q_proj.weight), 2 tensors without"
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        export.export(policy, tokenizer, tmp_path / "final")
    assert "\n" not in str(refusal.value) and names(tmp_path) == []
    attention.q_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="1 parameters without their tensor"):
        export.export(policy, tokenizer, tmp_path / "final")
    attention.q_proj, attention.more = adapted["base_layer"], adapted["lora_A"]
    with pytest.raises(ValueError, match=r": 1 tensors without a parameter \(first: .*more.weight\)"):
        export.export(policy, tokenizer, tmp_path / "final")


def test_half_written_export_leaves_the_old_one(saved, fresh, tmp_path):
    # red: beside = out.
    tokenizer = AutoTokenizer.from_pretrained(saved[0] / "model")
    export.export(fresh[0], tokenizer, tmp_path / "final")
    before = tree(tmp_path / "final")
    with pytest.raises(AttributeError):
        export.export(fresh[0], None, tmp_path / "final")  # weights are written before the tokenizer
    assert tree(tmp_path / "final") == before
    train(*fresh)
    export.export(fresh[0], tokenizer, tmp_path / "final")
    assert names(tmp_path) == ["final"] and tree(tmp_path / "final") != before


def test_command_line_exports_the_same(tmp_path):
    path = source(tmp_path / "model")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    (path / "generation_config.json").write_text('{"do_sample": true, "top_k": 7, "eos_token_id": 2}')
    lm = build(path, weights="pretrained")
    checkpoint.save(tmp_path, 1, *lm, ARGS | {"model": str(path)}, 2)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    export.export(lm[0], AutoTokenizer.from_pretrained(path), inside, torch.bfloat16)
    command = [ROOT / "export.py", tmp_path / "step-1", outside, "--dtype", "bfloat16"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, f"wrote {outside}\n")
    assert names(inside) == names(outside)
    assert [n for n in names(inside) if (inside / n).read_bytes() != (outside / n).read_bytes()] == []


REFUSED = {
    "": "nothing",
    "run/step-9 out": "absent",
    "run/step-3 out": "no record",
    "run/step-1 out": "damaged",
    "run/step-4 out": "its model directory is gone",
    "run/step-2 run/step-2/trainer.json/out": "below a file",
    "run/step-2 run": "would delete the run",
}


@pytest.mark.parametrize("argv", REFUSED, ids=REFUSED.get)
def test_command_line_refuses_in_one_line(argv, run, monkeypatch, capfd):
    damage(run / "step-1", "byte")
    (run / "step-3").mkdir()
    record = shutil.copytree(run / "step-2", run / "step-4") / "trainer.json"
    record.write_text(record.read_text().replace("/model", "/none"))
    before = tree(run.parent)
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(sys, "argv", ["export.py", *argv.split()])
    with pytest.raises(SystemExit) as end:
        export.main()
    assert end.value.code == 2
    assert re.fullmatch(r"error: .+\n", capfd.readouterr().err)
    assert tree(run.parent) == before
