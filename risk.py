"""Risk measures of one next-token distribution.

A measure maps the cost x(v) = log pi_ref(v|s) - log pi_theta(v|s) and the reference probabilities
p(v) = pi_ref(v|s) of one position to one number. All measures share one interface,

    measure(x, p, state=None, *, <its parameter>) -> Risk(value, weights, state)

with x and p of shape (..., V) in fp32 or fp64, in nats. `weights` is q = d value / d x, so the gradient with
respect to the policy's logits is pi_theta sum(q) - q for every measure and `vocab.py` needs only one
backward. Nothing here builds a graph.

`state` is whatever makes a second call on the very same (x, p) cheap (the threshold of a quantile): the
backward pass, which recomputes x and p chunk by chunk, hands it back instead of searching again.

Adding a measure = adding one public function annotated `-> Risk`; its keyword-only parameters become flags.

Left out: the published code's second mode, which replaces log-probabilities by thresholded ones
(`cal_risk_distribution_logps`): its margins are quantiles or zero, not log-ratios.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 1024


class Risk(NamedTuple):
    value: Tensor  # (...,) nats
    weights: Tensor  # (..., V) d value / d x
    state: Tensor | None = None  # (..., k) or None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a b: (..., V), (..., V) -> (...,). Not a matmul: that adds in order and loses three digits at V =
    150,000."""
    return (a * b).sum(-1)


@torch.no_grad()
def kl(x: Tensor, p: Tensor, state: Tensor | None = None) -> Risk:
    """KL(pi_ref || pi_theta) = sum_v p x; q = p.

    Source: TDPO, arXiv:2404.11999, the sequential KL divergence. Raises nothing.
    """
    return Risk(_dot(p, x), p)


@torch.no_grad()
def cvar(x: Tensor, p: Tensor, state: Tensor | None = None, *, confidence_level: float = 0.97) -> Risk:
    """Conditional value at risk: the mean of x over the worst (largest) share c of the reference mass.

        CVaR_c = max { sum_v q x : 0 <= q <= p / c, sum q = sum p },   c = confidence_level in (0, 1]

    The atom at the threshold t is split exactly; entries tied at t share what is left in proportion to p:
    q = p/c where x > t, f p/c where x = t, 0 below. c = 1 is `kl`; a smaller c is more averse. The target
    mass is c sum(p), since fp32 probabilities do not sum to exactly 1. state = (t, f).

    Raises ValueError unless 0 < c <= 1. Source: Rockafellar and Uryasev 2000; Ra-DPO, arXiv:2505.20359.
    Differs from the published code, whose mask of an unweighted quantile is neither weighted by p nor
    renormalised: `published`.
    """
    if not 0 < confidence_level <= 1:
        raise ValueError(f"confidence_level must be in (0, 1], got {confidence_level}")
    if confidence_level == 1:
        return kl(x, p)
    if state is None:
        state = _threshold(x, p, confidence_level)  # (..., 2)
    threshold, share = state.unsqueeze(-2).unbind(-1)  # (..., 1) each
    weights = torch.heaviside(x - threshold, share)  # (..., V) 1 above, `share` at, 0 below the threshold
    weights.mul_(p).div_(confidence_level)  # (..., V)
    return Risk(_dot(weights, x), weights, state)


@torch.no_grad()
def erm(x: Tensor, p: Tensor, state: Tensor | None = None, *, risk_aversion: float = 1.0) -> Risk:
    """Entropic risk measure, the Renyi divergence D_{1+mu}(pi_ref || pi_theta):

        ERM_mu = [lse(log p + mu x) - lse(log p)] / mu = max_q sum q x - KL(q || p) / mu
        q = softmax(log p + mu x)

    so the value is not sum q x. mu = risk_aversion > 0; mu -> 0 is `kl`, larger is more averse. The default
    of 1, the Renyi divergence of order 2, is ours: the authors' experiments have 5, 7 and 9.

    Raises ValueError unless mu > 0, and for mu < 0.01 in fp32, where the difference of the two lse has no
    digits left. Source: Ra-DPO, arXiv:2505.20359 (nested entropic risk).
    """
    if not risk_aversion > 0 or risk_aversion == float("inf"):
        raise ValueError(f"risk_aversion must be a finite number > 0, got {risk_aversion}")
    if risk_aversion < 0.01 and x.dtype != torch.float64:
        raise ValueError(f"risk_aversion must be >= 0.01 in fp32, got {risk_aversion}; use kl for the limit")
    tilted = torch.where(p > 0, x * risk_aversion, -torch.inf)  # (..., V) an entry without mass has no say
    shift = tilted.amax(-1, keepdim=True)  # (..., 1)
    tilted.sub_(shift).exp_().mul_(p)  # (..., V) p e^(mu x - shift)
    total = tilted.sum(-1, keepdim=True)  # (..., 1)
    value = (total.log() + shift).squeeze(-1) - p.sum(-1).log()  # (...,)
    return Risk(value / risk_aversion, tilted.div_(total))


@torch.no_grad()
def published(
    x: Tensor, p: Tensor, state: Tensor | None = None, *, confidence_level: float = 0.97, split: bool = True
) -> Risk:
    """The published Ra-DPO code's measure, kept to reproduce it: sum_v p x 1[x > Q], q = p 1[x > Q].

    Q is the unweighted (1 - c)-quantile of x over the vocabulary (linear interpolation). With `split`, the
    published default, the halves [0, V//2) and [V//2, V) of the vocabulary each have their own Q, so the
    order of the vocabulary matters. state = where each half is cut. Not a CVaR: neither weighted by p nor
    renormalised.

    Raises ValueError unless 0 < c <= 1. Source: the published repository of arXiv:2505.20359.
    """
    if not 0 < confidence_level <= 1:
        raise ValueError(f"confidence_level must be in (0, 1], got {confidence_level}")
    half = x.shape[-1] // 2
    sizes = [half, x.shape[-1] - half] if split and half else [x.shape[-1]]
    if state is None:
        state = torch.stack(
            [_lower_quantile(part, 1 - confidence_level) for part in x.split(sizes, -1)], -1
        )  # (..., k)
    above = [part > cut for part, cut in zip(x.split(sizes, -1), state.split(1, -1))]
    weights = p * torch.cat(above, -1)  # (..., V)
    return Risk(_dot(weights, x), weights, state)


def _lower_quantile(x: Tensor, fraction: float) -> Tensor:
    """The value at or just below the quantile, by selection instead of a sort: (..., V) -> (...,).
    Interpolating on to the next value would not change which entries lie above."""
    rank = int(fraction * (x.shape[-1] - 1))
    return x.topk(rank + 1, -1, largest=False).values[..., -1]


def _threshold(x: Tensor, p: Tensor, confidence_level: float) -> Tensor:
    """The largest t with p{x >= t} >= c sum(p), and the share of the mass at t that is needed: (..., V) ->
    (..., 2). On a CPU by a histogram, an eighth of the time there; elsewhere without a shape that depends on
    values, for which the host would have to wait."""
    search = _by_histogram if x.device.type == "cpu" else _by_bisection
    rows = (-1, x.shape[-1])
    threshold, share = search(x.reshape(rows), p.reshape(rows), confidence_level)  # (n,) each
    return torch.stack([threshold, share.to(x.dtype)], -1).reshape(*x.shape[:-1], 2)


def _by_bisection(x: Tensor, p: Tensor, confidence_level: float) -> tuple[Tensor, Tensor]:
    """`_threshold` of rows (n, V) by halving the floats between the least and the largest x: one pass a bit
    of x, whatever its values, no (n, V) number kept, and sums whose order never changes."""
    low, high = (_ranked(end) for end in x.aminmax(dim=-1, keepdim=True))  # (n, 1) whole numbers
    target = confidence_level * p.sum(-1, keepdim=True, dtype=torch.double)  # (n, 1)
    for _ in range(8 * x.element_size()):
        middle = (low | high) - ((low ^ high) >> 1)  # (n, 1) their mean, rounded up, without overflow
        enough = _mass(p, x >= _unranked(middle, x.dtype)) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    threshold = _unranked(low, x.dtype)  # (n, 1)
    share = (target - _mass(p, x > threshold)) / _mass(p, x == threshold)  # (n, 1)
    return threshold.squeeze(-1), share.nan_to_num(0.0).clamp(0, 1).squeeze(-1)


def _mass(p: Tensor, where: Tensor) -> Tensor:
    """Of p where the condition holds, in fp64: (n, V), (n, V) -> (n, 1)."""
    return torch.where(where, p, 0.0).sum(-1, keepdim=True, dtype=torch.double)


def _ranked(x: Tensor) -> Tensor:
    """Floats as whole numbers of their size in the same order: their bits, those of negative ones turned."""
    bits = x.view(torch.int64 if x.dtype == torch.double else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _unranked(ranks: Tensor, dtype: torch.dtype) -> Tensor:
    """`_ranked` undone, by the same turn."""
    return torch.where(ranks < 0, ranks ^ torch.iinfo(ranks.dtype).max, ranks).view(dtype)


def _by_histogram(x: Tensor, p: Tensor, confidence_level: float) -> tuple[Tensor, Tensor]:
    """`_threshold` of rows (n, V). A sort of 50,000 entries costs more than the whole head. One histogram of
    mass over x finds the bin of every row's threshold; only the entries of those bins, a few hundred of a
    row, are sorted. All bins are exact, so a distribution with every entry in one bin is merely slower.
    """
    rows = x.shape[0]
    low, high = x.aminmax(dim=-1, keepdim=True)  # (n, 1)
    if torch.equal(low, high):  # as between equal models: everything lies at the threshold
        return low.squeeze(-1), torch.full_like(low, confidence_level).squeeze(-1)
    scale = BINS / (high - low).clamp(min=torch.finfo(x.dtype).tiny * BINS)  # (n, 1)
    bins = (
        ((high - x) * scale).fmax(x.new_zeros(())).clamp_(max=BINS - 1).long()
    )  # (n, V) worst first; NaN is 0
    mass = p.new_zeros(rows, BINS, dtype=torch.double).scatter_add_(1, bins, p.double())  # (n, BINS)
    mass = mass.nan_to_num_().cumsum(-1)  # (n, BINS) of this bin and the worse ones
    target = confidence_level * mass[:, -1:]  # (n, 1)
    found = torch.searchsorted(mass, target).clamp_(
        max=BINS - 1
    )  # (n, 1) the first bin that reaches the target
    before = torch.where(found > 0, mass.gather(1, (found - 1).clamp(min=0)), 0.0).squeeze(1)  # (n,)

    row, column = (bins == found).nonzero(as_tuple=True)  # (m,) candidates, row by row
    value = x[row, column]  # (m,)
    order = value.argsort(descending=True)
    order = order[row[order].argsort(stable=True)]  # by row, then worst first
    value = value[order]
    weight = p[row, column][order].double()
    counts = torch.bincount(row, minlength=rows)  # (n,) each at least 1
    last = counts.cumsum(0) - 1
    reached = weight.cumsum(0)  # (m,)
    start = reached[last] - torch.bincount(row, weight, rows)  # (n,) mass of the rows before
    need = target.squeeze(1) - before  # (n,)
    index = torch.searchsorted(reached, start + need)  # (n,)
    index = torch.minimum(torch.maximum(index, last - counts + 1), last)
    threshold = value[index]  # (n,)

    above = torch.bincount(
        row, weight * (value > threshold[row]), rows
    )  # (n,) candidates beyond the threshold
    at = torch.bincount(row, weight * (value == threshold[row]), rows)  # (n,)
    return threshold, ((need - above) / at).nan_to_num(0.0).clamp(0, 1)
