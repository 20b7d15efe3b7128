"""losses.py: what the losses ask for, and the pair losses against oracles in Python floats.

Oracles are written from the equations, one pair at a time; axis 0 is (chosen, rejected). The losses of
single answers, and what every loss must satisfy, are in test_losses_unary.py. A comment `red:` names
one-line changes of losses.py that turn a test red.
"""

import inspect
import math
import operator
import random
import typing
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import losses

LOGPS, TOKENS = "policy_logps ref_logps", "token_policy_logps token_ref_logps token_logratios"
WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
# What each loss asks for: positional statistics, and keyword-only hyper-parameters with their defaults.
ASKS = {
    "dpo": (LOGPS, {"beta": 0.1}),
    "cdpo": (LOGPS, {"beta": 0.1, "epsilon": 0.2}),
    "robust_dpo": (LOGPS, {"beta": 0.1, "epsilon": 0.2}),
    "odpo": (LOGPS + " margins", {"beta": 0.1}),
    "dpo_norm": (LOGPS + " lengths", {"beta": 5.0}),
    "wpo": (LOGPS + " lengths", {"beta": 0.1}),
    "ipo": (LOGPS + " lengths", {"tau": 0.1}),
    "hinge": (LOGPS, {"beta": 0.1}),
    "exo": (LOGPS, {"beta": 0.1, "epsilon": 0.001}),
    "nca": (LOGPS, {"beta": 0.01}),
    "bco_pair": (LOGPS + " delta", {"beta": 0.1}),
    "sppo_hard": (LOGPS, {"beta": 0.001}),
    "apo_zero": (LOGPS, {"beta": 0.1}),
    "apo_down": (LOGPS, {"beta": 0.1}),
    "discopop": (LOGPS, {"beta": 0.1, "tau": 0.2}),
    "tdpo1": (LOGPS + " kl", {"beta": 0.1}),
    "tdpo2": (LOGPS + " kl", {"beta": 0.1, "alpha": 0.5}),
    "ra_dpo1": (LOGPS + " risk", {"beta": 0.1}),
    "ra_dpo2": (LOGPS + " risk", {"beta": 0.1, "alpha": 0.5}),
    "slic": ("policy_logps", {"margin": 1.0, "sft_weight": 0.1}),
    "simpo": ("policy_logps lengths", {"beta": 2.0, "gamma": 1.0}),
    "cpo": ("policy_logps lengths", {"beta": 0.1, "sft_weight": 1.0}),
    "orpo": ("policy_logps lengths", {"beta": 0.1}),
    "bradley_terry": ("sequence_scores margins", {"center_weight": 0.0}),
    "kto": (LOGPS + " desirable kl_estimate", {"beta": 0.1} | WEIGHTS),
    "kto_token_max": (LOGPS + " desirable kl_token_max", {"beta": 0.1} | WEIGHTS),
    "kto_zero": (LOGPS + " desirable", {"beta": 0.1} | WEIGHTS),
    "bco": (LOGPS + " desirable delta", {"beta": 0.1}),
    "apo_zero_unpaired": (LOGPS + " desirable", {"beta": 0.1}),
    "ppo": (
        TOKENS + " token_values token_entropy token_advantages token_returns",
        {"clip": 0.5, "value_weight": 0.01, "kl_weight": 0.1, "entropy_weight": 0.0},
    ),
    "grpo": (TOKENS + " response lengths scores group", {"beta": 0.04, "epsilon": 0.2, "std_floor": 0.01}),
    "sft": ("token_policy_logps", {}),
}
ASKS = {name: (statistics.split(), hyper) for name, (statistics, hyper) in ASKS.items()}

# Every statistic a loss may ask for: where its axis comes from, and its range (the type is the range's).
STATISTICS = {
    "policy_logps": ("answer", -80.0, 0.0),
    "ref_logps": ("answer", -80.0, 0.0),
    "lengths": ("answer", 1, 40),
    "kl": ("answer", 0.0, 6.0),
    "risk": ("answer", -1.0, 6.0),
    "sequence_scores": ("answer", -4.0, 4.0),
    "margins": ("unit", -1.0, 2.0),
    "desirable": ("unit", False, True),
    "kl_token_max": ("unit", -2.0, 4.0),
    "scores": ("unit", -2.0, 2.0),
    "group": ("unit", 0, 2),
    "delta": ("scalar", -1.0, 1.0),
    "kl_estimate": ("scalar", -10.0, 20.0),
    "response": ("response", 0, 0),
    "token_policy_logps": ("token", -6.0, 0.0),
    "token_ref_logps": ("token", -6.0, 0.0),
    "token_logratios": ("token", -4.0, 4.0),  # not the difference of the two: it may be clamped
    "token_values": ("token", -2.0, 2.0),
    "token_entropy": ("token", 0.0, 5.0),
    "token_advantages": ("token", -2.0, 2.0),
    "token_returns": ("token", -2.0, 2.0),
}
LEARNT = ("policy_logps", "token_policy_logps", "kl", "risk", "sequence_scores", "token_values")
LEARNT += ("token_entropy", "token_logratios")


def public_losses():
    for name, function in inspect.getmembers(losses, inspect.isfunction):
        if not name.startswith("_") and typing.get_type_hints(function).get("return") is losses.Loss:
            yield name, function


PUBLIC = dict(public_losses())


def asked(name):
    """The statistics and the hyper-parameters of a loss, from its signature alone."""
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    statistics = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    unknown = [statistic for statistic in statistics if statistic not in STATISTICS]
    if unknown:
        pytest.fail(f"{name} asks for {unknown}: say in STATISTICS what shape and range that has")
    return statistics, {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def on_pairs(names):
    alone = {"desirable", "scores", "group", "response", "kl_token_max"}
    return not any(name in alone or name.startswith("token_") for name in names)


PAIRS = [name for name, asks in ASKS.items() if on_pairs(asks[0])]
PAIR = pytest.mark.parametrize("name", PAIRS)
SEQUENTIAL = [name for name in ASKS if "tdpo" in name or "ra_dpo" in name]  # they read a kl or a risk
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
CHANGED = pytest.mark.parametrize("changed", [False, True], ids=["defaults", "other"])


def seeded(seed):
    """Draws numbers that float32 holds exactly, so that the oracle sees what losses.py sees."""
    rng = random.Random(seed)

    def draw(low, high):
        if isinstance(low, float):
            return round(rng.uniform(low, high) * 1024) / 1024
        return type(low)(rng.randint(low, high))

    return draw


def draw_unit(names, draw):
    """One pair, response or token: its value of each statistic, a list of two for the answers of a pair."""
    unit = {"tokens": draw(1, 3)} if "response" in names else {}
    for name in names:
        axis, low, high = STATISTICS[name]
        if axis in ("scalar", "response"):
            continue
        if name == "lengths" and "tokens" in unit:
            unit[name] = unit["tokens"]
        elif axis == "answer" and on_pairs(names):
            unit[name] = [draw(low, high) for _ in range(2)]
        elif axis == "token" and "tokens" in unit:
            unit[name] = [draw(low, high) for _ in range(unit["tokens"])]
        else:
            unit[name] = draw(low, high)
    return unit


def draw_scalars(names, draw):
    return {name: draw(*STATISTICS[name][1:]) for name in names if STATISTICS[name][0] == "scalar"}


def assemble(names, units, scalars, dtype=torch.float64):
    """The tensors a loss is called with: (2, units), (units,), (tokens,) or ()."""
    values = {}
    for name in names:
        axis, low, _ = STATISTICS[name]
        kind = dtype if isinstance(low, float) else torch.bool if isinstance(low, bool) else torch.long
        if axis == "scalar":
            value = scalars[name]
        elif axis == "response":
            value = [i for i, unit in enumerate(units) for _ in range(unit["tokens"])]
        elif axis == "token" and "tokens" in units[0]:
            value = [x for unit in units for x in unit[name]]
        else:
            value = [unit[name] for unit in units]
        value = torch.tensor(value, dtype=kind)
        values[name] = value.T.contiguous() if value.ndim == 2 else value
    return values


def batch(name, dtype=torch.float64, size=16, seed=0):
    """Random units of a loss, its scalars, and both as tensors."""
    names, draw = asked(name)[0], seeded(seed)
    units, scalars = [draw_unit(names, draw) for _ in range(size)], draw_scalars(names, draw)
    return units, scalars, assemble(names, units, scalars, dtype)


def other_hyper(name):
    """Valid hyper-parameters that are not the defaults."""
    return {key: round(1.4 * default + 0.03, 4) for key, default in asked(name)[1].items()}


def call(name, values, **hyper):
    return PUBLIC[name](*(values[statistic] for statistic in asked(name)[0]), **hyper)


def leaves(values):
    """The same statistics, those that carry gradients in training as leaves."""
    return {k: v.clone().requires_grad_() if k in LEARNT else v for k, v in values.items()}


def at_reference(values):
    """Policy = reference, no drift; without a reference, chosen = rejected."""
    values = dict(values)
    for policy, ref in ("policy_logps", "ref_logps"), ("token_policy_logps", "token_ref_logps"):
        if ref in values:
            values[policy] = values[ref].clone()
    for name in {"kl", "risk", "token_logratios"} & set(values):
        values[name] = torch.zeros_like(values[name])
    if not {"ref_logps", "token_ref_logps"} & set(values):
        for name in {"policy_logps", "lengths", "sequence_scores"} & set(values):
            values[name] = values[name][:1].repeat(2, 1)
    return values


def softplus(d):
    """-log sigmoid(-d)"""
    return max(d, 0.0) + math.log1p(math.exp(-abs(d)))


def sigmoid(d):
    return (1 + math.tanh(d / 2)) / 2


def log_odds(a):
    return a - math.log(-math.expm1(a))


# x: hyper-parameters; w, l the log-ratios, d = w - l; pw, pl the log-probabilities, aw, al over the length
# nw, nl; xw, xl the drifts; s the scores, m the margin.
ORACLES = {
    "dpo": lambda x: softplus(-x.beta * x.d),
    "cdpo": lambda x: (1 - x.epsilon) * softplus(-x.beta * x.d) + x.epsilon * softplus(x.beta * x.d),
    "robust_dpo": lambda x: (
        (1 - x.epsilon) * softplus(-x.beta * x.d) - x.epsilon * softplus(x.beta * x.d)
    ) / (1 - 2 * x.epsilon),
    "odpo": lambda x: softplus(x.m - x.beta * x.d),
    "dpo_norm": lambda x: softplus(-x.beta * (x.w / x.nw - x.l / x.nl)),
    "wpo": lambda x: math.exp(x.aw) * math.exp(x.al) * softplus(-x.beta * x.d),
    "ipo": lambda x: (x.w / x.nw - x.l / x.nl - 1 / (2 * x.tau)) ** 2,
    "hinge": lambda x: max(0.0, 1 - x.beta * x.d),
    "exo": lambda x: sum(
        sigmoid(rho) * (-softplus(-rho) - math.log(p))
        for rho, p in ((x.beta * x.d, 1 - x.epsilon), (-x.beta * x.d, x.epsilon))
    ),
    "nca": lambda x: softplus(-x.beta * x.w) + (softplus(x.beta * x.w) + softplus(x.beta * x.l)) / 2,
    "bco_pair": lambda x: softplus(x.delta - x.beta * x.w) + softplus(x.beta * x.l - x.delta),
    "sppo_hard": lambda x: (x.w - 1 / (2 * x.beta)) ** 2 + (x.l + 1 / (2 * x.beta)) ** 2,
    "apo_zero": lambda x: 1 - sigmoid(x.beta * x.w) + sigmoid(x.beta * x.l),
    "apo_down": lambda x: sigmoid(x.beta * x.w) + 1 - sigmoid(x.beta * (x.w - x.l)),
    "discopop": lambda x: (
        sigmoid(-x.beta * x.d / x.tau) * softplus(-x.beta * x.d)
        # sigmoid(a) exp(-b) = exp(-softplus(-a) - b)
        + math.exp(-softplus(-x.beta * x.d / x.tau) - x.beta * x.d)
    ),
    **dict.fromkeys(("tdpo1", "ra_dpo1"), lambda x: softplus(-x.beta * (x.d - x.xl + x.xw))),
    **dict.fromkeys(("tdpo2", "ra_dpo2"), lambda x: softplus(-x.beta * (x.d - x.alpha * (x.xl - x.xw)))),
    "slic": lambda x: max(0.0, x.margin - x.pw + x.pl) - x.sft_weight * x.pw,
    "simpo": lambda x: softplus(x.gamma - x.beta * (x.aw - x.al)),
    "cpo": lambda x: softplus(-x.beta * (x.pw - x.pl)) - x.sft_weight * x.aw,
    "orpo": lambda x: -x.aw + x.beta * softplus(log_odds(x.al) - log_odds(x.aw)),
    "bradley_terry": lambda x: softplus(x.m - x.s[0] + x.s[1]) + x.center_weight * sum(x.s) ** 2,
}
REWARDS = {
    "dpo_norm": lambda x: [x.beta * x.w / x.nw, x.beta * x.l / x.nl],
    "ipo": lambda x: [x.tau * x.w / x.nw, x.tau * x.l / x.nl],
    "slic": lambda x: [x.pw, x.pl],
    "simpo": lambda x: [x.beta * x.aw, x.beta * x.al],
    "cpo": lambda x: [x.beta * x.pw, x.beta * x.pl],
    "orpo": lambda x: [x.beta * x.aw, x.beta * x.al],
    "bradley_terry": lambda x: x.s,
}


def oracle(name, unit, **known):
    """One pair: its loss, the two rewards, the two own rewards."""
    zeros = [0.0, 0.0]
    x = SimpleNamespace(**known, s=unit.get("sequence_scores"), m=unit.get("margins"))
    x.pw, x.pl = unit.get("policy_logps", zeros)
    x.w, x.l = (p - r for p, r in zip((x.pw, x.pl), unit.get("ref_logps", zeros), strict=True))
    x.d, (x.nw, x.nl) = x.w - x.l, unit.get("lengths", [1, 1])
    x.aw, x.al = x.pw / x.nw, x.pl / x.nl
    x.xw, x.xl = unit.get("kl", unit.get("risk", zeros))
    own = None
    if name in SEQUENTIAL:
        share = known.get("alpha", 1.0)
        own = [x.beta * (x.w + share * x.xw), x.beta * (x.l + share * x.xl)]
    return ORACLES[name](x), REWARDS.get(name, lambda x: [x.beta * x.w, x.beta * x.l])(x), own


@PAIR
@DTYPES
@CHANGED
def test_values_match_the_oracle(name, dtype, changed):
    units, scalars, values = batch(name, dtype)
    hyper = other_hyper(name) if changed else {}
    result = call(name, leaves(values), **hyper)
    # fp32: differences of logps up to 80 round by 80 x 6e-8 a few times, which is 2e-5 nats before beta
    close = {"rel": 1e-5, "abs": 2e-5} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-12}
    for i, unit in enumerate(units):
        loss, rewards, own = oracle(name, unit, **scalars, **ASKS[name][1] | hyper)
        assert result.losses[i].item() == pytest.approx(loss, **close)
        assert result.rewards[:, i].tolist() == pytest.approx(rewards, **close)
        if own is not None:  # red: put the drift into rewards, leave it out of own
            assert result.own[:, i].tolist() == pytest.approx(own, **close)
        if own is not None:  # red: leave alpha out of own
            assert softplus(own[1] - own[0]) == pytest.approx(loss, **close)
    assert (result.own is not None) == (name in SEQUENTIAL)
    assert result.own is None or not result.own.requires_grad  # red: drop a detach
    assert result.losses.requires_grad


LOG2 = math.log(2)
HALF = {  # one pair at policy = reference, or, without a reference, with chosen = rejected
    **dict.fromkeys("dpo cdpo robust_dpo dpo_norm tdpo1 tdpo2 ra_dpo1 ra_dpo2".split(), lambda u, x: LOG2),
    "odpo": lambda u, x: math.log1p(math.exp(u["margins"])),
    "wpo": lambda u, x: LOG2 * math.exp(sum(map(operator.truediv, u["ref_logps"], u["lengths"]))),
    "ipo": lambda u, x: 25.0,  # 1 / (4 tau^2)
    "hinge": lambda u, x: 1.0,
    "exo": lambda u, x: -math.log(4 * 0.001 * 0.999) / 2,
    "nca": lambda u, x: 2 * LOG2,
    "bco_pair": lambda u, x: math.log(2 + 2 * math.cosh(x["delta"])),  # both sides of sigmoid(delta)
    "sppo_hard": lambda u, x: 5e5,  # 1 / (2 beta^2)
    "apo_zero": lambda u, x: 1.0,
    "apo_down": lambda u, x: 1.0,
    "discopop": lambda u, x: (LOG2 + 1) / 2,
    "slic": lambda u, x: 1 - 0.1 * u["policy_logps"][0],
    "simpo": lambda u, x: math.log1p(math.e),
    "cpo": lambda u, x: LOG2 - u["policy_logps"][0] / u["lengths"][0],
    "orpo": lambda u, x: 0.1 * LOG2 - u["policy_logps"][0] / u["lengths"][0],
    "bradley_terry": lambda u, x: math.log1p(math.exp(u["margins"])),
}


@PAIR
def test_policy_equal_to_reference(name):
    units, scalars, values = batch(name)
    result = call(name, at_reference(values))
    assert result.losses.tolist() == pytest.approx([HALF[name](unit, scalars) for unit in units], rel=1e-13)
    if "ref_logps" in values:
        assert not result.rewards.any()
    assert result.own is None or not result.own.any()


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("apo_down", "slic")])
def test_gradient_raises_the_chosen_and_lowers_the_rejected(name):
    """Near the reference. The exceptions have tests of their own below."""
    *_, values = batch(name)
    if "ref_logps" in values:
        values["policy_logps"] = torch.lerp(values["ref_logps"], values["policy_logps"], 0.01)
    values = leaves(values)
    call(name, values).losses.sum().backward()
    chosen, rejected = next(values[key] for key in LEARNT if key in values).grad
    assert (chosen < 0).all()  # red: swap chosen and rejected
    assert (rejected > 0).all()
    one_margin = {*SEQUENTIAL, "dpo", "cdpo", "robust_dpo", "odpo", "wpo", "hinge", "exo", "bradley_terry"}
    if name in one_margin:  # the others divide by a length, or see each answer alone
        torch.testing.assert_close(chosen, -rejected, rtol=1e-12, atol=0)


def pair_gradient(name, chosen, rejected, **hyper):
    """d loss / d logp of one-token pairs with these log-ratios."""
    policy = torch.tensor([chosen, rejected], dtype=torch.float64).requires_grad_()
    values = {"policy_logps": policy, "ref_logps": torch.zeros(policy.shape, dtype=torch.float64)}
    values["lengths"] = torch.ones(policy.shape, dtype=torch.long)
    call(name, values, **hyper).losses.sum().backward()
    return policy.grad


TARGETS = {  # the chosen log-ratio, the rejected one at 0, where the gradient changes its sign
    "cdpo": math.log(4) / 0.1,
    "exo": math.log(999) / 0.1,
    "ipo": 5.0,
    "sppo_hard": 500.0,
    "nca": math.log(2) / 0.01,  # sigmoid(beta r_w) = 2/3: it then lowers a chosen answer
}


@pytest.mark.parametrize("name", TARGETS)
def test_gradient_turns_at_the_target(name):
    chosen, rejected = pair_gradient(name, [0.99 * TARGETS[name], 1.01 * TARGETS[name]], [0.0, 0.0])
    # red: epsilon in the wrong place, tau for 2 tau, 1 / beta for 1 / (2 beta)
    assert chosen[0] < 0 < chosen[1]
    if name in ("cdpo", "exo", "ipo"):
        torch.testing.assert_close(chosen, -rejected, rtol=1e-12, atol=0)
    else:
        assert (rejected > 0).all()


def test_gradient_of_the_hinges_ends_at_the_margin():
    assert pair_gradient("hinge", [9.9, 10.1], [0.0, 0.0]).tolist() == [[-0.1, 0.0], [0.1, 0.0]]
    chosen, rejected = pair_gradient("slic", [-1.0, -1.0], [-1.9, -2.1])
    assert rejected.tolist() == [1.0, 0.0]
    assert chosen.tolist() == [-1.1, -0.1]  # red: put the regulariser on the rejected, or under the max


def test_gradient_of_apo_down():
    """Of the chosen beta [s'(beta r_w) - s'(beta Delta)], s' falling with |.|: it is lowered only where the
    two answers are farther apart than the chosen is from the reference. The rejected is always lowered."""
    r_w, r_l = torch.tensor([-2.0, 2.0, -2.0, 0.5, 0.0]), torch.tensor([-7.0, -1.0, -2.5, 0.1, 0.0])
    chosen, rejected = pair_gradient("apo_down", r_w.tolist(), r_l.tolist())
    assert chosen.sign().tolist() == [1, 1, -1, -1, 0]  # red: sigmoid(beta r_l) for sigmoid(beta r_w)
    assert (rejected > 0).all()


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.11, None, 0.9])
def test_gradient_of_discopop(tau):
    """s' (exp(-rho) - l) > 0 against (1 - s) l' + s exp(-rho)' < 0: a small tau, as the published 0.05, makes
    s' large and puts a bump on the reference itself, where every run starts. From 0.11 on the loss falls
    everywhere, chosen raised and rejected lowered. red: the published default"""
    hyper = {} if tau is None else {"tau": tau}
    ratios = torch.linspace(-300, 300, 6001, dtype=torch.float64)  # rho from -30 to 30
    chosen, rejected = pair_gradient("discopop", ratios.tolist(), [0.0] * 6001, **hyper)
    torch.testing.assert_close(chosen, -rejected, rtol=1e-12, atol=0)
    assert (chosen < 0).all() == (tau not in (0.05, 0.1))
    assert (chosen[ratios.abs() > 10] < 0).all()  # away from the bump
    # at 0: s' (1 - log 2) - (1/2 + 1) / 2, s' = 1 / (4 tau)
    slope = (1 - LOG2) / (4 * (tau or ASKS["discopop"][1]["tau"])) - 0.75
    assert chosen[3000].item() == pytest.approx(0.1 * slope, rel=1e-9)
    if tau == 0.05:
        assert slope == pytest.approx(0.784, abs=5e-4)


def test_the_weight_of_wpo_has_no_gradient():
    *_, values = batch("wpo")
    values = leaves(values)
    call("wpo", values).losses.sum().backward()
    policy = values["policy_logps"].detach().clone().requires_grad_()
    losses.dpo(policy, values["ref_logps"]).losses.sum().backward()
    weight = (policy / values["lengths"]).sum(0).exp().detach()  # red: drop the detach of the weight
    torch.testing.assert_close(values["policy_logps"].grad, weight * policy.grad, rtol=1e-12, atol=0)


def test_with_sft_adds_the_chosen_answer_per_token():
    *_, values = batch("wpo")
    values = leaves(values)
    logps, lengths = values["policy_logps"], values["lengths"]
    loss = losses.dpo(logps, values["ref_logps"]).losses
    both = losses.with_sft(loss, logps, lengths, sft_weight=0.5)
    extra = -0.5 * logps.detach()[0] / lengths[0]
    torch.testing.assert_close(both, loss + extra, rtol=1e-14, atol=0)
    (plain,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
    (gradient,) = torch.autograd.grad(both.sum(), logps)  # red: the rejected answer, the sum of both
    extra = torch.stack([-0.5 / lengths[0].double(), torch.zeros(16).double()])
    torch.testing.assert_close(gradient - plain, extra, rtol=1e-9, atol=1e-12)
    assert torch.equal(losses.with_sft(loss, logps, lengths), loss)  # off by default
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="sft_weight"):
            losses.with_sft(loss, logps, lengths, sft_weight=wrong)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_gradient_through_the_sequential_kl_or_risk(name):
    """d loss / d X_l = beta alpha sigmoid(-beta margin); d loss / d X_w is minus that, or exactly 0."""
    values = leaves(batch(name)[2])
    x = values[ASKS[name][0][2]]
    hyper = other_hyper(name)
    loss = call(name, values, **hyper).losses
    loss.sum().backward()
    # loss = -log sigmoid(beta margin), so sigmoid(-beta margin) = 1 - exp(-loss)
    slope = -torch.expm1(-loss.detach()) * hyper["beta"] * hyper.get("alpha", 1.0)
    torch.testing.assert_close(x.grad[1], slope, rtol=1e-9, atol=1e-15)
    if name.endswith("2"):
        assert not x.grad[0].any()  # red: drop the detach, or put it on X_l
    else:
        torch.testing.assert_close(x.grad[0], -slope, rtol=1e-9, atol=1e-15)


def both_hinges(x, margin, hinge=torch.relu):
    return hinge(margin + x) - hinge(margin - x)


# loss(rejected, chosen) - loss(chosen, rejected). v: w, l the log-ratios, d = w - l, a = logp / length, m the
# margins (negated by the swap), p the logps, x the drifts, s the scores; h: the hyper-parameters.
SWAPS = {
    "dpo": lambda v, h: h.beta * v.d,
    "cdpo": lambda v, h: (1 - 2 * h.epsilon) * h.beta * v.d,
    "robust_dpo": lambda v, h: h.beta * v.d / (1 - 2 * h.epsilon),  # red: forget the division
    "odpo": lambda v, h: h.beta * v.d - v.m,
    "dpo_norm": lambda v, h: h.beta * (v.w / v.n[0] - v.l / v.n[1]),
    "wpo": lambda v, h: (v.a[0] + v.a[1]).exp() * h.beta * v.d,  # red: weigh by one answer alone
    "ipo": lambda v, h: 2 / h.tau * (v.w / v.n[0] - v.l / v.n[1]),
    "hinge": lambda v, h: both_hinges(h.beta * v.d, 1),
    "exo": lambda v, h: (h.beta * v.d / 2).tanh() * math.log(1 / h.epsilon - 1),
    "nca": lambda v, h: (h.beta * v.w).sigmoid().log() - (h.beta * v.l).sigmoid().log(),
    "bco_pair": lambda v, h: h.beta * v.d,
    "sppo_hard": lambda v, h: 2 * v.d / h.beta,
    "slic": lambda v, h: both_hinges(v.p[0] - v.p[1], h.margin) + h.sft_weight * (v.p[0] - v.p[1]),
    "cpo": lambda v, h: h.beta * (v.p[0] - v.p[1]) + h.sft_weight * (v.a[0] - v.a[1]),
    "orpo": lambda v, h: (v.a + h.beta * (v.a - (-v.a.expm1()).log())).diff(dim=0)[0].neg(),
    "bradley_terry": lambda v, h: v.s[0] - v.s[1] - v.m,
    **dict.fromkeys(("tdpo1", "ra_dpo1"), lambda v, h: h.beta * (v.d - v.x[1] + v.x[0])),
    **dict.fromkeys(("tdpo2", "ra_dpo2"), lambda v, h: h.beta * (v.d - h.alpha * (v.x[1] - v.x[0]))),
    "simpo": lambda v, h: both_hinges(h.beta * (v.a[0] - v.a[1]), h.gamma, F.softplus),
    # these two have an identity for the sum: it is the difference plus twice the loss
    "apo_zero": lambda v, h: 2 - 2 * v.loss,
    "apo_down": lambda v, h: (h.beta * v.w).sigmoid() + (h.beta * v.l).sigmoid() + 1 - 2 * v.loss,
}


def swap_batch(name, **hyper):
    *_, values = batch(name, size=24)
    swapped = {k: v.flip(0) if v.ndim == 2 else -v if k == "margins" else v for k, v in values.items()}
    return values, call(name, values, **hyper).losses, call(name, swapped, **hyper).losses


@pytest.mark.parametrize("name", SWAPS)
@CHANGED
def test_swapping_chosen_and_rejected(name, changed):
    """Two outcomes of one choice: what the losses of a pair and of its swap have to do with each other."""
    hyper = other_hyper(name) if changed else ASKS[name][1]
    values, loss, swapped = swap_batch(name, **hyper)
    v = SimpleNamespace(loss=loss, m=values.get("margins"), s=values.get("sequence_scores"))
    v.p, v.n, v.x = values.get("policy_logps"), values.get("lengths"), values.get("kl", values.get("risk"))
    if "ref_logps" in values:
        v.w, v.l = v.p - values["ref_logps"]
        v.d = v.w - v.l
    v.a = None if v.n is None else v.p / v.n
    expected = SWAPS[name](v, SimpleNamespace(**hyper))
    torch.testing.assert_close(swapped - loss, expected, rtol=1e-9, atol=1e-9)


def test_special_cases_that_are_other_losses():
    *_, values = batch("tdpo1")
    logps = values["policy_logps"], values["ref_logps"]
    values |= {"lengths": torch.ones(2, 16, dtype=torch.long), "margins": torch.zeros(16).double()}
    values |= {"delta": torch.tensor(0.0).double(), "risk": values["kl"]}
    dpo = losses.dpo(*logps, beta=0.3).losses

    def same(name, expected=dpo, changed=None, **hyper):
        ours = call(name, values | (changed or {}), **{"beta": 0.3} | hyper).losses
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13, msg=lambda text: f"{name}: {text}")

    for name in ("cdpo", "robust_dpo"):
        same(name, epsilon=0.0)
    for name in ("odpo", "dpo_norm"):
        same(name)
    same("tdpo1", changed={"kl": torch.zeros_like(values["kl"])})
    same("tdpo2", alpha=0.0)
    same("tdpo2", call("tdpo1", values, beta=0.3).losses, alpha=1.0)
    still = {"policy_logps": torch.zeros_like(logps[0])}  # a = 0: every pair weighs 1
    same("wpo", losses.dpo(still["policy_logps"], logps[1], beta=0.3).losses, still)
    same("simpo", losses.dpo(logps[0], torch.zeros_like(logps[0]), beta=0.3).losses, gamma=0.0)
    same("cpo", losses.dpo(logps[0], torch.zeros_like(logps[0]), beta=0.3).losses, sft_weight=0.0)
    for number in "12":
        ours, theirs = call("ra_dpo" + number, values), call("tdpo" + number, values)
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
