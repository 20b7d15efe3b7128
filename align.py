"""Align a language model from preferences with any pair loss of losses.py.

    python align.py configs/hh_smollm2_dpo.toml --beta 0.2
    torchrun --nproc-per-node 2 align.py --model runs/sft/final --data hh --loss ra_dpo1 --risk cvar --out
    runs/ra

One optimiser step, top to bottom: plan -> pack -> (A) the reference's hidden states, frozen -> (B) the
policy's hidden states, the head in chunks, the loss, backward, per micro-batch -> clip -> AdamW -> log. The
sum of the per-pair losses is divided by the number of pairs of the whole step, so nothing depends on ranks,
micro-batches or packing.

Left out: unary losses, PPO, LoRA, cached references, generation during training.
"""

import argparse
import functools
import inspect
import math
import sys
import time
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

import attention
import checkpoint
import config
import data
import fsdp
import losses
import model
import risk
import vocab

LOSSES = config.functions_returning(losses, losses.Loss)
RISKS = config.functions_returning(risk, risk.Risk)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    made = config.parser(__doc__.splitlines()[0])
    add = made.add_argument
    # fmt: off
    add("--model", required=True, help="policy to start from: a directory or a hub name")
    add("--reference", default=None, help="frozen reference model; None: the policy's start")
    add("--weights", choices=("pretrained", "random"), default="pretrained", help="random: from config.json")
    add("--data", required=True, help="hh, NAME=DIR, or a .jsonl or .json file of pairs")
    add("--eval-data", default=None, help="held-out pairs; None: the test split of a named --data, else none")
    add("--chat-template", default=None, help="plain, raw or a file; None: the tokenizer's own, else plain")
    add("--loss", choices=LOSSES, default="dpo")
    add("--risk", choices=RISKS, default=None, help="of the losses that take one; None: cvar for those")
    add("--max-length", type=config.count, default=512, help="tokens of prompt and one completion")
    add("--max-prompt-length", type=config.count, default=None, help="tokens; None: half of --max-length")
    add("--batch-size", type=config.count, default=16, help="pairs of one optimiser step, over all ranks")
    add("--tokens-per-microbatch", type=config.count, default=4096, help="packed by a rank; memory only")
    add("--epochs", type=config.count, default=1)
    add("--steps", type=config.count_or_zero, default=None, help="instead of --epochs; 0 only evaluates")
    add("--lr", type=config.positive, default=5e-6, help="peak learning rate of AdamW")
    add("--warmup-steps", type=config.count_or_zero, default=150, help="linear from 0; then a cosine to 0")
    add("--weight-decay", type=config.not_negative, default=0.0)
    add("--adam-eps", type=config.positive, default=1e-8)
    add("--max-grad-norm", type=config.positive, default=1.0, help="of the mean loss over the step's pairs")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the body; masters are fp32")
    add("--activation-checkpointing", choices=("none", "full"), default="full")
    add("--eval-every", type=config.count_or_zero, default=100, help="steps; 0: at the start and the end")
    add("--eval-examples", type=config.count, default=256, help="held out, the same ones every time")
    add("--seed", type=config.count_or_zero, default=0)
    # fmt: on
    config.add_run_flags(made)
    config.add_hyperparameters(made, LOSSES, "hyper-parameters of --loss")
    config.add_hyperparameters(made, RISKS, "parameters of --risk")
    args = config.parse(made, argv)
    args.max_prompt_length = args.max_prompt_length or args.max_length // 2
    if args.max_prompt_length >= args.max_length:
        config.fail(
            f"--max-prompt-length {args.max_prompt_length} must be less than --max-length {args.max_length}"
        )
    if args.risk and "risk" not in inspect.signature(LOSSES[args.loss]).parameters:
        config.fail(f"--loss {args.loss} takes no --risk")
    if args.risk is None and "risk" in inspect.signature(LOSSES[args.loss]).parameters:
        args.risk = "cvar"
    config.resolve_hyperparameters(args, chosen(args), [*LOSSES.values(), *RISKS.values()])
    return args


def chosen(args: argparse.Namespace) -> dict[str, Callable]:
    """The functions whose keyword-only parameters are flags of this run."""
    risks = {f"--risk {args.risk}": RISKS[args.risk]} if args.risk else {}
    return {f"--loss {args.loss}": LOSSES[args.loss], **risks}


def statistics(pack: data.Pack, tokens: vocab.Tokens) -> dict[str, Tensor | None]:
    """Everything a loss may ask for by name. Sums over the trained tokens of a response, nats."""

    def pairs(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        responses = values.new_zeros(len(pack.ends)).index_add(0, pack.response, values)  # (R,)
        return responses[pack.pairs]  # (2, B)

    return {
        "policy_logps": pairs(tokens.logps),  # (2, B)
        "ref_logps": pairs(tokens.ref_logps),  # (2, B) frozen
        "kl": pairs(tokens.kl),  # (2, B)
        "risk": pairs(tokens.risk),  # (2, B)
        "lengths": pairs(torch.ones_like(tokens.logps)),  # (2, B) trained tokens
        "margins": pack.margins,  # (B,)
    }


class Objective(NamedTuple):
    """What --loss and --risk say, read off the signatures of their functions."""

    loss: Callable[..., losses.Loss]  # hyper-parameters bound
    needs: list[str]  # the statistics it asks for
    measure: vocab.Measure | None  # parameters bound
    through: str | None  # the drift with a gradient: "kl", "risk" or None

    @property
    def has_reference(self) -> bool:
        return any(name in ("ref_logps", "kl", "risk") for name in self.needs)


def make_objective(args: argparse.Namespace) -> Objective:
    bound = []
    for function in chosen(args).values():
        settings = {name: getattr(args, name) for name in config.hyperparameter_names(function)}
        bound.append(functools.partial(function, **settings))
    needs = config.positional(LOSSES[args.loss])
    through = next((name for name in ("risk", "kl") if name in needs), None)
    return Objective(bound[0], needs, bound[1] if args.risk else None, through)


def dry_run(objective: Objective, example: data.Encoded) -> None:
    """The loss and the measure on one pair of made-up statistics, before any model is loaded. Raises
    ValueError."""
    pack = data.pack([example])
    ones = torch.ones(len(pack.targets))
    if objective.measure is not None:
        objective.measure(torch.zeros(2), torch.full((2,), 0.5), None)
    stats = statistics(pack, vocab.Tokens(ones, ones, ones, ones))
    unknown = [name for name in objective.needs if name not in stats]
    if unknown:
        raise ValueError(f"--loss needs {', '.join(unknown)}, which is not among {', '.join(stats)}")
    objective.loss(**{name: stats[name] for name in objective.needs})


def load_pairs(
    source: str, split: str, tokenizer: Any, template: Any, args: argparse.Namespace, say: Callable
) -> list[data.Encoded]:
    """Read and encode; says what was left out and why. Raises ValueError if nothing is left."""
    examples, dropped = data.load(source, split)
    examples = [data.usable_pair(example) for example in examples]
    return data.encode_all(
        examples, dropped, tokenizer, template, args.max_length, args.max_prompt_length, source, say
    )


def hidden_states(lm: model.LanguageModel, pack: data.Pack) -> Tensor:
    """The states that predict the trained tokens: (N, D)."""
    layout = attention.layout(pack.groups).to(pack.ids.device)
    return lm(pack.ids, pack.positions, layout, pack.predict)


def forward(
    objective: Objective,
    policy: model.LanguageModel,
    reference: model.LanguageModel | None,
    pack: data.Pack,
    frozen: Any,
) -> tuple[losses.Loss, dict[str, Tensor | None]]:
    """One micro-batch from ids to per-pair losses; `frozen` are the reference's hidden states (N, D) or
    None."""
    hidden = hidden_states(policy, pack)  # (N, D)
    twin = (frozen, reference.head) if reference else None
    tokens = vocab.token_statistics(
        hidden, policy.head, pack.targets, twin, objective.measure, objective.through
    )  # (N,) each
    stats = statistics(pack, tokens)
    return objective.loss(**{name: stats[name] for name in objective.needs}), stats


@torch.no_grad()
def evaluate(
    objective: Objective,
    policy: model.LanguageModel,
    reference: model.LanguageModel | None,
    examples: list[data.Encoded],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Means over the held-out pairs, all ranks together."""
    rank, world_size = fsdp.ranks()
    lengths = [example.tokens for example in examples]
    tallies = []
    for work in data.plan(lengths, len(lengths), world_size, args.tokens_per_microbatch, None)[0][rank]:
        pack = data.pack([examples[index] for index in work.groups], work.counted).to(device)
        frozen = hidden_states(reference, pack) if reference else None  # (N, D)
        out, stats = forward(objective, policy, reference, pack, frozen)
        tallies.append(tally(out, stats, pack))
    # no backward will, and the next forward must gather what the optimiser writes until then
    policy.reshard()
    return {"split": "eval", "pairs": len(examples), **fsdp.mean_over_ranks(tallies, len(examples))}


def tally(out: losses.Loss, stats: dict[str, Tensor | None], pack: data.Pack) -> dict[str, Tensor]:
    """Sums over the pairs of a micro-batch, for division by the number of pairs; a tie is half right."""
    sums = {"loss": out.losses @ pack.pair_weights}
    counted = float(pack.counted)
    for name, rewards in (("rewards", out.rewards), ("own", out.own)):
        if rewards is not None:
            margins = rewards[0] - rewards[1]  # (B,)
            sums |= {
                f"{name}/chosen": rewards[0].sum() * counted,
                f"{name}/rejected": rewards[1].sum() * counted,
            }
            sums[f"{name}/margins"] = margins.sum() * counted
            sums[f"{name}/accuracies"] = (margins.sign() + 1).sum() * (counted / 2)
    for name, key in (("logps", "policy_logps"), ("kl", "kl"), ("risk", "risk")):
        if stats[key] is not None:
            sums |= {
                f"{name}/chosen": stats[key][0].sum() * counted,
                f"{name}/rejected": stats[key][1].sum() * counted,
            }
    return {name: value.detach().double() for name, value in sums.items()}


def check_start(stats: dict[str, Tensor | None]) -> None:
    """Policy and reference have the same weights and saw the same pack: not one bit may differ."""
    drifts = [stats["policy_logps"] - stats["ref_logps"], stats["kl"], stats["risk"]]
    worst = max(drift.detach().abs().max().item() for drift in drifts if drift is not None)
    if 0 < worst < math.inf:  # what is not finite stops the step itself
        raise RuntimeError(
            f"policy and reference have the same weights but differ by {worst:.1e} nats at step 0"
        )


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up to --lr, then a cosine to 0; a pure function of the optimiser step."""
    warmup = min(args.warmup_steps, total)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    objective = make_objective(args)
    config.check_run(args)
    with config.user_errors():
        rank, world_size, device = fsdp.init(args.device)
        say = print if rank == 0 else lambda *parts, **options: None
        tokenizer = model.load_tokenizer(args.model, args.trust_remote_code)
        template = data.chat_template(tokenizer, args.chat_template)
        say(f"chat template: {template[0]}")
        train = load_pairs(args.data, "train", tokenizer, template, args, say)
        held_out = data.held_out_source(args.data, args.eval_data)
        evaluated = load_pairs(held_out, "test", tokenizer, template, args, say) if held_out else []
        evaluated = data.subset(evaluated, args.eval_examples)
        dry_run(objective, train[0])
        options = (args.max_length, args.weights, args.seed, args.trust_remote_code)
        dtype = getattr(torch, args.dtype)
        policy = model.load(args.model, torch.float32, *options)
        reference = (
            model.load(args.reference or args.model, dtype, *options) if objective.has_reference else None
        )
        model.check_vocabulary(tokenizer, policy, reference)
    if args.activation_checkpointing == "full":
        model.checkpoint_activations(policy)
    fsdp.shard(policy, policy.blocks, dtype, device)
    if reference is not None:
        reference.requires_grad_(False)
        fsdp.shard(reference, reference.blocks, dtype, device)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.lr, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )

    lengths = [example.tokens for example in train]
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    total = args.epochs * steps_per_epoch if args.steps is None else args.steps
    with config.user_errors():
        start = checkpoint.resume(
            args.out, args.resume, policy, optimizer, vars(args), config.FREE_FLAGS, device
        )
    lock = config.open_run(args, rank)  # noqa: F841  held until the process ends
    if rank == 0:
        config.rewind_log(args.out, start)
    say(f"start at step {start} of {total}: {args.loss}, {len(train)} pairs, {world_size} ranks")
    same_weights = objective.has_reference and args.reference in (None, args.model)

    config.write_status(args, rank, "running", start)
    log = functools.partial(config.write_row, args, rank, total)

    for step in range(start, total):
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or step == start:
            # the same on every rank: each step's groups, rank by rank and micro-batch by micro-batch
            plan = data.plan(
                lengths, args.batch_size, world_size, args.tokens_per_microbatch, args.seed, epoch
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args)
        if evaluated and (step == 0 or (args.eval_every and step % args.eval_every == 0)):
            log(evaluate(objective, policy, reference, evaluated, args, device) | {"step": step})
        if args.save_every and step % args.save_every == 0 and step > start:
            checkpoint.save(args.out, step, policy, optimizer, vars(args), args.keep_last)

        began = time.perf_counter()
        works = plan[index][rank]
        counted = [group for share in plan[index] for work in share if work.counted for group in work.groups]
        packs = [
            data.pack([train[group] for group in work.groups], work.counted).to(device) for work in works
        ]
        # (A) frozen: what the loss may not change
        with torch.no_grad():
            frozen = [hidden_states(reference, pack) if reference else None for pack in packs]  # (N, D) each
        # (B) gradient
        tallies = []
        for pack, states in zip(packs, frozen):
            out, stats = forward(objective, policy, reference, pack, states)
            if step == 0 and same_weights:
                check_start(stats)
            # FSDP averages over ranks; the sum over all pairs of the step is divided by their number
            ((out.losses @ pack.pair_weights) * (world_size / len(counted))).backward()
            tallies.append(tally(out, stats, pack))

        row = fsdp.mean_over_ranks(tallies, len(counted))
        row["grad_norm"] = fsdp.clip_gradients(policy, args.max_grad_norm)
        if not math.isfinite(row["grad_norm"] + row["loss"]):
            config.write_status(args, rank, "failed", step)
            config.fail(f"step {step}", "the loss or its gradient is not finite", "weights left as they were")
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(lengths[group] for group in counted)
        seconds = time.perf_counter() - began
        row |= {"split": "train", "step": step, "epoch": step / steps_per_epoch}
        row |= {"pairs": len(counted), "tokens": tokens}
        row |= {"lr": optimizer.param_groups[0]["lr"], "step_s": seconds, "tok_per_s": tokens / seconds}
        log(row | {"pairs_per_s": len(counted) / seconds})

    if evaluated:
        log(evaluate(objective, policy, reference, evaluated, args, device) | {"step": total})
    if total > 0:
        if args.save_every:
            checkpoint.save(args.out, total, policy, optimizer, vars(args), args.keep_last)
        checkpoint.export(policy, tokenizer, f"{args.out}/final")
        say(f"wrote {args.out}/final")
    config.write_status(args, rank, "done", total)
    fsdp.finish()


if __name__ == "__main__":
    main()
