"""The loop on one's own model's answers: what is rewarded, and what three rounds of it did.

    bash run.sh loop                                      runs everything
    label.py ... --by loop:score                          the reward, with PYTHONPATH=examples
    python examples/loop.py runs/loop/sft runs/loop/round-1 ... --out runs/loop

The reward is made to be seen through: an answer should be finished, near 12 words long, and not repeat
itself. The report reads `heldout.jsonl` of each directory (scored answers to the same prompts) and
`drift/metrics.jsonl` (the same answers under the model and under the first one), and writes to --out
report.md, loop.png and samples.html, the answers of every round side by side.
"""

import argparse
import html
import json
import random
import string
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, Callable, Sequence

WORDS = 12  # of an ideal answer
TAIL = 0.05  # the share of the worst answers whose mean is the lower tail
SHOWN = 12  # prompts on the page


def score(prompt: list[dict[str, Any]], completion: str) -> float:
    """1 if it ends with a full stop, question or exclamation mark, less what it is away from 12 words (24
    words cost 1, at most 3), less the share of its words that stood in it before."""
    words = completion.lower().split()
    finished = completion.rstrip().endswith((".", "?", "!"))
    away = min(3.0, abs(len(words) - WORDS) / WORDS)
    repeated = 1 - len(set(words)) / len(words) if words else 1.0
    return finished - away - repeated


def lower_tail(scores: Sequence[float]) -> float:
    """The mean of the worst 5 %."""
    worst = sorted(scores)[: max(1, round(TAIL * len(scores)))]
    return fmean(worst)


def interval(by_prompt: Sequence[list[float]], statistic: Callable, draws: int = 1000) -> tuple[float, float]:
    """95 % by bootstrap over prompts."""
    draw = random.Random(0)
    found = sorted(
        statistic([score for scores in draw.choices(by_prompt, k=len(by_prompt)) for score in scores])
        for _ in range(draws)
    )
    return found[round(0.025 * draws)], found[round(0.975 * draws) - 1]


def read(folder: Path) -> dict[str, Any]:
    """What there is of a round."""
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["id"].partition("-")[0], []).append(row)
    scores = [[row["score"] for row in found] for found in by_prompt.values()]
    flat = [score for found in scores for score in found]
    drift = 0.0
    if (folder / "drift" / "metrics.jsonl").exists():
        line = (folder / "drift" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        drift = json.loads(line)["rewards/mean"]
    return {
        "name": folder.name,
        "answers": len(flat),
        "mean": (fmean(flat), *interval(scores, fmean)),
        "tail": (lower_tail(flat), *interval(scores, lower_tail)),
        "words": fmean(len(row["completion"].split()) for row in rows),
        "drift": drift,
        "rows": by_prompt,
    }


def table(rounds: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| round | answers | mean score (95 %) | mean of the worst 5 % (95 %) | words | drift from SFT, nats |",
        "|---|---|---|---|---|---|",
    ]
    for found in rounds:
        mean, tail = ("{:.3f} ({:.3f} to {:.3f})".format(*found[key]) for key in ("mean", "tail"))
        lines.append(
            f"| {found['name']} | {found['answers']} | {mean} | {tail} | {found['words']:.1f} "
            f"| {found['drift']:.1f} |"
        )
    return "\n".join(lines)


def figure(rounds: Sequence[dict[str, Any]], path: Path) -> None:
    """Score against drift: the mean and the lower tail of each round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(figsize=(6.4, 4))
    drift = [found["drift"] for found in rounds]
    for key, colour, name in (("mean", "#0072b2", "mean"), ("tail", "#d55e00", "worst 5 %")):
        middle, low, high = zip(*[found[key] for found in rounds])
        axes.plot(drift, middle, "o-", color=colour)
        axes.fill_between(drift, low, high, color=colour, alpha=0.15)
        axes.annotate(
            name, (drift[-1], middle[-1]), (6, 0), textcoords="offset points", color=colour, va="center"
        )
    for found in rounds:
        axes.annotate(
            found["name"], (found["drift"], found["mean"][0]), (0, 9), textcoords="offset points", ha="center"
        )
    axes.set_xlabel("drift: log policy - log SFT of its own answers, nats an answer")
    axes.set_ylabel("score of held-out prompts' answers")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15, y=0.12)
    made.tight_layout()
    made.savefig(path, dpi=150)


PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>The same prompts, round by round</title>
<style>
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #22252a; --dim: #667079; --line: #dfe1dd;
  --good: #0a7350; --bad: #a4402f; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #dfe3e6; --dim: #8d979f;
  --line: #30363b; --good: #5fd1a3; --bad: #e08a7a; } }
body { max-width: 76rem; margin: auto; padding: 2.5rem 1.5rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 1rem; font-size: 1.6rem; letter-spacing: -.01em; }
h2 { margin: 2.25rem 0 .6rem; font-size: 1rem; font-weight: 600; white-space: pre-wrap; }
p.note { color: var(--dim); }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1.25rem; }
article { border-top: 2px solid var(--line); padding-top: .4rem; white-space: pre-wrap; }
article h3 { display: flex; justify-content: space-between; margin: 0 0 .3rem; font-size: .85rem;
  font-weight: 400; color: var(--dim); }
.good { color: var(--good); }
.bad { color: var(--bad); }
</style>
<h1>The same prompts, round by round</h1>
<p class="note">$note</p>
$body
</html>
""")


def page(rounds: Sequence[dict[str, Any]]) -> str:
    """The first answer of every round to the same prompts, side by side; green where its score is above that
    of the first round's."""
    parts = []
    for key in list(rounds[0]["rows"])[:SHOWN]:
        first = rounds[0]["rows"][key][0]
        asked = first["prompt"] if isinstance(first["prompt"], str) else first["prompt"][-1]["content"]
        parts.append(f"<h2>{html.escape(asked)}</h2>\n<section>")
        for found in rounds:
            row = found["rows"][key][0]
            kind = "good" if row["score"] > first["score"] else "bad" if row["score"] < first["score"] else ""
            head = f'<span>{html.escape(found["name"])}</span><span class="{kind}">{row["score"]:+.2f}</span>'
            parts.append(f"<article><h3>{head}</h3>{html.escape(row['completion'].strip())}</article>")
        parts.append("</section>")
    note = f"Held-out prompts, the first of the answers to each; the score is {score.__doc__.split(';')[0]}"
    return PAGE.substitute(note=html.escape(" ".join(note.split())), body="\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("rounds", nargs="+", type=Path, help="directories in their order, the first one SFT")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    missing = [folder for folder in args.rounds if not (folder / "heldout.jsonl").is_file()]
    if missing:
        print(f"error: {missing[0]}/heldout.jsonl: no such file (bash run.sh loop makes it)", file=sys.stderr)
        sys.exit(2)
    rounds = [read(folder) for folder in args.rounds]
    said = table(rounds)
    print(said)
    (args.out / "report.md").write_text(said + "\n", encoding="utf-8")
    figure(rounds, args.out / "loop.png")
    (args.out / "samples.html").write_text(page(rounds), encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
