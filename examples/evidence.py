"""What docs/compare.md says, from the rows in bench/results: its tables and figures, without training.

    python examples/evidence.py                 writes bench/results/*.md and the figures there anew
    python examples/evidence.py --to DIR        writes them there

controlled.md, compare.md and compare_small.md are the tables of controlled.py and compare.py. evidence.md has
what was concluded: a family of comparisons an experiment, each a quotient (of drifts, margins, gains; the mean
is that of the logarithms) or a difference (of accuracies), seed by seed:

    95 %             interval of Student's t over the seeds that both methods have
    p                two-sided, of no difference
    Holm             p after the correction for the number of comparisons of the family: below 0.05, it is
                     left when all are asked at once (Holm 1979)
    found if         what four of five experiments with such a spread between seeds would have found
    seeds for 3 %    how many would find a quotient of 0.97, at (1.96 + 0.84)^2 (spread / log 0.97)^2

and what the figures of the drift over tokens show, the tables of bf16 and of the README.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import stdev
from typing import Any, Iterable, Sequence

import compare
import config
import controlled
import drift
import frontier
import numpy as np

RESULTS = compare.ROOT / "bench" / "results"
BETA = compare.BETA
SHORT, LONG, KNOWN = "SmolLM2, short dialogues", "SmolLM2, longer dialogues", "the controlled world"
FIRST = tuple(name for name in frontier.METHODS if name.startswith("ra_dpo1"))
ALL = tuple(name for name in frontier.METHODS if name != "dpo")
LEVEL = "ra_dpo1_cvar_"
LEVELS = [(f"{LEVEL}{a}", f"{LEVEL}{b}") for a, b in (("0.97", "0.98"), ("0.98", "0.99"), ("0.1", "0.5"))]
MORE_LEVELS = [(f"{LEVEL}{a}", f"{LEVEL}0.98") for a in ("0.1", "0.5")]
TO_DPO, NEAR = [(name, "dpo") for name in ALL], (f"{LEVEL}0.97", "tdpo1")
SECOND = [(f"ra_dpo2_cvar_{a}", b) for a, b in (("0.97", "tdpo2"), ("0.98", "tdpo2"), ("0.97", "ra_dpo2_cvar_0.98"))]
BF16 = ("kl_chosen", "kl_rejected", "cvar_chosen", "accuracy", "margin")  # by rate
DIFFERENCE = "accuracy"  # all else is compared by quotients
FAMILIES = {  # experiment -> measure -> (method, the one that it is compared with)
    KNOWN: {
        "kl": [
            *TO_DPO, *((name, "tdpo1") for name in FIRST), *SECOND, *LEVELS, *MORE_LEVELS, ("tdpo2", "tdpo1"),
        ],
        "kl_chosen": MORE_LEVELS[:1],
        "balance": [("tdpo1", "dpo")],
        "accuracy": TO_DPO,
    },
    SHORT: {
        "kl_chosen": [
            NEAR, (NEAR[0], "dpo"), ("tdpo1", "dpo"), ("kto", "dpo"), SECOND[0], *LEVELS,
            ("ra_dpo1_published_0.98", "tdpo1"), ("ra_dpo1_erm_5", "tdpo2"),
        ],
        "kl_rejected": [("ra_dpo1_published_0.98", "tdpo1")],
        "balance": [("tdpo1", "dpo")],
        "margin": [("kto", "dpo"), SECOND[0]],
        "gain": [("tdpo1", "dpo"), ("tdpo2", "dpo"), NEAR, SECOND[0], (f"{LEVEL}0.1", "tdpo2")],
        "accuracy": TO_DPO,
    },
    LONG: {
        "kl_chosen": [
            NEAR, (NEAR[0], "dpo"), ("tdpo1", "dpo"), ("tdpo2", "dpo"), ("tdpo2", "tdpo1"), SECOND[0],
            (f"{LEVEL}0.5", "tdpo1"),
        ],
        "balance": [("tdpo1", "dpo"), ("tdpo2", "dpo")],
        "margin": [("tdpo2", "dpo")],
        "gain": [(name, "dpo") for name in ("tdpo1", "tdpo2", NEAR[0], SECOND[0][0])],
        "accuracy": TO_DPO,
    },
}  # fmt: skip


def read(name: str) -> list[frontier.Row]:
    """The rows of bench/results, with what tables derive from them."""
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row | compare.derived(row) if "kl_chosen" in row else row for row in rows]


def compared(rows: Iterable[frontier.Row], method: str, base: str, measure: str) -> list[float]:
    """At BETA, over the seeds that both have: logarithms of quotients, or differences."""
    found = frontier.by_method(rows)
    pairs = frontier.paired(*(found.get(name, {}).get(BETA, []) for name in (method, base)))
    if measure == DIFFERENCE:
        return [a[measure] - b[measure] for a, b in pairs]
    return frontier.logs_of_quotients(pairs, measure)


def chance(values: Sequence[float]) -> float:
    """p, two-sided, of a mean of 0: with t = root(v) tan a, v degrees of freedom, the density of Student's t is
    cos(a)^(v - 1) da, which is integrated from a to pi / 2."""
    mean, error = frontier.mean_and_error(values)
    freedom = len(values) - 1
    angles = np.linspace(math.atan(abs(mean) / error / math.sqrt(freedom)), math.pi / 2, 10_001)
    whole = math.sqrt(math.pi) * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2)
    return float(2 * np.trapezoid(np.cos(angles) ** (freedom - 1), angles) / whole)


def holm(chances: Sequence[float]) -> list[float]:
    """Adjusted: the k-th smallest of m, from 0, times m - k, and none below one before it."""
    found, least = [0.0] * len(chances), 0.0
    for k, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        least = max(least, min(1.0, (len(chances) - k) * chances[index]))
        found[index] = least
    return found


def family(rows: Sequence[frontier.Row], wanted: dict[str, list[tuple[str, str]]]) -> str:
    """As Markdown; what fewer than two seeds have is left out, and not counted."""
    asked = [(*pair, measure) for measure, pairs in wanted.items() for pair in pairs]
    some = [(*one, values) for one in asked if len(values := compared(rows, *one)) > 1]
    chances = [chance(values) for *_, values in some]
    heads = ("method, to", "measure", "seeds", "by seed", "mean (95 %)", "p", "Holm", "found if", "seeds for 3 %")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    titles = {"kl": "KL(policy, reference)"} | {key: head for key, (head, _) in compare.COLUMNS.items()}
    for (method, base, measure, values), p, corrected in zip(some, chances, holm(chances)):
        if measure == DIFFERENCE:
            shown = [f"{value:+.3f}" for value in values]
            middle, found_if, needed = frontier.with_interval(values), f"{frontier.least_found(values):.3f}", ""
        else:
            shown = [f"{math.exp(value):.2f}" for value in values]
            middle = frontier.with_interval(values, ".2f", math.exp)
            found_if = frontier.found_if(values)
            needed = str(max(2, math.ceil((2.8 * stdev(values) / math.log(0.97)) ** 2)))
        cells = [f"{method}, {base}", titles[measure].removesuffix(", nats"), f"{len(values)}", " ".join(shown)]
        cells += [middle, f"{p:.2g}", f"{corrected:.2g}", found_if, needed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def both(rows: Sequence[Sequence[frontier.Row]]) -> str:
    """NEAR over the seeds of several experiments."""
    values = [value for some in rows for value in compared(some, *NEAR, "kl_chosen")]
    return f"{len(values)} seeds: {frontier.with_interval(values, '.3f', math.exp)}, p {chance(values):.2g}"


def for_readme(known: Sequence[frontier.Row], short: Sequence[frontier.Row]) -> str:
    """Six methods at BETA: drift and what came of it, in both worlds."""
    names = {"dpo": "dpo", "tdpo1": "tdpo1", NEAR[0]: "ra_dpo1 0.97", f"{LEVEL}0.1": "ra_dpo1 0.1"}
    names |= {"tdpo2": "tdpo2", "ra_dpo2_cvar_0.97": "ra_dpo2 0.97"}
    (before,) = frontier.by_method(known)["reference"].values()
    most = {name: np.mean([row[name] for row in before]) for name in ("reward", "ruin")}
    titles = [
        ("known reward, beta 0.1: drift", known, "kl", ".2f"),
        (f"mean reward ({most['reward']:.2f} before)", known, "reward", ".2f"),
        (f"catastrophes, % ({most['ruin']:.1f} before)", known, "ruin", ".1f"),
        ("SmolLM2, seeds 0 to 2, rates by dev: drift of chosen", short, "kl_chosen", ".2f"),
        ("margin there, nats", short, "margin", ".2f"),
    ]
    lines = [f"| drift in nats, and what came of it | {' | '.join(names.values())} |", "|---" * 7 + "|"]
    for title, rows, key, form in titles:
        cells = []
        for name in names:
            some = [row for row in rows if (row["method"], row["beta"]) == (name, BETA)]
            some = [row for row in some if rows is known or row["seed"] < 3]
            mean, error = frontier.mean_and_error([row[key] for row in some])
            rate = "half the rate: " if key == "kl_chosen" and some[0]["lr"] < 4e-5 else ""
            cells.append(f"{rate}{mean:{form}} ({error:{form}})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_tokens(tails: dict[str, dict[str, Any]]) -> str:
    """Of compare.tails, as Markdown: the mean KL of a token and of the worst."""
    lines = [f"| method | tokens | mean | {' | '.join(drift.TAILS)} |", "|---" * (3 + len(drift.TAILS)) + "|"]
    for method, found in tails.items():
        values = [f"{found[key]:.4f}" for key in ("mean", *drift.TAILS)]
        lines.append(f"| {method} | {found['tokens']} | {' | '.join(values)} |")
    return "\n".join(lines)


def judged(rows: Sequence[frontier.Row]) -> list[list[frontier.Row]]:
    """Of test, of dev."""
    return [[row for row in rows if row.get("judged") == which] for which in ("test", "dev")]


def made() -> dict[str, str]:
    """Name in bench/results -> its text."""
    names = ("controlled", "compare", "compare_small", "compare_large")
    known, short, long, large = map(read, names)
    rows = {KNOWN: known, SHORT: judged(short)[0], LONG: long}
    parts = [f"## {name}\n\n{family(rows[name], wanted)}" for name, wanted in FAMILIES.items()]
    parts.append(f"## {' and '.join(NEAR)}, KL chosen, both of SmolLM2\n\n{both([rows[SHORT], long])}")
    parts += [
        f"## {name}: KL(reference, policy) of a token, nats, seed 0\n\n{over_tokens(compare.tails(rows[name], 0))}"
        for name in (SHORT, LONG)
    ]
    parts.append(f"## SmolLM2, bf16\n\n{compare.by_rate(large, BF16)}")
    parts.append(f"## README\n\n{for_readme(known, rows[SHORT])}")
    head = "# Evidence\n\nMade by `python examples/evidence.py`, whose docstring says what the columns are."
    return {
        "controlled.md": controlled.tables(known) + "\n",
        "compare.md": compare.tables(*judged(short)) + "\n",
        "compare_small.md": compare.tables(*judged(long)) + "\n",
        "evidence.md": "\n\n".join([head, *parts]) + "\n",
    }


def draw(to: Path) -> None:
    """All figures."""
    frontier.figure(read("controlled"), to / "controlled.png")
    test, dev = judged(read("compare"))
    compare.draw(test, dev, 0, RESULTS / "compare", to / "compare.png")
    drift.figure(compare.tails(read("compare_small"), 0), to / "compare_small_drift.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: config.fail(message)
    parser.add_argument("--to", type=Path, default=RESULTS, help="a folder")
    args = parser.parse_args(argv)
    with config.user_errors():
        args.to.mkdir(parents=True, exist_ok=True)
        for name, text in made().items():
            (args.to / name).write_text(text, encoding="utf-8")
        draw(args.to)


if __name__ == "__main__":
    main()
