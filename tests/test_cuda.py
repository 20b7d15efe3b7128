"""The first thing to run where a GPU is: what no test on a CPU can reach. Skipped, with its reason,
elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attention
import vocab

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device here: nccl, varlen kernels and out_dtype matmuls have not been run",
)


@pytest.mark.parametrize("window", [None, 5])
def test_the_varlen_kernel_equals_the_segment_loop(window):
    """The same Layout through the CUDA kernel and through SDPA on the CPU, values and gradients."""
    layout = attention.layout([(9, [4, 7]), (3, [5]), (6, [2, 3, 4])])
    total = sum(layout.query_sizes)
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(1, heads, total, 64, generator=g) for heads in (4, 2, 2)]
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        states = [part.to(device, dtype).requires_grad_() for part in base]
        module = torch.nn.Identity()
        out, _ = attention.attend(
            module, *states, None, layout=layout.to(device), scaling=0.125, sliding_window=window
        )
        out.float().square().sum().backward()
        results.append([out.float().cpu(), *(part.grad.float().cpu() for part in states)])
    for exact, fast in zip(*results):
        assert (exact - fast).norm() < 2e-2 * exact.norm()


def test_head_logits_are_fp32_outputs_on_cuda():
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(32, 256, generator=g).bfloat16().cuda().requires_grad_()
    weight = torch.randn(5000, 256, generator=g).bfloat16().cuda().requires_grad_()
    targets = torch.randint(0, 5000, (32,), generator=g).cuda()
    out = vocab.token_statistics(hidden, vocab.Head(weight), targets)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert out.logps.dtype == torch.float32
    assert (out.logps.double() - exact).abs().max() < 1e-4  # bf16 logits would be off by 0.1
    out.logps.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "processes", range(1, 1 + max(1, torch.cuda.device_count() if torch.cuda.is_available() else 1))
)
def test_training_starts_at_zero_and_learns(tmp_path, processes):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    command += [
        "align.py",
        "--model",
        "examples/tiny",
        "--weights",
        "random",
        "--data",
        "examples/hh_test.jsonl",
    ]
    command += [
        "--loss",
        "ra_dpo1",
        "--steps",
        "10",
        "--lr",
        "1e-3",
        "--warmup-steps",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*command, "--device", "cuda"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert all(row["kl/chosen"] >= 0 for row in rows)
