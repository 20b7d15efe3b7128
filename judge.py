"""Which of two models answers better: win rates, with and without the advantage of length, and lower tails.

    python judge.py --data a.jsonl --against b.jsonl --by runs/rm/final --out comparison.json

The answers are those of sample.py, scored by --by, or scored already by label.py. A (--data) and B
(--against) are joined by their prompts; of several answers to a prompt any one of A meets any one of B. Each
prompt counts alike. Intervals hold 95 % of the values over prompts drawn anew (bootstrap, the same prompts
for A and B).

    win rate             share of the meetings that A wins, ties half
    length-controlled    the same if the answers were equally long: see `length_controlled`
    worst 5 %            mean score of the worst 5 % of the answers (CVaR)
    distinct-n           different n-grams of words, a share of all; no interval, for a prompt that is drawn
                         twice has nothing new to say

Left out: other models' answers to the same prompts, which AlpacaEval's difficulty of an instruction needs.
All answers are held in memory.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

import config
import scoring

RIDGE = 0.1  # on the weight of length alone: enough to keep it finite where length decides everything
RESAMPLES = 1000


class Answers(NamedTuple):
    """What one model says to one prompt."""

    texts: list[str]  # of several turns the last
    scores: list[float]


Sides = Sequence[Sequence[Answers]]  # A and B: for each prompt what they say


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    made = config.parser(__doc__.splitlines()[0])
    add = made.add_argument
    # fmt: off
    add("--data", required=True, nargs="+", help="answers of A: files, folders, org/name")
    add("--against", required=True, nargs="+", help="answers of B to the same prompts")
    add("--split", default="train", help="of --data and --against")
    add("--out", default=None, help="write the numbers as FILE.json too")
    add("--seed", type=config.count_or_zero, default=0, help="of the intervals")
    # fmt: on
    scoring.add_flags(made)
    args = config.parse(made, argv)
    if args.out and (Path(args.out).suffix != ".json" or not Path(args.out).parent.is_dir()):
        config.fail(f"--out {args.out}", "must be FILE.json in a folder that exists")
    return args


def read(sources: Sequence[str], split: str, scorer: scoring.Scorer | None) -> dict[str, Answers]:
    """The scored answers by prompt. Says what was left out. Raises ValueError where there is no score."""
    found, left_out = {}, Counter()
    for chunk in scoring.chunks(scoring.prompts(sources, split, left_out)):
        if scorer is None and not all(prompt.example.labelled for prompt in chunk):
            raise ValueError(f"{' '.join(sources)}: answers without a score (--by scores them)")
        scores = scoring.score(chunk, scorer) if scorer else [prompt.example.scores for prompt in chunk]
        for prompt, values in zip(chunk, scores):
            key = json.dumps([prompt.example.prompt, prompt.example.rendering], default=repr)
            own = found.setdefault(key, Answers([], []))
            for answer, value in zip(prompt.example.completions, values):
                if isinstance(value, str):
                    left_out[value] += 1
                else:
                    own.texts.append(answer if isinstance(answer, str) else answer[-1]["content"])
                    own.scores.append(value)
    for reason, count in left_out.items():
        config.tell(f"{' '.join(sources)}: {count:,} left out: {reason}")
    return {key: answers for key, answers in found.items() if answers.scores}


def logistic(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """The w (k,) that minimise the weighted cross-entropy of sigmoid(features w) with the targets, plus
    sum(ridge w^2) / 2: features (n, k), targets (n,) in [0, 1], weights (n,), ridge (k,); by Newton's method,
    its steps shortened while they are long, so that it arrives from anywhere."""
    found = np.zeros(features.shape[1])
    for _ in range(200):
        rates = sigmoid(features @ found)  # (n,)
        slope = features.T @ (weights * (rates - targets)) + ridge * found  # (k,)
        bend = (features.T * (weights * rates * (1 - rates))) @ features + np.diag(ridge)  # (k, k)
        step = np.linalg.lstsq(bend, slope, rcond=None)[0]
        found = found - step / (1 + np.abs(features @ step).max())
        if np.abs(step).max() < 1e-10:
            break
    return found


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 * (1 + np.tanh(z / 2))


def length_controlled(wins: np.ndarray, differences: np.ndarray, weights: np.ndarray) -> float:
    """The win rate that a logistic regression predicts for answers of equal length: wins (n,) in [0, 1],
    differences (n,) in characters, weights (n,).

        P(A wins) = sigmoid(quality + w tanh(difference / its standard deviation))  ->  sigmoid(quality)

    Source: Dubois et al. 2024, arXiv:2404.04475, section 3. Differs: without the term for the difficulty of
    the instruction, which is fitted to the answers of many models; the ridge on w is RIDGE.
    """
    mean = weights @ wins / weights.sum()
    deviation = np.cov(differences, aweights=weights, ddof=0) ** 0.5
    if mean in (0.0, 1.0) or deviation == 0:  # nothing to tell the two apart by
        return float(mean)
    features = np.stack([np.ones(len(wins)), np.tanh(differences / deviation)], 1)  # (n, 2)
    return float(sigmoid(logistic(features, wins, weights, np.array([0.0, RIDGE]))[0]))


def measures(sides: Sides) -> dict[str, np.ndarray]:
    """Of each prompt: which share of the meetings A wins, and per side the means over answers; all (n,)."""
    wins = [np.heaviside(np.subtract.outer(a.scores, b.scores), 0.5).mean() for a, b in zip(*sides)]
    of_answer = {"mean score": lambda one: one.scores}
    of_answer["words"] = lambda one: [len(text.split()) for text in one.texts]
    of_answer["characters"] = lambda one: [len(text) for text in one.texts]
    pairs = [(what, name, side) for name, side in zip("AB", sides) for what in of_answer]
    means = {f"{what} {name}": [np.mean(of_answer[what](one)) for one in side] for what, name, side in pairs}
    return {name: np.array(values) for name, values in {"wins": wins, **means}.items()}


def estimates(found: dict[str, np.ndarray], sides: Sides, weights: np.ndarray) -> dict[str, float]:
    """Every number of the table that has an interval, each prompt counted as its weight (n,) says."""
    means = {name: float(weights @ values / weights.sum()) for name, values in found.items()}
    fair = length_controlled(found["wins"], found["characters A"] - found["characters B"], weights)
    for name, side in zip("AB", sides):
        sizes = [len(one.scores) for one in side]
        shares = np.repeat(weights / sizes, sizes)  # of a prompt, shared by its answers
        means[f"worst 5 % {name}"] = scoring.lower_tail(np.concatenate([one.scores for one in side]), shares)
    gaps = {name[:-1] + "A - B": means[name] - means[f"{name[:-1]}B"] for name in means if name[-1] == "A"}
    return {"win rate": means.pop("wins"), "length-controlled": fair, **means, **gaps}


def distinct(side: Sequence[Answers], n: int) -> float:
    """Different n-grams of words, as a share of all."""
    words = [text.split() for one in side for text in one.texts]
    grams = [gram for found in words for gram in zip(*[found[start:] for start in range(n)])]
    return len(set(grams)) / max(1, len(grams))


def compare(sides: Sides, seed: int) -> dict[str, list[float]]:
    """Every number: [value, lower, upper end of its interval], or [value] where it has none."""
    found, count = measures(sides), len(sides[0])
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)  # (R, n)
    again = [estimates(found, sides, weights.astype(float)) for weights in draws]
    result = {f"distinct-{n} {name}": [distinct(side, n)] for n in (1, 2) for name, side in zip("AB", sides)}
    for name, value in estimates(found, sides, np.ones(count)).items():
        result[name] = [value, *np.quantile([one[name] for one in again], [0.025, 0.975]).tolist()]
    return result


def table(result: dict[str, list[float]]) -> str:
    """The numbers as Markdown."""
    cells = {name: f"{value:.4g}" for name, (value, *_) in result.items()}
    cells |= {name: f"{cells[name]} [{v[1]:.4g}, {v[2]:.4g}]" for name, v in result.items() if len(v) > 1}
    rows = [[f"{name}, ties half", cells[name], "", ""] for name in ("win rate", "length-controlled")]
    for name in [name[:-2] for name in cells if name.endswith(" A")]:
        rows.append([name, *(cells.get(f"{name} {side}", "") for side in ("A", "B", "A - B"))])
    return "\n".join(f"| {' | '.join(row)} |" for row in [["", "A", "B", "A - B"], ["---"] * 4, *rows])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    with config.user_errors():
        scorer = scoring.load(args)
        both = [read(sources, args.split, scorer) for sources in (args.data, args.against)]
        shared = [key for key in both[0] if key in both[1]]
        if not shared:
            raise ValueError(f"{' '.join(args.against)}: no prompt of --data has an answer in it")
        result = compare([[found[key] for key in shared] for found in both], args.seed)
        for side, sources, found in zip("AB", (args.data, args.against), both):
            config.tell(f"{side}: {' '.join(sources)}, {len(shared):,} of its {len(found):,} prompts")
        config.tell(f"\n{table(result)}")
        if args.out:
            config.write_json(Path(args.out), {"prompts": len(shared), **result})


if __name__ == "__main__":
    main()
