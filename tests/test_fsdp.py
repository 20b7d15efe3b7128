"""What ranks hold and send: how often, how they are laid out, and that nothing that is trained depends on it.

A comment `red:` names a change that turns a test red.
"""

import json

import pytest
import torch
from test_train import arguments, base, launch, rows  # noqa: F401

import memory
from test_memory import CONFIGS

UNITS = 3  # of sharding: two blocks, and the rest
MICROBATCHES = 3  # of a step of 5 pairs, each its own
ADAPTERS = ["--lora-rank", "4", "--lora-targets", "all-linear"]
FEW = ["--tokens-per-microbatch", "50", "--steps", "2"]
RUNS = {  # name -> (processes, kind, flags)
    "every": (2, "dpo", []),
    "last": (2, "dpo", ["--micro-batch-sync", "last"]),
    "sft-last": (2, "sft", ["--micro-batch-sync", "last"]),
    "sft-every": (2, "sft", []),
    "lora-every": (2, "dpo", ADAPTERS),
    "lora-last": (2, "dpo", [*ADAPTERS, "--micro-batch-sync", "last"]),
}


@pytest.fixture(scope="module")
def runs(base):  # noqa: F811
    """All training of this file, in one launch per number of processes."""
    for processes in sorted({processes for processes, _, _ in RUNS.values()}):
        jobs = []
        for name, (ranks, kind, more) in RUNS.items():
            argv = arguments(kind, base, base / name, *FEW, *more)
            if "--lora-rank" in more:  # the reference is the policy without its adapters
                del argv[argv.index("--reference") : argv.index("--reference") + 2]
            if ranks == processes:
                jobs.append({"script": "sft.py" if kind == "sft" else "align.py", "argv": argv})
        launch(base, jobs, processes)
    return base


def same(runs, one, other, tolerance=1e-6):
    """Are losses, norms and the gradients of each tensor the same, relative to their norm?"""
    for mine, theirs in zip(rows(runs / one), rows(runs / other), strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance), key
    first, second = (torch.load(runs / name / "gradients.pt") for name in (one, other))
    assert len(first) == 2 and first[0].keys() == second[0].keys()
    for step, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        close = tolerance * 10**step  # AdamW divides by small second moments
        for name, gradient in mine.items():
            assert (gradient - theirs[name]).norm() <= close * gradient.norm().clamp(min=1e-5), name


def calls(runs, name, collective):
    """How many of a collective each step has made before its clipping."""
    return [step.get(collective, 0) for step in json.loads((runs / name / "collectives.json").read_text())]


@pytest.mark.parametrize("kind", ["", "sft-", "lora-"])
def test_gradients_summed_once_a_step_are_those_summed_every_micro_batch(runs, kind):
    # red: set_requires_gradient_sync(True) always (the counts); with False for the last (the gradients)
    same(runs, f"{kind}every", f"{kind}last")
    often, once = (calls(runs, kind + name, "reduce_scatter_single") for name in ("every", "last"))
    trained = UNITS - (kind == "lora-")  # nothing of the rest
    assert once == [trained] * 2 and often == [trained * MICROBATCHES] * 2


def test_the_plan_counts_gradients_that_are_whole_until_the_last_micro_batch():
    # red: earlier = gradients whatever the sync
    found = memory.body(CONFIGS["llama"])
    run = memory.Run(64, ranks=4, microbatches=2, cuda=True)
    every, last = (memory.need(found, run._replace(sync=sync)) for sync in ("every", "last"))
    whole = memory.numbers(found.weights)
    assert last["gradients"] >= 4 * whole > every["gradients"]
    alone = run._replace(microbatches=1)
    assert memory.need(found, alone) == memory.need(found, alone._replace(sync="last"))
