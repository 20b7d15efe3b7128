"""Everything that must know there is more than one process: start, shard, sum, clip, agree on a number,
notice that another one is gone.

FSDP2 (`fully_shard`) always, also with one process, so there is one code path: `python align.py` makes a
group of one. Each block is a unit, gathered for its forward and again for its backward, but for the last one,
whose backward comes first; what is left (embeddings, head, last norm) is the root's unit and stays gathered
from forward to backward, for the head is read between them.

With `replicate` N (HSDP) ranks fall into N groups of neighbours. Each group holds the whole model in shards,
as all ranks do else: blocks are gathered within it, and gradients, reduced to shards there, are summed over
the groups.

Left out: tensor, pipeline and expert parallelism.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

LARGEST = 2**25  # bytes of a block that stays in the heap; glibc takes no more
NO_THREAD_CACHE = "glibc.malloc.tcache_count=0"
# What the thread of `_watch` says of this rank and knows of the others.
HEALTH: dict[str, Any] = {
    "calls": 0, "heard": {}, "pause": 1.0, "store": None, "still": None, "report": lambda reason: None,
    "timeout": None,
    "word": lambda: 0,  # a whole number below WORDS that this rank tells the others, and the largest of all
    "agreed": None,  # that `mean_over_ranks` has brought along
}  # fmt: skip
WORDS = 32  # more than Linux has signals that are no real-time ones
OVER = threading.Event()  # the thread shall end


def init(device: str, timeout_minutes: float = 60, replicate: int = 1) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, or make a group of one. Returns (rank, world size, this rank's device).

    A rank that another one has waited for so long ends the run, and so does one without a sign of life: see
    `_watch`. Raises ValueError if `device` is "cuda" and this rank has none of its own, a rank does not come,
    or `replicate` does not divide the world size.
    """
    groups(int(os.environ.get("WORLD_SIZE", 1)), replicate)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda: local rank {local}, but {torch.cuda.device_count()} CUDA devices are visible"
            )
        os.environ |= allocator_settings(os.environ)  # read once, at the first use of the device
        torch.cuda.set_device(local)
    else:
        _keep_freed_memory()
        # Compiled products kept for shapes seen before, half a megabyte each. No two batches share theirs,
        # but the layers of one do, three a segment: a cache too small for those slows every step down.
        os.environ.setdefault("LRU_CACHE_CAPACITY", "128")  # torch's; 1,024
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # oneDNN's; 1,024
    timeout = HEALTH["timeout"] = timedelta(minutes=timeout_minutes)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _join(backend, timeout)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    return *ranks(), place


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment before CUDA is first used: segments that grow, for no two packs have the
    same shapes and what is freed of one does not fit the next. Nothing where the user has set the allocator,
    by whichever name torch reads."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    return {} if any(name in environment for name in names) else {names[0]: "expandable_segments:True"}


def _join(backend: str, timeout: timedelta) -> None:
    """Meet the other ranks, one by one, and from then on keep an eye on them."""
    limit, missing = time.monotonic() + timeout.total_seconds(), "a rank"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store.set(f"alive-{rank}", "0 0")
        for other in range(world_size):
            missing = f"rank {other}"
            store.wait([f"alive-{other}"], timedelta(seconds=max(0.1, limit - time.monotonic())))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistError as error:
        raise ValueError(f"{missing} has not come within --timeout-minutes") from error
    # a connection of its own: on the first one a call may wait
    HEALTH["store"] = store.clone()
    OVER.clear()
    sys.excepthook = _explain
    watch = threading.Thread(target=_watch, args=(HEALTH["store"], timeout.total_seconds()), daemon=True)
    watch.start()
    HEALTH["still"] = atexit.register(functools.partial(_still, watch))


def _watch(store: dist.Store, timeout: float) -> None:
    """Tell the others, once a second, that this rank lives and how far it is. One that has said nothing for
    four fifths of the timeout is stopped or dead, and ends this process before a collective gives it up."""
    rank, world_size = ranks()
    others = [other for other in range(world_size) if other != rank]
    HEALTH["heard"] = {other: ("", time.monotonic()) for other in others}
    HEALTH["pause"] = min(1.0, timeout / 20)
    while not OVER.is_set():
        with contextlib.suppress(RuntimeError):  # whoever holds the store may be gone: then all are silent
            store.set(f"alive-{rank}", f"{time.monotonic()} {HEALTH['calls']}")
            for other, word in zip(others, store.multi_get([f"alive-{other}" for other in others])):
                if word != HEALTH["heard"][other][0] or word == b"done":
                    HEALTH["heard"][other] = word, time.monotonic()
        if silent := _silent(0.8 * timeout):
            _end(silent, f"no sign of life for {0.8 * timeout:.3g} s")
        OVER.wait(HEALTH["pause"])


def _still(watch: threading.Thread) -> None:
    """End the thread before the interpreter ends, which it would abort from within a call of the store's."""
    OVER.set()
    watch.join(5)


def _silent(seconds: float) -> list[int]:
    """The ranks that have said nothing for so long."""
    return [other for other, (_, when) in HEALTH["heard"].items() if time.monotonic() - when > seconds]


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line which rank a collective has failed for; the traceback of anything else."""
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return sys.__excepthook__(kind, error, trace)
    time.sleep(5 * HEALTH["pause"])  # who has just died is silent from now on
    calls = {other: int(word.split()[-1]) for other, (word, _) in HEALTH["heard"].items() if b" " in word}
    behind = [other for other, count in calls.items() if count < HEALTH["calls"]]
    cause = str(error).strip().splitlines()[0].split("] ", 1)[-1].split(". ")[0]
    _end(_silent(4 * HEALTH["pause"]) or behind, cause)


def _end(lost: list[int], why: str) -> None:
    """End this process for others that are lost, which the first of those that are left says."""
    left = [rank for rank in range(ranks()[1]) if rank not in lost]
    reason = f"rank {', '.join(map(str, lost)) or 'unknown'} is lost: stopped, dead or waiting ({why})"
    if ranks()[0] == left[0]:
        HEALTH["report"](reason)
        print(f"error: {reason}\n", end="", file=sys.stderr, flush=True)
    else:
        time.sleep(1)
    os._exit(1)


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next tensor: given back, every page of it is mapped and zeroed
    anew by the kernel, at a sixth of the speed of writing it. Blocks of over 32 MB, few and mostly of the
    vocabulary's size, are given back all the same: cut up by others they would not fit the next of their
    kind. Another C library is left alone. Without glibc's caches of small blocks, which only a process's
    environment takes away (GLIBC_TUNABLES=NO_THREAD_CACHE, run.sh), the heap is smaller: they hold the odd
    ends of aligned tensors, and a freed tensor without its ends is no place for another."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, LARGEST)  # M_MMAP_THRESHOLD
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none
        mallopt(-2, 2**26)  # M_TOP_PAD: grow by 64 MB


def ranks() -> tuple[int, int]:
    """(rank, world size)."""
    return dist.get_rank(), dist.get_world_size()


def groups(world_size: int, replicate: int) -> tuple[int, int]:
    """(groups of ranks that hold the whole model each, ranks of a group). Raises ValueError if these are no
    whole numbers."""
    if world_size % replicate:
        raise ValueError(f"--replicate {replicate} does not divide {world_size} ranks")
    return replicate, world_size // replicate


@functools.cache  # a mesh of two axes makes process groups; a new WORLD needs new ones
def _mesh(kind: str, shape: tuple[int, int], world: dist.ProcessGroup) -> DeviceMesh:
    several = shape[0] > 1
    names = ("replicate", "shard")
    return init_device_mesh(kind, shape if several else shape[1:], mesh_dim_names=names if several else None)


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    fp32_modules: Iterable[nn.Module] = (),
    replicate: int = 1,
    offload: bool = False,
) -> None:
    """Split every parameter over all ranks, or over those of each of `replicate` groups, in place. Parameters
    keep their dtype, compute runs in `dtype` (in `fp32_modules` in fp32), gradients are summed in fp32. With
    `offload` the shards lie on the CPU, as their gradients and the optimiser's states do then, and what is
    gathered on `device`. The root forward must take integers only: floats would be cast to `dtype`."""
    shape = groups(dist.get_world_size(), replicate)
    split = functools.partial(
        fully_shard,
        mesh=_mesh(device.type, shape, dist.group.WORLD),
        shard_placement_fn=lambda parameter: Shard(split_axis(parameter.shape, shape[1])),
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    )
    for module in fp32_modules:
        split(module, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    units = list(blocks)
    for block in units:
        split(block, mp_policy=policy, reshard_after_forward=not (trains and block is units[-1]))
    for block, following in zip(units, units[1:]):
        block.set_modules_to_forward_prefetch([following])
    split(model, mp_policy=policy, reshard_after_forward=False)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def reshard(*models: Any) -> None:
    """Free what they have gathered; nothing of what is no module. After a forward that no backward follows,
    for the next one must gather what the optimiser writes until then."""
    for model in models:
        for module in model.modules() if isinstance(model, nn.Module) else ():
            if isinstance(module, FSDPModule):
                module.reshard()


def split_axis(shape: Sequence[int], world_size: int) -> int:
    """The axis along which a parameter is split: the first, the cheapest to gather, unless that leaves some
    ranks with over 1.05 times their share (8 experts on 64 ranks: 8 times) and another axis divides evenly,
    which FSDP2 demands of any but the first."""

    def excess(axis: int) -> float:
        return max(1.05, -(-shape[axis] // world_size) * world_size / shape[axis])

    return min((axis for axis, size in enumerate(shape) if not (axis and size % world_size)), key=excess)


def sums_over_ranks(tallies: list[dict[str, Tensor]], told: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """(sum, count) of each name in each micro-batch of this rank -> (2,) of all micro-batches of all ranks,
    left on the device, by one all_reduce of fixed size; and of what is `told` beside, (k, 2), under whole
    numbers. Every rank has at least one micro-batch and the same names in the same order."""
    sums = torch.stack([torch.stack(list(sums.values())) for sums in tallies]).sum(0)  # (metrics, 2)
    sums = torch.cat([sums, *told])  # (metrics + k, 2)
    dist.all_reduce(sums)
    return dict(zip([*tallies[0], *range(len(sums))], sums))


def mean_over_ranks(
    tallies: list[dict[str, Tensor]], known: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Means of `sums_over_ranks`, and of (sum, count) that are `known` of all ranks, in one read; a name that
    was never counted is left out. The ranks' words go along: `agreed`."""
    HEALTH["calls"] += 1  # once a step or more: who is behind shows when a collective fails
    told = next(iter(tallies[0].values())).new_zeros(WORDS, 2)
    told[HEALTH["word"]()].fill_(1)
    sums = sums_over_ranks(tallies, [told]) | (known or {})
    found = dict(zip(sums, torch.stack(list(sums.values())).tolist()))
    HEALTH["agreed"] = max(word for word in range(WORDS) if found.pop(word)[0])
    return {name: total / count for name, (total, count) in found.items() if count}


def agreed(device: torch.device) -> int:
    """The largest of all ranks' words: as it was at the last `mean_over_ranks`, or now if it has been asked
    for since, or there is one rank."""
    found, HEALTH["agreed"] = HEALTH["agreed"], None
    return largest(HEALTH["word"](), device) if found is None or ranks()[1] == 1 else found


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """The parameters of source into those of target that bear the same names, sharded alike, in target's
    dtype. Both are freed first: what they have gathered is the old."""
    reshard(source, target)
    given = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.to_local().copy_(given[name].to_local())


def clip_gradients(limits: Mapping[str, tuple[nn.Module | None, float]]) -> dict[str, float]:
    """Scale the gradients of each module so that their global 2-norm is at most its limit; returns the norms
    before, by name, in one read. Shards are those of a group; other groups have the same ones.

    Norms of rows first: torch's own norm of a tensor of 28 million fp32 numbers is wrong by 0.16 % on a CPU,
    and by another amount for another number of ranks.
    """
    local, squares, group = {}, [], None
    for name, (module, _) in limits.items():
        if module is None:
            continue
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if isinstance(grads[0], DTensor):
            group = grads[0].device_mesh.get_group(-1)
        local[name] = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        rows = [torch.linalg.vector_norm(grad, dim=-1) for grad in local[name]]  # each the shape less an axis
        norms = torch.stack([torch.linalg.vector_norm(row).double() for row in rows])  # (parameters,)
        total, where = norms.square().sum(), meeting(grads[0])
        squares.append(total if total.device.type == where.type else total.to(where))
    together = torch.stack(squares)  # (modules,)
    dist.all_reduce(together, group=group)
    found = dict(zip(local, together.sqrt().tolist()))
    for name, norm in found.items():
        if norm > limits[name][1]:
            torch._foreach_mul_(local[name], limits[name][1] / norm)
    return found


def from_rank_zero(value: int, device: torch.device) -> int:
    """Rank 0's whole number, on every rank."""
    agreed = torch.tensor(value, device=device)
    dist.broadcast(agreed, 0)
    return int(agreed.item())


def largest(value: int, device: torch.device) -> int:
    """The largest of all ranks' whole numbers, on every rank."""
    HEALTH["calls"] += 1
    if ranks()[1] == 1:
        return value
    found = torch.full((), value, device=device)  # written there, not copied
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found.item())


def ranks_where(holds: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """The ranks on which something holds, on every rank."""
    rank, world_size = ranks()
    flags = torch.zeros(world_size, dtype=torch.int32, device=device)
    flags[rank] = int(holds)
    dist.all_reduce(flags, group=group)
    return [index for index, flag in enumerate(flags.tolist()) if flag]


def gathered(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """What each rank says, on every rank."""
    said = [""] * ranks()[1]
    dist.all_gather_object(said, text, group)
    return said


def at_rank_zero(value: Any) -> list[Any]:
    """What each rank has, on rank 0; nothing on the others."""
    rank, world_size = ranks()
    found = [None] * world_size if rank == 0 else None
    dist.gather_object(value, found)
    return found or []


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """The names of the parameters that hold a number which is not finite, on any rank: one pass over this
    rank's shards and one all_reduce of a flag for each."""
    named = list(model.named_parameters())
    local = [p.to_local() if isinstance(p, DTensor) else p for _, p in named]
    filled = [index for index, shard in enumerate(local) if shard.numel()]  # a rank may hold nothing of one
    peaks = torch.stack(torch._foreach_norm([local[index] for index in filled], float("inf"))).float()
    flags = torch.zeros(len(named), dtype=torch.int32)
    flags[filled] = (~peaks.isfinite()).int().cpu()
    if sharded := [parameter for _, parameter in named if isinstance(parameter, DTensor)]:
        flags = flags.to(meeting(sharded[0]))
        dist.all_reduce(flags)
    return [name for (name, _), flag in zip(named, flags.tolist()) if flag]


def meeting(value: Tensor) -> torch.device:
    """Where the ranks that hold a tensor's shards meet, be the shards on the CPU; of another its device."""
    return torch.device(value.device_mesh.device_type) if isinstance(value, DTensor) else value.device


def whole(value: Tensor) -> Tensor:
    """A tensor from its shards, all ranks together, where they meet; one that is not sharded is as it was."""
    return value.to(meeting(value)).full_tensor() if isinstance(value, DTensor) else value


def piece(parameter: DTensor, rank: int) -> tuple[slice, ...]:
    """What `shard` gives to a rank of a parameter: equal parts of an axis, the last less."""
    shape, many = parameter.shape, parameter.device_mesh.size(-1)  # neighbours
    axis, place = split_axis(shape, many), rank % many
    each = -(-shape[axis] // many)
    own = slice(min(place * each, shape[axis]), min((place + 1) * each, shape[axis]))
    return tuple(own if index == axis else slice(0, size) for index, size in enumerate(shape))


def local_piece(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds of a parameter, and which part of it: all of one that is not sharded."""
    if isinstance(parameter, DTensor):
        return parameter.to_local(), piece(parameter, ranks()[0])
    return parameter, tuple(slice(0, size) for size in parameter.shape)


def becomes(holds: Callable[[], bool], seconds: float = 5) -> bool:
    """Does it hold, at once or soon? Network file systems show late what another node wrote."""
    for _ in range(int(seconds / 0.1)):
        if holds():
            return True
        time.sleep(0.1)
    return False


@functools.cache  # as _mesh
def _side(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=HEALTH["timeout"])


def side_group() -> dist.ProcessGroup:
    """A group of all ranks for the collectives of a second thread, of tensors on the CPU; all ranks make it
    together."""
    return _side(dist.group.WORLD)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    HEALTH["calls"] += group is None
    dist.barrier(group)


def finish() -> None:
    if store := HEALTH["store"]:
        HEALTH["still"]()
        with contextlib.suppress(RuntimeError):
            store.set(f"alive-{ranks()[0]}", "done")
    if dist.is_initialized():
        dist.destroy_process_group()
