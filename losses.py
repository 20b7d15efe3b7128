"""Preference losses: pure functions from the statistics of a batch to one loss per unit.

A loss asks for what it needs by naming it. Positional parameters are statistics, keyword-only parameters are
hyper-parameters; `align.py` reads the signature, so the flags, their defaults and whether a reference model
is loaded at all come from here. All statistics are fp32 (or fp64) nats, summed over the trained tokens of a
response:

    policy_logps, ref_logps   (2, B)   log pi(y|x); axis 0 is (chosen, rejected)
    kl, risk                  (2, B)   sequential forward KL and risk, sums over the tokens of a response
    lengths                   (2, B)   trained tokens
    token_policy_logps        (N,)     log pi of each trained token (SFT)

In the docstrings Delta = (logp_w - ref_w) - (logp_l - ref_l), w chosen, l rejected, and l(d) =
-logsigmoid(beta d). The caller sums `losses` and divides by the number of units of the whole optimiser step.

Adding a loss = adding one public function here, annotated `-> Loss`.
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    losses: (
        Tensor  # (B,) pairs, (R,) responses or (N,) tokens: one number per unit the loss averages over, nats
    )
    rewards: (
        Tensor  # (2, B), (R,) or (N,) implicit rewards beta (logp - ref), detached: comparable across methods
    )
    own: Tensor | None = (
        None  # like rewards: the method's own reward where it differs (drift included), detached
    )


def dpo(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Loss:
    """Direct preference optimisation: l(Delta) = -logsigmoid(beta Delta).

    policy_logps, ref_logps (2, B) -> losses (B,). Source: arXiv:2305.18290, eq. 7. Raises ValueError unless
    beta > 0.
    """
    _positive(beta=beta)
    logratios = policy_logps - ref_logps  # (2, B)
    return Loss(-F.logsigmoid(beta * _margin(logratios)), beta * logratios.detach())


def cdpo(policy_logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1, epsilon: float = 0.2) -> Loss:
    """Conservative DPO for labels flipped with probability epsilon: (1 - epsilon) l(Delta) + epsilon
    l(-Delta).

    policy_logps, ref_logps (2, B) -> losses (B,). Source: E. Mitchell, A note on DPO with noisy preferences,
    2023. Raises ValueError unless beta > 0 and 0 <= epsilon < 0.5.
    """
    _positive(beta=beta)
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon must be in [0, 0.5), got {epsilon}")
    logratios = policy_logps - ref_logps  # (2, B)
    logits = beta * _margin(logratios)  # (B,)
    losses = -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)  # (B,)
    return Loss(losses, beta * logratios.detach())


def ipo(policy_logps: Tensor, ref_logps: Tensor, lengths: Tensor, *, tau: float = 0.1) -> Loss:
    """Identity preference optimisation: (h - 1 / (2 tau))^2, h the difference of length-averaged log-ratios.

    policy_logps, ref_logps, lengths (2, B) -> losses (B,). Source: arXiv:2310.12036, eq. 17; averaged over
    the length as its authors confirmed they did, where the paper writes sums. rewards = tau (logp - ref) /
    length. Raises ValueError unless tau > 0.
    """
    _positive(tau=tau)
    logratios = (policy_logps - ref_logps) / lengths  # (2, B)
    return Loss((_margin(logratios) - 1 / (2 * tau)).square(), tau * logratios.detach())


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
    beta (logp - ref + K). Raises ValueError unless beta > 0 and alpha >= 0.
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
    `ra_dpo1`. own = beta (logp - ref + R). Raises ValueError unless beta > 0 and alpha >= 0.
    """
    return _with_anchored_drift(policy_logps, ref_logps, risk, beta, alpha)


def sft(token_policy_logps: Tensor) -> Loss:
    """Supervised fine-tuning: -log pi(y_t | x, y_<t) of every trained token.

    token_policy_logps (N,) -> losses (N,), so a batch averages over its tokens and not over its sequences.
    rewards are the detached log-probabilities. Raises nothing.
    """
    return Loss(-token_policy_logps, token_policy_logps.detach())


def _with_drift(policy_logps: Tensor, ref_logps: Tensor, drift: Tensor, beta: float) -> Loss:
    _positive(beta=beta)
    logratios = policy_logps - ref_logps  # (2, B)
    own = logratios + drift  # (2, B)
    losses = -F.logsigmoid(beta * _margin(own))  # (B,) Delta - (X_l - X_w) is the margin of logratio + X
    return Loss(losses, beta * logratios.detach(), beta * own.detach())


def _with_anchored_drift(
    policy_logps: Tensor, ref_logps: Tensor, drift: Tensor, beta: float, alpha: float
) -> Loss:
    _positive(beta=beta)
    if not (0 <= alpha < math.inf):
        raise ValueError(f"alpha must be a finite number >= 0, got {alpha}")
    logratios = policy_logps - ref_logps  # (2, B)
    chosen, rejected = drift
    losses = -F.logsigmoid(beta * (_margin(logratios) - alpha * (rejected - chosen.detach())))  # (B,)
    return Loss(losses, beta * logratios.detach(), beta * (logratios + drift).detach())


def _margin(values: Tensor) -> Tensor:
    """Chosen minus rejected: (2, B) -> (B,)."""
    return values[0] - values[1]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value}")
