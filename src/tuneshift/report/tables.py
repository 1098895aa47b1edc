"""Results as sections of tables: made once, told in Markdown and on a page (`page/assets/results.html`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneshift.evaluate.verdict import ALPHA
from tuneshift.report.markdown import markdown_table

SIDES = ("better", "worse")
MOST_NAMED = 4  # that a sentence names; a guess at what people read


@dataclass(frozen=True)
class Table:
    """A table as people read it; the first column says what a row is about."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """What is told under one heading, in this order; `figure` names its figure, where it has one.

    `intervals` are the figure's rows on a page: {name, kind, value, low, high}, shares of right answers by models that
    are `trained` or `untrained`; `caption` says of what.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    figure: str = ""
    caption: str = ""
    intervals: Sequence[dict[str, Any]] = field(default_factory=list)

    def markdown(self, image: str | None = None) -> str:
        """Return the section as Markdown with its figure, the path `image`."""
        parts = [f"## {self.title}", self.text]
        parts += [markdown_table(table.header, table.rows) for table in self.tables]
        parts += [f"- {note}" for note in self.notes]
        parts += [f"![{self.figure}]({image})"] if image else []
        return "\n\n".join(part for part in parts if part)


def conclusion(tested: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Return in plain words which differences a test shows.

    `tested` has, by what others are compared with, each one's (difference, p value adjusted by Holm) by its name.
    """
    told = []
    for other, compared in tested.items():
        shown = {name: difference > 0 for name, (difference, p) in compared.items() if p <= ALPHA}
        sides = {word: [name for name, better in shown.items() if better is (word == "better")] for word in SIDES}
        said = "; ".join(f"{_listed(names)} {word}" for word, names in sides.items() if names)
        noun = "comparison" if len(compared) == 1 else "comparisons"
        if compared:
            told.append(f"Of {len(compared)} {noun} with {other}: {said or 'no difference is shown'}.")
    if not told:
        return "Nothing could be compared."
    return " ".join([*told, f"Counted as shown: p <= {ALPHA:g} after Holm's adjustment."])


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMED:
        return f"{len(names)} are"
    return f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"
