"""What ranks hold and send: how often, how they are laid out, and that nothing that is trained depends on it.

A comment `red:` names a change that turns a test red.
"""

import json
import math
import os
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_memory import CONFIGS
from test_train import arguments, base, launch, rows  # noqa: F401
from torch.distributed.checkpoint import default_planner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

import align
import batch
import checkpoint
import fsdp
import memory

UNITS = 3  # of sharding: two blocks, and the rest
MICROBATCHES = 3  # of a step of 5 pairs, each its own
ADAPTERS = ["--lora-rank", "4", "--lora-targets", "all-linear"]
FEW = ["--tokens-per-microbatch", "50", "--steps", "2"]
RUNS = {  # name -> (processes, kind, flags)
    "groups": (4, "ra_dpo1", ["--replicate", "2", "--save-every", "1"]),
    "every": (2, "dpo", []),
    "last": (2, "dpo", ["--micro-batch-sync", "last"]),
    "sft-every": (2, "sft", []),
    "sft-last": (2, "sft", ["--micro-batch-sync", "last"]),
    "lora-every": (2, "dpo", ADAPTERS),
    "lora-last": (2, "dpo", [*ADAPTERS, "--micro-batch-sync", "last"]),
    "offloaded": (2, "dpo", ["--offload", "reference"]),
    "all": (2, "dpo", ["--offload", "all"]),
    "sft-all": (2, "sft", ["--offload", "all", "--save-every", "1", "--sample-prompts", "1"]),
    "lora-all": (2, "dpo", [*ADAPTERS, "--offload", "all"]),
    "on": (2, "ra_dpo1", ["--resume", "auto"]),  # from the first step of "groups"
    "one": (1, "ra_dpo1", []),
    "sft-alone": (1, "sft", []),
    "lora-alone": (1, "dpo", ADAPTERS),
    "compiled": (1, "ra_dpo1", ["--compile", "true"]),
    "sft-compiled": (1, "sft", ["--compile", "true"]),
    "lora-compiled": (1, "dpo", [*ADAPTERS, "--compile", "true"]),
}


@pytest.fixture(scope="module")
def runs(base):  # noqa: F811
    """All training of this file, in one launch per number of processes."""
    for processes in (4, 2, 1):
        jobs = []
        for name, (ranks, kind, more) in RUNS.items():
            few = FEW[2:] if name == "on" else FEW  # it goes on with what the checkpoint was written with
            argv = arguments(kind, base, base / name, *few, *more)
            if "--lora-rank" in more:  # the reference is the policy without its adapters
                del argv[argv.index("--reference") : argv.index("--reference") + 2]
            if ranks == processes:
                jobs.append({"script": "sft.py" if kind == "sft" else "align.py", "argv": argv})
        launch(base, jobs, processes)
        if processes == 4:
            (base / "on").mkdir()
            shutil.copytree(base / "groups" / "step-1", base / "on" / "step-1")
    return base


def same(runs, one, other, tolerance=1e-6):
    """Are losses, norms and the gradients of each tensor the same, relative to their norm?"""
    for mine, theirs in zip(rows(runs / one), rows(runs / other), strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance), key
    first, second = (torch.load(runs / name / "gradients.pt") for name in (one, other))
    assert len(first) == 2 and first[0].keys() == second[0].keys()
    for step, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        close = tolerance * 10**step  # AdamW divides by small second moments
        for name, gradient in mine.items():
            assert (gradient - theirs[name]).norm() <= close * gradient.norm().clamp(min=1e-5), name


def calls(runs, name, collective):
    """How many of a collective each step has made before its clipping."""
    return [step.get(collective, 0) for step in json.loads((runs / name / "collectives.json").read_text())]


@pytest.mark.parametrize("kind", ["", "sft-", "lora-"])
def test_gradients_summed_once_a_step_are_those_summed_every_micro_batch(runs, kind):
    # red: set_requires_gradient_sync(True) always (the counts); with False for the last (the gradients)
    same(runs, f"{kind}every", f"{kind}last")
    often, once = (calls(runs, kind + name, "reduce_scatter_single") for name in ("every", "last"))
    trained = UNITS - (kind == "lora-")  # nothing of the rest
    assert once == [trained] * 2 and often == [trained * MICROBATCHES] * 2


def test_the_plan_counts_gradients_that_are_whole_until_the_last_micro_batch():
    # red: earlier = gradients whatever the sync
    found = memory.body(CONFIGS["llama"])
    run = memory.Run(64, ranks=4, microbatches=2, cuda=True)
    every, last = (memory.need(found, run._replace(sync=sync)) for sync in ("every", "last"))
    whole = memory.numbers(found.weights)
    assert last["gradients"] >= 4 * whole > every["gradients"]
    alone = run._replace(microbatches=1)
    assert memory.need(found, alone) == memory.need(found, alone._replace(sync="last"))


@pytest.mark.parametrize("kind", ["", "sft-", "lora-"])
def test_compiled_blocks_of_the_real_scripts_train_what_others_do(runs, kind):
    """Every pack has lengths of its own: what the first step compiles serves the second. A policy's block runs
    twice a micro-batch, for its backward runs its forward again, and a reference's once.
    red: compile_blocks of the policy alone (the count), or not called; _compiled() that is not dynamic"""
    alone, compiled = f"{kind}alone" if kind else "one", f"{kind}compiled"
    assert rows(runs / compiled)[1]["loss"] == rows(runs / alone)[1]["loss"]
    for mine, theirs in zip(*(torch.load(runs / name / "gradients.pt") for name in (compiled, alone)), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    made, run = (calls(runs, compiled, f"graphs {how}") for how in ("made", "run"))
    assert made[1] == 0 and (made[0] > 0 or kind == "sft-")  # of the same class: what was compiled before it
    once = calls(runs, "sft-compiled", "graphs run")[0] / 2
    assert run == [(2 if kind == "sft-" else 3) * once] * 2 and once > 0
    assert calls(runs, alone, "graphs run") == [0, 0]


def test_groups_that_hold_the_whole_model_each_train_what_one_process_does(runs):
    """2 groups of 2 ranks; what they have saved goes on in 2 ranks that are one group."""
    # red: the norm summed over all ranks; piece() of the rank in the world; replicate not handed to the reference
    same(runs, "one", "groups", 1e-5)
    assert calls(runs, "groups", "reduce_scatter_single") == [2 * UNITS] * 2  # 4 ranks: 2 micro-batches
    (row,) = rows(runs / "on")
    last = rows(runs / "one")[1]
    for key in ("step", "loss", "grad_norm"):
        assert row[key] == pytest.approx(last[key], rel=1e-5), key
    made, whole = (load_file(runs / name / "final" / "model.safetensors") for name in ("on", "one"))
    assert all((made[name] - want).abs().max() < 5e-5 for name, want in whole.items())  # of steps of 1e-3


def test_groups_that_do_not_divide_the_ranks_are_one_line(base, capsys):  # noqa: F811
    # red: groups() without the raise
    with pytest.raises(SystemExit) as stop:
        align.main(arguments("dpo", base, base / "odd", "--replicate", "2"))
    assert (stop.value.code, capsys.readouterr().err) == (2, "error: --replicate 2 does not divide 1 ranks\n")
    assert not (base / "odd").exists()


def test_blocks_are_gathered_once_a_pass_and_the_last_once_a_micro_batch(runs):
    # red: the last block resharded after its forward (+3); of the reference too not resharded (-2); the
    # reference's rest left gathered (18 in the second step)
    policy = MICROBATCHES * (UNITS + 1)  # two blocks and the rest forward, one block backward
    reference = MICROBATCHES * 2 + 1
    for name in ("every", "last", "offloaded"):
        assert calls(runs, name, "all_gather_single") == [policy + reference] * 2, name


def test_nothing_is_gathered_while_the_model_is_written(base, tmp_path, monkeypatch):  # noqa: F811
    # red: the last evaluation's reference, or policy, not resharded
    made, found = [], []
    outline_reference = align.outline_reference

    def outline(args, policy, *more):
        made.extend((policy, outline_reference(args, policy, *more)))
        return made[1]

    def export(*inputs):
        found.extend(isinstance(parameter, DTensor) for lm in made for parameter in lm.parameters())

    monkeypatch.setattr(align, "outline_reference", outline)
    monkeypatch.setattr(align.export, "export", export)
    align.main(arguments("dpo", base, tmp_path / "run", "--steps", "1", "--eval-data", str(base / "test.jsonl")))
    assert len(made) == 2 and found and all(found)


@pytest.mark.parametrize("trains", [True, False])
def test_a_block_is_gathered_before_the_one_before_it_runs_and_the_last_stays(monkeypatch, trains):
    """Three blocks, in the order of one of two ranks; a frozen model's last block is resharded like the others.
    red: set_modules_to_forward_prefetch left out; the last block resharded after its forward, of a frozen model
    not"""
    seen = []

    def reported(*given, **options):
        seen.append("gather")
        return call(*given, **options)

    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    call = getattr(dist, name)
    monkeypatch.setattr(dist, name, reported)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        whole = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3)))
        whole.append(torch.nn.Linear(4, 4)).requires_grad_(trains)  # the rest
        fsdp.shard(whole, blocks := whole[:3], torch.float32, torch.device("cpu"))
        for place, block in enumerate(blocks):
            block[0].register_forward_hook(lambda *_, place=place: seen.append(f"forward {place}"))
            block[0].register_full_backward_hook(lambda *_, place=place: seen.append(f"backward {place}"))
        found = whole(torch.ones(2, 4)).sum()
        # before them those of the rest and of the first two blocks
        assert seen == ["gather"] * 3 + ["forward 0", "gather", "forward 1", "forward 2"]
        seen.clear()
        if trains:
            found.backward()
            assert seen == ["gather", "backward 2", "gather", "backward 1", "backward 0"]  # torch looks ahead
        else:
            whole[2].unshard()
            assert seen == ["gather"]
    finally:
        dist.destroy_process_group()


def test_a_reference_on_the_cpu_is_the_same_reference(runs):
    # red: fill() of it left out; the offloaded shards of a fresh model
    same(runs, "every", "offloaded")
    assert calls(runs, "offloaded", "CPUOffloadPolicy") == [1, 0]


@pytest.mark.parametrize("kind", ["", "sft-", "lora-"])
def test_a_run_that_rests_on_the_cpu_is_the_same_run(runs, kind):
    """On a CPU to the last bit, with what it saves, shows and exports.
    red: place() of the policy, or of the reference, not told in align.py; not in sft.py"""
    mine, theirs = (runs / f"{kind}{name}" for name in ("all", "every"))
    for one, other in zip(rows(mine), rows(theirs), strict=True):
        assert [one[key] for key in ("loss", "grad_norm")] == [other[key] for key in ("loss", "grad_norm")]
    made, whole = (load_file(path / "final" / "model.safetensors") for path in (mine, theirs))
    assert made.keys() == whole.keys() and all(torch.equal(made[name], value) for name, value in whole.items())
    assert calls(runs, mine.name, "CPUOffloadPolicy") == [1 + (kind == ""), 0]  # of LoRA the reference is the policy
    assert calls(runs, theirs.name, "CPUOffloadPolicy") == [0, 0]


def test_shards_on_the_cpu_meet_on_the_gpu(monkeypatch):
    """What is told of a GPU's model, each unit of it; and of shards that lie elsewhere than their mesh, that norms,
    flags and whole tensors are made where the mesh is, which here has no memory.
    red: meeting() of value.device; clip_gradients, not_finite, whole or the checkpoint's without it; no pinning"""
    told, met = [], []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: told.append(options["offload_policy"]))
    monkeypatch.setattr(fsdp, "_mesh", lambda kind, *_: kind)
    monkeypatch.setattr(torch.nn.Identity, "set_modules_to_forward_prefetch", lambda *_: None, raising=False)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        blocks = [torch.nn.Identity() for _ in range(2)]
        fsdp.shard(torch.nn.Sequential(*blocks), blocks, torch.bfloat16, torch.device("cuda"), offload=True)
        assert [type(policy).__name__ for policy in told] == ["CPUOffloadPolicy"] * 3
        assert all(policy.pin_memory for policy in told)
        mesh = DeviceMesh("meta", [0, 1], _init_backend=False)
        there = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False)
        shard = DTensor(torch.ones(2, 4), there._spec, requires_grad=False)
        monkeypatch.setattr(mesh, "get_group", lambda *_: None, raising=False)
        assert shard.device.type == "cpu" and fsdp.meeting(shard).type == "meta"
        monkeypatch.setattr(DTensor, "to", lambda value, where: met.append(torch.empty(0, device=where)) or value)
        monkeypatch.setattr(DTensor, "full_tensor", lambda value: value)
        monkeypatch.setattr(dist, "all_reduce", lambda value, **options: met.append(value))
        fsdp.whole(shard)
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(shard)
        model.weight.grad = shard
        for work in (lambda: fsdp.clip_gradients({"grad_norm": (model, 1.0)}), lambda: fsdp.not_finite(model)):
            with pytest.raises((RuntimeError, NotImplementedError)):  # of no memory, after the collective
                work()
        monkeypatch.setattr(fsdp, "from_rank_zero", lambda _, where: met.append(torch.empty(0, device=where)) or 1)
        assert checkpoint.save("nowhere", 0, model, None, {}, 1) == ""  # it is there, as rank 0 says
    finally:
        dist.destroy_process_group()
    assert [value.device.type for value in met] == ["meta"] * 4


@pytest.mark.parametrize("more", [["--loss", "simpo"], ADAPTERS], ids=["none", "adapters"])
def test_no_reference_to_offload_is_one_line(base, more):  # noqa: F811
    # red: the check of either left out; of "all" too
    argv = ["--model", str(base / "policy"), "--data", "none", "--out", str(base / "nothing"), *more]
    with pytest.raises(SystemExit) as stop:
        align.parse_args([*argv, "--offload", "reference"])
    assert stop.value.code == 2
    assert align.parse_args([*argv, "--offload", "all"]).offload == "all"


def test_the_plan_counts_groups_and_what_is_offloaded(base, capsys):  # noqa: F811
    # red: ranks not divided by --replicate; least not multiplied; the reference counted on a GPU
    argv = ["--model", str(base / "policy"), "--data", "none", "--out", str(base / "nothing"), "--plan"]
    argv += ["--gpus", "8", "--memory", "80"]

    def planned(*more):
        align.main([*argv, *more])
        said = capsys.readouterr().out
        part = {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+)", said.split("in all")[1])}
        return said, part

    whole, groups, away = planned(), planned("--replicate", "4"), planned("--offload", "reference")
    assert "80 GB: 1 at least" in whole[0] and "80 GB: 4 at least" in groups[0]
    run = memory.Run(64, ranks=2, reference="live", cuda=True)
    found = memory.body(CONFIGS["llama"])
    live, gone = memory.need(found, run), memory.need(found, run._replace(offload="reference"))
    assert live["reference"] > 0 == gone["reference"] and live["gathered"] == gone["gathered"]
    rests = memory.need(found, run._replace(offload="all"))
    assert 0 == rests["weights"] == rests["moments"] == rests["reference"] and rests["gathered"] == live["gathered"]
    assert sum(rests.values()) < sum(gone.values())
    ends = [memory._moments(found, run._replace(offload=how), found)[-1]["gradients"] for how in ("all", "")]
    assert 0 < ends[0] < ends[1]  # whole and on their way, and shards of all
    here = run._replace(cuda=False)
    assert memory.need(found, here) == memory.need(found, here._replace(offload="all"))
    assert "reference" not in away[1]
    with pytest.raises(SystemExit):
        planned("--replicate", "3")
    assert capsys.readouterr().err == "error: --replicate 3 does not divide 8 ranks\n"


def test_a_run_goes_on_with_the_micro_batches_it_was_begun_with(runs):
    """red: fit._before that finds nothing; --resume not looked at"""
    made = [json.loads((runs / name / "args.json").read_text()) for name in ("groups", "on", "one")]
    assert [args["tokens_per_microbatch"] for args in made] == [50, 50, 50]
    assert [args["activation_checkpointing"] for args in made] == ["full"] * 3


def test_the_allocator_of_a_gpu_is_the_users_or_grows_its_segments(monkeypatch):
    """red: PYTORCH_CUDA_ALLOC_CONF overridden, which torch reads first; set after the device is used"""
    grows = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert fsdp.allocator_settings({"PATH": "/"}) == grows
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        assert fsdp.allocator_settings({name: "max_split_size_mb:128"}) == {}
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fsdp.os, "environ", os.environ.copy())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = []

    def set_device(index):
        seen.append(dict(fsdp.os.environ))
        raise ValueError("a stand-in")

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(ValueError, match="a stand-in"):
        fsdp.init("cuda")
    assert grows.items() <= seen[0].items()


def test_64_ranks_share_an_8b_model_its_batches_and_its_checkpoint():
    """The planners of the checkpoint, as each of 64 ranks would drive them: shapes alone, and no process but
    this one. Its vocabulary does not divide by 64.
    red: split_axis that takes the last axis; a rank's works cut to those that are counted"""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336}
    found = memory.body(LlamaConfig(**sizes, num_hidden_layers=32, vocab_size=128_258))
    assert memory.numbers(found.weights) == pytest.approx(8.03e9, rel=1e-3)
    assert memory.balance(found, 64) < 1.1
    shapes = sorted({weight.shape for weight in found.weights})
    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    try:
        with torch.device("meta"):
            layer = torch.nn.ParameterList([torch.empty(shape) for shape in shapes])
        fsdp.shard(layer, [], torch.bfloat16, torch.device("cpu"))
        state, plans = dict(layer.named_parameters()), []
        for rank in range(64):
            for parameter in state.values():
                parameter.device_mesh._coordinate_on_dim = (rank,)  # where a rank finds itself
            plans.append(default_planner.create_default_local_save_plan(state, rank == 0))
    finally:
        dist.destroy_process_group()
    _, written = default_planner.create_default_global_save_plan(plans)
    for index, shape in enumerate(shapes):
        chunks = [chunk for chunk in written.state_dict_metadata[str(index)].chunks if math.prod(chunk.sizes)]
        (axis,) = [axis for axis, size in enumerate(shape) if chunks[0].sizes[axis] != size]
        ends = sorted((chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]) for chunk in chunks)
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])] and ends[-1][1] == shape[axis]
        assert sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(shape)  # all else is whole

    lengths = torch.randint(50, 2048, (3000,), generator=torch.Generator().manual_seed(0)).numpy()
    seen = []
    for shares in batch.plan(lengths, 500, 64, 8192, 0):
        assert len(shares) == 64 and len({len(works) for works in shares}) == 1
        seen += [group for works in shares for work in works if work.counted for group in work.groups]
    assert sorted(seen) == list(range(3000))
