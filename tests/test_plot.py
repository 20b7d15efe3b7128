"""plot.py: the table, the page and the figure of runs that go on, are whole, or are none.

`red:` names one-line changes that turn a test red.
"""

import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time

import matplotlib
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import plot


def write(folder, rows, tail="", **files):
    """A run directory of these rows; `files` are objects of JSON beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + tail, encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def train(step, **more):
    return {"split": "train", "step": step, "time": 1e9, "mem_gb": 2.0 + step, **more}


def held_out(step, **more):
    return {"split": "eval", "step": step, "time": 1e9, "mem_gb": 1.0, **more}


def shown(capsys, *argv):
    """Tables that were printed, as {row: {column: cell}}, and the other lines."""
    plot.main([str(part) for part in argv])
    tables, others = [], []
    for block in capsys.readouterr().out.split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("| ")]
        others += [line for line in block.splitlines() if not line.startswith("|")]
        tables.append({row[0]: dict(zip(lines[0][1:], row[1:])) for row in lines[1:]})
    return tables, others


def refused(capsys, *argv):
    """The one line of an error."""
    with pytest.raises(SystemExit) as end:
        plot.main([str(part) for part in argv])
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", said), said
    return said


def test_the_table_is_of_the_last_evaluation_and_of_median_speeds(tmp_path, capsys):
    # red: any of ACCURACY's keys away, the first row of a step, mean for median, a boolean as a number
    speeds = [{"tok_per_s": v, "responses_per_s": v / 100} for v in (1000.0, 3000.0, 2e6)]
    evaluations = [held_out(0, loss=9.0), held_out(3, loss=8.0)]
    evaluations += [held_out(3, loss=0.5, **{"logps/accuracies": 0.75})]
    free = [train(step, **more) for step, more in enumerate(speeds)] + evaluations
    with_reference = {"rewards/accuracies": 0.25, "logps/accuracies": 1.0, "rewards/margins": 0.125}
    with_reference |= {"kl/chosen": "nan", "loss": "inf", "perplexity": True}
    write(tmp_path / "free", free, tail='{"split": "eval", "step": 9, "lo')
    write(tmp_path / "dpo|\x1b[2J", [held_out(7, **with_reference), held_out(2, loss=7.0)])
    write(tmp_path / "begun", [], args={})
    runs = [tmp_path / name for name in ("free", "dpo|\x1b[2J", "begun")]
    (found,), others = shown(capsys, *runs, "--html", tmp_path / "page.html")
    assert found["free"] == {
        "held-out accuracy": "0.750", "kl chosen": "-", "margin": "-", "loss": "0.5000",
        "tokens/s": "3,000", "responses/s": "30.0", "peak GB": "4.00",
    }  # fmt: skip
    assert found["dpo??[2J"] == {
        "held-out accuracy": "0.250", "kl chosen": "nan", "margin": "0.1250", "loss": "inf",
        "tokens/s": "-", "responses/s": "-", "peak GB": "1.00",
    }  # fmt: skip
    assert set(found["begun"].values()) == {"-"} and others == [f"wrote {tmp_path / 'page.html'}"]


def test_accuracy_by_subset_has_its_own_table(tmp_path, capsys):
    # red: the keys of ACCURACY not asked for (own/accuracies/... would be shown)
    names = {"rewards/accuracies/chat/hard": 0.5, "own/accuracies/no": 1.0, "pairs/chat/hard": 1234}
    write(tmp_path / "a" / "run", [held_out(0, **{"rewards/accuracies/old": 1.0}), held_out(1, **names)])
    write(tmp_path / "b" / "run", [held_out(1, **{"logps/accuracies/maths": 0.25, "pairs/maths": 4})])
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]  # of one name
    (_, found), _ = shown(capsys, *runs, "--html", tmp_path / "page.html")
    a, b = map(str, runs)
    assert found == {
        "chat/hard": {"pairs": "1,234", a: "0.500", b: "-"}, "maths": {"pairs": "4", a: "-", b: "0.250"},
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each kind."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_needs_nothing_else_and_draws_what_the_run_holds(tmp_path, capsys):
    # red: an escape away, [::-1] of a curve, the oldest sample, refresh of a run that is done
    losses = [0.7, 0.6, "nan", 0.4]
    rows = [train(step, loss=loss) for step, loss in enumerate(losses)]
    rows += [held_out(step, loss=value) for step, value in ((0, 0.8), (3, 0.2))]
    run = write(tmp_path / "<i>&run", rows, status={"state": "running"}, args={"loss": "dpo"})
    (run / "samples").mkdir()
    for step, text in ((9, "old"), (10, "<script>alert(1)</script>\u202e\x07 5 < 6\nnext")):
        (run / "samples" / f"step-{step}.txt").write_text(text, encoding="utf-8")
    text = plot.page({run.name: plot.read(run)}, 7)
    page = Page(text)
    metas = [a for tag, a in page.tags if tag == "meta"]
    assert {"http-equiv": "refresh", "content": "7"} in metas
    policy = next(a["content"] for a in metas if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not {"script", "img", "link", "iframe", "i"} & {tag for tag, _ in page.tags}
    assert not any(key in a for _, a in page.tags for key in ("src", "href", "onclick"))
    assert page.texts["pre"] == ["<script>alert(1)</script>\ufffd\ufffd 5 < 6\nnext"] and "old" not in text
    assert page.texts["title"][0] == "<i>&run" and page.texts["b"] == ["<i>&run"]
    lines = [a["points"] for tag, a in page.tags if tag == "polyline"]
    curves = [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]
    dots = [(float(a["cx"]), float(a["cy"])) for tag, a in page.tags if tag == "circle"]
    assert len(curves) == 2 and curves[1] == dots and [x for x, _ in dots] == [58.0, 378.0]
    near = 150 / 1.1 / 0.6  # 0.2 to 0.8, and a twentieth of it above and below
    assert curves[0][0][1] - dots[0][1] == pytest.approx(0.1 * near, abs=0.1)
    assert curves[0][1][1] - dots[0][1] == pytest.approx(0.15 * near, abs=0.1)  # a mean of two
    assert dots[1][1] - dots[0][1] == pytest.approx(0.6 * near, abs=0.1)
    (run / "status.json").write_text('{"state": "done"}')
    plot.main([str(run), "--html", str(tmp_path / "page.html"), "--live", "7"])  # ends at once
    assert "refresh" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["<i>&run", "page.html"]


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    # red: train[-1:] away, POINTS not asked for
    run = plot.read(write(tmp_path / "run", [train(step, loss=1.0 + step) for step in range(2001)]))
    tags = Page(plot.page({"run": run}, None)).tags
    points = next(a["points"] for tag, a in tags if tag == "polyline").split()
    assert len(points) <= plot.POINTS + 1
    assert points[0].startswith("58.0,") and points[-1].startswith("378.0,")


SPANS = [(0, 1), (0, 3), (-7.3, 12.9), (0.69314, 0.69315), (0, 1e6), (1e-12, 3e-12)]


@pytest.mark.parametrize("low, high", SPANS)
def test_ticks_are_a_few_round_numbers(low, high):
    # red: 10 away from the steps
    found = plot._ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 * (high - low) <= found[0] and found[-1] <= high + 1e-9
    steps = {f"{b - a:.3g}" for a, b in zip(found, found[1:])}
    assert len(steps) == 1 and steps.pop().lstrip("0.")[0] in "125"


def test_the_figure_is_drawn_of_any_run(tmp_path, capsys):
    # red: parse_math left on (a formula that cannot be read), or off for all that is drawn later; comparison.png
    # where --html is given, the last --out alone
    write(tmp_path / "$\\frac$", [train(0, loss=1.0), held_out(0, loss="nan")])
    write(tmp_path / "empty", [], args={})
    runs = [tmp_path / "$\\frac$", tmp_path / "empty"]
    outs = [tmp_path / f"figure.{form}" for form in ("png", "svg")]
    _, others = shown(capsys, *runs, "--out", outs[0], "--out", outs[1])
    assert others == [f"wrote {out}" for out in outs]
    assert [out.read_bytes()[:4] for out in outs] == [b"\x89PNG", b"<?xm"] and len(list(tmp_path.iterdir())) == 4
    assert matplotlib.rcParams["text.parse_math"]  # of other figures of the process


def test_runs_that_differ_by_their_seed_are_one_curve(tmp_path, capsys):
    """red: the beta not looked at, --out looked at, a step that one run lacks, the first run for the mean; ids of
    an SVG, or its date, are others each time."""
    values = {"dpo-0": (0.7, 0.5), "dpo-1": (0.7, 0.3, 0.1), "dpo-2": (0.7, 0.1), "high": (0.7,)}
    for name, losses in values.items():
        flags = {"beta": 0.5 if name == "high" else 0.1, "seed": len(name) + int(name[-1:] == "1"), "out": name}
        write(tmp_path / name, [held_out(step, loss=loss) for step, loss in enumerate(losses)], args=flags)
    write(tmp_path / "one", [train(0)])  # without flags, as the next: not of one command
    write(tmp_path / "other", [train(0)])
    runs = {name: plot.read(tmp_path / name) for name in (*values, "one", "other")}
    groups = dict(plot.by_seed(runs))
    assert list(groups) == ["dpo-* (3)", "high", "one", "other"]
    points = plot.over_seeds([plot.curve(run.held_out, ("loss",)) for run in groups["dpo-* (3)"]])
    assert points == [(0, pytest.approx(0.7), 0.7, 0.7), (1, pytest.approx(0.3), 0.1, 0.5)]
    out = tmp_path / "figure.svg"
    shown(capsys, *[tmp_path / name for name in runs], "--out", out)
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<?xml") and plot.COLORS[1] in text and text.count("dpo-* (3)") >= 1
    shown(capsys, *[tmp_path / name for name in runs], "--out", out)
    assert out.read_text(encoding="utf-8") == text


WRONG = {
    "not JSON": (["{"], "metrics.jsonl:1: not a row of metrics"),
    "not a row": ([train(0), [1]], "metrics.jsonl:2: not a row of metrics"),
    "a number": (["7"], "metrics.jsonl:1: not a row of metrics"),
    "no step": ([{"split": "train"}], "metrics.jsonl:1: not a row of metrics"),
    "a step that is none": ([train(0) | {"step": "first"}], "metrics.jsonl:1: not a row of metrics"),
    "an infinite step": ([train(0) | {"step": 1e999}], "metrics.jsonl:1: not a row of metrics"),
    "a negative step": ([train(0) | {"step": -1}], "metrics.jsonl:1: not a row of metrics"),
    "a list as split": ([train(0) | {"split": []}], "metrics.jsonl:1: not a row of metrics"),
    "deep": (["[" * 100_000], "metrics.jsonl:1: not a row of metrics"),
    "bytes": ("folder/metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl:1: not a row of metrics"),
    "a folder": ("folder/metrics.jsonl", None, "metrics.jsonl: Is a directory"),
    "flags are a list": ("folder/args.json", b"[1]", "args.json: not an object of JSON"),
    "status is cut": ("folder/status.json", b'{"state"', "status.json: not an object of JSON"),
    "no run": ("other", b"", "metrics.jsonl: no such file (give run directories)"),
    "a file": ("folder", b"", "Not a directory"),
    "a sample is a folder": ("folder/samples/step-3.txt", None, "step-3.txt: Is a directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_run_is_one_line(case, tmp_path, capsys):
    # red: any of the errors that read and _object catch
    *what, said = WRONG[case]
    folder = tmp_path / "folder"
    if isinstance(what[0], list):
        write(folder, what[0])
    else:
        place = tmp_path / what[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.parent == folder / "samples":
            write(folder, [train(0)])
        place.mkdir() if what[1] is None else place.write_bytes(what[1])
    assert said in refused(capsys, folder, "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_flags_that_are_wrong_are_one_line(tmp_path, capsys):
    # red: parser.error left to argparse, the look at the folder away
    run = write(tmp_path / "run", [train(0)])
    assert "--live: must be 1 to 86400 seconds, got 0" in refused(capsys, run, "--live", "0")
    assert "--live: must be" in refused(capsys, run, "--live", "nan")
    assert "not a file in a folder that is there" in refused(capsys, run, "--html", tmp_path)
    assert "not a file in a folder that is there" in refused(capsys, run, "--out", tmp_path / "no" / "a.png")
    assert "required: runs" in refused(capsys)


VALUES = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.integers(), st.just(10**400), st.just([1]),
    st.sampled_from(["nan", "inf", "-inf", -1.7e308, 1.7e308, 5e-324]),
)  # fmt: skip
KEYS = ["loss", "logps/accuracies", "rewards/accuracies/a|b", "mem_gb", "tok_per_s", "time", "pairs/a|b"]
ROWS = st.builds(
    lambda step, split, more: {"step": step, "split": split, **more},
    st.integers(0, 10**11), st.sampled_from(["train", "eval", "sample"]),
    st.dictionaries(st.sampled_from(KEYS), VALUES),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(ROWS, max_size=5), st.dictionaries(st.just("state"), VALUES))
def test_whatever_rows_hold_is_shown(tmp_path_factory, rows, status):
    # red: OverflowError not caught, the bound of 1e100 away, booleans as numbers
    run = plot.read(write(tmp_path_factory.mktemp("any") / "run", rows, status=status, args={}))
    text = plot.markdown(plot.summary({"run": run}))
    assert "True" not in text
    plot.by_subset({"run": run})
    assert re.findall('points="[^"]*(?:nan|inf)', plot.page({"run": run}, None)) == []


def start(*argv):
    """As from a terminal: a shell that runs the tests in the background has them ignore SIGINT, and what they
    start."""
    line = [sys.executable, "plot.py", *map(str, argv)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(line, cwd=ROOT, text=True, **how)


def until(told, seconds=20):
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_live_goes_on_until_no_run_is_running(tmp_path):
    # red: the sleep or the loop away, `all` for `any`, the page not written again
    runs = [write(tmp_path / n, [train(0, loss=1.0)], status={"state": "running"}) for n in ("one", "other")]
    page = tmp_path / "page.html"
    looking = start(*runs, "--html", page, "--live", "1")
    interrupted = start(runs[0], "--html", tmp_path / "another.html", "--live", "60")
    until(lambda: page.exists() and (tmp_path / "another.html").exists())
    assert "step 5" not in page.read_text(encoding="utf-8")
    (runs[0] / "status.json").write_text('{"state": "done"}')
    with open(runs[1] / "metrics.jsonl", "a") as file:
        file.write(json.dumps(train(5, loss=0.5)) + "\n")
    until(lambda: "step 5" in page.read_text(encoding="utf-8"))
    assert 'content="1"' in page.read_text(encoding="utf-8") and looking.poll() is None
    (runs[1] / "status.json").write_text('{"state": "failed"}')
    stdout, stderr = looking.communicate(timeout=20)
    assert looking.returncode == 0 and stderr == "" and stdout.count("| run |") >= 3 and "\x1b" not in stdout
    interrupted.send_signal(signal.SIGINT)
    stdout, stderr = interrupted.communicate(timeout=20)
    assert interrupted.returncode == 0 and stderr == "" and stdout.count("| run |") == 1


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    # red: tell's except away
    run = write(tmp_path / "run", [train(0)])
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "plot.py", str(run), "--html", str(tmp_path / "page.html")]
    done = subprocess.run(line, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "page.html").exists()
