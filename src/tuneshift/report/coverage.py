"""How a run's coverage is told: sentences, the largest clusters, and what to do where the pool collapsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuneshift.coverage import SHOWN, collapse


def spread_sentences(found: Mapping[str, Any]) -> list[str]:
    """Return how the pairs spread over kinds of responses, or why that is not told, a sentence each."""
    whole, loop = found["spread"], found["loop"]
    pairs = f"{whole['pairs']} {found['of']} pairs" + (f" of {found['kept']} kept" if found["of"] == "learnt" else "")
    if found["reason"] is not None:
        return [f"{pairs}: {found['reason']}."]
    return [
        f"{pairs} show {whole['clusters']} kinds of responses, as even as "
        f"{whole['effective']:.1f} equal ones (exp of {whole['entropy']:.2f} nats); the largest has "
        f"{whole['largest']:.0%}.",
        f"About {loop['unseen']:.1%} of further pairs would show a new kind (Good-Turing), of at least "
        f"{loop['expected']:.0f} (Chao1): estimated from all {loop['pairs']} that were kept.",
    ]


def coverage_sentences(found: Mapping[str, Any]) -> list[str]:
    """Return what `coverage` found, a sentence each; a sentence that warns begins with "Warning: "."""
    told = spread_sentences(found)
    if found["reason"] is None and len(found["rounds"]) > 1:
        told.append(f"Kinds up to round {growth(found['rounds'])}.")
    if (probed := found["probed"]) is not None:
        missing = ", ".join(probed["missing"][:SHOWN]) + (", ..." if len(probed["missing"]) > SHOWN else "")
        shown = f"; no pair shows {missing}." if missing else "; the pairs show all of them."
        told.append(
            f"Asked {probed['words']} single words, F gave {probed['kinds'] or 'no'} kinds of responses more than once"
            + (shown if probed["kinds"] else ".")
        )
    if found["families"]:
        shares = ", ".join(f"{seed} {share:.0%}" for seed, share in found["families"].items())
        told.append(f"Descent by seed: {shares}.")
    told += [
        f"Asked {strategy}: {count['kept']} kept of {count['candidates']} candidates."
        for strategy, count in found["strategies"].items()
        if len(found["strategies"]) > 1
    ]
    if fewer := found["calls"]["fewer"]:
        told.append(
            f"{fewer} of {found['calls']['all']} generator calls showed fewer than {found['calls']['examples']} "
            "examples: there were no more, or no more fit into its context."
        )
    return told + [f"Warning: {warning}" for warning in collapse(found)]


def growth(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return how many kinds there were up to some of the rounds, ever further apart, and up to the last."""
    last = len(rounds) - 1
    shown = [one for place, one in enumerate(rounds) if (place + 1).bit_count() == 1 or place == last]
    return ", ".join(f"{one['round'] + 1}: {one['clusters_so_far']}" for one in shown)


def cluster_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each of the largest clusters: the skeleton of its responses, its pairs and their share."""
    pairs = found["spread"]["pairs"]
    return [[skeleton, str(count), f"{count / pairs:.1%}"] for skeleton, count in found["largest_clusters"]]
