"""Cached reference values against a live reference: the real scripts, on 1 and 2 processes.

A comment `red:` names a change that turns the test red.
"""

import contextlib
import fcntl
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch
from test_config import exit_code, write_model
from transformers import AutoConfig, AutoModelForCausalLM

import align
import model
import references

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("kto", "ra_dpo1", "tdpo2", "ppo", "grpo")
ALL = [(kind, where, recomputed) for kind in ("full", "lora") for where in ("live", "kept") for recomputed in ("none", "full")]
ALL += [("lora", "model", recomputed) for recomputed in ("none", "full")]  # "live" is the policy with its adapters off
BF16 = ("ra_dpo1", "--dtype", "bfloat16")
# kto's live partners, in the order of the data as the cached ones
DATA_ORDER = ["None if kept else args.seed", "None"]


def flags(root, out, *more, steps=3):
    argv = ["--model", root / "base", "--data", root / "rows.jsonl", "--eval-data", root / "held_out.jsonl"]
    argv += ["--out", out, "--steps", steps, "--batch-size", 4, "--lr", 1e-2, "--warmup-steps", 0]
    argv += ["--adam-eps", 1e-6, "--max-length", 128, "--dtype", "float32", "--device", "cpu", "--seed", 3]
    argv += ["--token-cache", root / "cache", "--tokens-per-microbatch", 300, *more]
    return [str(part) for part in argv]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model and short rows of HH."""
    root = tmp_path_factory.mktemp("references")
    torch.manual_seed(0)
    base = write_model(root / "base", num_hidden_layers=2, initializer_range=0.1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    shutil.copytree(base, root / "copy")
    rows = (ROOT / "examples" / "hh_test.jsonl").read_text(encoding="utf-8").splitlines()
    short = sorted(rows, key=len)
    (root / "rows.jsonl").write_text("".join(f"{row}\n" for row in short[:20:2]), encoding="utf-8")
    (root / "held_out.jsonl").write_text("".join(f"{row}\n" for row in short[1:12:2]), encoding="utf-8")
    return root


def job(root, name, *more, mutation=None):
    return {"script": "align.py", "argv": flags(root, root / name, *more), "mutation": mutation}


@pytest.fixture(scope="module", params=(1, 2))
def runs(root, request):
    """Where every run of so many processes is."""
    processes = request.param
    kept = ["--cache-reference", root / f"kept{processes}"]
    where = {"live": [], "kept": kept, "model": ["--reference", root / "copy"]}
    jobs = []
    for kind, place, recomputed in ALL:
        more = ["--activation-checkpointing", recomputed, *where[place]]
        more += ["--lora-rank", 3] if kind == "lora" else []
        jobs.append(job(root, f"{kind}-{place}-{recomputed}-{processes}", *more))
    for loss in LOSSES * (processes == 1):
        plain = job(root, f"{loss}-live-1", "--loss", loss, mutation=DATA_ORDER if loss == "kto" else None)
        jobs += [plain, job(root, f"{loss}-kept-1", "--loss", loss, *kept)]
    for place in ("live", "kept") * (processes == 1):
        jobs.append(job(root, f"bf16-{place}-1", "--loss", *BF16, *where[place]))
    launch(root, jobs, processes)
    return processes


def same(one, other, tolerance):
    """Losses, metrics and gradients of two runs."""
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert len(rows[0]) == len(rows[1]) == 5
    for mine, theirs in zip(*rows):
        told = [key for key in mine if key in theirs and not key.endswith(("_s", "mem_gb"))]
        assert {"loss", "rewards/accuracies"} <= set(told)
        for key in told:
            if isinstance(mine[key], float):
                assert mine[key] == pytest.approx(theirs[key], rel=tolerance, abs=tolerance), (one, key)
    for mine, theirs in zip(*[torch.load(run / "gradients.pt") for run in (one, other)]):
        assert mine.keys() == theirs.keys()
        for key in mine:
            gap = (mine[key] - theirs[key]).norm()
            assert gap <= tolerance * mine[key].norm() + 1e-7, (one, key)


@pytest.mark.parametrize("kind", ("full", "lora"))
def test_every_way_to_have_a_reference_gives_the_plain_run(root, runs, kind):
    # red: of_reference one place off; the cache of another example's partner; adapters on while it is filled;
    # rank 1's values not written
    for _, place, recomputed in [way for way in ALL if way[0] == kind]:
        same(root / f"{kind}-live-none-1", root / f"{kind}-{place}-{recomputed}-{runs}", 1e-6 if runs == 1 else 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_kind_of_loss_learns_from_what_is_cached(root, runs, loss):
    # red: partners of the epoch's order (kto); states cast to bfloat16, or the policy's head (ra_dpo1, tdpo2)
    if runs == 1:
        same(root / f"{loss}-live-1", root / f"{loss}-kept-1", 1e-6)


def test_in_bf16_what_is_cached_is_what_a_live_model_says_to_rounding(root, runs):
    # red: states kept in another dtype than the body's
    if runs == 1:
        same(root / "bf16-live-1", root / "bf16-kept-1", 2e-2)


def test_a_start_may_differ_from_its_cached_self_by_rounding_alone(root, tmp_path):
    # red: TOLERANCE of a whole answer; no check with a cache
    argv = flags(root, tmp_path / "run", "--cache-reference", tmp_path / "kept", steps=1)
    assert exit_code(align.main, [*argv, "--cache-reference-only", "true"]) is None
    (logps,) = [path for path in (tmp_path / "kept").glob("*/logps") if path.stat().st_size > 1000]
    values = np.frombuffer(logps.read_bytes(), "<f4")
    allowed = references.TOLERANCE["float32"]
    for part, refused in ((0.5, False), (2.0, True)):
        logps.write_bytes((values + part * allowed).astype("<f4").tobytes())
        with pytest.raises(RuntimeError, match="at step 0") if refused else contextlib.nullcontext():
            assert exit_code(align.main, [*argv, "--out", str(tmp_path / f"{part}")]) is None


def test_a_model_that_is_cached_is_never_loaded(root, runs, tmp_path, monkeypatch):
    # red: the reference loaded, or the policy copied, though nothing is missing; --cache-reference-only that
    # trains; a cache of another dtype, of other weights, or of fewer ids taken for this one
    other = write_model(tmp_path / "other", num_hidden_layers=1, initializer_range=0.1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    argv = flags(root, tmp_path / "run", "--cache-reference", tmp_path / "kept", "--reference", other, steps=1)
    asked, outline = [], model.outline
    monkeypatch.setattr(model, "outline", lambda path, *more, **how: asked.append(path) or outline(path, *more, **how))
    monkeypatch.setattr(model, "copied", None)
    assert exit_code(align.main, [*argv, "--cache-reference-only", "true"]) is None
    assert asked.count(str(other)) == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert exit_code(align.main, argv) is None
    assert exit_code(align.main, [*argv, "--loss", "ipo", "--out", str(tmp_path / "ipo")]) is None
    assert asked.count(str(other)) == 1
    folders = set((tmp_path / "kept").glob("*/"))
    for more in (["--dtype", "bfloat16"], ["--reference", str(root / "base")], ["--cache-hidden", "true"]):
        assert exit_code(align.main, [*argv, "--out", str(tmp_path / more[0]), *more]) is None
        grown = set((tmp_path / "kept").glob("*/"))
        assert len(grown) > len(folders)
        folders = grown


def test_a_killed_fill_goes_on(root, tmp_path, monkeypatch, capsys):
    # red: _missing of the first token alone; a fill that begins anew; NaN read as a value; a head for each split
    argv = flags(root, tmp_path / "run", "--cache-reference", tmp_path / "kept", "--loss", "tdpo1", steps=1)
    argv += ["--cache-reference-only", "true"]
    assert exit_code(align.main, argv) is None
    logps = max((tmp_path / "kept").glob("*/logps"), key=lambda path: path.stat().st_size)  # of the training rows
    folder, whole = logps.parent, logps.read_bytes()
    states = (folder / "states").read_bytes()
    holes = np.frombuffer(whole, "<f4").copy()
    holes[[5, 70]] = np.nan  # of two examples
    logps.write_bytes(holes.tobytes())
    rows = []
    monkeypatch.setattr(references, "_write", lambda cache, waiting, write=references._write: rows.extend(waiting) or write(cache, waiting))
    given, ready = [], references.ready
    monkeypatch.setattr(references, "ready", lambda *inputs: given.extend(ready(*inputs)) or given)
    capsys.readouterr()
    assert exit_code(align.main, argv) is None
    assert "8 of 10 examples cached" in capsys.readouterr().out
    assert given[0].head is given[1].head is not None
    assert logps.read_bytes() == whole and (folder / "states").read_bytes() == states
    assert 0 < sum(len(places) for places, _, _ in rows) < len(holes) / 2


def test_who_waits_for_another_run_says_so_and_meets_all_ranks_meanwhile(root, tmp_path, monkeypatch, capsys):
    # red: flock without LOCK_NB: rank 0 alone waits, and the others' collective gives up
    argv = flags(root, tmp_path / "run", "--cache-reference", tmp_path / "kept", steps=1)
    argv += ["--cache-reference-only", "true"]
    assert exit_code(align.main, argv) is None
    assert "waiting" not in capsys.readouterr().out
    (path,) = (tmp_path / "kept").glob("*.lock")
    other, met = open(path, "a"), []
    fcntl.flock(other, fcntl.LOCK_EX)
    gathered, find = references.fsdp.gathered, references.find

    def found(*inputs):
        threading.Timer(0.5, other.close).start()
        monkeypatch.setattr(references.fsdp, "gathered", lambda text, *more: met.append(text) or gathered(text, *more))
        return find(*inputs)

    monkeypatch.setattr(references, "find", found)
    monkeypatch.setattr(references, "WAIT", 0.1)
    assert exit_code(align.main, argv) is None
    assert other.closed and met.count(references.HELD) > 1
    said = capsys.readouterr().out
    assert said.count(f"{tmp_path}/kept: {references.HELD}; waiting for it") == 1 and "10 of 10 examples" in said


def test_what_cannot_be_cached_is_one_line(root, tmp_path, capsys, monkeypatch):
    cases = {
        "--cache-hidden true needs --cache-reference DIR": ["--cache-hidden", "true"],
        "--loss simpo takes no --cache-reference": ["--loss", "simpo", "--cache-reference", tmp_path / "k"],
        "--cache-reference goes not with --sync-reference-every": [
            "--cache-reference", tmp_path / "k", "--sync-reference-every", 2
        ],
    }  # fmt: skip
    for said, more in cases.items():
        assert exit_code(align.main, flags(root, tmp_path / "run", *more)) == 2
        assert said in capsys.readouterr().err
    more = ["--cache-reference", tmp_path / "k", "--cache-hidden", "true"]
    monkeypatch.setattr(references.shutil, "disk_usage", lambda place: type("Disk", (), {"free": 30_000}))
    assert exit_code(align.main, flags(root, tmp_path / "run", *more)) == 2
    assert "--yes true" in capsys.readouterr().err and not list((tmp_path / "k").glob("*/"))
    (tmp_path / "file").write_text("")
    assert exit_code(align.main, flags(root, tmp_path / "run", "--cache-reference", tmp_path / "file")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --cache-reference") and error.count("\n") == 1


def test_a_reference_of_nan_is_refused(root, tmp_path, capsys, monkeypatch):
    # red: ready without its second look
    states = references.hidden_states
    monkeypatch.setattr(references, "hidden_states", lambda *inputs: states(*inputs) * np.nan)
    assert exit_code(align.main, flags(root, tmp_path / "run", "--cache-reference", tmp_path / "k")) == 2
    assert "not finite in 10 examples" in capsys.readouterr().err
