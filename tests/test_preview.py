"""The preview: its numbers against counts made here, its marks against encode, its page as a parser reads
it. `red:` names a change that turns a test red."""

import functools
import html.parser
import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import align
import chat
import data
import encode
import preview
import ranking
import store

TINY = str(ROOT / "examples" / "tiny")
NASTY = "a <script>alert('x')</script> & \"b\" \x1b[31m \u202e c\r🙂\ttab"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows, gives the flags for them; the working directory is empty but for these."""
    monkeypatch.chdir(tmp_path)

    def written(*rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return ["--model", TINY, "--data", name]

    return written


@pytest.fixture
def seen(capsys):
    """Runs the script, gives what it prints."""

    def run(*argv):
        preview.main([str(part) for part in argv])
        found = capsys.readouterr()
        assert found.err == ""
        return found.out

    return run


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def totals(out):
    """The numbers by name, and what is said of them."""
    found = re.findall(r"^ *(\w+(?: prompt)?) {2,}([\d.,]+)( %)?(?:  (.*))?$", out, re.M)
    return {name: (float(value.replace(",", "")), note) for name, value, _, note in found}


def bins(out, what):
    """{(first, last): count} of a histogram in text."""
    part = re.search(rf"^{what} by tokens.*\n((?:.* - .*\n)+)", out, re.M)[1]
    found = re.findall(r"^ *([\d,]+) - ([\d,]+) +\S* ?([\d,]+)$", part, re.M)
    assert len(found) == part.count("\n")
    return {(int(a.replace(",", "")), int(b.replace(",", ""))): int(n.replace(",", "")) for a, b, n in found}


def texts(out):
    """The tokens of what is shown, by title, the lines joined again."""
    found = re.findall(r"^  (\S.* tokens.*)\n((?:    .*\n)+)", out[out.index("\nexample ") :], re.M)
    return [(title, body[4:-1].replace("\n    ", "").replace("↵", "\n")) for title, body in found]


def bracketed(tokenizer, ids, trained):
    """Decoded, what is trained in [[ ]]."""
    text, run = "", []
    for k, (id, wanted) in enumerate(zip(ids, trained)):
        run.append(id)
        if k + 1 == len(ids) or trained[k + 1] != wanted:
            text += f"[[{tokenizer.decode(run)}]]" if wanted else tokenizer.decode(run)
            run = []
    return text


# ---- numbers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 100])
def test_totals_are_those_of_rows_rendered_and_counted_here(seen, write, tokenizer, batch_size):
    # red: rows of padded without the prompt; tokens with a prompt an answer; sizes of completions swapped
    rows = [pair(f"question {k} " + "word " * k, "yes " * (k % 7 + 1), f"no {k}") for k in range(30)]
    out = seen(*write(*rows), "--loss", "dpo", "--batch-size", batch_size)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = [
        len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]) for turns in asked
    ]
    answers = [
        [len(tokenizer(row[key] + "<|im_end|>")["input_ids"]) for key in row if key != "prompt"]
        for row in rows
    ]
    every = sum(answers, [])
    found = totals(out)
    tokens = sum(prompts) + sum(every)
    assert (found["examples"][0], found["answers"][0], found["tokens"][0]) == (30, 60, tokens)
    assert found["prompts"][0] == round(100 * sum(prompts) / tokens, 1)
    assert found["trained"][0] == round(100 * sum(every) / tokens, 1) and found["neither"][0] == 0
    both = [(prompt + one, prompt + two) for prompt, (one, two) in zip(prompts, answers)]
    assert found["apart"] == (
        sum(map(sum, both)),
        f"every answer after a prompt of its own: {sum(map(sum, both)) / tokens:.2f} x",
    )
    padded = sum(2 * max(sizes) for sizes in both) if batch_size == 1 else 60 * max(map(max, both))
    assert found["padded"][0] == padded
    assert found["steps"] == (
        30 if batch_size == 1 else 1,
        f"of an epoch: 30 pairs at --batch-size {batch_size}",
    )
    for what, lengths in (("prompts", prompts), ("answers", every)):
        assert (
            f"{what} by tokens: median {sorted(lengths)[len(lengths) // 2]}, longest {max(lengths)};" in out
        )
        found = bins(out, what)
        assert found == {edge: sum(edge[0] <= n <= edge[1] for n in lengths) for edge in found}
        assert sum(found.values()) == len(lengths) and 3 < len(found) <= preview.BINS


def test_what_was_cut_is_counted(seen, write, tokenizer):
    # red: `>= args.max_length` alone, or >; prompts.count of another limit
    long = "word " * 80
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=True)
    just = 60 - len(prompt["input_ids"]) - 1  # and its end of turn: full, not cut
    fitting = tokenizer.decode(tokenizer(long)["input_ids"][:just])
    rows = [
        pair("q", long, "no"),
        pair(long, "yes", "no"),
        pair("q", fitting, long + "x"),
        pair("r", "a", "b"),
    ]
    out = seen(*write(*rows), "--beta", "0.1", "--max-length", 60, "--max-prompt-length", 20)
    assert "; 1 fill --max-prompt-length 20\n" in out and "; 2 cut at --max-length 60\n" in out
    # a reward model reads conversations whole
    out = seen(*write(pair("q", "yes", "no"), *rows[3:]), "--loss", "bradley_terry", "--max-length", 60)
    assert "longest" in out and "cut" not in out and "fill" not in out


def test_a_histogram_has_round_bins_and_few_of_them():
    # red: `max(lengths)` without the 1
    for longest, width in ((0, 1), (15, 1), (16, 2), (31, 2), (32, 5), (4096, 500)):
        found = preview._histogram("answers", [longest, 0, 0], "")
        assert found.width == width and len(found.counts) == longest // width + 1 <= preview.BINS
        assert found.counts[0] == 2 + (longest < width) and sum(found.counts) == 3


def test_duplicates_and_prompts_met_again(seen, write):
    # red: answers not sorted; the scores not in the key; `seen before` counted with the first
    rows = [
        pair("p", "a", "b"),
        pair("p", "b", "a"),
        pair("p", "a", "b"),
        pair("p", "a", "c"),
        pair("q", "a", "b"),
    ]
    found = totals(seen(*write(*rows), "--loss", "dpo"))
    assert found["duplicates"] == (
        2,
        "have prompt and answers of an earlier example; 1 of them scored otherwise",
    )
    assert found["same prompt"][0] == 3
    found = totals(seen(*write({"text": "one"}, {"text": "two"}, {"text": "two"})))
    assert (found["duplicates"][0], found["same prompt"][0]) == (1, 0)


def test_what_became_of_the_rows(seen, write):
    # red: said of another source; the beginning of the first example said twice
    rows = [pair(f"q{k}", "a", "b", colour="red") for k in range(60)] + [
        pair("", "a", ""),
        pair("x", "z", "z"),
    ]
    out = seen(*write(*rows), "--loss", "dpo")
    assert "rows.jsonl: 62 rows read, 60 examples, tokens" in out
    assert "  1 cannot be used: an answer is empty (first: rows.jsonl:61)\n" in out
    assert "(first: rows.jsonl:62)\n" in out and "  keys not read: colour\n" in out
    assert "  ..." not in out
    system = {"messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]}
    template = "{% for m in messages %}{{ m.role if m.role != 'system' else raise_exception('no') }}"
    template += ": {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with open("t.jinja", "w") as file:
        file.write(template)
    out = seen(*write(system), "--chat-template", "t.jinja")
    assert (
        "chat template: t.jinja\n" in out and "  1 changed: its system turn opens the first user turn" in out
    )


# ---- which script
# ------------------------------------------------------------------------------------------------------------


def test_the_script_is_the_one_that_knows_the_flags(seen, write):
    # red: align.py tried first; control tokens not added; thin left out; units of pairs
    flags = write(*[pair(f"q{k}", "good", "bad") for k in range(8)])
    out = seen(*flags)
    assert out.startswith("What sft.py trains on with --method sft (a --loss previews align.py)\n")
    assert [title for title, _ in texts(out)][1] == "answer: 2 tokens, 2 trained"
    out = seen(*flags, "--method", "csft")
    assert texts(out)[1][1] == "[[<|good|>good<|im_end|>]]" and texts(out)[2][1] == "[[<|bad|>bad<|im_end|>]]"
    out = seen(*flags, "--beta", "0.3")
    assert out.startswith("What align.py trains on with --loss dpo\n")
    assert [title.split(", ")[:2] for title, _ in texts(out)][1:3] == [
        ["answer 1: chosen", "score 1"],
        ["answer 2: rejected", "score 0"],
    ]
    out = seen(*flags, "--loss", "kto", "--batch-size", 4)
    assert totals(out)["steps"] == (4, "of an epoch: 16 responses at --batch-size 4")
    assert texts(out)[1][0].startswith("answer 1: desirable, score 1, ")
    out = seen(*flags, "--loss", "kto", "--keep-undesirable", "0.25")
    assert totals(out)["answers"][0] == 10
    out = seen(*flags, "--loss", "ppo", "--ppo-epochs", 3, "--batch-size", 4)
    assert totals(out)["steps"][0] == 12


def test_ranked_lists(seen, write):
    # red: pairs not given to measure or _texts
    row = {"prompt": "q", "completions": ["one", "two and more", "three"], "scores": [0.5, 2, -1]}
    out = seen(*write(row), "--loss", "dpo", "--pairs", "adjacent")
    assert [title.split(", ")[:2] for title, _ in texts(out)][1:] == [
        ["answer 1: chosen and rejected", "score 0.5"],
        ["answer 2: chosen", "score 2"],
        ["answer 3: rejected", "score -1"],
    ]
    sizes = [int(re.search(r"(\d+) tokens", title)[1]) for title, _ in texts(out)]
    assert totals(out)["apart"][0] == 4 * sizes[0] + 2 * sizes[1] + sizes[2] + sizes[3]
    assert totals(out)["tokens"][0] == sum(sizes)


def test_a_config_file_and_nothing_written_but_the_page(seen, write, tmp_path):
    # red: --out among the tokens before the file; the run directory made
    write(pair("q", "a", "b", weight=0.5, margin=2))
    (tmp_path / "c.toml").write_text(
        f'model = "{TINY}"\ndata = "rows.jsonl"\nloss = "odpo"\nbatch_size = 3\n'
    )
    out = seen("c.toml", "--html", "out.html", "--beta", "0.2")
    assert (
        "with --loss odpo\n" in out
        and "1 pairs at --batch-size 3" in out
        and out.endswith("wrote out.html\n")
    )
    assert ", weight 0.5, margin 2\n" in out
    (tmp_path / "s.json").write_text(json.dumps({"model": TINY, "data": ["rows.jsonl"], "out": "runs/x"}))
    assert seen("s.json").startswith("What sft.py")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "c.toml", "s.json", "out.html"}


ERRORS = {
    "flag": (["--max-lenght", "3"], "unrecognized arguments: --max-lenght"),
    "value": (["--max-length", "x"], "--max-length: must be a whole number"),
    "loss": (["--loss", "dpp"], "--loss: invalid choice: 'dpp'"),
    "not its own": (["--loss", "dpo", "--tau", "1"], "--loss dpo takes no --tau"),
    "method": (["--method", "x"], "--method: invalid choice: 'x'"),
    "template": (["--chat-template", "no.jinja"], "--chat-template no.jinja"),
    "data": (["--data", "no.jsonl"], "no.jsonl: no such file"),
    "folder": (["--html", "no/out.html"], "--html no/out.html: there is no such folder"),
    "is a folder": (["--html", "."], "."),
    "one prompt": (["--loss", "kto"], "two different prompts"),
    "nothing left": (["--max-length", "2", "--max-prompt-length", "1"], "no example is left"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_line_of_error(write, capsys, name):
    # red: user_errors left out; sft.py's own message of a flag it has swallowed
    more, expected = ERRORS[name]
    with pytest.raises(SystemExit) as stopped:
        preview.main([*write(pair("q", "a", "b")), *more])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert expected in said


# ---- tokens
# ------------------------------------------------------------------------------------------------------------


def test_brackets_mark_exactly_the_trained_tokens(seen, write, tokenizer):
    # red: kinds shifted by one; the wrap drops a blank; texts decoded without what is before
    turns = [
        ("user", "Hi  there\n\n" + "a long line " * 30),
        ("assistant", "Ünï 🙂👩‍👩‍👧 \n" + "x" * 120 + " 日本語" * 40),
    ]
    turns += [("user", "more"), ("assistant", " done" * 40)]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    out = seen(*write(row, {"text": "plain text"}, {"text": "more plain text"}), "--max-length", 1024)
    template = chat.chat_template(tokenizer, None)
    examples = [ranking.best_completion(example) for example in data.load("rows.jsonl", "train")[0]]
    one, _, other = [encode.encode_turns(example, tokenizer, 1024, 512, template) for example in examples]
    assert [text for _, text in texts(out)] == [
        tokenizer.decode(one.prompt),
        bracketed(tokenizer, one.completions[0], one.trained[0]),
        bracketed(tokenizer, other.completions[0], other.trained[0]),
    ]
    assert texts(out)[1][1].count("[[") == 2 and texts(out)[2][1] == "more[[ plain text<|im_end|>]]"
    for line in out.splitlines():
        wide = sum(1 + (preview.unicodedata.east_asian_width(c) in "WF") for c in line.rstrip())
        assert wide <= 100 or "x" * 90 in line and wide <= 104, line


def test_three_rows_the_first_the_middle_and_the_longest(seen, write):
    # red: order of the file taken for that of lengths
    rows = [pair(f"q{k}", "a " * size, "b") for k, size in enumerate((3, 40, 1, 9, 2))]
    out = seen(*write(*rows), "--loss", "dpo")
    assert re.findall(r"^example (\d) of 5, (.*):", out, re.M) == [
        ("1", "the first and median length"),
        ("2", "longest"),
    ]
    out = seen(*write(*rows[::-1]), "--loss", "dpo")
    assert re.findall(r"^example (\d) of 5, (.*):", out, re.M) == [
        ("1", "the first"),
        ("5", "median length"),
        ("4", "longest"),
    ]


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_tokens_as_they_stand_in_the_text(tokenizer, kind):
    # red: each token decoded alone; no limit of tokens within a character; ids lost
    text = "Grüße 🙂👩‍👩‍👧 to  you all"
    if kind == "spaces":  # SentencePiece's: a token begins with its blank, and bytes for unknown characters
        words = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *"▁Grtoyual"]
        vocabulary = {word: number for number, word in enumerate(words)}
        fast = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        fast.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<unk>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    template = chat.Template("", None)
    known = preview.Data([], tokenizer, template, None, False, "", [])
    found = preview._pieces(known, [], ids, ["trained"] * len(ids))
    assert sum((piece.ids for piece in found), []) == ids
    assert "".join(piece.text for piece in found) == text == tokenizer.decode(ids)
    assert len(found) > 10 and max(len(piece.ids) for piece in found) >= 3
    # cut within a character, and marks that change within one
    emoji = next(piece.ids for piece in found if piece.text == "🙂")
    broken = preview._pieces(known, [], emoji[:1] * 6, ["trained"] * 6)
    assert [len(piece.ids) for piece in broken] == [4, 2]
    half = emoji[:-1]
    for kinds in (["prompt"] * len(half), ["prompt", *["trained"] * (len(half) - 1)]):
        cut = preview._pieces(known, [], half, kinds)
        expected = [(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
        assert [(len(piece.ids), piece.kind) for piece in cut] == expected
    # an answer begins with its blank
    blank = max(number for number, piece in enumerate(found) if piece.text.startswith(" "))
    answer = sum((piece.ids for piece in found[blank:]), [])
    example = encode.Encoded(ids[: -len(answer)], [answer], [[True] * len(answer)], [1.0], labels=[True])
    both = [piece.text for _, pieces in preview._texts(known, example) for piece in pieces]
    assert "".join(both) == text


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_in_a_terminal_unless_they_are_not_wanted(write, monkeypatch, no_color):
    # red: isatty not asked; NO_COLOR not read
    monkeypatch.setenv("NO_COLOR", no_color)
    screen = Terminal(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    preview.main([*write(pair("q", "yes", "no")), "--loss", "dpo"])
    out = screen.buffer.getvalue().decode("ascii")
    assert "\\u2588" in out  # an ascii terminal gets escapes, not a traceback
    if no_color:
        assert "\x1b" not in out and "[[yes<|im_end|>]]\n" in out
    else:
        assert "\x1b[32myes<|im_end|>\x1b[0m\n" in out and "[[" not in out
        assert "    \x1b[2m<|im_start|>user" in out


def test_what_rows_hold_does_not_reach_the_terminal_as_a_command(seen, write):
    # red: visible() left out of marked or of what is said
    out = seen(*write(pair(NASTY, NASTY, "b", **{"\x1b[2Jkey": 1})), "--loss", "dpo")
    assert not set(out) & {"\x1b", "\u202e", "\r"}
    assert texts(out)[1][1] == f"[[{NASTY}<|im_end|>]]".replace("\x1b", "\\x1b").replace(
        "\u202e", "\\u202e"
    ).replace("\r", "\\r")
    assert 'keys not read: "\\u001b[2Jkey"' in out


# ---- the page
# ------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Fails for a tag that is not closed in its turn; keeps texts and the attributes around them."""

    def __init__(self):
        super().__init__()
        self.open, self.found = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta",):
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, (tag, self.getpos())

    def handle_data(self, text):
        self.found.append((text, list(self.open)))

    def text(self, test):
        return "".join(text for text, tags in self.found if any(test(tag, found) for tag, found in tags))


def test_the_page(seen, write, tokenizer):
    # red: any _text() left out; an unclosed tag; ids of the wrong token; a link to anything
    rows = [
        pair(NASTY, NASTY, "b", **{"<i>key</i>": 1}),
        *[pair(f"q{k}", "a " * k, "b") for k in range(1, 40)],
    ]
    out = seen(*write(*rows), "--loss", "dpo", "--html", "<o&.html")
    text = (preview.Path("<o&.html")).read_text(encoding="utf-8")
    found = Page()
    found.feed(text)
    found.close()
    assert not found.open
    assert not re.search(r"(?i)<script|https?:|//|\bsrc=|href=|url\(|@import|<link|<img|\son\w+=", text)
    assert not set(text) & {"\x1b", "\u202e", "\r", "\0"}
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text
    plain = NASTY.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\r", "\\r")
    trained = found.text(lambda tag, a: tag == "div")
    assert f"{plain}<|im_end|>↵\n" in trained and "<script>alert('x')</script>" in trained
    assert found.text(lambda tag, a: tag == "p").count("<i>key</i>") == 1
    # the texts and the marks are those of the terminal
    marked = []
    for run in re.findall(r"<div>(.*?)</div>", text, re.S):
        part = Page()
        part.feed(run)
        pieces = [("trained" in [a.get("class") for _, a in tags], said) for said, tags in part.found]
        joined = "".join(f"[[{said}]]" if wanted else said for wanted, said in pieces)
        marked.append(joined.replace("]][[", "").replace("↵\n", "\n").replace("↵", ""))
    assert marked == [said.replace("\\r\n", "\\r\n") for _, said in texts(out)]
    # the ids of the first example are those of encode
    template = chat.chat_template(tokenizer, None)
    example = encode.encode(data.load("rows.jsonl", "train")[0][0], tokenizer, 512, 256, template)
    first = re.findall(r"<div>(.*?)</div>", text, re.S)[:3]
    ids = [
        [int(id) for title in re.findall(r' title="([\d ]+)"', run) for id in title.split()] for run in first
    ]
    assert ids == [example.prompt, *example.completions]
    # what is drawn and said is what the terminal shows
    assert sum(int(n) for n in re.findall(r"tokens: (\d+)</title>", text)) == 40 + 80
    for name, (value, note) in totals(out).items():
        row = re.search(rf"<tr><th[^>]*> *{name}</th><td>([\d.,]+)[ %]*</td><td class=note>(.*?)</td>", text)
        assert float(row[1].replace(",", "")) == value and html.unescape(row[2]) == note
    for axis in ("prompts", "answers", "tokens"):
        assert f">{axis}</text>" in text


# ---- as a command
# ------------------------------------------------------------------------------------------------------------


def test_rows_come_from_the_cache_the_second_time(seen, write, monkeypatch):
    # red: an Encoding of its own
    flags = [*write(*[pair(f"q{k}", "a", "b") for k in range(9)]), "--loss", "dpo"]
    first = seen(*flags)
    monkeypatch.setattr(store, "_encode_chunk", functools.partial(pytest.fail, "encoded again"))
    assert seen(*flags) == first


def test_the_command_and_a_reader_that_goes_away(write, tmp_path):
    # red: BrokenPipeError not caught (a traceback), or taken for the user's error (exit 2, no page)
    rows = [pair(f"q{k}", "a " * 50, "b") for k in range(30)]
    command = [sys.executable, str(ROOT / "preview.py"), *write(*rows), "--loss", "dpo", "--html", "o.html"]
    line = f"set -o pipefail; {shlex.join(command)} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "What align.py trains on with --loss dpo\n"
    assert (tmp_path / "o.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_help_names_what_is_not_of_the_scripts(capsys):
    with pytest.raises(SystemExit) as stopped:
        preview.main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--html" in out and "align.py or sft.py" in " ".join(out.split())


def test_the_preview_loads_by_the_functions_of_the_scripts(seen, write, monkeypatch):
    # red: a copy of load_examples or parse_args
    called = []
    for script in (preview.sft, align):
        for name in ("parse_args", "load_examples"):
            real = getattr(script, name)
            monkeypatch.setattr(
                script,
                name,
                lambda *a, real=real, mark=(script.__name__, name): (called.append(mark), real(*a))[1],
            )
    seen(*write(pair("q", "a", "b")))
    assert called == [("sft", "parse_args"), ("sft", "load_examples")]
    called.clear()
    seen(*write(pair("q", "a", "b")), "--loss", "dpo")
    assert called == [("sft", "parse_args"), ("align", "parse_args"), ("align", "load_examples")]
