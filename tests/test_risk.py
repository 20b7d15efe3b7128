"""risk.py against fp64 oracles written from the definitions. x is the cost, p the reference.

A comment `red:` names one-line changes of risk.py that turn the test red.
"""

import inspect
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

import risk

LEVELS = [0.05, 0.5, 0.9, 0.97, 0.99, 1.0]
# fp32 rounds by 6e-8; a cascade sum over 2^17 terms rounds each about 17 times, in the mass and in the value,
# together 2e-6. The same count in fp64 gives 4e-15; the rest is room for the oracle's own cumulative sum.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
MEASURES = {
    "kl": risk.kl,
    "cvar": partial(risk.cvar, confidence_level=0.9),
    "cvar-averse": partial(risk.cvar, confidence_level=0.23),
    "erm": partial(risk.erm, risk_aversion=0.7),
    "published": partial(risk.published, confidence_level=0.9, split=False),
    "published-split": partial(risk.published, confidence_level=0.9, split=True),
}
EVERY = pytest.mark.parametrize("name", MEASURES)


# Each case changes the costs x or the masses p of a random distribution; eps is the spacing of floats at 1.
COSTS = {
    "tied": lambda x, eps: np.round(2 * x) / 2,
    "equal": lambda x, eps: np.full_like(x, 0.3),
    "step-0": lambda x, eps: np.zeros_like(x),
    "signed-zeros": lambda x, eps: np.copysign(np.abs(x) > 1, x),
    "adjacent": lambda x, eps: 1 + eps * np.floor(np.abs(4 * x)),
    "vocabulary": lambda x, eps: 0.5 + 0.1 * x,  # of one sign: every term of the sum rounds the same way
    "flat": lambda x, eps: np.where(x == x.max(), 1e3, 5 + np.round(x)),
    "small": lambda x, eps: 1e-4 * x,
    "large": lambda x, eps: 1e4 * x,
    "spread": lambda x, eps: np.sign(x) * 10 ** np.clip(8 * np.abs(x) - 8, -8, 4),
}
MASSES = {
    "one-hot": lambda x, p, c: 1.0 * (p == p.max()),
    "near-one-hot": lambda x, p, c: np.where(p == p.max(), 1 - 1e-12 * (len(p) - 1), 1e-12),
    # The largest cost has mass c to rounding; the next ones are far below the rounding of c.
    "boundary": lambda x, p, c: np.where(x == x.max(), c, np.where(x == x.min(), 1 - c, 1e-12)),
    "uniform": lambda x, p, c: np.full_like(p, 1 / len(p)),  # c ends between two entries, to rounding
    "flat": lambda x, p, c: np.full_like(p, 1 / len(p)),
    "zeros": lambda x, p, c: p * (p > np.median(p)) / p[p > np.median(p)].sum(),
    "unnormalised": lambda x, p, c: 0.7 * p,
    "peaky": lambda x, p, c: p**4 / (p**4).sum(),  # a few tokens hold nearly everything
}
CASES = list(dict.fromkeys(["random", "unreachable", "single", *COSTS, *MASSES]))


def tensors(case, dtype=torch.float64, c=0.5, seed=0):
    rng = np.random.default_rng(seed)
    size = {"peaky": 50_000, "vocabulary": 150_000, "flat": 150_000, "single": 1}.get(case, 1000)
    x = rng.normal(size=size)
    p = np.exp(2 * rng.normal(size=size))
    p = p / p.sum()
    x = COSTS.get(case, lambda x, eps: x)(x, torch.finfo(dtype).eps)
    p = MASSES.get(case, lambda x, p, c: p)(x, p, c)
    if case == "unreachable":  # no mass at either end
        x[:400] = 1e4 * np.sign(x[:400])
        p[:400] = 0
    return torch.tensor(x, dtype=dtype), torch.tensor(p, dtype=dtype)


def cvar_oracle(x, p, c):
    """Pour mass c sum(p) over the costs from the top: value, q, mass above and down to each, threshold."""
    costs, entry = np.unique(-x, return_inverse=True)  # ascending in -x: the largest cost first
    mass = np.bincount(entry, weights=p, minlength=len(costs))
    after = np.cumsum(mass)
    before = np.concatenate([[0.0], after[:-1]])
    target = c * p.sum()
    poured = np.clip(target - before, 0, mass)
    share = np.divide(poured, mass, out=np.zeros_like(mass), where=mass > 0)
    q = p * share[entry] / c
    threshold = -costs[np.flatnonzero(poured)[-1]]
    return (q * x).sum(), q, before[entry], after[entry], threshold


@DTYPES
@pytest.mark.parametrize("c", LEVELS)
@pytest.mark.parametrize("case", CASES)
def test_cvar_matches_the_oracle(case, c, dtype):
    x, p = tensors(case, dtype, c)
    result = risk.cvar(x.expand(2, -1), p.expand(2, -1), confidence_level=c)  # (2, V): kernels for rows
    assert result.value.dtype == dtype
    xs, ps, q = (t.double().numpy() for t in (x, p, result.weights[1]))
    value, expected, before, after, threshold = cvar_oracle(xs, ps, c)
    mass = ps.sum()
    tolerance = TOLERANCE[dtype] * mass
    scale = (expected * np.abs(xs)).sum() / mass + abs(threshold)
    assert abs(result.value[1].double().item() - value) <= tolerance * scale  # red: torch.einsum over V
    # Rounding of the mass moves weight between neighbours of the threshold: their sum is bounded, entries
    # further away are exact. red: give the threshold nothing, or all of p/c, or share it evenly
    assert np.abs(q - expected).sum() <= 4 * tolerance / c
    eps = torch.finfo(dtype).eps
    inside = after <= c * mass - tolerance
    np.testing.assert_allclose(q[inside], ps[inside] / c, rtol=4 * eps)
    assert not q[before >= c * mass + tolerance].any()
    # The feasible set. red: leave the threshold's share unclamped ("boundary"); target c ("unnormalised")
    assert (q >= 0).all()
    assert (q <= ps / c * (1 + 4 * eps)).all()
    assert abs(q.sum() - mass) <= tolerance


@DTYPES
@pytest.mark.parametrize("c", [0.5, 0.97])
@pytest.mark.parametrize("case", CASES)
def test_cvar_on_a_gpu_is_that_of_a_cpu(case, c, dtype, monkeypatch):
    """The threshold by bisection, here on a CPU: the oracle's, and the histogram's to the last bit but for
    where a rounding of the mass decides. red: two passes less; negative floats not turned; x >= t for x > t"""
    x, p = (part.expand(2, -1) for part in tensors(case, dtype, c))
    on_a_cpu = risk.cvar(x, p, confidence_level=c)
    monkeypatch.setattr(risk, "_by_histogram", risk._by_bisection)
    test_cvar_matches_the_oracle(case, c, dtype)
    on_a_gpu = risk.cvar(x, p, confidence_level=c)
    torch.testing.assert_close(on_a_gpu.value, on_a_cpu.value, rtol=1e-6, atol=1e-12)
    if case not in ("boundary", "uniform", "flat"):
        assert torch.equal(on_a_gpu.state[..., 0], on_a_cpu.state[..., 0])


@pytest.mark.parametrize("c", [0.05, 0.3, 0.75, 0.97, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_cvar_is_the_maximum_over_all_vertices_and_the_minimum_of_the_dual(seed, c):
    """Oracles without a sort: each order of filling is a vertex; Rockafellar and Uryasev's minimum over t."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=5) if seed % 2 else rng.integers(-1, 2, 5).astype(float)
    p = rng.dirichlet(np.ones(5)) * (rng.random(5) < 0.8) + np.eye(5)[0] * 0.1
    best = -math.inf
    for order in itertools.permutations(range(5)):
        filled = np.minimum(np.cumsum(p[list(order)] / c), p.sum())
        best = max(best, np.diff(filled, prepend=0) @ x[list(order)])
    dual = min(t * p.sum() + (p * np.maximum(x - t, 0)).sum() / c for t in x)  # piecewise linear, kinks at x
    result = risk.cvar(torch.tensor(x), torch.tensor(p), confidence_level=c).value.item()
    assert result == pytest.approx(best, abs=1e-13)
    assert result == pytest.approx(dual, abs=1e-13)


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_cvar_of_everything_is_kl_bit_for_bit(case, dtype):
    x, p = tensors(case, dtype)
    everything = risk.cvar(x, p, confidence_level=1.0)
    assert torch.equal(everything.value, risk.kl(x, p).value)
    assert torch.equal(everything.weights, p)
    assert torch.equal(risk.kl(x, p).weights, p)


@pytest.mark.parametrize("c", LEVELS)
@pytest.mark.parametrize("seed", range(5))
def test_cvar_of_a_cost_is_minus_the_lower_tail_of_the_reward(seed, c):
    """docs/paper.md: -Phi(-x), Phi the integral of the quantile function over the lowest share c of a reward.
    red: the lower tail of x"""
    rng = np.random.default_rng(seed)
    x, p = rng.normal(size=30), rng.dirichlet(np.ones(30))
    order = np.argsort(-x)
    reward, ends = -x[order], np.minimum(p[order].cumsum(), c)  # the quantile is constant between two ends
    phi = (reward * np.diff(ends, prepend=0.0)).sum() / c
    value = risk.cvar(torch.tensor(x), torch.tensor(p), confidence_level=c).value.item()
    assert value == pytest.approx(-phi, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_a_smaller_share_is_more_averse_and_never_below_kl(case):
    x, p = tensors(case)
    values = [risk.cvar(x, p, confidence_level=c).value.item() for c in LEVELS]  # red: smallest costs first
    assert all(averse >= neutral - 1e-12 * abs(averse) for averse, neutral in itertools.pairwise(values))


@EVERY
@pytest.mark.parametrize("seed", range(4))
def test_weights_are_the_gradient_of_the_value(name, seed):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.permutation(24) * 0.1 + rng.uniform(-0.03, 0.03, 24))  # no two within 0.04: no kink
    p = torch.tensor(rng.dirichlet(np.ones(24)))
    step = 1e-5 * torch.eye(24, dtype=torch.float64)  # one entry of x moves in each row
    up = MEASURES[name](x + step, p.expand(24, 24)).value  # (24,)
    down = MEASURES[name](x - step, p.expand(24, 24)).value  # (24,)
    torch.testing.assert_close(MEASURES[name](x, p).weights, (up - down) / 2e-5, rtol=0, atol=1e-9)


@DTYPES
@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("case", CASES)
def test_erm_matches_the_oracle(case, mu, dtype):
    x, p = tensors(case, dtype)  # |mu x| exceeds 1e4 in "large" and "spread"
    result = risk.erm(x, p, risk_aversion=mu)
    xs, ps = x.double().numpy(), p.double().numpy()
    top = (mu * xs[ps > 0]).max()
    terms = ps * np.exp(np.minimum(mu * xs - top, 0))  # the minimum only touches entries without mass
    value = (top + math.log(terms.sum()) - math.log(ps.sum())) / mu
    # An exponent carries a rounding of its own size, and counts by its weight in the sum.
    size = np.abs(mu * xs) + np.abs(np.log(np.where(ps > 0, ps, 1)))
    reach = (terms * size).sum() / terms.sum() + (ps * size).sum() / ps.sum() + abs(top)
    tolerance = TOLERANCE[dtype] + 2 * torch.finfo(dtype).eps * reach
    assert abs(result.value.double().item() - value) <= tolerance / mu  # red: no shift; no - lse(log p)
    assert np.abs(result.weights.double().numpy() - terms / terms.sum()).sum() <= 4 * tolerance
    assert not result.weights[p == 0].any()


def test_erm_is_the_maximum_of_its_dual_attained_at_the_weights():
    x, p = tensors("random")
    result = risk.erm(x, p, risk_aversion=0.7)
    other = torch.tensor(np.random.default_rng(1).dirichlet(np.ones(len(p))))
    q = torch.stack([torch.lerp(result.weights, other, share) for share in (0.0, 0.01, 0.5, 1.0)])
    best, *worse = ((q * x).sum(-1) - (q * (q / p).log()).sum(-1) / 0.7).tolist()
    assert result.value.item() == pytest.approx(best, abs=1e-12)  # red: value = sum q x
    assert max(worse) < best


@pytest.mark.parametrize("case", ["random", "tied", "zeros", "peaky", "vocabulary"])
def test_erm_tends_to_kl(case):
    x, p = tensors(case)
    kl = risk.kl(x, p).value.item()
    variance = (p * x.square()).sum().item() - kl**2
    near = risk.erm(x, p, risk_aversion=1e-3).value.item()
    assert near == pytest.approx(kl + 0.5e-3 * variance, abs=2e-6)  # up to O(mu^2). red: no division by mu


@DTYPES
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("c", [0.5, 0.75, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("size", [4, 107, 1000, 2049])  # Q falls on an entry only where that is exact in fp32
@pytest.mark.parametrize("tied", [False, True])
def test_published_matches_torch_quantile(tied, size, c, split, dtype):
    x = torch.tensor(np.random.default_rng(size).normal(size=size)).to(dtype)
    x = (2 * x).round() / 2 if tied else x
    p = torch.tensor(np.random.default_rng(1).dirichlet(np.ones(size))).to(dtype)
    parts = x.double().split([size // 2, size - size // 2] if split else [size])
    mask = torch.cat([part > torch.quantile(part, 1 - c) for part in parts])
    expected = torch.where(mask, p, 0)
    result = risk.published(x, p, confidence_level=c, split=split)
    assert torch.equal(result.weights, expected)  # red: x >= Q; the c-quantile; mid = (V + 1) // 2
    value = (expected.double() * x.double()).sum().item()
    assert result.value.double().item() == pytest.approx(value, abs=TOLERANCE[dtype])


def test_published_defaults_to_the_split_which_sees_the_order_of_the_vocabulary():
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
    p = torch.full((2, 4), 0.25)
    assert risk.published(x, p, confidence_level=0.5).value.tolist() == [1.0, 1.25]  # 3 and 1, 3 and 2
    assert risk.published(x, p, confidence_level=0.5, split=False).value.tolist() == [1.25, 1.25]


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "published-split"])
@pytest.mark.parametrize("case", CASES)
def test_permuting_the_vocabulary_permutes_the_weights(name, case):
    x, p = tensors(case, c=0.9)
    order = torch.tensor(np.random.default_rng(3).permutation(len(x)))
    plain = MEASURES[name](x, p)
    permuted = MEASURES[name](x[order], p[order])
    scale = (plain.weights * x.abs()).sum().item() + 1e-3
    assert permuted.value.item() == pytest.approx(plain.value.item(), abs=1e-11 * scale)
    torch.testing.assert_close(permuted.weights, plain.weights[order], rtol=1e-9, atol=1e-12)


@EVERY
def test_translation_and_scale(name):
    """value(x + a) = value(x) + a sum(weights): sum(p) for kl and cvar, 1 for erm, else the mass above Q."""
    x, p = tensors("unnormalised")
    x = (x * 64).round() / 64  # adding 2.5 and multiplying by 3 are exact
    plain = MEASURES[name](x, p)
    shifted = MEASURES[name](x + 2.5, p)
    mass = {"kl": 0.7, "cvar": 0.7, "cvar-averse": 0.7, "erm": 1.0}.get(name, plain.weights.sum().item())
    assert shifted.value.item() == pytest.approx(plain.value.item() + 2.5 * mass, abs=1e-12)
    torch.testing.assert_close(shifted.weights, plain.weights, rtol=1e-9, atol=1e-14)
    scaled = MEASURES[name](3 * x, p) if name != "erm" else risk.erm(3 * x, p, risk_aversion=0.7 / 3)
    assert scaled.value.item() == pytest.approx(3 * plain.value.item(), abs=1e-12)  # positive homogeneity
    torch.testing.assert_close(scaled.weights, plain.weights, rtol=1e-9, atol=1e-14)


@EVERY
@DTYPES
@pytest.mark.parametrize("shape", [(), (7,), (3, 2)])
def test_leading_axes_are_independent_rows(name, dtype, shape):
    cases = ["random", "tied", "zeros", "small", "large", "unreachable", "near-one-hot"]
    rows = [tensors(case, dtype) for case in cases[: math.prod(shape)]]
    x, p = (torch.stack(part).reshape(*shape, -1) for part in zip(*rows, strict=True))
    strided = x[..., None].expand(*x.shape, 2).contiguous()[..., 1]  # a view whose last stride is 2
    for result in (MEASURES[name](x, p), MEASURES[name](strided, p)):  # red: x.view(-1, V); one Q for all
        assert result.value.shape == shape
        assert result.weights.shape == x.shape
        assert result.state is None or result.state.shape[:-1] == shape
        for index, row in zip(np.ndindex(shape), rows, strict=True):
            alone = MEASURES[name](*row)
            torch.testing.assert_close(result.value[index], alone.value, rtol=1e-5, atol=TOLERANCE[dtype])
            torch.testing.assert_close(result.weights[index], alone.weights, rtol=1e-5, atol=TOLERANCE[dtype])


@EVERY
@DTYPES
@pytest.mark.parametrize("case", [case for case in CASES if case != "single"])  # one entry has no second half
def test_state_replays_the_result_bit_for_bit_without_a_graph_or_a_write(name, dtype, case):
    x, p = tensors(case, dtype)
    x = torch.stack([x, x.flip(0)]).requires_grad_()
    p = torch.stack([p, p])
    before = x.detach().clone(), p.clone()
    first = MEASURES[name](x, p)
    again = MEASURES[name](x, p, first.state)
    assert all(map(torch.equal, again[:2], first[:2]))  # red: keep the threshold in fewer bits than x has
    assert not any(t is not None and t.requires_grad for t in first + again)  # red: build it outside no_grad
    assert torch.equal(x, before[0])  # red: scale or clamp the input in place
    assert torch.equal(p, before[1])


@pytest.mark.parametrize("name", ["cvar", "published"])
@pytest.mark.parametrize("c", [0.0, -0.1, 1.0001, math.inf, math.nan])
def test_confidence_level_out_of_range(name, c):
    with pytest.raises(ValueError, match="confidence_level"):
        getattr(risk, name)(*tensors("random"), confidence_level=c)


@pytest.mark.parametrize("mu, dtype", [(0.0, torch.float64), (-1.0, torch.float64), (0.0099, torch.float32)])
def test_risk_aversion_out_of_range(mu, dtype):
    with pytest.raises(ValueError, match="risk_aversion"):
        risk.erm(*tensors("random", dtype), risk_aversion=mu)


def test_defaults():
    assert inspect.signature(risk.cvar).parameters["confidence_level"].default == 0.97
    assert inspect.signature(risk.erm).parameters["risk_aversion"].default == 1.0
    assert inspect.signature(risk.published).parameters["confidence_level"].default == 0.97
