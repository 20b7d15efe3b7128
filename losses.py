"""Preference losses: pure functions from the statistics of a batch to one loss per unit.

A loss asks for what it needs by naming it. Positional parameters are statistics, keyword-only parameters are
hyper-parameters; `align.py` reads the signature, so the flags, their defaults, the data, the heads and
whether a reference model is loaded at all come from here. Statistics are fp32 (or fp64); log-probabilities
are nats, sums over the trained tokens of a response. A loss works on pairs, axis 0 (chosen, rejected), unless
it names a statistic that only single responses have, marked *; then every (2, B) here is (R,):

    policy_logps, ref_logps      (2, B)  log pi(y|x)
    kl, risk                     (2, B)  sequential forward KL and risk, sums over the tokens of a response
    lengths                      (2, B)  trained tokens
    margins                      (B,)    of the row for its best over its worst; of other pairs their share
    sequence_scores              (2, B)  scalar head of a reward model
    delta                        ()      mean reward over the responses of the steps before
    kl_estimate                  ()      mean log-ratio of mismatched answers, before the clamp
    desirable *                  (R,)    bool
    scores *                     (R,)    of the rows
    group *                      (R,)    which prompt
    kl_token_max *               (R,)    largest log-ratio of a token of the mismatched answer, at least 0
    token_policy_logps *, token_ref_logps *, token_entropy *, token_values *   (N,)
    token_logratios *            (N,)    log pi - log pi_ref of a token; see `humanline`
    token_advantages *, token_returns *   (N,)  frozen before the step, see `advantages`
    response *                   (N,)    which response

In the docstrings Delta = (logp_w - ref_w) - (logp_l - ref_l), w chosen, l rejected, l(d) =
-logsigmoid(beta d), and r = logp - ref. The caller sums `losses` and divides by the number of units of the
whole optimiser step. beta and every other name in `_positive` raises ValueError unless it is finite and > 0.

Adding a loss = adding one public function here, annotated `-> Loss`.

Left out: AOT, which sorts the batch and so would depend on the micro-batches; LD-DPO, which needs the sum
over the first min(|y_w|, |y_l|) tokens of a pair, a statistic of no other loss.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_EXPONENT = 20.0  # of a probability ratio: e^20 is finite, and no step should be that far off


class Loss(NamedTuple):
    losses: Tensor  # (B,) pairs, (R,) responses or (N,) tokens: one number per unit averaged over, nats
    rewards: Tensor  # (2, B), (R,) or (N,) implicit rewards beta (logp - ref), or beta logp, detached
    own: Tensor | None = None  # like rewards: the method's own where it differs (drift included), detached
    metrics: dict[str, Tensor] = {}  # logged as means over the units, each like losses, detached


# ---- pairs, against a reference


def dpo(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Loss:
    """Direct preference optimisation: l(Delta) = -logsigmoid(beta Delta).

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2305.18290, eq. 7. Raises ValueError unless
    beta > 0.
    """
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    return Loss(-F.logsigmoid(logits), beta * logratios.detach())


def cdpo(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1, epsilon: float = 0.2) -> Loss:
    """Conservative DPO for labels flipped with probability epsilon: (1 - epsilon) l(Delta) + epsilon
    l(-Delta).

    policy_logps, ref_logps (2, B) -> losses (B,). Source: E. Mitchell, A note on DPO with noisy preferences,
    2023. Raises ValueError unless beta > 0 and 0 <= epsilon < 0.5.
    """
    _below_half(epsilon)
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    losses = -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)  # (B,)
    return Loss(losses, beta * logratios.detach())


def robust_dpo(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1, epsilon: float = 0.2) -> Loss:
    """Robust DPO, unbiased under labels flipped with probability epsilon: [(1 - epsilon) l(Delta) - epsilon
    l(-Delta)] / (1 - 2 epsilon). Negative losses are right.

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2403.00409, the rDPO objective. Raises
    ValueError unless beta > 0 and 0 <= epsilon < 0.5.
    """
    _below_half(epsilon)
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    losses = -(1 - epsilon) * F.logsigmoid(logits) + epsilon * F.logsigmoid(-logits)  # (B,)
    return Loss(losses / (1 - 2 * epsilon), beta * logratios.detach())


def odpo(policy_logps: Tensor, ref_logps: Tensor, margins: Tensor, *, beta: float = 0.1) -> Loss:
    """DPO with an offset: -logsigmoid(beta Delta - margin), the margin of each row (its "margin", else 0). Of
    a list it is that of the best over the worst, and another pair's is its share of their score difference.

    policy_logps, ref_logps (2, B), margins (B,) -> losses (B,). Source: arXiv:2402.10571, the ODPO objective;
    the margin is taken as given, where the paper scales the logarithm of a score difference. Raises
    ValueError unless beta > 0.
    """
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    return Loss(-F.logsigmoid(logits - margins), beta * logratios.detach())


def dpo_norm(policy_logps: Tensor, ref_logps: Tensor, lengths: Tensor, *, beta: float = 5.0) -> Loss:
    """Length-normalised DPO: l of the difference of length-averaged log-ratios.

    policy_logps, ref_logps, lengths (2, B) -> losses (B,); rewards = beta (logp - ref) / length. Source:
    arXiv:2411.15124 (Tulu 3), with its beta. Raises ValueError unless beta > 0.
    """
    logratios, logits = _implicit(policy_logps / lengths, ref_logps / lengths, beta)  # (2, B), (B,)
    return Loss(-F.logsigmoid(logits), beta * logratios.detach())


def wpo(policy_logps: Tensor, ref_logps: Tensor, lengths: Tensor, *, beta: float = 0.1) -> Loss:
    """Weighted preference optimisation: sg(w) l(Delta), w = exp(logp_w / |y_w| + logp_l / |y_l|), sg =
    stop-gradient, so that pairs the policy would not sample count less.

    policy_logps, ref_logps, lengths (2, B) -> losses (B,). Source: arXiv:2406.11827; its further
    alignment of w, which divides by sum_v pi(v)^2, is left out. Raises ValueError unless beta > 0.
    """
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    weights = (policy_logps / lengths).sum(0).clamp(max=0).exp().detach()  # (B,)
    return Loss(-weights * F.logsigmoid(logits), beta * logratios.detach())


def ipo(policy_logps: Tensor, ref_logps: Tensor, lengths: Tensor, *, tau: float = 0.1) -> Loss:
    """Identity preference optimisation: (h - 1 / (2 tau))^2, h the difference of length-averaged log-ratios.

    policy_logps, ref_logps, lengths (2, B) -> losses (B,). Source: arXiv:2310.12036, eq. 17; averaged over
    the length as its authors confirmed they did, where the paper writes sums. rewards = tau (logp - ref) /
    length. Raises ValueError unless tau > 0.
    """
    _positive(tau=tau)
    logratios = (policy_logps - ref_logps) / lengths  # (2, B)
    return Loss((_margin(logratios) - 1 / (2 * tau)).square(), tau * logratios.detach())


def hinge(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Loss:
    """Hinge loss on the DPO margin: max(0, 1 - beta Delta).

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2309.06657 (RSO), the hinge-norm loss, beta
    its gamma. Raises ValueError unless beta > 0.
    """
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    return Loss(F.relu(1 - logits), beta * logratios.detach())


def exo(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1, epsilon: float = 1e-3) -> Loss:
    """Exact optimisation: KL(q || p) of q = (sigmoid(beta Delta), sigmoid(-beta Delta)) to the smoothed label
    p = (1 - epsilon, epsilon): the reverse of DPO's direction.

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2402.00856, EXO on pairs. Raises
    ValueError unless beta > 0 and 0 < epsilon < 0.5.
    """
    _positive(epsilon=epsilon)
    _below_half(epsilon)
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    towards = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-epsilon))  # (B,)
    against = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(epsilon))  # (B,)
    return Loss(towards + against, beta * logratios.detach())


def nca(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.01) -> Loss:
    """Noise contrastive alignment, two responses: -logsigmoid(beta r_w) - [logsigmoid(-beta r_w) +
    logsigmoid(-beta r_l)] / 2.

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2402.05369, the NCA objective with K = 2 and
    its beta. Raises ValueError unless beta > 0.
    """
    chosen, rejected = rewards = _rewards(policy_logps, ref_logps, beta)  # (2, B)
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)  # (B,)
    return Loss(losses, rewards.detach())


def bco_pair(policy_logps: Tensor, ref_logps: Tensor, delta: Tensor, *, beta: float = 0.1) -> Loss:
    """Binary classifier optimisation on pairs: -logsigmoid(beta r_w - delta) - logsigmoid(delta - beta r_l).

    policy_logps, ref_logps (2, B), delta () -> losses (B,). delta is the mean reward over the responses of
    all steps before, 0 at first. Source: arXiv:2404.04656; there delta is a moving average of both
    class means. Raises ValueError unless beta > 0.
    """
    chosen, rejected = rewards = _rewards(policy_logps, ref_logps, beta)  # (2, B)
    return Loss(-F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected), rewards.detach())


def sppo_hard(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.001) -> Loss:
    """Self-play preference optimisation with hard labels: (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2405.00675, beta = 1 / eta with its eta. Its
    released code takes the mean of the two squares, so this loss and its gradient are twice those. Raises
    ValueError unless beta > 0.
    """
    _positive(beta=beta)
    chosen, rejected = logratios = policy_logps - ref_logps  # (2, B)
    losses = (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()  # (B,)
    return Loss(losses, beta * logratios.detach())


def apo_zero(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Loss:
    """Anchored preference optimisation, for chosen answers better than the policy's: 1 - sigmoid(beta r_w) +
    sigmoid(beta r_l).

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2408.06266, APO-zero. Raises ValueError
    unless beta > 0.
    """
    chosen, rejected = rewards = _rewards(policy_logps, ref_logps, beta)  # (2, B)
    return Loss((-chosen).sigmoid() + rejected.sigmoid(), rewards.detach())


def apo_down(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Loss:
    """Anchored preference optimisation, for chosen answers worse than the policy's: sigmoid(beta r_w) + 1 -
    sigmoid(beta (r_w - r_l)). Lowers the rejected answer, and the chosen one where |r_w| < |r_w - r_l|.

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2408.06266, APO-down. Raises ValueError
    unless beta > 0.
    """
    chosen, rejected = rewards = _rewards(policy_logps, ref_logps, beta)  # (2, B)
    return Loss(chosen.sigmoid() + (rejected - chosen).sigmoid(), rewards.detach())


def discopop(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1, tau: float = 0.2) -> Loss:
    """Discovered preference optimisation, the log-ratio modulated loss: (1 - s) (-logsigmoid(rho)) + s
    exp(-rho), rho = beta Delta, s = sigmoid(rho / tau).

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2406.08414, the LRML objective. Published
    default: tau 0.05, which near 0 pushes away from the preference. There the slope in rho is (1 - log 2) /
    (4 tau) - 3/4: +0.784 at tau 0.05, 0 at 0.1023, -0.366 at 0.2. From 0.11 to 0.9 the loss falls everywhere.
    Raises ValueError unless beta > 0 and 0 < tau < 1, beyond which it is unbounded.
    """
    if not 0 < tau < 1:
        raise ValueError(f"tau must be in (0, 1), got {tau}")
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    logistic = -(-logits / tau).sigmoid() * F.logsigmoid(logits)  # (B,)
    exponential = (F.logsigmoid(logits / tau) - logits).exp()  # (B,) the product as one exponent: no inf * 0
    return Loss(logistic + exponential, beta * logratios.detach())


def tdpo1(policy_logps: Tensor, ref_logps: Tensor, kl: Tensor, *, beta: float = 0.1) -> Loss:
    """Token-level DPO, first form: l(Delta - (K_l - K_w)), gradient through both sequential KLs.

    policy_logps, ref_logps, kl (2, B) -> losses (B,). Source: arXiv:2404.11999, the TDPO1 objective. own =
    beta (logp - ref + K), the reward its code logs. Raises ValueError unless beta > 0.
    """
    return _with_drift(policy_logps, ref_logps, kl, beta)


def tdpo2(
    policy_logps: Tensor, ref_logps: Tensor, kl: Tensor, *, beta: float = 0.1, alpha: float = 0.5
) -> Loss:
    """Token-level DPO, second form: l(Delta - alpha (K_l - sg(K_w))), sg = stop-gradient.

    policy_logps, ref_logps, kl (2, B) -> losses (B,). Source: arXiv:2404.11999, the TDPO2 objective. own =
    beta (logp - ref + alpha K), whose margin is the loss's logit; its code logs it without alpha. Raises
    ValueError unless beta > 0 and alpha >= 0.
    """
    return _with_anchored_drift(policy_logps, ref_logps, kl, beta, alpha)


def ra_dpo1(policy_logps: Tensor, ref_logps: Tensor, risk: Tensor, *, beta: float = 0.1) -> Loss:
    """Risk-aware DPO, first form: l(Delta - (R_l - R_w)), gradient through both sequential risks.

    policy_logps, ref_logps, risk (2, B) -> losses (B,); R is the sum over tokens of a measure of risk.py (the
    nested risk of the paper). Source: arXiv:2505.20359, Ra-DPO1; the published code differs in the measure,
    see `risk.published`, and sums over the pairs. own = beta (logp - ref + R). Raises ValueError unless beta
    > 0.
    """
    return _with_drift(policy_logps, ref_logps, risk, beta)


def ra_dpo2(
    policy_logps: Tensor, ref_logps: Tensor, risk: Tensor, *, beta: float = 0.1, alpha: float = 0.5
) -> Loss:
    """Risk-aware DPO, second form: l(Delta - alpha (R_l - sg(R_w))), sg = stop-gradient.

    policy_logps, ref_logps, risk (2, B) -> losses (B,). Source: arXiv:2505.20359, Ra-DPO2; differences as in
    `ra_dpo1`. own = beta (logp - ref + alpha R), whose margin is the loss's logit. Raises ValueError unless
    beta > 0 and alpha >= 0.
    """
    return _with_anchored_drift(policy_logps, ref_logps, risk, beta, alpha)


# ---- pairs, without a reference: rewards are beta logp


def slic(policy_logps: Tensor, *, margin: float = 1.0, sft_weight: float = 0.1) -> Loss:
    """Sequence likelihood calibration: max(0, margin - logp_w + logp_l) - sft_weight logp_w.

    policy_logps (2, B) -> losses (B,). Sums over tokens. Source: arXiv:2305.10425, eq. 1 with the
    cross-entropy regulariser on the chosen answer. Raises ValueError unless margin and sft_weight are >= 0.
    """
    _not_negative(margin=margin, sft_weight=sft_weight)
    losses = F.relu(margin - _margin(policy_logps)) - sft_weight * policy_logps[0]  # (B,)
    return Loss(losses, policy_logps.detach())


def simpo(policy_logps: Tensor, lengths: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Loss:
    """Simple preference optimisation: -logsigmoid(beta (logp_w / |y_w| - logp_l / |y_l|) - gamma).

    policy_logps, lengths (2, B) -> losses (B,). Source: arXiv:2405.14734, eq. 6; gamma is absolute, where
    some code names gamma / beta. rewards = beta logp / length. Raises ValueError unless beta > 0 and gamma is
    >= 0.
    """
    _positive(beta=beta)
    _not_negative(gamma=gamma)
    averages = policy_logps / lengths  # (2, B)
    return Loss(-F.logsigmoid(beta * _margin(averages) - gamma), beta * averages.detach())


def cpo(policy_logps: Tensor, lengths: Tensor, *, beta: float = 0.1, sft_weight: float = 1.0) -> Loss:
    """Contrastive preference optimisation: -logsigmoid(beta (logp_w - logp_l)) - sft_weight logp_w / |y_w|.

    policy_logps, lengths (2, B) -> losses (B,). Source: arXiv:2401.08417. The log-likelihood is averaged over
    each answer's tokens, so that every pair weighs the same; its code takes one mean over the tokens of all
    chosen answers of a micro-batch, where a longer answer weighs more. Raises ValueError unless beta > 0 and
    sft_weight >= 0.
    """
    _positive(beta=beta)
    _not_negative(sft_weight=sft_weight)
    losses = -F.logsigmoid(beta * _margin(policy_logps)) - sft_weight * policy_logps[0] / lengths[0]  # (B,)
    return Loss(losses, beta * policy_logps.detach())


def orpo(policy_logps: Tensor, lengths: Tensor, *, beta: float = 0.1) -> Loss:
    """Odds ratio preference optimisation: -a_w - beta logsigmoid(logit(e^a_w) - logit(e^a_l)), a = logp /
    |y|, logit(e^a) = a - log(1 - e^a).

    policy_logps, lengths (2, B) -> losses (B,). Source: arXiv:2403.07691, eq. 6 and 7, beta its lambda; the
    likelihood term is over the answer alone, where some code includes the prompt. rewards = beta a. Raises
    ValueError unless beta > 0.
    """
    _positive(beta=beta)
    averages = policy_logps / lengths  # (2, B)
    log_odds = averages - _log1mexp(averages)  # (2, B)
    return Loss(-averages[0] - beta * F.logsigmoid(_margin(log_odds)), beta * averages.detach())


def bradley_terry(sequence_scores: Tensor, margins: Tensor, *, center_weight: float = 0.0) -> Loss:
    """Reward model: -logsigmoid(s_w - s_l - margin) + center_weight (s_w + s_l)^2.

    sequence_scores (2, B), margins (B,) -> losses (B,), rewards = the scores. Source: arXiv:2307.09288, eq. 2
    for the margin; arXiv:2312.09244 for the centring. Raises ValueError unless center_weight >= 0.
    """
    _not_negative(center_weight=center_weight)
    losses = -F.logsigmoid(_margin(sequence_scores) - margins)  # (B,)
    return Loss(losses + center_weight * sequence_scores.sum(0).square(), sequence_scores.detach())


# ---- single responses, desirable or not


def kto(
    policy_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl_estimate: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """Kahneman-Tversky optimisation: w_D (1 - sigmoid(beta (r - z))) for desirable answers, w_U (1 -
    sigmoid(beta (z - r))) for undesirable ones, z = max(0, kl_estimate).

    policy_logps, ref_logps, desirable (R,), kl_estimate () -> losses (R,). The estimate is the mean of r over
    mismatched answers of the whole step, on all ranks, and has no gradient. Source: arXiv:2402.01306, the KTO
    loss. Raises ValueError unless beta > 0 and the weights are >= 0.
    """
    return _prospect(
        policy_logps - ref_logps, desirable, kl_estimate, beta, desirable_weight, undesirable_weight
    )


def kto_token_max(
    policy_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl_token_max: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """KTO whose reference point is each response's own: z = the largest max(0, log-ratio) of a token of its
    mismatched answer.

    policy_logps, ref_logps, desirable, kl_token_max (R,) -> losses (R,). Source: the published code's
    "tokenwise_KL"; in no paper. Raises ValueError as `kto`.
    """
    return _prospect(
        policy_logps - ref_logps, desirable, kl_token_max, beta, desirable_weight, undesirable_weight
    )


def kto_zero(
    policy_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """KTO with the reference point 0, where policy and reference agree: `kto` at z = 0.

    policy_logps, ref_logps, desirable (R,) -> losses (R,). Source: the ablation of arXiv:2402.01306. Raises
    ValueError as `kto`.
    """
    zero = torch.zeros_like(policy_logps[:1])  # (1,)
    return _prospect(policy_logps - ref_logps, desirable, zero, beta, desirable_weight, undesirable_weight)


def bco(
    policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, delta: Tensor, *, beta: float = 0.1
) -> Loss:
    """Binary classifier optimisation: -logsigmoid(beta r - delta) for desirable answers, -logsigmoid(delta -
    beta r) for undesirable ones.

    policy_logps, ref_logps, desirable (R,), delta () -> losses (R,). delta as in `bco_pair`. Source:
    arXiv:2404.04656, without its underlying-distribution-matching weights. Raises ValueError unless
    beta > 0.
    """
    rewards = _rewards(policy_logps, ref_logps, beta)  # (R,)
    return Loss(-F.logsigmoid(torch.where(desirable, rewards - delta, delta - rewards)), rewards.detach())


def apo_zero_unpaired(
    policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, *, beta: float = 0.1
) -> Loss:
    """APO-zero on single answers: 1 - sigmoid(beta r) for desirable ones, sigmoid(beta r) for undesirable
    ones.

    policy_logps, ref_logps, desirable (R,) -> losses (R,). Source: arXiv:2408.06266, APO-zero, its two
    terms apart; equal to `kto_zero` with unit weights. Raises ValueError unless beta > 0.
    """
    rewards = _rewards(policy_logps, ref_logps, beta)  # (R,)
    return Loss(torch.where(desirable, -rewards, rewards).sigmoid(), rewards.detach())


# ---- policy gradients on stored responses


def ppo(
    token_policy_logps: Tensor,
    token_ref_logps: Tensor,
    token_logratios: Tensor,
    token_values: Tensor,
    token_entropy: Tensor,
    token_advantages: Tensor,
    token_returns: Tensor,
    *,
    clip: float = 0.5,
    value_weight: float = 0.01,
    kl_weight: float = 0.1,
    entropy_weight: float = 0.0,
) -> Loss:
    """Offline one-step PPO, per token: max(-A rho, -A clamp(rho, clip, 1 / clip)) + value_weight (V - G)^2 /
    2 + kl_weight (e^d - d - 1) - entropy_weight H, rho = e^token_logratios = pi / pi_ref, d = log pi_ref -
    log pi.

    All (N,) -> losses (N,); rewards = log pi - log pi_ref in nats. Under `humanline` rho alone is clamped: d
    and the rewards are of the log-probabilities as they are, so that a token beyond the bounds is still
    pulled back. The reference is the old policy; A (GAE, whitened over the step) and G (discounted return)
    come from `advantages`. metrics: the share of clipped tokens, the entropy, the KL estimate k3. Source:
    arXiv:1707.06347, eq. 7 and 9, offline as in arXiv:2402.01306, appendix; KL by k3 since -log rho is not a
    KL off-policy. Raises ValueError unless 0 < clip < 1 and the weights are >= 0.
    """
    if not 0 < clip < 1:
        raise ValueError(f"clip must be in (0, 1), got {clip}")
    _not_negative(value_weight=value_weight, kl_weight=kl_weight, entropy_weight=entropy_weight)
    surrogate, clipped = _clipped(token_logratios, token_advantages, clip, 1 / clip)  # (N,) each
    logratios = token_policy_logps - token_ref_logps  # (N,)
    penalty = _k3(logratios)  # (N,)
    critic = 0.5 * (token_values - token_returns).square()  # (N,)
    losses = surrogate + value_weight * critic + kl_weight * penalty - entropy_weight * token_entropy
    metrics = {"clip_fraction": clipped, "entropy": token_entropy, "kl_k3": penalty, "critic": critic}
    return Loss(losses, logratios.detach(), None, {name: value.detach() for name, value in metrics.items()})


def grpo(
    token_policy_logps: Tensor,
    token_ref_logps: Tensor,
    token_logratios: Tensor,
    response: Tensor,
    lengths: Tensor,
    scores: Tensor,
    group: Tensor,
    *,
    beta: float = 0.04,
    epsilon: float = 0.2,
    std_floor: float = 0.01,
) -> Loss:
    """Offline GRPO: of each response the mean over its tokens of max(-A rho, -A clamp(rho, 1 - epsilon, 1 +
    epsilon)) + beta (e^d - d - 1), A = (s - mean) / (std + std_floor) within the responses of one prompt.

    token_* and response (N,), lengths, scores, group (R,) -> losses (R,); rewards (N,) = log pi - log pi_ref.
    rho = e^token_logratios = pi / pi_ref, d = log pi_ref - log pi: the reference is the old policy; under
    `humanline` rho alone is clamped, as in `ppo`. std of the population, so that a lone response has A = 0:
    prompts whose responses all have one score teach nothing and are left out when data are read. Source:
    arXiv:2402.03300, eq. 3 and 4 with its beta; std_floor as HALOs (TRL: 1e-4). Raises ValueError unless 0 <
    epsilon < 1, beta >= 0 and std_floor > 0.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), got {epsilon}")
    _positive(std_floor=std_floor)
    _not_negative(beta=beta)
    same = (group[:, None] == group).to(scores.dtype)  # (R, R); the host need not know how many
    members = same.sum(1)  # (R,) of its group
    centred = scores - (same * scores).sum(1) / members  # (R,)
    variance = (same * centred.square()).sum(1) / members  # (R,)
    advantages = centred / (variance.sqrt() + std_floor)  # (R,)
    bounds = (1 - epsilon, 1 + epsilon)
    surrogate, clipped = _clipped(token_logratios, advantages[response], *bounds)  # (N,) each
    logratios = token_policy_logps - token_ref_logps  # (N,)
    penalty = _k3(logratios)  # (N,)

    def per_response(values: Tensor) -> Tensor:
        return values.new_zeros(len(scores)).index_add(0, response, values) / lengths  # (R,)

    metrics = {"clip_fraction": per_response(clipped), "kl_k3": per_response(penalty).detach()}
    return Loss(per_response(surrogate + beta * penalty), logratios.detach(), None, metrics)


def sft(token_policy_logps: Tensor) -> Loss:
    """Supervised fine-tuning: -log pi(y_t | x, y_<t) of every trained token.

    token_policy_logps (N,) -> losses (N,), so a batch averages over its tokens and not over its sequences.
    rewards are the detached log-probabilities. Raises nothing.
    """
    return Loss(-token_policy_logps, token_policy_logps.detach())


# ---- not losses, but of them: their keyword-only parameters are flags of the losses they apply to


def with_sft(losses: Tensor, policy_logps: Tensor, lengths: Tensor, *, sft_weight: float = 0.0) -> Tensor:
    """A pair loss plus sft_weight times the length-averaged -logp_w of the chosen answer.

    losses (B,), policy_logps, lengths (2, B) -> (B,). Source: arXiv:2404.19733 (iterative RPO). Raises
    ValueError unless sft_weight >= 0.
    """
    _not_negative(sft_weight=sft_weight)
    return losses - sft_weight * policy_logps[0] / lengths[0] if sft_weight else losses


def humanline(token_logratios: Tensor, *, log_epsilon_p: float = -1.0, log_epsilon_r: float = 1.5) -> Tensor:
    """Log-ratios to the reference clamped, token by token, to [log_epsilon_p, log_epsilon_r], without
    gradient where it bites.

    (N,) -> (N,). For losses that see the policy through its log-ratio alone, whose log-probabilities become
    the reference's plus these; and for losses that ask for `token_logratios`, which get these and all else as
    it is. Source: HALOs (arXiv:2509.24207), with its bounds. Raises ValueError unless log_epsilon_p < 0 <
    log_epsilon_r.
    """
    if not -math.inf < log_epsilon_p < 0 < log_epsilon_r < math.inf:
        raise ValueError(
            f"humanline needs log_epsilon_p < 0 < log_epsilon_r, got {log_epsilon_p}, {log_epsilon_r}"
        )
    return token_logratios.clamp(log_epsilon_p, log_epsilon_r)


def advantages(
    rewards: Tensor,
    values: Tensor,
    response: Tensor,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and discounted returns of responses rewarded at their last token.

    rewards (R,), values and response (N,), responses contiguous and ascending -> (N,), (N,). With T the last
    token and V_{T+1} = 0: A_t = delta_t + gamma gae_lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; G_t
    = gamma^(T-t) r_T, r_t included. Not whitened. Source: arXiv:1506.02438, eq. 16. Raises ValueError unless
    0 < gamma <= 1 and 0 <= gae_lambda <= 1.
    """
    if not (0 < gamma <= 1 and 0 <= gae_lambda <= 1):
        raise ValueError(f"0 < gamma <= 1 and 0 <= gae_lambda <= 1 are needed, got {gamma}, {gae_lambda}")
    ends = torch.searchsorted(response, response, right=True) - 1  # (N,) T of each token's response
    backwards = ends - torch.arange(len(values), device=values.device)  # (N,) T - t
    future = torch.where(backwards > 0, values.roll(-1), 0.0).double()  # (N,) V_{t+1}
    found = torch.where(backwards == 0, rewards[response], 0.0) + gamma * future - values  # (N,) delta_t
    # Every sum over 1, 2, 4, ... tokens is made of two of half as many, in fp64: a loop over time would read
    # the longest response's length off a GPU.
    reach = 1
    while reach < len(values):
        later = torch.where(backwards >= reach, found.roll(-reach), 0.0)  # (N,)
        found = found + (gamma * gae_lambda) ** reach * later
        reach *= 2
    return found.to(values.dtype), rewards[response] * gamma ** backwards.to(values.dtype)


# ---- helpers


def _implicit(policy_logps: Tensor, ref_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log-ratios (2, B) and beta Delta (B,)."""
    _positive(beta=beta)
    logratios = policy_logps - ref_logps  # (2, B)
    return logratios, beta * _margin(logratios)


def _rewards(policy_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """beta r, of any shape."""
    _positive(beta=beta)
    return beta * (policy_logps - ref_logps)


def _prospect(
    logratios: Tensor, desirable: Tensor, origin: Tensor, beta: float, gain: float, pain: float
) -> Loss:
    """The value of gains and losses against max(0, origin): (R,) -> losses (R,)."""
    _positive(beta=beta)
    _not_negative(desirable_weight=gain, undesirable_weight=pain)
    distance = beta * (logratios - origin.detach().clamp(min=0))  # (R,)
    losses = torch.where(desirable, gain * (-distance).sigmoid(), pain * distance.sigmoid())  # (R,)
    return Loss(losses, beta * logratios.detach())


def _with_drift(policy_logps: Tensor, ref_logps: Tensor, drift: Tensor, beta: float) -> Loss:
    _positive(beta=beta)
    logratios = policy_logps - ref_logps  # (2, B)
    own = logratios + drift  # (2, B)
    losses = -F.logsigmoid(beta * _margin(own))  # (B,) Delta - (X_l - X_w) is the margin of logratio + X
    return Loss(losses, beta * logratios.detach(), beta * own.detach())


def _with_anchored_drift(
    policy_logps: Tensor, ref_logps: Tensor, drift: Tensor, beta: float, alpha: float
) -> Loss:
    _not_negative(alpha=alpha)
    logratios, logits = _implicit(policy_logps, ref_logps, beta)  # (2, B), (B,)
    chosen, rejected = drift
    losses = -F.logsigmoid(logits - beta * alpha * (rejected - chosen.detach()))  # (B,)
    return Loss(losses, beta * logratios.detach(), beta * (logratios + alpha * drift).detach())


def _clipped(logratios: Tensor, weights: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate max(-A rho, -A clamp(rho, low, high)), and 1 where the clamp decides: (N,)
    each."""
    ratio = _exp(logratios)  # (N,)
    free, bound = -weights * ratio, -weights * ratio.clamp(low, high)  # (N,) each
    return torch.maximum(free, bound), (bound > free).to(ratio.dtype)


def _k3(logratios: Tensor) -> Tensor:
    """e^d - d - 1 >= 0 with d = -logratio: an estimate of a KL without bias and of low variance."""
    logratios = logratios.clamp(min=-MAX_EXPONENT)  # of both terms, lest the linear one push on alone
    return _exp(-logratios) + logratios - 1


def _exp(exponents: Tensor) -> Tensor:
    return exponents.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - e^a) for a <= 0; 0 is taken as -eps, for a probability of 1 has no odds."""
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    near = values.clamp(min=-math.log(2))  # each branch is kept where its gradient is finite
    far = values.clamp(max=-math.log(2))
    return torch.where(values > -math.log(2), (-near.expm1()).log(), (-far.exp()).log1p())


def _margin(values: Tensor) -> Tensor:
    """Chosen minus rejected: (2, B) -> (B,)."""
    return values[0] - values[1]


def _below_half(epsilon: float) -> None:
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon must be in [0, 0.5), got {epsilon}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value}")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
