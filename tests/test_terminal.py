"""What commands print: whatever a folder or a model is called, the terminal shows it and does not obey it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import HOSTILE as THIRTY
from page_run import Written, make_run
from test_transfer import run_cli
from test_verdict import judged
from test_watching import add_round

from tuneshift.report.terminal import print_result, print_verdict
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger

HOSTILE = "a\x1b[31m\x9b31m\x7f\u202eb"
"""An escape sequence, one that begins with a C1 control, DEL, and a direction mark."""


def verdict() -> dict[str, Any]:
    return judged("0" * 10, "1" * 8 + "00", "1" * 10)


@pytest.mark.parametrize("name", ["runs/[/]", "runs/[bold]x", "runs/[link=x]", "runs/:smile:"])
def test_a_run_directory_with_markup_in_its_name_is_printed_as_it_is(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_verdict(verdict() | {"recovery": None, "recovery_reason": name}, Path(name), False)
    shown = capsys.readouterr().out
    assert f"results: {name}\n" in shown
    assert f"undefined: {name}." in " ".join(shown.split())


def test_control_and_direction_marks_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_verdict(verdict(), Path(HOSTILE), False)
    print_result({"report": HOSTILE}, False, lambda result: [f"{result['report']}\nsecond line"])
    shown = capsys.readouterr().out
    assert not set("\x1b\x9b\x7f\u202e") & set(shown)
    assert shown.endswith("\nsecond line\n")


def test_json_for_a_terminal_is_ascii_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    print_verdict(verdict(), Path(HOSTILE), True)
    print_result({"text": HOSTILE}, True, lambda result: [])
    first, second = capsys.readouterr().out.splitlines()
    for line in (first, second):
        assert line.isascii()
        assert line.isprintable()
    assert json.loads(first)["run"] == json.loads(second)["text"] == HOSTILE


def test_thirty_hostile_strings_do_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [Written(f"{text} {place}", text, text[::-1]) for place, text in enumerate(THIRTY)] * 2
    name = "".join(THIRTY[:29])
    model = "\u202e[bold]m\x1b[31m"
    runs = [
        str(make_run(tmp_path / place, texts, name=name, model_name=model, evaluated=False).path)
        for place in ("[red]one", "\x1b[31mtwo")
    ]
    for command, written in (
        (["show", runs[0], "--examples", "60"], "{{ 7 * 7 }} 10"),
        (["compare", *runs], "[red]one"),
    ):
        assert run_cli(*command) == 0
        shown = capsys.readouterr().out
        assert all(character.isprintable() for line in shown.split("\n") for character in line)
        assert written in shown.replace("\\", "")  # and not taken as markup
        assert run_cli(*command, "--json") == 0
        assert capsys.readouterr().out.strip().isascii()


@pytest.mark.parametrize("option", [["--json"], ["--examples", "5"], ["--examples", "2", "--json"]])
def test_what_watching_cannot_do_is_refused(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("show", str(tmp_path), "--watch", *option) == 2
    assert "--watch shows a live view" in capsys.readouterr().err


def test_show_reads_a_run_that_goes_on_and_writes_nothing_into_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.path.iterdir()}

    run = RunDirectory(tmp_path / "run")
    with run, Ledger(run.ledger) as ledger:
        run.keep()
        add_round(ledger, 0, 1, 9)
    before = content()
    assert run_cli("show", str(run.path), "--json") == 0
    assert content() == before
    with run, Ledger(run.ledger) as ledger, ledger._transaction():
        ledger._db.execute("INSERT INTO meta VALUES ('half', 'done')")
        assert run_cli("show", str(run.path), "--examples", "1") == 0
    assert "1 kept of 10 candidates" in capsys.readouterr().out
