"""The rows that added tokens have in the embedding and in the head: trained in fp32, beside adapters, while
all other rows stay frozen.

    e(v) = s a[v - first]    for first <= v < first + k, else s E[v]    E (V, D) frozen, a (k, D), s a scale
    z(v) = h . b[v - first]  for the same v, else h . W[v]              W (V, D) frozen, b (k, D)

The rows lie in the module in whose weight they stand in, as its parameter `added`; where the head is the
embedding, b is a. The frozen weight keeps rows for these tokens, which nobody reads after the start. peft
means the same by `trainable_token_indices`, so its form of adapters holds them too.

Left out: heads with a bias, which peft would drop.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

import fsdp

NAME = "added"
PEFT = "token_adapter.trainable_tokens_delta"  # its name of the same rows, in the same module


def add(lm: nn.Module, tokens: range, fresh: bool) -> dict[str, list[int]]:
    """Give a transformers model, before it is sharded, rows of its own for these tokens, at 0; if `fresh`,
    `start` writes them. Returns what they are in peft's settings: ids by module. Raises ValueError for a head
    with a bias."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(f"{type(lm).__name__}: rows of its head cannot be trained alone, for it has a bias")
    owners = [embedding] if head.weight is embedding.weight else [embedding, head]
    for module in owners:
        module.added = nn.Parameter(torch.zeros(len(tokens), module.weight.shape[1]))  # (k, D)
        module.first, module.fresh = tokens.start, fresh
    embedding.register_forward_hook(_embed)
    head.register_forward_hook(functools.partial(_project, owners[-1]))
    return {name: list(tokens) for name, module in lm.named_modules() if module in owners}


def is_row(name: str) -> bool:
    """Is a parameter of this name rows of added tokens?"""
    return name.endswith(f".{NAME}")


def of_head(lm: nn.Module) -> tuple[Tensor | None, int]:
    """The rows (k, D) that stand in those of a model's head, and the first of these; None if none do."""
    for module in (lm.get_output_embeddings(), lm.get_input_embeddings()):
        if hasattr(module, NAME):
            return module.added, module.first
    return None, 0


@torch.no_grad()
def start(lm: nn.Module) -> None:
    """Fresh rows become those that the frozen weight has, once it is there; all ranks together."""
    for module in (module for module in lm.modules() if getattr(module, "fresh", False)):
        weight, (local, part) = module.weight, fsdp.local_piece(module.added)
        whole = fsdp.whole(weight)  # (V, D)
        local.copy_(whole[module.first : module.first + len(module.added)][part])


@torch.no_grad()
def merge(module: nn.Module, weight: Tensor) -> None:
    """Write the rows of a module to where they stand in, in its weight, whole."""
    weight[module.first : module.first + len(module.added)] = module.added


def _embed(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    places = inputs[0] - module.first  # (1, T)
    count = len(module.added)
    found = nn.functional.embedding(places.clamp(0, count - 1), module.added)  # (1, T, D)
    scale = getattr(module, "embed_scale", None)
    if scale is not None:  # rounded as the module rounds it
        found = found * scale.to(module.weight.dtype)
    found = found.to(output.dtype)
    return torch.where(((places >= 0) & (places < count))[..., None], found, output)


def _project(owner: Any, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Of the head as transformers calls it, to generate; training goes through vocab.py."""
    found = inputs[0] @ owner.added.to(inputs[0].dtype).t()  # (..., k)
    rest = output[..., owner.first + len(owner.added) :]
    return torch.cat((output[..., : owner.first], found, rest), -1)  # (..., V)
