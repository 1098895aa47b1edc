"""All that the page shows, as one plain value: what was measured, read from the run, and nothing computed twice."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from tuneshift.console import duration
from tuneshift.coverage import collapse
from tuneshift.criteria import Criterion
from tuneshift.evaluate.verdict import ARMS, points_with_interval, sentence
from tuneshift.report.coverage import cluster_rows, spread_sentences
from tuneshift.report.markdown import ACCURACY_HEADER, accuracy_facts, accuracy_rows, regression_line, usage_line
from tuneshift.report.page.examples import examples
from tuneshift.report.page.family import family
from tuneshift.report.page.learning import learning
from tuneshift.report.page.origins import origins
from tuneshift.report.page.sources import Sources, or_missing
from tuneshift.report.page.variety import variety
from tuneshift.run.watching import by_stage

LIVE_RULES = {"ppl_diff": ("tau",), "asymmetric": ("tau_f", "tau_b"), "ratio": ("ratio",)}
"""The rules that the page decides by itself, and the thresholds that they read; see assets/decide.js."""
THRESHOLDS = ("tau_f", "tau_b", "ratio")
NEAR_DUPLICATE_SHARE = 0.5  # of a round's prompts, from which the page warns of a collapse; a guess
VARIETY_LEFT = 0.7  # the last rounds' distinct-2 among the first rounds', below which it warns; a guess


def page_document(sources: Sources) -> dict[str, Any]:
    """Return the page's content; a part that cannot be made is {"missing": why}."""
    diversity = or_missing(lambda: variety(sources))
    tree = or_missing(lambda: family(sources.candidates, sources.calls, {seed.id: seed.text for seed in sources.seeds}))
    return {
        "name": sources.ledger.meta("name"),
        "version": sources.origin["tuneshift"],
        "run": shlex.quote(str(sources.run.path)),
        "rule_template": sources.settings.get("prompt_template"),
        "duration": duration(sum(sources.verdict["seconds"].values())),
        "verdict": verdict_part(sources.verdict),
        "rule": rule_part(sources),
        "examples": examples(sources),
        "calls": {name: list(call.demos) for name, call in sources.calls.items()},
        "diversity": diversity,
        "coverage": coverage_part(sources.verdict),
        "family": tree,
        "warnings": [*collapse(sources.verdict["coverage"]), *repetition(diversity)],
        "training": learning(sources),
        "origins": origins(sources),
    }


def verdict_part(verdict: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome: sentences and figures ready to be shown, and the arms' intervals to be drawn."""
    judged, usage = verdict["improved"] is not None, verdict["generator_usage"]
    return {
        "improved": verdict["improved"],
        "sentence": sentence(verdict),
        "header": ACCURACY_HEADER,
        "rows": accuracy_rows(verdict),
        "arms": {arm: {"name": name, **verdict[arm]} for arm, name in ARMS.items()} if judged else None,
        "chance": verdict["chance"],
        "gain": points_with_interval(verdict["difference"], verdict["difference_interval"], verdict["after"]["n"])
        if judged
        else None,
        "facts": accuracy_facts(verdict) if judged else [],
        **{
            key: verdict.get(key)
            for key in (
                "recovery", "recovery_interval", "recovery_reason", "reasons", "candidates", "rounds", "kept",
                "trained_pairs", "stop_reason",
            )
        },
        "seconds": by_stage(verdict["seconds"]),
        "usage": None if usage is None else {**usage, "sentence": usage_line(usage)},
        "regression": regression_line(verdict["regression"]) if verdict["regression"] else None,
    }  # fmt: skip


def rule_part(sources: Sources) -> dict[str, Any]:
    """Return the run's rule with its thresholds, and those of the rules that the page can apply.

    An automatic tau is the one that the first round was decided by. `unknown` names the thresholds whose variables
    are not set any more: the defaults stand in.
    """
    written = sources.settings["criterion"]
    thresholds = or_missing(lambda: _thresholds(sources.loaded.config.criterion.model_dump()))
    if "missing" in thresholds:
        thresholds = _thresholds(written)
    usual = asdict(Criterion(tau=sources.rounds[0].tau if sources.rounds else Criterion.tau))
    return {
        "name": sources.verdict["criterion"],
        "thresholds": {key: usual[key] for key in ("tau", *THRESHOLDS)} | thresholds,
        "unknown": [f"criterion.{key}" for key in THRESHOLDS if key not in thresholds],
        "calibrated": written["tau"] == "auto",
        "live": {name: list(reads) for name, reads in LIVE_RULES.items()},
        "count_eos": sources.count_eos,
    }


def _thresholds(section: dict[str, Any]) -> dict[str, Any]:
    """Return the thresholds of a `criterion` that are numbers: a variable's name is none."""
    return {key: section[key] for key in THRESHOLDS if isinstance(section[key], (int, float))}


def coverage_part(verdict: dict[str, Any]) -> dict[str, Any]:
    """Return how the kept pairs spread over kinds of responses: sentences, and the largest kinds."""
    found = verdict["coverage"]
    return {"sentences": spread_sentences(found), "rows": [] if found["reason"] else cluster_rows(found)}


def repetition(diversity: dict[str, Any]) -> list[str]:
    """Return what shows that the prompts repeat themselves."""
    found = []
    rounds = diversity.get("rounds") or []
    if rounds and (share := rounds[-1]["near_duplicates"]) is not None and share >= NEAR_DUPLICATE_SHARE:
        found.append(
            f"{share:.0%} of the last prompts nearly repeat an earlier one: the generator has little new to say."
        )
    first, last = (rounds[place]["distinct_2"] if len(rounds) > 1 else None for place in (0, -1))
    if first and last is not None and last < VARIETY_LEFT * first:
        found.append(
            f"Pairs of words vary less and less: distinct-2 went from {first:.2f} in the first rounds to {last:.2f}."
        )
    return found
