"""How much of what F can say the pairs of a run show, from stored records alone.

Responses are compared by their kinds. The kind of a response is its skeleton, what is left when the words that were
copied from the prompt are masked: of `PlayMusic(artist="Miles Davis")` that is `PlayMusic(artist="_")`. The kind of a
closed answer, such as `lost or stolen card`, is the answer. Responses of one kind make a cluster. A pool that collapses
shows as few, large clusters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tuneshift.engines.base import derive_seed
from tuneshift.run.records import Candidate, GeneratorCall, Probe

if TYPE_CHECKING:
    from numpy import floating
    from numpy.typing import NDArray

Answer = tuple[str, str]
"""A prompt's text, without its template, and the response to it."""
MARKS = "".join(char for char in map(chr, range(0x300, 0x3100)) if unicodedata.category(char)[0] == "M")
"""Vowel signs and the like, which belong to the letter before them and are no letters to `re`."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese letters: no spaces part words, so each letter is one."""
TOKEN = re.compile(rf"[{UNSPACED}][{MARKS}]*|(?:(?![{UNSPACED}])[\w{MARKS}])+|[^\w\s]")
MASK = "_"
SHOWN = 8  # clusters in a report; a guess
FEWEST = 30  # pairs before a collapse is told; a guess
MOST_ALONE = 0.9  # of the pairs in clusters of one, where clusters are still worth balancing; a guess
MOST_IN_TWO = 0.7  # of the pairs in the two largest clusters; a guess
MOST_OF_ONE_SEED = 0.5  # of the pairs' descent; a guess
BLOCK = 512  # rows of the similarity matrix at a time; a guess that keeps 10,000 skeletons below 100 MB


@lru_cache(maxsize=2**16)
def skeleton(text: str, response: str) -> str:
    """Return the response with each longest span of words that also stands in `text` as one mask.

    Case does not count. Neighbouring masks become one; spacing and punctuation between other words stay. A response
    that was copied whole is its own skeleton: it may be one of the options that the prompt lists.
    """
    have = [match[0].casefold() for match in TOKEN.finditer(text)]
    places = defaultdict(list)
    for place, word in enumerate(have):
        places[word].append(place)
    found = list(TOKEN.finditer(response))
    words = [match[0].casefold() for match in found]
    masked, copied_to, at = "", 0, 0
    while at < len(words):
        starts = places[words[at]] if words[at][0].isalnum() else ()  # a copy begins with a word
        length = max((_shared(words, at, have, place) for place in starts), default=0)
        if length:
            between = response[copied_to : found[at].start()]
            masked += between + MASK if between.strip() or not copied_to else ""
            copied_to = found[at + length - 1].end()
        at += length or 1
    masked = (masked + response[copied_to:]).strip()
    return masked if any(_words(masked)) else response.strip()


def _shared(words: Sequence[str], at: int, have: Sequence[str], place: int) -> int:
    """Return how many tokens two texts share from there on, without punctuation at the end.

    A single letter of a script without spaces is found by chance, and counts as none.
    """
    length = 0
    while at + length < len(words) and place + length < len(have) and words[at + length] == have[place + length]:
        length += 1
    while length > 1 and not words[at + length - 1][0].isalnum():
        length -= 1
    return 0 if length == 1 and re.match(f"[{UNSPACED}]", words[at]) else length


def kinds_of(answers: Sequence[Answer]) -> list[str]:
    """Return the kind of each answer: its skeleton, or the response itself where it is a closed answer.

    It is a closed one where some prompt got it without having a word of it: then it was not copied elsewhere either,
    where a prompt happens to share its words.
    """
    skeletons = [skeleton(text, response) for text, response in answers]
    whole = [response.strip() for _, response in answers]
    closed = {response for response, masked in zip(whole, skeletons, strict=True) if response == masked}
    return [one if one in closed else masked for one, masked in zip(whole, skeletons, strict=True)]


def answer_of(candidate: Candidate) -> Answer:
    """Return what F answered to what: an answered candidate's text and response."""
    assert candidate.y_f is not None
    return candidate.text, candidate.y_f.text


def kinds_beside(candidates: Sequence[Candidate], probes: Iterable[Probe]) -> tuple[list[str], list[str]]:
    """Return the kinds of answered candidates, and of F's answers to probes.

    They are told together: a closed answer that every prompt happens to share words with is known by its probes.
    """
    said = [(probe.word, probe.response) for probe in probes if probe.response]
    kinds = kinds_of([*map(answer_of, candidates), *said])
    return kinds[: len(candidates)], kinds[len(candidates) :]


# --- steering and choosing: where is it dense? ---


class Similarity:
    """The likeness of skeletons: of two, the share of their words that both have (Jaccard index of the word sets).

    Equal skeletons have 1, so between closed answers of one word the likeness is 1 or 0.
    """

    def __init__(self, skeletons: Sequence[str]) -> None:
        import numpy as np
        from scipy.sparse import csr_matrix

        # A skeleton without words is like none but its equal.
        words = [set(_words(each)) or {each} for each in skeletons]
        columns = {word: column for column, word in enumerate(sorted(set().union(*words)))}
        indices = [columns[word] for each in words for word in sorted(each)]
        self._sizes: NDArray[floating[Any]] = np.array([len(each) for each in words], dtype=np.float64)
        starts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(int)
        self._matrix = csr_matrix((np.ones(len(indices)), indices, starts), shape=(len(words), len(columns)))

    def rows(self, start: int, stop: int) -> NDArray[floating[Any]]:
        """Return the likeness of skeletons `start` to `stop` with all, of shape (stop - start, n)."""
        shared = (self._matrix[start:stop] @ self._matrix.T).toarray()
        return shared / (self._sizes[start:stop, None] + self._sizes[None, :] - shared)  # type: ignore[no-any-return]

    def densities(self, counts: NDArray[floating[Any]]) -> NDArray[floating[Any]]:
        """Return for each skeleton how many others are like it, itself included, of shape (n,).

        `counts` tells how often each skeleton stands there; each other counts with its likeness.
        """
        import numpy as np

        n = len(counts)
        return np.concatenate([self.rows(at, min(at + BLOCK, n)) @ counts for at in range(0, n, BLOCK)])


def densities(skeletons: Sequence[str]) -> list[float]:
    """Return for each of the skeletons how many are like it: the size of its cluster, where clusters share no word."""
    import numpy as np

    if not skeletons:
        return []
    counts = Counter(skeletons)
    dense = Similarity(list(counts)).densities(np.array(list(counts.values()), dtype=np.float64))
    by_skeleton = dict(zip(counts, dense.tolist(), strict=True))
    return [by_skeleton[each] for each in skeletons]


def thin_out(candidates: Sequence[Candidate], size: int, *, seed: int, probes: Sequence[Probe] = ()) -> list[Candidate]:
    """Return `size` of the answered candidates, in the order given: one by one the densest is left out.

    Where clusters share no word the largest one loses a candidate each time, so small ones stay whole and large ones
    are cut to one level. Which candidate of a cluster goes is drawn by a hash of the seed and its id.
    """
    import numpy as np

    clusters: dict[str, list[Candidate]] = defaultdict(list)
    drawn = sorted(candidates, key=lambda c: derive_seed(seed, "thin", c.id))
    for candidate, kind in zip(drawn, kinds_beside(drawn, probes)[0], strict=True):
        clusters[kind].append(candidate)
    left = list(clusters.values())
    similarity = Similarity(list(clusters))
    dense = similarity.densities(np.array([len(members) for members in left], dtype=np.float64))
    for _ in range(len(candidates) - size):
        ties = np.flatnonzero(dense >= dense.max() - 1e-9).tolist()  # kinds of the same words are equally dense
        densest = max(ties, key=lambda place: len(left[place]))
        left[densest].pop()
        dense -= similarity.rows(densest, densest + 1)[0]
        if not left[densest]:
            dense[densest] = -np.inf
    chosen = {candidate.id for members in left for candidate in members}
    return [candidate for candidate in candidates if candidate.id in chosen]


def probed_kinds(probes: Iterable[Probe]) -> list[str]:
    """Return the kinds of responses that F gave to more than one probe, most frequent first.

    What it said to one alone it may have invented for it.
    """
    return said_again(kinds_beside([], probes)[1])


def said_again(kinds: Iterable[str]) -> list[str]:
    """Return the kinds that stand there more than once, most frequent first."""
    return [kind for kind, count in Counter(kinds).most_common() if count > 1]


def _words(text: str) -> Iterator[str]:
    return (match[0].casefold() for match in TOKEN.finditer(text) if match[0] != MASK and match[0][0].isalnum())


# --- measuring: how many clusters, how even, how many unseen? ---


@dataclass(frozen=True)
class Spread:
    """How a number of pairs spreads over clusters.

    `entropy` is in nats; `effective` is exp(entropy), the number of equally large clusters with that entropy. `largest`
    and `two_largest` are the shares of the pairs in them. `unseen` estimates the chance that one more pair opens a new
    cluster: the share of clusters of one pair (Good-Turing, Good 1953). `expected` estimates how many clusters there
    are, those that were not seen included, from below (Chao1, Chao 1984, bias-corrected).
    """

    pairs: int
    clusters: int
    entropy: float
    effective: float
    largest: float
    two_largest: float
    unseen: float
    expected: float


def spread(clusters: Iterable[str]) -> Spread | None:
    """Return how pairs spread over the clusters that they are in; `None` where there is no pair."""
    counts = Counter(clusters)
    n = counts.total()
    if n == 0:
        return None
    once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
    entropy = math.fsum(-count / n * math.log(count / n) for count in counts.values())
    return Spread(
        pairs=n,
        clusters=len(counts),
        entropy=entropy,
        effective=math.exp(entropy),
        largest=max(counts.values()) / n,
        two_largest=sum(count for _, count in counts.most_common(2)) / n,
        unseen=once / n,
        expected=len(counts) + once * (once - 1) / (2 * (twice + 1)),
    )


def in_kinds(candidates: Sequence[Candidate], probes: Sequence[Probe] = ()) -> bool:
    """Tell whether the responses of answered candidates fall into kinds at all; those of long texts do not."""
    found = spread(kinds_beside(candidates, probes)[0])
    return found is not None and found.unseen <= MOST_ALONE


def descents(kept: Sequence[Candidate], calls: Mapping[str, GeneratorCall]) -> dict[str, Counter[str]]:
    """Return for each kept candidate, by id, the share of it that comes down to each seed; the shares sum to 1.

    A candidate descends in equal parts from the demos that its call showed, and a demo from those of its own call. One
    without demos descends from nothing. `kept` is in the order in which they were written: parents come first.
    """
    found: dict[str, Counter[str]] = {}
    for candidate in kept:
        demos = calls[candidate.call_id].demos
        own: Counter[str] = Counter()
        for demo in demos:
            for seed, share in found.get(demo, {demo: 1.0}).items():
                own[seed] += share / len(demos)  # type: ignore[assignment]  # Counter's stubs know whole numbers only
        found[candidate.id] = own
    return found


def families(
    candidates: Sequence[Candidate], calls: Mapping[str, GeneratorCall], learnt: Collection[str] | None = None
) -> dict[str, float]:
    """Return the share of the kept pairs that descends from each seed that was shown, largest first.

    Of the pairs, those in `learnt` alone count where it is given; their descent leads over all kept ones. The result is
    empty where nothing was shown, and 0 for a seed that no pair comes from.
    """
    names = {candidate.id for candidate in candidates}
    pairs: Counter[str] = Counter(dict.fromkeys((d for c in calls.values() for d in c.demos if d not in names), 0))
    for name, own in descents([candidate for candidate in candidates if candidate.kept], calls).items():
        if learnt is None or name in learnt:
            pairs.update(own)
    total = math.fsum(pairs.values()) or 1.0  # nothing is kept
    return {seed: share / total for seed, share in pairs.most_common()}


def coverage(
    candidates: Sequence[Candidate],
    calls: Sequence[GeneratorCall],
    learnt: Collection[str] | None = None,
    probes: Sequence[Probe] | None = None,
) -> dict[str, Any] | None:
    """Return how the pairs of a run cover what F says, as plain data; `None` where nothing is kept.

    `of` says which pairs: those that are `learnt`, given by their ids, or with `None` all of the `kept` ones; their
    `spread`, largest clusters, families, and what they lack of F's answers to probes are told. `loop` is the spread of
    all kept pairs: those that are learnt were chosen for their kinds, and tell nothing of what the loop would still
    find. `rounds` holds for each round its own spread of kept pairs and how many clusters there are up to it. Where
    hardly two responses are alike, as between long texts, clusters tell nothing, and `reason` says so. `calls` counts
    the generator's calls, and how many of them showed fewer than the most examples. `probed` tells which kinds of
    responses to `probes` the pairs lack.
    """
    kept = [candidate for candidate in candidates if candidate.kept]
    pairs = [candidate for candidate in kept if learnt is None or candidate.id in learnt]
    kinds, of_probes = kinds_beside(kept, probes or ())
    of_kept = dict(zip([candidate.id for candidate in kept], kinds, strict=True))
    shown = [of_kept[candidate.id] for candidate in pairs]
    whole, loop = spread(shown), spread(of_kept.values())
    if whole is None or loop is None:
        return None
    by_id = {call.id: call for call in calls}
    rounds, known = [], set[str]()
    for index in sorted({candidate.round for candidate in candidates}):
        own = [of_kept[candidate.id] for candidate in kept if candidate.round == index]
        known |= set(own)
        found = spread(own)
        rounds.append({"round": index, "clusters_so_far": len(known), "spread": found and asdict(found)})
    alone = loop.pairs > 1 and loop.unseen > MOST_ALONE
    most = max(len(call.demos) for call in calls)
    return {
        "of": "kept" if learnt is None else "learnt",
        "kept": len(kept),
        "spread": asdict(whole),
        "loop": asdict(loop),
        "reason": "hardly two responses are alike, so clusters tell nothing" if alone else None,
        "largest_clusters": [] if alone else Counter(shown).most_common(SHOWN),
        "strategies": _by_strategy(candidates, by_id),
        "calls": {"all": len(calls), "examples": most, "fewer": sum(len(call.demos) < most for call in calls)},
        "probed": None if probes is None else _probed(len(probes), said_again(of_probes), set(shown)),
        "families": families(candidates, by_id, learnt),
        "rounds": rounds,
    }


def _probed(words: int, kinds: Sequence[str], shown: Collection[str]) -> dict[str, Any]:
    """Return how many words F was asked, how many kinds it gave to more than one, and which of them are not shown."""
    return {"words": words, "kinds": len(kinds), "missing": [kind for kind in kinds if kind not in shown]}


def _by_strategy(candidates: Sequence[Candidate], calls: Mapping[str, GeneratorCall]) -> dict[str, dict[str, int]]:
    """Return how many candidates each strategy wrote, and how many of them were kept."""
    written = Counter(calls[candidate.call_id].strategy for candidate in candidates)
    kept = Counter(calls[candidate.call_id].strategy for candidate in candidates if candidate.kept)
    return {strategy: {"candidates": written[strategy], "kept": kept[strategy]} for strategy in sorted(written)}


def collapse(found: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a run's coverage and what to do, a sentence each.

    Two or three kinds may be all that there are, so only one, or the two largest of more, are told.
    """
    loop, warnings = found["loop"], list[str]()
    if loop["pairs"] < FEWEST:
        return []
    asked = {
        frozenset({"listed"}): "give prompts of other kinds.",
        frozenset({"forward"}): "add seeds of other kinds; synthesis.back_generation asks for the rare ones.",
    }
    advice = asked.get(frozenset(found["strategies"]), "add seeds of other kinds, or use another generator.")
    held = loop["two_largest"]
    if loop["clusters"] == 1:
        warnings.append(f"all kept pairs have one kind of response: {advice}")
    elif loop["clusters"] > 3 and held > MOST_IN_TWO:
        warnings.append(f"two of {loop['clusters']} kinds of responses are {held:.0%} of the kept pairs: {advice}")
    seed, share = next(iter(found["families"].items()), ("", 0.0))
    if len(found["families"]) >= 3 and share > MOST_OF_ONE_SEED:
        advice = "a higher synthesis.seed_share shows all seeds more."
        warnings.append(f"{share:.0%} of the {found['of']} pairs descend from seed {seed}: {advice}")
    return warnings
