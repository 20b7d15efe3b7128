"""Errors of logp, kl and cvar against fp64 on a real model, with a policy at a known small KL from the
reference.

    python bench/exact.py --model models/smollm2 [--pairs 3] [--kl 1e-4]

The policy is the reference plus Gaussian noise on its weights, scaled until the true KL per token (fp64 body
and head) is --kl. Rows: the whole computation in fp32; the head alone in bf16 operands (what vocab.py adds:
the same bf16 hidden states and weights in fp64 are the truth); bf16 logits instead, as most code has them;
and the whole computation in bf16, whose error is the rounding floor of the body and no head can mend. Errors
are of the mean over tokens, relative, and for logp the mean absolute error in nats.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import batch  # noqa: E402
import chat  # noqa: E402
import data  # noqa: E402
import encode  # noqa: E402
import loading  # noqa: E402
import model  # noqa: E402
import risk  # noqa: E402
import vocab  # noqa: E402

CVAR = functools.partial(risk.cvar, confidence_level=0.97)


def states(lm: model.LanguageModel, pack: batch.Pack) -> torch.Tensor:
    return lm(pack.ids, pack.positions, pack.layout, pack.predict)


def in_dtype(lm: model.LanguageModel, dtype: torch.dtype) -> model.LanguageModel:
    """A copy with its parameters in dtype; fp64 takes the buffers along."""
    twin = copy.deepcopy(lm)
    if dtype == torch.float64:
        return twin.double()
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    return twin


def measure(hidden, head, ref_hidden, ref_head, targets) -> vocab.Tokens:  # noqa: ANN001
    return vocab.token_statistics(hidden, head, targets, (ref_hidden, ref_head), CVAR)


def rounded_logits(hidden, head, ref_hidden, ref_head, targets) -> tuple[torch.Tensor, ...]:  # noqa: ANN001
    """What bf16 logits make of the same operands: logp, kl, cvar."""
    logps = (hidden @ head.weight.t()).float().log_softmax(-1)
    ref_logps = (ref_hidden @ ref_head.weight.t()).float().log_softmax(-1)
    cost = ref_logps - logps
    probability = ref_logps.exp()
    return (
        logps.gather(-1, targets[:, None])[:, 0],
        risk.kl(cost, probability).value,
        CVAR(cost, probability).value,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/hh_test.jsonl")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--kl", type=float, default=1e-4, help="true KL per token, nats")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    reference = model.load(args.model, torch.float32, 512)
    tokenizer = loading.load_tokenizer(args.model)
    template = chat.chat_template(tokenizer, None)
    examples = data.load(args.data, "test")[0][: args.pairs]
    pack = batch.pack([encode.encode(example, tokenizer, 512, 256, template) for example in examples])
    reference64 = in_dtype(reference, torch.float64)
    ref_states64 = states(reference64, pack)

    generator = torch.Generator().manual_seed(args.seed)
    noise = [torch.randn(p.shape, generator=generator) * p.std() for p in reference.parameters()]
    scale = 1e-3
    for _ in range(6):  # KL is quadratic in the scale
        policy = in_dtype(reference, torch.float32)
        for parameter, direction in zip(policy.parameters(), noise):
            parameter.add_(direction, alpha=scale)
        policy64 = in_dtype(policy, torch.float64)
        truth = measure(states(policy64, pack), policy64.head, ref_states64, reference64.head, pack.targets)
        found = truth.kl.mean().item()
        if abs(found / args.kl - 1) < 0.02:
            break
        scale *= (args.kl / found) ** 0.5
    print(
        f"{len(pack.targets)} tokens of {args.pairs} pairs, true KL {found:.3e}, true cvar {truth.risk.mean():.3e} a token"
    )

    fp32 = measure(states(policy, pack), policy.head, states(reference, pack), reference.head, pack.targets)
    low, ref_low = in_dtype(policy, torch.bfloat16), in_dtype(reference, torch.bfloat16)
    hidden, ref_hidden = states(low, pack), states(ref_low, pack)
    bf16 = measure(hidden, low.head, ref_hidden, ref_low.head, pack.targets)
    heads64 = [vocab.Head(head.weight.double()) for head in (low.head, ref_low.head)]
    same = measure(hidden.double(), heads64[0], ref_hidden.double(), heads64[1], pack.targets)
    rounded = rounded_logits(hidden, low.head, ref_hidden, ref_low.head, pack.targets)

    print("| computation | truth | logp, mean abs. error | kl, rel. error | cvar, rel. error |")
    print("|---|---|---|---|---|")
    table = [
        ("body and head fp32", (fp32.logps, fp32.kl, fp32.risk), truth, "all fp64"),
        (
            "head of bf16 operands, fp32 logits (vocab.py)",
            (bf16.logps, bf16.kl, bf16.risk),
            same,
            "same operands, fp64",
        ),
        ("head of bf16 operands, bf16 logits", rounded, same, "same operands, fp64"),
        ("body bf16, head vocab.py: the floor", (bf16.logps, bf16.kl, bf16.risk), truth, "all fp64"),
    ]
    for name, (logps, kl, cvar), exact, what in table:
        error = (logps.double() - exact.logps).abs().mean().item()
        errors = [
            abs(got.double().mean() / want.mean() - 1).item()
            for got, want in ((kl, exact.kl), (cvar, exact.risk))
        ]
        print(f"| {name} | {what} | {error:.1e} | {errors[0]:.2%} | {errors[1]:.2%} |")


if __name__ == "__main__":
    main()
