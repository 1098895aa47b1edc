"""Results as sections of tables: made once, told in Markdown and on a page (`page/assets/results.html`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneshift.report.markdown import markdown_table


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
