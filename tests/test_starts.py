"""The starting points of configs/hh_smollm2.toml, and bench/starts.py, which tries them, on a tiny model; the
table of bench/gpu.py, on a CPU.

`red:` names a change of the code that turns a test red.
"""

import json
import math
import re
import sys

import pytest
from conftest import ROOT
from test_nodes import base  # noqa: F401  a tiny model, pairs, and a `python` without the imports

import align
from objective import LOSSES

sys.path.insert(0, str(ROOT / "bench"))
import gpu  # noqa: E402
import starts  # noqa: E402

CONFIG = str(starts.CONFIG)


def test_every_loss_has_a_starting_point():
    """red: a loss without one, a flag that the loss does not take, the keys above the table after its own."""
    assert set(starts.STARTS) == {*LOSSES, "sft", "csft"}
    shared = vars(align.parse_args([CONFIG]))
    for loss in LOSSES:
        args = align.parse_args([CONFIG, "--loss", loss])
        align.make_objective(args)
        own = starts.STARTS[loss]
        assert {name: getattr(args, name) for name in own} == own
        assert [args.lr, args.batch_size] == [own.get(name, shared[name]) for name in ("lr", "batch_size")]
    given = align.parse_args([CONFIG, "--loss=kto", "--loss", "simpo", "--lr", "0.5", "--beta", "3"])
    assert (given.loss, given.lr, given.beta, given.gamma) == ("simpo", 0.5, 3.0, 1.0)
    assert align.parse_args([CONFIG, "--loss", "ra_dpo1", "--risk", "erm"]).risk_aversion == 1.0


def cells(text):
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"]
    lines = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(lines[0], row)) for row in lines[2:]}


def test_starting_points_are_tried_once(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    """red: a loss that is there run again, a failure recorded or without its exit code, the last step for
    the first."""
    argv = ["--model", base / "model", "--weights", "random", "--results", tmp_path / "starts.jsonl"]
    argv += ["--out", tmp_path / "out", "--steps", "6", "--eval-examples", "8", "--device", "cpu"]
    argv += ["--data", base / "pairs.jsonl", "--eval-data", base / "pairs.jsonl", "--max-length", "64"]
    argv = [str(part) for part in [*argv, "--batch-size", "6", "--lr", "1e-3", "--dtype", "float32"]]

    def told(*more):
        with pytest.raises(SystemExit) as end:
            starts.main([*argv, *more])
        return end.value.code, cells(capsys.readouterr().out)

    monkeypatch.setattr(sys, "executable", f"{base}/bin/python")
    code, first = told("--losses", "kto", "sft", "--jobs", "2")
    assert code == 0 and list(first) == ["kto", "sft"]
    assert first["kto"]["first"] == first["kto"]["held out, before"] == "0.5"  # nothing has moved
    assert (first["kto"]["lr"], first["kto"]["batch"]) == ("0.001", "6")
    assert first["kto"]["its own"] == "beta 0.1, desirable_weight 1, undesirable_weight 1"
    assert first["sft"]["KL chosen / rejected"] == "- / -" and first["sft"]["accuracy"] == "-"
    assert first["sft"]["status"] == "sound" and float(first["sft"]["last 5"]) < float(first["sft"]["first"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["kto.log", "sft.log", "tokens"]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert told("--losses", "sft", "kto")[0] == 0  # from the results
    code, second = told("--losses", "dpo", "kto")
    assert code == 1 and second == {"kto": first["kto"]}
    assert len((tmp_path / "starts.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def write(folder, train, held_out):
    """A run of a pair loss as it lies there: training rows, and the held-out losses."""
    rows = [{"split": "train", "step": k, **row} for k, row in enumerate(train)]
    rows += [{"split": "eval", "step": k, "pairs": 32, "loss": loss} for k, loss in enumerate(held_out)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "args.json").write_text('{"lr": 1e-3, "batch_size": 8, "beta": 0.1}')
    return starts.measured(folder, ["beta", "lr"])


def steps(*numbers, norms=(1.0,)):
    return [{"loss": loss, "grad_norm": norms[k % len(norms)]} for k, loss in enumerate(numbers)]


CASES = {  # losses of the steps -> held out, before and after -> status; the noise is 0.1 where they zigzag
    "falls": (steps(1.0, 1.2, 1.0, 1.2, 1.0), (1.0, 0.8), "sound"),
    "falls a little": (steps(1.0, 1.2, 1.0, 1.2, 1.0), (1.0, 0.95), "noisy"),
    "rises a little": (steps(1.0, 1.2, 1.0, 1.2, 1.0), (1.0, 1.05), "noisy"),
    "rises": (steps(1.0, 1.2, 1.0, 1.2, 1.0), (1.0, 1.2), "needs care"),
    "a norm explodes": (steps(1.0, 0.9, 0.8, norms=(1.0, 11.0, 1.0)), (1.0, 0.5), "needs care"),
    "norms are large": (steps(1.0, 0.9, 0.8, norms=(7e4, 9e4, 8e4)), (1.0, 0.5), "sound"),
    "not finite": ([*steps(1.0, 0.9), {"loss": "nan", "skipped": 1}], (1.0, 0.5), "needs care"),
    "infinite at the end": (steps(1.0, 0.9), (1.0, "inf"), "needs care"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_status_of_a_run(case, tmp_path):
    """red: any clause of the rule away; the noise without its root of (batch / held out) or of 2."""
    train, held_out, wanted = CASES[case]
    row = write(tmp_path, train, held_out)
    assert starts.status(row) == wanted
    if case == "falls":
        assert row["noise"] == pytest.approx(0.2 / math.sqrt(2) * math.sqrt(8 / 32))
        assert row["own"] == {"beta": 0.1} and row["last"] == pytest.approx(1.08)


def test_the_table_of_a_gpu_is_made_on_a_cpu(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    """red: the warm-up counted; a row that failed left out; 6 N for adapters; --yes for a live reference; the limit of
    minutes not asked."""
    monkeypatch.setattr(sys, "executable", f"{base}/bin/python")
    argv = ["--device", "cpu", "--models", "tiny", "--rows", "dpo, cached", "dpo, LoRA", "--steps", "2"]
    argv += ["--warmup", "1", "--flags", "--dtype float32 --activation-checkpointing none"]
    gpu.main([*argv, "--out", str(tmp_path / "new" / "folder")])
    said = capsys.readouterr().out
    assert (tmp_path / "new" / "folder" / "gpu.md").read_text(encoding="utf-8") in said
    rows = json.loads(said.splitlines()[-1])["rows"]
    assert list(rows) == ["tiny, dpo, cached", "tiny, dpo, LoRA"]
    cached, adapted = rows.values()
    assert cached["tokens"] == adapted["tokens"] and {cached["how"], adapted["how"]} == {"none"}
    for row, share in ((cached, 1), (adapted, 6 / 4)):  # with a live reference 2 N of 6 or of 4 more
        plain, with_reference, _ = row["mfu"]
        assert plain > 0 and row["tok_per_s"] > row["tokens"] / row["step_s"] / 3
        assert with_reference == pytest.approx(plain * share)
    table = [line for line in said.splitlines() if line.startswith("| tiny")]
    assert len(table) == 2 and all(line.count("|") == 12 for line in table)
    few = [*argv[:4], "--steps", "1", "--warmup", "0"]
    gpu.main([*few, "--rows", "sft", "--flags", "--lr -1"])
    assert "| tiny | sft | error: --lr: must be > 0" in capsys.readouterr().out
    gpu.main([*few, "--rows", "dpo", "--flags", "--memory 0.05"])
    refused = r"^\| tiny \| dpo \| refused: needs [\d.]+ GB a rank, there are 0.0\d+ \|"
    assert re.search(refused, capsys.readouterr().out, re.M)
    gpu.main([*few, "--rows", "dpo", "sft", "--minutes", "0"])
    assert "\nNot begun within 0 minutes: tiny, dpo; tiny, sft.\n" in capsys.readouterr().out


def test_the_plain_command_profiles_and_meets_trl_where_it_is():
    """red: a default of []; the interpreter not asked; what is chosen replaced."""
    both = ["--trl-python", "/bin/true"]
    for argv, wanted in ((both, ["1b"]), ([*both, "--models", "tiny"], []), ([*both, "--trl", "8b"], ["8b"])):
        args = gpu.parse_args(argv)
        assert (args.trl, args.without_trl) == (wanted, "")
        assert args.profile == (wanted if wanted != ["8b"] else ["1b"])
    args = gpu.parse_args(["--trl-python", "/bin/false", "--profile"])
    assert args.trl == args.profile == [] and args.without_trl.startswith("/bin/false has no trl")
