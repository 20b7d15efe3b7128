"""Attention over packed groups: one prompt, stored once, followed by its K completions.

    row:       prompt | completion_1 | ... | completion_K | next group's prompt | ...
    positions: 0..P-1 | P..          | ... | P..          | 0..

Every completion attends to its group's prompt and to itself. So the row is a list of segments, each a run of
queries and the keys it may see, causal and aligned at the END of the keys: the prompt with the first
completion is one plain causal segment, and every further completion is a segment of its own over [prompt,
completion]. Position p of a segment's keys is key p, so a sliding window is a distance of key indices within
the segment, never in the row.

`Layout` holds the index arithmetic. On CUDA it feeds one variable-length kernel call; elsewhere a loop of
`scaled_dot_product_attention` walks the very same segments. transformers hands `layout` through to `attend`,
which is registered under NAME: any architecture that uses its attention interface works unchanged.

Left out: attention sinks, bidirectional and cross attention (refused), generation with a cache (use "sdpa").
"""

from itertools import accumulate
from typing import Any, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "packed"


class Layout(NamedTuple):
    query_sizes: list[int]  # S segments; their queries tile the row in order
    key_sizes: list[int]  # S, key_sizes[s] >= query_sizes[s]
    keys: Tensor | None  # (sum key_sizes,) index into the row; None where it would be 0, 1, 2, ...
    query_offsets: Tensor  # (S + 1,) int32, cumulative sizes as variable-length kernels want them
    key_offsets: Tensor  # (S + 1,) int32

    def to(self, device: torch.device | str) -> "Layout":
        return Layout(*[part.to(device) if isinstance(part, Tensor) else part for part in self])


def layout(groups: Sequence[tuple[int, Sequence[int]]]) -> Layout:
    """Segments of a row of groups, each (prompt length, completion lengths). A group needs a completion."""
    query_sizes = []
    key_sizes = []
    keys = []
    start = 0
    for prompt, completions in groups:
        first = prompt + completions[0]
        query_sizes.append(first)
        key_sizes.append(first)
        keys.extend(range(start, start + first))
        end = start + first
        for length in completions[1:]:
            query_sizes.append(length)
            key_sizes.append(prompt + length)
            keys.extend(range(start, start + prompt))
            keys.extend(range(end, end + length))
            end += length
        start = end
    offsets = [torch.tensor([0, *accumulate(sizes)], dtype=torch.int32) for sizes in (query_sizes, key_sizes)]
    index = None if query_sizes == key_sizes else torch.tensor(keys)
    return Layout(query_sizes, key_sizes, index, *offsets)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, H, T, E), key and value (1, Hkv, T, E) -> (1, T, H, E).

    softmax over the visible keys of scaling q.k, capped as softcap tanh(. / softcap). A window W lets a query
    see the W nearest keys, itself included. Keys are gathered here, inside what activation checkpointing
    recomputes, so the K copies of a prompt are never saved. Raises ValueError for what it cannot do exactly.
    """
    if layout is None:
        raise ValueError("packed attention needs a layout: call the model through model.LanguageModel")
    if dropout or s_aux is not None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError("packed attention has no dropout, sinks, masks or bidirectional layers")
    if layout.keys is not None:
        key = _gather(key, layout.keys)  # (1, Hkv, sum key_sizes, E)
        value = _gather(value, layout.keys)  # (1, Hkv, sum key_sizes, E)
    if query.is_cuda:
        return _varlen(query, key, value, layout, scaling, sliding_window, softcap), None
    parts = zip(
        query.split(layout.query_sizes, 2), key.split(layout.key_sizes, 2), value.split(layout.key_sizes, 2)
    )
    outputs = [_segment(q, k, v, scaling, sliding_window, softcap) for q, k, v in parts]  # (1, H, n, E) each
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(NAME, attend)


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Rows of (1, H, T, E) by position, one copy of whole rows: (1, H, len(index), E)."""
    return states.transpose(1, 2).index_select(1, index).transpose(1, 2)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) mask of a segment: causal, aligned at the end, at most `window` keys back."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def _segment(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, cap: float | None
) -> Tensor:
    """One segment: q (1, H, n, E), k and v (1, Hkv, m, E) -> (1, H, n, E)."""
    queries = q.shape[2]
    keys = k.shape[2]
    window = window if window is not None and window < keys else None
    grouped = k.shape[1] != q.shape[1]
    if cap is None and queries == keys and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = _visible(queries, keys, window, q.device)  # (n, m); SDPA's own causal mask is aligned at the start
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    repeats = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(repeats, 1)  # (1, H, m, E)
    v = v.repeat_interleave(repeats, 1)  # (1, H, m, E)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)  # (1, H, n, m)
    scores = cap * torch.tanh(scores / cap)  # (1, H, n, m)
    scores = scores.float() if scores.dtype != torch.float64 else scores
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """All segments in one kernel call: flash-attn, or torch's own where it is not installed. -> (1, T, H, E).

    Both align a causal mask at the end of the keys and count a window without the query itself. Not run here:
    no GPU.
    """
    q, k, v = (states.transpose(1, 2).squeeze(0) for states in (query, key, value))  # (tokens, H or Hkv, E)
    sizes = (max(layout.query_sizes), max(layout.key_sizes))
    left = -1 if window is None else window - 1
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        if cap is not None:
            raise ValueError(
                "a soft cap on attention needs flash-attn on CUDA: pip install flash-attn"
            ) from None
        out = varlen_attn(
            q,
            k,
            v,
            layout.query_offsets,
            layout.key_offsets,
            *sizes,
            scale=scaling,
            window_size=(left, 0),
            enable_gqa=k.shape[1] != q.shape[1],
        )
    else:
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            layout.query_offsets,
            layout.key_offsets,
            *sizes,
            softmax_scale=scaling,
            causal=True,
            window_size=(left, 0),
            softcap=cap or 0.0,
        )
    return out.unsqueeze(0)
