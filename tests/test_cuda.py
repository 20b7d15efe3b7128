"""The first thing to run where a GPU is: what no test on a CPU can reach. Skipped, with its reason,
elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attention
import risk
import vocab

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device here: nccl, varlen kernels and out_dtype matmuls have not been run",
)


needs_flash_attn = pytest.mark.skipif(
    attention._flash_attn() is None, reason="flash-attn is not installed: its kernel has not been run"
)


@pytest.mark.parametrize("kernel", ["torch", pytest.param("flash-attn", marks=needs_flash_attn)])
@pytest.mark.parametrize("sizes", [(64, 64), (100, 100), (96, 64)], ids=["64", "padded", "narrow values"])
@pytest.mark.parametrize("window", [None, 5])
def test_the_varlen_kernel_equals_the_segment_loop(monkeypatch, window, sizes, kernel):
    """The same Layout through the CUDA kernel and through the matrix products, values and gradients; in fp32
    CUDA has the matrix products alone."""
    if kernel == "torch":
        monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    layout = attention.layout([(9, [4, 7]), (3, [5]), (6, [2, 3, 4])])
    there = attention.Layout(*[part.cuda() if isinstance(part, torch.Tensor) else part for part in layout])
    total = sum(layout.query_sizes)
    g = torch.Generator().manual_seed(0)
    wide, narrow = sizes
    shapes = ((4, wide), (2, wide), (2, narrow))
    base = [torch.randn(1, heads, total, size, generator=g) for heads, size in shapes]
    ways = (("cpu", torch.float32, layout), ("cuda", torch.bfloat16, there), ("cuda", torch.float32, there))
    results = []
    for device, dtype, places in ways:
        states = [part.to(device, dtype, copy=True).requires_grad_() for part in base]
        module = torch.nn.Identity()
        out, _ = attention.attend(
            module, *states, None, layout=attention.Sealed(places), scaling=0.125, sliding_window=window
        )
        out.float().square().sum().backward()
        results.append([out.float().cpu(), *(part.grad.float().cpu() for part in states)])
    for exact, fast, plain in zip(*results):
        assert (exact - fast).norm() < 2e-2 * exact.norm()
        assert (exact - plain).norm() < 1e-5 * exact.norm()


def test_head_logits_are_fp32_outputs_and_gradients_add_up_in_fp32_on_cuda():
    """In three chunks: the weight's gradient is one accumulating product, and that of two rows of it is too."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(32, 256, generator=g).bfloat16().cuda().requires_grad_()
    weight = torch.randn(5000, 256, generator=g).bfloat16().cuda().requires_grad_()
    targets = torch.randint(0, 5000, (32,), generator=g).cuda()
    out = vocab.token_statistics(hidden, vocab.Head(weight), targets, chunk_size=12)
    wide = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    exact = (wide[0] @ wide[1].T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert out.logps.dtype == torch.float32
    assert (out.logps.double() - exact).abs().max() < 1e-4  # bf16 logits would be off by 0.1
    out.logps.sum().backward()
    exact.sum().backward()
    for found, wanted in zip((hidden, weight), wide):
        assert (found.grad.double() - wanted.grad).norm() < 1e-2 * wanted.grad.norm()
    frozen, rows = weight.detach().clone(), weight.detach()[7:9].clone().requires_grad_()
    frozen[7:9] = 0
    again = vocab.token_statistics(hidden, vocab.Head(frozen, added=rows, first=7), targets, chunk_size=12)
    assert torch.equal(again.logps, out.logps)
    again.logps.sum().backward()
    assert (rows.grad.double() - wide[1].grad[7:9]).norm() < 1e-2 * wide[1].grad[7:9].norm()


def test_cvar_on_a_gpu_is_that_of_a_cpu():
    g = torch.Generator().manual_seed(2)
    x, p = 0.1 * torch.randn(40, 50_000, generator=g), torch.randn(40, 50_000, generator=g).softmax(-1)
    here, there = risk.cvar(x, p), risk.cvar(x.cuda(), p.cuda())
    torch.testing.assert_close(there.value.cpu(), here.value, rtol=1e-5, atol=1e-6)


def train(folder, loss, *flags, processes=1):
    """The logged rows of align.py's run on CUDA into folder/run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"] if processes > 1 else []
    command = [*command, "--nproc-per-node", str(processes)] if command else [sys.executable]
    command += ["align.py", "--model", "examples/tiny", "--data", "examples/hh_test.jsonl", "--loss", loss]
    command += ["--lr", "1e-4", "--warmup-steps", "0", "--eval-every", "0", "--out", str(folder / "run")]
    command += [] if "--model" in flags else ["--weights", "random"]
    command += [*([] if "--device" in flags else ["--device", "cuda"]), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("given", [None, "max_split_size_mb:512"])
def test_segments_grow_unless_the_user_says_otherwise(given):
    """What the allocator itself says, after fsdp.init and an allocation."""
    code = "import fsdp, torch; fsdp.init('cuda'); torch.ones(9, device='cuda');"
    code += "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments']); fsdp.finish()"
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    env = {key: value for key, value in os.environ.items() if key not in names}
    env |= {} if given is None else {names[1]: given}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(given is None)], done.stderr


two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="fewer than 2 CUDA devices: nccl between two has not been run"
)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=two_devices)])
def test_training_starts_at_zero_and_learns(tmp_path, processes):
    rows = train(tmp_path, "ra_dpo1", "--steps", "10", processes=processes)
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-3)
    assert all(row["kl/chosen"] >= -1e-4 for row in rows)
    margins = [row["rewards/margins"] for row in rows]
    assert sum(margins[5:]) > sum(margins[:5])


@pytest.mark.parametrize("loss", ["dpo", "ra_dpo1", "ppo"])
def test_a_gpu_takes_the_steps_of_a_cpu(tmp_path, loss):
    flags = [loss, "--steps", "3", "--dtype", "float32"]
    there, here = (train(tmp_path / device, *flags, "--device", device) for device in ("cuda", "cpu"))
    for one, other in zip(there, here):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-3), (one["step"], name)


# One of each kind: pairs, with a mean of rewards, single responses, a critic, tokens, a reward model, no
# reference, every risk.
KINDS = [["dpo"], ["bco"], ["kto"], ["ppo"], ["grpo"], ["bradley_terry"], ["simpo"], ["tdpo2"]]
KINDS += [["ra_dpo1", "--risk", name] for name in ("cvar", "erm", "published")]
KINDS += [["dpo", "--compile", "true"], ["ra_dpo1", "--compile", "true", "--lora-rank", "4"]]
KINDS += [["dpo", "--dtype", "float32"], ["dpo", "--activation-checkpointing", "none"]]
KINDS += [["dpo", "--offload", "reference"], ["dpo", "--offload", "all"]]


@pytest.mark.parametrize("flags", KINDS, ids=" ".join)
def test_every_kind_of_loss_takes_steps(tmp_path, flags):
    if "--lora-rank" in flags:  # adapters need a base
        train(tmp_path / "base", "dpo", "--steps", "1")
        flags = [*flags, "--model", str(tmp_path / "base" / "run" / "final")]
    rows = train(tmp_path, *flags, "--steps", "3")
    assert len(rows) == 3 and all(isinstance(row["loss"], float) and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "4"], ["--offload", "all"]], ids=["full", "lora", "offloaded"])
def test_a_resumed_run_goes_on(tmp_path, flags):
    """AdamW's state is on the device again; steps 2 and 3 as without the stop, to the order of sums."""
    if flags:  # adapters need a base
        train(tmp_path / "base", "dpo", "--steps", "1")
        flags = [*flags, "--model", str(tmp_path / "base" / "run" / "final")]
    whole = train(tmp_path / "whole", "dpo", "--steps", "4", *flags)
    stopped = [*flags, "--save-every", "2"]
    train(tmp_path / "cut", "dpo", "--steps", "4", *stopped)
    shutil.rmtree(tmp_path / "cut" / "run" / "final")  # or there is nothing to do
    rows = train(tmp_path / "cut", "dpo", "--steps", "4", *stopped, "--resume", "step-2")
    assert list((tmp_path / "cut" / "run").glob(".aside-step-4*")), "it did not go on from step 2"
    assert [row["step"] for row in rows][-2:] == [2, 3]
    for one, other in zip(whole[-2:], rows[-2:]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
