"""losses.py: the losses of single answers and of tokens, what feeds them, and what every loss must satisfy.

Oracles in Python floats, one unit at a time. A comment `red:` names one-line changes of losses.py that turn
a test red.
"""

import inspect
import itertools
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_losses import ASKS, CHANGED, DTYPES, LEARNT, PUBLIC, SEQUENTIAL
from test_losses import asked, assemble, at_reference, batch, call, draw_scalars, draw_unit, leaves, on_pairs
from test_losses import other_hyper, sigmoid, softplus

import losses

EVERY = pytest.mark.parametrize("name", sorted(PUBLIC))
QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)
QUICK = settings(QUICK, suppress_health_check=list(HealthCheck))
KTO = ["kto", "kto_token_max", "kto_zero"]
ANSWERS = [*KTO, "bco", "apo_zero_unpaired"]
ANSWER = pytest.mark.parametrize("name", ANSWERS)


# --- what every loss must satisfy; a new loss is found by inspection --------------------------------------


def test_every_public_loss_can_be_asked_what_it_needs():
    """Statistics are positional without defaults, hyper-parameters keyword-only with the defaults of ASKS."""
    assert set(ASKS) <= set(PUBLIC)
    for name, function in PUBLIC.items():
        statistics, hyper = asked(name)
        for p in inspect.signature(function).parameters.values():
            assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY), name
            assert (p.kind is p.KEYWORD_ONLY) == (p.default is not p.empty), f"{name}: {p.name}"
        assert (statistics, hyper) == ASKS.get(name, (statistics, hyper)), name


NO_PAPER = {"cdpo", "kto_token_max", "sft"}  # a note, the published code, a textbook


@EVERY
def test_docstring(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert re.search(r"=|\^| [-+] |-log|plus", text), "no equation"
    assert "Raises" in text
    assert name == "sft" or "Source" in text
    assert name in NO_PAPER or re.search(r"arXiv:\d{4}\.\d{5}", text), "no arXiv id"
    assert max(map(len, text.splitlines())) <= 106  # + 4 of indentation
    for hyper in asked(name)[1]:  # `kto_zero` and the like say "Raises ValueError as `kto`"
        assert hyper in text or "_weight" in hyper or "as `kto`" in text, f"no {hyper}"


def numbers(low, high):
    if isinstance(low, bool):
        return st.booleans()
    return st.floats(low, high) if isinstance(low, float) else st.integers(low, high)


def around(default):
    """Valid values near a default: a weight of 0 may grow, the rest is scaled by less than 2 (clip < 1)."""
    if isinstance(default, bool | str):
        return st.just(default)
    return st.floats(0.6 * default, 1.6 * default) if default else st.floats(0.0, 0.2)


@st.composite
def situations(draw, name):
    names, hyper = asked(name)

    def number(low, high):
        return draw(numbers(low, high))

    units = [draw_unit(names, number) for _ in range(draw(st.integers(2, 4)))]
    return units, draw_scalars(names, number), {key: draw(around(value)) for key, value in hyper.items()}


def tensors(result):
    named = {"losses": result.losses, "rewards": result.rewards, "own": result.own} | result.metrics
    return {key: value for key, value in named.items() if value is not None}


@EVERY
@QUICK
@given(data=st.data())
def test_any_loss_on_any_input(name, data):
    names, _ = asked(name)
    units, scalars, hyper = data.draw(situations(name))

    def run(units, dtype=torch.float64):
        values = assemble(names, units, scalars, dtype)
        return values, call(name, values, **hyper)

    for dtype in (torch.float32, torch.float64):
        values = leaves(assemble(names, units, scalars, dtype))
        before = {k: v.detach().clone() for k, v in values.items()}
        result = call(name, values, **hyper)
        tokens = sum(unit["tokens"] for unit in units) if "response" in names else len(units)
        assert result.losses.shape == (len(units),)
        assert result.rewards.shape == ((2, len(units)) if on_pairs(names) else (tokens,))
        assert result.own is None or result.own.shape == result.rewards.shape
        for key, value in tensors(result).items():
            assert value.dtype == dtype, key
            assert value.isfinite().all(), key
            assert key == "losses" or not value.requires_grad, key  # red: drop a detach
            assert key in ("losses", "rewards", "own") or value.shape == (len(units),), key
        learnt = [key for key in names if key in LEARNT]
        assert result.losses.requires_grad
        result.losses.sum().backward()
        assert values[learnt[0]].grad is not None
        for key in learnt:
            assert values[key].grad is None or values[key].grad.isfinite().all(), key
        for key, value in values.items():  # red: policy_logps.sub_(ref_logps)
            assert torch.equal(value, before[key]), key

    close = {"rtol": 1e-9, "atol": 1e-7}  # a group sums its scores in another order, over a std of 0.006
    _, result = run(units)
    assert not result.losses.requires_grad  # nothing asked for a gradient: none was made
    order = data.draw(st.permutations(range(len(units))))
    _, permuted = run([units[i] for i in order])
    torch.testing.assert_close(permuted.losses, result.losses[list(order)], **close)
    if "response" not in names:  # red: pair a tensor with its neighbour's, by a view or a flatten
        torch.testing.assert_close(permuted.rewards, result.rewards[..., list(order)], **close)

    changed = data.draw(st.integers(0, len(units) - 1))
    other = draw_unit(names, lambda low, high: data.draw(numbers(low, high)))
    if "group" in names:
        other["group"] = units[changed]["group"]
    group = other.get("group", "none")  # those of one group depend on each other
    rest = [i for i, unit in enumerate(units) if i != changed and unit.get("group") != group]
    _, result_ = run([*units[:changed], other, *units[changed + 1 :]])
    # red: take a mean over the batch anywhere
    torch.testing.assert_close(result_.losses[rest], result.losses[rest], **close)
    assert losses.Loss._field_defaults["metrics"] == {}  # red: write to out.metrics, which all losses share


@EVERY
@DTYPES
@CHANGED
def test_extreme_ratios_stay_finite(name, dtype, changed):
    """Log-ratios of +-1e4 between log-probabilities <= 0, per pair (chosen, rejected) or by turns."""
    hyper = other_hyper(name) if changed else asked(name)[1]
    epsilon = hyper.get("epsilon", 0.0)
    pull = dict.fromkeys(["dpo", "odpo", "hinge", "discopop", "bco_pair", *SEQUENTIAL], 1.0)
    pull |= {"cdpo": 1 - epsilon, "robust_dpo": (1 - epsilon) / (1 - 2 * epsilon)}
    for signs in itertools.product((1, -1), repeat=2):
        *_, values = batch(name, dtype)
        first = next(iter(values.values()))
        far = 1e4 * torch.tensor(signs, dtype=dtype)
        far = far[:, None].expand(2, 16) if first.ndim == 2 else far.repeat(len(first))[: len(first)]
        for policy, ref in ("policy_logps", "ref_logps"), ("token_policy_logps", "token_ref_logps"):
            if policy in values:
                values[ref] = values[policy] - 1e4
                values[policy] = values[ref] + far
        for statistic in {"sequence_scores", "token_logratios"} & set(values):
            values[statistic] = far.clone()
        values = leaves(values)
        result = call(name, values, **hyper)
        for key, value in tensors(result).items():
            # red: -sigmoid(.).log(), log(1 + exp(.)), an exp without its clamp
            assert value.isfinite().all(), (signs, key)
        result.losses.sum().backward()
        gradients = {key: values[key].grad for key in LEARNT if key in values}
        for key, gradient in gradients.items():
            assert gradient is None or gradient.isfinite().all(), (signs, key)
        if signs == (-1, 1) and name in pull:  # linear here: the pull must be full
            full = pull[name] * hyper["beta"] * torch.tensor([[-1.0], [1.0]], dtype=dtype).expand(2, 16)
            torch.testing.assert_close(gradients["policy_logps"], full)


@DTYPES
@pytest.mark.parametrize("a_w, a_l", [(0.0, 0.0), (0.0, -1e4), (-1e4, 0.0), (-1e-9, -1e-30), (-1e4, -1e4)])
def test_orpo_of_certain_and_impossible_answers(dtype, a_w, a_l):
    """A probability of 1 has no odds: log(1 - e^a) at a = 0, and its slope, must be kept off infinity."""
    values = torch.tensor([[a_w], [a_l]], dtype=dtype).requires_grad_()
    result = losses.orpo(values, torch.ones(2, 1, dtype=torch.long))
    result.losses.sum().backward()
    assert result.losses.isfinite().all()
    assert values.grad.isfinite().all()  # red: log(1 - exp(a)), torch.where around a log of 0


@pytest.mark.parametrize("name", [name for name in ASKS if name != "wpo"])  # its weight is stopped
def test_gradcheck(name):
    *_, values = batch(name, size=5)
    stopped = name in ("tdpo2", "ra_dpo2")  # their X_w has a value but no gradient
    learnt = [key for key in ASKS[name][0] if key in LEARNT and not (stopped and key in ("kl", "risk"))]

    def through(*inputs):
        return call(name, values | dict(zip(learnt, inputs, strict=True)), **other_hyper(name)).losses

    assert torch.autograd.gradcheck(through, [values[key].clone().requires_grad_() for key in learnt])


def hyper_names(name):
    return [p.name for p in inspect.signature(PUBLIC[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


INF, NAN = math.inf, math.nan
WEIGHT = ([-0.1, -INF, INF, NAN], [0.0, 2.0])
RANGES = {
    "beta": ([0.0, -0.1, INF, NAN], [1e-3, 10.0]),
    "epsilon": ([-0.01, 0.5, 1.0, NAN], [0.0, 0.49]),
    "tau": ([0.0, -1.0, INF, NAN], [1e-3, 10.0]),
    "clip": ([0.0, -0.5, 1.0, 2.0, NAN], [0.01, 0.99]),
    "std_floor": ([0.0, -1e-3, INF, NAN], [1e-6, 1.0]),
    **dict.fromkeys(("alpha", "gamma", "margin", "center_weight", "sft_weight"), WEIGHT),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), WEIGHT),
    **dict.fromkeys(("value_weight", "kl_weight", "entropy_weight"), WEIGHT),
    ("exo", "epsilon"): ([0.0, -0.01, 0.5, NAN], [1e-6, 0.49]),  # at 0 the KL to the label is infinite
    ("grpo", "epsilon"): ([0.0, -0.1, 1.0, NAN], [0.01, 0.99]),
    ("grpo", "beta"): ([-0.1, INF, NAN], [0.0, 10.0]),
    ("discopop", "tau"): ([0.0, -0.1, 1.0, NAN], [1e-3, 0.99]),  # from 1 on exp(-rho) outruns s
}


@pytest.mark.parametrize("name, hyper", [(name, key) for name in sorted(PUBLIC) for key in hyper_names(name)])
def test_hyper_parameters_out_of_range(name, hyper):
    """Errors name the parameter. red: `< 0` lets a NaN pass, where `not >= 0` does not."""
    if hyper not in RANGES:
        pytest.fail(f"{name}: say in RANGES what is right and wrong for {hyper}")
    wrong, right = RANGES.get((name, hyper), RANGES[hyper])
    *_, values = batch(name)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{hyper}\b"):
            call(name, values, **{hyper: value})
    for value in right:
        assert call(name, values, **{hyper: value}).losses.isfinite().all()


# --- single answers: red throughout: swap the two branches, or r - z for z - r -----------------------------


def answer_oracle(name, unit, beta, kl_estimate=0.0, delta=0.0, desirable_weight=1.0, undesirable_weight=1.0):
    r = unit["policy_logps"] - unit["ref_logps"]
    sign = 1 if unit["desirable"] else -1
    if name == "bco":
        return softplus(-sign * (beta * r - delta)), beta * r
    z = max(0.0, unit.get("kl_token_max", kl_estimate))
    weight = desirable_weight if unit["desirable"] else undesirable_weight
    return weight * (1 - sigmoid(beta * sign * (r - z))), beta * r


@ANSWER
@DTYPES
@CHANGED
@pytest.mark.parametrize("seed", range(3))  # the scalars: estimates of both signs
def test_values_match_the_oracle(name, dtype, changed, seed):
    units, scalars, values = batch(name, dtype, seed=seed)
    hyper = ASKS[name][1]
    if changed:
        hyper = other_hyper(name) | ({"undesirable_weight": 0.4} if name in KTO else {})
    result = call(name, leaves(values), **hyper)
    expected = [answer_oracle(name, unit, **scalars, **hyper) for unit in units]
    close = {"rel": 1e-5, "abs": 2e-5} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-12}
    assert result.losses.tolist() == pytest.approx([loss for loss, _ in expected], **close)
    assert result.rewards.tolist() == pytest.approx([reward for _, reward in expected], **close)
    assert result.own is None and not result.metrics


@ANSWER
def test_answers_at_policy_equal_to_reference(name):
    units, scalars, values = batch(name)
    values = at_reference(values)
    result = call(name, values)
    z = scalars.get("kl_estimate", scalars.get("delta", 0.0))
    for unit, loss in zip(units, result.losses.tolist(), strict=True):
        # delta is in units of beta r, an estimate of the KL in nats
        origin = z if name == "bco" else 0.1 * max(0.0, unit.get("kl_token_max", z))
        miss = sigmoid(origin if unit["desirable"] else -origin)
        assert loss == pytest.approx(-math.log(1 - miss) if name == "bco" else miss, rel=1e-12)
    assert not result.rewards.any()


@ANSWER
def test_gradient_raises_the_desirable_and_lowers_the_rest(name):
    *_, values = batch(name)
    assert 0 < values["desirable"].sum() < 16
    values = leaves(values)
    call(name, values).losses.sum().backward()
    gradient = values["policy_logps"].grad
    assert ((gradient < 0) == values["desirable"]).all()
    assert gradient.all()


@ANSWER
def test_the_other_label_is_the_other_outcome(name):
    *_, values = batch(name)
    loss = call(name, values).losses
    other = call(name, values | {"desirable": ~values["desirable"]})
    if name == "bco":  # probabilities: l(x) and l(-x)
        assert ((-loss).exp() + (-other.losses).exp()).tolist() == pytest.approx([1.0] * 16, rel=1e-13)
    else:
        assert (loss + other.losses).tolist() == pytest.approx([1.0] * 16, rel=1e-13)
    assert torch.equal(other.rewards, call(name, values).rewards)  # red: sign the rewards by the label


@ANSWER
@pytest.mark.parametrize("label", [True, False], ids=["desirable", "undesirable"])
@pytest.mark.parametrize("size", [1, 5])
def test_batches_of_one_label(name, label, size):
    """Nothing is averaged per class. red: values[desirable].mean() of an empty class is nan."""
    units, scalars, values = batch(name, size=size)
    values["desirable"] = torch.full((size,), label)
    values = leaves(values)
    result = call(name, values)
    result.losses.sum().backward()
    expected = [answer_oracle(name, u | {"desirable": label}, **scalars, **ASKS[name][1])[0] for u in units]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert values["policy_logps"].grad.isfinite().all()


def test_identities_of_kto():
    *_, values = batch("kto")
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    zero = call("kto_zero", values, **weights)
    for estimate in (0.0, -3.0):  # red: drop the max with 0
        values["kl_estimate"] = torch.tensor(estimate, dtype=torch.float64)
        assert torch.equal(call("kto", values, **weights).losses, zero.losses)
        values["kl_token_max"] = values["kl_estimate"].expand(16)
        assert torch.equal(call("kto_token_max", values, **weights).losses, zero.losses)
    values["kl_estimate"] = torch.tensor(4.0, dtype=torch.float64)
    values["kl_token_max"] = values["kl_estimate"].expand(16)
    assert torch.equal(call("kto_token_max", values).losses, call("kto", values).losses)
    unpaired, unit = call("apo_zero_unpaired", values), call("kto_zero", values)
    torch.testing.assert_close(unpaired.losses, unit.losses, rtol=1e-14, atol=1e-16)
    # the two answers of a pair, each alone, are the two terms of apo_zero
    *_, pairs = batch("apo_zero")
    single = {key: value.flatten() for key, value in pairs.items()} | {"desirable": torch.arange(32) < 16}
    terms = call("apo_zero_unpaired", single).losses.view(2, 16)
    torch.testing.assert_close(terms.sum(0), call("apo_zero", pairs).losses, rtol=1e-14, atol=1e-15)
    delta = torch.tensor(0.3, dtype=torch.float64)
    terms = call("bco", single | {"delta": delta}).losses.view(2, 16).sum(0)
    torch.testing.assert_close(terms, call("bco_pair", pairs | {"delta": delta}).losses, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name, key", [("kto", "kl_estimate"), ("kto_token_max", "kl_token_max")])
def test_the_reference_point_has_no_gradient(name, key):
    *_, values = batch(name)
    values = leaves(values) | {key: values[key].abs().add(1).requires_grad_()}
    call(name, values).losses.sum().backward()
    assert values[key].grad is None or not values[key].grad.any()  # red: drop its detach
    assert values["policy_logps"].grad.all()


# --- tokens -----------------------------------------------------------------------------------------------


def surrogate(logratio, advantage, low, high):
    """The clipped loss of one token, and whether the clamp decides it."""
    rho = math.exp(logratio)
    free, held = -advantage * rho, -advantage * min(max(rho, low), high)
    return max(free, held), float(held > free)


def k3_of(logp, ref):
    """The estimate of a KL from one token."""
    return math.exp(ref - logp) - (ref - logp) - 1


@DTYPES
@CHANGED
def test_ppo_matches_the_oracle(dtype, changed):
    units, _, values = batch("ppo", dtype, size=60)
    hyper = {"clip": 0.7, "value_weight": 0.3, "kl_weight": 0.2, "entropy_weight": 0.05} if changed else {}
    h = ASKS["ppo"][1] | hyper
    result = call("ppo", leaves(values), **hyper)
    close = {"rel": 1e-5, "abs": 1e-5} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-12}
    clipped = []
    for i, u in enumerate(units):
        logp, ref, advantage = u["token_policy_logps"], u["token_ref_logps"], u["token_advantages"]
        loss, clip = surrogate(u["token_logratios"], advantage, h["clip"], 1 / h["clip"])
        k3 = k3_of(logp, ref)
        critic = 0.5 * (u["token_values"] - u["token_returns"]) ** 2
        loss += h["value_weight"] * critic + h["kl_weight"] * k3 - h["entropy_weight"] * u["token_entropy"]
        assert result.losses[i].item() == pytest.approx(loss, **close)
        assert result.rewards[i].item() == pytest.approx(logp - ref, **close)
        metrics = {"clip_fraction": clip, "entropy": u["token_entropy"], "kl_k3": k3, "critic": critic}
        assert {k: v[i].item() for k, v in result.metrics.items()} == pytest.approx(metrics, **close)
        clipped.append(clip)
    assert 0 < sum(clipped) < 60


def test_ppo_at_policy_equal_to_reference():
    *_, values = batch("ppo")
    values = leaves(at_reference(values))
    result = call("ppo", values, value_weight=0.3, entropy_weight=0.05)
    result.losses.sum().backward()
    error = values["token_values"].detach() - values["token_returns"]
    expected = -values["token_advantages"] + 0.15 * error**2 - 0.05 * values["token_entropy"]
    torch.testing.assert_close(result.losses, expected.detach(), rtol=1e-13, atol=1e-13)
    # k3 has its minimum here. red: kl_weight * d, the estimate k1, adds its weight to every slope
    assert not values["token_policy_logps"].grad.any()
    gradient = values["token_logratios"].grad
    torch.testing.assert_close(gradient, -values["token_advantages"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(values["token_values"].grad, 0.3 * error, rtol=1e-13, atol=0)
    assert values["token_entropy"].grad.tolist() == pytest.approx([-0.05] * 16)
    assert not result.metrics["clip_fraction"].any() and not result.metrics["kl_k3"].any()


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_clipping_is_pessimistic(name):
    """No gradient where the ratio is beyond the clip on the side to which A pushes; full -A rho elsewhere."""
    ratio = torch.tensor([2.1, 0.4, 2.1, 0.4, 1.1, 0.9], dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    logratios, logps = ratio.log().requires_grad_(), torch.full((6,), -3.0, dtype=torch.float64)
    if name == "ppo":
        zeros = torch.zeros(6, dtype=torch.float64)
        result = losses.ppo(logps, logps, logratios, zeros, zeros, sign, zeros)
    else:  # six one-token responses, good and bad ones of one prompt: A = +-1 / (1 + std_floor)
        ones = torch.ones(6, dtype=torch.long)
        result = losses.grpo(logps, logps, logratios, torch.arange(6), ones, sign, ones * 0)
        sign = sign / 1.01
    result.losses.sum().backward()
    open_ = torch.tensor([0, 0, 1, 1, 1, 1])  # red: min for max, clamp alone, an open upper end
    torch.testing.assert_close(logratios.grad, -sign * ratio * open_, rtol=1e-12, atol=0)
    assert result.metrics["clip_fraction"].tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_penalty_and_the_rewards_are_of_the_log_probabilities_as_they_are(name):
    """A token whose ratio is clamped is still pulled back. red: the penalty of token_logratios"""
    *_, values = batch(name)
    values["token_logratios"] = torch.zeros_like(values["token_logratios"])  # clamped, and so constant
    weight = {"kl_weight": 0.3} if name == "ppo" else {"beta": 0.3}
    values = leaves(values)
    result = call(name, values, **weight)
    result.losses.sum().backward()
    d = (values["token_ref_logps"] - values["token_policy_logps"]).detach()
    slope = 0.3 * (1 - d.exp())  # of e^d - d - 1
    if name == "grpo":
        slope = slope / values["lengths"][values["response"]]
    torch.testing.assert_close(values["token_policy_logps"].grad, slope, rtol=1e-12, atol=1e-14)
    assert torch.equal(result.rewards, -d)


def grpo_oracle(units, beta, epsilon, std_floor):
    for unit in units:
        scores = [u["scores"] for u in units if u["group"] == unit["group"]]
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        advantage = (unit["scores"] - mean) / (std + std_floor)
        terms = [surrogate(r, advantage, 1 - epsilon, 1 + epsilon) for r in unit["token_logratios"]]
        loss, clip = (sum(column) / len(terms) for column in zip(*terms, strict=True))
        pairs = list(zip(unit["token_policy_logps"], unit["token_ref_logps"], strict=True))
        k3 = sum(k3_of(logp, ref) for logp, ref in pairs) / len(pairs)
        yield loss + beta * k3, clip, k3


@DTYPES
@CHANGED
def test_grpo_matches_the_oracle(dtype, changed):
    units, _, values = batch("grpo", dtype, size=9)  # groups of several and, by chance, unequal sizes
    hyper = other_hyper("grpo") if changed else {}
    result = call("grpo", leaves(values), **hyper)
    close = {"rel": 2e-5, "abs": 2e-5} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-12}
    expected = grpo_oracle(units, **ASKS["grpo"][1] | hyper)
    loss, clip, k3 = map(list, zip(*expected, strict=True))
    # red: std() is of the sample; a mean over all tokens weighs long responses more
    assert result.losses.tolist() == pytest.approx(loss, **close)
    assert set(result.metrics) == {"clip_fraction", "kl_k3"}
    assert result.metrics["clip_fraction"].tolist() == pytest.approx(clip, **close)
    assert result.metrics["kl_k3"].tolist() == pytest.approx(k3, **close)
    ratios = values["token_policy_logps"] - values["token_ref_logps"]
    assert torch.equal(result.rewards, ratios)
    assert sum(clip) > 0


def test_grpo_knows_groups_by_their_index_alone():
    units, _, values = batch("grpo", size=9)
    loss = call("grpo", values).losses
    shifted = {"scores": values["scores"] + 5.0 * values["group"]}  # a baseline per prompt is no advantage
    torch.testing.assert_close(call("grpo", values | shifted).losses, loss, rtol=1e-10, atol=1e-10)
    renamed = {"group": 7 - 3 * values["group"]}  # red: take the group for its place in the batch
    torch.testing.assert_close(call("grpo", values | renamed).losses, loss, rtol=1e-12, atol=1e-12)


def test_grpo_of_lone_and_of_equal_responses_has_no_policy_gradient():
    *_, values = batch("grpo", size=6)
    values["group"] = torch.tensor([0, 1, 2, 3, 3, 3])
    values["scores"][3:] = 1.5
    values = leaves(values)
    result = call("grpo", values)
    # A = 0: the KL is all that is left. red: the std of the sample, nan of a lone response
    torch.testing.assert_close(result.losses, 0.04 * result.metrics["kl_k3"], rtol=1e-12, atol=1e-14)
    call("grpo", values, beta=0.0).losses.sum().backward()
    assert not values["token_policy_logps"].grad.any() and not values["token_logratios"].grad.any()


def test_grpo_at_policy_equal_to_reference():
    """loss = -A and d loss / d logp = -A / length: every response weighs the same, long or short."""
    *_, values = batch("grpo", size=9)
    values = leaves(at_reference(values))
    result = call("grpo", values)
    result.losses.sum().backward()
    slopes = (result.losses / values["lengths"]).detach()[values["response"]]
    torch.testing.assert_close(values["token_logratios"].grad, slopes, rtol=1e-12, atol=1e-14)
    assert not values["token_policy_logps"].grad.any()
    totals = torch.zeros(3, dtype=torch.float64).index_add(0, values["group"], result.losses.detach())
    torch.testing.assert_close(totals, torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert result.losses.abs().max() > 0.5


@DTYPES
def test_sft_is_the_negative_log_probability_of_each_token(dtype):
    logps = -torch.rand(9, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 10
    leaf = logps.clone().requires_grad_()
    result = losses.sft(leaf)
    assert torch.equal(result.losses, -logps)
    assert torch.equal(result.rewards, logps)
    assert result.own is None
    result.losses.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(logps, -1))


# --- what feeds ppo, and the clamp of log-ratios ----------------------------------------------------------


def ragged(lengths, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)
    values = torch.randn(sum(lengths), generator=g, dtype=torch.float64).to(dtype)
    return rewards, values, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def advantages_oracle(rewards, values, lengths, gamma, gae_lambda):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, cut where (gamma lambda)^k is below 1e-20."""
    estimates, returns, start = [], [], 0
    for r, n in zip(rewards, lengths, strict=True):
        v = [*values[start : start + n], 0.0]
        deltas = [(r if t == n - 1 else 0.0) + gamma * v[t + 1] - v[t] for t in range(n)]
        decay = gamma * gae_lambda
        reach = n if decay == 1 else 1 if decay == 0 else min(n, math.ceil(-46 / math.log(decay)))
        for t in range(n):
            estimates.append(sum(decay**k * deltas[t + k] for k in range(min(reach, n - t))))
            returns.append(gamma ** (n - 1 - t) * r)
        start += n
    return estimates, returns


@DTYPES
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.5, 0.3), (1.0, 1.0), (0.9, 0.0), (0.9, 1.0)])
@pytest.mark.parametrize("lengths", [[1], [4], [1, 1, 1], [3, 1, 7, 2], [1, 40, 1, 5]], ids=str)
def test_advantages_match_the_oracle(dtype, gamma, gae_lambda, lengths):
    rewards, values, response = ragged(lengths, dtype)
    before = values.clone(), rewards.clone()
    estimates, returns = losses.advantages(rewards, values, response, gamma=gamma, gae_lambda=gae_lambda)
    expected = advantages_oracle(rewards.tolist(), values.tolist(), lengths, gamma, gae_lambda)
    close = {"rel": 1e-5, "abs": 1e-5} if dtype == torch.float32 else {"rel": 1e-12, "abs": 1e-12}
    # red: carry A or V across the end of a response, put r on every token, G_T = gamma r_T
    assert estimates.tolist() == pytest.approx(expected[0], **close)
    assert returns.tolist() == pytest.approx(expected[1], **close)
    assert estimates.dtype == returns.dtype == dtype
    assert torch.equal(values, before[0]) and torch.equal(rewards, before[1])


def test_advantages_of_long_responses():
    """0.99^-20000 is no float32: the recursion must not be written with a division by powers of gamma."""
    lengths = [3000, 1, 20000]
    rewards, values, response = ragged(lengths, torch.float32)
    ours = losses.advantages(rewards, values, response, gamma=0.99, gae_lambda=0.5)
    expected = advantages_oracle(rewards.tolist(), values.tolist(), lengths, 0.99, 0.5)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_advantages_in_closed_form():
    rewards, values, response = ragged([5, 2, 1])
    ours, returns = losses.advantages(rewards, values, response, gae_lambda=1.0)  # return minus value
    torch.testing.assert_close(ours, returns - values, rtol=1e-12, atol=1e-12)
    assert torch.equal(returns[[4, 6, 7]], rewards)
    perfect, _ = losses.advantages(rewards, returns, response)  # a critic that is right leaves nothing
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), rtol=0, atol=1e-14)


@pytest.mark.parametrize("key, wrong, right", [
    ("gamma", [0.0, -0.1, 1.01, INF, NAN], [1e-3, 1.0]),
    ("gae_lambda", [-0.01, 1.01, INF, NAN], [0.0, 1.0]),
])
def test_advantages_out_of_range(key, wrong, right):
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{key}\b"):
            losses.advantages(*ragged([3, 2]), **{key: value})
    for value in right:
        assert losses.advantages(*ragged([3, 2]), **{key: value})[0].isfinite().all()


@DTYPES
def test_humanline_clamps_log_ratios(dtype):
    ratios = torch.tensor([-3.0, -1.1, -0.9, 0.0, 1.4, 1.6, 1e4, -1e4], dtype=dtype).requires_grad_()
    clamped = losses.humanline(ratios)
    clamped.sum().backward()
    expected = torch.tensor([-1.0, -1.0, -0.9, 0.0, 1.4, 1.5, 1.5, -1.0], dtype=dtype)
    assert torch.equal(clamped, expected)  # red: swap the bounds
    assert ratios.grad.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]  # red: a straight-through estimator
    narrow = losses.humanline(ratios.detach(), log_epsilon_p=-0.5, log_epsilon_r=0.25)
    assert torch.equal(narrow, ratios.detach().clamp(-0.5, 0.25))


@pytest.mark.parametrize("key, wrong", [
    ("log_epsilon_p", [0.0, 0.1, -INF, INF, NAN]),
    ("log_epsilon_r", [0.0, -0.1, -INF, INF, NAN]),
])
def test_humanline_out_of_range(key, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{key}\b"):
            losses.humanline(-torch.ones(3), **{key: value})
