"""The page's figures for papers and slides: PNG and SVG, light and dark, the same bytes for the same run."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneshift.criteria import RULES, Criterion
from tuneshift.errors import ConfigError
from tuneshift.evaluate.verdict import ARMS
from tuneshift.run.directory import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Theme:
    """A ground with the inks that read well on it; the colours are Okabe and Ito's (2008), as on the page."""

    ground: str
    ink: str
    soft: str
    f: str
    b: str
    t: str
    dropped: str
    held_out: str
    bands: tuple[str, ...]


THEMES = {
    "light": Theme("#ffffff", "#1b1f24", "#57606a", "#0072b2", "#d55e00", "#00785a", "#8a929b", "#b0568a",
                   ("#0072b2", "#c98500", "#009e73", "#c46a9a", "#d55e00", "#3597cf", "#8f8400")),
    "dark": Theme("#14171b", "#e6e9ed", "#a3acb7", "#56b4e9", "#f0883e", "#2fc79d", "#7d8691", "#e3a2c6",
                  ("#4a9ed6", "#f2b53a", "#2fc79d", "#e3a2c6", "#f0883e", "#8fd0f5", "#e0d45a")),
}  # fmt: skip
ROUNDS = ("#0072b2", "#3f8fc0", "#8fa9b8", "#c9a15a", "#e07f1f", "#d55e00")
"""From the first rounds to the last, on either ground."""
DPI = 150
PLAIN = {"font.size": 9, "svg.hashsalt": "tuneshift"}
"""matplotlib's settings of every figure."""


def write_figures(folder: Path, document: dict[str, Any]) -> list[str]:
    """Draw every figure that the page's `document` has data for, and return their names.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    library = drawing_library()
    found = drawings(document)
    for shade, theme in THEMES.items():
        with library.rc_context(_style(theme)):
            for name, draw in found.items():
                figure = library.figure.Figure(figsize=(5.2, 3.6), layout="tight")
                draw(figure.add_subplot(), theme)
                save(figure, folder, f"{name}_{shade}")
    return list(found)


def drawing_library() -> Any:
    """Return matplotlib with its figures, without a window of any kind.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError(
            "Figures were not drawn: matplotlib is not installed. Install it with pip install 'tuneshift[figures]', "
            "then write the report again."
        ) from error
    return matplotlib


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and SVG, the same bytes each time where `PLAIN` is in force."""
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata)
        write_atomically(folder / f"{name}.{suffix}", buffer.getvalue())


def _style(theme: Theme) -> Any:
    """Return matplotlib's settings; its types list their hundreds of keys one by one."""
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink)
    return {
        **PLAIN,
        **ink,
        "figure.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "axes.edgecolor": theme.soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def drawings(document: dict[str, Any]) -> dict[str, Callable[[Axes, Theme], None]]:
    """Return how each figure is drawn, by its name; one without data is left out."""
    rows, training = document["examples"]["rows"], document["training"]
    scored = [row for row in rows if row["stuck"] is None and row["b"] is not None]
    found: dict[str, Callable[[Axes, Theme], None]] = {}
    if document["verdict"]["arms"] is not None:
        found["accuracy"] = lambda axes, theme: _accuracy(axes, theme, document["verdict"])
    for side in ("f", "b"):
        values = [row[side]["ppl"] for row in rows if row[side] is not None and row[side]["ppl"] is not None]
        if values:
            found[f"perplexity_{side}"] = lambda axes, theme, values=values, side=side: _histogram(  # type: ignore[misc]
                axes, theme, values, side, document["rule"]
            )
    if scored:
        found["plane"] = lambda axes, theme: _plane(axes, theme, scored, document["rule"])
    points = (document["diversity"].get("map") or {}).get("points")
    if points:
        found["map"] = lambda axes, theme: _map(axes, theme, points, by_round=False)
        found["map_rounds"] = lambda axes, theme: _map(axes, theme, points, by_round=True)
    tree = document["family"]
    if "missing" not in tree:
        found["family_seeds"] = lambda axes, theme: _flow(
            axes, tree, "by_seed", [*theme.bands[: len(tree["by_seed"])], theme.dropped]
        )
        found["family_parents"] = lambda axes, theme: _flow(
            axes, tree, "by_parents", [theme.t, *_rounds(len(tree["by_parents"]) - 1)]
        )
    found["loss"] = lambda axes, theme: _loss(axes, theme, training["losses"])
    return found


def _accuracy(axes: Axes, theme: Theme, verdict: dict[str, Any]) -> None:
    colours = {"base": theme.b, "source": theme.f, "before": theme.t, "after": theme.t}
    for place, arm in enumerate(ARMS):
        rate = verdict["arms"][arm]
        ends = [100 * rate["interval"]["low"], 100 * rate["interval"]["high"]]
        axes.plot(ends, [place, place], color=colours[arm], linewidth=2.5, solid_capstyle="round")
        axes.plot([100 * rate["accuracy"]], [place], "o", color=colours[arm])
    if verdict["chance"] is not None:
        axes.axvline(100 * verdict["chance"], color=theme.soft, linestyle=":")
    axes.set_yticks(range(len(ARMS)), list(ARMS.values()))
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)  # so that a mark at 0 or 100 is whole
    axes.set_xlabel(f"right answers of {verdict['arms']['after']['n']}, % (95 % interval)")


def _histogram(axes: Axes, theme: Theme, values: list[float], side: str, rule: dict[str, Any]) -> None:
    end = _axis_end(values)
    edges = [end ** (step / 30) for step in range(31)]
    axes.hist([min(value, end) for value in values], bins=edges, color=getattr(theme, side))
    line = _line(rule, side)
    if line is not None:
        axes.axvline(line[1], color=theme.ink, linestyle="--", linewidth=1)
    _logarithmic(axes, "x", end)
    axes.set_xlabel(f"$PPL_F(y_{side})$" + (f"; dashed: {line[0]} = {line[1]:g}" if line else ""))
    axes.set_ylabel("candidates")


def _line(rule: dict[str, Any], side: str) -> tuple[str, float] | None:
    """Return the threshold that the run's rule sets to PPL_F(y_f) or PPL_F(y_b), with its name, or that it has none."""
    criterion = Criterion(rule["name"])
    if side == "b" and criterion.needs():
        return None
    return next(
        ((name, rule["thresholds"][name]) for name in ("tau", f"tau_{side}") if name in criterion.rule.reads), None
    )


def _plane(axes: Axes, theme: Theme, rows: Rows, rule: dict[str, Any]) -> None:
    kinds = ((False, "x", theme.dropped, "dropped"), (True, "o", theme.f, "kept"))
    ends = {side: _axis_end([row[side]["ppl"] for row in rows]) for side in ("f", "b")}
    for kept, mark, colour, label in kinds:
        chosen = [row for row in rows if row["kept"] is kept]
        if not chosen:
            continue
        places = [[min(row[side]["ppl"], ends[side]) for row in chosen] for side in ("f", "b")]
        axes.plot(*places, mark, color=colour, markersize=4, alpha=0.6, label=label, rasterized=len(rows) > 2000)
    dashed: dict[str, Any] = {"color": theme.ink, "linestyle": "--", "linewidth": 1}
    for draw, side in ((axes.axvline, "f"), (axes.axhline, "b")):
        if (line := _line(rule, side)) is not None:
            draw(line[1], **dashed)
    if "ratio" in RULES[rule["name"]].reads:
        axes.plot([1, ends["f"]], [rule["thresholds"]["ratio"] * value for value in (1, ends["f"])], **dashed)
    _logarithmic(axes, "x", ends["f"])
    _logarithmic(axes, "y", ends["b"])
    axes.set_xlabel("$PPL_F(y_f)$")
    axes.set_ylabel("$PPL_F(y_b)$")
    axes.legend(frameon=False)


def _map(axes: Axes, theme: Theme, points: Rows, *, by_round: bool) -> None:
    def of(kind: str) -> Rows:
        return [point for point in points if point["kind"] == kind]

    decided = [("dropped", "x", theme.dropped, of("dropped")), ("kept", "o", theme.f, of("kept"))]
    groups = _sixths(points) if by_round else decided
    groups += [("held-out", "^", theme.held_out, of("held_out")), ("seed", "D", theme.t, of("seed"))]
    for label, mark, colour, chosen in groups:
        if chosen:
            places = [point["x"] for point in chosen], [point["y"] for point in chosen]
            axes.plot(*places, mark, color=colour, markersize=4, alpha=0.7, label=label, rasterized=len(points) > 2000)
    axes.set_axis_off()
    axes.legend(frameon=False)


def _sixths(points: Rows) -> list[tuple[str, str, str, Rows]]:
    """Return the candidates in sixths of the rounds, as on the page: label, mark, colour, points."""
    rounds, parts = 1 + max(point.get("round", 0) for point in points), len(ROUNDS)
    chosen: list[list[dict[str, Any]]] = [[] for _ in ROUNDS]
    for point in points:
        if "round" in point:
            chosen[parts * point["round"] // rounds].append(point)
    starts = [-(-place * rounds // parts) + 1 for place in range(parts)]
    return [(f"rounds from {start}", "o", ink, own) for start, ink, own in zip(starts, ROUNDS, chosen, strict=True)]


def _flow(axes: Axes, tree: dict[str, Any], by: str, colours: Sequence[str]) -> None:
    """Draw each round's kept pairs as a stack of bands, each band running on to the next round's."""
    import numpy as np

    labels = [column["label"] for column in tree["columns"]]
    bottom = np.zeros(len(labels))
    half = 0.18  # of a bar, where columns are 1 apart
    edges = np.repeat(np.arange(len(labels)), 2) + np.tile([-half, half], len(labels))
    for band, colour in reversed(
        list(zip(tree[by], colours, strict=False))
    ):  # so that they stand in the legend's order
        top = bottom + band["values"]
        axes.fill_between(edges, np.repeat(bottom, 2), np.repeat(top, 2), color=colour, alpha=0.38, linewidth=0)
        axes.bar(labels, band["values"], 2 * half, bottom, color=colour, label=band["label"])
        bottom = top
    axes.tick_params(axis="x", labelrotation=45 if len(labels) > 6 else 0)
    axes.set_xlabel("round")
    axes.set_ylabel("kept pairs")
    axes.legend(
        *(part[::-1] for part in axes.get_legend_handles_labels()),
        title={"by_seed": "come down to", "by_parents": "written from"}[by],
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )


def _rounds(number: int) -> list[str]:
    """Return colours for `number` groups of rounds, as far apart as there are."""
    last = len(ROUNDS) - 1
    return [ROUNDS[math.floor(last * place / max(1, number - 1) + 0.5)] for place in range(number)]


def _loss(axes: Axes, theme: Theme, losses: list[float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, "-o", color=theme.f, markersize=4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss, nats per response token")


def _logarithmic(axes: Axes, side: str, end: float) -> None:
    """Make an axis of perplexities logarithmic, from 1 to `end`, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(**{f"{side}scale": "log", f"{side}lim": (0.98, end * 1.02)})
    axis = axes.xaxis if side == "x" else axes.yaxis
    steps = (1, 1.5, 2, 3) if end <= 10 else (1, 3) if end <= 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def _axis_end(values: Sequence[float]) -> float:
    """Return where an axis ends: behind 99 % of the values; what lies beyond is put there, as on the page."""
    ordered = sorted(values)
    return float(min(1e6, max(3.0, 1.15 * ordered[math.floor(0.99 * (len(ordered) - 1))])))
