"""fp32 products of bf16 operands on a CPU: the one setting of torch that head and attention both need.

A CPU has no kernel for bf16 operands and an fp32 result. An fp32 product at precision "medium" rounds its
operands to bf16, multiplies on the bf16 units and adds in fp32: exact for operands whose values are bf16, and
wrong by 1e-2 for any others, so the setting never outlives the products it is for.
"""

import contextlib
from typing import Iterator

import torch


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
