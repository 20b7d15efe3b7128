"""A checkpoint written behind the training: the state as it is now, copied, and the thread that writes it.

A thread, and not torch's `async_save`: what follows the writing (checksums, the record, the name, pruning)
belongs to it too. Collectives of two threads on one process group would meet in another order on another
rank, so those of this one have a group of their own, fsdp.side_group; within it their order is that of the
saves, one after the other. Nothing in the thread draws a random number.

The interpreter waits for the thread before it ends, so a run that fails for another reason still leaves the
checkpoint whole; a kill leaves what a kill during any save does.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

HELD: dict[str, Tensor] = {}  # this rank's part of a state, by name: memory taken once, of a GPU's pinned
SAVE: dict[str, Any] = {"step": None, "future": None}  # what is written, or was and nobody has asked


@torch.no_grad()
def copied(state: dict[str, Any], inside: str = "") -> dict[str, Any]:
    """A state of tensors (or dicts of them) in the host's memory, sharded as it is: complete on return, and
    valid until the next call, for which the save before must have ended."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found[name] = copied(value, f"{inside}{name}.")
            continue
        sharded, key = isinstance(value, DTensor), inside + name
        local = value.to_local() if sharded else value
        kept = HELD.get(key)
        if kept is None or (kept.shape, kept.dtype) != (local.shape, local.dtype):
            kept = HELD[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        kept.copy_(local, non_blocking=True)
        found[name] = DTensor(kept, value._spec, requires_grad=False) if sharded else kept
    if not inside and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return found


def start(step: int, work: Callable[[], str]) -> None:
    """Do this rank's part of a save in a thread. The one before must have ended."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> str:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread's is the first GPU, which another rank has
        return work()

    thread = ThreadPoolExecutor(1, "save")
    SAVE.update(step=step, future=thread.submit(run))
    thread.shutdown(wait=False)


def wait() -> tuple[int | None, str]:
    """Wait for the save that was started: (its step, what its work returned); (None, "") if there is none.
    Raises what it raised."""
    step, future = SAVE["step"], SAVE["future"]
    SAVE.update(step=None, future=None)
    return step, future.result() if future else ""
