"""Answers of a model to prompts: ids in, ids out, the same whatever else is in the batch.

    generate    a batch of prompts, left-padded, through transformers' own `generate` and its cache
    stops       the tokens that end an answer, by what the model's own directory says
    show        what a policy in training answers, as a text in its run directory

A token is drawn by an exponential race: of all tokens the one with the least e / p, e ~ Exp(1), is a sample
of p (the Gumbel-max trick). The noise is that of a generator which belongs to the answer alone, so an answer
depends on its seed and on nothing beside it in the batch; what remains is rounding, for products of other
shapes round otherwise: an answer changes where two tokens are that close. fp32 leaves little of it, bf16
more.

Left out: beams, penalties, constrained decoding.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import chat
import encode
import fsdp

SHOWN_TOKENS = 128  # of a sample during training


class Sampling(NamedTuple):
    """How the next token is drawn; a temperature of 0 takes the most probable one."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0  # of the most probable tokens only those that hold this mass together
    top_k: int = 0  # only so many of the most probable tokens; 0: all


@torch.no_grad()
def generate(
    lm: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    stop: Sequence[int],
    how: Sampling,
    together: bool = False,
) -> list[list[int]]:
    """An answer to each prompt: its ids up to the first of `stop`, at most how.max_new_tokens.

    `lm` is a transformers model in evaluation mode, `seeds` whole numbers, one an answer. `together`: all
    ranks go on until the last one is done, as a sharded model needs. What the model's generation_config says
    of temperatures and penalties does not count.
    """
    device = lm.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, P)
    mask = torch.zeros_like(ids)  # (B, P)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=how.max_new_tokens, eos_token_id=list(stop) or None, pad_token_id=0
    )
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        found = lm.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=[_race(how, seeds, device)] if how.temperature > 0 else [],
            synced_gpus=together,
        )  # (B, P + new)
    finally:
        lm.generation_config = own
    return [before(answer, stop) for answer in found[:, width:].tolist()]


def show(
    policy: Any,
    examples: Sequence[encode.Encoded],
    ask: Sequence[int],
    tokenizer: Any,
    template: chat.Template,
    out: str,
    step: int,
) -> None:
    """What the policy in training answers to the prompts of some examples, beside the first answer of the
    data, in out/samples/step-N.txt; all ranks together. The same noise at every step, so that what differs
    is the policy. `ask` is put behind each prompt. A file that cannot be written costs a warning."""
    examples = [example for example in examples if example.prompt]
    if not examples:
        return
    prompts = [[*example.prompt, *ask] for example in examples]
    stop = stops(policy.lm, tokenizer, template)
    rank, world_size = fsdp.ranks()
    how = Sampling(SHOWN_TOKENS)
    answers = policy.generate(
        lambda lm: generate(lm, prompts, range(len(prompts)), stop, how, together=world_size > 1)
    )
    fsdp.reshard(policy)  # no backward will
    if rank:
        return
    lines = [f"step {step}, temperature 1, at most {SHOWN_TOKENS} tokens\n"]
    for number, (example, prompt, answer) in enumerate(zip(examples, prompts, answers), 1):
        shown = {
            "prompt": tokenizer.decode(example.prompt),
            "policy": chat.answer_text(tokenizer, prompt, answer, template),
            "data": chat.answer_text(tokenizer, prompt, example.completions[0], template),
        }
        lines += [f"\n======== {number}: {name}\n{text}\n" for name, text in shown.items()]
    path = Path(out) / "samples" / f"step-{step}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8", errors="replace")
    except OSError as error:  # on rank 0 alone: the others do not wait for it
        with contextlib.suppress(OSError):  # stderr may go to the same disk
            path.unlink(missing_ok=True)
            print(f"warning: {path}: {error.strerror or error}; going on", file=sys.stderr, flush=True)


def _race(how: Sampling, seeds: Sequence[int], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Scores whose maximum is a sample: log p - log e, on the tokens that top-k and top-p leave."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    warpers = [TemperatureLogitsWarper(float(how.temperature))]
    warpers += [TopKLogitsWarper(how.top_k)] if how.top_k else []
    warpers += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []

    def race(ids: Tensor, logits: Tensor) -> Tensor:
        scores = logits.float()  # (B, V)
        for warper in warpers:
            scores = warper(ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, generators):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(1e-38).log_()

    return race


def before(ids: list[int], stop: Sequence[int]) -> list[int]:
    """Up to the first of `stop`: what follows it is padding."""
    ends = [ids.index(id) for id in stop if id in ids]
    return ids[: min(ends)] if ends else ids


def stops(lm: Any, tokenizer: Any, template: chat.Template) -> list[int]:
    """What ends an answer: the ends of text of the model's generation_config, or of its config, or the
    tokenizer's, and the special token with which the template ends an assistant's turn."""
    named = getattr(lm.generation_config, "eos_token_id", None)
    named = lm.config.get_text_config().eos_token_id if named is None else named
    named = tokenizer.eos_token_id if named is None else named
    found = {named} if isinstance(named, int) else set(named or ())
    special = [id for id in chat.ids(tokenizer, template.ending) if id in template.special_ids]
    return sorted({*found, *special[:1], *({tokenizer.eos_token_id} - {None})})


def trained_stops(examples: Sequence[encode.Encoded], template: chat.Template) -> list[int]:
    """The tokens that end the answers which were not cut, of some examples: where generation must stop."""
    some = [examples[index] for index in range(min(len(examples), 256))]
    ends = {ids[-1] for example in some for ids in example.completions}
    return sorted(ends & template.special_ids)
