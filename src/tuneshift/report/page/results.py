"""A page of results in sections, as a study's and a comparison's: the report's template, style, policy and charts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tuneshift import __version__
from tuneshift.report.page.render import RESULTS, render
from tuneshift.report.tables import Section, Table


def results_page(
    name: str,
    *,
    kind: str,
    conclusion: str,
    introduction: Sequence[str],
    sections: Sequence[Section],
    command: Sequence[str],
    costs: Table | dict[str, str] | None = None,
    settings: str = "",
) -> str:
    """Return the page; `costs` is a table, {"missing": why}, or `None` where there is nothing to tell of them."""
    document: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "version": __version__,
        "conclusion": conclusion,
        "introduction": introduction,
        "sections": [asdict(section) for section in sections],
        "charts": {str(place): section.intervals for place, section in enumerate(sections) if section.intervals},
        "costs": asdict(costs) if isinstance(costs, Table) else costs,
        "settings": settings,
        "command": shlex.join(command),
    }
    return render(document, RESULTS)
