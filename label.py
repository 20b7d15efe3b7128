"""Scores for answers, and preferences made of them.

    python label.py --data answers.jsonl --by runs/rm/final --out scored.jsonl
    python label.py --data answers.jsonl --by rules:brevity --pairs best-worst --out pairs.jsonl
    python label.py --data rewardbench.jsonl --by runs/rm/final --score-only

Data are what sample.py writes, or any rows with answers that formats.py reads; scorers are those of
scoring.py, or the verdicts of a judge, whom --ask writes the questions for:

    {"first": "17-0", "second": "17-1", "prompt": ..., "answer_first": "...", "answer_second": "..."}   asked
    {"first": "17-0", "second": "17-1", "winner": "first"}                       back; "second" or "tie" too

What is written, by --layout and --pairs (the prompt a string or turns, as it was; for TRL answers to turns
are turns):

    {"id": "17-0", "prompt": ..., "completion": "...", "score": 0.7}
    {"id": "17-0", "prompt": ..., "completion": "...", "label": true, "score_completion": 0.7}          trl
    {"id": "17-0>17-1", "prompt": ..., "chosen": "...", "rejected": "...", "score_chosen": 0.7,
     "score_rejected": 0.1}

Killed at any moment, the same command goes on, and the file is the one that it would have been. One process
is enough: a classifier on one GPU reads faster than a model writes.

Left out: scores of several scorers in one file.
"""

import argparse
import functools
import json
import os
import random
import sys
from collections import Counter, defaultdict
from itertools import permutations
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

import config
import data
import formats
import parts
import progress
import ranking
import scoring
from formats import Example
from scoring import Prompt, Scorer

WINNERS = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}
NO_VERDICT = "no verdict"
MISREAD = "as a row it would be read as something else"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    made = config.parser(__doc__.splitlines()[0])
    add = made.add_argument
    # fmt: off
    add("--data", required=True, nargs="+", help="answers: files, folders, NAME, NAME=DIR, org/name")
    add("--split", default="train", help="of --data")
    add("--out", default=None, help="the file to write")
    add("--score-only", type=config.boolean, nargs="?", const=True, default=False, metavar="true|false",
        help="no file: a table of what the scores are, and how often they agree with the data's own")
    add("--ask", default=None, metavar="FILE", help="write what a judge must be asked, and nothing else")
    add("--pairs", choices=(*ranking.PAIRS, "random"), default=None, help="write pairs, by the scores")
    add("--least-margin", type=config.not_negative, default=None, help="of scores in a pair; None: any")
    add("--layout", choices=("ours", "trl"), default="ours", help="of answers; trl: with a label")
    add("--seed", type=config.count_or_zero, default=0, help="of --pairs random")
    # fmt: on
    scoring.add_flags(made)
    args = config.parse(made, argv)
    if sum(map(bool, (args.out, args.score_only, args.ask))) != 1:
        config.fail("one of --out, --score-only and --ask must be given")
    if not args.by and not args.ask:
        config.fail("--by must be given", right="a scorer, or verdicts as FILE.jsonl")
    if args.least_margin is not None and not args.pairs:
        config.fail("--least-margin is of pairs", right="give --pairs")
    if args.pairs and args.layout != "ours":
        config.fail("--layout is of answers", right="pairs are as TRL reads them")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        config.fail("one process is enough", right="run it without torchrun")
    return args


# ---- a judge
# ---------------------------------------------------------------------------------------------------------


def ask(args: argparse.Namespace, found: Iterable[Prompt]) -> int:
    """Write any two answers of each prompt, in both orders, for a judge who prefers a place cancels out then;
    how many questions there are. Raises OSError."""
    path, count = Path(args.ask), 0
    if path.exists():
        config.fail(f"--ask {path}", "exists", "choose another")
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        for prompt in found:
            answers = list(zip(prompt.ids, prompt.example.completions))
            shown = prompt.example.prompt if prompt.text is None else prompt.text
            for (first, one), (second, other) in permutations(answers, 2):
                texts = {"prompt": shown, "answer_first": one, "answer_second": other}
                asked = {"first": first, "second": second, **texts}
                file.write(json.dumps(asked, ensure_ascii=False) + "\n")
                count += 1
    os.replace(beside, path)
    return count


def verdicts(args: argparse.Namespace, found: Iterable[Prompt]) -> Scorer:
    """The scorer that gives an answer its mean over a judge's verdicts: 1 where it won, 0.5 for a tie, 0.

    Raises ValueError at file:line for a verdict on answers that are none of the data's, or of two prompts.
    """
    scoring.refuse_flags(args)
    path = args.by
    rows = [(where, *_verdict(where, row)) for where, row in data.rows(path, "train")]
    needed = {id for _, first, second, _ in rows for id in (first, second)}
    owners = {}
    for number, prompt in enumerate(found):
        for id in needed.intersection(prompt.ids):
            if id in owners or prompt.ids.count(id) > 1:
                raise ValueError(f"{path}: two answers of --data have the id {id}")
            owners[id] = number
    won = defaultdict(list)
    for where, first, second, points in rows:
        for id in (first, second):
            if id not in owners:
                raise ValueError(f"{where}: --data has no answer {id}")
        if first == second or owners[first] != owners[second]:
            raise ValueError(f"{where}: {first} and {second} are not two answers of one prompt")
        won[first].append(points[0])
        won[second].append(points[1])
    means = {id: sum(points) / len(points) for id, points in won.items()}
    return lambda examples, ids: [means.get(id, NO_VERDICT) for id in ids]


def _verdict(where: str, row: Any) -> tuple[str, str, tuple[float, float]]:
    row = row if isinstance(row, dict) else {}
    first, second, winner = (row.get(key) for key in ("first", "second", "winner"))
    if not isinstance(first, str) or not isinstance(second, str) or str(winner) not in WINNERS:
        raise ValueError(
            f'{where}: not a verdict ({{"first": id, "second": id, "winner": "first", "second" or "tie"}})'
        )
    return first, second, WINNERS[winner]


# ---- rows
# ---------------------------------------------------------------------------------------------------------


def record(prompt: Prompt, scores: list[float | str]) -> dict[str, Any]:
    """A scored prompt as a row of a part; `recorded` reads it back."""
    example = prompt.example
    about = {"name": prompt.name, "ids": prompt.ids, "text": prompt.text, "rendering": example.rendering}
    return about | {"prompt": example.prompt, "completions": example.completions, "scores": scores}


def recorded(row: dict[str, Any], left_out: Counter) -> Prompt:
    """The prompt with the answers that have a score, which is now theirs; the others are counted."""
    scored = [index for index, score in enumerate(row["scores"]) if not isinstance(score, str)]
    left_out.update(score for score in row["scores"] if isinstance(score, str))
    kept = ([row[key][index] for index in scored] for key in ("ids", "completions", "scores"))
    ids, completions, scores = kept
    example = Example(row["prompt"], completions, scores, rendering=row["rendering"])
    return Prompt(row["name"], ids, example, row["text"])


def rows_of(prompt: Prompt, args: argparse.Namespace) -> Iterator[dict[str, Any] | str]:
    """What is written of a scored prompt: rows, or the reason in the place of one that cannot be."""
    answers, scores = prompt.example.completions, prompt.example.scores
    if args.pairs:
        found = chosen_pairs(prompt, args)
        if not found:
            yield "prompts without a pair"
        for better, worse in found:
            both = {"chosen": answers[better], "rejected": answers[worse]}
            given = {"score_chosen": scores[better], "score_rejected": scores[worse]}
            yield _row(prompt, f"{prompt.ids[better]}>{prompt.ids[worse]}", both, given)
        return
    labels = ranking.desirable(scores)
    for id, answer, score, label in zip(prompt.ids, answers, scores, labels):
        if args.layout == "trl":  # with "score" the row would have two readings
            yield _row(prompt, id, {"completion": answer}, {"label": label, "score_completion": score})
        else:
            yield _row(prompt, id, {"completion": answer}, {"score": score}, as_turns=False)


def chosen_pairs(prompt: Prompt, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(better, worse) of the answers to a prompt, as --pairs, --least-margin and --seed say."""
    scores = prompt.example.scores
    kind = "all" if args.pairs == "random" else args.pairs
    found = ranking.pair_indices(scores, kind) if scores else []
    least = args.least_margin or 0.0
    found = [pair for pair in found if scores[pair[0]] - scores[pair[1]] >= least]
    if args.pairs == "random" and found:
        return [random.Random(f"{args.seed} {prompt.name}").choice(found)]
    return found


def _row(
    prompt: Prompt, id: str, answers: dict[str, Any], given: dict[str, Any], as_turns: bool = True
) -> dict[str, Any] | str:
    """A row that formats.py reads as these very texts. With `as_turns` answers to turns are turns, as TRL
    wants them: all strings or none."""
    example, shown = prompt.example, answers
    strings = prompt.text is not None and all(isinstance(answer, str) for answer in answers.values())
    if as_turns and not strings:
        shown = {
            key: [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            for key, answer in answers.items()
        }
    row = {"id": id, "prompt": prompt.text if strings else example.prompt, **shown, **given}
    rendering = dict(example.rendering)
    row |= {"tools": rendering.pop("tools")} if "tools" in rendering else {}
    row |= {"chat_template_kwargs": rendering} if rendering else {}
    try:
        read = formats.parse(row)
    except ValueError:
        return MISREAD
    wanted = (example.prompt, list(answers.values()), example.rendering)
    same = isinstance(read, Example) and (read.prompt, read.completions, read.rendering) == wanted
    return row if same else MISREAD


# ---- a table
# ---------------------------------------------------------------------------------------------------------


def table(found: Iterable[tuple[Prompt, list[float | str]]], left_out: Counter) -> str:
    """What the scores are, as Markdown: of all prompts, and of each subset. The mean is that of the prompts'
    means, with its standard error over prompts; "worst 5 %" is the mean of the worst 5 % of the answers,
    "best of a prompt" the mean of each prompt's best; of the comparisons within a prompt that the data
    decide, the accuracy is the share decided alike, ties half. Raises ValueError if there is no score."""
    subsets = {}
    for prompt, scores in found:
        own = [index for index, score in enumerate(scores) if not isinstance(score, str)]
        left_out.update(score for score in scores if isinstance(score, str))
        scores, labels = (np.array([values[i] for i in own]) for values in (scores, prompt.example.scores))
        if not own:
            continue
        counts = (0.0, 0)
        if prompt.example.labelled:
            decided = labels[:, None] > labels  # (n, n)
            right = np.heaviside(scores[:, None] - scores, 0.5)  # (n, n)
            counts = (float(right[decided].sum()), int(decided.sum()))
        for name in dict.fromkeys(("all", prompt.subset or "all")):
            subsets.setdefault(name, []).append((scores, *counts))
    if not subsets:
        raise ValueError(f"no answer has a score ({reasons(left_out)})")
    lines = ["| | answers | prompts | mean | standard error | worst 5 % | best of a prompt | accuracy |"]
    lines += ["|---" * 8 + "|"]
    for name in ["all", *sorted(set(subsets) - {"all"})]:
        scores, wins, comparisons = zip(*subsets[name])
        means = np.array([part.mean() for part in scores])  # (prompts,)
        error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
        flat = np.concatenate(scores)
        best = np.mean([part.max() for part in scores])
        values = (means.mean(), error, scoring.lower_tail(flat), best)
        cells = [name, f"{len(flat):,}", f"{len(means):,}", *(f"{value:.4f}" for value in values)]
        cells.append(f"{sum(wins) / sum(comparisons):.4f}" if sum(comparisons) else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reasons(left_out: Counter) -> str:
    """What was left out and why, most first."""
    return "; ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())


# ---- together
# ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    with config.user_errors():
        if args.ask:
            left_out = Counter()
            count = ask(args, scoring.prompts(args.data, args.split, left_out))
            config.tell(f"wrote {args.ask}: {count:,} questions")
            tell(left_out)
            return
        settings = {}
        if args.out:
            sources = " ".join(data.state(source, args.split) for source in args.data)
            settings = vars(args) | parts.states(data=sources, by=scoring.state(args.by))
            if parts.check(args.out, settings):
                config.tell(f"{args.out} is there: nothing to do")
                return
        left_out = Counter()  # rows are read twice: a fault of the last one is known before the first score
        total = sum(1 for _ in scoring.prompts(args.data, args.split, left_out))
        if not total:
            raise ValueError(f"{' '.join(args.data)}: no answer in it ({reasons(left_out)})")
        found = functools.partial(scoring.prompts, args.data, args.split, Counter())
        scorer = verdicts(args, found()) if args.by.endswith(".jsonl") else scoring.load(args)
        seen = progress.bar(found(), "prompts", total)
        if args.score_only:
            config.tell(table(scored(seen, scorer), left_out))
        else:
            write(args, settings, seen, scorer, left_out)
        tell(left_out)


def scored(found: Iterable[Prompt], scorer: Scorer) -> Iterator[tuple[Prompt, list[float | str]]]:
    """The prompts, each with its scores."""
    for chunk in scoring.chunks(found):
        yield from zip(chunk, scoring.score(chunk, scorer))


def write(
    args: argparse.Namespace,
    settings: dict[str, Any],
    found: Iterable[Prompt],
    scorer: Scorer,
    left_out: Counter,
) -> None:
    """Score what has no score yet, then write --out. Parts hold scores; rows are made of them at the end."""
    lock = parts.begin(args.out, settings)  # noqa: F841  held to the end
    count = 0
    for count, chunk in enumerate(scoring.chunks(found), 1):
        if not parts.is_done(args.out, count - 1):
            with parts.undone(args.out):
                scores = scoring.score(chunk, scorer)
            parts.write(args.out, count - 1, map(record, chunk, scores))
    written = Counter()

    def lines() -> Iterator[str]:
        for row in parts.read(args.out, count):
            for made in rows_of(recorded(row, left_out), args):
                if isinstance(made, str):
                    left_out[made] += 1
                else:
                    written["rows"] += 1
                    yield json.dumps(made, ensure_ascii=False) + "\n"
        if not written["rows"]:
            raise ValueError(f"--out {args.out}: nothing to write ({reasons(left_out)})")

    parts.finish(args.out, count, lines())
    config.tell(f"wrote {args.out}: {written['rows']:,} {'pairs' if args.pairs else 'answers'}")


def tell(left_out: Counter) -> None:
    """Say what was left out."""
    if left_out:
        config.tell(f"left out: {reasons(left_out)}")


if __name__ == "__main__":
    main()
