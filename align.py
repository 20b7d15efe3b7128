"""Align a language model from preferences with any loss of losses.py.

    python align.py configs/hh_smollm2.toml --beta 0.2
    torchrun --nproc-per-node 2 align.py --model runs/sft/final --data hh --loss ra_dpo1 --out runs/ra

The signature of the loss says everything: pairs or single responses, reference or none, which heads. One
optimiser step, top to bottom: plan -> pack -> (A) frozen: the reference's hidden states, and what KTO and PPO
fix before a step -> (B) the policy's hidden states, the head in chunks, the loss, backward, per micro-batch
-> clip -> AdamW -> log. The sum of the losses is divided by the number of pairs, responses or tokens of the
whole step, so nothing depends on ranks, micro-batches or packing.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

import arrays
import batch
import chat
import checkpoint
import config
import data
import encode
import estimate
import export
import fit
import fsdp
import generation
import loading
import lora
import losses
import model
import preflight
import progress
import ranking
import references
import rundir
import signals
import store
import trackers
import vocab
from frozen import Cached, freeze, hidden_states, of_reference, token_statistics
from objective import HELPERS, LOSSES, RISKS, Frozen, Objective, check_partners, check_start
from objective import make_objective, means, resolve, seen, statistics, tally


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    made = config.parser(__doc__.splitlines()[0])
    add = made.add_argument
    # fmt: off
    add("--model", required=True, help="policy to start from: a directory or a hub name")
    add("--reference", default=None, help="frozen model; None: the policy's start; adapters: base, start")
    add("--cache-reference", default=None, metavar="DIR", help="its values, computed once and kept there")
    add("--cache-hidden", type=config.boolean, default=False, help="keep its distributions, not only logps")
    add("--cache-reference-only", type=config.boolean, default=False, help="fill the cache and end")
    add("--weights", choices=("pretrained", "random"), default="pretrained", help="random: from config.json")
    add("--data", required=True, nargs="+", help="files, folders, NAME, NAME=DIR, org/name; X:0.5 is half")
    add("--eval-data", default=None, nargs="+", help="held-out rows; None: the test split of a named --data")
    add("--strict-data", type=config.boolean, default=False, help="stop at a row that cannot be used")
    add("--group-by", choices=("prompt",), default=None, help="rows of the same prompt are one list")
    add("--chat-template", default=None, help="plain, none, a name or a file; None: the tokenizer's")
    add("--loss", choices=LOSSES, default="dpo")
    add("--risk", choices=RISKS, default=None, help="of the losses that take one; None: cvar for those")
    add("--max-length", type=config.count, default=512, help="tokens of prompt and one completion")
    add("--max-prompt-length", type=config.count, default=None, help="tokens; None: half of --max-length")
    add("--batch-size", type=config.count, default=16, help="pairs, or responses, of a step over all ranks")
    add("--tokens-per-microbatch", type=config.count, default=None, help="memory only; None: 4096, CUDA more")
    add("--epochs", type=config.count, default=1)
    add("--steps", type=config.count_or_zero, default=None, help="instead of --epochs; 0 only evaluates")
    add("--lr", type=config.positive, default=5e-6, help="peak learning rate of AdamW")
    add("--warmup-steps", type=config.count_or_zero, default=150, help="linear from 0; then a cosine to 0")
    add("--weight-decay", type=config.not_negative, default=0.0)
    add("--adam-eps", type=config.positive, default=1e-8)
    add("--skip-non-finite", type=config.count_or_zero, default=0, help="steps left out before one stops")
    add("--max-grad-norm", type=config.positive, default=1.0, help="of the mean loss over the step")
    add("--max-value-grad-norm", type=config.positive, default=None, help="of a value head alone; None: 0.1")
    add("--ppo-epochs", type=config.count, default=1, help="optimiser steps on a batch, its phase A kept")
    add("--humanline", type=config.boolean, default=False, help="clamp the log-ratio of each token")
    add("--sync-reference-every", type=config.count_or_zero, default=0, help="steps; 0: the reference stays")
    add("--offload", choices=("reference", "all"), default=None, help="what rests on the CPU")
    how = "of the body, masters are fp32; None: bfloat16, on a CPU without products of it float32"
    add("--dtype", choices=("bfloat16", "float32"), default=None, help=how)
    how = "what is recomputed; None: full, on CUDA as little as there is room for"
    add("--activation-checkpointing", choices=estimate.WAYS, default=None, help=how)
    add("--compile", type=config.boolean, default=False, help="what blocks do between products, for GPUs")
    add("--eval-every", type=config.count_or_zero, default=100, help="steps; 0: at the start and the end")
    add("--eval-examples", type=config.count, default=256, help="held out, the same ones every time")
    add("--sample-prompts", type=config.count_or_zero, default=0, help="held out, answered at evaluation")
    add("--seed", type=config.count_or_zero, default=0)
    # fmt: on
    lora.add_flags(made)
    estimate.add_flags(made)
    config.add_run_flags(made)
    config.add_hyperparameters(made, LOSSES | HELPERS, "hyper-parameters of --loss, and what goes with it")
    config.add_hyperparameters(made, RISKS, "parameters of --risk")
    args = config.parse(made, argv)
    resolve(args)
    fit.resolve(args)
    lora.resolve(args)
    references.resolve(args)
    return args


def load_examples(
    sources: Sequence[str],
    split: str,
    tokenizer: Any,
    template: Any,
    objective: Objective,
    args: argparse.Namespace,
    say: Callable,
) -> arrays.Store:
    """Read and encode, or take from the cache; gather by prompt, thin, and keep what the loss learns from.
    Says what was left out and why. Raises ValueError if nothing is left, or for rows that are no list."""
    select = ranking.usable_feedback if args.group_by else objective.select
    encoder = encode.encode
    if objective.scores:
        encoder = encode.encode_whole if args.group_by else encode.encode_rendered
    how = store.Encoding(select, encoder, tokenizer, args.max_length, args.max_prompt_length, template)
    options = {"cache": args.token_cache, "strict": args.strict_data, "seed": args.seed}
    found = store.load(sources, split, how, say=say, **options)
    source = " ".join(sources)
    offsets = int((found.arrays.margins != 0).sum())
    if offsets and "margins" not in objective.needs:
        say(f"{source}: {offsets} rows have a margin, which --loss {args.loss} does not use")
    elif offsets and args.group_by:
        raise ValueError(f"{source}: {offsets} rows have a margin, which says nothing of a list of several")
    with config.located(source):
        if args.group_by:
            found = found.by_prompt()
            say(f"{source}: {len(found)} lists by prompt")
        if objective.thin is not None and split == "train":
            found = found.only(objective.thin(found.labels, args.seed))
        found, reasons = found.chosen(functools.partial(objective.used, found), objective.unsure(found, args))
    if reasons:
        say(f"{source}: {reasons}")
    return found


def load_splits(
    tokenizer: Any, template: Any, objective: Objective, args: argparse.Namespace, say: Callable
) -> tuple[arrays.Store, arrays.Store | list]:
    """What is trained on, and what is held out, which may be nothing."""
    train = load_examples(args.data, "train", tokenizer, template, objective, args, say)
    check_partners(objective, " ".join(args.data), train.arrays.prompts)
    held_out = data.held_out(args.data, args.eval_data)
    if not held_out:
        return train, []
    evaluated = load_examples(held_out, "test", tokenizer, template, objective, args, say)
    evaluated = evaluated.subset(args.eval_examples)
    where = f"{' '.join(held_out)} at --eval-examples {args.eval_examples}"
    check_partners(objective, where, evaluated.arrays.prompts)
    return train, evaluated


def forward(
    objective: Objective,
    policy: model.LanguageModel,
    reference: model.LanguageModel | Cached | None,
    pack: batch.Pack,
    known: Tensor | None,
    frozen: Frozen,
) -> tuple[losses.Loss, dict[str, Tensor | None]]:
    """One micro-batch from ids to losses; `known` are the reference's hidden states (N, D), or cached
    log-probabilities (N,), or None."""
    hidden = hidden_states(policy, pack, objective.scores)  # (N, D), or (R, D) for a reward model
    tokens, values, scores = vocab.Tokens(), None, None
    if objective.scores:
        scores = policy.lm.score(hidden)[:, 0]  # (R,)
    else:
        drift = (objective.measure, objective.through)
        wanted = "token_entropy" in objective.needs
        tokens = token_statistics(hidden, policy, reference, pack, known, *drift, entropy=wanted)
    if policy.value_head is not None:
        values = policy.value_head(hidden.detach())[:, 0]  # (N,) the critic does not train the body
    stats = statistics(pack, tokens, bool(objective.pairs), frozen, values, scores)
    given = seen(objective, stats, pack)
    out = objective.loss(**{name: given[name] for name in objective.needs})
    if objective.with_sft is not None:
        added = objective.with_sft(out.losses, stats["policy_logps"], stats["lengths"])  # (B,)
        out = out._replace(losses=added)
    return out, stats


@torch.no_grad()
def evaluate(
    objective: Objective,
    policy: model.LanguageModel,
    reference: model.LanguageModel | Cached | None,
    examples: arrays.Store,
    args: argparse.Namespace,
    device: torch.device,
    delta: Tensor,
    between: Callable = lambda: None,
) -> dict[str, Any]:
    """Means over the held-out examples, all ranks together; `between` micro-batches all of them may leave."""
    rank, world_size = fsdp.ranks()
    works = batch.plan(examples.lengths, len(examples), world_size, args.tokens_per_microbatch, None)[0][rank]
    how = objective.pairs or "best-worst"
    packs = strangers = batch.packs(examples, works, how, device)
    if objective.mismatches:
        strangers = batch.packs(references.strangers(examples, args.max_length), works, how, device)
    founds, logged = freeze(objective, policy, reference, packs, strangers, delta)
    subsets, tallies = ranking.pairs_by_subset(examples, how), []
    for work, pack, found in progress.bar(zip(works, packs, founds), "evaluation", len(packs)):
        between()
        known = of_reference(reference, pack)  # (N, D) or (N,)
        out, stats = forward(objective, policy, reference, pack, known, found)
        mine = {s: [k for k, g in enumerate(work.groups) if examples[g].subset == s] for s in subsets}
        tallies.append(tally(objective, out, stats, pack, mine))
    # no backward will, and the next forward must gather what the optimiser writes until then
    fsdp.reshard(policy)
    number = int(objective.counts(examples).sum())
    numbers = {objective.batch_unit: number} | {f"pairs/{name}": subsets[name] for name in subsets}
    return {"split": "eval", **numbers, **means(tallies, logged)}


def running_mean(running: Tensor, device: torch.device) -> Tensor:
    """Of a running (sum, count); 0 before the first step."""
    mean = (running[0] / running[1].clamp(min=1)).item()
    return torch.full((), mean, dtype=torch.float32, device=device)  # written there, not copied


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up to --lr, then a cosine to 0; a pure function of the optimiser step."""
    warmup = min(args.warmup_steps, total)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def outline_reference(
    args: argparse.Namespace, policy: model.LanguageModel, once: bool, options: tuple
) -> model.LanguageModel | lora.Reference:
    """What is asked for the reference's values, without weights yet. `once`, before the first step, it is the
    policy itself where that starts from there. `options` are those of model.outline."""
    dtype = getattr(torch, args.dtype)
    if (shared := lora.shared(args)) is not None:
        return lora.Reference(policy, shared)
    if lora.equal_at_start(args):
        return policy if once else model.copied(policy, dtype)
    return model.outline(args.reference, dtype, *options, vocabulary=policy.head.weight.shape[0])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    preflight.begin(args)
    with config.user_errors():
        objective = make_objective(args)
        if args.plan is not None:
            return fit.report(args, config.tell, objective)
        rank, world_size, device = fsdp.init(args.device, args.timeout_minutes, args.replicate)
        say = config.tell if rank == 0 else lambda *parts, **options: None
        tokenizer = loading.load_tokenizer(args.model, args.trust_remote_code)
        template = chat.chat_template(tokenizer, args.chat_template)
        say(f"chat template: {template.name}")
        train, evaluated = load_splits(tokenizer, template, objective, args, say)
        units, unit, how = objective.counts(train), objective.batch_unit, objective.pairs or "best-worst"
        preflight.tell_long(units, args.batch_size, unit, say)
        fit.settle(args, train.lengths, device, world_size, objective)
        if args.check:
            return preflight.report(args, tokenizer, train, evaluated, units, device, say, objective)
        preflight.agree(train, evaluated, dtype=args.dtype)
        dtype = getattr(torch, args.dtype)
        options = (args.max_length, args.weights, args.seed, args.trust_remote_code, dtype, device)
        masters = dtype if lora.wanted(args) or args.cache_reference_only else torch.float32
        fits = functools.partial(estimate.refuse, args, train.lengths, device, world_size, say, objective)
        policy = model.outline(args.model, masters, *options, reward_model=objective.scores, allowed=fits)
        same_weights = objective.has_reference and lora.equal_at_start(args)
        kept = references.find(args, objective, train, evaluated, policy, say)
        reference = None
        if objective.has_reference and not (kept and not kept.lacking):
            reference = outline_reference(args, policy, bool(kept), options)
        model.check_vocabulary(tokenizer, policy, reference)
        if args.sync_reference_every:
            model.check_twins(policy, reference)
        if objective.advantages is not None:
            model.add_value_head(policy, args.lora_from or args.model, args.seed)
        if objective.scores:
            tokenizer.pad_token_id = chat.padding_id(tokenizer)
            model.add_score(policy, args.model, tokenizer.pad_token_id)
        if lora.wanted(args):
            lora.add(policy, args, say, copy=objective.has_reference and bool(lora.shared(args)))
    tokenizer.chat_template = template.text or tokenizer.chat_template  # what was trained with goes along
    model.stop_at(policy, generation.trained_stops(train, template))
    model.checkpoint_activations(policy, args.activation_checkpointing)
    model.compile_blocks(args.compile, policy, reference)
    with config.user_errors():
        place = functools.partial(model.place, dtype=dtype, device=device, replicate=args.replicate)
        place(policy, offload=args.offload == "all")
        if isinstance(reference, model.LanguageModel) and reference is not policy:
            like = policy if same_weights else None
            place(reference.requires_grad_(False), like=like, offload=bool(args.offload))
        reference, of_held_out = references.ready(kept, reference, args, device, say)
    if args.cache_reference_only:
        return fsdp.finish()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.lr, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )
    running = torch.zeros(2, dtype=torch.float64)  # sum and count of the rewards of the steps before
    extra = {"running": running} if "delta" in objective.needs else {}
    if args.sync_reference_every:
        extra["reference"] = dict(reference.named_parameters())

    lengths = train.lengths  # (n,)
    steps_per_epoch = batch.steps_per_epoch(units, args.batch_size)
    total = args.epochs * steps_per_epoch * args.ppo_epochs if args.steps is None else args.steps
    made = vars(args) | {"data_digest": train.digest} | lora.record(policy, args)
    with config.user_errors():
        final_dtype = export.prepare(args)
        lock = rundir.take(args, rank, device, checkpoint.size(policy, extra))  # noqa: F841  held to the end
        start = checkpoint.resume(
            args.out, args.resume, policy, optimizer, made, config.FREE_FLAGS, device, extra, total
        )
    rundir.begin(args, rank, start, policy, extra)
    with rundir.failing(args, rank, start):
        if rank == 0:
            export.save_tokenizer(tokenizer, f"{args.out}/tokenizer", policy.lm.generation_config)
    say(f"start at step {start} of {total}: {args.loss}, {units.sum()} {unit}, {world_size} ranks")

    trackers.start(args, rank, start)
    log = functools.partial(rundir.write_row, args, rank, total)
    judge = functools.partial(evaluate, objective, policy, of_held_out, evaluated, args, device)
    asked = list(itertools.islice(evaluated, args.sample_prompts))
    show = functools.partial(generation.show, policy, asked, [], tokenizer, template, args.out)
    leave = functools.partial(rundir.leave_if_told, args, policy, optimizer, made, extra, device)

    for step in range(start, total):
        visit, update = divmod(step, args.ppo_epochs)  # optimiser steps on the same batch
        epoch, index = divmod(visit, steps_per_epoch)
        if (index == 0 and update == 0) or step == start:
            # the same on every rank: each step's groups, rank by rank and micro-batch by micro-batch
            budget = args.tokens_per_microbatch
            plan = batch.plan(lengths, args.batch_size, world_size, budget, args.seed, epoch, units)
            # cached values of mismatched answers are those of the data's order
            order = batch.epoch_order(len(train), None if kept else args.seed, epoch)
            if objective.mismatches:
                others = train.mismatched(batch.partners(train.arrays.prompts, order), args.max_length)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args)
        delta = running_mean(running, device)  # ()
        began = time.perf_counter()  # before a GPU's last update has ended, for `leave` may wait for it
        leave(step)
        if evaluated and (step == 0 or (args.eval_every and step % args.eval_every == 0)):
            log(judge(delta, lambda: leave(step)) | {"step": step})
            show(step)
            began = time.perf_counter()
        if args.save_every and step % args.save_every == 0 and step > start:
            rundir.save(args, step, policy, optimizer, made, extra)
            began = time.perf_counter()

        if update == 0:
            shares, works = plan[index], plan[index][rank]  # of all ranks, of this one
            counted = [g for share in shares for work in share if work.counted for g in work.groups]
            number = objective.number(train, units, counted)
            packs = strangers = batch.packs(train, works, how, device)
            if objective.mismatches:
                strangers = batch.packs(others, works, how, device)
            # (A) frozen: what the loss may not change
            states = [of_reference(reference, pack) for pack in packs]  # (N, D) or (N,)
            frozen, logged = freeze(objective, policy, reference, packs, strangers, delta)
        # (B) gradient
        tallies = []
        for pack, twin, found in zip(packs, states, frozen):
            policy.set_requires_gradient_sync(args.micro_batch_sync == "every" or pack is packs[-1])
            out, stats = forward(objective, policy, reference, pack, twin, found)
            if step == 0 and same_weights:
                check_start(stats, references.TOLERANCE[args.dtype] if kept or args.compile else 0.0)
            # FSDP averages over ranks; the sum over all units of the step is divided by their number
            ((out.losses @ objective.weights(pack)) * (world_size / number)).backward()
            tallies.append(tally(objective, out, stats, pack))
        if update == args.ppo_epochs - 1:
            fsdp.reshard(reference)  # its head is not read again before its next forward

        limits = {"grad_norm": (policy.lm, args.max_grad_norm)}
        limits["value_grad_norm"] = (policy.value_head, args.max_value_grad_norm)
        norms = fsdp.clip_gradients(limits)  # first: a GPU has done its work when the signals are asked for
        row = means(tallies, logged) | norms
        if rundir.skips(args, step, row, optimizer, works, tallies, train):
            continue
        if args.sync_reference_every and (step + 1) % args.sync_reference_every == 0:
            fsdp.copy_parameters(policy, reference)  # the policy before this update, not the one after it
        optimizer.step()
        optimizer.zero_grad()

        many = int(units[counted].sum())
        running += torch.tensor([row.get("rewards/mean", 0.0) * many, many], dtype=torch.float64)
        tokens, seconds = int(lengths[counted].sum()), time.perf_counter() - began
        row |= {"split": "train", "step": step, "epoch": step / (steps_per_epoch * args.ppo_epochs)}
        row |= {objective.batch_unit: many, "tokens": tokens, "lr": learning_rate(step, total, args)}
        row |= {"step_s": seconds, "tok_per_s": tokens / seconds}
        log(row | {f"{unit}_per_s": many / seconds, "responses_per_s": train.sizes[counted].sum() / seconds})

    if evaluated:
        log(judge(running_mean(running, device), lambda: leave(total)) | {"step": total})
        fsdp.reshard(reference)
        show(total)
    if total > 0:
        if args.save_every:
            rundir.save(args, total, policy, optimizer, made, extra)
        rundir.settle(args)
        with rundir.failing(args, rank, total):
            export.export(policy, tokenizer, f"{args.out}/final", final_dtype, args.trust_remote_code)
        say(f"wrote {args.out}/final")
    rundir.write_status(args, rank, "done", total)
    fsdp.finish()


if __name__ == "__main__":
    signals.listen()
    main()
