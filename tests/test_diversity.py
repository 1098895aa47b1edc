"""The measures of variety, each against a value worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tuneshift.report.diversity import (
    distinct_n,
    longest_overlap,
    near_duplicates,
    nearest_seed_distance,
    self_bleu,
    vendi_score,
)


def test_distinct_n_counts_different_ngrams_among_all() -> None:
    texts = ["Play a song.", "play a film"]  # play, a, song, play, a, film
    assert distinct_n(texts, 1) == 4 / 6
    assert distinct_n(texts, 2) == 3 / 4  # play a, a song, play a, a film
    assert distinct_n(["one"], 2) is None
    assert distinct_n([], 1) is None


def test_self_bleu_of_equal_texts_is_one_and_of_one_text_unknown() -> None:
    assert self_bleu(["play a song now", "Play a song, now!"]) == pytest.approx(1)
    assert self_bleu(["play a song"]) is None
    assert self_bleu(["play", "..."]) is None  # the second has no words


def test_self_bleu_by_hand() -> None:
    # Each of the two: 1-grams 2 of 3 match, 2-grams 1 of 2, 3-grams none, which counts as 0.1 of 1; equal lengths.
    expected = (2 / 3 * 1 / 2 * 0.1) ** (1 / 3)
    assert self_bleu(["play a song", "play a film"]) == pytest.approx(expected)


def test_self_bleu_clips_counts_and_punishes_brevity() -> None:
    # "a a": "a" matches once of two, "a a" never (0.1 of 1), and it is shorter than its only reference by a word.
    short = math.exp(1 - 3 / 2) * (1 / 2 * 0.1) ** (1 / 2)
    # "a b c": 1 of 3, then 0.1 of 2 and 0.1 of 1; longer than the reference.
    long = (1 / 3 * 0.1 / 2 * 0.1) ** (1 / 3)
    assert self_bleu(["a a", "a b c"]) == pytest.approx((short + long) / 2)


def test_near_duplicates_look_back_only() -> None:
    # {a b c d} and {a b c d e}: 4 of 5 words, exactly the threshold; {a b c f}: 3 of 5.
    assert near_duplicates(["a b c d", "e d c b a", "a b c f", "", ""]) == [False, True, False, False, False]
    assert near_duplicates([]) == []


def test_near_duplicates_are_found_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneshift.report.diversity.CHUNK", 2)
    assert near_duplicates(["one", "two", "three", "four", "ONE"]) == [False, False, False, False, True]


def test_the_vendi_score_is_an_effective_number() -> None:
    assert vendi_score(np.eye(4)) == pytest.approx(4)
    assert vendi_score(np.ones((3, 2))) == pytest.approx(1)
    assert vendi_score(np.array([[1.0, 0], [1, 0], [0, 5]])) == pytest.approx(
        math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))  # eigenvalues 2/3 and 1/3
    )
    assert vendi_score(np.empty((0, 3))) is None


def test_the_nearest_seed_is_the_one_with_the_highest_cosine() -> None:
    seeds = np.array([[1.0, 0], [0, 2]])
    found = nearest_seed_distance(np.array([[3.0, 0], [1, 1], [-1, 0]]), seeds)
    assert found == pytest.approx([0, 1 - math.sqrt(0.5), 1])


def test_the_longest_overlap_is_a_run_of_words() -> None:
    texts = ["book a table in Paris", "please play the song again"]
    assert longest_overlap(texts, ["play a song", "now PLAY the song!"]) == (3, 1, 1)
    assert longest_overlap(texts, ["nothing"]) is None
    assert longest_overlap([], ["a"]) is None


@pytest.mark.parametrize("length", range(1, 20))
def test_the_longest_overlap_is_found_at_every_length(length: int) -> None:
    run = " ".join(f"w{n}" for n in range(length))
    assert longest_overlap(["other", f"x {run} y"], ["none", "z", f"{run} q"]) == (length, 1, 2)
