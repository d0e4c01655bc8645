"""Micro-batches hold every rollout once, stay within the limit of tokens, and are equally many on every rank."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from v05.train.micro_batches import micro_batches

LENGTHS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 300)), max_size=60)


def held(prompts, completions, rows):
    return len(rows) * (max(prompts[rows]) + max(completions[rows])) if len(rows) else 0


@given(LENGTHS, st.integers(1, 2000), st.integers(1, 3))
def test_parts_hold_what_they_may(lengths, tokens, ranks):
    prompts, completions = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    parts = micro_batches(prompts, completions, tokens, ranks)
    assert sorted(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part)
        for rank in range(ranks):
            rows = part[rank::ranks]
            assert len(rows) <= 1 or held(prompts, completions, rows) <= tokens


@given(LENGTHS, st.integers(1, 2000))
def test_no_part_could_take_the_next_rollout(lengths, tokens):
    prompts, completions = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    parts = micro_batches(prompts, completions, tokens)
    for part, following in itertools.pairwise(parts):
        assert held(prompts, completions, np.append(part, following[0])) > tokens


def test_rollouts_of_like_length_go_together():
    completions = np.array([1, 100, 2, 99, 3, 98])
    parts = micro_batches(np.ones(6, dtype=np.int64), completions, 303)
    assert [sorted(part.tolist()) for part in parts] == [[1, 3, 5], [0, 2, 4]]
