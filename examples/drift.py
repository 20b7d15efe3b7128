"""How drift spreads over tokens: KL(reference || policy) of each token of held-out answers, and its tail.

    python examples/drift.py runs/dpo/final runs/ra_dpo1/final --reference runs/sft/final --out drift.png

A line a model beside the figure, as .jsonl: mean, quantiles, and the 95 and 99 % CVaR, the means of the worst
5 and 1 % of the tokens (of both answers of a pair; nats; body and head in fp32). The figure, PNG and SVG, is
the share of tokens that drift farther than x; the dots are the CVaRs, at the height of their shares.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import align  # noqa: E402
import batch  # noqa: E402
import chat  # noqa: E402
import config  # noqa: E402
import frontier  # noqa: E402
import loading  # noqa: E402
import model  # noqa: E402
import numpy as np  # noqa: E402
import objective  # noqa: E402
import risk  # noqa: E402
import torch  # noqa: E402
import vocab  # noqa: E402

SHARES = np.logspace(0, -4, 41)  # of the tokens that drift farther than a quantile
TAILS = {"cvar_95": 0.05, "cvar_99": 0.01}
TOKENS = 4096  # of a pack
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito


class Measured(NamedTuple):
    """A model against the reference, nats: by trained token, and by pair, chosen answers first."""

    tokens: np.ndarray  # (N,) KL(reference || policy) of the next token
    kl: np.ndarray  # (2, B) its sums over answers
    cvar: np.ndarray  # (2, B) sums of the next tokens' CVaR of log pi_ref - log pi, the worst 5 %
    logratios: np.ndarray  # (2, B) log pi(y) - log pi_ref(y)


@torch.no_grad()
def measured(
    models: Sequence[str], reference: str, source: str, pairs: int, length: int, kept: Path | None = None
) -> Iterator[Measured]:
    """Of each model, on so many rows, those that align.py evaluates on, in an order of the rows' own;
    prompts are cut to half of `length`. All in fp32. The reference's hidden states are taken from the file
    `kept`, or written there."""
    tokenizer = loading.load_tokenizer(reference)
    template = chat.chat_template(tokenizer, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = f"--loss dpo --max-length {length} --tokens-per-microbatch {TOKENS}".split()
    args = align.parse_args(["--model", reference, "--data", source, "--out", "none", *flags])
    told = tokenizer, template, objective.make_objective(args), args
    rows = align.load_examples([source], "test", *told, lambda *parts: None).subset(pairs)
    works = batch.plan(rows.lengths, len(rows), 1, TOKENS, None)[0][0]
    packs = batch.packs(rows, works, "best-worst", device)
    where = [(pack.ids, pack.positions, pack.layout, pack.predict) for pack in packs]
    frozen = model.load(reference, torch.float32, length).to(device)
    if kept is not None and kept.exists():
        known = torch.load(kept, map_location=device)
    else:
        known = [frozen(*which) for which in where]  # (N, D) each
        if kept is not None:
            beside = kept.with_name(f".{kept.name}.{os.getpid()}")
            torch.save(known, beside)
            beside.replace(kept)
    worst = functools.partial(risk.cvar, confidence_level=0.05)
    for path in models:
        policy, found = model.load(path, torch.float32, length).to(device), []
        for pack, which, states in zip(packs, where, known):
            against = states, frozen.head
            tokens = vocab.token_statistics(policy(*which), policy.head, pack.targets, against, worst)
            values = tokens.kl, tokens.risk, tokens.logps - tokens.ref_logps  # (N,) each
            by_pair = [objective.by_response(value, pack)[pack.pairs] for value in values]  # (2, B) each
            found.append([part.cpu().numpy() for part in (tokens.kl, *by_pair)])
        yield Measured(*(np.concatenate(parts, axis=-1) for parts in zip(*found)))


def summary(kl: np.ndarray) -> dict[str, Any]:
    """Of the KL (N,) of tokens: the mean, that of the largest shares of TAILS, the quantiles of SHARES."""
    ordered = np.sort(kl)[::-1]
    found = {"tokens": len(kl), "mean": float(kl.mean())}
    found |= {name: float(ordered[: max(1, round(share * len(kl)))].mean()) for name, share in TAILS.items()}
    return found | {"quantiles": [float(f"{value:.4g}") for value in np.quantile(kl, 1 - SHARES)]}


def figure(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """The share of tokens beyond a drift, a line a model, its name at the right."""
    made, (panel,) = frontier.canvas(1)
    ends = []
    for index, (name, row) in enumerate(rows.items()):
        colour, dashes = frontier.LINES.get(name, (COLOURS[index % len(COLOURS)], "-"))
        # from the median on: the least of thousands of tokens, decades below, would squeeze the tail
        shown = (SHARES >= 1 / row["tokens"]) & (SHARES <= 0.5) & (np.array(row["quantiles"]) > 0)
        line = np.array(row["quantiles"])[shown], SHARES[shown]
        panel.plot(*line, dashes, color=colour, linewidth=1.4)
        panel.plot([row[tail] for tail in TAILS], list(TAILS.values()), "o", color=colour, markersize=5)
        ends.append((line[1][-1], line[0][-1], name, colour))
    panel.set(xscale="log", yscale="log", xlabel="KL(reference || policy) of a token, nats")
    panel.set_xlim(left=min(panel.get_xlim()[0], panel.get_xlim()[1] / 100))  # two decades of ticks
    panel.set_title("share of tokens beyond it; dots: CVaR at 95 and 99 %", loc="left", fontsize=11)
    frontier.name(panel, ends)
    frontier.save(made, path)


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.error = lambda message: config.fail(message)
    made.add_argument("models", nargs="+", help="model directories")
    made.add_argument("--reference", required=True)
    made.add_argument("--data", default=str(ROOT / "examples" / "hh_test.jsonl"))
    made.add_argument("--pairs", type=config.count, default=160)
    made.add_argument("--max-length", type=config.count, default=256)
    made.add_argument("--out", type=Path, default=Path("drift.png"), help="and .svg and .jsonl beside it")
    args = made.parse_args(argv)
    rows = {}
    with config.user_errors():
        found = measured(args.models, args.reference, args.data, args.pairs, args.max_length)
        for path, each in zip(args.models, found):
            rows[path.rstrip("/").removesuffix("/final")] = summary(each.tokens)
        lines = [json.dumps({"model": name} | row) + "\n" for name, row in rows.items()]
        args.out.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
        config.tell("| model | tokens | mean KL | CVaR 95 % | CVaR 99 % |\n|---|---|---|---|---|")
        for name, row in rows.items():
            numbers = " | ".join(f"{row[key]:.4g}" for key in ("mean", *TAILS))
            config.tell(f"| {name} | {row['tokens']} | {numbers} |")
        figure(rows, args.out)


if __name__ == "__main__":
    main()
