"""Phase A of a step of align.py: what is fixed for its micro-batches before any gradient, on all ranks.

The reference's hidden states, the KL estimate from mismatched responses, the critic's old values and the
advantages, whitened over the step (objective.Frozen). A loss sees that and its own micro-batch, nothing else.
"""

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


@torch.no_grad()
def freeze(
    objective: Objective,
    policy: model.LanguageModel,
    reference: model.LanguageModel | None,
    packs: list[batch.Pack],
    strangers: list[batch.Pack],
    delta: Tensor,
) -> tuple[list[Frozen], dict[str, float]]:
    """Phase A but for the reference's states: what is fixed for each micro-batch, and what of it is logged.

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
            twin = (hidden_states(reference, stranger), reference.head)
            hidden = hidden_states(policy, stranger)  # (N', D)
            tokens = vocab.token_statistics(hidden, policy.head, stranger.targets, twin)
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
    found = fsdp.mean_over_ranks(tallies)
    logged = {}
    if objective.mismatches:
        logged["kl_estimate"] = found["kl_estimate"]
        estimate = torch.full_like(delta, found["kl_estimate"])  # written there, not copied
        founds = [f._replace(kl_estimate=estimate) for f in founds]
    if objective.advantages is not None:
        spread = {n: found[f"{n}_squared"] - found[n] ** 2 for n in ("advantages", "returns", "errors")}
        scale = (max(0.0, spread["advantages"]) + 1e-8) ** -0.5
        founds = [f._replace(advantages=(f.advantages - found["advantages"]) * scale) for f in founds]
        if spread["returns"] > 1e-12:  # else there is nothing to explain
            logged["explained_variance"] = 1 - spread["errors"] / spread["returns"]
    return founds, logged
