"""The page's part on diversity: measures by round, and a map of seeds, candidates and held-out prompts."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneshift.prompts.parsing import extract_text
from tuneshift.report.diversity import distinct_n, near_duplicates, nearest_seed_distance, self_bleu, vendi_score
from tuneshift.report.embedding import Embedding, embed, flat_map
from tuneshift.report.page.examples import clip
from tuneshift.report.page.sources import Sources, or_missing
from tuneshift.run.records import Candidate

GROUPS = 12  # rows of a table by round, or columns of a drawing, at most; a guess at what people read
MAP_POINTS = 1200  # prompts on the map, at most, so that t-SNE takes seconds; measured
MAP_HELD_OUT = 200  # of which held-out prompts, at most; a guess
LABEL = 200  # characters of a prompt that is shown at its point; a guess
WRITTEN_IN_VAIN = ("unfinished or unreadable prompt", "empty prompt")

Matrix = NDArray[np.float64]


def variety(sources: Sources) -> dict[str, Any]:
    """Return the measures of all readable prompts by round, of the kept ones, and the map."""
    readable = [c for c in sources.candidates if c.reason not in WRITTEN_IN_VAIN]
    seeds = [seed.text for seed in sources.seeds]
    held_out = or_missing(lambda: held_out_texts(sources))
    real: list[str] = [] if isinstance(held_out, dict) else held_out
    shown_real = random.Random(0).sample(real, min(MAP_HELD_OUT, len(real)))
    texts = [*seeds, *shown_real, *(c.text for c in readable)]
    embedding = or_missing(lambda: embed(texts))
    vectors = None if isinstance(embedding, dict) else embedding.vectors
    own = None if vectors is None else vectors[len(texts) - len(readable) :]
    near = near_duplicates([*seeds, *(c.text for c in readable)])[len(seeds) :]

    def measured(label: str, chosen: Sequence[int]) -> dict[str, Any]:
        prompts = [readable[place].text for place in chosen]
        found = {
            "label": label,
            "n": len(prompts),
            "distinct_1": distinct_n(prompts, 1),
            "distinct_2": distinct_n(prompts, 2),
            "self_bleu": self_bleu(prompts),
            "near_duplicates": statistics.fmean(near[place] for place in chosen) if chosen else None,
            "vendi": None,
            "seed_distance": None,
        }
        if own is not None and vectors is not None and chosen:
            rows = own[list(chosen)]
            found["vendi"] = vendi_score(rows)
            found["seed_distance"] = statistics.median(nearest_seed_distance(rows, vectors[: len(seeds)]))
        return found

    by_round = [
        measured(label, [place for place, c in enumerate(readable) if first <= c.round <= last])
        for label, first, last in spans(len(sources.rounds), GROUPS)
    ]
    return {
        "all": measured("all readable prompts", range(len(readable))),
        "kept": measured("kept pairs", [place for place, c in enumerate(readable) if c.kept]),
        "rounds": by_round,
        "embedded_by": embedding.described if isinstance(embedding, Embedding) else None,
        "map": embedding if isinstance(embedding, dict) else _map(embedding.vectors, seeds, shown_real, readable),
        "held_out_missing": held_out["missing"] if isinstance(held_out, dict) else None,
    }


def held_out_texts(sources: Sources) -> list[str]:
    """Return the evaluation's prompts, of those that follow the template only its text."""
    template = sources.loaded.config.prompt_template
    return [extract_text(item.prompt, template) or item.prompt for item in sources.held_out]


def spans(number: int, most: int) -> list[tuple[str, int, int]]:
    """Return 0 to `number` - 1 in at most `most` runs of equal length, the last may be shorter: label, first, last.

    Labels count from 1.
    """
    size = max(1, -(-number // most))
    ends = [(first, min(first + size, number) - 1) for first in range(0, number, size)]
    return [(f"{first + 1}" if first == last else f"{first + 1} to {last + 1}", first, last) for first, last in ends]


def _map(vectors: Matrix, seeds: list[str], real: list[str], readable: Sequence[Candidate]) -> dict[str, Any]:
    """Return the points of the map: of more candidates than it holds, some drawn at random."""
    before = len(seeds) + len(real)
    room = max(0, MAP_POINTS - before)
    drawn = sorted(random.Random(0).sample(range(len(readable)), min(room, len(readable))))
    places = flat_map(vectors[[*range(before), *(before + place for place in drawn)]])
    low, high = places.min(axis=0), places.max(axis=0)
    unit = (places - low) / np.where(high > low, high - low, 1)
    labels: list[dict[str, Any]] = [{"kind": "seed", "text": clip(text, LABEL)} for text in seeds]
    labels += [{"kind": "held_out", "text": clip(text, LABEL)} for text in real]
    labels += [
        {"kind": "kept" if c.kept else "dropped", "text": clip(c.text, LABEL), "round": c.round, "id": c.id}
        for c in (readable[place] for place in drawn)
    ]
    points = [
        {"x": round(float(x), 4), "y": round(float(y), 4), **label} for (x, y), label in zip(unit, labels, strict=True)
    ]
    return {"points": points, "candidates": len(readable), "shown": len(drawn)}
