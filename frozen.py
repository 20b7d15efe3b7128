"""Phase A of a step of align.py: what is fixed for its micro-batches before any gradient, on all ranks.

The reference's hidden states, the KL estimate from mismatched responses, the critic's old values and the
advantages, whitened over the step (objective.Frozen). A loss sees that and its own micro-batch, nothing else.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import batch
import fsdp
import model
import vocab
from objective import Frozen, Objective, by_response


def hidden_states(lm: model.LanguageModel, pack: batch.Pack, ends: bool = False) -> Tensor:
    """The states that predict the trained tokens (N, D), or the last of each response (R, D)."""
    return lm(pack.ids, pack.positions, pack.layout, pack.ends if ends else pack.predict)


class Cached(NamedTuple):
    """What a reference has said of the trained tokens of a store, by Pack.tokens, in its place."""

    logps: np.ndarray  # (n,) nats
    states: np.ndarray | None  # (n, D) float32, or the bits of bfloat16; with them
    head: vocab.Head | None  # the whole distribution
    strangers: np.ndarray | None  # logps (n',) of the mismatched answers


@torch.no_grad()
def of_reference(
    reference: model.LanguageModel | Cached | None, pack: batch.Pack, strange: bool = False
) -> Tensor | None:
    """The reference's states (N, D) of a pack, or its log-probabilities (N,) where these are all that is
    kept, as of a `strange` pack, of mismatched answers; None without a reference."""
    if not isinstance(reference, Cached):
        return hidden_states(reference, pack) if reference else None
    if strange or reference.states is None:
        kept = reference.strangers if strange else reference.logps
        return batch.copied([torch.from_numpy(kept[pack.tokens])], pack.ids.device)[0]
    rows = batch.copied([torch.from_numpy(reference.states[pack.tokens])], pack.ids.device)[0]
    return rows.view(torch.bfloat16) if rows.dtype == torch.int16 else rows


def token_statistics(
    hidden: Tensor,
    policy: model.LanguageModel,
    reference: model.LanguageModel | Cached | None,
    pack: batch.Pack,
    known: Tensor | None,
    measure: vocab.Measure | None = None,
    through: str | None = None,
    entropy: bool = False,
) -> vocab.Tokens:
    """vocab.token_statistics of the policy's states (N, D) and of what is `known` of the reference."""
    twin = (known, reference.head) if known is not None and known.dim() == 2 else None
    drift = (measure, through)
    tokens = vocab.token_statistics(hidden, policy.head, pack.targets, twin, *drift, entropy=entropy)
    return tokens if known is None or twin else tokens._replace(ref_logps=known)


@torch.no_grad()
def freeze(
    objective: Objective,
    policy: model.LanguageModel,
    reference: model.LanguageModel | Cached | None,
    packs: list[batch.Pack],
    strangers: list[batch.Pack],
    delta: Tensor,
) -> tuple[list[Frozen], dict[str, Tensor]]:
    """Phase A but for the reference's states: what is fixed for each micro-batch, and (sum, count) of all
    ranks of what of it is logged. Nothing is read: the host need not wait.

    `strangers` are the packs' prompts with other prompts' answers, for the KL estimate. One all_reduce of
    fixed size makes the estimate, and the mean and variance that whiten the advantages, those of all ranks.
    """
    founds = [Frozen(delta=delta) for _ in packs]
    if not objective.mismatches and objective.advantages is None:
        return founds, {}
    tallies = []
    for k, (pack, stranger) in enumerate(zip(packs, strangers)):
        sums = {}
        if objective.mismatches:
            known = of_reference(reference, stranger, strange=True)  # (N', D) or (N',)
            hidden = hidden_states(policy, stranger)  # (N', D)
            tokens = token_statistics(hidden, policy, reference, stranger, known)
            logratios = tokens.logps - tokens.ref_logps  # (N',)
            if objective.humanline is not None:
                logratios = objective.humanline(logratios)  # (N',)
            zeros = logratios.new_zeros(len(stranger.ends))
            peaks = zeros.scatter_reduce(0, stranger.response, logratios, "amax")
            founds[k] = founds[k]._replace(kl_token_max=peaks)  # (R,) >= 0
            sums["kl_estimate"] = batch.summed(by_response(logratios, stranger), pack)
        if objective.advantages is not None:
            values = policy.value_head(hidden_states(policy, pack))[:, 0]  # (N,)
            gains, returns = objective.advantages(objective.rewards_of(pack), values, pack.response)  # (N,)
            founds[k] = founds[k]._replace(old_values=values, advantages=gains, returns=returns)
            for name, series in (("advantages", gains), ("returns", returns), ("errors", returns - values)):
                sums[name] = batch.summed(series, pack)
                sums[f"{name}_squared"] = batch.summed(series.double().square(), pack)
        tallies.append(sums)
    found = fsdp.sums_over_ranks(tallies)  # (2,) each
    mean = {name: total / count for name, (total, count) in found.items()}  # () each
    logged = {}
    if objective.mismatches:
        logged["kl_estimate"] = found["kl_estimate"]
        estimate = mean["kl_estimate"].to(delta.dtype)  # ()
        founds = [f._replace(kl_estimate=estimate) for f in founds]
    if objective.advantages is not None:
        spread = {n: mean[f"{n}_squared"] - mean[n] ** 2 for n in ("advantages", "returns", "errors")}
        scale = (spread["advantages"].clamp(min=0.0) + 1e-8) ** -0.5  # ()
        founds = [f._replace(advantages=(f.advantages - mean["advantages"]) * scale) for f in founds]
        there = spread["returns"] > 1e-12  # () else there is nothing to explain
        logged["explained_variance"] = torch.stack([1 - spread["errors"] / spread["returns"], there.double()])
    return founds, logged
