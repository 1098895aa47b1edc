"""The cards of what a run made, its adapter and its dataset: what it is, from which models, how good, how to repeat it.

The form is the Hub's: metadata in YAML, then Markdown. A card may be published, so it names no place on this machine.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from tuneshift.configfile import read_mapping
from tuneshift.criteria import RULES
from tuneshift.dataset import Row, read_rows
from tuneshift.evaluate.stats import Proportion
from tuneshift.evaluate.verdict import sentence
from tuneshift.report.markdown import (
    ACCURACY_HEADER,
    accuracy_rows,
    accuracy_section,
    fenced,
    markdown_table,
    regression_line,
)
from tuneshift.report.privacy import scan
from tuneshift.report.provenance import (
    ROLES,
    Licence,
    PublicModel,
    common_licence,
    public_models,
    public_settings,
)
from tuneshift.run.directory import RunDirectory, read_json, write_atomically
from tuneshift.run.ledger import Ledger

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ["tuneshift", "knowledge-distillation", "synthetic"]
# The Hub's names of sizes, with the number of rows from which each holds. Source: huggingface_hub, DatasetCardData.
SIZES = {0: "n<1K", 1_000: "1K<n<10K", 10_000: "10K<n<100K", 100_000: "100K<n<1M", 1_000_000: "1M<n<10M"}
COLUMNS = {
    "id": "round, call and place of the prompt",
    "prompt": "the prompt, as the models read it",
    "response": "F's response, with the white space around it",
    "ppl_f": "perplexity of F's response under F",
    "ppl_b": "perplexity of B's response under F; null where B was not asked",
    "strategy": "how G was asked: forward (more like these), backward or probed (prompts to a response), or listed",
    "cue": "the kind of response that a backward or probed call wanted prompts for",
    "parents": "ids of the examples that the generator was shown",
}


@dataclass(frozen=True)
class Published:
    """What is said when a run is published and not known before: where it goes, and what the publisher states."""

    model_repo: str | None = None
    dataset_repo: str | None = None
    base_model: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Facts:
    """What the cards tell of a run; `made_with` is code and libraries, `inputs` the sha256 of the user's files."""

    name: str
    verdict: dict[str, Any]
    rows: list[Row]
    models: dict[str, PublicModel]
    settings: dict[str, Any]
    left_out: list[str]
    inputs: dict[str, str]
    made_with: dict[str, Any]
    own_prompts: bool

    def base_model(self, published: Published) -> str | None:
        """Return the Hub id of the target, `None` where it came from a folder and nobody said which model it is."""
        return published.base_model or self.models["target.model"].hub_id

    def licence(self, published: Published) -> Licence:
        """Return the licence under which the run's products may go, as the publisher says or all models agree."""
        return Licence(published.licence) if published.licence else common_licence(self.models)


def read_facts(run: RunDirectory, ledger: Ledger, made_with: Mapping[str, Any]) -> Facts:
    """Gather what the cards tell from a run's files."""
    settings, left_out = public_settings(read_mapping(run.config))
    return Facts(
        name=ledger.meta("name") or run.path.name,
        verdict=read_json(run.verdict),
        rows=read_rows(run.dataset),
        models=public_models(json.loads(ledger.meta("models") or "{}")),
        settings=settings,
        left_out=left_out,
        inputs=json.loads(ledger.meta("inputs") or "{}"),
        made_with=dict(made_with),
        own_prompts=any(call.strategy == "listed" for call in ledger.calls()),
    )


def write_cards(run: RunDirectory, ledger: Ledger, made_from: Mapping[str, Any]) -> None:
    """Write `adapter/README.md` and `dataset/README.md`; `made_from` is the run's origin."""
    facts = read_facts(run, ledger, made_from)
    write_atomically(run.adapter_card, model_card(facts))
    write_atomically(run.dataset_card, dataset_card(facts))


def model_card(facts: Facts, published: Published = Published()) -> str:
    """Return the card of the adapter."""
    from huggingface_hub import ModelCardData

    target, base = facts.models["target.model"], facts.models["source.base"]
    tuned = facts.models.get("source.adapter") or facts.models["source.model"]
    base_model, licence, verdict = facts.base_model(published), facts.licence(published), facts.verdict
    results = _results(verdict)
    metadata = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        datasets=[published.dataset_repo] if published.dataset_repo else None,
        library_name="peft",
        license=licence.identifier,
        pipeline_tag="text-generation",
        tags=["lora", *TAGS],
        model_name=facts.name,
        eval_results=results or None,
    )
    prompts = f"{verdict['candidates']} prompts of a file" if facts.own_prompts else (
        f"from a few example prompts {verdict['candidates']} more were generated"
    )  # fmt: skip
    return _card(
        str(metadata),
        facts.name,
        f"A LoRA adapter for `{base_model or target.name}` that carries over what `{tuned.name}` had learnt on "
        f"`{base.name}`. It was made without the original training data by TuneShift {facts.made_with['tuneshift']}: "
        f"{prompts}, the fine-tuned source and its base answered them, the criterion `{verdict['criterion']}` kept "
        f"{verdict['kept']}, and the target learnt {verdict['trained_pairs']}.",
        *_evaluation(verdict),
        _models(facts, licence),
        "## Limits",
        "The adapter knows what the source said about generated prompts, errors of the source included. What no prompt "
        "asked for did not arrive. It is evaluated on the items above only. The licences of the source, its base, the "
        "target and the prompt generator may apply.",
        *_repeat(facts),
        "## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{published.model_repo or "path/of/this/folder"}")\n```',
    )


def dataset_card(facts: Facts, published: Published = Published()) -> str:
    """Return the card of the kept pairs."""
    from huggingface_hub import DatasetCardData

    verdict, n, licence = facts.verdict, len(facts.rows), facts.licence(published)
    metadata = DatasetCardData(
        annotations_creators=["machine-generated"],
        language_creators=["found" if facts.own_prompts else "machine-generated"],
        license=licence.identifier,
        pretty_name=facts.name,
        size_categories=[next(name for least, name in reversed(SIZES.items()) if n >= least)],
        task_categories=["text-generation"],
        tags=TAGS,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "kept.jsonl"}]}],
    )
    tuned = facts.models.get("source.adapter") or facts.models["source.model"]
    rate = Proportion(verdict["kept"], verdict["candidates"])
    tau = f", tau = {verdict['tau']:g}" if "tau" in RULES[verdict["criterion"]].reads else ""
    interval = rate.interval()
    writer = "were given" if facts.own_prompts else "were written by a model"
    outcomes = [[reason, str(count)] for reason, count in verdict["reasons"].items()]
    learnt = f" [{published.model_repo}](https://huggingface.co/{published.model_repo})" if published.model_repo else ""
    return _card(
        str(metadata),
        f"{facts.name}: kept pairs",
        f"{n} prompts with the responses of `{tuned.name}`, from which the adapter{learnt} learnt. The prompts "
        f"{writer}, the responses were written by the fine-tuned model F; no human checked them. Made by TuneShift "
        f"{facts.made_with['tuneshift']}.",
        "## Columns\n\n" + markdown_table(["column", "meaning"], list(COLUMNS.items())),
        f"## How they were chosen\n\nThe criterion `{verdict['criterion']}`{tau} kept {rate.correct} of {rate.n} "
        f"candidates, {rate.accuracy:.1%} (95 % interval {interval.low:.1%} to {interval.high:.1%}).\n\n"
        + markdown_table(["outcome", "candidates"], outcomes),
        "## What the target learnt",
        *_evaluation(verdict),
        "## Personal data\n\n" + _personal(facts.rows),
        _models(facts, licence),
        "## Limits",
        "The responses are what F said, its errors included. Prompts that a model wrote cover a part of what F knows. "
        "The perplexities are F's, and say nothing of truth. The licences of the models may apply to what they wrote.",
        *_repeat(facts),
    )


def _card(metadata: str, title: str, *parts: str) -> str:
    return "\n\n".join([f"---\n{metadata}\n---", f"# {' '.join(title.split())}", *filter(None, parts)]) + "\n"


def _results(verdict: dict[str, Any]) -> list[EvalResult]:
    """Return the rates of the target after the transfer, by each metric, for the model index."""
    from huggingface_hub import EvalResult

    if verdict["improved"] is None:
        return []
    judged = [(verdict, "default"), *([(verdict["regression"], "regression")] if verdict["regression"] else [])]
    results = []
    for found, config in judged:
        asked, after = found["questions"], found["after"]
        own = asked["task"] == "jsonl"
        rates = after["by_metric"]
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=asked["task"],
                dataset_name="the run's own questions" if own else asked["task"],
                dataset_config=config,
                dataset_args={"n": rate["n"], "sha256": asked["sha256"]},
                metric_type=metric,
                metric_name=f"{metric} after the transfer",
                metric_value=rate["accuracy"],
                metric_args={"correct": rate["correct"], "n": rate["n"], **rate["interval"]},
            )
            for metric, rate in rates.items()
        ]
    return results


def _evaluation(verdict: dict[str, Any]) -> Sequence[str]:
    regression = verdict["regression"]
    lost = [] if regression is None else [
        "Questions on something else, to see what was lost:",
        markdown_table(ACCURACY_HEADER, accuracy_rows(regression)),
        f"Result: {regression_line(regression)}.",
    ]  # fmt: skip
    return [sentence(verdict), accuracy_section(verdict), *lost]


def _models(facts: Facts, licence: Licence) -> str:
    rows = [[ROLES[role], model.name, str(model.licence)] for role, model in facts.models.items()]
    own = f"Licence of what is published here: {licence}."
    return "## Models and licences\n\n" + markdown_table(["role", "model", "licence"], rows) + "\n\n" + own


def _personal(rows: Sequence[Row]) -> str:
    found = scan((row["id"], f"{row['prompt']}\n{row['response']}") for row in rows)
    table = [[kind, str(one["count"]), str(len(one["rows"]))] for kind, one in found.items()]
    return (
        f"Searched by form in {len(rows)} rows; names and other things without a form are not found.\n\n"
        + markdown_table(["kind", "findings", "rows"], table)
    )


def _repeat(facts: Facts) -> Sequence[str]:
    """Return the command with its configuration, the code's commit, and the sha256 of the files that it reads."""
    git = facts.made_with["git"]
    commit = f" at commit {git['commit']}{' with local changes' if git['dirty'] else ''}" if git else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts.made_with["versions"].items() if version)
    settings = yaml.safe_dump(facts.settings, sort_keys=False, allow_unicode=True).strip()
    omitted = f" Left out: {', '.join(facts.left_out)}." if facts.left_out else ""
    files = "".join(f"\n- {name}: sha256 {digest}" for name, digest in facts.inputs.items() if digest)
    return (
        "## Repeat it",
        f"```sh\ntuneshift transfer {shlex.quote(f'{facts.name}.yaml')}\n```",
        f"With TuneShift {facts.made_with['tuneshift']}{commit}, {versions}, and `{facts.name}.yaml`, in which places "
        f"outside its folder are shortened:{omitted}",
        fenced(settings, "yaml"),
        f"The files that it reads are not published:\n{files}" if files else "",
    )
