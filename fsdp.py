"""Everything that must know there is more than one process: start, shard, sum, clip, agree on a number.

FSDP2 (`fully_shard`) always, also with one process, so there is one code path: `python align.py` makes a
group of one. Each block is a unit, gathered for its forward and again for its backward; what is left
(embeddings, head, last norm) is the root's unit and stays gathered from forward to backward, for the head is
read between them.

Left out: tensor, pipeline and expert parallelism; CPU offload.
"""

import contextlib
import ctypes
import os
from datetime import timedelta
from typing import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor


def init(device: str, timeout_minutes: float = 10) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, or make a group of one. Returns (rank, world size, this rank's device).

    Raises ValueError if `device` is "cuda" and this rank has none of its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda: local rank {local}, but {torch.cuda.device_count()} CUDA devices are visible"
            )
        torch.cuda.set_device(local)
    else:
        _keep_freed_memory()
        # Compiled products kept for shapes seen before, half a megabyte each. No two batches share theirs,
        # but the layers of one do, three a segment: a cache too small for those slows every step down.
        os.environ.setdefault("LRU_CACHE_CAPACITY", "128")  # torch's; 1,024
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # oneDNN's; 1,024
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    return *ranks(), place


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next tensor: given back, every page of it is mapped and zeroed
    anew by the kernel, at a sixth of the speed of writing it. Blocks of over 32 MB, few and mostly of the
    vocabulary's size, are given back all the same: cut up by others they would not fit the next of their
    kind. Another C library is left alone."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: glibc takes no higher one
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none
        mallopt(-2, 2**26)  # M_TOP_PAD: grow by 64 MB


def ranks() -> tuple[int, int]:
    """(rank, world size)."""
    return dist.get_rank(), dist.get_world_size()


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    fp32_modules: Iterable[nn.Module] = (),
) -> None:
    """Split every parameter over all ranks, in place. Parameters keep their dtype, compute runs in `dtype`
    (in `fp32_modules` in fp32), gradients are summed in fp32. The root forward must take integers only:
    floats would be cast to `dtype`."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in fp32_modules:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def mean_over_ranks(tallies: list[dict[str, Tensor]]) -> dict[str, float]:
    """(sum, count) of each name in each micro-batch of this rank -> means over all micro-batches of all
    ranks, by one all_reduce of fixed size; a name that was never counted is left out. Every rank has at least
    one micro-batch and the same names in the same order."""
    sums = torch.stack([torch.stack(list(sums.values())) for sums in tallies]).sum(0)  # (metrics, 2)
    dist.all_reduce(sums)
    return {name: total / count for name, (total, count) in zip(tallies[0], sums.tolist()) if count}


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """The parameters of source into those of target that bear the same names, sharded alike, in target's
    dtype. Both are freed first: what they have gathered is the old."""
    for module in (*source.modules(), *target.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()
    given = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.to_local().copy_(given[name].to_local())


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their global 2-norm is at most max_norm; returns the norm before.

    Norms of rows first: torch's own norm of a tensor of 28 million fp32 numbers is wrong by 0.16 % on a CPU,
    and by another amount for another number of ranks.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    rows = [
        torch.linalg.vector_norm(grad, dim=-1) for grad in local
    ]  # each the tensor's shape less the last axis
    squares = torch.stack([torch.linalg.vector_norm(norms).double() for norms in rows]).square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt().item()
    if norm > max_norm:
        torch._foreach_mul_(local, max_norm / norm)
    return norm


def from_rank_zero(value: int, device: torch.device) -> int:
    """Rank 0's whole number, on every rank."""
    agreed = torch.tensor(value, device=device)
    dist.broadcast(agreed, 0)
    return int(agreed.item())


def largest(value: int, device: torch.device) -> int:
    """The largest of all ranks' whole numbers, on every rank."""
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found.item())


def ranks_where(holds: bool, device: torch.device) -> list[int]:
    """The ranks on which something holds, on every rank."""
    rank, world_size = ranks()
    flags = torch.zeros(world_size, dtype=torch.int32, device=device)
    flags[rank] = int(holds)
    dist.all_reduce(flags)
    return [index for index, flag in enumerate(flags.tolist()) if flag]


@torch.no_grad()
def not_finite(model: nn.Module) -> str:
    """The name of the first parameter that holds a number which is not finite, on any rank, or an empty
    string: one pass over this rank's shards and one all_reduce of a number."""
    named = list(model.named_parameters())
    local = [p.to_local() if isinstance(p, DTensor) else p for _, p in named]
    filled = [index for index, shard in enumerate(local) if shard.numel()]  # a rank may hold nothing of one
    peaks = torch.stack(torch._foreach_norm([local[index] for index in filled], float("inf"))).float()
    first = next((i for i, bad in zip(filled, (~peaks.isfinite()).tolist()) if bad), len(named))
    found = torch.tensor(first, device=local[0].device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return [*(name for name, _ in named), ""][int(found.item())]


def barrier() -> None:
    dist.barrier()


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
