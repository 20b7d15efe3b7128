"""Answers of a model to prompts, as rows to read, to score, to make preferences of.

    python sample.py --model runs/sft/final --data hh --split test --out answers.jsonl --answers 4
    torchrun --nproc-per-node 8 sample.py --model M --data prompts.jsonl --out answers.jsonl

A prompt is rendered and tokenised as for training (encode.py), and answered --answers times. A row that has
answers lends its prompt; of a conversation all but its last turn; of plain text, which has no prompt, its
beginning of --prompt-tokens. Rows of `answers.jsonl`, the answers of a prompt one after the other:

    {"id": "17-0", "prompt": [turns], "completion": "..."}            17 is the number of the prompt's row

Killed at any moment, the same command goes on. Each answer has a random generator of its own, by --seed, the
number of its row and its own: neither --batch-size nor the number of processes changes it, but for rounding
(see generation.py). Each process holds the whole model; `--engine vllm` takes one that needs several GPUs.

Left out: scoring (label.py), beams, penalties.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import torch

import chat
import config
import data
import encode
import fsdp
import generation
import loading
import parts
import precision
import progress
from formats import Example, Fault

PART = 32  # prompts answered between two writes


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    made = config.parser(__doc__.splitlines()[0])
    add = made.add_argument
    # fmt: off
    add("--model", required=True, help="a model directory, one with a LoRA adapter, or a hub name")
    add("--data", required=True, nargs="+", help="prompts: files, folders, NAME, NAME=DIR, org/name")
    add("--split", default="train", help="of --data")
    add("--out", required=True, help="the file to write")
    add("--format", choices=("rows", "alpaca_eval"), default="rows", help="alpaca_eval: what its judge reads")
    add("--prompts", type=config.count, default=None, help="only the first so many; None: all")
    add("--answers", "--n", type=config.count, default=1, help="to a prompt (torchrun takes no --n)")
    add("--max-new-tokens", type=config.count, default=256, help="of an answer")
    add("--max-prompt-length", type=config.count, default=256, help="tokens; the beginning is cut")
    add("--prompt-tokens", type=config.count, default=None, help="of plain text: its first 2 to that")
    add("--temperature", type=config.not_negative, default=1.0, help="0: the most probable token")
    add("--top-p", type=config.positive, default=1.0, help="tokens that hold this mass together; 1: all")
    add("--top-k", type=config.count_or_zero, default=0, help="tokens; 0: all")
    add("--seed", type=config.count_or_zero, default=0)
    add("--chat-template", default=None, help="plain, none, a name or a file; None: the tokenizer's")
    how = "None: bfloat16, on a CPU without products of it float32"
    add("--dtype", choices=("bfloat16", "float32"), default=None, help=how)
    add("--engine", choices=("transformers", "vllm"), default="transformers")
    add("--batch-size", type=config.count, default=32, help="answers at a time")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--timeout-minutes", type=config.positive, default=60.0, help="a process waits so long for another")
    add("--trust-remote-code", type=config.boolean, default=False, metavar="true|false")
    # fmt: on
    args = config.parse(made, argv)
    args.dtype = args.dtype or precision.usual(args.device)
    if args.top_p > 1:
        config.fail(f"--top-p must be <= 1, got {args.top_p:g}")
    for source in args.data:
        if data.weighted(source)[1] != 1:
            config.fail(f"--data {source}", "a weight is for training", "leave it out")
    return args


class Asked(NamedTuple):
    """A prompt as it is answered."""

    row: int  # of all rows of --data
    example: Example
    ids: list[int]
    lead: str  # what the template writes between the header of an answer and the answer


def asked(
    args: argparse.Namespace, tokenizer: Any, template: chat.Template, left_out: Counter
) -> Iterator[Asked]:
    """The prompts of all sources in their order; the reasons of rows without one are counted."""
    good = []
    own = tokenizer.chat_template
    if args.chat_template is None and isinstance(own, str) and own.endswith(chat.ASK_FOR_GOOD):
        good = tokenizer.convert_tokens_to_ids(list(chat.CONTROL_TOKENS))[:1]
    rows = (row for source in args.data for row in data.stream(source, args.split))
    for number, row in enumerate(rows):
        if isinstance(row, Example):
            example = prompt_of(row, args, tokenizer, number)
            ids = encode.prompt_ids(example, tokenizer, args.max_prompt_length, template)
            if not isinstance(ids, str):
                lead = chat.lead(tokenizer, example.prompt, template, example.rendering)
                yield Asked(number, example, [*ids, *good], lead)
                continue
            row = Fault(row.where, ids)
        left_out[row.reason if isinstance(row, Fault) else row] += 1


def prompt_of(example: Example, args: argparse.Namespace, tokenizer: Any, number: int) -> Example:
    """The example as a prompt alone."""
    turns, answers = example.prompt, example.completions
    if not example.labelled and len(answers) == 1:
        if isinstance(answers[0], list):
            turns = [*turns, *answers[0][:-1]]
        elif not turns and args.prompt_tokens:
            count = 2 + answer_seed(args.seed, number, -1) % max(1, args.prompt_tokens - 1)
            ids = chat.ids(tokenizer, answers[0][:1000])[: min(count, args.prompt_tokens)]
            turns = [{"role": "user", "content": tokenizer.decode(ids)}]
    return example._replace(prompt=turns, completions=[], scores=[])


def answer_seed(seed: int, row: int, number: int) -> int:
    """Of the generator of one answer to the prompt of one row."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row} {number}".encode()).digest()[:7], "big")


def as_row(asked: Asked, number: int, text: str, template: chat.Template) -> dict[str, Any]:
    """An answer as a row that formats.py reads."""
    prompt, rendering = asked.example.prompt, dict(asked.example.rendering)
    if template.name in ("none", "raw") and len(prompt) == 1:
        prompt = prompt[0]["content"]
    row = {"id": f"{asked.row}-{number}", "prompt": prompt, "completion": text}
    row |= {"tools": rendering.pop("tools")} if "tools" in rendering else {}
    return row | ({"chat_template_kwargs": rendering} if rendering else {})


def alpaca_eval(rows: Iterable[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    """The lines of a JSON list of AlpacaEval's rows; an instruction is the last user turn."""
    before = "[\n"
    for row in rows:
        prompt = row["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        instruction = next((turn["content"] for turn in turns[::-1] if turn["role"] == "user"), "")
        names = {"generator": Path(args.model).name, "dataset": " ".join(args.data)}
        yield before + json.dumps({"instruction": instruction, "output": row["completion"], **names})
        before = ",\n"
    yield "\n]\n"


def transformers_engine(
    args: argparse.Namespace, tokenizer: Any, template: chat.Template, device: torch.device
) -> Callable[[list[list[int]], list[int]], list[list[int]]]:
    """(prompts, seeds) -> answers, all of them ids."""
    lm = loading.load_plain(args.model, getattr(torch, args.dtype), args.trust_remote_code).to(device)
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and args.max_prompt_length + args.max_new_tokens > longest:
        raise ValueError(
            f"--max-prompt-length {args.max_prompt_length} and --max-new-tokens {args.max_new_tokens} exceed "
            f"the {longest} positions of {args.model}"
        )
    how = generation.Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    stop = generation.stops(lm, tokenizer, template)

    def answers(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
        found = [[] for _ in prompts]
        for first in range(0, len(order), args.batch_size):
            batch = order[first : first + args.batch_size]
            chosen = [prompts[index] for index in batch], [seeds[index] for index in batch]
            for index, ids in zip(batch, generation.generate(lm, *chosen, stop, how)):
                found[index] = ids
        return found

    return answers


def vllm_engine(
    args: argparse.Namespace, tokenizer: Any, template: chat.Template, device: torch.device
) -> Callable[[list[list[int]], list[int]], list[list[int]]]:
    """The same by vLLM, on all GPUs of the machine; the draws are its own, by the same seeds. Not run by
    us."""
    try:
        import vllm
    except ImportError:
        raise ValueError("--engine vllm: vllm is not installed (pip install vllm)") from None
    made = vllm.LLM(
        args.model,
        dtype=args.dtype,
        tensor_parallel_size=max(1, torch.cuda.device_count()),
        max_model_len=args.max_prompt_length + args.max_new_tokens,
        trust_remote_code=args.trust_remote_code,
        generation_config="vllm",  # its own defaults: the model's temperature and penalties do not count
    )
    lm = argparse.Namespace(config=made.llm_engine.model_config.hf_config, generation_config=None)
    common = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k or -1}
    stop = generation.stops(lm, tokenizer, template)
    common |= {"max_tokens": args.max_new_tokens, "stop_token_ids": stop}

    def answers(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        how = [vllm.SamplingParams(seed=seed % 2**31, detokenize=False, **common) for seed in seeds]
        found = made.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
        return [generation.before(list(answer.outputs[0].token_ids), stop) for answer in found]

    return answers


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    with config.user_errors():
        sources = " ".join(data.state(source, args.split) for source in args.data)
        place = data.state(args.model, "") if Path(args.model).exists() else args.model
        settings = vars(args) | parts.states(data=sources, model=place)
        if parts.check(args.out, settings):
            config.tell(f"{args.out} is there: nothing to do")
            return
        device = precision.device(args.device, args.dtype, config.tell)
        rank, world_size, device = fsdp.init(device, args.timeout_minutes)
        tokenizer = loading.load_tokenizer(args.model, args.trust_remote_code)
        template = chat.chat_template(tokenizer, args.chat_template)
        left_out = Counter()
        if next(asked(args, tokenizer, template, left_out), None) is None:
            reasons = "; ".join(f"{number} rows: {why}" for why, number in left_out.items())
            raise ValueError(f"{' '.join(args.data)}: no prompt in it ({reasons})")
        engine = vllm_engine if args.engine == "vllm" else transformers_engine
        answers = engine(args, tokenizer, template, device)
        lock = parts.begin(args.out, settings) if rank == 0 else None  # noqa: F841  held
        fsdp.barrier()
        left_out = Counter()
        prompts = islice(asked(args, tokenizer, template, left_out), args.prompts)
        prompts = progress.bar(prompts, "prompts", args.prompts)
        part = answered = 0
        while chunk := list(islice(prompts, PART)):
            if part % world_size == rank and not parts.is_done(args.out, part):
                parts.write(args.out, part, answer(chunk, args, answers, tokenizer, template))
            part += 1
            answered += len(chunk)
        if rank == 0:
            while not all(parts.is_done(args.out, index) for index in range(part)):
                time.sleep(0.1)  # no barrier, which would have a limit; the launcher sees a process that dies
            lines = alpaca_eval(parts.read(args.out, part), args) if args.format == "alpaca_eval" else None
            parts.finish(args.out, part, lines)
            for reason, number in left_out.items():
                config.tell(f"{number} rows left out: {reason}")
            config.tell(f"wrote {args.out}: {answered} prompts, {answered * args.answers} answers")
    fsdp.finish()


def answer(
    chunk: list[Asked],
    args: argparse.Namespace,
    answers: Callable[[list[list[int]], list[int]], list[list[int]]],
    tokenizer: Any,
    template: chat.Template,
) -> Iterator[dict[str, Any]]:
    """The rows of some prompts' answers."""
    wanted = [(prompt, number) for prompt in chunk for number in range(args.answers)]
    seeds = [answer_seed(args.seed, prompt.row, number) for prompt, number in wanted]
    found = answers([prompt.ids for prompt, _ in wanted], seeds)
    for (prompt, number), ids in zip(wanted, found):
        text = chat.answer_text(tokenizer, prompt.ids, ids, template, prompt.lead)
        yield as_row(prompt, number, text, template)


if __name__ == "__main__":
    main()
