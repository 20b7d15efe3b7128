"""The output head, walked in chunks: the only place where a tensor with a vocabulary axis is born and dies.

`token_statistics` turns the hidden states of N trained tokens into log pi(y|s) and, where a reference is
given, into log pi_ref(y|s), the KL and a risk measure of each next-token distribution. The forward pass keeps
O(N) numbers and, until its backward, the weights' fp32 copy and the room for a chunk; the backward pass
recomputes the logits chunk by chunk and uses the closed form

    d logp / d logits = onehot(y) - pi            d risk / d logits = pi sum(q) - q,  q = risk.weights
    d entropy / d logits = -pi (log pi + entropy)

so nothing of shape (N, V) ever lives, and one backward serves every measure of risk.py. A chunk is what one
matmul makes, enough positions for it to be efficient; what follows walks it in tiles that fit the cache.

Logits are fp32 outputs even of bf16 operands: bf16 logits move in steps of 0.125 at 31, which drowns a KL of
1e-4. CUDA has a kernel for that; for a CPU see precision.py.

Left out: sampling, top-k of the logits, anything that would keep the logits of more than a chunk.
"""

from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

import precision
import risk as risk_measures

# Of one fp32 block of logits: a matmul of few rows spends its time on reading the weights, and on CUDA on the
# sum of their gradient, (V, D) read and written a chunk.
CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**26, 2**30
# Of the rows of a block that everything else is done on: what a CPU's cache holds; on CUDA, what leaves the
# temporary ones, half a dozen, below a block.
TILE_BYTES, CUDA_TILE_BYTES = 2**22, 2**27


class Head(NamedTuple):
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None  # z = cap tanh(raw / cap)
    scale: float = 1.0  # raw = scale (h W^T + b)
    added: Tensor | None = None  # (k, D), in place of the rows of W from `first` on: see added.py
    first: int = 0

    @property
    def cut(self) -> slice:
        return slice(self.first, self.first + len(self.added))


class Tokens(NamedTuple):
    """Statistics of N trained tokens, each (N,) nats in fp32 (fp64 for fp64 operands); None if not asked
    for."""

    logps: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    risk: Tensor | None = None
    entropy: Tensor | None = None


Measure = Callable[..., risk_measures.Risk]  # (x, p, state) -> Risk, hyper-parameters bound


def token_statistics(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    reference: tuple[Tensor, Head] | None = None,
    measure: Measure | None = None,
    through: str | None = None,
    chunk_size: int | None = None,
    entropy: bool = False,
) -> Tokens:
    """Per-token statistics of a language model's head, without an (N, V) tensor.

    hidden (N, D), head.weight (V, D), targets (N,) -> Tokens of (N,) each, in nats. `reference` is the
    reference's (hidden, head), which gets no gradient; with it come ref_logps, kl, and, with a `measure` of
    risk.py (hyper-parameters bound by functools.partial), risk. Gradients reach hidden, head.weight and
    head.bias, and head.added where there are such rows, through logps and through the one drift named by
    `through` ("kl", "risk" or None); the other drift is a constant. With `entropy`, H = -sum_v pi log pi of
    the policy, with its gradient. `chunk_size` positions are projected at a time; None fits a block of logits
    into CHUNK_BYTES, or CUDA's. No result depends on it beyond the rounding of a matmul.

    Raises ValueError if `through` names a drift that is not computed.
    """
    if through is not None and (reference is None or (through == "risk" and measure is None)):
        raise ValueError(
            f"a gradient through {through} needs a reference" + ", a measure" * (through == "risk")
        )
    room = CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES
    chunk_size = chunk_size or max(16, room // (4 * len(head.weight)))
    chunk_size = max(1, min(chunk_size, len(targets)))
    return Tokens(
        *_TokenStatistics.apply(
            hidden, head.weight, head.bias, head.added, head, targets, reference, measure, through, entropy,
            chunk_size,
        )
    )


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    # noqa: ANN001
    def forward(
        ctx, hidden, weight, bias, added, head, targets, reference, measure, through, entropy, chunk_size
    ):
        ctx.set_materialize_grads(False)
        head = head._replace(weight=weight, bias=bias, added=added)
        ref_hidden, ref_head = reference or (None, None)
        project = _projection(head, chunk_size)
        project_reference = _projection(ref_head, chunk_size) if reference else None
        # What outlives a chunk is allocated before the first: small tensors born between large ones would
        # cut the freed large ones into pieces, and the process would grow with every chunk.
        positions, wide = len(targets), torch.promote_types(weight.dtype, torch.float32)
        made = [hidden.new_empty(positions, dtype=wide) for _ in range(5)]
        logps, ref_logps, kl, drift, entropies = made  # (N,) each
        lses, ref_lses = (hidden.new_empty(positions, 1, dtype=wide) for _ in range(2))  # (N, 1) each
        states = None  # (N, k), of the size that the measure says
        for chunk in _chunks(positions, chunk_size):
            products = project(hidden[chunk])  # (c, V)
            ref_products = project_reference(ref_hidden[chunk]) if reference else None  # (c, V)
            for rows, part in _tiles(chunk, products):
                target = targets[rows, None]  # (n, 1)
                logits = _logits(products[part], head)  # (n, V)
                lse = lses[rows] = logits.logsumexp(-1, keepdim=True)  # (n, 1)
                logps[rows] = (logits.gather(-1, target) - lse).squeeze(-1)  # (n,)
                if entropy:
                    log_probability = logits - lse  # (n, V)
                    entropies[rows] = -(log_probability.exp() * log_probability).sum(-1)  # (n,)
                if reference is None:
                    continue
                ref_logits = _logits(ref_products[part], ref_head)  # (n, V)
                ref_lse = ref_lses[rows] = ref_logits.logsumexp(-1, keepdim=True)  # (n, 1)
                ref_logps[rows] = (ref_logits.gather(-1, target) - ref_lse).squeeze(-1)  # (n,)
                cost, probability = _cost_and_probability(logits, lse, ref_logits, ref_lse)  # (n, V) each
                kl[rows] = risk_measures.kl(cost, probability).value  # (n,)
                if measure is not None:
                    result = measure(cost, probability, None)
                    drift[rows] = result.value  # (n,)
                    if states is None and result.state is not None:
                        states = result.state.new_empty(positions, result.state.shape[-1])
                    if states is not None:
                        states[rows] = result.state  # (n, k)
        ctx.save_for_backward(hidden, weight, bias, added, targets, lses, ref_hidden, entropies)
        ctx.head = head._replace(weight=None, bias=None, added=None)
        ctx.reference_head = ref_head
        ctx.ref_lses = ref_lses
        ctx.states = states
        ctx.measure = risk_measures.kl if through == "kl" else measure
        ctx.drift = {None: None, "kl": 2, "risk": 3}[through]
        ctx.chunk_size = chunk_size
        ctx.projections = project, project_reference if ctx.drift else None
        found = [logps, *([ref_logps, kl] if reference else [None] * 2), drift if measure else None]
        found = [*found, entropies if entropy else None]
        constant = [found[1]] + [found[k] for k in (2, 3) if k != ctx.drift]
        ctx.mark_non_differentiable(*[part for part in constant if part is not None])
        return tuple(found)

    @staticmethod
    def backward(ctx, *gradients):  # noqa: ANN001, ANN205
        hidden, weight, bias, added, targets, lses, ref_hidden, entropies = ctx.saved_tensors
        zero = lses.new_zeros(len(lses))  # (N,)
        gradient = zero if gradients[0] is None else gradients[0]  # (N,) d loss / d logps
        drift_gradient = gradients[ctx.drift] if ctx.drift else None  # (N,) d loss / d kl or d risk
        entropy_gradient = gradients[4]  # (N,) d loss / d entropy, or None
        drifts = drift_gradient is not None
        head = ctx.head._replace(weight=weight, bias=bias, added=added)
        # those of the forward pass, so that what they keep is made once, and kept no longer than needed
        project, project_reference = ctx.projections or (
            _projection(head, ctx.chunk_size),
            _projection(ctx.reference_head, ctx.chunk_size) if drifts else None,
        )
        ctx.projections = None
        wants_hidden, wants_weight, wants_bias, wants_added = ctx.needs_input_grad[:4]
        wide = lses.dtype
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None  # (N, D)
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None  # (V, D) one accumulator
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None  # (V,)
        grad_added = torch.zeros_like(added, dtype=wide) if wants_added else None  # (k, D)
        for chunk in _chunks(len(hidden), ctx.chunk_size):
            upstream = project(hidden[chunk])  # (c, V) products, overwritten by d loss / d products
            ref_products = project_reference(ref_hidden[chunk]) if drifts else None  # (c, V)
            for rows, part in _tiles(chunk, upstream):
                logits = _logits(upstream[part], head)  # (n, V)
                lse = lses[rows]  # (n, 1)
                scale = -gradient[rows, None]  # (n, 1)
                if drifts:
                    ref_logits = _logits(ref_products[part], ctx.reference_head)  # (n, V)
                    cost, probability = _cost_and_probability(logits, lse, ref_logits, ctx.ref_lses[rows])
                    state = ctx.states[rows] if ctx.states is not None and ctx.drift == 3 else None
                    weights = ctx.measure(cost, probability, state).weights  # (n, V)
                    # the policy's probability gets -g from logps and g sum(q) from the drift: one multiply
                    scale = scale + drift_gradient[rows, None] * weights.sum(-1, keepdim=True)  # (n, 1)
                slope = _softcap_slope(logits, head)  # (n, V) or None, before the logits are overwritten
                logits.sub_(lse)
                if entropy_gradient is not None:  # dH / dz = -pi (log pi + H)
                    scale = scale - entropy_gradient[rows, None] * (logits + entropies[rows, None])  # (n, V)
                logits.exp_().mul_(scale)
                if drifts:
                    logits.sub_(weights.mul_(drift_gradient[rows, None]))
                logits.scatter_add_(-1, targets[rows, None], gradient[rows, None])
                if slope is not None:
                    logits.mul_(slope)
                if head.scale != 1.0:
                    logits.mul_(head.scale)
            if wants_bias:
                grad_bias.add_(upstream.sum(0))
            through_added = 0.0
            if added is not None:
                own = upstream[:, head.cut]  # (c, k)
                if wants_added:
                    _add_outer(grad_added, own, hidden[chunk])
                through_added = own.to(weight.dtype) @ added.to(weight.dtype)  # (c, D)
                own.zero_()  # nothing reaches the rows that they stand in
            if wants_hidden:
                grad_hidden[chunk] = upstream.to(weight.dtype) @ weight + through_added  # (c, D)
            if wants_weight:
                _add_outer(grad_weight, upstream, hidden[chunk])
        project = project_reference = None  # before the gradient's copy is made
        grad_weight = grad_weight.to(weight.dtype) if wants_weight else None
        grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
        grad_added = grad_added.to(added.dtype) if wants_added else None
        return grad_hidden, grad_weight, grad_bias, grad_added, *[None] * 7


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _cost_and_probability(
    logits: Tensor, lse: Tensor, ref_logits: Tensor, ref_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """x = log pi_ref - log pi_theta and p = pi_ref, (n, V) each. Overwrites ref_logits.

    The logits are subtracted first: neighbours subtract without rounding, and equal models give exactly 0.
    """
    cost = (ref_logits - logits).add_(lse - ref_lse)  # (n, V)
    return cost, ref_logits.sub_(ref_lse).exp_()


def _tiles(chunk: slice, products: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the whole, and of a chunk's `products` (c, V): as many as fit into a tile."""
    size = max(1, (CUDA_TILE_BYTES if products.is_cuda else TILE_BYTES) // products[0].nbytes)
    for part in _chunks(len(products), size):
        yield slice(chunk.start + part.start, chunk.start + part.stop), part


def _projection(head: Head, chunk_size: int) -> Callable[[Tensor], Tensor]:
    """h (c, D) -> h W^T (c, V) in wide numbers. What a chunk does not change is made once and lives as long
    as the function, the memory of the result too: the next call overwrites it."""
    weight = head.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    transposed = weight.t() if weight.is_cuda else weight.to(wide).t()  # (D, V)
    room = weight.new_empty(chunk_size, len(weight), dtype=wide)

    def multiply(hidden: Tensor, transposed: Tensor, out: Tensor | None = None) -> Tensor:
        if weight.is_cuda and weight.dtype != wide:
            return torch.mm(hidden, transposed, out_dtype=wide, out=out)
        with precision.bf16_units(weight.dtype):
            return torch.mm(hidden.to(wide), transposed.to(wide), out=out)

    def project(hidden: Tensor) -> Tensor:
        products = multiply(hidden, transposed, room[: len(hidden)])  # (c, V)
        if head.added is not None:
            products[:, head.cut] = multiply(hidden, head.added.detach().to(weight.dtype).t())
        return products

    return project


def _logits(products: Tensor, head: Head) -> Tensor:
    """Bias, scale and soft-cap, in place: (n, V)."""
    if head.bias is not None:
        products.add_(head.bias.detach())
    if head.scale != 1.0:
        products.mul_(head.scale)
    if head.softcap:
        products.div_(head.softcap).tanh_().mul_(head.softcap)
    return products


def _add_outer(total: Tensor, upstream: Tensor, hidden: Tensor) -> None:
    """total (V, D) += upstream (n, V)^T hidden (n, D), accumulated in total's precision."""
    if total.is_cuda and hidden.dtype != total.dtype:
        torch.addmm(total, upstream.to(hidden.dtype).t(), hidden, out_dtype=total.dtype, out=total)
    else:
        with precision.bf16_units(hidden.dtype):
            total.addmm_(upstream.t(), hidden.to(total.dtype))


def _softcap_slope(logits: Tensor, head: Head) -> Tensor | None:
    """d z / d raw = 1 - (z / cap)^2: (n, V)."""
    return None if not head.softcap else 1 - (logits / head.softcap).square()
