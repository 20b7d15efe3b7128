"""Supervised fine-tuning: the first half of every recipe, and the same loop as align.py.

    python sft.py configs/hh_smollm2_sft.toml
    torchrun --nproc-per-node 2 sft.py --model EleutherAI/pythia-1.4b --data hh --out runs/sft

Trains on every assistant turn of a conversation, on the completion of a prompt, on the best completion of a
pair or a ranked list, or on plain text; with `--method csft` on all completions, each after a control token
that says whether it is desirable, which sampling then asks for. The sum over tokens is divided by the number
of trained tokens of the whole step.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from typing import Any, Callable, Sequence

import numpy as np
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
import rundir
import signals
import store
import trackers
import vocab


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    made = config.parser(__doc__.splitlines()[0])
    add = made.add_argument
    # fmt: off
    add("--model", required=True, help="model to start from: a directory or a hub name")
    add("--weights", choices=("pretrained", "random"), default="pretrained", help="random: from config.json")
    add("--data", required=True, nargs="+", help="files, folders, NAME, NAME=DIR, org/name; X:0.5 is half")
    add("--eval-data", default=None, nargs="+", help="held-out rows; None: the test split of a named --data")
    add("--strict-data", type=config.boolean, default=False, help="stop at a row that cannot be used")
    add("--method", choices=("sft", "csft"), default="sft", help="csft: all, a control token first")
    add("--chat-template", default=None, help="plain, none, a name or a file; None: the tokenizer's")
    add("--max-length", type=config.count, default=512, help="tokens of prompt and one completion")
    add("--max-prompt-length", type=config.count, default=None, help="tokens; None: half of --max-length")
    add("--batch-size", type=config.count, default=16, help="examples of one optimiser step, over all ranks")
    add("--tokens-per-microbatch", type=config.count, default=None, help="memory only; None: 4096, CUDA more")
    add("--epochs", type=config.count, default=1)
    add("--steps", type=config.count_or_zero, default=None, help="instead of --epochs; 0 only evaluates")
    add("--lr", type=config.positive, default=1e-5, help="peak learning rate of AdamW")
    add("--warmup-steps", type=config.count_or_zero, default=150, help="linear from 0; then a cosine to 0")
    add("--weight-decay", type=config.not_negative, default=0.0)
    add("--adam-eps", type=config.positive, default=1e-8)
    add("--skip-non-finite", type=config.count_or_zero, default=0, help="steps left out before one stops")
    add("--max-grad-norm", type=config.positive, default=1.0, help="of the mean loss over trained tokens")
    how = "of the body, masters are fp32; None: bfloat16, on a CPU without products of it float32"
    add("--dtype", choices=("bfloat16", "float32"), default=None, help=how)
    how = "what is recomputed; None: full, on CUDA as little as there is room for"
    add("--activation-checkpointing", choices=estimate.WAYS, default=None, help=how)
    add("--offload", choices=("all",), default=None, help="what rests on the CPU: the optimiser's too")
    add("--compile", type=config.boolean, default=False, help="what blocks do between products, for GPUs")
    add("--eval-every", type=config.count_or_zero, default=100, help="steps; 0: at the start and the end")
    add("--eval-examples", type=config.count, default=256, help="held out, the same ones every time")
    add("--sample-prompts", type=config.count_or_zero, default=0, help="held out, answered at evaluation")
    add("--seed", type=config.count_or_zero, default=0)
    # fmt: on
    lora.add_flags(made)
    estimate.add_flags(made)
    config.add_run_flags(made)
    args = config.parse(made, argv)
    fit.resolve(args)
    lora.resolve(args)
    args.max_prompt_length = args.max_prompt_length or args.max_length // 2
    if args.max_prompt_length >= args.max_length:
        config.fail(
            f"--max-prompt-length {args.max_prompt_length} must be less than --max-length {args.max_length}"
        )
    return args


def load_examples(
    sources: Sequence[str], split: str, tokenizer: Any, template: Any, args: argparse.Namespace, say: Callable
) -> arrays.Store:
    """Read and encode, or take from the cache, of every example the best completion, or all with their
    control tokens; says what was left out and why. Raises ValueError."""
    select, encoder = ranking.best_completion, encode.encode_turns
    if args.method == "csft":
        select, encoder = ranking.usable_feedback, encode.encode_conditioned
    how = store.Encoding(select, encoder, tokenizer, args.max_length, args.max_prompt_length, template)
    options = {"cache": args.token_cache, "strict": args.strict_data, "seed": args.seed}
    return store.load(sources, split, how, say=say, **options)


def forward(policy: model.LanguageModel, pack: batch.Pack) -> losses.Loss:
    """One micro-batch from ids to per-token losses."""
    hidden = policy(pack.ids, pack.positions, pack.layout, pack.predict)  # (N, D)
    tokens = vocab.token_statistics(hidden, policy.head, pack.targets)  # (N,)
    return losses.sft(tokens.logps)


@torch.no_grad()
def evaluate(
    policy: model.LanguageModel,
    examples: arrays.Store,
    args: argparse.Namespace,
    device: torch.device,
    between: Callable = lambda: None,
) -> dict[str, Any]:
    """Means over the trained tokens of the held-out examples, all ranks together; `between` micro-batches all
    of them may leave."""
    rank, world_size = fsdp.ranks()
    tallies = []
    works = batch.plan(examples.lengths, len(examples), world_size, args.tokens_per_microbatch, None)[0][rank]
    for work in progress.bar(works, "evaluation"):
        between()
        pack = batch.packs(examples, [work], "best-worst", device)[0]
        tallies.append(tally(forward(policy, pack), pack))
    # no backward will, and the next forward must gather what the optimiser writes until then
    fsdp.reshard(policy)
    row = fsdp.mean_over_ranks(tallies)
    return {
        "split": "eval",
        "examples": len(examples),
        **row,
        "perplexity": math.exp(min(row["loss"], 700.0)),
    }


def tally(out: losses.Loss, pack: batch.Pack) -> dict[str, Tensor]:
    """(sum, count) of what is logged of a micro-batch."""
    return {"loss": batch.summed(out.losses.detach() * pack.weights[pack.response], pack)}


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up to --lr, then a cosine to 0; a pure function of the optimiser step."""
    warmup = min(args.warmup_steps, total)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    preflight.begin(args)
    with config.user_errors():
        if args.plan is not None:
            return fit.report(args, config.tell)
        rank, world_size, device = fsdp.init(args.device, args.timeout_minutes, args.replicate)
        say = config.tell if rank == 0 else lambda *parts, **options: None
        tokenizer = loading.load_tokenizer(args.model, args.trust_remote_code)
        template = chat.chat_template(tokenizer, args.chat_template)
        say(f"chat template: {template.name}")
        before = len(tokenizer)
        if args.method == "csft":
            tokenizer.add_tokens(list(chat.CONTROL_TOKENS), special_tokens=True)  # but for those it has
        train = load_examples(args.data, "train", tokenizer, template, args, say)
        held_out = data.held_out(args.data, args.eval_data)
        evaluated = []
        if held_out:
            evaluated = load_examples(held_out, "test", tokenizer, template, args, say)
            evaluated = evaluated.subset(args.eval_examples)
        fit.settle(args, train.lengths, device, world_size)
        if args.check:
            return preflight.report(args, tokenizer, train, evaluated, np.ones(len(train), int), device, say)
        preflight.agree(train, evaluated, dtype=args.dtype)
        dtype = getattr(torch, args.dtype)
        options = (args.max_length, args.weights, args.seed, args.trust_remote_code, dtype, device)
        masters = dtype if lora.wanted(args) else torch.float32
        fits = functools.partial(estimate.refuse, args, train.lengths, device, world_size, say, None)
        grown = len(tokenizer) * (args.method == "csft")
        policy = model.outline(args.model, masters, *options, vocabulary=grown, allowed=fits)
        model.check_vocabulary(tokenizer, policy)
        if lora.wanted(args):
            lora.add(policy, args, say, tokens=range(before, len(tokenizer)))
    tokenizer.chat_template = template.text or tokenizer.chat_template  # what was trained with goes along
    model.stop_at(policy, generation.trained_stops(train, template))
    if args.method == "csft":
        tokenizer.chat_template = tokenizer.chat_template.removesuffix("\n") + chat.ASK_FOR_GOOD
    model.checkpoint_activations(policy, args.activation_checkpointing)
    model.compile_blocks(args.compile, policy)
    with config.user_errors():
        model.place(policy, dtype, device, replicate=args.replicate, offload=args.offload == "all")
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.lr, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )

    lengths = train.lengths  # (n,)
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    total = args.epochs * steps_per_epoch if args.steps is None else args.steps
    made = vars(args) | {"data_digest": train.digest} | lora.record(policy, args)
    with config.user_errors():
        final_dtype = export.prepare(args)
        lock = rundir.take(args, rank, device, checkpoint.size(policy))  # noqa: F841  held to the end
        start = checkpoint.resume(
            args.out, args.resume, policy, optimizer, made, config.FREE_FLAGS, device, {}, total
        )
    rundir.begin(args, rank, start, policy)
    with rundir.failing(args, rank, start):
        if rank == 0:
            export.save_tokenizer(tokenizer, f"{args.out}/tokenizer", policy.lm.generation_config)
    say(f"start at step {start} of {total}: {len(train)} examples, {world_size} ranks")

    trackers.start(args, rank, start)
    log = functools.partial(rundir.write_row, args, rank, total)
    ask = tokenizer.convert_tokens_to_ids(list(chat.CONTROL_TOKENS)[: args.method == "csft"])
    asked = list(itertools.islice(evaluated, args.sample_prompts))
    show = functools.partial(generation.show, policy, asked, ask, tokenizer, template, args.out)
    leave = functools.partial(rundir.leave_if_told, args, policy, optimizer, made, {}, device)

    for step in range(start, total):
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or step == start:
            # the same on every rank: each step's groups, rank by rank and micro-batch by micro-batch
            plan = batch.plan(
                lengths, args.batch_size, world_size, args.tokens_per_microbatch, args.seed, epoch
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args)
        began = time.perf_counter()  # before a GPU's last update has ended, for `leave` may wait for it
        leave(step)
        if evaluated and (step == 0 or (args.eval_every and step % args.eval_every == 0)):
            log(evaluate(policy, evaluated, args, device, lambda: leave(step)) | {"step": step})
            show(step)
            began = time.perf_counter()
        if args.save_every and step % args.save_every == 0 and step > start:
            rundir.save(args, step, policy, optimizer, made)
            began = time.perf_counter()

        shares = plan[index]  # of the ranks
        works = shares[rank]
        counted = [group for share in shares for work in share if work.counted for group in work.groups]
        packs = batch.packs(train, works, "best-worst", device)
        units = int(train.trained_tokens[counted].sum())
        tallies = []
        for pack in packs:
            policy.set_requires_gradient_sync(args.micro_batch_sync == "every" or pack is packs[-1])
            out = forward(policy, pack)
            # FSDP averages over ranks; the sum over all trained tokens of the step is divided by their number
            ((out.losses @ pack.weights[pack.response]) * (world_size / units)).backward()
            tallies.append(tally(out, pack))

        # first: a GPU has done its work when the signals are asked for
        norms = fsdp.clip_gradients({"grad_norm": (policy.lm, args.max_grad_norm)})
        row = fsdp.mean_over_ranks(tallies) | norms
        if rundir.skips(args, step, row, optimizer, works, tallies, train):
            continue
        optimizer.step()
        optimizer.zero_grad()

        tokens = int(lengths[counted].sum())
        seconds = time.perf_counter() - began
        row |= {"split": "train", "step": step, "epoch": step / steps_per_epoch}
        row |= {"examples": len(counted), "tokens": tokens}
        row |= {"lr": optimizer.param_groups[0]["lr"], "step_s": seconds, "tok_per_s": tokens / seconds}
        log(row)

    if evaluated:
        log(evaluate(policy, evaluated, args, device, lambda: leave(total)) | {"step": total})
        show(total)
    if total > 0:
        if args.save_every:
            rundir.save(args, total, policy, optimizer, made)
        rundir.settle(args)
        with rundir.failing(args, rank, total):
            export.export(policy, tokenizer, f"{args.out}/final", final_dtype, args.trust_remote_code)
        say(f"wrote {args.out}/final")
    rundir.write_status(args, rank, "done", total)
    fsdp.finish()


if __name__ == "__main__":
    signals.listen()
    main()
