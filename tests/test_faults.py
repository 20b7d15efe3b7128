"""Nothing is lost: disks that are full or not shared, checkpoints that are damaged, incomplete or of another
course, weights that are not finite, models and caches that changed, kills.

The real scripts, in this process where one will do. What needs two ranks runs in one launch of this file by
torchrun, scenario after scenario (`SCENARIOS`). `red:` names a change that turns a test red.
"""

import argparse
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_config import exit_code, tree, write_model
from transformers import LlamaConfig

import align
import checkpoint
import export
import fsdp
import model
import rundir
import sft
import shards
import signals

PAIRS = "".join(json.dumps({"prompt": f"q{k}", "chosen": f"yes {k}", "rejected": "no"}) + "\n" for k in range(6))
LIMIT = 2**21  # bytes: a file of weights fits, one of a checkpoint, three times as large, does not


# ---- two ranks
# -----------------------------------------------------------------------------------------------------------


def slow_rank(out, lm):
    """The newest checkpoint is damaged, and rank 1 comes when rank 0 has put it aside."""
    time.sleep(2 * fsdp.ranks()[0])
    return resumed(out, "auto", lm)


def own_disk(out, lm):
    """Rank 1's --out is another directory of the same name."""
    return resumed(out / f"disk{fsdp.ranks()[0]}", "auto", lm)


def other_checkpoint(out, lm):
    """Rank 1 sees a step of the same name, which is another one."""
    return resumed(out / f"disk{fsdp.ranks()[0]}", "step-2", lm)


def blind(out, lm):
    """The same, at the start of a run."""
    try:
        rundir.take(argparse.Namespace(out=out / f"disk{fsdp.ranks()[0]}"), fsdp.ranks()[0], torch.device("cpu"))
    except ValueError as error:
        return str(error)


def shared(out, lm):
    return rundir.take(argparse.Namespace(out=out), fsdp.ranks()[0], torch.device("cpu")) is not None


def lost_file(out, lm):
    return checkpoint.save(out / f"disk{fsdp.ranks()[0]}", 3, *lm, {}, 2)


def full_disk(out, lm):
    """Rank 1 cannot write 1 kB, then it can."""
    found = []
    for limit in (1000, resource.RLIM_INFINITY):
        with limited(limit if fsdp.ranks()[0] else resource.RLIM_INFINITY):
            rundir.save(argparse.Namespace(out=out, keep_last=2, save_async=False), 3, *lm, {})
        fsdp.barrier()
        found.append([sorted(p.name for p in out.iterdir()), json.loads((out / "status.json").read_text())])
        fsdp.barrier()
    return found


def full_disk_behind(out, lm):
    """The same with --save-async, while the ranks go on with collectives of their own."""
    args, found = argparse.Namespace(out=out, keep_last=2, save_async=True), []
    for limit in (1000, resource.RLIM_INFINITY):
        with limited(limit if fsdp.ranks()[0] else resource.RLIM_INFINITY):
            said = [rundir.save(args, 3, *lm, {})]
            for number in range(50):
                assert fsdp.largest(number, torch.device("cpu")) == number
            said.append(rundir.settle(args))
        fsdp.barrier()
        found.append([said, sorted(p.name for p in out.iterdir()), json.loads((out / "status.json").read_text())])
        fsdp.barrier()
    return found


def full_disk_of_rank_zero(out, lm):
    with limited(1000 if fsdp.ranks()[0] == 0 else resource.RLIM_INFINITY):
        return checkpoint.save(out, 3, *lm, {}, 2)


def diverged(out, lm):
    """One number of rank 1's shard."""
    weight = lm[0].lm.model.norm.weight.to_local()
    before = weight.clone()
    weight.data[-1] = float("nan" if fsdp.ranks()[0] else 1.0)
    try:
        rundir.save(argparse.Namespace(out=out, keep_last=2, save_async=False), 3, *lm, {})
    except SystemExit as end:
        return end.code
    finally:
        weight.data.copy_(before)


def not_finite_on_one(out, lm):
    """The losses of rank 1's second micro-batch."""
    works = [argparse.Namespace(groups=[k]) for k in (4, 5)]
    sums = [{"loss": torch.tensor([number, 1.0])} for number in (1.0, float("nan") if fsdp.ranks()[0] else 1.0)]
    args = argparse.Namespace(out=out, skip_non_finite=1)
    rows = [argparse.Namespace(weight=1.0)] * 5 + [Weighted([1], [[2]], 1.0)]
    row = {"loss": float("nan"), "grad_norm": 1.0}
    said = rundir.skips(args, 0, row, lm[1], works, sums, rows)
    fsdp.barrier()
    return [said, json.loads((out / "status.json").read_text())]


def own_file(out, lm):
    """The files that this rank reads for the record of a checkpoint."""
    read, real = [], checkpoint._checksum
    checkpoint._checksum = lambda path: read.append(path.name) or real(path)
    problem = checkpoint.save(out, 3, *lm, {}, 2)
    checkpoint._checksum = real
    return [problem, sorted(read), checkpoint._damage(out / "step-3")]


def own_file_at_resume(out, lm):
    """The files that this rank verifies of step-4, whose damage rank 0 sees, and of step-2."""
    read, real = [], checkpoint._checksum
    checkpoint._checksum = lambda path: read.append(f"{path.parent.name}/{path.name}") or real(path)
    found = resumed(out, "auto", lm)
    checkpoint._checksum = real
    return [found, read]


def damaged_elsewhere(out, lm):
    """The damage is in the file of rank 1, which rank 0 does not read."""
    if fsdp.ranks()[0]:
        damage(out / "step-2", "__1_0.distcp")
    fsdp.barrier()
    step = resumed(out, "auto", lm)
    fsdp.barrier()
    return [step, sorted(path.name for path in out.glob(".aside-*"))]


def unreadable(out, lm):
    """The disk fails rank 1."""
    real = checkpoint._checksum

    def fails(path):
        if path.name == "__1_0.distcp":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    checkpoint._checksum = fails
    found = resumed(out, "step-2", lm)
    checkpoint._checksum = real
    return [found, sorted(path.name for path in out.glob(".aside-*"))]


def large_export(out, lm):
    """What a rank's memory grows by, at its peak, for half of a model of LARGE and its export; the size of the
    whole in fp32. The half is the rank's number, and 1."""
    policy = model.in_training(shards.skeleton(str(out.parent / "model"), LlamaConfig(**LARGE), False))
    before = resident("VmRSS")
    fsdp.shard(policy, policy.blocks, torch.bfloat16, torch.device("cpu"))
    shards.fill(policy, None, torch.device("cpu"))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.to_local().fill_(fsdp.ranks()[0] + 1)
    tokenizer = argparse.Namespace(save_pretrained=lambda place: None)
    export.export(policy, tokenizer, out / "final", torch.bfloat16)
    return [resident("VmHWM") - before, sum(4 * parameter.numel() for parameter in policy.parameters())]


LARGE = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 11, "num_attention_heads": 8}
LARGE |= {"intermediate_size": 2048, "tie_word_embeddings": True, "eos_token_id": 2}


def resident(key):
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024


class Weighted(NamedTuple):
    prompt: list
    completions: list
    weight: float


SCENARIOS = [slow_rank, own_disk, other_checkpoint, blind, shared, lost_file, full_disk, diverged]
SCENARIOS += [full_disk_of_rank_zero, not_finite_on_one, own_file, own_file_at_resume, damaged_elsewhere]
SCENARIOS += [unreadable, full_disk_behind] + [large_export] * (sys.platform == "linux")


def resumed(out, choice, lm):
    """The step, and the sum of a parameter that came with it; or the refusal."""
    try:
        step = checkpoint.resume(out, choice, *lm, {}, (), torch.device("cpu"))
    except (ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return [step, lm[0].lm.model.norm.weight.full_tensor().sum().item()]


class limited:
    """No file grows beyond a size."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def damage(step, name="__0_0.distcp"):
    """Change one byte of its tensors."""
    path = step / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def two_ranks(base):
    """The scenarios, each in a directory with step-2, where the norm is all 2, and step-4; what each rank
    found goes to BASE/found-RANK.json."""
    rank, _, _ = fsdp.init("cpu")
    policy = model.load(str(base / "model"), torch.float32, 64, "random")
    fsdp.shard(policy, policy.blocks, torch.float32, torch.device("cpu"))
    lm = policy, torch.optim.AdamW(policy.parameters(), fused=True)
    fsdp.becomes = functools.partial(fsdp.becomes, seconds=0.5)
    time.sleep = functools.partial(lambda real, seconds: real(min(seconds, 2)), time.sleep)  # fail's is 5
    for step in (2, 4):
        with torch.no_grad():
            policy.lm.model.norm.weight.fill_(step)
        checkpoint.save(base / "made", step, *lm, {}, 2)
    found = {}
    for scenario in SCENARIOS:
        out = base / scenario.__name__
        if rank == 0:
            for place in (out, out / "disk0"):
                shutil.copytree(base / "made", place, dirs_exist_ok=True)
            (out / "disk1").mkdir()
            damage(out / "step-4")
            if scenario is other_checkpoint:
                shutil.copytree(out / "disk0" / "step-4", out / "disk1" / "step-2")
        fsdp.barrier()
        found[scenario.__name__] = scenario(out, lm)
        fsdp.barrier()
    (base / f"found-{rank}.json").write_text(json.dumps(found))
    fsdp.finish()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(directory, what rank 0 found, what rank 1 found, their stderr)."""
    base = tmp_path_factory.mktemp("two")
    write_model(base / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, base], env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    return base, *(json.loads((base / f"found-{rank}.json").read_text()) for rank in (0, 1)), done.stderr


def test_every_rank_opens_the_step_that_rank_zero_names(pair):
    # red: rank 1 chooses from its own listing
    _, zero, one, _ = pair
    assert zero["slow_rank"] == one["slow_rank"] == [2, 64.0]


def test_ranks_that_see_another_disk_stop(pair):
    # red: _find without ranks_where; take without its token; the checksum of the record not compared
    _, zero, one, _ = pair
    for name in ("own_disk", "other_checkpoint"):
        for found in (zero, one):
            assert re.fullmatch(r"ValueError: \S+: rank 0 goes on .+ ranks \[1\] do not see it there", found[name])
    assert "ranks [1] do not see what rank 0 writes there" in zero["blind"] and one["blind"]
    assert (zero["shared"], one["shared"]) == (True, False)  # the lock is rank 0's


def test_a_file_that_another_rank_wrote_elsewhere_is_missed_before_the_rename(pair):
    # red: _publish without its look at the metadata
    base, zero, one, _ = pair
    assert "__1_0.distcp is not there" in zero["lost_file"] and one["lost_file"]
    assert sorted(p.name for p in (base / "lost_file" / "disk0").iterdir()) == ["step-2", "step-4"]
    assert list((base / "lost_file" / "disk1").iterdir()) == []


def test_a_save_that_fails_on_one_rank_costs_nothing_but_itself(pair):
    # red: settle without _told; side_group the usual group; CheckpointException not caught; the leftover not removed; the problem not agreed on
    _, zero, one, stderr = pair
    held = ["disk0", "disk1", "status.json", "step-2", "step-4"]
    for found in (zero, one):
        (names, status), (later, after) = found["full_disk"]
        assert names == held and later == sorted({*held, "step-3"} - {"step-2"})
        assert status["state"] == "running" and status["last_checkpoint"] == "step-4"
        assert "no checkpoint at step 3" in status["reason"] and "reason" not in after
        assert found["full_disk_of_rank_zero"]
        (said, names, status), (after_all, later, after) = found["full_disk_behind"]
        assert said[0] == "" and "rank 1: " in said[1] and names == held and after_all == ["", ""]
        assert "no checkpoint at step 3" in status["reason"] and status["last_checkpoint"] == "step-4"
        assert later == sorted({*held, "step-3"} - {"step-2"}) and "reason" not in after
    assert len(re.findall(r"warning: no checkpoint at step 3: .+; going on\n", stderr)) == 2


def test_weights_that_are_not_finite_on_one_rank_are_not_saved(pair):
    # red: not_finite without its all_reduce; rundir.save without check_weights
    base, zero, one, stderr = pair
    assert zero["diverged"] == one["diverged"] == 2
    assert not (base / "diverged" / "step-3").exists()
    status = json.loads((base / "diverged" / "status.json").read_text())
    assert status["state"] == "failed" and "model.norm.weight" in status["reason"]
    assert "error: after step 2: weights that are not finite (first: model.norm.weight)" in stderr


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(pair):
    # red: skips without fsdp.gathered
    _, zero, one, stderr = pair
    for skipped, said in (zero["not_finite_on_one"], one["not_finite_on_one"]):
        assert skipped and said["skipped"] == 1 and said["state"] == "running"
        assert "(policy, rank 1, examples 5, sha256 of their ids " in said["reason"]
    assert stderr.count("warning: step 0 skipped, 1 of at most 1: ") == 1


def test_each_rank_reads_its_own_file_for_the_record(pair):
    # red: rank 0 reads all; the files not gathered
    _, zero, one, _ = pair
    assert zero["own_file"] == ["", [".metadata", "__0_0.distcp"], ""]
    assert one["own_file"] == ["", ["__1_0.distcp"], ""]


def test_each_rank_verifies_its_own_file(pair):
    # red: _damage without `% world_size != rank`
    _, zero, one, _ = pair
    assert zero["own_file_at_resume"][0] == one["own_file_at_resume"][0] == [2, 64.0]
    for rank, found in enumerate((zero, one)):
        read = [name for name in found["own_file_at_resume"][1] if name.endswith(".distcp")]
        assert read == [f"step-{step}/__{rank}_0.distcp" for step in (4, 2)]
    assert [name for name in one["own_file_at_resume"][1] if name.endswith(".metadata")] == []


def test_damage_that_one_rank_finds_is_agreed_on(pair):
    # red: `gathered` replaced by what this rank found; the damage not handed to _choose; an OSError taken for damage
    base, zero, one, stderr = pair
    for found in (zero, one):
        assert found["damaged_elsewhere"] == [[0, 64.0], [".aside-step-2", ".aside-step-4"]]
    assert f"{base}/damaged_elsewhere/step-2: __1_0.distcp has changed since it was written; passed over" in stderr
    for found in (zero, one):
        assert found["unreadable"][0].endswith("/step-2/__1_0.distcp: Input/output error")
        assert found["unreadable"][1] == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_no_rank_holds_the_model_that_is_exported(pair):
    """Two ranks, a half of the weights each."""
    # red: all of wholes before the first is written (_write_weights); to_local for full_tensor in _whole
    base, *found, _ = pair
    for peak, size in (said["large_export"] for said in found):
        assert 180e6 < size > peak, (peak, size)
    for name, value in load_file(base / "large_export" / "final" / "model.safetensors").items():
        half = len(value) // 2
        assert (value[:half] == 1).all() and (value[half:] == 2).all() and value.dtype == torch.bfloat16, name


# ---- one process
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, pairs, and a run of three steps with all its checkpoints."""
    root = tmp_path_factory.mktemp("faults")
    write_model(root / "start")
    (root / "pairs.jsonl").write_text(PAIRS)
    argv = ["--model", root / "start", "--weights", "random", "--data", root / "pairs.jsonl", "--steps", "1"]
    assert exit_code(sft.main, [*map(str, argv), "--out", f"{root}/first", "--max-length", "64"]) is None
    shutil.copytree(root / "first" / "final", root / "model")
    argv = command(root, root / "run", "--steps", "3", "--save-every", "1", "--keep-last", "5")
    assert exit_code(align.main, argv) is None
    return root


def command(root, out, *more):
    argv = ["--model", root / "model", "--data", root / "pairs.jsonl", "--out", out, "--batch-size", "2"]
    argv += ["--max-length", "64", "--warmup-steps", "0", "--lr", "1e-3", "--dtype", "float32"]
    return [str(part) for part in [*argv, *more]]


@pytest.fixture
def run(root, tmp_path):
    """The run as a kill before its end leaves it."""
    return shutil.copytree(root / "run", tmp_path / "run", ignore=shutil.ignore_patterns("final"))


def names(path):
    return sorted(p.name for p in path.iterdir())


def status(path):
    return json.loads((path / "status.json").read_text())


def refuses(capfd, main, argv, *words):
    capfd.readouterr()
    assert exit_code(main, argv) == 2
    stderr = capfd.readouterr().err
    assert re.fullmatch(r"error: .+\n", stderr), stderr
    assert [word for word in words if str(word) not in stderr] == [], stderr


def test_a_named_resume_puts_newer_steps_aside(root, run, capfd):
    # red: resume without _put_aside
    more = ["--save-every", "1", "--keep-last", "5", "--steps", "2", "--seed", "0"]
    assert exit_code(align.main, command(root, run, *more, "--resume", "step-1")) is None
    found = re.findall(r"warning: \S+/(step-\d) is newer than step-1, .+ (\.aside-step-\d) now\n", capfd.readouterr().err)
    assert found == [("step-2", ".aside-step-2"), ("step-3", ".aside-step-3")]
    assert {".aside-step-2", ".aside-step-3", "step-1", "step-2"} <= set(names(run))
    assert [path.name for path in checkpoint.complete(run)] == ["step-2", "step-1"]


@pytest.mark.parametrize("resume", ["auto", "step-3"])
def test_fewer_steps_than_there_are(root, run, resume, capfd):
    # red: resume without `total`
    before = tree(run)
    refuses(capfd, align.main, command(root, run, "--steps", "2", "--resume", resume), "--steps 2: ", "step-3")
    assert tree(run) == before


def test_an_incomplete_step_is_put_aside_and_written(root, run, capfd):
    # red: save returns where target.exists()
    shutil.rmtree(run / "step-3")
    (run / "step-3").mkdir()
    (run / "step-3" / "__0_0.distcp").write_bytes(b"half")
    argv = command(root, run, "--steps", "3", "--save-every", "1", "--keep-last", "5", "--resume", "auto")
    assert exit_code(align.main, argv) is None
    assert names(run / ".aside-step-3") == ["__0_0.distcp"]
    assert "step-3 is incomplete; it is .aside-step-3 now" in capfd.readouterr().err
    assert [path.name for path in checkpoint.complete(run)] == ["step-3", "step-2", "step-1"]


def test_a_record_that_changed_is_damage_and_not_another_run(root, run, capfd):
    # red: read_record without its checksum
    path = run / "step-3" / "trainer.json"
    path.write_text(path.read_text().replace('"warmup_steps"', '"warmup_stepr"'))
    assert exit_code(align.main, command(root, run, "--steps", "3", "--resume", "auto")) is None
    said = capfd.readouterr()
    assert "step-3: trainer.json: it has changed since it was written; passed over" in said.err
    assert "start at step 2 of 3" in said.out


def test_nobody_leaves_between_two_steps_on_one_batch(root, tmp_path, monkeypatch):
    # red: leave_if_told without ppo_epochs
    asked = []
    monkeypatch.setattr(signals, "heard", lambda: asked.append(0) or signal.SIGTERM * (len(asked) > 1))
    argv = command(root, tmp_path / "run", "--loss", "ppo", "--ppo-epochs", "2", "--steps", "4")
    assert exit_code(align.main, argv) == 143
    assert status(tmp_path / "run")["last_checkpoint"] == "step-2"
    monkeypatch.undo()
    assert exit_code(align.main, [*argv, "--resume", "auto"]) is None


@pytest.mark.parametrize("save_every", [[], ["--save-every", "1"]], ids=["export", "save"])
def test_the_last_update_is_checked(root, tmp_path, save_every, capfd):
    # red: _write without isfinite (export); rundir.save without check_weights (save)
    argv = command(root, tmp_path / "run", "--lr", "1e30", "--weight-decay", "1e30", "--steps", "1", *save_every)
    refuses(capfd, align.main, argv, "finite", "model.")
    assert not {"final", "step-1"} & set(names(tmp_path / "run"))
    assert status(tmp_path / "run")["state"] == "failed" and "finite" in status(tmp_path / "run")["reason"]


@pytest.mark.parametrize("script", [sft, align])
def test_steps_that_are_not_finite_are_skipped_and_counted(root, tmp_path, script, capfd):
    # red: skips returns False; the loops without its `continue`
    argv = command(root, tmp_path / "run", "--lr", "1e30", "--weight-decay", "1e30", "--steps", "9")
    argv += ["--skip-non-finite", "2"]
    refuses_last(capfd, script.main, argv, "error: step ", "(policy, rank 0, examples ")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in lines if "skipped" in row]
    assert [row["skipped"] for row in rows] == [1, 2] and rows[0]["grad_norm"] in ("inf", "nan")
    assert status(tmp_path / "run")["state"] == "failed" and status(tmp_path / "run")["skipped"] == 2


def refuses_last(capfd, main, argv, *words):
    capfd.readouterr()
    assert exit_code(main, argv) == 2
    stderr = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in stderr] == ["warning", "warning", "error"], stderr
    assert [word for word in words if word not in stderr[-1]] == [], stderr


def test_what_was_not_finite():
    # red: _first_not_finite always says policy
    work, good, bad = argparse.Namespace(groups=[0]), torch.tensor([1.0, 1.0]), torch.tensor([float("nan"), 1.0])
    for names, word in ((("rewards/chosen", "kl/chosen"), "reference"), ((), "loss"), (("logps/chosen",), "policy")):
        sums = {name: good for name in ("rewards/chosen", "logps/chosen", "kl/chosen")}
        sums |= {"loss": bad} | {name: bad for name in names}
        found = rundir._first_not_finite(0, [work], [sums], [Weighted([1], [[2]], 1.0)])
        assert found.startswith(f"{word}, rank 0, examples 0, ")


@pytest.mark.parametrize("script", [sft, align])
def test_weights_that_come_not_finite_are_said_to(root, tmp_path, script, capfd):
    # red: shards.fill without refuse_not_finite
    broken = shutil.copytree(root / "model", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    argv = command(root, tmp_path / "run", "--model", broken, "--steps", "0")
    said = "1 weights hold numbers that are not finite (first: model.layers.0.mlp.up_proj.weight)"
    refuses(capfd, script.main, argv, f"error: {broken}: {said}")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(root, run, monkeypatch, capfd):
    # red: begin without check_weights
    real = checkpoint.resume

    def resume(out, choice, policy, *rest):
        step = real(out, choice, policy, *rest)
        next(policy.parameters()).to_local()[5, 5] = float("inf")
        return step

    monkeypatch.setattr(checkpoint, "resume", torch.no_grad()(resume))
    refuses(capfd, align.main, command(root, run, "--steps", "3", "--resume", "auto"), "error: step-3: ", "finite")


CHANGES = {
    "model": "step-3 was made from another --model than there is now",
    "reference": "step-3 was made from another --reference than there is now",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_changed_is_refused_and_one_that_moved_is_not(root, tmp_path, what, capfd):
    # red: made without model.digests; paths compared; fingerprint of config.json alone
    places = [shutil.copytree(root / "model", tmp_path / name) for name in ("model", "reference")]
    flags = ["--model", places[0], "--reference", places[1], "--save-every", "3", "--steps"]
    assert exit_code(align.main, command(root, tmp_path / "run", *flags, "3")) is None
    shutil.rmtree(tmp_path / "run" / "final")
    moved = (tmp_path / what).rename(tmp_path / "elsewhere")
    argv = [part.replace(str(tmp_path / what), str(moved)) for part in command(root, tmp_path / "run", *flags, "4")]
    path = moved / "model.safetensors"
    before = path.read_bytes()
    save_file({name: value * 1.001 for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert path.stat().st_size == len(before)
    refuses(capfd, align.main, [*argv, "--resume", "auto"], CHANGES[what])
    path.write_bytes(before)
    assert exit_code(align.main, [*argv, "--resume", "auto"]) is None


def test_a_hole_in_a_token_cache_is_seen(root, tmp_path):
    # red: _complete looks at sizes
    cache = tmp_path / "tokens"
    argv = command(root, tmp_path / "run", "--steps", "0", "--token-cache", cache)
    assert exit_code(align.main, argv) is None
    ids = next(cache.glob("*/ids"))
    before = ids.read_bytes()
    ids.write_bytes(bytes(len(before)))
    assert exit_code(align.main, argv) is None
    assert ids.read_bytes() == before


def test_a_full_disk_costs_checkpoints_and_not_the_run(root, tmp_path, capfd):
    # red: rundir.save exits; remove_leftovers left out; the leftover of a failed save not removed
    out = tmp_path / "run"
    (out / ".tmp-step-9").mkdir(parents=True)
    argv = command(root, out, "--save-every", "1", "--steps", "2")
    with limited(LIMIT):
        assert exit_code(align.main, argv) is None
    assert names(out) == [".lock", "args.json", "final", "metrics.jsonl", "status.json", "tokenizer"]
    assert len(re.findall(r"warning: no checkpoint at step \d: .+; going on\n", capfd.readouterr().err)) == 2
    assert status(out)["state"] == "done"
    (out / "final").rename(out / "final-of-before")
    assert exit_code(align.main, [*argv, "--resume", "auto"]) is None  # nothing is in its way
    assert {"step-1", "step-2"} <= set(names(out))


def test_a_row_that_does_not_fit_costs_nothing_but_itself(root, tmp_path, monkeypatch, capfd):
    # red: log_row without its except, or without os.truncate; the warning at every row; show without its except
    out = tmp_path / "run"
    argv = command(root, out, "--steps", "6", "--eval-data", root / "pairs.jsonl", "--eval-every", "1")
    real, rows, sizes = rundir.log_row, [], []

    def log_row(place, row):
        path = out / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        rows.append((row["split"], row["step"]))
        full = row["step"] in (2, 3)
        with limited(size + 50 if full else resource.RLIM_INFINITY):  # a part of the row fits, as on a disk
            real(place, row)
        sizes.append(path.stat().st_size)
        assert not full or sizes[-1] == size

    monkeypatch.setattr(rundir, "log_row", log_row)
    assert exit_code(align.main, argv) is None
    said = capfd.readouterr().err
    assert said.count("a row is lost: File too large; going on") == said.count("warning") == 1
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"]) for row in found] == [row for row in rows if row[1] not in (2, 3)]
    assert status(out)["state"] == "done" and status(out)["lost_rows"] == len(rows) - len(found) == 4


def test_what_is_said_and_sampled_on_a_full_disk_costs_nothing_but_itself(root, tmp_path, monkeypatch):
    # red: show without its except; tell, or _warn, without OSError
    out, log = tmp_path / "run", tmp_path / "log"
    argv = command(root, out, "--steps", "2", "--eval-data", root / "pairs.jsonl", "--sample-prompts", "1")
    whole, export, disk = rundir.begin, align.export.export, limited(1)

    def begin(*args):
        whole(*args)
        (out / "samples").touch()  # where a folder should be made
        monkeypatch.setattr(align.export, "save_tokenizer", lambda *rest: None)
        disk.__enter__()

    def room(*args):
        disk.__exit__()
        monkeypatch.undo()
        return export(*args)

    with open(log, "w") as file:
        for name, value in ((rundir, "begin"), begin), ((align.export, "export"), room):
            monkeypatch.setattr(*name, value)
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)
        try:
            assert exit_code(align.main, argv) is None
        finally:
            disk.__exit__()
    assert status(out)["state"] == "done" and status(out)["lost_rows"] == 4
    assert (out / "final").is_dir() and not (out / "samples").is_dir()


@pytest.mark.parametrize("limit, place", [(LIMIT // 2, "final"), (LIMIT // 4, "tokenizer")])
def test_what_does_not_fit_is_one_line(root, tmp_path, limit, place, capfd):
    # red: SafetensorError not caught; failing without write_status; save_tokenizer without its except
    out = tmp_path / "run"
    with limited(limit):
        refuses(capfd, align.main, command(root, out, "--steps", "1"), f"{out}/{place}: ")
    assert status(out)["state"] == "failed" and f"{out}/{place}" in status(out)["reason"]
    assert not [name for name in names(out) if "final" in name]


def test_a_disk_on_which_no_checkpoint_fits(root, tmp_path, monkeypatch, capfd):
    # red: begin without its comparison; a comparison without --save-every; take without room, or after mkdir
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 10**6))
    argv = command(root, tmp_path / "run", "--steps", "1")
    said = f"{tmp_path / 'run'} has 0.003 GB free, one checkpoint needs about 0.0032 GB"
    for script in (align, sft):
        refuses(capfd, script.main, [*argv, "--save-every", "1"], said)
        assert not (tmp_path / "run").exists()
    assert exit_code(align.main, argv) is None and said in capfd.readouterr().out


def test_a_run_in_use_is_not_touched(root, run, capfd):
    # red: resume before take
    damage(run / "step-3")
    before = tree(run)
    holder = rundir.take
    argv = command(root, run, "--steps", "3", "--resume", "auto")
    fsdp.init("cpu")
    lock = holder(argparse.Namespace(out=str(run)), 0, torch.device("cpu"))
    fsdp.finish()
    refuses(capfd, align.main, argv, f"{run}: in use by another run")
    assert tree(run) == before
    lock.close()


def test_a_kill_while_pruning_leaves_no_half_of_a_checkpoint(run, monkeypatch):
    # red: rmtree of the step itself
    def killed(path, **options):
        next(Path(path).glob("*.distcp")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint._prune(run, 2)
    assert [path.name for path in checkpoint.complete(run)] == ["step-3", "step-2"]
    assert not (run / "step-1").exists()
    checkpoint.remove_leftovers(run)
    assert not [name for name in names(run) if "removed" in name]


@pytest.mark.parametrize("kind", ["status", "final", "final a folder", "link", "tokenizer"])
def test_what_lies_in_a_run_directory_is_of_another_kind(root, run, kind, capfd):
    # red: write_status with json.loads; check_run without its look at final/; _check_target without lexists
    argv = command(root, run, "--steps", "3", "--resume", "auto")
    if kind == "status":
        (run / "status.json").unlink()
        (run / "status.json").symlink_to("/dev/zero")  # would be read for ever
        assert exit_code(align.main, argv) is None and status(run)["state"] == "done"
        return
    place = run / ("tokenizer" if kind == "tokenizer" else "final")
    shutil.rmtree(place, ignore_errors=True)
    place.symlink_to("final") if kind == "link" else place.mkdir() if "folder" in kind else place.touch()
    refuses(capfd, align.main, argv, f"error: {place}: ")


def test_the_flag_that_says_most_is_named(root, run, capfd):
    # red: _compare by name alone (--beta None); the digests before the flags
    more = ["--steps", "3", "--resume", "auto"]
    for changed in (["--loss", "ipo"], ["--max-length", "60"], ["--weights", "random"]):
        refuses(capfd, align.main, command(root, run, *more, *changed), f"was made with {changed[0]} ")


PATHS = {
    "no out": (["--out", ""], "--out: must not be empty"),
    "blank out": (["--out", " "], "--out: must not be empty"),
    "no resume": (["--resume", ""], "--resume: must be auto or step-N, got ''"),
    "resume": (["--resume", "step-1.bak"], "--resume: must be auto or step-N, got 'step-1.bak'"),
    "no model": (["--model", ""], "--model: must not be empty"),
    "no data": (["--data", ""], "--data: must not be empty"),
    "no cache": (["--token-cache", ""], "--token-cache: must not be empty"),
    "long": (["--out", "{root}/" + "x" * 256], "--out: is too long for a path"),
    "deep": (["--out", "/x" * 2048], "--out: is too long for a path"),
    "long model": (["--model", "x" * 256], "--model: is too long for a path"),
    "file": (["--out", "{root}/pairs.jsonl"], "--out: {root}/pairs.jsonl: {root}/pairs.jsonl is not a directory"),
    "below": (["--token-cache", "{root}/pairs.jsonl/a/b"], "--token-cache: ", "pairs.jsonl is not a directory"),
    "link": (["--out", "{root}/nowhere/run"], "nowhere is not a directory"),
}


@pytest.mark.parametrize("case", PATHS)
def test_paths_are_checked_before_anything(case, root, capfd, monkeypatch):
    # red: directory without its loop; text without its length; parse without its loop
    if not (root / "nowhere").is_symlink():
        (root / "nowhere").symlink_to(root / "gone")
    extra, *words = PATHS[case]
    argv = command(root, root / "unmade", *(part.format(root=root) for part in extra))
    refuses(capfd, align.main, argv, *(word.format(root=root) for word in words))
    assert not (root / "unmade").exists()


def test_a_path_with_a_nul(root, tmp_path, capfd):
    # red: text without "\0"
    (tmp_path / "a.toml").write_text('out = "a\\u0000b"\n')
    refuses(capfd, align.main, [f"{tmp_path}/a.toml", *command(root, tmp_path / "run")[:4]], "--out: ", "NUL")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to(root, tmp_path, capfd):
    tmp_path.chmod(0o500)
    refuses(capfd, align.main, command(root, tmp_path / "run"), f"{tmp_path} cannot be written to")


SLOW = """
import os, pathlib, time
import store

def select(row):
    pathlib.Path(f"busy-{os.getpid()}").touch()
    time.sleep(60)

def rows():
    while True:
        yield store.Example([], ["a"], [1.0])

if __name__ == "__main__":
    store.INLINE = 0
    how = store.Encoding(select, None, None, 8, None, None)
    list(store._encoded(rows(), how, print))
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_tokenising_processes_end_with_their_parent(tmp_path):
    # red: _start_worker without prctl
    (tmp_path / "slow.py").write_text(SLOW)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "slow.py"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (busy := list(tmp_path.glob("busy-*"))) and time.time() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    left = [pid for pid in (int(path.name[5:]) for path in busy) if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert busy and not left


# ---- signals
# -----------------------------------------------------------------------------------------------------------


def told(argv, ready, *numbers, ranks=1):
    """(exit code, stderr) of a script to which signals come when `ready()`: the last of its ranks alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher * (ranks > 1), *argv]
    child = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.time() + 60
        while not ready() and child.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        found = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        for number in numbers:
            os.kill(int(found[-1]) if ranks > 1 else child.pid, number)
        _, stderr = child.communicate(timeout=30)
        return child.returncode, stderr
    finally:
        child.kill()


@pytest.fixture
def endless(root, tmp_path):
    """(run directory, command line of a run that nobody waits for, its log)."""
    out = tmp_path / "run"
    more = ["--epochs", "100000", "--eval-data", root / "pairs.jsonl"]
    return out, command(root, out, *more), out / "metrics.jsonl"


@pytest.mark.parametrize("script, name, ranks", [("sft", "SIGINT", 1), ("align", "SIGUSR1", 2)])
def test_a_signal_ends_the_step_saves_it_and_leaves(endless, script, name, ranks, monkeypatch):
    # red: the loop without leave; exit_code without 128; each rank for itself, without fsdp.agreed
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    out, argv, log = endless
    argv += ["--save-async", "true"] * (script == "align")
    ready = lambda: log.exists() and len(log.read_text().splitlines()) > 4  # noqa: E731
    code, stderr = told([f"{script}.py", *argv], ready, getattr(signal, name), ranks=ranks)
    assert code == (130 if name == "SIGINT" else 0), stderr
    step = json.loads(log.read_text().splitlines()[-1])["step"] + 1
    said = {"state": "saved", "step": step, "reason": name, "last_checkpoint": f"step-{step}"}
    assert status(out) == status(out) | said
    assert [path.name for path in checkpoint.complete(out)] == [f"step-{step}"] and not (out / "final").exists()
    again = [*argv, "--steps", str(step + 1), "--resume", "auto"]
    main = {"sft": sft, "align": align}[script].main
    assert exit_code(main, again) is None and status(out)["step"] == step + 1


def test_a_signal_during_an_evaluation_under_slurm(root, endless, monkeypatch):
    # red: evaluate without between; exit_code without Slurm
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    out, argv, log = endless
    (root / "many.jsonl").write_text(PAIRS * 300)
    argv += ["--eval-data", f"{root}/many.jsonl", "--eval-examples", "1800", "--tokens-per-microbatch", "1"]
    ready = (out / "tokenizer" / "generation_config.json").exists
    code, stderr = told(["align.py", *argv], ready, signal.SIGTERM)
    assert (code, stderr, log.exists()) == (0, "", False)
    assert status(out)["state"] == "saved" and status(out)["step"] == 0


def test_a_second_signal_ends_at_once(endless):
    # red: _hear without HEARD["number"]
    out, argv, log = endless
    ready = lambda: log.exists() and "train" in log.read_text()  # noqa: E731
    code, stderr = told(["align.py", *argv], ready, signal.SIGINT, signal.SIGTERM)
    name = {130: "SIGINT", 143: "SIGTERM"}[code]  # the kernel hands two at a time over in any order
    assert stderr == f"stopped by {name} (again, nothing saved)\n"
    assert not list(out.glob("step-*"))


def test_a_signal_before_the_first_step(root, endless, monkeypatch):
    # red: HEARD["waits"] True from the start
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    _, argv, _ = endless
    cache = root / "slow-cache"
    (root / "rows.jsonl").write_text(PAIRS * 2000)
    argv += ["--data", f"{root}/rows.jsonl", "--token-cache", str(cache)]
    code, stderr = told(["align.py", *argv], lambda: list(cache.glob("*.tmp")), signal.SIGTERM)
    assert (code, stderr) == (143, "stopped by SIGTERM (before the first step, nothing to save)\n")


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
