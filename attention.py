"""Attention over packed groups: one prompt, stored once, followed by its K completions.

    row:       prompt | completion_1 | ... | completion_K | next group's prompt | ...
    positions: 0..P-1 | P..          | ... | P..          | 0..

Every completion attends to its group's prompt and to itself. So the row is a list of segments, each a run of
queries and the keys it may see, causal and aligned at the END of the keys: the prompt with the first
completion is one plain causal segment, and every further completion is a segment of its own over [prompt,
completion]. Position p of a segment's keys is key p, so a sliding window is a distance of key indices within
the segment, never in the row.

`Layout` holds the index arithmetic. On CUDA, in 16 bits, it feeds one variable-length kernel call; elsewhere
`_Segments` walks the very same segments in matrix products, for torch's kernels of a CPU take four times as
long for the backward pass of segments this short, and round more, and those of CUDA have no fp32.
transformers hands `layout` through to `attend`, which is registered under NAME: any architecture that uses
its attention interface works unchanged.

Left out: attention sinks, bidirectional and cross attention (refused), generation with a cache (use "sdpa").
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

import precision

NAME = "packed"
TILE_ROWS = 256  # queries of a tile: a larger one wastes more products on what causality hides
TILE_BYTES = 2**22  # of a tile's scores in fp32: what a CPU's caches hold
KERNEL_WIDTH = 256  # of a head, the most that CUDA's kernels take
ASKED = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 needs no leave for it


class Layout(NamedTuple):
    query_sizes: list[int]  # S segments; their queries tile the row in order
    key_sizes: list[int]  # S, key_sizes[s] >= query_sizes[s]
    prompts: list[int]  # S, where the keys before the segment's own begin in the row
    keys: Tensor | None  # (sum key_sizes,) index into the row; None where it would be 0, 1, 2, ...
    query_offsets: Tensor  # (S + 1,) int32, cumulative sizes as variable-length kernels want them
    key_offsets: Tensor  # (S + 1,) int32


@dataclass
class Sealed:
    """A Layout as it goes through a model's blocks: what walks their arguments, FSDP and torch.compile, does
    not look into its lists, which are others in every pack."""

    layout: Layout


def layout(groups: Sequence[tuple[int, Sequence[int]]]) -> Layout:
    """Segments of a row of groups, each (prompt length, completion lengths). A group needs a completion."""
    counts = [len(completions) for _, completions in groups]  # segments of each group
    own = np.array([length for _, completions in groups for length in completions], np.int64)  # (S,)
    sizes = np.array([prompt for prompt, _ in groups], np.int64)  # (G,)
    firsts = np.cumsum([0, *counts[:-1]])  # (G,) the segment that holds the prompt
    shared = np.repeat(sizes, counts)  # (S,) keys before a segment's own
    shared[firsts] = 0
    own[firsts] += sizes
    begins = own.cumsum() - own  # (S,)
    prompts = np.repeat(begins[firsts], counts)
    starts, parts = (np.stack(pair, 1).ravel() for pair in ((prompts, begins), (shared, own)))  # (2 S,)
    index = None
    if shared.any():  # runs of keys, each from its start on
        index = torch.from_numpy(np.repeat(starts - parts.cumsum() + parts, parts) + np.arange(parts.sum()))
    offsets = [torch.from_numpy(np.append(0, ends.cumsum()).astype(np.int32)) for ends in (own, shared + own)]
    return Layout(own.tolist(), (shared + own).tolist(), prompts.tolist(), index, *offsets)


def refuse(config: Any, device: str, dtype: torch.dtype) -> None:
    """Raises ValueError for a model of transformers' `config` whose attention no kernel computes on this
    device in this dtype. A CPU computes everything, and so does CUDA in fp32, slowly."""
    if device != "cuda" or dtype == torch.float32:
        return
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < precision.AMPERE:
        raise ValueError("CUDA's 16-bit kernels need a GPU from Ampere on; --dtype float32 takes any, slowly")
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) or 0 for name in ("head_dim", "global_head_dim", "v_head_dim")}
    sizes["plain"] = text.hidden_size // text.num_attention_heads if not sizes["head_dim"] else 0
    sizes["latent"] = sum(getattr(text, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope"))
    if max(sizes.values()) > KERNEL_WIDTH:
        what = f"heads of {max(sizes.values())} numbers, and CUDA's kernels take {KERNEL_WIDTH}"
        raise ValueError(f"{what}; --dtype float32 takes any, slowly")
    if getattr(text, "attn_logit_softcapping", None) and _flash_attn() is None:
        what = "a soft-cap on attention, for which CUDA needs flash-attn: bash run.sh flash-attn"
        raise ValueError(f"{what}; --dtype float32 needs nothing, slowly")


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Sealed | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, H, T, E), key and value (1, Hkv, T, E) -> (1, T, H, E).

    softmax over the visible keys of scaling q.k, capped as softcap tanh(. / softcap). A window W lets a query
    see the W nearest keys, itself included. Raises ValueError for what it cannot do exactly.
    """
    if layout is None:
        raise ValueError("packed attention needs a layout: call the model through model.LanguageModel")
    if dropout or s_aux is not None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError("packed attention has no dropout, sinks, masks or bidirectional layers")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = layout.layout, scaling, sliding_window, softcap
    if query.is_cuda and query.element_size() == 2:
        return _varlen(query, key, value, *how), None
    return _Segments.apply(query, key, value, *how), None


AttentionInterface.register(NAME, attend)


class _Tile(NamedTuple):
    """Some queries of a segment and the keys that any of them sees: the end of the prompt, then their own."""

    rows: slice  # n queries, of the row
    before: slice  # keys of the prompt; empty for a segment that holds it
    own: slice  # keys of the segment, the last n of them the queries' own
    reach: int  # key j is out of the window of query i where j <= i + reach


def _tiles(layout: Layout, heads: int, window: int | None) -> Iterator[_Tile]:
    start = 0
    for queries, keys, prompt in zip(layout.query_sizes, layout.key_sizes, layout.prompts):
        shared = keys - queries
        step = min(TILE_ROWS, max(16, TILE_BYTES // (4 * heads * min(keys, window or keys))))
        # those with the most keys first: what they free has room for the others
        for first in reversed(range(0, queries, step)):
            last = min(first + step, queries)
            reach = -keys if window is None else shared + first - window  # the last key too far for query 0
            hidden = max(0, reach + 1)  # keys that are too far for all
            before = slice(prompt + min(hidden, shared), prompt + shared)
            own = slice(start + max(0, hidden - shared), start + last)
            yield _Tile(slice(start + first, start + last), before, own, reach - hidden)
        start += queries


class _Segments(torch.autograd.Function):
    """O = P V, P = softmax(S), S = scaling Q K^T, tile by tile: no more than one tile's S is ever held. The
    backward makes S again,

        dV = P^T dO    dP = dO V^T    dS = P (dP - rowsum(P dP))    dQ = scaling dS K    dK = scaling dS^T Q

    S, P, dP and dS are fp32 (fp64 for fp64 operands); of bf16 operands all products run on the bf16 units,
    and P and dS are rounded for those whose result is bf16 anyway. Gradients of keys add up in fp32. The G
    query heads of a key head are G n rows of one product.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scaling, window, cap):  # noqa: ANN001, ANN205
        ctx.save_for_backward(query, key, value)
        ctx.rest = layout, scaling, window, cap
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # (T, H, E)
        with precision.bf16_units(query.dtype):
            for tile in _tiles(layout, query.shape[1], window):
                q, k, v = _operands(query, key, value, tile)
                p, _ = _probabilities(q, k, tile, scaling, cap)  # (Hkv, G n, m)
                _heads_of(out, tile, len(k)).copy_(
                    torch.bmm(p.to(v.dtype), v).unflatten(1, (-1, _rows(tile)))
                )
        return out.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        query, key, value = ctx.saved_tensors
        layout, scaling, window, cap = ctx.rest
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # (T, H, E)
        grad_key, grad_value = (  # (Hkv, T, E), in memory (T, Hkv, E) like the rest
            states.new_zeros(states.shape[2], states.shape[1], states.shape[3], dtype=wide).transpose(0, 1)
            for states in (key, value)
        )
        with precision.bf16_units(query.dtype):
            for tile in _tiles(layout, query.shape[1], window):
                q, k, v = _operands(query, key, value, tile)
                p, slope = _probabilities(q, k, tile, scaling, cap)  # (Hkv, G n, m)
                upstream = _heads_of(grad[0], tile, len(k)).reshape(len(k), -1, v.shape[-1])  # (Hkv, G n, E)
                _add(grad_value, tile, torch.bmm(p.to(v.dtype).transpose(1, 2), upstream))
                ds = torch.bmm(upstream.to(wide), v.to(wide).transpose(1, 2)).mul_(p)  # (Hkv, G n, m) P dP
                ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
                if slope is not None:
                    ds.mul_(slope)
                ds = ds.mul_(scaling).to(q.dtype)  # (Hkv, G n, m)
                _heads_of(grad_query, tile, len(k)).copy_(torch.bmm(ds, k).unflatten(1, (-1, _rows(tile))))
                _add(grad_key, tile, torch.bmm(ds.transpose(1, 2), q))
        grads = (
            part.to(query.dtype).unsqueeze(0) for part in (grad_query.transpose(0, 1), grad_key, grad_value)
        )
        return *grads, None, None, None, None


def _rows(tile: _Tile) -> int:
    return tile.rows.stop - tile.rows.start


def _heads_of(states: Tensor, tile: _Tile, groups: int) -> Tensor:
    """The tile's rows of (T, H, E) as a view (Hkv, G, n, E)."""
    return states[tile.rows].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _operands(query: Tensor, key: Tensor, value: Tensor, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
    """(Hkv, G n, E), (Hkv, m, E), (Hkv, m, E) of a tile."""
    q = query[0, :, tile.rows].reshape(key.shape[1], -1, query.shape[3])
    if tile.before.start == tile.before.stop:
        return q, key[0, :, tile.own], value[0, :, tile.own]
    k, v = (torch.cat([part[0, :, tile.before], part[0, :, tile.own]], 1) for part in (key, value))
    return q, k, v


def _probabilities(
    q: Tensor, k: Tensor, tile: _Tile, scaling: float, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """softmax of the visible scores, and d capped / d raw scores or None: (Hkv, G n, m) each."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.to(wide), k.to(wide).transpose(1, 2)).mul_(scaling)  # (Hkv, G n, m)
    slope = None
    if cap is not None:
        scores.div_(cap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(cap)
    rows = _rows(tile)
    table = scores.view(len(k), -1, rows, k.shape[1])  # (Hkv, G, n, m)
    table[..., -rows:].add_(_never(rows, wide, q.device).triu(1))  # own keys that come later
    if tile.reach + rows > 0:
        table[..., :rows].add_(_never(rows, wide, q.device).tril(tile.reach))  # keys out of the window
    return scores.softmax(-1), slope


def _never(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((size, size), -torch.inf, dtype=dtype, device=device)


def _add(total: Tensor, tile: _Tile, part: Tensor) -> None:
    """total (Hkv, T, E) += part (Hkv, m, E) at the tile's keys."""
    shared = tile.before.stop - tile.before.start
    total[:, tile.before].add_(part[:, :shared])
    total[:, tile.own].add_(part[:, shared:])


class _Gathered(torch.autograd.Function):
    """Rows of states (T, H, E) at an index. The gradients of a row's copies, one a completion, add up in
    fp32, where index_select would round after each addition to the 16 bits of its operands."""

    @staticmethod
    def forward(ctx, states, index):  # noqa: ANN001, ANN205
        ctx.save_for_backward(index)
        ctx.rows = len(states)
        return states.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.rows, *grad.shape[1:], dtype=wide)  # (T, H, E)
        return total.index_add_(0, *ctx.saved_tensors, grad.to(wide)).to(grad.dtype), None


@functools.cache
def _flash_attn() -> Callable | None:
    """flash-attn's kernel, or None where it is not installed. Looked up once, for an import that fails takes
    0.1 ms, in every layer."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """All segments in one kernel call: flash-attn, or torch's own where it is not installed. -> (1, T, H, E).

    Keys are gathered here, inside what activation checkpointing recomputes, so the K copies of a prompt are
    never saved. Both align a causal mask at the end of the keys and count a window without the query itself.
    Both want one head size, a multiple of 8, for queries, keys and values: zeros fill it up. flash-attn's has
    not been run.
    """
    size = value.shape[3]
    width = max(query.shape[3], size)
    width += -width % 8
    heads = [states.transpose(1, 2).squeeze(0) for states in (query, key, value)]  # (tokens, H or Hkv, E)
    if layout.keys is not None:
        heads[1:] = [_Gathered.apply(states, layout.keys) for states in heads[1:]]  # (sum key_sizes, Hkv, E)
    heads = [F.pad(part, (0, width - part.shape[2])) if part.shape[2] < width else part for part in heads]
    left = -1 if window is None else window - 1
    places = (layout.query_offsets, layout.key_offsets, max(layout.query_sizes), max(layout.key_sizes))
    options = {"window_size": (left, 0)}
    if flash := _flash_attn():
        out = flash(*heads, *places, softmax_scale=scaling, causal=True, softcap=cap or 0.0, **options)
    elif cap is None:
        options |= {"enable_gqa": key.shape[1] != query.shape[1]} if ASKED else {}
        out = varlen_attn(*heads, *places, scale=scaling, **options)
    else:
        raise ValueError("a soft-cap on attention needs flash-attn on CUDA: bash run.sh flash-attn")
    return out[..., :size].unsqueeze(0)
