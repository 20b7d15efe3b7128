"""The data as it will be trained, in the terminal and as a page, before anything is trained.

    python preview.py --model M --data D [--loss L] [--html out.html] [... any flag of align.py or sft.py]
    python preview.py configs/hh_smollm2.toml

The flags are read, and the rows loaded, by the very functions of the script that will train: sft.py where it
knows every flag that is given, else align.py (a --loss decides, for sft.py has none). Shown are what became
of the rows of each source, totals, lengths, and three examples token by token. Only the tokenizer is loaded.
Nothing is written but --html, and the cache of encoded rows that training will read.

An answer counts as cut if it fills --max-length and no special token ends it. Of a prompt that lost whole
turns nothing tells; those that fill --max-prompt-length are counted.

Left out: held-out rows.
"""

import argparse
import contextlib
import functools
import html
import io
import itertools
import math
import os
import re
import string
import sys
import unicodedata
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np

import align
import batch
import chat
import config
import encode
import fit
import loading
import ranking
import sft
from arrays import Store
from objective import check_partners, make_objective

WIDTH = 100  # columns
INDENT = "    "  # before the lines of a text
BINS = 16  # at most, of a histogram
BAR = 50  # columns of the longest bar
# Control characters, what changes the direction of the text after it, and halves of characters.
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COLOURS = {"prompt": ("\x1b[2m", "\x1b[0m"), "trained": ("\x1b[32m", "\x1b[0m"), "untrained": ("", "")}
BRACKETS = {"prompt": ("", ""), "trained": ("[[", "]]"), "untrained": ("", "")}


class Data(NamedTuple):
    """What would be trained, and what of its objective is shown."""

    train: Store
    tokenizer: Any
    template: chat.Template
    pairs: str | None  # which completions are compared; None: each counts alone
    labelled: bool  # do labels matter
    unit: str  # what --batch-size counts
    units: list[int]  # of each example


class Histogram(NamedTuple):
    what: str  # is counted
    note: str
    width: int  # bin k counts the lengths from k * width to (k + 1) * width - 1
    counts: list[int]


class Piece(NamedTuple):
    """A token; or a few, if the text of one ends within a character."""

    text: str
    ids: list[int]
    kind: str  # prompt, trained or untrained
    special: bool


Texts = list[tuple[str, list[Piece]]]  # (title, tokens) of a prompt and of each answer to it


# ---- what would be trained
# -------------------------------------------------------------------------------------------------


def read_flags(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The script that trains under these flags, and its reading of them: sft.py if it knows them all, else
    align.py. --out is not needed."""
    argv = [*argv, "--out", "unused"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return "sft.py", sft.parse_args(argv)
    except SystemExit:
        if not re.search("unrecognized arguments|unknown key", said.getvalue()):
            print(said.getvalue(), end="", file=sys.stderr)
            raise
    return "align.py", align.parse_args(argv)


def load(args: argparse.Namespace, tokenizer: Any, template: chat.Template, say: Callable) -> Data:
    """The examples of the first epoch as main of the script has them. Raises ValueError or OSError."""
    if not hasattr(args, "loss"):
        conditioned = args.method == "csft"
        if conditioned:
            tokenizer.add_tokens(list(chat.CONTROL_TOKENS), special_tokens=True)
        train = sft.load_examples(args.data, "train", tokenizer, template, args, say)
        return Data(train, tokenizer, template, None, conditioned, "examples", [1] * len(train))
    objective = make_objective(args)
    train = align.load_examples(args.data, "train", tokenizer, template, objective, args, say)
    check_partners(objective, " ".join(args.data), train.arrays.prompts)
    units = objective.counts(train).tolist()
    return Data(train, tokenizer, template, objective.pairs, True, objective.batch_unit, units)


# ---- what is shown of it
# ---------------------------------------------------------------------------------------------------


def measure(data: Data, args: argparse.Namespace) -> tuple[list[tuple[str, str, str]], list[Histogram]]:
    """(name, value, note) of all examples together, and the lengths of their prompts and answers."""
    prompts, answers, rows, keys, labelled = ([] for _ in range(5))
    trained = cut = 0
    for example in data.train:
        prompt, sizes = len(example.prompt), [len(ids) for ids in example.completions]
        groups = ranking.pair_indices(example.scores, data.pairs) if data.pairs else [range(len(sizes))]
        rows.append([prompt + sizes[index] for group in groups for index in group])
        prompts.append(prompt)
        answers += sizes
        trained += example.trained_tokens
        for ids in example.completions:
            cut += prompt + len(ids) >= args.max_length and ids[-1] not in data.template.special_ids
        hashes = [hash(tuple(ids)) for ids in example.completions]
        keys.append((example.prompt_key, *sorted(hashes)))
        labelled.append((example.prompt_key, *sorted(zip(hashes, example.scores))))
    lengths, budget = data.train.lengths, args.tokens_per_microbatch or fit.TOKENS
    steps = batch.plan(lengths, args.batch_size, 1, budget, args.seed, 0, data.units)
    padded = 0
    for step in steps:
        together = [size for work in step[0] for group in work.groups for size in rows[group]]
        padded += len(together) * max(together)
    tokens, apart = sum(prompts) + sum(answers), sum(map(sum, rows))
    repeated, exactly = (len(keys) - len(set(found)) for found in (keys, labelled))
    otherwise = f"; {repeated - exactly:,} of them scored otherwise" * (repeated > exactly)
    asked = [key[0] for key, size in zip(keys, prompts) if size > 1]  # plain text has none, or a BOS
    again = len(asked) - len(set(asked))
    parts = {"prompts": sum(prompts), "trained": trained, "neither": sum(answers) - trained}
    shares = [(f"  {name}", f"{100 * part / tokens:.1f} %", "") for name, part in parts.items()]
    batches = f"of an epoch: {sum(data.units):,} {data.unit} at --batch-size {args.batch_size}"
    totals = [
        ("examples", f"{len(keys):,}", "a prompt and its answers"),
        ("answers", f"{len(answers):,}", ""),
        ("duplicates", f"{repeated:,}", f"have prompt and answers of an earlier example{otherwise}"),
        ("same prompt", f"{again:,}", "have the prompt of an earlier example, duplicates included"),
        ("tokens", f"{tokens:,}", "as packed: every prompt once, nothing padded"),
        *shares,
        ("apart", f"{apart:,}", f"every answer after a prompt of its own: {apart / tokens:.2f} x"),
        ("padded", f"{padded:,}", f"and as long as the longest of its step: {padded / tokens:.2f} x"),
        ("steps", f"{len(steps) * getattr(args, 'ppo_epochs', 1):,}", batches),
    ]
    limit, notes = args.max_prompt_length, ["", ""]
    if limit:  # else conversations are read whole, which cuts no answer
        notes[0] = f"; {prompts.count(limit):,} fill --max-prompt-length {limit}"
        notes[1] = f"; {cut:,} cut at --max-length {args.max_length}"
    return totals, [_histogram("prompts", prompts, notes[0]), _histogram("answers", answers, notes[1])]


def _histogram(what: str, lengths: list[int], note: str) -> Histogram:
    width = _round(max(lengths) + 1, BINS)
    note = f"median {sorted(lengths)[len(lengths) // 2]:,}, longest {max(lengths):,}{note}"
    return Histogram(what, note, width, np.bincount(np.array(lengths) // width).tolist())


def _round(whole: int, parts: int) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that so many times is the whole or more."""
    return next(n for p in range(19) for n in (10**p, 2 * 10**p, 5 * 10**p) if n * parts >= whole)


def examples(data: Data) -> Iterator[tuple[str, Texts]]:
    """The first example, one of median length and the longest, with a title."""
    order = np.argsort(data.train.lengths, kind="stable").tolist()
    names = {}
    for index, name in ((0, "the first"), (order[len(order) // 2], "median length"), (order[-1], "longest")):
        names.setdefault(index, []).append(name)
    for index, found in names.items():
        example = data.train[index]
        title = f"example {index + 1:,} of {len(data.train):,}, {' and '.join(found)}: "
        title += f"{example.tokens:,} tokens" + f", weight {example.weight:g}" * (example.weight != 1)
        yield title + f", margin {example.margin:g}" * (example.margin != 0), _texts(data, example)


def _texts(data: Data, example: encode.Encoded) -> Texts:
    kinds = ["prompt"] * len(example.prompt)
    texts = [(f"prompt: {len(kinds):,} tokens", _pieces(data, [], example.prompt, kinds))] * bool(kinds)
    roles = [["desirable"] if label else ["undesirable"] for label in example.labels]
    if data.pairs:
        chosen, rejected = zip(*ranking.pair_indices(example.scores, data.pairs))
        roles = [["chosen"] * (k in chosen) + ["rejected"] * (k in rejected) for k in range(len(roles))]
    for number, (ids, trained) in enumerate(zip(example.completions, example.trained)):
        said = f"{' and '.join(roles[number])}, score {example.scores[number]:g}, " * data.labelled
        said += f"{len(ids):,} tokens, {sum(trained):,} trained"
        kinds = ["trained" if wanted else "untrained" for wanted in trained]
        name = "answer" + f" {number + 1}" * (len(roles) > 1)
        texts.append((f"{name}: {said}", _pieces(data, example.prompt[-4:], ids, kinds)))
    return texts


def _pieces(data: Data, before: list[int], ids: list[int], kinds: list[str]) -> list[Piece]:
    """The text of each token as it stands after those before it; of several together where one alone ends
    within a character."""
    decode = functools.partial(data.tokenizer.decode, clean_up_tokenization_spaces=False)
    found, waiting = [], []
    for id, kind, following in zip(ids, kinds, [*kinds[1:], ""]):
        waiting.append(id)
        text = decode(before + waiting)[len(decode(before)) :]
        within = text.endswith("\ufffd")  # stands for a part of a character, which has 4 bytes at most
        if within and len(waiting) < 4 and kind == following:
            continue
        found.append(Piece(text, waiting, kind, waiting[0] in data.template.special_ids))
        before, waiting = [] if within else waiting, []
    return found


# ---- in the terminal
# -------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    r"""The text with \x1b, \u202e for characters that nobody sees; line breaks and tabs stay."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def wrapped(text: str) -> str:
    """Lines of at most WIDTH columns, broken after blanks (or any letter of Chinese), indented but for the
    first; nothing is lost. Colours take no column."""
    lines, column = "", 0
    for word in re.findall(r"\x1b\[\d*m|\n|[^\S\n]+|[^\s\x1b\u2e80-\U0010ffff]{1,90}|[^\s\x1b]", text):
        wide = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in word) * (word[0] != "\x1b")
        if word == "\n" or column + wide > WIDTH and not word.isspace():
            lines, column = f"{lines}\n{INDENT}", len(INDENT)
        if word != "\n":
            lines, column = lines + word, column + wide
    return lines


def marked(pieces: list[Piece], marks: dict[str, tuple[str, str]]) -> str:
    """Tokens as wrapped lines, each run of one kind between its marks. Without the line breaks and the
    indents after them it is the text, ↵ for its own line breaks."""
    text = "\n"
    for kind, run in itertools.groupby(pieces, lambda piece: piece.kind):
        said = visible("".join(piece.text for piece in run)).replace("\n", "↵\n")
        text += marks[kind][0] + said + marks[kind][1]
    return wrapped(text)


def bars(histogram: Histogram) -> Iterator[str]:
    """A line a bin."""
    yield f"\n{histogram.what} by tokens: {histogram.note}"
    edge = len(f"{len(histogram.counts) * histogram.width:,}") + 2
    for index, count in enumerate(histogram.counts):
        first, last = index * histogram.width, (index + 1) * histogram.width - 1
        bar = "█" * round(count * BAR / max(histogram.counts)) or "▏" * (count > 0)
        yield f"{first:>{edge},} - {last:<{edge},}{bar} {count:,}"


# ---- as a page
# ------------------------------------------------------------------------------------------------------------

PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #22252a; --dim: #667079; --line: #dfe1dd;
  --mark: #0a7350; --tint: #e4f4ec; --bar: #7aa897; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #dfe3e6; --dim: #8d979f;
  --line: #30363b; --mark: #5fd1a3; --tint: #173328; --bar: #4c8671; } }
body { max-width: 56rem; margin: auto; padding: 2.5rem 1.5rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0 0 1rem; font-size: 1.6rem; letter-spacing: -.01em; }
h2 { margin: 2.75rem 0 .6rem; font-size: 1.1rem; }
h3 { margin: 2.25rem 0 .5rem; font-size: 1rem; }
h4 { margin: 1.25rem 0 .25rem; font-size: .85rem; font-weight: 400; color: var(--dim); }
p { margin: .15rem 0; }
p.note, th.part { padding-left: 1.25rem; }
.note, .part, figcaption { color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid var(--line); }
th, td { padding: .3rem 1.5rem .3rem 0; font-weight: 400; text-align: left; vertical-align: baseline; }
th + td { text-align: right; }
th, th + td { white-space: nowrap; }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 2rem; }
figure { margin: 0; }
svg { width: 100%; font-size: 11px; fill: var(--dim); text-anchor: middle; }
svg .value { text-anchor: end; }
svg .name { text-anchor: start; }
path { stroke: var(--line); }
rect { fill: var(--bar); }
div { padding: .1rem 0 .1rem 1rem; border-left: 2px solid var(--line); white-space: pre-wrap;
  font: .84rem/1.75 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.prompt, .untrained { color: var(--dim); }
.trained, .untrained { text-decoration: underline dotted; text-underline-offset: .28em; }
.trained { color: var(--ink); background: var(--tint); text-decoration: underline var(--mark); }
.special { font-weight: 650; }
span span:hover, rect:hover { outline: 1.5px solid var(--mark); }
i { opacity: .5; font-style: normal; }
@media (max-width: 36rem) {
  body { padding: 1.5rem 1rem; }
  svg { font-size: 13px; }
  tr { display: grid; grid-template-columns: 1fr auto; padding: .3rem 0; border-top: 1px solid var(--line); }
  tr > *, tr + tr > * { padding: 0; border: 0; }
  tr > .note { grid-column: 1 / 3; }
}
</style>
<h1>$title</h1>
$said
<h2>Totals</h2>
<table>$totals</table>
<h2>Lengths</h2>
<section>$figures</section>
<h2>Examples</h2>
<p>Tokens: <span class="trained">trained</span>, <span class="untrained">not trained</span>,
<span class="prompt">of the prompt</span>. Point at one for its id; ↵ is a line break.</p>
$examples
</html>
""")


def page(title: str, said: list[str], totals: list, figures: list[Histogram], shown: list) -> str:
    """HTML that needs nothing else; whatever rows and flags hold is text there."""
    parts = {"title": [_text(title)], "figures": map(_figure, figures), "totals": [], "examples": []}
    parts["said"] = [f'<p class="{"note" * (line[0] == " ")}">{_text(line)}</p>' for line in said]
    for name, value, note in totals:
        heading = f"<th{' class=part' * (name[0] == ' ')}>{_text(name)}</th>"
        parts["totals"] += [f"<tr>{heading}<td>{value}</td><td class=note>{_text(note)}</td></tr>"]
    for heading, texts in shown:
        parts["examples"] += [f"<h3>{_text(heading)}</h3>"]
        parts["examples"] += [f"<h4>{_text(name)}</h4><div>{_spans(found)}</div>" for name, found in texts]
    return PAGE.substitute({name: "\n".join(found) for name, found in parts.items()})


def _text(text: str) -> str:
    return html.escape(visible(text))


def _spans(pieces: list[Piece]) -> str:
    """A span for every run of one kind, in it one for every token."""
    text = ""
    for kind, run in itertools.groupby(pieces, lambda piece: piece.kind):
        text += f'<span class="{kind}">'
        for piece in run:
            shown = _text(piece.text).replace("\n", "<i>↵</i>\n")
            special = ' class="special"' * piece.special
            text += f'<span{special} title="{" ".join(map(str, piece.ids))}">{shown}</span>'
        text += "</span>"
    return text


def _figure(histogram: Histogram) -> str:
    """Bars over lengths, both axes with a few round numbers."""
    top, right, high = 24, 490, 170  # of the plot, in units of the view box
    bins, bottom, step = len(histogram.counts), top + high, _round(max(histogram.counts), 4)
    most = math.ceil(max(histogram.counts) / step) * step
    left = 12 + 8 * len(f"{most:,}")
    wide = right - left
    across = wide / bins  # a bar
    drawn = [f'<text class="name" y="10">{histogram.what}</text>']
    drawn += [f'<text x="{left + wide / 2}" y="{bottom + 34}">tokens</text>']
    for value in range(0, most + 1, step):
        y = bottom - high * value / most
        drawn += [f'<path d="M{left} {y:.1f}h{wide}"/>']
        drawn += [f'<text class="value" x="{left - 6}" y="{y + 4:.1f}">{value:,}</text>']
    for index, count in enumerate([*histogram.counts, 0]):
        first, x, tall = index * histogram.width, left + index * across, high * count / most
        if index % math.ceil(bins / 6) == 0:
            drawn += [f'<text x="{x:.1f}" y="{bottom + 16}">{first:,}</text>']
        said = f"{first:,} to {first + histogram.width - 1:,} tokens: {count:,}"
        box = f'x="{x + 1:.1f}" y="{bottom - tall:.1f}" width="{across - 2:.1f}" height="{tall:.1f}"'
        drawn += [f"<rect {box}><title>{said}</title></rect>"] * (count > 0)
    box = f'viewBox="0 0 {right + 16} {bottom + 40}" role="img" aria-label="{histogram.what} by tokens"'
    return f"<figure><svg {box}>{''.join(drawn)}</svg><figcaption>{histogram.note}</figcaption></figure>"


# ---- together
# ------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    own = config.parser(__doc__.splitlines()[0])
    own.epilog = "Any other flag, and a config file, is one of align.py or sft.py; --out is not needed."
    own.add_argument("--html", default=None, help="the page to write; None: only the terminal")
    mine, rest = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    script, args = read_flags(rest)
    if mine.html and not Path(mine.html).parent.is_dir():
        config.fail(f"--html {mine.html}", "there is no such folder")
    sys.stdout.reconfigure(errors="backslashreplace")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    title = f"What {script} trains on with "
    title += f"--loss {args.loss}" if hasattr(args, "loss") else f"--method {args.method}"
    config.tell(title + " (a --loss previews align.py)" * (script == "sft.py"))
    said = []

    def say(text: str) -> None:
        if not text.startswith("  ..."):  # a part of the first example, which is shown whole
            said.append(text)
            config.tell(wrapped(visible(text)))

    with config.user_errors():
        say(f"model: {args.model}")
        tokenizer = loading.load_tokenizer(args.model, args.trust_remote_code)
        template = chat.chat_template(tokenizer, args.chat_template)
        say(f"chat template: {template.name}")
        data = load(args, tokenizer, template, say)
        totals, histograms = measure(data, args)
        shown = list(examples(data))
        if mine.html:
            Path(mine.html).write_text(page(title, said, totals, histograms, shown), encoding="utf-8")
    config.tell("")
    for name, value, note in totals:
        config.tell(f"{name:<13}  {value:>11}  {note}".rstrip())
    for histogram in histograms:
        config.tell("\n".join(bars(histogram)))
    how = "green, prompts dim" if colour else "in [[ ]]"
    config.tell(f"\nTrained tokens are {how}; ↵ is a line break of the text.")
    for name, texts in shown:
        config.tell(f"\n{name}")
        for title, pieces in texts:
            config.tell(f"  {title}{marked(pieces, COLOURS if colour else BRACKETS)}")
    if mine.html:
        config.tell(f"\nwrote {visible(mine.html)}")


if __name__ == "__main__":
    main()
