"""How varied prompts are: pure functions on texts, and on embeddings as rows of a matrix.

Words are those of `normalize`, so case and punctuation do not count. What cannot be said of the texts given, such as
the variety of none, is `None`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuneshift.prompts.screening import normalize

Matrix = NDArray[np.float64]

NEAR = 0.8  # Jaccard similarity of near-duplicates (Lee et al. 2022, arXiv 2107.06499, section 4.2)
BLEU_ORDERS = 4  # BLEU-4, as self-BLEU is defined (Zhu et al. 2018, arXiv 1802.01886, section 3.2)
NO_MATCH = 0.1  # matches that a precision without any counts as: smoothing method 1 of NLTK, which Texygen uses
CHUNK = 1024  # prompts compared at a time, so that memory grows with their number and not with its square


def words(text: str) -> list[str]:
    """Return the words of a text as they are compared."""
    return normalize(text).split()


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Return the share of n-grams of words that differ, among all (Li et al. 2016, arXiv 1510.03055, section 5.2)."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Return the mean BLEU-4 of each text with all others as references: 1 where all say the same.

    A text that is shorter than four words is compared up to its own length; one without words is left out.
    """
    split = [found for text in texts if (found := words(text))]
    if len(split) < 2:
        return None
    tables = {n: _two_highest(split, n) for n in range(1, BLEU_ORDERS + 1)}
    lengths = Counter(map(len, split))
    scores = []
    for place, own in enumerate(split):
        precisions = []
        for n in range(1, min(BLEU_ORDERS, len(own)) + 1):
            counts = Counter(_grams(own, n))
            matched = sum(min(count, _highest_elsewhere(tables[n][gram], place)) for gram, count in counts.items())
            precisions.append((matched or NO_MATCH) / counts.total())
        others = lengths - Counter([len(own)])
        closest = min(others, key=lambda length: (abs(length - len(own)), length))
        brevity = 1.0 if len(own) >= closest else math.exp(1 - closest / len(own))
        scores.append(brevity * math.exp(sum(map(math.log, precisions)) / len(precisions)))
    return sum(scores) / len(scores)


def near_duplicates(texts: Sequence[str], *, threshold: float = NEAR) -> list[bool]:
    """Tell of each text whether an earlier one has nearly the same words: Jaccard similarity of at least `threshold`.

    A text without words is no duplicate of anything.
    """
    from scipy.sparse import csr_array

    sets = [set(words(text)) for text in texts]
    vocabulary = {word: place for place, word in enumerate(sorted(set().union(*sets)))}
    sizes = np.array([len(found) for found in sets], dtype=np.int64)
    columns = [vocabulary[word] for found in sets for word in found]
    rows = np.repeat(np.arange(len(sets)), sizes)
    table = csr_array((np.ones(len(columns)), (rows, columns)), shape=(len(sets), max(1, len(vocabulary))))
    found: list[bool] = []
    for start in range(0, len(sets), CHUNK):
        end = min(start + CHUNK, len(sets))
        shared = (table[start:end] @ table[:end].T).toarray()
        either = sizes[start:end, None] + sizes[None, :end] - shared
        near = (shared > 0) & (shared >= threshold * either)
        earlier = np.arange(end)[None, :] < np.arange(start, end)[:, None]
        found += (near & earlier).any(axis=1).tolist()
    return found


def vendi_score(vectors: Matrix) -> float | None:
    """Return the effective number of different rows, from 1 to their number.

    Source: Friedman and Dieng 2023 (arXiv 2210.02410).

    `vectors` has shape [texts, dimensions]; the similarity of two rows is their cosine. exp of the entropy of the
    eigenvalues of the similarities divided by the number of rows.
    """
    if len(vectors) == 0:
        return None
    unit = _unit(vectors)
    # The covariance has the same non-zero eigenvalues as the similarities, and is the smaller where rows are many.
    small = unit.T @ unit if unit.shape[1] < unit.shape[0] else unit @ unit.T
    values = np.linalg.eigvalsh(small / len(vectors))
    positive = values[values > 1e-12]  # below is the rounding of the decomposition
    return float(np.exp(-(positive * np.log(positive)).sum()))


def nearest_seed_distance(vectors: Matrix, seeds: Matrix) -> list[float]:
    """Return each row's distance to the seed that is nearest to it, 1 - cosine; both of shape [texts, dimensions]."""
    nearest: list[float] = (1 - (_unit(vectors) @ _unit(seeds).T).max(axis=1)).tolist()
    return nearest


def longest_overlap(texts: Sequence[str], references: Sequence[str]) -> tuple[int, int, int] | None:
    """Return the longest run of words that a text shares with a reference: its words, and the places of both.

    Of equally long ones the first text's with its first reference counts; `None` where no word is shared.
    """
    split, known = [words(text) for text in texts], [words(text) for text in references]

    def shared(length: int) -> tuple[int, int] | None:
        first: dict[tuple[str, ...], int] = {}
        for place, found in enumerate(known):
            for gram in _grams(found, length):
                first.setdefault(gram, place)
        runs = ((at, gram) for at, found in enumerate(split) for gram in _grams(found, length))
        return next(((at, first[gram]) for at, gram in runs if gram in first), None)

    # What shares a run shares all shorter ones: double the length until none is shared, then halve the gap.
    low, high, best = 0, 1, None
    while (hit := shared(high)) is not None:
        low, high, best = high, 2 * high, hit
    while high - low > 1:
        middle = (low + high) // 2
        hit = shared(middle)
        if hit is None:
            high = middle
        else:
            low, best = middle, hit
    return None if best is None else (low, *best)


def _grams(split: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(split[start : start + n]) for start in range(len(split) - n + 1)]


def _two_highest(split: Sequence[Sequence[str]], n: int) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Return for each n-gram the most often that one text has it, which text that is, and the most of the others."""
    table: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for place, found in enumerate(split):
        for gram, count in Counter(_grams(found, n)).items():
            most, owner, second = table.get(gram, (0, -1, 0))
            table[gram] = (count, place, most) if count > most else (most, owner, max(second, count))
    return table


def _highest_elsewhere(entry: tuple[int, int, int], place: int) -> int:
    most, owner, second = entry
    return second if owner == place else most


def _unit(vectors: Matrix) -> Matrix:
    """Return the rows at length 1; a row of zeros stays, and is like nothing."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
