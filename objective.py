"""What --loss means: its signature, read. Which statistics, data, heads and flags it needs, the one dict that
its statistics come from, and what is logged of them.

    resolve          flags that go with the loss, or one line of error
    make_objective   flags -> Objective, hyper-parameters bound and tried on made-up statistics
    statistics       a micro-batch -> everything a loss may ask for by name
    tally, means     losses, rewards, statistics -> sums of a micro-batch -> what metrics.jsonl holds

Nothing here, and nothing in align.py, knows the name of a loss.

Left out: losses that couple the examples of a batch other than through what phase A freezes.
"""

import argparse
import functools
import math
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

import batch
import config
import encode
import fsdp
import losses
import ranking
import risk
import vocab
from arrays import Store
from formats import Example

LOSSES = config.functions_returning(losses, losses.Loss)
del LOSSES["sft"]  # it sees no preference and would train the rejected answers: sft.py
RISKS = config.functions_returning(risk, risk.Risk)


def rewards_of(pack: batch.Pack, *, rewards: str = "labels") -> Tensor:
    """The reward of each response (R,): "labels" +1 or -1, "scores" the rows' own. Raises ValueError for
    another word."""
    if rewards not in ("labels", "scores"):
        raise ValueError(f"--rewards must be labels or scores, got {rewards}")
    return pack.scores if rewards == "scores" else pack.desirable * 2.0 - 1.0


# What is not a loss but has flags of its own, and for which losses.
HELPERS = {
    "pair losses": ranking.usable_pair,
    "any other pair loss": losses.with_sft,
    "unary losses": batch.thin,
    "losses with advantages": losses.advantages,
    "the rewards of advantages": rewards_of,
    "--humanline true": losses.humanline,
}


# Of what equal models may differ by at step 0, as a share of a response's log-probability. Products of bf16
# numbers in another order may round every state otherwise, by 2^-9 of it; another model is off by more.
START_TOLERANCE = {"cuda": 1e-3}

# What needs a reference model.
REFERENCE = ("ref_logps", "token_ref_logps", "token_logratios", "kl", "risk", "kl_estimate", "kl_token_max")
# What needs a value head, and advantages made before the step.
CRITIC = ("token_values", "token_old_values", "token_advantages", "token_returns")


def resolve(args: argparse.Namespace) -> None:
    """Put the defaults that depend on --loss into args; fail in one line for a flag that it does not take."""
    needs = config.positional(LOSSES[args.loss])
    if args.risk and "risk" not in needs:
        config.fail(f"--loss {args.loss} takes no --risk")
    if args.risk is None and "risk" in needs:
        args.risk = "cvar"
    through_ratio = {"policy_logps", "ref_logps"} <= set(needs) or "token_ref_logps" in needs
    through_ratio = through_ratio and not {"kl", "risk"} & set(needs)
    if args.humanline and not (through_ratio or "token_logratios" in needs):
        config.fail(f"--loss {args.loss} takes no --humanline: it is not a function of the log-ratio alone")
    critic, reference = (any(name in names for name in needs) for names in (CRITIC, REFERENCE))
    rendered = "sequence_scores" in needs  # whole conversations are read
    takes = {"reference": reference, "sync_reference_every": reference}
    takes |= {"max_value_grad_norm": critic, "max_prompt_length": not rendered}
    takes |= {"sample_prompts": not rendered, "cache_reference": reference, "offload": reference}
    takes["offload"] |= args.offload == "all"
    for name in [name for name in takes if getattr(args, name) and not takes[name]]:
        config.fail(f"--loss {args.loss} takes no --{name.replace('_', '-')}")
    if critic:
        args.max_value_grad_norm = args.max_value_grad_norm or 0.1
    if not rendered:
        args.max_prompt_length = args.max_prompt_length or args.max_length // 2
        if args.max_prompt_length >= args.max_length:
            limits = (args.max_prompt_length, args.max_length)
            config.fail("--max-prompt-length {} must be less than --max-length {}".format(*limits))
    for name in ("steps", "save_every", "sync_reference_every"):
        if (getattr(args, name) or 0) % args.ppo_epochs:
            config.fail(f"--{name.replace('_', '-')} must be a multiple of --ppo-epochs {args.ppo_epochs}")
    risk_name = f" --risk {args.risk}" if args.risk else ""
    everything = [*LOSSES.values(), *RISKS.values(), *HELPERS.values()]
    config.resolve_hyperparameters(args, f"--loss {args.loss}{risk_name}", chosen(args), everything)


def chosen(args: argparse.Namespace) -> list[Callable]:
    """The functions whose keyword-only parameters are flags of this run."""
    loss = LOSSES[args.loss]
    needs = config.positional(loss)
    pairs = in_pairs(needs)
    own_sft = "sft_weight" in config.hyperparameter_names(loss) or "sequence_scores" in needs
    critic = any(name in CRITIC for name in needs)
    asked = {
        RISKS.get(args.risk): args.risk,
        ranking.usable_pair: pairs,
        losses.with_sft: pairs and not own_sft,
        batch.thin: not pairs,
        losses.advantages: critic,
        rewards_of: critic,
        losses.humanline: args.humanline,
    }
    return [loss, *[function for function, wanted in asked.items() if wanted]]


def in_pairs(needs: list[str]) -> bool:
    """Does a loss compare pairs? Not if it names what only single responses have."""
    single = ("desirable", "scores", "group", "response", "kl_token_max")
    return not any(name in single or name.startswith("token_") for name in needs)


class Frozen(NamedTuple):
    """What phase A fixes for a micro-batch: no gradient flows into it, and no other batch changes it."""

    delta: Tensor | None = None  # ()
    kl_estimate: Tensor | None = None  # ()
    kl_token_max: Tensor | None = None  # (R,)
    old_values: Tensor | None = None  # (N,)
    advantages: Tensor | None = None  # (N,) whitened over the step
    returns: Tensor | None = None  # (N,)


def statistics(
    pack: batch.Pack,
    tokens: vocab.Tokens,
    pairs: bool,
    frozen: Frozen,
    values: Tensor | None = None,
    scores: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Everything a loss may ask for by name. Sums over the trained tokens of a response, nats; `values` (N,)
    and `scores` (R,) are of the scalar heads."""
    sums = functools.partial(_sums, pack=pack, pairs=pairs)
    logratios = None if tokens.ref_logps is None else tokens.logps - tokens.ref_logps  # (N,)
    return {
        "policy_logps": sums(tokens.logps),  # (2, B) or (R,)
        "ref_logps": sums(tokens.ref_logps),  # (2, B) or (R,) frozen
        "kl": sums(tokens.kl),  # (2, B) or (R,)
        "risk": sums(tokens.risk),  # (2, B) or (R,)
        "lengths": sums(torch.ones_like(pack.response, dtype=torch.float32)),  # (2, B) or (R,) trained tokens
        "margins": pack.margins,  # (B,)
        "sequence_scores": None if scores is None else scores[pack.pairs],  # (2, B)
        "desirable": pack.desirable,  # (R,)
        "scores": pack.scores,  # (R,)
        "group": pack.group,  # (R,)
        "response": pack.response,  # (N,)
        "token_policy_logps": tokens.logps,  # (N,)
        "token_ref_logps": tokens.ref_logps,  # (N,) frozen
        "token_logratios": logratios,  # (N,)
        "token_entropy": tokens.entropy,  # (N,)
        "token_values": values,  # (N,)
        "token_old_values": frozen.old_values,  # (N,) frozen
        "token_advantages": frozen.advantages,  # (N,) frozen
        "token_returns": frozen.returns,  # (N,) frozen
        "kl_estimate": frozen.kl_estimate,  # () frozen
        "kl_token_max": frozen.kl_token_max,  # (R,) frozen
        "delta": frozen.delta,  # () frozen
    }


def seen(
    objective: "Objective", stats: dict[str, Tensor | None], pack: batch.Pack
) -> dict[str, Tensor | None]:
    """The statistics that the loss gets: under --humanline with clamped log-ratios.

    A loss that asks for `token_logratios` gets these clamped and everything else as it is. To any other the
    policy's log-probabilities are the reference's plus the clamped log-ratios.
    """
    if objective.humanline is None:
        return stats
    logratios = objective.humanline(stats["token_logratios"])  # (N,)
    if "token_logratios" in objective.needs:
        return stats | {"token_logratios": logratios}
    logps = stats["token_ref_logps"] + logratios  # (N,)
    return stats | {"token_policy_logps": logps, "policy_logps": _sums(logps, pack, bool(objective.pairs))}


def _sums(values: Tensor | None, pack: batch.Pack, pairs: bool) -> Tensor | None:
    """Sums over the tokens of each response, by pairs or not: (N,) -> (2, B) or (R,)."""
    if values is None:
        return None
    responses = by_response(values, pack)  # (R,)
    return responses[pack.pairs] if pairs else responses


def by_response(values: Tensor, pack: batch.Pack) -> Tensor:
    """Sums over the tokens of each response: (N,) -> (R,)."""
    return values.new_zeros(len(pack.ends)).index_add(0, pack.response, values)


class Objective(NamedTuple):
    """What --loss and --risk say, read off the signatures of their functions; hyper-parameters are bound."""

    loss: Callable[..., losses.Loss]
    needs: list[str]  # the statistics it asks for
    unit: str  # pairs, responses or tokens: what the loss is a mean over
    pairs: str | None  # which completions are compared; None for single responses
    measure: vocab.Measure | None
    through: str | None  # the drift with a gradient: "kl", "risk" or None
    with_sft: Callable | None
    humanline: Callable | None
    advantages: Callable | None
    rewards_of: Callable | None
    thin: Callable | None

    @property
    def has_reference(self) -> bool:
        return any(name in REFERENCE for name in self.needs)

    @property
    def mismatches(self) -> bool:
        return "kl_estimate" in self.needs or "kl_token_max" in self.needs

    @property
    def scores(self) -> bool:
        return "sequence_scores" in self.needs

    @property
    def compares(self) -> bool:
        """Does it learn from the scores of a prompt's completions against each other alone?"""
        return bool(self.pairs) or "group" in self.needs

    @property
    def select(self) -> Callable[[Example], Example | str]:
        """What it learns from in a row, or the reason why that is nothing."""
        if self.pairs:
            return functools.partial(ranking.usable_pair, pairs=self.pairs)
        return ranking.usable_group if self.compares else ranking.usable_feedback

    def unsure(self, found: Store, args: argparse.Namespace) -> np.ndarray:
        """The examples of a store of which `select` and the encoder have not said yet what is used."""
        if not self.compares:
            return np.arange(0)
        if args.group_by or self.thin is not None:
            return np.arange(len(found))
        return np.flatnonzero(found.sizes > 2)

    def counts(self, found: Store) -> np.ndarray:
        """How many of what --batch-size counts each example of a store has: (n,)."""
        return ranking.pair_counts(found.scores, found.sizes, self.pairs) if self.pairs else found.sizes

    def used(self, found: Store, index: int, scores: list[float]) -> Sequence[int] | str:
        """The same of an unsure example, cut to its length and perhaps gathered of rows or thinned: which of
        its completions."""
        ends = ranking.pair_indices(scores, "best-worst")
        if not ends:
            return ranking.NO_BETTER
        if self.pairs and found.alike(index, *ends[0]):
            return "chosen and rejected are the same tokens"
        return ranking.compared(scores, self.pairs) if self.pairs else range(len(scores))

    @property
    def batch_unit(self) -> str:
        """What --batch-size counts."""
        return "pairs" if self.pairs else "responses"

    def number(self, found: Store, counts: np.ndarray, chosen: Sequence[int]) -> int:
        """How many losses some examples of a store have, whose `counts` (n,) are known."""
        return int((found.trained_tokens if self.unit == "tokens" else counts)[chosen].sum())

    def weights(self, pack: batch.Pack) -> Tensor:
        """Of each unit in the sum."""
        every = {"pairs": pack.pair_weights, "responses": pack.weights, "tokens": pack.weights[pack.response]}
        return every[self.unit]


def check_partners(objective: Objective, source: str, prompts: Sequence[int]) -> None:
    """Raises ValueError, before any model is loaded, where the KL estimate has no other prompt's answers."""
    if objective.mismatches:
        with config.located(source):
            batch.partners(prompts, range(len(prompts)))


def make_objective(args: argparse.Namespace) -> Objective:
    """Binds the flags, and calls the functions once on made-up statistics, before any model is loaded. Raises
    ValueError for a hyper-parameter out of range or a statistic that does not exist."""
    functions = chosen(args)
    settings = {f: {name: getattr(args, name) for name in config.hyperparameter_names(f)} for f in functions}
    bound = {f: functools.partial(f, **found) for f, found in settings.items()}
    needs = config.positional(functions[0])
    through = next((name for name in ("risk", "kl") if name in needs), None)
    helpers = (losses.with_sft, losses.humanline, losses.advantages, rewards_of, batch.thin)
    pairs = settings.get(ranking.usable_pair, {}).get("pairs")
    measure = bound[RISKS[args.risk]] if args.risk else None
    objective = Objective(bound[functions[0]], needs, "", pairs, measure, through, *map(bound.get, helpers))
    example = encode.Encoded([1], [[2, 3, 4], [5, 6]], [[True] * 3, [True] * 2], [1.0, 0.0])
    if objective.thin is not None:
        objective.thin(np.zeros(0, bool), 0)
    pack = batch.pack([example], True, pairs or "best-worst")
    ones = torch.ones(5)
    if measure is not None:
        measure(torch.zeros(2), torch.full((2,), 0.5), None)
    stats = _made_up(objective, pack)
    missing = [name for name in needs if stats.get(name) is None]
    if missing:
        there = ", ".join(name for name in stats if stats[name] is not None)
        raise ValueError(f"--loss needs {', '.join(missing)}, which is not among {there}")
    out = objective.loss(**{name: stats[name] for name in needs})
    if objective.with_sft is not None:
        objective.with_sft(out.losses, stats["policy_logps"], stats["lengths"])
    if objective.humanline is not None:
        objective.humanline(ones)
        moved = {name: stats[name] - 1.0 if name.endswith("_logps") else stats[name] for name in needs}
        alone = torch.equal(objective.loss(**moved).losses, out.losses)
        if not alone and "token_logratios" not in needs:
            raise ValueError("--humanline is for losses of the log-ratio alone")
    units = {1: "pairs", 2: "responses", 5: "tokens"}
    if out.losses.dim() != 1 or len(out.losses) not in units:
        raise ValueError(f"--loss returns losses of shape {tuple(out.losses.shape)}, one a unit is needed")
    return objective._replace(unit=units[len(out.losses)])


def _made_up(objective: Objective, pack: batch.Pack) -> dict[str, Tensor | None]:
    """Statistics of a pack, every number 1 or -1, None where this objective computes none."""
    ones = torch.ones(len(pack.targets))
    tokens, values, scores = vocab.Tokens(), None, None
    frozen = Frozen(delta=ones[0])
    if objective.scores:
        scores = torch.ones(len(pack.ends))
    else:
        reference = [-ones, -ones] if objective.has_reference else [None, None]
        tokens = vocab.Tokens(-ones, *reference, ones if objective.measure else None, ones)
    if objective.mismatches:
        frozen = frozen._replace(kl_estimate=ones[0], kl_token_max=torch.ones(len(pack.ends)))
    if objective.advantages is not None:
        values = ones
        gains, returns = objective.advantages(objective.rewards_of(pack), ones, pack.response)
        frozen = frozen._replace(old_values=ones, advantages=gains, returns=returns)
    return statistics(pack, tokens, bool(objective.pairs), frozen, values, scores)


def tally(
    objective: Objective,
    out: losses.Loss,
    stats: dict[str, Tensor | None],
    pack: batch.Pack,
    subsets: dict[str, list[int]] = {},
) -> dict[str, Tensor]:
    """(sum, count) of everything that is logged of a micro-batch; `subsets` are its groups by the name under
    which their accuracy is told apart, (0, 0) where it has none."""
    kind = "rewards" if objective.has_reference or objective.scores else "logps"
    sums = {"loss": batch.summed(out.losses.detach() * objective.weights(pack), pack)}
    sums |= {name: batch.summed(values, pack) for name, values in out.metrics.items()}
    rewards = compare(out.rewards, pack)
    told = rewards if kind == "rewards" else ("margins", "accuracies")
    sums |= {f"{kind}/{key}": rewards[key] for key in told}
    owners = pack.group[pack.pairs[0]].tolist() if subsets else []  # (B,)
    for name, groups in subsets.items():
        mine = [pair for pair, group in enumerate(owners) if group in groups]
        values = out.rewards[:, mine] if out.rewards.dim() == 2 else out.rewards
        found = compare(values, pack._replace(pairs=pack.pairs[:, mine]))
        sums[f"{kind}/accuracies/{name}"] = found["accuracies"]
    if out.own is not None:
        sums |= {f"own/{key}": value for key, value in compare(out.own, pack).items()}
    for name, values in (("logps", stats["policy_logps"]), ("kl", stats["kl"]), ("risk", stats["risk"])):
        if values is not None:
            found = compare(values.detach(), pack)
            sums |= {f"{name}/{key}": found[key] for key in ("chosen", "rejected")}
    return sums


def compare(values: Tensor, pack: batch.Pack) -> dict[str, Tensor]:
    """(sum, count) of (2, B), (R,) or (N,) values: of chosen and rejected (desirable and undesirable) ones,
    all, and the margins of pairs; a tie is half right."""
    single = values.dim() == 1
    if single and len(values) != len(pack.ends):
        values = by_response(values, pack)  # (R,)
    better, worse = values[pack.pairs] if single else values  # (B,) each
    margins = better - worse  # (B,)
    good, bad = ((values, pack.desirable), (values, ~pack.desirable)) if single else ((better,), (worse,))
    found = {"chosen": good, "rejected": bad, "mean": (values,), "margins": (margins,)}
    found |= {"accuracies": ((margins.sign() + 1) / 2,)}
    return {name: batch.summed(part[0], pack, *part[1:]) for name, part in found.items()}


def check_start(stats: dict[str, Tensor | None], tolerance: float = 0.0) -> None:
    """Policy and reference have the same weights and saw the same pack: not one bit may differ on a CPU, and
    on CUDA, whose sums have no fixed order, START_TOLERANCE of the largest log-probability of a response. Or
    they saw other packs: then no more than `tolerance` nats a token."""
    logps = stats["policy_logps"].detach()
    drifts = [logps - stats["ref_logps"], stats["kl"], stats["risk"]]
    share = 1 / stats["lengths"].clamp(min=1) if tolerance else 1.0
    worst = max((drift.detach().abs() * share).max().item() for drift in drifts if drift is not None)
    allowed = tolerance or START_TOLERANCE.get(logps.device.type, 0.0) * logps.abs().max().item()
    if allowed < worst < math.inf:  # what is not finite stops the step itself
        raise RuntimeError(f"policy and reference have the same weights but differ by {worst:.1e} at step 0")


def means(tallies: list[dict[str, Tensor]], known: dict[str, Tensor] | None = None) -> dict[str, float]:
    """What is logged, of all ranks, with what is `known` of them; without pairs the margin is that of the
    means."""
    row = fsdp.mean_over_ranks(tallies, known)
    for name in ("rewards", "own"):
        if {f"{name}/chosen", f"{name}/rejected"} <= set(row):
            row.setdefault(f"{name}/margins", row[f"{name}/chosen"] - row[f"{name}/rejected"])
    return row
