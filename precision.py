"""Where a run computes and in which dtype, and fp32 products of bf16 operands, the one setting of torch that
head and attention both need.

A CPU has no kernel for bf16 operands and an fp32 result. An fp32 product at precision "medium" rounds its
operands to bf16, multiplies on the bf16 units and adds in fp32: exact for operands whose values are bf16, and
wrong by 1e-2 for any others, so the setting never outlives the products it is for.
"""

import contextlib
import os
from typing import Callable, Iterator

import torch

AMPERE = (8, 0)  # the first GPUs with bf16, and those that flash attention's kernels are for


def device(choice: str, dtype: str, say: Callable[[str], None]) -> str:
    """--device, "auto" by what is visible: "cuda" or "cpu". One rank says where "auto" is a CPU, and in which
    dtype that computes."""
    if choice != "auto":
        return choice
    if torch.cuda.is_available():
        return "cuda"
    if int(os.environ.get("RANK", 0)) == 0:
        say(f"--device auto: no CUDA device is visible, so on the CPU, in {dtype}")
    return "cpu"


def usual(device: str) -> str:
    """The --dtype of a run that names none: bfloat16 where `device` multiplies it. A CPU without AVX-512 does
    so in a plain loop (AVX2: 0.9 GFLOP/s, 61 in fp32), a GPU before Ampere not at all."""
    here = torch.cuda.is_available()
    if device == "cuda" or (device == "auto" and here):
        old = here and torch.cuda.get_device_capability() < AMPERE
        return "float32" if old else "bfloat16"
    cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if cpu else "float32"


@contextlib.contextmanager
def bf16_units(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products within run on the bf16 units if `dtype`, that of the operands' values, is bf16."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
