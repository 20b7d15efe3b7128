"""The output head alone, forward and backward: ours in chunks against whole logits and autograd.

    python bench/head.py --model models/smollm2 [--pairs 8] [--out FILE]

Operands are real: the hidden states of the trained tokens of HH pairs, in bf16; the policy's are the
reference's plus noise of NOISE of their spread, for a drift like that of training. "whole" is the usual code,
every step of which has an (N, V) tensor: with logits rounded to bf16, as a bf16 model has them, or with fp32
logits like ours. One process a row, with freed memory kept, that of whole logits too; medians of REPEATS.
Extra memory is the peak resident set less what was resident before the first pass. Errors are against fp64 on
the same operands: logp the mean absolute error in nats, drifts the relative error of their mean over the
tokens. Prints a Markdown table and one JSON line.
"""

import argparse
import ctypes
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from step import describe_machine, report  # noqa: E402
from torch import Tensor  # noqa: E402

import batch  # noqa: E402
import chat  # noqa: E402
import data  # noqa: E402
import encode  # noqa: E402
import fsdp  # noqa: E402
import loading  # noqa: E402
import model  # noqa: E402
import risk  # noqa: E402
import vocab  # noqa: E402

NOISE = 0.02
REPEATS = 3
LEVEL = 0.97
MEASURES = {
    "logp": None,
    "kl": risk.kl,
    "cvar": functools.partial(risk.cvar, confidence_level=LEVEL),
}


def ours(operands: dict[str, Tensor], drift: str) -> tuple[Tensor, Tensor | None]:
    head, reference = vocab.Head(operands["weight"]), vocab.Head(operands["weight"].detach())
    measure = MEASURES[drift] if drift not in ("logp", "kl") else None
    through = {"logp": None, "kl": "kl"}.get(drift, "risk")
    twin = (operands["ref_hidden"], reference)
    found = vocab.token_statistics(operands["hidden"], head, operands["targets"], twin, measure, through)
    return found.logps, {"logp": None, "kl": found.kl}.get(drift, found.risk)


def whole(operands: dict[str, Tensor], drift: str, wide: bool) -> tuple[Tensor, Tensor | None]:
    """As one writes it: the logits of all tokens, autograd through everything."""
    parts = [operands[key].float() if wide else operands[key] for key in ("hidden", "ref_hidden", "weight")]
    hidden, ref_hidden, weight = parts
    logps = (hidden @ weight.t()).float().log_softmax(-1)  # (N, V)
    with torch.no_grad():
        ref_logps = (ref_hidden @ weight.t()).float().log_softmax(-1)  # (N, V)
    chosen = logps.gather(-1, operands["targets"][:, None])[:, 0]  # (N,)
    if drift == "logp":
        return chosen, None
    mass, cost = ref_logps.exp(), ref_logps - logps  # (N, V) each
    if drift == "kl":
        return chosen, (mass * cost).sum(-1)
    worst, order = cost.sort(-1, descending=True)  # (N, V) cvar, by sorting
    sorted_mass = mass.gather(-1, order)  # (N, V)
    room = (LEVEL - (sorted_mass.cumsum(-1) - sorted_mass)).clamp(min=0)  # (N, V)
    return chosen, (torch.minimum(sorted_mass, room) * worst).sum(-1) / LEVEL


HEADS = {
    "ours": ours,
    "whole, bf16 logits": functools.partial(whole, wide=False),
    "whole, fp32 logits": functools.partial(whole, wide=True),
}


def peak_gb() -> float:
    """Peak resident set since it was last reset; not getrusage's, which begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def child(path: Path, name: str, drift: str) -> None:
    operands = load_file(path)
    compute = HEADS[name]
    fsdp.init("cpu")
    if name != "ours":  # fsdp.init gives blocks of over 32 MB back; it would slow these rows down
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    for key in ("hidden", "weight"):
        operands[key].requires_grad_()
    torch.randn(64, 64, dtype=torch.bfloat16) @ torch.randn(64, 64, dtype=torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_gb()
    times = []
    for _ in range(REPEATS + 1):
        operands["hidden"].grad = operands["weight"].grad = None
        began = time.perf_counter()
        logps, risks = compute(operands, drift)
        (logps.sum() if risks is None else logps.sum() - risks.sum()).backward()
        times.append(time.perf_counter() - began)
    result = {"seconds": sorted(times[1:])[REPEATS // 2], "extra_gb": peak_gb() - before}
    few = slice(0, 256)
    exact = {key: value.detach()[few] if key != "weight" else value for key, value in operands.items()}
    exact = {key: value.double() if value.is_floating_point() else value for key, value in exact.items()}
    measure = MEASURES[drift] or risk.kl
    with torch.no_grad():
        truth = vocab.token_statistics(
            exact["hidden"], vocab.Head(exact["weight"]), exact["targets"],
            (exact["ref_hidden"], vocab.Head(exact["weight"])), measure,
        )  # fmt: skip
    result["logp"] = (logps[few].detach().double() - truth.logps).abs().mean().item()
    if risks is not None:
        result["drift"] = abs(risks[few].detach().double().mean() / truth.risk.mean() - 1).item()
    print(json.dumps(result))


@torch.no_grad()
def make_operands(path: str, source: str, pairs: int) -> dict[str, Tensor]:
    tokenizer = loading.load_tokenizer(path)
    template = chat.chat_template(tokenizer, None)
    examples = data.load(source, "train")[0][:pairs]
    pack = batch.pack([encode.encode(example, tokenizer, 512, 256, template) for example in examples])
    lm = model.load(path, torch.bfloat16, 512)
    states = lm(pack.ids, pack.positions, pack.layout, pack.predict)  # (N, D)
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)) * states.float().std(0) * NOISE
    hidden = (states.float() + noise).bfloat16()  # (N, D)
    weight = lm.head.weight.detach().contiguous()  # (V, D)
    return {"hidden": hidden, "ref_hidden": states.contiguous(), "weight": weight, "targets": pack.targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/hh_train.jsonl")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="also write the output here")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), *args.child[1:])
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        operands = make_operands(args.model, args.data, args.pairs)
        save_file(operands, f"{folder}/operands.safetensors")
        for drift in MEASURES:
            for name in HEADS:
                again = [sys.executable, __file__, "--model", args.model]
                again += ["--child", f"{folder}/operands.safetensors", name, drift]
                done = subprocess.run(again, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-4000:])
                found[f"{drift}: {name}"] = json.loads(done.stdout.strip().splitlines()[-1])
    size = (
        f"{len(operands['targets'])} tokens, vocabulary {len(operands['weight'])}, width {operands['weight'].shape[1]}"
    )
    lines = [
        f"{size}, bf16 operands, logp of policy and reference and one drift, forward and backward, {describe_machine()}",
        "",
        "| drift: head | s | to logp: ours | to ours | extra memory, GB | logp, error in nats | drift, rel. error |",
        "|---|---|---|---|---|---|---|",
    ]
    base = found["logp: ours"]["seconds"]
    for label, row in found.items():
        mine = found[label.split(":")[0] + ": ours"]["seconds"]
        drift = f"{row['drift']:.1e}" if "drift" in row else "-"
        lines.append(
            f"| {label} | {row['seconds']:.2f} | {row['seconds'] / base:.2f} | {row['seconds'] / mine:.2f} | "
            f"{row['extra_gb']:.2f} | {row['logp']:.1e} | {drift} |"
        )
    report(lines, found, args.out)


if __name__ == "__main__":
    main()
