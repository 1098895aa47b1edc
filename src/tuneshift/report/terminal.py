"""What the commands print on stdout: lines for people, or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tuneshift.console import clean

if TYPE_CHECKING:
    from rich.console import Console


def print_result(result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    """Print a command's result: the lines that are made of it, or one JSON document."""
    if as_json:
        typer.echo(json.dumps(result, allow_nan=False))
    else:
        for line in lines(result):
            typer.echo("\n".join(clean(part) for part in line.split("\n")))


def key_lines(result: dict[str, Any], indent: str = "") -> list[str]:
    """Return plain data as indented lines of keys and values."""
    lines: list[str] = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *key_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {'n/a' if value is None else value}")
    return lines


def print_verdict(verdict: dict[str, Any], path: Path, as_json: bool) -> None:
    """Print the verdict as a table on one screen, or as JSON."""
    if as_json:
        typer.echo(json.dumps({"run": str(path), **verdict}, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tuneshift.evaluate.verdict import points_with_interval, sentence
    from tuneshift.report.markdown import ACCURACY_HEADER, accuracy_rows, regression_line

    console = Console(highlight=False)
    if verdict["improved"] is not None:
        table = Table(*ACCURACY_HEADER)
        for row in accuracy_rows(verdict):
            table.add_row(*row)
        console.print(table)
        recovery = f"{verdict['recovery']:.2f}" if verdict["recovery"] is not None else "n/a"
        gain = points_with_interval(verdict["difference"], verdict["difference_interval"], verdict["after"]["n"])
        console.print(f"gain {gain}; McNemar p {verdict['mcnemar_p']:.2g}; recovery {recovery}")
        if verdict["regression"] is not None:
            console.print(Text(clean(regression_line(verdict["regression"]))))
    if "kept" in verdict:
        _print_costs(verdict, console)
    console.print(Text(clean(sentence(verdict))))
    console.print(Text(clean(f"results: {path}")), soft_wrap=True)


def _print_costs(verdict: dict[str, Any], console: Console) -> None:
    from tuneshift.run.watching import by_stage

    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in by_stage(verdict["seconds"]).items())
    total, memory = sum(verdict["seconds"].values()), verdict["peak_memory_bytes"] / 2**30
    console.print(f"kept {verdict['kept']} of {verdict['candidates']} candidates; peak memory {memory:.1f} GiB")
    console.print(f"{total:.0f} s: {stages}")
