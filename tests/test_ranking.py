"""Which completions train, against loops and sorts.

`red:` names a change of ranking.py that turns a test red.
"""

import itertools
import random

import numpy as np
import pytest

import ranking
from formats import Example


def example(*answers, scores=()):
    return Example([{"role": "user", "content": "q"}], list(answers), list(scores))


@pytest.mark.parametrize("seed", range(20))
def test_pairs_of_a_ranked_list(seed):
    # red: ties paired; worse before better; neighbours by place instead of rank
    scores = [float(random.Random(seed).randrange(4)) for _ in range(1 + seed % 6)] + [float(seed % 3)]
    every = {(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]}
    found = {how: ranking.pair_indices(scores, how) for how in ("best-worst", "adjacent", "all")}
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
        ranking.pair_indices(scores, "some")


def test_a_pair_keeps_only_what_is_compared():
    listed = example("a", "b", "c", "d", scores=[1.0, 4.0, -1.0, 2.0])
    assert ranking.usable_pair(listed).completions == ["b", "c"]
    assert ranking.usable_pair(listed).scores == [4.0, -1.0]
    assert ranking.usable_pair(listed, pairs="all") == listed
    assert ranking.usable_pair(example("a", "b", scores=[1.0, 1.0])) == ranking.NO_BETTER
    assert ranking.usable_pair(example("a", scores=[1.0])) == ranking.ALONE
    assert ranking.usable_pair(example()) == "it has no answer"


def test_labels():
    # red: >= instead of >; a lone score compared with its own mean
    assert ranking.desirable([1.0, 0.0]) == [True, False]
    assert ranking.desirable([8.2, 3.1]) == [True, False]
    assert ranking.desirable([1.0, 2.0, 3.0]) == [False, False, True]
    assert ranking.desirable([1.0]) == [True] and ranking.desirable([0.0]) == [False] == ranking.desirable(
        [-2.0]
    )
    assert ranking.desirable([5.0, 5.0]) == [True, True]


def test_the_best_completion():
    assert ranking.best_completion(example("a", scores=[0.0])) == "labelled undesirable"
    assert ranking.best_completion(example("a", "b", scores=[0.0, 3.0])).completions == ["b"]
    assert ranking.best_completion(example("a", "b", scores=[0.0, 0.0])) == "no completion is the better one"
    assert ranking.best_completion(example()) == "it has no answer"


def test_what_has_no_label():
    bare = Example([], ["a"], [1.0], labelled=False)
    assert ranking.usable_feedback(bare) == "it has no label"
    assert ranking.usable_feedback(bare._replace(labelled=True)) == bare._replace(labelled=True)


@pytest.mark.parametrize("seed", range(20))
def test_the_number_of_pairs_of_many_lists(seed):
    # red: ties counted; the last of one list compared with the first of the next
    rng = random.Random(seed)
    lists = [[float(rng.randrange(4)) for _ in range(rng.choice((1, 1, 2, 5)))] for _ in range(1 + seed)]
    scores, sizes = np.concatenate(lists), np.array([len(scores) for scores in lists])
    for pairs in ranking.PAIRS:
        expected = [len(ranking.pair_indices(scores, pairs)) for scores in lists]
        assert ranking.pair_counts(scores, sizes, pairs).tolist() == expected
