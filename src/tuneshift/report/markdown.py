"""`report.md`: a run's outcome on one page, for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tuneshift.criteria import RULES
from tuneshift.evaluate.verdict import ARMS, points_with_interval, sentence
from tuneshift.report.coverage import cluster_rows, coverage_sentences
from tuneshift.report.decomposition import decomposition, decomposition_rows, decomposition_title
from tuneshift.run.directory import RunDirectory, read_json, write_atomically
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate, Response
from tuneshift.run.stored import counts_eos
from tuneshift.run.watching import by_stage

EXAMPLES = 8


def write_report(run: RunDirectory, ledger: Ledger) -> None:
    """Write `report.md` from the verdict, the training record and the ledger."""
    verdict = read_json(run.verdict)
    training = read_json(run.training)
    candidates = ledger.candidates()
    parts = [
        f"# Transfer report: {ledger.meta('name')}",
        sentence(verdict),
        accuracy_section(verdict),
        _regression(verdict["regression"]),
        _selection(verdict),
        _coverage(verdict["coverage"]),
        _expected_margin(decomposition(candidates, ledger.rounds())),
        _training(training),
        _time(verdict["seconds"]),
        _examples(candidates, count_eos=counts_eos(ledger)),
        "## Settings\n\n" + fenced(run.config.read_text(encoding="utf-8").rstrip("\n"), "yaml"),
    ]
    write_atomically(run.report, "\n\n".join(part for part in parts if part) + "\n")


def accuracy_rows(verdict: dict[str, Any]) -> list[list[str]]:
    """Return a row for each arm: what it is, how many items it got right, accuracy and its 95 % interval.

    An arm that was not asked, such as the source in a verdict's `regression`, has no row.
    """
    chance = verdict["chance"]
    rows = [
        [
            label,
            f"{verdict[arm]['correct']} of {verdict[arm]['n']}",
            f"{verdict[arm]['accuracy']:.1%}",
            f"{verdict[arm]['interval']['low']:.1%} to {verdict[arm]['interval']['high']:.1%}",
            "n/a" if (capped := verdict[arm]["hit_length_limit"]) is None else f"{capped:.1%}",
        ]
        for arm, label in ARMS.items()
        if verdict.get(arm) is not None
    ]
    return rows if chance is None else [["Chance", "", f"{chance:.1%}", "", ""], *rows]


ACCURACY_HEADER = ["model", "right", "accuracy", "95 % interval", "hit the length limit"]


def accuracy_section(verdict: dict[str, Any]) -> str:
    """Return the accuracies with their intervals, the gain and what was lost; nothing where nothing was measured."""
    if verdict["improved"] is None:
        return ""
    table = markdown_table(ACCURACY_HEADER, accuracy_rows(verdict))
    return "\n".join(["## Accuracy", "", table, "", *(f"- {fact}" for fact in accuracy_facts(verdict))])


def accuracy_facts(verdict: dict[str, Any]) -> list[str]:
    """Return what a measured verdict says beside the accuracies, a sentence each: gain, recovery, power, flips."""
    n = verdict["after"]["n"]
    facts = [
        f"Gain {points_with_interval(verdict['difference'], verdict['difference_interval'], n)}; "
        f"{verdict['gained_items']} gained, {verdict['lost_items']} lost of {n} items; exact McNemar "
        f"p = {verdict['mcnemar_p']:.3g} (mid-p {verdict['mcnemar_mid_p']:.3g}).",
    ]
    if verdict["recovery"] is None:
        facts.append(f"Recovery: n/a ({verdict['recovery_reason']}).")
    else:
        interval = verdict["recovery_interval"]
        shown = (
            f"95 % interval {interval['low']:.2f} to {interval['high']:.2f}"
            if interval
            else f"no interval: {verdict['recovery_reason']}"
        )
        facts.append(f"Recovery (after - before) / (source - before): {verdict['recovery']:.2f} ({shown}).")
    smallest, why_none = verdict["minimum_detectable_difference"], verdict.get("minimum_detectable_reason")
    gain = f"n/a ({why_none})" if smallest is None else f"{smallest * 100:.1f} points"
    facts.append(f"Smallest gain that {n} items show with 80 % power at this rate of changed answers: {gain}.")
    facts += [f"By {metric}: {shown}." for metric, shown in _other_metrics(verdict)]
    flips = verdict["negative_flips"]
    return [
        *facts,
        f"Negative flips: {_flips(flips['before'], 'the target had right before')}.",
        f"Not carried over: {_flips(flips['source'], 'the source has right')}.",
    ]


def _other_metrics(verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """Return each metric that the verdict does not rest on, and the arms' rates by it."""
    by_metric = {arm: verdict[arm]["by_metric"] for arm in ("before", "after", "source")}
    others = [metric for metric in by_metric["before"] if metric != verdict["questions"]["metric"]]
    return [
        (metric, "; ".join(f"{ARMS[arm].lower()} {_rate(rates[metric])}" for arm, rates in by_metric.items()))
        for metric in others
    ]


def _rate(rate: dict[str, Any]) -> str:
    interval = rate["interval"]
    return f"{rate['correct']} of {rate['n']} ({interval['low']:.1%} to {interval['high']:.1%})"


def _flips(flips: dict[str, Any], whose: str) -> str:
    interval = flips["interval"]
    return (
        f"of {flips['were_right']} items that {whose}, {flips['items']} are wrong after; of all {flips['n']} that is "
        f"{flips['rate']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"
    )


def regression_line(regression: dict[str, Any]) -> str:
    """Return how the answers to the regression questions changed, and whether the margin is ruled out."""
    found = {True: "ruled out", False: "passed", None: "not ruled out"}[regression["non_inferior"]]
    change = points_with_interval(regression["difference"], regression["difference_interval"], regression["after"]["n"])
    return (
        f"change on the regression questions {change}; a loss of {regression['margin'] * 100:g} points is {found} "
        f"(exact one-sided 95 % bound {regression['lower_bound'] * 100:+.1f} points)"
    )


def _regression(regression: dict[str, Any] | None) -> str:
    if regression is None:
        return ""
    asked = regression["questions"]
    lines = [
        "## Regression",
        "",
        markdown_table(ACCURACY_HEADER, accuracy_rows(regression)),
        "",
        f"- Questions: {asked['task']}, {asked['data'] or 'from the Hub'}.",
        f"- Result: {regression_line(regression)}.",
        f"- Negative flips: {_flips(regression['negative_flips'], 'the target had right before')}.",
    ]
    return "\n".join(lines)


def _selection(verdict: dict[str, Any]) -> str:
    n = verdict["candidates"]
    tau = f", tau = {verdict['tau']:g}" if "tau" in RULES[verdict["criterion"]].reads else ""
    rows = [[reason, str(count), f"{count / n:.1%}"] for reason, count in verdict["reasons"].items()]
    return (
        f"## Candidates\n\n{n} candidates in {verdict['rounds']} rounds; {verdict['stop_reason']}; "
        f"criterion {verdict['criterion']}{tau}.\n\n"
        + markdown_table(["outcome", "candidates", "share"], rows)
        + (f"\n\n{usage_line(verdict['generator_usage'])}" if verdict["generator_usage"] else "")
    )


def usage_line(usage: dict[str, Any]) -> str:
    """Return what a hosted generator counted and charged."""
    price = "" if usage["cost"] is None else f", at a cost of {usage['cost']:.4g} in the currency of the prices"
    return (
        f"The generator's API counted {usage['prompt_tokens']:,} prompt tokens and {usage['completion_tokens']:,} "
        f"written ones in {usage['requests']:,} requests{price}. {usage['unreported']} more may have been charged "
        "without a count."
    )


def _coverage(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    told = "\n".join(f"- {_harmless(sentence)}" for sentence in coverage_sentences(found))
    table = markdown_table(["kind of response", "pairs", "share"], cluster_rows(found))
    return f"## Coverage\n\n{told}\n\n{table}"


def _expected_margin(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    table = markdown_table(["part", "mean", "standard error"], decomposition_rows(found))
    return f"## Expected margin (paper, eq. 8)\n\nIn {decomposition_title(found)}.\n\n{table}"


def _training(training: dict[str, Any]) -> str:
    losses = training["losses"]
    shown = ", ".join(f"{loss:.3f}" for loss in losses)
    together = f" and in {training['processes']} processes" if training["processes"] > 1 else ""
    return (
        f"## Training\n\n{training['steps']} steps on {', '.join(training['target_modules'])} in "
        f"{training['seconds']:.0f} s{together}. Mean loss by epoch, in nats per response token: {shown}."
    )


def _time(seconds: dict[str, float]) -> str:
    rows = [[stage, f"{value:.1f}"] for stage, value in by_stage(seconds).items()]
    return "## Time\n\n" + markdown_table(["stage", "seconds"], rows)


def _examples(candidates: Sequence[Candidate], *, count_eos: bool) -> str:
    asks_base = any(c.y_b is not None for c in candidates)  # where it does, those that show both
    answered = [c for c in candidates if c.y_f is not None and (c.y_b is not None or not asks_base)]
    step = max(1, len(answered) // EXAMPLES)
    rows = [
        [c.text, *_shown(c.y_f, count_eos), *_shown(c.y_b, count_eos), c.reason] for c in answered[::step][:EXAMPLES]
    ]
    header = ["prompt", "F's response", "PPL_F(y_f)", "B's response", "PPL_F(y_b)", "outcome"]
    return "## Examples\n\n" + markdown_table(header, rows)


def _shown(response: Response | None, count_eos: bool) -> tuple[str, str]:
    """Return a response's text and perplexity."""
    if response is None:
        return "not asked", "n/a"
    found = response.finite_perplexity(count_eos=count_eos)
    return response.text, "n/a" if found is None else f"{found:.2f}"


def fenced(text: str, language: str) -> str:
    """Return a Markdown code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; cells may hold model text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Make model text harmless in a Markdown table: one line, no markup, no HTML."""
    flat = " ".join(text.split())
    return _harmless(flat if len(flat) <= 120 else flat[:117] + "...") or " "


def _harmless(text: str) -> str:
    """Return a text of one line whose marks and tags are only seen."""
    shown = " ".join(text.split())
    for mark in "\\|`*_[]":
        shown = shown.replace(mark, "\\" + mark)
    return shown.replace("<", "&lt;").replace(">", "&gt;")
