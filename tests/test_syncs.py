"""What makes the host wait for a GPU, counted on a CPU over the real step of align.py and sft.py.

A mode sees every operation, those of the backward pass too. `red:` names a change that turns a test red.
"""

import argparse
import collections
import contextlib
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from test_store import kept
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import align
import attention
import batch
import encode
import fsdp
import lora
import model
import objective
import precision
import risk
import rundir
import sft
from frozen import Cached, freeze, of_reference

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 49_152  # of a size at which the head's tiles are of 21 positions
# Operations whose result's shape or value the host must know before it goes on.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "bincount", "masked_select", "unique_dim", "_unique2"}
# Calls that bring numbers to the host, or from Python to the device.
CALLS = {"tolist", "cpu", "numpy", "tensor", "as_tensor", "new_tensor", "item"}


class Dispatched(TorchDispatchMode):
    """Counts operations that wait, by name, and copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        tensors = [part for part in args if isinstance(part, torch.Tensor)]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in indices)
        sized = name != "repeat_interleave" or (kwargs or {}).get("output_size") is not None
        out = func(*args, **(kwargs or {}))
        made = [out] if name in ("_to_copy", "copy_") else []
        if name in WAITS or masks or not sized:
            self.found[name] += 1
        if any(one.device != other.device for one in made for other in tensors):
            self.found["copy between devices"] += 1
        return out


class Called(TorchFunctionMode):
    """Counts calls that do not show as an operation where all is on the CPU anyway."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        behind = (kwargs or {}).get("non_blocking")  # batch.copied, out of pinned memory
        moved = name == "to" and not behind and any(isinstance(part, (torch.device, str)) for part in args)
        if name in CALLS - {"item"} or moved:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted():
    """A Counter of all that waits within."""
    found = collections.Counter()
    with Dispatched() as below, Called() as above:
        yield found
    found.update(below.found + above.found)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model of a large vocabulary, and a process group of one."""
    path = tmp_path_factory.mktemp("syncs") / "model"
    shutil.copytree(ROOT / "examples" / "tiny", path)
    settings = json.loads((path / "config.json").read_text())
    settings |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    settings |= {"num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": VOCABULARY}
    (path / "config.json").write_text(json.dumps(settings))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield path
    dist.destroy_process_group()


@contextlib.contextmanager
def of_two():
    """This process as the first of two ranks, whose collectives end at once."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())


def examples():
    """Three prompts with two answers each, the last of them with one token of a prompt."""
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randint(5, 4000, (size,), generator=g).tolist() for size in (7, 9, 5, 1, 4, 11, 3, 8, 6)]
    prompts, chosen, rejected = drawn[:3], drawn[3:6], drawn[6:]
    made = []
    for prompt, *answers in zip(prompts, chosen, rejected):
        made.append(encode.Encoded(prompt, answers, [[True] * len(answer) for answer in answers], [1.0, 0.0]))
    return made


def step_of_align(base, loss, *flags, device="cpu", cached=False):
    """One optimiser step of align.py as its loop makes it -> (waits of the micro-batches, of the rest as one
    rank and as the first of two). With `cached`, what the reference says is read: log-probabilities, or states
    for a loss of distributions."""
    argv = ["--model", str(base), "--data", "none", "--out", "none", "--loss", loss, *flags]
    args = align.parse_args(argv)
    asked = objective.make_objective(args)
    policy = model.load(str(base), torch.float32, 64, "random")
    if asked.advantages is not None:
        model.add_value_head(policy, str(base), 0)
    reference = None
    if lora.wanted(args):
        lora.add(policy, args, lambda said: None)
        reference = lora.Reference(policy, lora.shared(args))
    elif asked.has_reference:  # not the policy's equal: for equal costs there is nothing to select
        reference = model.load(str(base), torch.float32, 64, "random", 1)
    policy.to(device)
    if isinstance(reference, model.LanguageModel):
        reference.to(device)
    work = [batch.Work([0, 1, 2], True)]
    given = kept(examples())
    place, how = torch.device(device), asked.pairs or "best-worst"
    packs = batch.packs(given, work, how, place)
    strangers = batch.packs(given.mismatched(np.array([1, 2, 0]), 64), work, how, place)
    delta = torch.zeros((), device=device)
    if cached:
        states = np.zeros((given.slots, 16), np.float32) if asked.measure else None
        reference = Cached(np.zeros(given.slots, np.float32), states, reference.head, None)
    with counted() as inside:
        with torch.no_grad():
            states = of_reference(reference, packs[0])
        out, stats = align.forward(asked, policy, reference, packs[0], states, *freeze_of(asked, packs, delta))
        (out.losses @ asked.weights(packs[0]) / 3).backward()
        tallies = [align.tally(asked, out, stats, packs[0])]
    assert all(part.grad is not None for part in policy.lm.parameters() if part.requires_grad)

    def rest():
        logged = freeze(asked, policy, reference, packs, strangers, delta)[1]
        heads = {"value_grad_norm": (policy.value_head, 1.0)}
        return end_of_step(policy, heads, lambda: objective.means(tallies, logged))

    return inside, both(rest) if device == "cpu" else []


def end_of_step(policy, heads, means):
    """What comes after the micro-batches, and before those of the next step."""
    norms = fsdp.clip_gradients({"grad_norm": (policy.lm, 1.0)} | heads)
    row = means() | norms
    rundir.leave_if_told(argparse.Namespace(), policy, None, {}, None, torch.device("cpu"), 1)
    return row


def both(rest):
    """Waits of the rest of a step, of one rank and of two."""
    with counted() as one:
        rest()
    with of_two(), counted() as two:
        rest()
    return [one, two]


def freeze_of(asked, packs, delta):
    """What phase A would fix, made up: its own waits are the step's."""
    found = objective.Frozen(delta=delta, kl_estimate=delta)
    if asked.advantages is not None:
        ones = torch.ones_like(packs[0].targets, dtype=torch.float32)
        found = found._replace(old_values=ones, advantages=ones, returns=ones)
    return [found]


LOSSES = {
    "dpo": ("dpo",),
    "kto": ("kto",),
    "cvar": ("ra_dpo1", "--risk", "cvar"),
    "erm": ("ra_dpo1", "--risk", "erm"),
    "published": ("ra_dpo1", "--risk", "published"),
    "ppo": ("ppo",),
    "grpo": ("grpo",),
    "lora": ("dpo", "--lora-rank", "2"),
}
CACHED = ("dpo", "cvar")


@pytest.mark.parametrize("name, cached", [(n, False) for n in LOSSES] + [(n, True) for n in CACHED])
def test_no_micro_batch_of_align_waits_and_a_step_does_twice(base, name, cached, monkeypatch):
    # red: batch.summed by new_tensor; compare by index; the layout made in hidden_states; a bincount in
    # losses.advantages; published's cuts by repeat_interleave; grpo's groups counted; cached values by .to;
    # fsdp.agreed by `largest` in every step; a read in freeze; a norm of each module read alone
    monkeypatch.setattr(risk, "_by_histogram", risk._by_bisection)  # as elsewhere than on a CPU
    inside, outside = step_of_align(base, *LOSSES[name], cached=cached)
    assert inside == {}
    assert outside == [{"tolist": 2}] * 2  # the gradients' norms; all that is logged, and the signals


@pytest.mark.parametrize("name", LOSSES)
def test_a_micro_batch_runs_where_there_are_no_values_to_wait_for(base, name):
    """On the meta device, where reading a number is an error: the paths of a device that is no CPU.
    red: risk._threshold by the histogram there; a tensor made of Python numbers"""
    inside, _ = step_of_align(base, *LOSSES[name], device="meta")
    assert inside == {}


def test_no_micro_batch_of_sft_waits_and_a_step_does_twice(base):
    # red: the layout made in sft.forward; fsdp.agreed by `largest` in every step
    policy = model.load(str(base), torch.float32, 64, "random")
    for device in ("cpu", "meta"):
        policy.to(device)
        pack = batch.pack(examples()).to(device)
        with counted() as found:
            out = sft.forward(policy, pack)
            (out.losses @ pack.weights[pack.response]).backward()
            tallies = [sft.tally(out, pack)]
        assert found == {}
        if device == "cpu":
            rest = functools.partial(end_of_step, policy, {}, lambda: fsdp.mean_over_ranks(tallies))
            assert both(rest) == [{"tolist": 2}] * 2


def test_the_means_bring_along_the_largest_word_of_all_ranks(monkeypatch):
    # red: the smallest word; only this rank's; `agreed` kept when it has been asked for; what is known summed up
    monkeypatch.setattr(fsdp, "HEALTH", fsdp.HEALTH | {"word": lambda: 10})

    def with_another(sums, *_):
        """What a rank with the same sums that says 15 makes of them."""
        own = sums.clone()
        own[-fsdp.WORDS :] = 0
        own[15 - fsdp.WORDS] = 1
        sums += own

    monkeypatch.setattr(dist, "all_reduce", with_another)
    monkeypatch.setattr(fsdp, "ranks", lambda: (0, 2))
    known = {"known": torch.tensor([1.0, 4.0]), "never": torch.tensor([1.0, 0.0])}
    found = fsdp.mean_over_ranks([{"loss": torch.tensor([3.0, 2.0])}] * 2, known)
    assert found == {"loss": 1.5, "known": 0.25}
    monkeypatch.setattr(fsdp, "largest", lambda word, device: 100 + word)
    assert [fsdp.agreed(torch.device("cpu")) for _ in range(2)] == [15, 110]


def test_what_the_count_sees():
    """Each thing that would wait, alone."""
    x = torch.arange(6.0)
    waits = {
        "_local_scalar_dense": lambda: x[0].item(),
        "nonzero": lambda: (x > 2).nonzero(),
        "index": lambda: x[x > 2],
        "index_put_": lambda: x.clone().index_put_((x > 9,), x[:0]),
        "masked_select": lambda: x.masked_select(x > 2),
        "bincount": lambda: torch.bincount(x.long()),
        "equal": lambda: torch.equal(x, x),
        "repeat_interleave": lambda: x.repeat_interleave(torch.tensor(2).expand(6)),
        "tensor": lambda: torch.tensor([1.0], device=x.device),
        "new_tensor": lambda: x.new_tensor(1.0),
        "tolist": lambda: x.tolist(),
        "to": lambda: x.to("meta"),
    }
    for name, wait in waits.items():
        with counted() as found:
            wait()
        assert found[name] == 1, name


def test_a_pack_goes_to_a_device_in_one_copy_and_arrives_as_it_was():
    # red: a copy a field; begins that overlap; the layout left behind
    pack = batch.pack(examples(), True, "all")
    with Dispatched() as copies:
        there = pack.to("meta")
    assert copies.found == {"copy between devices": 1}
    parts = [part for part in (*pack, *pack.layout) if isinstance(part, torch.Tensor)]
    moved = [part for part in (*there, *there.layout) if isinstance(part, torch.Tensor)]
    assert [(p.shape, p.dtype) for p in moved] == [(p.shape, p.dtype) for p in parts]
    assert {part.device.type for part in moved} == {"meta"}
    assert all(map(torch.equal, batch.copied(parts, "cpu"), parts))


def test_the_check_of_the_start_allows_nothing_here_and_a_share_on_cuda(monkeypatch):
    # red: the tolerance on a CPU too; one that is not a share of the log-probabilities
    logps = torch.tensor([[-40.0, -80.0]])
    stats = {"policy_logps": logps, "ref_logps": logps, "kl": torch.zeros(1, 2), "risk": None}
    objective.check_start(stats)
    near, far = (stats | {"ref_logps": logps + error} for error in (0.05, 0.1))
    for wrong in (near, far):
        with pytest.raises(RuntimeError, match="at step 0"):
            objective.check_start(wrong)
    monkeypatch.setitem(objective.START_TOLERANCE, "cpu", objective.START_TOLERANCE["cuda"])
    objective.check_start(near)
    with pytest.raises(RuntimeError, match="at step 0"):
        objective.check_start(far)


@pytest.mark.parametrize("script", [align, sft])
def test_a_model_that_no_kernel_computes_and_a_missing_device_are_said_at_once(base, script, monkeypatch, capsys):
    """Before anything is read or loaded. red: preflight.begin without either"""
    argv = ["--model", str(base), "--data", "none.jsonl", "--out", "none", "--weights", "random"]
    with pytest.raises(SystemExit):
        script.main(argv)
    said = capsys.readouterr()
    dtype = precision.usual("cpu")
    assert said.out == f"--device auto: no CUDA device is visible, so on the CPU, in {dtype}\n" * (not CUDA)
    monkeypatch.setattr(attention, "KERNEL_WIDTH", 4)
    with pytest.raises(SystemExit):
        script.main([*argv, "--device", "cuda"])
    said = capsys.readouterr()
    what = "heads of 8 numbers, and CUDA's kernels take 4; --dtype float32 takes any, slowly"
    assert said.err == f"error: {base}: {what}\n"


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_bf16_products_computes_in_fp32(monkeypatch, capfd, has):
    """Unless a flag says otherwise, which is warned of. red: `usual` without the question; "cuda" asked of it"""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    wanted = "bfloat16" if has else "float32"
    argv = ["--model", "m", "--data", "d", "--out", "o", "--device"]
    assert [script.parse_args([*argv, "cpu"]).dtype for script in (align, sft)] == [wanted] * 2
    assert [script.parse_args([*argv, "cuda"]).dtype for script in (align, sft)] == ["bfloat16"] * 2
    with pytest.raises(SystemExit):
        align.main([*argv, "cpu", "--dtype", "bfloat16"])
    assert ("warning: --dtype bfloat16" in capfd.readouterr().err) == (not has)
