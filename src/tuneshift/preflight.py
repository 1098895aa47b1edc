"""Checks before anything costs time.

Static checks read files only; model checks ask F, once it is open: do the prompts fit, and does F answer the seeds?
That the adapter acts at all is proved where the source is opened, in `tuneshift.engines.source`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuneshift.adapters import check_adapter_base, read_adapter_config, resolve_adapter
from tuneshift.config import Config
from tuneshift.datafiles import Item, Seed, read_prompts, read_seeds
from tuneshift.encoding import Reader, encode_prompt
from tuneshift.engines.base import Decoding
from tuneshift.engines.source import Source
from tuneshift.errors import DataError, SandboxError
from tuneshift.launch import check_processes
from tuneshift.models import file_sha256, resolve_model
from tuneshift.prompts.contamination import HeldOut
from tuneshift.questions import question_sections, read_questions
from tuneshift.sandbox import no_sandbox
from tuneshift.tracking import check_trackers


@dataclass(frozen=True)
class Inputs:
    """The user's files, read and checked; `digests` holds by setting what a resumed run must find: their sha256.

    `items` are the evaluation's questions, `regression` those of `evaluation.regression`, and `prompts` the texts of
    `generator.prompts`.
    """

    seeds: list[Seed]
    items: list[Item]
    digests: dict[str, str]
    prompts: list[str] = field(default_factory=list)
    regression: list[Item] = field(default_factory=list)

    @property
    def held_out(self) -> HeldOut:
        """The questions that must not be trained on."""
        return HeldOut([*self.items, *self.regression])


@dataclass(frozen=True)
class ModelChecks:
    """What the model checks found; `seed_answers` pairs each seed with F's greedy answer to it."""

    adapter_effect: float
    base_drift: float | None
    seed_answers: list[dict[str, Any]]
    warnings: list[str]

    def answered(self, seeds: Sequence[Seed]) -> list[Seed]:
        """Return the seeds; one that has no response has F's own, if F was asked and its answer ended."""
        own = {one["prompt"]: one["y_f"] for one in self.seed_answers if one["finish_reason"] != "length"}
        return [seed if seed.response is not None else replace(seed, response=own.get(seed.prompt)) for seed in seeds]


def read_inputs(config: Config, *, folder: Path, trains: bool = True) -> Inputs:
    """Read seeds and evaluation items, and check every path that the configuration names.

    `trains` tells whether the target is still to be trained, for which this machine needs its devices.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_trackers(config.run.trackers)
    files = {"seeds": Path(config.seeds)}
    seeds = read_seeds(files["seeds"], config.prompt_template)
    asked: dict[str, list[Item]] = {}
    prompts: list[str] = []
    digests: dict[str, str] = {}
    if config.generator.prompts is not None:
        files["generator.prompts"] = Path(config.generator.prompts)
        prompts = read_prompts(files["generator.prompts"], config.prompt_template)
    for name, section in question_sections(config).items():
        asked[name], digests[f"{name}.data"] = read_questions(section, folder=folder, place=name)
    for reference in (
        config.source.base,
        config.source.model,
        config.source.substitute_base,
        config.target.model,
    ):
        if reference is not None:
            resolve_model(reference)
    if config.generator.opens_model and config.generator.model not in ("source", "base", "target"):
        resolve_model(config.generator.model)
    if config.source.adapter is not None:
        adapter = resolve_adapter(config.source.adapter)
        if not config.source.same_base:
            check_adapter_base(adapter, config.source.base)
        read_adapter_config(adapter)
        files["source.adapter"] = Path(adapter) / "adapter_model.safetensors"
    check_criterion(config, seeds)
    digests |= {name: file_sha256(path) for name, path in files.items()}
    if config.distill.accelerate is not None and trains:
        # What else the file says moves no result: a run that lacked memory may go on with another file's text.
        processes = check_processes(Path(config.distill.accelerate), device=config.run.device)
        digests["distill.accelerate"] = f"{processes} processes"
    return Inputs(seeds, asked.get("evaluation", []), digests, prompts, asked.get("evaluation.regression", []))


def check_criterion(config: Config, seeds: Sequence[Seed]) -> None:
    """Prove that what the criterion measures with is there."""
    silent = next((seed for seed in seeds[: config.synthesis.demos] if seed.response is None), None)
    if config.criterion.name == "few_shot_base" and silent is not None:
        raise DataError(
            f"{silent.place}: criterion few_shot_base shows B the seeds with their responses, and this one has none. "
            'Add "response" to it, or use another criterion.'
        )
    if config.criterion.name == "exec" and (problem := no_sandbox()) is not None:
        raise SandboxError(f"criterion exec: {problem} Or use another criterion.")


def objection(prompt: str, readers: Sequence[Reader], *, room: int) -> str | None:
    """Tell why a model cannot read a prompt and answer it with `room` tokens and an EOS; `None` if all can."""
    for reader in readers:
        found = reader.objection(encode_prompt(reader.tokenizer, prompt), room=room + 1)
        if found is not None:
            return found
    return None


def check_rooms(rooms: Sequence[tuple[str, str, int]], readers: Sequence[Reader]) -> None:
    """Check that every model can read each (place, prompt, tokens of the answer).

    Raises:
        DataError: one cannot.
    """
    for place, prompt, room in rooms:
        found = objection(prompt, readers, room=room)
        if found is not None:
            raise DataError(f"{place}: {found}. Shorten the prompt, lower max_new_tokens, or use another model.")


def check_models(
    source: Source, inputs: Inputs, *, readers: Sequence[Reader], decoding: Decoding, answer_tokens: int, demos: int
) -> ModelChecks:
    """Check that every model can read the user's prompts, and let F answer the seeds greedily.

    `answer_tokens` is the length limit of the evaluation's answers.

    Raises:
        DataError: a seed or an evaluation prompt does not fit into a model's context.
    """
    rooms = [(seed.place, seed.prompt, decoding.max_new_tokens) for seed in inputs.seeds]
    rooms += [(item.place, item.prompt, answer_tokens) for item in inputs.items]
    check_rooms(rooms, readers)
    engine = source.engine
    prompts = [encode_prompt(engine.tokenizer, seed.prompt) for seed in inputs.seeds]
    greedy = replace(decoding, temperature=0)
    answers = engine.generate(prompts, seeds=[0] * len(prompts), decoding=greedy, fine_tuned=True)
    warnings = []
    capped = sum(answer.finish_reason == "length" for answer in answers)
    if capped:
        warnings.append(
            f"F's answer to {capped} of {len(answers)} seeds hits synthesis.max_new_tokens; such candidates are "
            "dropped. Set synthesis.stop or raise the limit."
        )
    bos = engine.tokenizer.bos_token_id
    doubled = sum(len(ids) > 1 and ids[0] == ids[1] == bos for ids in prompts) if bos is not None else 0
    if doubled:
        warnings.append(
            f"{doubled} of {len(prompts)} seeds begin with the BOS text, and the tokenizer adds a BOS of its own. "
            "Remove it from the prompts."
        )
    given = [(seed, answer) for seed, answer in zip(inputs.seeds, answers, strict=True) if seed.response]
    wrong = sum(answer.text.strip() != (seed.response or "").strip() for seed, answer in given)
    if wrong:
        warnings.append(f"F answers {wrong} of {len(given)} seeds otherwise than the seeds file says.")
    if len(inputs.seeds) < demos:
        warnings.append(
            f"{len(inputs.seeds)} seeds are fewer than synthesis.demos = {demos}: the first calls "
            "show the generator fewer examples."
        )
    return ModelChecks(
        adapter_effect=source.canary.adapter_effect,
        base_drift=source.canary.base_drift,
        seed_answers=[
            {
                "prompt": seed.prompt,
                "response": seed.response,
                "y_f": answer.text,
                "finish_reason": answer.finish_reason,
            }
            for seed, answer in zip(inputs.seeds, answers, strict=True)
        ],
        warnings=warnings,
    )
