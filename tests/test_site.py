"""The documentation's site, and the code on its pages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tiny, write_jsonl

from tuneshift.config import Config, validate

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/snips"
BLOCK = re.compile(r"```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return language, title and content of each block of code on a page."""
    found = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [(language, title, content) for language, title, content in found]


# --- the site ---


class Fetched(HTMLParser):
    """Collects what a browser fetches for a page, links that a person follows aside."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag != "a":
            self.addresses += [value for name in ("src", "href", "srcset") if (value := given.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it; a warning fails."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site_and_its_menu(site: Path) -> None:
    menu = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    for page in ROOT.glob("docs/*.md"):
        assert page.name in menu, page.name
        assert (site / ("" if page.stem == "index" else page.stem) / "index.html").is_file()


def test_a_browser_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        parser = Fetched()
        parser.feed(path.read_text(encoding="utf-8"))
        assert parser.addresses
        assert not [address for address in parser.addresses if re.match(r"(https?:)?//", address)], path
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//", path.read_text(encoding="utf-8")), path


def test_files_outside_the_docs_that_pages_link_to_are_there(site: Path) -> None:
    for page in ROOT.glob("docs/*.md"):
        for link in re.findall(r"\]\(\.\./([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (site / "project" / link).read_bytes() == (ROOT / link).read_bytes()


def test_the_reference_shows_every_function_that_the_notebook_page_imports(site: Path) -> None:
    parser = Fetched()
    parser.feed((site / "api/index.html").read_text(encoding="utf-8"))
    code = "".join(content for language, _, content in blocks("python.md") if language == "python")
    imported = re.findall(r"^from (tuneshift[\w.]*) import (.+)$", code, re.MULTILINE)
    names = {f"{module}.{name}" for module, listed in imported for name in listed.split(", ")}
    assert len(names) > 10
    assert not names - parser.ids


# --- the code on the pages ---


@pytest.fixture
def project(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages assume it, with tiny models and few questions in the place of the example's."""
    for name, model in (("SmolLM2-135M-Instruct", tiny.llama), ("gemma-3-270m", tiny.gemma)):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(model)
    (tmp_path / "examples/snips").mkdir(parents=True)
    (tmp_path / "examples/snips/adapter").symlink_to(tiny.adapter)
    prompts = [f"Request: {text}\nIntent:" for text in ("play a song", "book a table", "rate it", "stop", "what is it")]
    write_jsonl(tmp_path / "examples/snips/seeds.jsonl", [{"prompt": prompt} for prompt in prompts])
    asked = [{"prompt": prompt.replace(":", " :"), "reference": "x"} for prompt in prompts]
    write_jsonl(
        tmp_path / "examples/snips/test.jsonl",
        [{**row, "prompt": f"Request: {n} times\nIntent:"} for n, row in enumerate(asked)],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_of_the_notebook_page_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((_, _, written),) = [block for block in blocks("quickstart.md") if block[1] == "transfer.yaml"]
    config = yaml.safe_load(written)
    config["source"]["same_base"] = True
    config["criterion"] = {"name": "random", "keep_rate": 0.5}
    config["synthesis"] |= {"max_new_tokens": 24, "per_call": 5, "demos": 3, "max_candidates": 400}
    config["generator"] |= {"model": "base", "max_new_tokens": 32}
    config["distill"] |= {"num_train_epochs": 1}
    config["run"] = {"dtype": "float32"}
    (project / "transfer.yaml").write_text(json.dumps(config))
    names: dict[str, Any] = {}
    for language, _, content in blocks("python.md"):
        assert language == "python"
        exec(content.replace("target_size=100", "target_size=6"), names)
    said = capsys.readouterr().out
    assert names["verdict"]["after"]["n"] == 5
    assert names["run"].manifest.is_file()
    assert len([line for line in said.splitlines() if " kept of " in line]) == 3
    assert (project / "runs/own/adapter/adapter_model.safetensors").is_file()
    assert len(names["summary"].losses) == 2


def test_the_configuration_of_the_quickstart_is_complete() -> None:
    ((_, _, written),) = [block for block in blocks("quickstart.md") if block[1] == "transfer.yaml"]
    config = validate(Config, yaml.safe_load(written), folder=ROOT, shown_as="quickstart.md")
    assert config.seeds == str(EXAMPLE / "seeds.jsonl")


def test_the_lines_of_data_on_the_quickstart_page_are_the_examples() -> None:
    ((_, _, lines),) = [block for block in blocks("quickstart.md") if block[0] == "json"]
    seed, question = map(json.loads, lines.splitlines())
    seeds, questions = (
        [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]
        for name in ("seeds.jsonl", "test.jsonl")
    )
    assert seed["prompt"] in [row["prompt"] for row in seeds]
    assert question in questions


NO_IMPROVEMENT_IS_FINE = "|| [ $? -eq 3 ]"  # of so few pairs


@pytest.mark.real
def test_every_command_of_the_quickstart_runs_in_order(tmp_path: Path) -> None:
    """A copy of the project without an environment, with fewer pairs, epochs and questions than the page says.

    What the tests' own environment has counts as installed; that it installs from nothing is shown by `make test`.
    """
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("these sources are no git checkout")
    for name in listed.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    test = tmp_path / "examples/snips/test.jsonl"
    test.write_text("".join(test.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    script = ["set -e"]
    for language, title, content in blocks("quickstart.md"):
        if language == "sh":
            lines = content.strip().splitlines()
            script += [
                f"{line} {NO_IMPROVEMENT_IS_FINE}" if line.startswith("tuneshift transfer") else line for line in lines
            ]
        elif language == "yaml":
            config = yaml.safe_load(content)
            config["synthesis"] |= {"target_size": 12, "probes": 64}
            config["distill"]["num_train_epochs"] = 1
            (tmp_path / title).write_text(json.dumps(config), encoding="utf-8")
        elif language == "python":
            script.append(f"python - <<'EOF'\n{content}EOF")
        else:
            assert language == "json"
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment["PYTHONPATH"] = sysconfig.get_path("purelib")
    environment |= {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_QUIET": "1"}
    ran = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name in ("first", "second"):
        assert (tmp_path / "runs" / name / "manifest.json").is_file()
    assert len((tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) == 12
    assert "criterion.tau" in ran.stdout  # of the comparison
    assert "Request: play some jazz" in ran.stdout  # the adapter answers
    shutil.rmtree(tmp_path / ".venv")  # a gigabyte
