"""One optimiser step of Ra-DPO: ours against the published algorithm written naively from its formula.

    python bench/vs_published.py --model models/smollm2 [--steps 8] [--out FILE]

Naive: both answers of a pair padded side by side, prompts twice, eager attention, the logits of policy and
reference whole and in fp32, softmax and log-softmax of both, two `torch.quantile` over the halves of the
vocabulary, everything in autograd; it runs at 2 pairs a step, since 8 do not fit into 24 GB. Its reference
has fp32 weights under autocast like the policy, so that the first loss is log 2 as it must be. Ours: align.py
at 8 pairs a step, with the exact cvar. Same pairs, bf16 compute, fp32 masters,
AdamW. Medians over the steps after the warm-up, peak resident set of each process. Prints a Markdown table
and one JSON line.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step import describe_machine, report  # noqa: E402
from vs_trl import MAX_LENGTH, add_flags, choose_pairs, run_ours  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402
import encode  # noqa: E402
import loading  # noqa: E402

NAIVE_PAIRS = 2
LEVEL = 0.97
BETA = 0.1


def pad(pairs: list[encode.Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention and answer masks (2B, T): chosen answers first."""
    rows = [(pair.prompt, pair.completions[k]) for k in (0, 1) for pair in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (2B, T)
    attention, answers = torch.zeros_like(ids), torch.zeros_like(ids)  # (2B, T) each
    for row, (prompt, answer) in enumerate(rows):
        size = len(prompt) + len(answer)
        ids[row, :size] = torch.tensor(prompt + answer)
        attention[row, :size] = 1
        answers[row, len(prompt) : size] = 1
    return ids, attention, answers


def naive_loss(policy: torch.nn.Module, reference: torch.nn.Module, pairs: list[encode.Encoded]) -> Tensor:
    ids, attention, answers = pad(pairs)
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(ids, attention_mask=attention).logits[:, :-1].float()  # (2B, T, V)
        with torch.no_grad():
            ref_logits = reference(ids, attention_mask=attention).logits[:, :-1].float()  # (2B, T, V)
    mask = answers[:, 1:].float()  # (2B, T)
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)  # (2B, T, V)
    probability = ref_logits.softmax(-1)  # (2B, T, V)
    cost = ref_logps - logps  # (2B, T, V)
    half = cost.shape[-1] // 2
    risks = []
    for part, mass in zip(
        cost.split([half, cost.shape[-1] - half], -1), probability.split([half, cost.shape[-1] - half], -1)
    ):
        # torch.quantile takes at most 16 million numbers: sequence by sequence
        cuts = torch.stack([torch.quantile(row.detach(), 1 - LEVEL, dim=-1, keepdim=True) for row in part])
        risks.append((mass * part * (part > cuts)).sum(-1))  # (2B, T)
    risk = (sum(risks) * mask).sum(-1)  # (2B,)
    targets = ids[:, 1:, None]
    ratio = ((logps - ref_logps).gather(-1, targets)[..., 0] * mask).sum(-1)  # (2B,)
    chosen, rejected = (ratio + risk).chunk(2)  # (B,) each
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def naive(args: argparse.Namespace, folder: Path) -> dict:
    """Seconds of each step and the peak memory of this process."""
    tokenizer = loading.load_tokenizer(args.model)
    template = chat.chat_template(tokenizer, None)
    pairs = [
        encode.encode(e, tokenizer, 4096, 2048, template)
        for e in data.load(str(folder / "trl.jsonl"), "train")[0]
    ]
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, **options) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-6, fused=True)
    seconds, losses = [], []
    for step in range(args.warmup + args.steps):
        began = time.perf_counter()
        loss = naive_loss(policy, reference, pairs[step * NAIVE_PAIRS : (step + 1) * NAIVE_PAIRS])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": seconds, "peak_gb": peak, "loss": losses[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_flags(parser)
    parser.add_argument("--naive", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.naive:
        print(json.dumps(naive(args, args.naive)))
        return
    total = args.warmup + args.steps
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        choose_pairs(args.model, args.data, args.pairs * total, folder)
        command = ["align.py", "--loss", "ra_dpo1", "--risk", "cvar", "--confidence-level", str(LEVEL)]
        found["ours, ra_dpo1, cvar"] = run_ours(command, args, folder) | {"pairs": args.pairs}
        again = [sys.executable, __file__, "--model", args.model, "--naive", str(folder)]
        again += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
        done = subprocess.run(again, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-4000:] or f"the naive run ended with {done.returncode}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        found["published algorithm, written naively"] = result | {"pairs": NAIVE_PAIRS}
    first = next(iter(found.values()))
    base = statistics.median(first["seconds"][args.warmup :]) / first["pairs"]
    lines = [
        f"max length {MAX_LENGTH}, bf16, live reference, {describe_machine()}; medians of {args.steps} steps after "
        f"{args.warmup} of warm-up.",
        "",
        "| run | pairs a step | s/step | pairs/s | speed, ours with cvar to it | peak RSS, GB | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, result in found.items():
        seconds = statistics.median(result["seconds"][args.warmup :])
        each = seconds / result["pairs"]
        lines.append(
            f"| {label} | {result['pairs']} | {seconds:.2f} | {1 / each:.2f} | {each / base:.2f} | "
            f"{result['peak_gb']:.2f} | {result['loss']:.4f} |"
        )
    report(lines, found, args.out)


if __name__ == "__main__":
    main()
