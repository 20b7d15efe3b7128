"""fit.py: what is chosen of given sizes of memory, and that nothing is where a flag says it.

A comment `red:` names a change that turns a test red.
"""

import re

import pytest
from test_memory import CONFIGS

import align
import fit
import memory
import objective as objectives
import precision
import sft

WIDE = "qwen2"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(flags of a run of 4 GPUs, its objective, tokens of each group, bytes a rank needs by choice)."""
    folder = tmp_path_factory.mktemp("fit")
    CONFIGS[WIDE].save_pretrained(folder / "model")
    argv = ["--model", f"{folder}/model", "--data", "none.jsonl", "--out", f"{folder}/run", "--loss", "dpo"]
    args = align.parse_args([*argv, "--batch-size", "1024"])
    objective, lengths = objectives.make_objective(args), [400] * 2000

    def needs(tokens, way):
        run = memory.run_of(fit._with(args, fit.Choice(tokens, way)), objective, lengths, 4, True)
        return sum(memory.need(memory.bodies(args, objective)[0], run).values())

    return args, objective, lengths, needs


def chosen(asked, room, before=None, lengths=None, **given):
    args, objective, many, _ = asked
    args = align.argparse.Namespace(**vars(args) | given)
    return fit.choose(args, many if lengths is None else lengths, 4, objective, room, before)


def test_a_micro_batch_grows_with_the_memory(asked):
    """red: MOST not held; a way to recompute that comes before one with which ENOUGH tokens fit; sizes summed
    over ranks; the smallest that fits"""
    needs = asked[3]
    assert chosen(asked, None) == chosen(asked, 0) == (4096, "full")  # a CPU, and what fits nowhere
    assert chosen(asked, 1e15) == (65_536, "none")
    for tokens in (8192, 16_384, 32_768):
        assert chosen(asked, needs(tokens, "none")) == (tokens, "none")
    tokens, way = chosen(asked, needs(8192, "none") - 1)
    assert way == "selective" and tokens >= 8192
    room = min(needs(16_384, "full"), needs(8192, "selective")) - 1
    assert chosen(asked, room) == (8192, "full")
    assert chosen(asked, needs(8192, "full") - 1) == (4096, "none")  # ENOUGH fit with none
    assert chosen(asked, needs(4096, "full")) == (4096, "full")
    assert chosen(asked, 1e15, lengths=[400] * 80) == (8192, "none")  # a rank's share of the only step


def test_what_a_flag_says_stays(asked):
    """red: `choose` without _given; before preferred to what does not fit"""
    needs = asked[3]
    assert chosen(asked, 1e15, tokens_per_microbatch=1000) == (1000, "none")
    assert chosen(asked, needs(4096, "full"), activation_checkpointing="none") == (4096, "none")  # refused later
    assert chosen(asked, 1e15, activation_checkpointing="full") == (65_536, "full")
    assert chosen(asked, None, tokens_per_microbatch=7) == (7, "full")
    old = fit.Choice(300, "selective")
    assert chosen(asked, 1e15, before=old) == chosen(asked, None, before=old) == old
    assert chosen(asked, needs(8192, "none"), before=fit.Choice(65_536, "none")) == (8192, "none")


@pytest.mark.parametrize("main", [align.main, sft.main], ids=["align", "sft"])
def test_a_plan_says_what_would_be_chosen(asked, main, capsys):
    """red: the plan counted with the least; the fewest GPUs counted with the choice"""
    argv = ["--model", asked[0].model, "--data", "none.jsonl", "--out", asked[0].out, "--plan", "--gpus", "4"]
    said = []
    for more in (["--memory", "80"], ["--memory", "0.2"], ["--device", "cpu"]):
        main([*argv, "--batch-size", "512", *more])
        said.append(capsys.readouterr().out)
    found = [re.search(r"with --tokens-per-microbatch (\d+) --activation-checkpointing (\w+)\n", text) for text in said]
    assert [match.groups() for match in found[::2]] == [("65536", "none"), ("4096", "full")]
    assert found[1][2] != "none" and "24 GB: 1 at least" in said[1]


def test_a_run_goes_on_in_its_dtype(tmp_path, monkeypatch):
    """red: args.json not asked; asked without --resume"""
    monkeypatch.setattr(precision, "usual", lambda device: "float32" if device == "cpu" else "bfloat16")
    argv = ["--model", "m", "--data", "d", "--out", str(tmp_path), "--device", "cpu"]
    assert sft.parse_args(argv).dtype == "float32"
    (tmp_path / "args.json").write_text('{"dtype": "bfloat16"}')
    assert sft.parse_args([*argv, "--resume", "auto"]).dtype == "bfloat16"
    assert sft.parse_args(argv).dtype == "float32"
    assert sft.parse_args([*argv, "--resume", "auto", "--dtype", "float32"]).dtype == "float32"
    assert sft.parse_args([*argv, "--memory", "8"]).dtype == "float32"
    assert sft.parse_args([*argv, "--plan"]).dtype == "bfloat16"  # of GPUs
