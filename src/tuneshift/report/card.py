"""The model card of the adapter that a run trained: what it is, from which models, how good, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tuneshift
from tuneshift.evaluate.verdict import sentence
from tuneshift.report.markdown import ACCURACY_HEADER, accuracy_rows, markdown_table
from tuneshift.run.directory import RunDirectory, read_json, write_atomically
from tuneshift.run.ledger import Ledger


def write_model_card(run: RunDirectory, ledger: Ledger) -> None:
    """Write `adapter/README.md` in the Hub's form, from the verdict and what the ledger says of the models."""
    verdict = read_json(run.verdict)
    models = json.loads(ledger.meta("models") or "")
    names = {role: public_name(model["reference"]) for role, model in models.items()}
    target, tuned = names["target.model"], names.get("source.adapter") or names["source.model"]
    tags = "library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- tuneshift"
    parts = [
        f"---\nbase_model: {target}\n{tags}\n---",
        f"# {ledger.meta('name')}",
        f"A LoRA adapter for `{target}` that carries over what `{tuned}` had learnt on `{names['source.base']}`. It "
        f"was made without the original training data by TuneShift {tuneshift.__version__}: from a few example "
        f"prompts {verdict['candidates']} more were generated, the fine-tuned source and its base answered them, the "
        f"criterion `{verdict['criterion']}` kept {verdict['kept']}, and the target learnt {verdict['trained_pairs']}.",
        "## Evaluation",
        sentence(verdict),
        _accuracy(verdict),
        "## Limits",
        "The adapter knows what the source said about generated prompts, errors of the source included. It is "
        "evaluated on the items above only. The licences of the source, its base and the target apply.",
        "## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")\n```',
    ]
    write_atomically(run.adapter / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def public_name(reference: str) -> str:
    """Return a Hub id as it is, and of a local path only its last part: a card may be published."""
    return Path(reference).name if Path(reference).is_absolute() else reference


def _accuracy(verdict: dict[str, Any]) -> str:
    rows = accuracy_rows(verdict)
    return markdown_table(ACCURACY_HEADER, rows) if rows else ""
