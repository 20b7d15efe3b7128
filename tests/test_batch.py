"""Packing, the plan, units and partners, against loops and sorts.

`red:` names a change of batch.py that turns a test red.
"""

import collections
import itertools
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import ROOT, exit_code, write_model
from test_store import kept

import align
import arrays
import batch
import encode
import ranking
import sft


def encoded(prompt, *answers, scores=None, labels=None):
    scores = [float(-k) for k in range(len(answers))] if scores is None else scores
    masks = [[True] * len(answer) for answer in answers]
    return encode.Encoded(prompt, list(answers), masks, scores, labels=labels or ranking.desirable(scores))


# Packing and the plan.


@pytest.mark.parametrize("seed", range(20))
def test_pack_is_what_a_loop_says(seed):
    # red: `begin + index - 1` for a first token; positions or responses that run on; worst and best swapped
    rng = random.Random(seed)
    groups = []
    for size in [rng.randrange(1, 5) for _ in range(rng.randrange(1, 6))]:
        lengths = rng.choices(range(1, 7), k=size)
        prompt, *completions = (rng.choices(range(99), k=length) for length in [rng.randrange(6), *lengths])
        trained = [[rng.random() < 0.7 and i + len(prompt) > 0 for i in range(length)] for length in lengths]
        scores = rng.choice([[0.5] * size, rng.sample([-1.5, 0.0, 2.0, 7.0], size)])
        groups.append(
            encode.Encoded(prompt, completions, trained, scores, rng.randrange(4), rng.randrange(4))
        )
    want = collections.defaultdict(list)
    for group in groups:
        prompt = range(len(want["ids"]), len(want["ids"]) + len(group.prompt))
        first = len(want["ends"])
        want["ids"] += group.prompt
        want["positions"] += range(len(prompt))
        for completion, trained in zip(group.completions, group.trained):
            places = [*prompt, *range(len(want["ids"]), len(want["ids"]) + len(completion))]  # of each token
            want["ids"] += completion
            want["positions"] += range(len(prompt), len(places))
            want["predict"] += [places[len(prompt) + i - 1] for i, wanted in enumerate(trained) if wanted]
            want["targets"] += [token for token, wanted in zip(completion, trained) if wanted]
            want["response"] += [len(want["ends"])] * sum(trained)
            want["ends"].append(places[-1])
            want["weights"].append(group.weight * (seed % 2))
        want["scores"] += group.scores
        if len(set(group.scores)) > 1:
            want["pairs"] += [[first + group.scores.index(pick(group.scores)) for pick in (max, min)]]
            want["margins"].append(group.margin)
            want["pair_weights"].append(group.weight * (seed % 2))
    found = batch.pack(groups, counted=bool(seed % 2))
    assert found.ids.shape == (1, len(want["ids"])) and found.ids.dtype == found.pairs.dtype == torch.long
    actual = {name: getattr(found, name) for name in want}
    actual |= {"ids": found.ids[0], "positions": found.positions[0], "pairs": found.pairs.t()}
    assert {name: actual[name].tolist() for name in want} == want
    assert found.groups == [(len(group.prompt), list(map(len, group.completions))) for group in groups]


@pytest.mark.parametrize("seed", range(40))
def test_plan_gives_every_group_once_and_every_rank_as_many_micro_batches(seed):
    # red: drop_last; an order that depends on world_size; a filler that counts
    rng = random.Random(seed)
    lengths = [rng.randrange(1, rng.choice([50, 600])) for _ in range(rng.randrange(1, 70))]
    batch_size, budget = rng.randrange(1, 30), rng.choice([20, 300, 2000])
    sizes = [min(batch_size, len(lengths) - start) for start in range(0, len(lengths), batch_size)]
    steps = []
    for world_size in (1, 2, 5):
        plan = batch.plan(lengths, batch_size, world_size, budget, seed)
        assert list(plan) == list(batch.plan(lengths, batch_size, world_size, budget, seed))
        assert all(len(step) == world_size and len({len(rank) for rank in step}) == 1 for step in plan)
        for work in [work for step in plan for rank in step for work in rank]:
            load = sum(lengths[group] for group in work.groups)
            assert work.groups and (load <= budget or len(work.groups) == 1)
            assert work.counted or (len(work.groups) == 1 and load == min(lengths))
        counted = [[work for rank in step for work in rank if work.counted] for step in plan]
        steps.append([sorted(group for work in works for group in work.groups) for works in counted])
        assert list(map(len, steps[-1])) == sizes and sorted(sum(steps[-1], [])) == list(range(len(lengths)))
    assert steps[0] == steps[1] == steps[2]


def test_plan_orders_and_balances():
    # red: a seed or an epoch ignored; groups dealt in order instead of by length
    lengths = random.Random(7).choices(range(60, 500), k=256)
    draws = ((0, 0), (0, 1), (1, 0), (1, 1))
    plans = [list(batch.plan(lengths, 64, 4, 4096, seed, epoch)) for seed, epoch in draws]
    assert len(set(map(str, plans))) == 4
    assert [sorted(step[0][0].groups) for step in batch.plan([5] * 5, 2, 1, 99, None)] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    for step in plans[0]:
        loads = [sum(lengths[group] for work in rank for group in work.groups) for rank in step]
        assert max(loads) < 1.02 * sum(loads) / 4 and all(work.counted for rank in step for work in rank)
        assert len(step[0]) <= 1.2 * sum(loads) / (4 * 4096) + 1  # nearly as few micro-batches as fit
    for step in batch.plan([5000] + [50] * 7, 8, 2, 512, None):  # no micro-batch of fillers alone
        assert all(any(work.counted for work in micro_batch) for micro_batch in zip(*step))


@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (0.0, 1.0), (0.3, 0.7)])
def test_thinning_keeps_the_fractions(good, bad):
    # red: fractions swapped; the same ones whatever the seed
    labels = np.array([True, False] * 40)
    kept = batch.thin(labels, 3, keep_desirable=good, keep_undesirable=bad)
    assert (kept[labels].sum(), kept[~labels].sum()) == (round(40 * good), round(40 * bad))
    assert kept.tolist() == batch.thin(labels, 3, keep_desirable=good, keep_undesirable=bad).tolist()
    if (good, bad) == (0.3, 0.7):
        assert kept.tolist() != batch.thin(labels, 4, keep_desirable=good, keep_undesirable=bad).tolist()


@pytest.mark.parametrize("fractions", [(1.5, 1.0), (-0.1, 1.0), (0.0, 0.0), (0.01, 0.0)])
def test_thinning_refuses_what_keeps_nothing(fractions):
    labels = np.array([True, False] * 4)
    with pytest.raises(ValueError, match="keep-desirable"):
        batch.thin(labels, 0, keep_desirable=fractions[0], keep_undesirable=fractions[1])


@pytest.mark.parametrize("seed", range(10))
def test_partners_are_the_next_of_another_prompt(seed):
    # red: no wrap; the next one whatever its prompt
    rng = random.Random(seed)
    groups = [encoded([rng.randrange(3)], [1], [2]) for _ in range(9)] + [encoded([7], [1], [2])]
    order = batch.epoch_order(10, seed, 2)
    found = batch.partners([group.prompt_key for group in groups], order)
    for place, index in enumerate(order):
        after = [order[(place + k) % 10] for k in range(1, 10)]
        assert found[index] == next(other for other in after if groups[other].prompt != groups[index].prompt)
    with pytest.raises(ValueError, match="two different prompts"):
        batch.partners([7] * 3, range(3))


@pytest.mark.parametrize("seed", range(20))
def test_a_step_takes_whole_groups_and_every_epoch_as_many_steps(seed):
    # red: border by the group's first unit, which leaves an empty last step
    rng = random.Random(seed)
    units = [rng.choice((1, 2, 2, 3)) for _ in range(1 + 3 * seed)]
    size = rng.randrange(1, 7)
    steps = {len(batch.plan([5] * len(units), size, 2, 12, seed, epoch, units)) for epoch in range(6)}
    assert steps == {batch.steps_per_epoch(units, size)}
    for step in batch.plan([5] * len(units), size, 2, 12, seed, 0, units):
        groups = [index for rank in step for work in rank if work.counted for index in work.groups]
        number = sum(units[index] for index in groups)
        assert 0 < number <= max(size, *units) + max(units) - 1


LONG = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 6), st.integers(1, 200)), min_size=1, max_size=60)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(units=LONG, size=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_a_long_list_makes_its_own_step_larger_and_no_other(units, size, seed, epoch):
    # red: a batch size of max(size, max(units)); a share that is not cut to the batch size
    steps = batch.plan([5] * len(units), size, 1, 10**9, seed, epoch, units)
    assert len(steps) == batch.steps_per_epoch(units, size)
    members = [[index for work in step[0] if work.counted for index in work.groups] for step in steps]
    assert all(members)
    assert sorted(itertools.chain(*members)) == list(range(len(units)))
    short = [number for number in units if number <= size]
    for step in members:
        if all(units[index] <= size for index in step):
            assert sum(units[index] for index in step) <= size + max(short) - 1
        else:  # beside the long one, what would have been there without it
            rest = [units[index] for index in step if units[index] <= size]
            assert sum(units[index] > size for index in step) == 1
            assert sum(rest) <= size - 1 + max(short, default=0)


def test_one_long_list_leaves_the_other_steps_as_they_are():
    """A list of 12, 66 pairs of any two, among 61 plain pairs, 16 asked for."""
    units = [1] * 30 + [66] + [1] * 31
    sizes = []
    for step in batch.plan([5] * 62, 16, 2, 10**9, None, 0, units):
        groups = [index for rank in step for work in rank if work.counted for index in work.groups]
        sizes.append(sum(units[index] for index in groups))
    assert sizes == [16, 14, 68, 16, 13]


def test_a_margin_is_the_best_ones_over_the_worst():
    # red: the margin of the row for every pair; divided by the number of pairs
    group = encoded([1], [2], [3], [4], [5], scores=[0.0, 3.0, 1.0, 1.0])._replace(margin=0.6)
    pairs = {}
    for how in ("best-worst", "adjacent", "all"):
        pack = batch.pack([group], True, how)
        found = zip(map(tuple, pack.pairs.t().tolist()), pack.margins.tolist())
        pairs[how] = {pair: pytest.approx(margin, rel=1e-6) for pair, margin in found}
    assert pairs["best-worst"] == {(1, 0): 0.6}
    assert pairs["adjacent"] == {(1, 2): 0.4, (3, 0): 0.2}  # they add up
    assert pairs["all"] == {(1, 0): 0.6, (1, 2): 0.4, (1, 3): 0.4, (2, 0): 0.2, (3, 0): 0.2}


def test_a_group_with_labels_and_its_pairs_in_a_pack():
    groups = [encoded([1], [2], [3, 4], [5], scores=[0.0, 2.0, 1.0]), encoded([6], [7])]
    pack = batch.pack(groups, True, "all")
    assert pack.pairs.tolist() == [[1, 1, 2], [2, 0, 0]]
    assert pack.desirable.tolist() == [False, True, False, False]
    assert pack.group.tolist() == [0, 0, 0, 1]
    assert pack.pair_weights.tolist() == [1.0] * 3
    assert not batch.pack(groups, False).weights.any()


@pytest.mark.parametrize("how", ["best-worst", "adjacent", "all"])
@pytest.mark.parametrize("seed", range(8))
def test_packs_of_a_store_are_those_of_its_examples(seed, how):
    # red: pieces of the first example for all; the places of prompts; memory of int32; weights of a filler
    rng = random.Random(seed)
    groups = []
    for _ in range(12):
        size, prompt = rng.randrange(1, 5), rng.randrange(0, 4)
        answers = [rng.choices(range(9), k=rng.randrange(1, 6)) for _ in range(size)]
        masks = [[rng.random() < 0.6 for _ in answer] for answer in answers]
        scores = [float(rng.randrange(3)) for _ in answers]
        labels = [rng.random() < 0.5 for _ in answers]
        group = encode.Encoded(rng.choices(range(9), k=prompt), answers, masks, scores, 0.5 * seed, 0.3)
        groups.append(group._replace(labels=labels))
    one = kept(groups)
    order = [rng.randrange(12) for _ in range(12)]
    mismatched = one.mismatched(np.array(order), 7)
    for found in (one, arrays.joined([one, one.share(0.5, seed)]), mismatched):
        chosen = rng.sample(range(len(found)), 5)
        works = [batch.Work(chosen, True), batch.Work(chosen[:1], False)]
        whole = [batch.pack([found[g] for g in work.groups], work.counted, how) for work in works]
        packs = batch.packs(found, works, how, torch.device("cpu"))
        for pack, wanted in zip(packs, whole):
            for mine, other in zip((*pack, *pack.layout), (*wanted, *wanted.layout)):
                assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else str(mine) == str(other)
            assert all(map(lambda a, b: getattr(a, "dtype", 0) == getattr(b, "dtype", 0), pack, wanted))
        assert found is mismatched or found.trained_tokens.tolist() == [g.trained_tokens for g in found]


class Spied:
    """An array of tokens that keeps which of them were read."""

    def __init__(self, text):
        self.text, self.read = text, set()

    def __len__(self):
        return len(self.text)

    def __getitem__(self, span):
        self.read.update(range(span.start, span.stop))
        return self.text[span]


@pytest.mark.parametrize("script, more", [(sft, []), (align, ["--loss", "grpo"])])
def test_a_step_reads_the_rows_of_its_own_rank_alone(script, more, tmp_path, monkeypatch):
    """The real loop of one process, with the plan of two. red: the trained tokens of a step counted in its
    masks; packs of all shares"""
    write_model(tmp_path / "model")
    rows = (ROOT / "examples" / "hh_test.jsonl").read_bytes().split(b"\n")[:6]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(rows))
    load, plan, own = script.load_examples, batch.plan, []

    def spied(*args):
        found = load(*args)
        own[:] = [found, Spied(found.arrays.ids), Spied(found.arrays.trained)]
        found.arrays = found.arrays._replace(ids=own[1], trained=own[2])
        return found

    def of_two(lengths, size, _, *rest):
        for text in own[1:]:
            text.read.clear()  # of the start
        own.append(plan(lengths, size, 2, *rest))
        return own[-1]

    monkeypatch.setattr(script, "load_examples", spied)
    monkeypatch.setattr(batch, "plan", of_two)
    argv = ["--model", tmp_path / "model", "--weights", "random", "--data", tmp_path / "pairs.jsonl"]
    argv += ["--out", tmp_path / "run", "--steps", "1", "--batch-size", "4" if script is sft else "8", *more]
    assert exit_code(script.main, list(map(str, argv))) is None
    found, ids, trained, planned = own
    shares = [{g for work in share for g in work.groups} for share in planned[0]]
    spans = [found._span(p) for g in shares[0] for p in range(*found.arrays.first[[g, g + 1]])]
    assert [len(share) for share in shares] == [2, 2]
    assert ids.read == trained.read == {place for span in spans for place in range(span.start, span.stop)}


def test_a_pack_of_4000_tokens_takes_no_time():
    """red: a list of Python's numbers somewhere, 11 ms"""
    rng = np.random.default_rng(0)
    groups = [encoded([1] * n, [2] * m, [3] * m) for n, m in rng.integers(60, 220, (9, 2)).tolist()]
    found, work = kept(groups), [batch.Work(list(range(9)), True)]
    took = []
    for _ in range(30):
        began = time.thread_time()
        batch.packs(found, work, "best-worst", torch.device("cpu"))
        took.append(time.thread_time() - began)
    assert 3000 < found.lengths.sum() < 5000 and min(took) < 2.5e-3  # 0.5 where nothing else runs


def test_a_million_rows_are_planned_in_seconds():
    """Counting pairs and planning an epoch are array arithmetic. red: a loop over rows in either"""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 1_000_000)
    began = time.process_time()
    counts = ranking.pair_counts(rng.random(sizes.sum()), sizes, "all")
    steps = batch.plan(rng.integers(20, 500, len(sizes)), 16, 2, 4096, 0, 0, np.maximum(counts, 1))
    assert len(steps[len(steps) // 2]) == 2
    assert time.process_time() - began < 4  # in Python 15
    assert counts.tolist()[:1000] == (sizes * (sizes - 1) // 2).tolist()[:1000]
