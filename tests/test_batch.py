"""Which completions train, units and partners: batch.py and the choices of data.py, against loops and sorts.

`red:` names a change that turns a test red. Packing and the plain plan are in test_data.py.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import batch
import data


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")


OWN = ("own", None)


def encoded(prompt, *answers, scores=None, labels=None):
    scores = [float(-k) for k in range(len(answers))] if scores is None else scores
    masks = [[True] * len(answer) for answer in answers]
    return data.Encoded(prompt, list(answers), masks, scores, labels=labels or data.desirable(scores))


def example(*answers, scores, prompt="q"):
    turns = [{"role": "user", "content": prompt}]
    return data.Example(turns, list(answers), list(scores), where="f:1")


@pytest.mark.parametrize("seed", range(20))
def test_pairs_of_a_ranked_list(seed):
    # red: ties paired; worse before better; neighbours by place instead of rank
    scores = [float(random.Random(seed).randrange(4)) for _ in range(1 + seed % 6)] + [float(seed % 3)]
    every = {(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]}
    found = {how: data.pair_indices(scores, how) for how in ("best-worst", "adjacent", "all")}
    assert set(found["all"]) == every and len(found["all"]) == len(every)
    for pairs in found.values():
        assert set(pairs) <= every
    if every:
        ((best, worst),) = found["best-worst"]
        assert (scores[best], scores[worst]) == (max(scores), min(scores))
        ranks = sorted(scores, reverse=True)
        steps = [(a, b) for a, b in zip(ranks, ranks[1:]) if a > b]
        assert [(scores[i], scores[j]) for i, j in found["adjacent"]] == steps
    with pytest.raises(ValueError, match="best-worst, adjacent or all"):
        data.pair_indices(scores, "some")


def test_a_pair_keeps_only_what_is_compared():
    listed = example("a", "b", "c", "d", scores=[1.0, 4.0, -1.0, 2.0])
    assert data.usable_pair(listed).completions == ["b", "c"]
    assert data.usable_pair(listed).scores == [4.0, -1.0]
    assert data.usable_pair(listed, pairs="all") == listed
    assert data.usable_pair(example("a", "b", scores=[1.0, 1.0])) == "no completion is the better one"
    assert data.usable_pair(example("a", "a", scores=[1.0, 0.0])) == "chosen and rejected are the same"
    assert data.usable_pair(example("a", scores=[1.0])) == "no completion is the better one"


def test_labels():
    # red: >= instead of >; a lone score compared with its own mean
    assert data.desirable([1.0, 0.0]) == [True, False]
    assert data.desirable([8.2, 3.1]) == [True, False]
    assert data.desirable([1.0, 2.0, 3.0]) == [False, False, True]
    assert data.desirable([1.0]) == [True] and data.desirable([0.0]) == [False] == data.desirable([-2.0])
    assert data.desirable([5.0, 5.0]) == [True, True]
    assert data.best_completion(example("a", scores=[0.0])) == "labelled undesirable"
    assert data.best_completion(example("a", "b", scores=[0.0, 3.0])).completions == ["b"]
    bare = data.Example([], ["a"], [1.0], labelled=False)
    assert data.usable_feedback(bare) == "it has no label"


def test_a_label_that_is_no_boolean_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "completion": "a", "label": "yes"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='a.jsonl:1: "label" must be true or false, got "yes"'):
        list(data.read(path))


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


def test_mismatched_answers_are_cut_and_borrowed_in_turn():
    # red: the partner shortened in place; an untrained first token without a prompt forgotten
    mine, other = encoded([1, 2, 3], [4], [5], [6]), encoded([9], [10, 11, 12], [13])
    found = batch.mismatched(mine, other, 5)
    assert found.prompt == [1, 2, 3] and found.completions == [[10, 11], [13], [10, 11]]
    assert other.completions == [[10, 11, 12], [13]]
    bare = batch.mismatched(encoded([], [4]), other, 5)
    assert (bare.completions, bare.trained) == ([[10, 11, 12]], [[False, True, True]])
    assert batch.pack([bare]).predict.tolist() == [0, 1]


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


def test_a_rendered_conversation_is_what_transformers_reads(tokenizer):
    # red: tokenised apart; the template's tail forgotten; padding left at the end
    row = example("Hello.", "Hell, no!", scores=[1.0, 0.0], prompt="Say hello")
    for pad in (tokenizer.pad_token, "<|im_end|>"):
        tokenizer.pad_token = pad
        found = data.encode_rendered(row, tokenizer, 64, 32, OWN)
        for answer, ids in zip(row.completions, found.completions):
            talk = [*row.prompt, {"role": "assistant", "content": answer}]
            read = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
            while read[-1] == tokenizer.pad_token_id:
                read.pop()
            assert found.prompt + ids == read
        assert found.completions[0][0] != found.completions[1][0]  # all that is common is the prompt
    long = [{"role": "user", "content": "once"}, {"role": "assistant", "content": "upon"}, *row.prompt]
    cut = data.encode_rendered(row._replace(prompt=long), tokenizer, len(found.prompt) + 20, 9, OWN)
    assert cut.prompt == found.prompt
    assert "longer than --max-length" in data.encode_rendered(row, tokenizer, 8, 4, OWN)


@pytest.mark.parametrize("name", ["own", "plain", "raw"])
def test_a_control_token_stands_where_sampling_asks_for_it(tokenizer, name):
    # red: the control token put into the text, where `plain` writes a space before an answer
    template = OWN if name == "own" else data.chat_template(tokenizer, name)
    tokenizer.add_tokens(list(data.CONTROL_TOKENS), special_tokens=True)
    row = example("Good day", "Go away", scores=[1.0, 0.0])
    plain = data.encode(row, tokenizer, 63, 32, template)
    found = data.encode_conditioned(row, tokenizer, 64, 32, template)
    good, bad = tokenizer.convert_tokens_to_ids(list(data.CONTROL_TOKENS))
    assert found.completions == [[good, *plain.completions[0]], [bad, *plain.completions[1]]]
    assert all(all(mask) for mask in found.trained)
    tokenizer.chat_template = (template[1] or tokenizer.chat_template).removesuffix("\n") + data.ASK_FOR_GOOD
    ids = tokenizer.apply_chat_template(
        row.prompt, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids == [*plain.prompt, good]
    asked = data.chat_template(tokenizer, None)  # training further leaves the control token out again
    assert data.encode(row, tokenizer, 63, 32, asked).prompt == plain.prompt


def test_a_completion_without_a_prompt_is_conditioned_on_its_token(tokenizer):
    tokenizer.bos_token = None
    tokenizer.add_tokens(list(data.CONTROL_TOKENS), special_tokens=True)
    row = data.Example([], ["Good day"], [1.0])
    found = data.encode_conditioned(row, tokenizer, 64, 32, OWN)
    assert found.trained == [[False, *[True] * (len(found.completions[0]) - 1)]]
    assert torch.equal(batch.pack([found]).predict, torch.arange(len(found.completions[0]) - 1))
