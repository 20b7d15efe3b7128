"""losses.py against oracles in Python floats written from the equations, one pair at a time.

Axis 0 is (chosen, rejected). A comment `red:` names one-line changes of losses.py that turn a test red.
"""

import inspect
import math
import re
import typing

import pytest
import torch

import losses

# What each loss asks for: positional statistics, and keyword-only hyper-parameters with their defaults.
ASKS = {
    "dpo": (["policy_logps", "ref_logps"], {"beta": 0.1}),
    "cdpo": (["policy_logps", "ref_logps"], {"beta": 0.1, "epsilon": 0.2}),
    "ipo": (["policy_logps", "ref_logps", "lengths"], {"tau": 0.1}),
    "tdpo1": (["policy_logps", "ref_logps", "kl"], {"beta": 0.1}),
    "tdpo2": (["policy_logps", "ref_logps", "kl"], {"beta": 0.1, "alpha": 0.5}),
    "ra_dpo1": (["policy_logps", "ref_logps", "risk"], {"beta": 0.1}),
    "ra_dpo2": (["policy_logps", "ref_logps", "risk"], {"beta": 0.1, "alpha": 0.5}),
}
OTHER_HYPER = {"beta": 0.37, "epsilon": 0.05, "tau": 0.6, "alpha": 1.7}
PAIR = pytest.mark.parametrize("name", ASKS)
SEQUENTIAL = [name for name in ASKS if "tdpo" in name or "ra_dpo" in name]  # they read a kl or a risk
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def batch(dtype=torch.float64, size=16, seed=0):
    """Statistics of `size` pairs: log-probabilities of -80 to -20 nats, drifts of a few nats."""
    g = torch.Generator().manual_seed(seed)
    ref_logps = -80 + 60 * torch.rand(2, size, generator=g, dtype=torch.float64)
    drift = torch.rand(2, 2, size, generator=g, dtype=torch.float64) * 6
    values = {
        "policy_logps": ref_logps + 8 * torch.randn(2, size, generator=g, dtype=torch.float64),
        "ref_logps": ref_logps,
        "kl": drift[0],
        "risk": drift[1],
    }
    values = {name: value.to(dtype) for name, value in values.items()}
    return values | {"lengths": torch.randint(1, 40, (2, size), generator=g)}


def call(name, values, **hyper):
    return getattr(losses, name)(*(values[statistic] for statistic in ASKS[name][0]), **hyper)


def leaves(values):
    """The same statistics as leaves that collect gradients, the reference and the lengths left alone."""
    return {
        name: value.clone().requires_grad_() if name in ("policy_logps", "kl", "risk") else value
        for name, value in values.items()
    }


def softplus(d):
    """-log sigmoid(-d)"""
    return max(d, 0.0) + math.log1p(math.exp(-abs(d)))


def oracle(name, pair, beta=None, epsilon=None, tau=None, alpha=1.0):
    """One pair of Python floats: its loss, the two rewards, the two own rewards."""
    (pw, pl), (rw, rl) = pair["policy_logps"], pair["ref_logps"]
    delta = (pw - rw) - (pl - rl)
    if name == "ipo":
        nw, nl = pair["lengths"]
        h = (pw - rw) / nw - (pl - rl) / nl
        return (h - 1 / (2 * tau)) ** 2, [tau * (pw - rw) / nw, tau * (pl - rl) / nl], None
    rewards = [beta * (pw - rw), beta * (pl - rl)]
    if name == "dpo":
        return softplus(-beta * delta), rewards, None
    if name == "cdpo":
        return (1 - epsilon) * softplus(-beta * delta) + epsilon * softplus(beta * delta), rewards, None
    xw, xl = pair["kl" if name.startswith("tdpo") else "risk"]
    own = [beta * (pw - rw + xw), beta * (pl - rl + xl)]
    return softplus(-beta * (delta - alpha * (xl - xw))), rewards, own


@PAIR
@DTYPES
@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "other"])
def test_values_match_the_oracle(name, dtype, changed):
    values = batch(dtype)
    hyper = {key: OTHER_HYPER[key] for key in ASKS[name][1]} if changed else {}
    result = call(name, leaves(values), **hyper)
    assert result.losses.dtype == result.rewards.dtype == dtype
    assert result.losses.shape == (16,)
    assert result.rewards.shape == (2, 16)
    # fp32: differences of logps up to 100 round by 100 x 6e-8 a few times, which is 2e-5 nats before beta
    close = {"rel": 1e-5, "abs": 1e-5} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-12}
    for i in range(16):
        pair = {key: value[:, i].tolist() for key, value in values.items()}
        loss, rewards, own = oracle(name, pair, **ASKS[name][1] | hyper)
        assert result.losses[i].item() == pytest.approx(loss, **close)
        assert result.rewards[:, i].tolist() == pytest.approx(rewards, **close)
        if own is not None:  # red: put the drift into rewards, leave it out of own
            assert result.own[:, i].tolist() == pytest.approx(own, **close)
    assert (result.own is not None) == (name in SEQUENTIAL)
    assert result.losses.requires_grad
    assert not result.rewards.requires_grad  # red: drop a detach
    assert result.own is None or not result.own.requires_grad


@PAIR
def test_policy_equal_to_reference(name):
    values = batch()
    values["policy_logps"] = values["ref_logps"].clone()
    values["kl"] = values["risk"] = torch.zeros(2, 16, dtype=torch.float64)
    result = call(name, values)
    expected = 1 / (4 * 0.1**2) if name == "ipo" else math.log(2)
    assert result.losses.tolist() == pytest.approx([expected] * 16, rel=1e-14)
    assert not result.rewards.any()
    assert result.own is None or not result.own.any()


@PAIR
def test_gradient_raises_the_chosen_and_lowers_the_rejected(name):
    values = batch()
    values["policy_logps"] = torch.lerp(values["ref_logps"], values["policy_logps"], 0.01)
    values = leaves(values)
    call(name, values).losses.sum().backward()
    chosen, rejected = values["policy_logps"].grad
    assert (chosen < 0).all()  # red: swap chosen and rejected
    assert (rejected > 0).all()
    if name != "ipo":  # there each side is divided by its own length
        torch.testing.assert_close(chosen, -rejected, rtol=1e-12, atol=0)


@PAIR
def test_gradcheck(name):
    values = batch(size=5)

    def through(policy_logps, drift):
        return call(name, values | {"policy_logps": policy_logps, "kl": drift, "risk": drift}).losses

    stopped = name.endswith("2")  # their X_w has a value but no gradient: below
    drift = values["kl"].clone().requires_grad_(not stopped)
    assert torch.autograd.gradcheck(through, (values["policy_logps"].requires_grad_(), drift))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_gradient_through_the_sequential_kl_or_risk(name):
    """d loss / d X_l = beta alpha sigmoid(-beta margin); d loss / d X_w is minus that, or exactly 0."""
    values = leaves(batch())
    x = values[ASKS[name][0][2]]
    hyper = {key: OTHER_HYPER[key] for key in ASKS[name][1]}
    loss = call(name, values, **hyper).losses
    loss.sum().backward()
    # loss = -log sigmoid(beta margin), so sigmoid(-beta margin) = 1 - exp(-loss)
    slope = -torch.expm1(-loss.detach()) * hyper["beta"] * hyper.get("alpha", 1.0)
    torch.testing.assert_close(x.grad[1], slope, rtol=1e-9, atol=1e-15)
    if name.endswith("2"):
        assert not x.grad[0].any()  # red: drop the detach, or put it on X_l
    else:
        torch.testing.assert_close(x.grad[0], -slope, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", [name for name in ASKS if name not in ("ipo", "cdpo")])
def test_a_pair_and_its_swap_are_the_two_outcomes_of_one_choice(name):
    values = batch()
    swapped = {key: value.flip(0) for key, value in values.items()}
    probability = (-call(name, values).losses).exp() + (-call(name, swapped).losses).exp()
    torch.testing.assert_close(probability, torch.ones(16).double(), rtol=1e-14, atol=0)


def test_special_cases_that_are_other_losses():
    values = batch()
    dpo = losses.dpo(values["policy_logps"], values["ref_logps"], beta=0.3).losses
    still = values | {"kl": torch.zeros(2, 16, dtype=torch.float64)}
    same = {"rtol": 1e-14, "atol": 0}
    torch.testing.assert_close(call("cdpo", values, beta=0.3, epsilon=0.0).losses, dpo, **same)
    torch.testing.assert_close(call("tdpo1", still, beta=0.3).losses, dpo, **same)
    torch.testing.assert_close(call("tdpo2", values, beta=0.3, alpha=0.0).losses, dpo, **same)
    tdpo1 = call("tdpo1", values, beta=0.3).losses
    torch.testing.assert_close(call("tdpo2", values, beta=0.3, alpha=1.0).losses, tdpo1, **same)
    neutral = values | {"risk": values["kl"]}
    for number in "12":
        ours, theirs = call("ra_dpo" + number, neutral), call("tdpo" + number, neutral)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@PAIR
@DTYPES
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_ratios_stay_finite(name, dtype, beta, sign):
    values = batch(dtype)
    values["policy_logps"] = values["ref_logps"] + sign * torch.tensor([[1e4], [-1e4]], dtype=dtype)
    values = leaves(values)
    result = call(name, values, **({"tau": beta} if name == "ipo" else {"beta": beta}))
    result.losses.sum().backward()
    gradient = values["policy_logps"].grad
    assert result.losses.isfinite().all()  # red: -sigmoid(.).log(), log(1 + exp(.))
    assert gradient.isfinite().all()
    if sign < 0 and name not in ("ipo", "cdpo"):  # linear here: the pull must be full
        torch.testing.assert_close(gradient, beta * torch.tensor([[-1.0], [1.0]], dtype=dtype).expand(2, 16))
        assert (result.losses > 0.99 * beta * 2e4).all()


@DTYPES
def test_sft_is_the_negative_log_probability_of_each_token(dtype):
    logps = -torch.rand(9, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 10
    leaf = logps.clone().requires_grad_()
    result = losses.sft(leaf)
    assert torch.equal(result.losses, -logps)
    assert torch.equal(result.rewards, logps)
    assert not result.rewards.requires_grad
    assert result.own is None
    result.losses.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(logps, -1))
    assert torch.equal(leaf, logps)


@PAIR
def test_inputs_are_not_written_to(name):
    values = batch()
    before = {key: value.clone() for key, value in values.items()}
    call(name, values)
    assert all(torch.equal(values[key], before[key]) for key in values)  # red: policy_logps.sub_(ref_logps)


RANGES = {
    "beta": ([0.0, -0.1, math.inf, math.nan], [1e-3, 10.0]),
    "epsilon": ([-0.01, 0.5, 1.0, math.nan], [0.0, 0.49]),
    "tau": ([0.0, -1.0, math.nan], [1e-3, 10.0]),
    "alpha": ([-0.1, math.nan], [0.0, 2.0]),
}


@pytest.mark.parametrize("name, hyper", [(name, key) for name, asks in ASKS.items() for key in asks[1]])
def test_hyper_parameters_out_of_range(name, hyper):
    wrong, right = RANGES[hyper]
    for value in wrong:
        with pytest.raises(ValueError, match=hyper):
            call(name, batch(), **{hyper: value})
    for value in right:
        assert call(name, batch(), **{hyper: value}).losses.isfinite().all()


def public_losses():
    for name, function in inspect.getmembers(losses, inspect.isfunction):
        if not name.startswith("_") and typing.get_type_hints(function).get("return") is losses.Loss:
            yield name, function


def test_every_public_loss_can_be_asked_what_it_needs():
    """Signatures are read: statistics are positional, hyper-parameters keyword-only with defaults."""
    found = dict(public_losses())
    assert {*ASKS, "sft"} <= set(found)
    for name, function in found.items():
        parameters = inspect.signature(function).parameters.values()
        statistics = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        hyper = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert len(statistics) + len(hyper) == len(parameters), name
        assert all(p.default is p.empty for p in statistics), name
        assert inspect.Parameter.empty not in hyper.values(), name
        if name in ASKS:
            assert ([p.name for p in statistics], hyper) == ASKS[name]


def test_every_public_loss_states_its_equation():
    for name, function in public_losses():
        text = inspect.getdoc(function) or ""
        assert re.search(r"=|-\s*log|\^|\*\*", text), f"{name}: no equation"
        for p in inspect.signature(function).parameters.values():
            assert p.kind is not p.KEYWORD_ONLY or p.name in text, f"{name}: no {p.name} in its docstring"
