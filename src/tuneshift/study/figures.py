"""A figure for each cell of a study and each mean over cells: every arm's mean accuracy with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneshift.report.figures import PLAIN, drawing_library, save
from tuneshift.sections.study import MODELS

TRAINED, UNTRAINED = "#0072B2", "#D55E00"
"""Blue and vermilion of Okabe and Ito's palette (2008), which colour-blind people tell apart."""


def write_figures(folder: Path, cells: dict[str, Any]) -> dict[str, str]:
    """Write a PNG and an SVG for each cell and mean, the same bytes each time; return the PNGs' paths from above it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    library, written = drawing_library(), {}
    with library.rc_context(PLAIN):
        for cell, found in cells.items():
            arms = {name: arm for name, arm in found["arms"].items() if arm["accuracy"] is not None}
            figure = library.figure.Figure(figsize=(6, 0.8 + 0.3 * len(arms)), layout="constrained")
            axes = figure.add_subplot()
            for place, (name, arm) in enumerate(arms.items()):
                low, high = arm["interval"]
                colour, mark = (UNTRAINED, "s") if name in MODELS else (TRAINED, "o")
                axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2)
                axes.plot([100 * arm["accuracy"]], [place], mark, color=colour)
            axes.set_yticks(range(len(arms)), list(arms))
            axes.invert_yaxis()
            axes.set_xlim(-2, 102)  # so that a mark at 0 or 100 is whole
            axes.set_xlabel("right answers, % (mean over seeds, 95 % interval)")
            axes.set_title(cell)
            axes.grid(axis="x", alpha=0.3)
            save(figure, folder, cell)
            written[cell] = f"{folder.name}/{cell}.png"
    return written
