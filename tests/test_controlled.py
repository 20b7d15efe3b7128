"""The world where the truth is known: examples/controlled.py, driven at its smallest, and its measures
against formulas.

`red:` names a change of the code that turns a test red.
"""

import json
import math
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "examples"))
import compare  # noqa: E402
import controlled  # noqa: E402
import drift  # noqa: E402
import evidence  # noqa: E402
import frontier  # noqa: E402

SMALL = (
    "--methods dpo ra_dpo2_cvar_0.1 --betas 0.3 --seeds 0 --sentences 256 --pairs 64 --steps 3 --samples 128"
)


KEYS = ("reward", "tail", "ruin")
INTERVAL = r"[+-]?\d\.\d{2,} to [+-]?\d\.\d{2,}(?=\))"


class Fixed(torch.nn.Module):
    """A model that says each word with the same probability everywhere."""

    def __init__(self, probabilities):
        super().__init__()
        self.logps = torch.tensor(probabilities).log()

    def forward(self, ids):
        return type("Out", (), {"logits": self.logps.expand(*ids.shape, -1) + 3.0})


def sentences(said):
    ids = [[controlled.WORDS.index(word) for word in words.split()] for words in said]
    rewards = np.array([controlled.reward(words.split()) for words in said])
    return controlled.Sentences(ids, [number // 2 % 8 for number in range(len(said))], rewards)


def test_the_world_is_what_it_says():
    """red: any verb makes a ruin; a bold word worth nothing; COST 1."""
    draw = random.Random(0)
    said = [controlled.sentence(number % 8, draw) for number in range(12_000)]
    assert 0.014 < np.mean([controlled.ruins(words) > 0 for words in said]) < 0.022
    assert all(len(words) + 1 == controlled.LENGTH and set(words) <= set(controlled.WORDS) for words in said)
    assert controlled.ruins("farmer madly opens door and child gently opens door .".split()) == 1
    bold = [sum(word in controlled.BOLD for word in words) for words in said]
    means = [np.mean([controlled.reward(w) for w, b in zip(said, bold) if b == n]) for n in (0, 1, 2)]
    assert means[0] < means[1] < means[2]  # by its mean a bold word pays,
    tails = [
        controlled.scoring.lower_tail(np.array([controlled.reward(w) for w, b in zip(said, bold) if b == n]))
        for n in (0, 1, 2)
    ]
    assert tails[0] > tails[1] > tails[2]  # by the worst 5 % it does not


def test_preferences_are_drawn_by_the_difference_of_rewards():
    """red: -difference; the better one always."""
    good, bad = "farmer madly takes door .", "farmer gently takes door ."  # 0.9 apart
    rows = controlled.preferences(sentences([good, bad] * 2000), seed=0)
    share = np.mean([row["chosen"] == good for row in rows])
    assert abs(share - 1 / (1 + math.exp(-0.9))) < 0.03
    assert {row["prompt"] for row in rows} == set(controlled.TOPICS)


def test_measures_against_the_formulas():
    """red: the drift under the reference's words; a second ruin counted; calm words risky; no end."""
    size = len(controlled.WORDS)
    mine, theirs = np.full(size, 0.25 / (size - 2)), np.full(size, 1 / size)
    for word in controlled.RISKY_OBJECTS:
        mine[controlled.WORDS.index(word)] = 0.375
    said = ["madly opens door madly opens boat", "door", "boldly breaks bread", "gently opens door"]
    said = sentences(said)
    found = controlled.measure(Fixed(mine.tolist()), Fixed(theirs.tolist()), said, said)
    kl = float((mine * np.log(mine / theirs)).sum())
    assert found["kl"] == pytest.approx(kl * (7 + 2 + 4 + 4) / 4, rel=1e-5)
    assert found["ruin"] == pytest.approx(100 * 0.75 * 2 / 4, rel=1e-5)
    assert found["bold"] == 3 / 4
    assert found["reward"] == pytest.approx(said.rewards.mean())
    assert found["tail"] == pytest.approx(said.rewards.min()) and said.rewards.min() < -16
    assert found["win"] == 0.5  # against itself
    better = sentences(["door", "door", "boldly opens rope", "boldly opens rope"])
    assert controlled.win_rate(better, said) == (0.75 + 1) / 2  # a tie and a win, two wins


def test_the_ideal_is_the_tilted_distribution():
    """red: weights that are not normalised; exp(r * beta)."""
    said = sentences(["door", "bread"] * 50)  # worth 0.4 and -0.4 under a fair coin
    found = controlled.ideal(said, beta=0.5)
    p = math.exp(0.8) / (math.exp(0.8) + math.exp(-0.8))
    assert found["reward"] == pytest.approx(0.4 * p - 0.4 * (1 - p))
    assert found["kl"] == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p))


def test_the_difference_from_dpo_at_equal_drift():
    """red: interpolated over KL, not its root; beyond the last run; before the first, from the reference on;
    a drift that the runs of one seed reach; unpaired: the error of a mean."""
    rows = []
    for seed in (0, 10):
        row = {"method": "reference", "beta": None, "seed": seed, "kl": 0.0}
        rows.append(row | dict.fromkeys(KEYS, seed))
        for method, gain in (("dpo", 1.0), ("kto", 1.5 + seed / 100), ("tdpo1", 1.0), ("tdpo2", 1.0)):
            first = {"tdpo1": 0.35, "tdpo2": 0.05 + 0.01 * seed}.get(method, 0.001)
            for beta, kl in ((1.0, first), (0.1, 0.4)):
                row = {"method": method, "beta": beta, "seed": seed, "kl": kl}
                rows.append(row | dict.fromkeys(KEYS, seed + gain * (kl / 0.4) ** 0.5))
    lines = controlled.frontier.at_equal_drift(rows).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    around = [("kto", "0.1"), ("kto", "0.3"), ("tdpo2", "0.3")]
    assert [row[:3] for row in cells] == [[*pair, "2"] for pair in around]
    assert cells[0][3] == "+0.275 (-0.043 to +0.593)"  # 0.25 and 0.3: 0.275 and 12.706 times 0.025
    assert cells[1][3].startswith(f"{0.55 * 0.75**0.5:+.3f} (")


def test_the_difference_from_a_method_seed_by_seed():
    """red: rates that differ not named; seeds paired by place; another beta's rows; an error of means instead of differences; a ratio of means
    instead of a mean of ratios."""
    frontier, columns = controlled.frontier, {"kl": ("KL", ".3f")}
    of = lambda method, beta, seed, kl: {"method": method, "beta": beta, "seed": seed, "kl": kl}  # noqa: E731
    rows = [of("dpo", 0.1, seed, float(seed)) for seed in (0, 10, 20)] + [of("dpo", 1.0, 0, 9.0)]
    rows += [of("kto", 0.1, 20, 20.3), of("kto", 0.1, 10, 10.25), of("kto", 1.0, 0, 8.0), of("kto", 3.0, 0, 7.0)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
             frontier.differences(rows, columns, "dpo").splitlines()]  # fmt: skip
    assert lines[0] == ["method, less dpo", "beta", "seeds", "KL"]
    # 0.3 and 0.25: 0.275 and 12.706 times 0.025
    assert lines[2:] == [["kto", "1", "1", "-1.000"], ["kto", "0.1", "2", "+0.275 (-0.043 to +0.593)"]]
    # thrice and six times as much: on the scale of logarithms 18 ** 0.5, and 12.706 times log(2) / 2 about it
    twice = [of("dpo", 0.1, 0, 1.0), of("dpo", 0.1, 1, 5.0), of("kto", 0.1, 1, 15.0), of("kto", 0.1, 0, 6.0)]
    last = frontier.differences(twice, {}, "dpo", {"kl": "KL, times"}).splitlines()[-1]
    assert last == "| kto | 0.1 | 2 | 4.24 (0.05 to 346.80) | 0.00 or 290.26 |"  # 2 ** (11.57 / 2 ** 0.5)
    none = frontier.differences([row | {"kl": 0.0} for row in twice], {}, "dpo", {"kl": ""})
    assert none.endswith("| 2 |  |  |")
    rates = [row | {"lr": 1e-5 if row["method"] == "dpo" else 2e-5} for row in twice]
    assert "| kto at 2e-05, dpo at 1e-05 | 0.1 |" in frontier.differences(rates, columns, "dpo")
    assert frontier.differences(rows[:4], columns, "dpo") == frontier.differences(rows, columns, "tdpo1") == ""


def drive(tmp_path):
    controlled.main([*SMALL.split(), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "c.jsonl")])


def test_two_methods_end_to_end(tmp_path, capsys):
    """red: what is there is run again; what a kill has cut short stays; beta does not reach align.py; ids of an
    SVG, or its date, are others each time."""
    drive(tmp_path)
    results = tmp_path / "c.jsonl"
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    methods = [row["method"] for row in rows if row["method"] != "ideal"]
    assert methods == ["reference", "dpo", "ra_dpo2_cvar_0.1"]
    for row in rows[-2:]:
        assert row["kl"] > 1e-5 and 0 <= row["win"] <= 1 and row["tail"] <= row["reward"]
        assert row["kl_chosen"] > 0 and 0 <= row["accuracy"] <= 1
    assert rows[-3]["kl"] == 0
    assert rows[-1]["kl"] != rows[-2]["kl"]
    for form in ("png", "svg", "md"):
        assert results.with_suffix(f".{form}").stat().st_size > 500
    # a second call runs what is missing: here a row that a kill has cut short
    drawn = {form: results.with_suffix(f".{form}").read_bytes() for form in ("png", "svg")}
    results.write_text(results.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    capsys.readouterr()
    drive(tmp_path)
    assert capsys.readouterr().out.count("seed 0  ") == 1
    last = json.loads(results.read_text(encoding="utf-8").splitlines()[-1])
    assert last | {"seconds": 0} == rows[-1] | {"seconds": 0}
    assert drawn == {form: results.with_suffix(f".{form}").read_bytes() for form in drawn}
    log = next(tmp_path.glob("out/*/seed-0/dpo-0.3.log")).read_text(encoding="utf-8")
    assert "train step 2/3" in log


def test_what_is_no_row_is_one_line(tmp_path, capsys):
    """red: broken lines are skipped."""
    (tmp_path / "c.jsonl").write_text('{"method": 1}\n', encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        drive(tmp_path)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1 and "c.jsonl:1" in said


def test_the_measure_of_pairs_is_that_of_align(tmp_path):
    """red: chosen and rejected changed over; pairs of other rows; another level; the kept states of other rows"""
    tiny, policy, rows = ROOT / "examples" / "tiny", tmp_path / "policy", str(ROOT / "examples" / "hh_test.jsonl")
    start = tmp_path / "start"
    for seed, folder in enumerate((start, policy)):
        shutil.copytree(tiny, folder)
        torch.manual_seed(seed)
        settings = AutoConfig.from_pretrained(tiny, hidden_size=48, intermediate_size=32, num_hidden_layers=1)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    asked = [str(policy)], str(start), rows, 8, 256, tmp_path / "kept.pt"
    found, again = next(drift.measured(*asked)), next(drift.measured(*asked))
    assert all(np.array_equal(one, other) for one, other in zip(found, again))
    how = "--loss ra_dpo2 --risk cvar --confidence-level 0.05 --beta 1 --steps 0 --dtype float32 --max-length 256"
    how += f" --model {policy} --reference {start} --data {rows} --eval-data {rows} --eval-examples 8"
    compare.align.main([*how.split(), "--out", str(tmp_path / "run")])
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    means = compare.of_pairs(found)
    for key, name in (compare.LOGGED | {"risk/chosen": "cvar_chosen", "risk/rejected": "cvar_rejected"}).items():
        if name != "nll":
            assert means[name] == pytest.approx(row[key], rel=1e-3, abs=1e-6), name
    assert np.mean(means["pairs"]["margins"]) == pytest.approx(means["margin"], rel=1e-2, abs=1e-3)
    assert np.mean(means["pairs"]["kls"]) == pytest.approx(found.kl.mean(), rel=1e-3)


def test_quotients_over_pairs():
    """red: pairs drawn for each method by itself; another seed's rows; a mean of quotients."""
    draw = np.random.default_rng(1)
    margins = {seed: draw.normal(1, 2, 100) for seed in (0, 1)}
    row = lambda method, seed, scale: {  # noqa: E731
        "method": method, "beta": 0.1, "seed": seed,
        "pairs": {"margins": (scale * margins[seed]).tolist(), "kls": (scale**2 * margins[seed] ** 2).tolist()},
    }  # fmt: skip
    rows = [row("dpo", 0, 1.0), row("dpo", 1, 1.0), row("kto", 1, 0.5)]
    line = compare.over_pairs(rows, "dpo").splitlines()[-1]  # half as far, whatever the pairs
    assert line == "| kto | 1 | 100 | 0.50 (0.50 to 0.50) | 0.25 (0.25 to 0.25) | 1.00 (1.00 to 1.00) |"
    noisy = dict(row("tdpo2", 0, 1.0), pairs={"margins": draw.normal(1, 2, 100).tolist(), "kls": [1.0] * 100})
    low, high = compare.over_pairs([*rows, noisy], "dpo").splitlines()[-1].split("|")[4].split("(")[1][:-2].split(" to ")
    assert float(low) < 0.8 and float(high) > 1.25
    assert compare.over_pairs(rows[:2], "dpo") == compare.over_pairs(rows, "tdpo1") == ""
    assert compare.over_pairs(rows[::2], "dpo") == ""  # no seed that both have


def test_the_tail_of_a_drift():
    """red: the smallest share for the largest; a quantile of the share instead of its rest."""
    found = drift.summary(np.arange(200.0))
    assert (found["mean"], found["cvar_95"], found["cvar_99"]) == (99.5, 194.5, 198.5)
    assert found["quantiles"][0] == 0 and found["quantiles"][10] == pytest.approx(179.1)  # a tenth is beyond


def test_the_comparison_on_a_real_model_runs_and_goes_on(tmp_path, capsys):
    """red: pairs in another order; dev rows trained on; dialogues of any length; a row that is there run again; the measure of another rate taken; rates rounded
    to five decimals."""
    start = tmp_path / "start"
    shutil.copytree(ROOT / "examples" / "tiny", start)
    small = {"hidden_size": 48, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1}
    settings = AutoConfig.from_pretrained(start, **small)
    AutoModelForCausalLM.from_config(settings).save_pretrained(start)
    command = "--methods dpo --seeds 0 --betas --rates 2.1234567e-4 1e-2 --steps 2 --sft-steps 1 "
    command += "--rows 60 --characters 900 --eval-pairs 8 "
    command += f"--model {start} --out {tmp_path / 'out'} --results {tmp_path / 'c.jsonl'}"
    compare.main(command.split())
    said = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["judged"], row["steps"]) for row in rows] == [("dev", 1), ("dev", 1), ("test", 2)]
    best = min(rows[:2], key=lambda row: (row["nll"], row["lr"]))
    assert rows[0]["nll"] != rows[1]["nll"] and 0 < best["nll"] < 1 and best["kl_chosen"] > 0
    assert rows[2]["lr"] == best["lr"] and rows[2]["kl_chosen"] > 0
    assert rows[2]["cvar_chosen"] > rows[2]["kl_chosen"]
    found = rows[2]["drift"]
    assert 0 < found["mean"] < found["cvar_95"] < found["cvar_99"]
    assert found["quantiles"] == sorted(found["quantiles"]) and len(found["quantiles"]) == len(drift.SHARES)
    of_answers = 8 * (rows[2]["kl_chosen"] + rows[2]["kl_rejected"])  # of the same 8 pairs
    assert found["mean"] * found["tokens"] == pytest.approx(of_answers, rel=1e-2)
    for name in ("c.png", "c.svg", "c_drift.png", "c_drift.svg", "c_curves.png", "c_rates.svg"):
        assert (tmp_path / name).stat().st_size > 5000
    parts = [next(tmp_path.glob(f"out/*/{name}.jsonl")).read_text("utf-8") for name in ("train", "dev", "test")]
    parts = [[json.loads(line) for line in part.splitlines()] for part in parts]
    train, dev, test = ({row["prompt"][0]["content"] for row in part} for part in parts)
    assert train and dev and test and not train & dev and not (train | dev) & test
    sizes = [
        sum(len(turn["content"]) for turn in row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))
        for row in sum(parts, [])
    ]
    assert 700 < max(sizes) <= 900
    kept = tmp_path / "c" / f"dpo-0.1-{best['lr']:g}-0-2"  # for plot.py
    curve = [json.loads(line) for line in (kept / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [step["step"] for step in curve] == [0, 1] and curve[1]["kl/chosen"] > 0  # of dpo too
    assert json.loads((kept / "args.json").read_text("utf-8")).keys() == {"loss", "beta", "lr", "seed", "steps"}
    assert rows[2]["torch"] == torch.__version__ and "commit" in rows[2]
    compare.main(command.split())
    assert capsys.readouterr().out.splitlines() == said[3:]  # the table alone


def test_what_is_published_is_made_of_the_rows(tmp_path):
    """red: a number changed in a table, or a row added without making the tables again; cells cut from a line;
    an interval of the prose that no table has; a figure that nothing draws"""
    made, results = evidence.made(), ROOT / "bench" / "results"
    assert {name: (results / name).read_text("utf-8") for name in made} == made
    assert {path.name for path in results.glob("*.md")} == set(made)
    lines = {line for text in made.values() for line in text.splitlines()}
    known = {interval for line in lines for interval in re.findall(INTERVAL, line)}
    for page, tables, intervals in (("README.md", 7, 2), ("docs/compare.md", 120, 50)):
        text = (ROOT / page).read_text("utf-8")
        text = text.split("\n## Quick start")[0] if page == "README.md" else text
        shown = [line for line in text.splitlines() if line.count("|") > 4]  # a claim has two cells
        assert len(shown) >= tables and not set(shown) - lines
        told = re.findall(INTERVAL, " ".join(line for line in text.splitlines() if line not in shown))
        assert len(told) >= intervals and not set(told) - known
    evidence.draw(tmp_path)
    drawn = {path.name for path in results.iterdir() if path.suffix in (".png", ".svg")}
    assert {path.name for path in tmp_path.iterdir()} == drawn


def test_what_is_concluded():
    """red: one-sided; a degree of freedom more; Holm's m for m - k; a smaller p after a larger one; quotients of
    accuracies"""
    for seeds, least in enumerate(frontier.STUDENT[:-1], 2):
        values = np.arange(seeds) - (seeds - 1) / 2
        values += least * values.std(ddof=1) / math.sqrt(seeds)
        assert evidence.chance(values.tolist()) == pytest.approx(0.05, abs=2e-4)
    assert evidence.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    rows = [
        {"method": method, "beta": 0.1, "seed": seed, "kl": value, "accuracy": value}
        for method, values in {"dpo": (1.0, 2.0, 3.0), "kto": (2.0, 5.0)}.items()
        for seed, value in enumerate(values)
    ]
    text = evidence.family(rows, {"kl": [("kto", "dpo"), ("tdpo1", "dpo")], "accuracy": [("kto", "dpo")]})
    quotient, difference = text.splitlines()[2:]  # tdpo1 has no row
    assert "| 2 | 2.00 2.50 | 2.24 (0.54 to 9.23) |" in quotient and "| 2 | +1.000 +3.000 | +2.000" in difference


def test_what_is_asked_for_is_what_is_run():
    """red: methods that were not named, at the largest beta; a named one left out there"""
    asked = [controlled.parse_args(flags.split()).runs for flags in ("--methods dpo kto", "--methods kto --betas 3")]
    assert asked[0][-1] == ("dpo", controlled.STRONG) and {method for method, _ in asked[0]} == {"dpo", "kto"}
    assert asked[1] == [("kto", 3.0)]
