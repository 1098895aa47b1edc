"""From the document to the file: escaping, the content security policy, and one self-contained page."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from tuneshift.report.figures import write_figures
from tuneshift.report.page.document import page_document
from tuneshift.report.page.sources import Sources, or_missing
from tuneshift.run.directory import RunDirectory, write_atomically
from tuneshift.run.ledger import Ledger


@dataclass(frozen=True)
class Kind:
    """A kind of page: its template, and its modules of assets/, put together in this order; each uses those before it.

    `scripted` are the parts of its document that the scripts read; the rest, such as the models' folders, is not
    embedded as data.
    """

    template: str
    modules: tuple[str, ...]
    scripted: tuple[str, ...]


# The charts are our own (assets/charts.js). plotly 7.1 would add 4.8 MB to every page, took 5 s for two charts where
# this whole page took 2 s (measured, on two busy cores), and a policy without `unsafe-inline` refuses its style rules.
SHARED = ("page", "theme", "charts", "intervals")
REPORT = Kind(
    "report.html",
    (
        *SHARED,
        "candidates",
        "decide",
        "diff",
        "verdict",
        "perplexity",
        "table",
        "diversity",
        "family",
        "learning",
        "start",
    ),
    ("verdict", "rule", "run", "examples", "calls", "diversity", "family", "training"),
)
RESULTS = Kind("results.html", (*SHARED, "results"), ("charts",))

UNSEEN = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},  # control pictures
    0x7F: "\u2421",
    **{
        code: f"[U+{code:04X}]"
        for code in (
            *range(0x80, 0xA0),  # C1 controls, among them a second form of ANSI's escape
            0x061C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F),  # direction, no width, line ends
            *range(0x2060, 0x2070), 0xFEFF,  # the same
            *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080),  # annotations, and tags, which hide whole texts
            0x00AD, 0x180E, *range(0xE0100, 0xE01F0),  # soft hyphen, vowel separator, and variants, which hide texts
        )
    },
}  # fmt: skip
"""Characters that would act or hide, and what is shown of each. Joiners, which scripts and emoji need, stay."""


def write_page(run: RunDirectory, ledger: Ledger, origin: dict[str, Any]) -> None:
    """Write `report.html` and `figures/`; `origin` is what the manifest says of models and environment."""
    document = page_document(Sources(run, ledger, origin))
    figures = or_missing(lambda: write_figures(run.figures, document))
    write_atomically(run.page, render({**document, "figures": figures}))


def render(document: dict[str, Any], kind: Kind = REPORT) -> str:
    """Return the page of a document as HTML that needs no network and lets nothing run but its own script."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    shown = visible(document)
    style = _asset("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_asset(f"{name}.js") for name in kind.modules) + "})();\n"
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent}
    return environment.get_template(kind.template).render(
        **shown,
        style=_safe(style),
        script=_safe(script),
        data=_safe(as_data({key: shown[key] for key in kind.scripted})),
        policy="; ".join(
            (
                "default-src 'none'",
                f"script-src '{source_hash(script)}'",
                f"style-src '{source_hash(style)}'",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
    )


def _asset(name: str) -> str:
    return (files("tuneshift.report.page") / "assets" / name).read_text(encoding="utf-8")


def visible(value: Any) -> Any:
    """Return a plain value with every text's control, direction and hidden characters made visible."""
    if isinstance(value, str):
        return value.translate(UNSEEN)
    if isinstance(value, dict):
        return {visible(key): visible(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [visible(inner) for inner in value]
    return value


def as_data(document: dict[str, Any]) -> str:
    """Return a document as JSON that can neither end the script element that holds it nor break a line."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def source_hash(text: str) -> str:
    """Return the sha256 by which a content security policy admits an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def number(value: float | None, digits: int = 2) -> str:
    """Return a number for people, or that there is none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """Return a share for people, or that there is none."""
    return "n/a" if share is None else f"{share:.{digits}%}"


def _safe(text: str) -> Any:
    """Return text that is put into the page as it is: our own assets, and escaped data."""
    from markupsafe import Markup

    return Markup(text)
