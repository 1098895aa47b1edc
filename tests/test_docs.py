"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from tuneshift.cli import app
from tuneshift.config import check_config, load_config, validate
from tuneshift.configfile import lay_over, read_mapping
from tuneshift.evaluate.verdict import detectable_gains
from tuneshift.reference import configuration_reference
from tuneshift.sections.study import StudySection

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_yaml() -> str:
    """Return the configuration printed in the README."""
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    return str(block)


def test_the_configuration_reference_is_up_to_date() -> None:
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == configuration_reference()


def test_the_readme_configuration_loads_as_written() -> None:
    loaded = check_config(yaml.safe_load(readme_yaml()), folder=ROOT, name="readme", shown_as="README.md")
    assert loaded.config.seeds == str(ROOT / "examples/snips/seeds.jsonl")


def test_the_readme_configuration_is_the_demo_s(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for model in ("SmolLM2-135M-Instruct", "gemma-3-270m"):  # a path is one where something stands
        (tmp_path / "models" / model).mkdir(parents=True)
    printed = check_config(yaml.safe_load(readme_yaml()), folder=tmp_path, name="readme", shown_as="README.md")
    assert printed.config == load_config(tmp_path / "examples/snips/intents.yaml").config


def test_the_table_of_questions_and_gains_is_computed() -> None:
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| (\d+)(?: points)? \| (\d+)(?: points)? \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for questions, *gains in rows:
        computed = [round(100 * (found["gain"] or 0)) for found in detectable_gains(int(questions.replace(",", "")))]
        assert computed == [int(gain) for gain in gains]


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_the_configurations_of_the_engines_document_load_as_written(kind: str) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/engines.md").read_text(encoding="utf-8"), re.DOTALL)
    configs = [check_config(yaml.safe_load(b), folder=ROOT, name="engines", shown_as="engines.md") for b in blocks]
    (found,) = [loaded.config.engine for loaded in configs if loaded.config.engine.kind == kind]
    assert found.python == {"vllm": str(ROOT / ".venv-vllm/bin/python"), "openai": None}[kind]
    assert (found.base is None) == (kind == "vllm")


def test_the_study_of_the_studies_document_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/studies.md").read_text(encoding="utf-8"), re.DOTALL)
    section = validate(StudySection, yaml.safe_load(block), folder=ROOT, shown_as="studies.md")
    assert list(section.replicates) == ["0", "1", "2"]
    assert section.arms["original"].pairs == str(ROOT / "train.jsonl")


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda path: path.name)
def test_every_example_configuration_loads(path: Path) -> None:
    config = load_config(path).config
    assert Path(config.seeds).is_file()
    assert config.evaluation is not None
    assert Path(config.evaluation.data).is_file()


def test_every_command_in_the_readme_exists() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"tuneshift (\w+)", README))
    assert {"transfer", "plan", "show", "reselect", "evaluate", "export", "report", "models"} <= named
    assert named <= commands


def test_every_command_is_in_the_readme() -> None:
    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert command in README


def test_every_module_has_its_place_in_the_readme() -> None:
    package = ROOT / "src/tuneshift"
    for path in package.glob("*.py"):
        assert path.stem.startswith("__") or f"`{path.name}`" in README, path.name
    for folder in package.iterdir():
        if (folder / "__init__.py").exists():
            assert f"`{folder.name}/`" in README, folder.name


def test_no_source_file_is_longer_than_400_lines() -> None:
    long = {p.name: n for p in (ROOT / "src").rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        f"{path.name}:{node.name}": length
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}


def wrong_installs(text: str, package: str) -> list[str]:
    """Return the extras that a text installs in another form than 'PACKAGE[EXTRAS]', or that are none of ours."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    ours = "|".join(map(re.escape, extras))
    found = re.findall(r"pip install (?:--\S+ )*(\S*\[[^\]\n]*\]\S?)", text)
    right = rf"'({re.escape(package)}\[({ours})(,({ours}))*\]|ray\[client\])'"
    return [form for form in found if not re.fullmatch(right, form)]


def test_extras_are_installed_in_one_form_on_the_pages_and_in_another_in_messages() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]  # read in a clone of the project
    assert {page.name: wrong for page in pages if (wrong := wrong_installs(page.read_text("utf-8"), "."))} == {}
    modules = (ROOT / "src").rglob("*.py")  # TuneShift is installed where a message is read, and no clone need be there
    assert {one.name: wrong for one in modules if (wrong := wrong_installs(one.read_text("utf-8"), "tuneshift"))} == {}
    for form in ("'tuneshift[eval]'", ".[eval]", '".[eval]"', "'.[vllm]'", "'.[eval, ray]'"):
        assert wrong_installs(f"pip install {form}", ".") != []


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_every_study_is_one(path: Path) -> None:
    study = validate(StudySection, read_mapping(path), folder=path.parent, shown_as=path.name)
    base = load_config(Path(study.config)).raw
    for level in [*(level for levels in study.axes.values() for level in levels.values()), *study.replicates.values()]:
        check_config(lay_over(base, level), folder=Path(study.config).parent, name=path.stem, shown_as=path.name)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
