"""From the configuration to the objects of a run.

Stages take plain arguments; here they are picked out of the configuration, and models are opened, checked and freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tuneshift.adapters import resolve_adapter
from tuneshift.config import Config, LoadedConfig
from tuneshift.criteria import Criterion, calibrate_tau
from tuneshift.datafiles import Seed
from tuneshift.distill import TrainingSettings, inspect_target
from tuneshift.engines.api import ApiSettings, read_secret
from tuneshift.engines.base import Decoding, Engine, Weights
from tuneshift.engines.dispatch import HostedModel, cost
from tuneshift.engines.opening import open_engine
from tuneshift.engines.options import Endpoint, EngineOptions
from tuneshift.engines.source import Source, open_source
from tuneshift.evaluate.evidence import Examination, Questions, Regression
from tuneshift.measuring import BY_TARGET, Instruments
from tuneshift.models import LoadOptions, resolve_model
from tuneshift.preflight import Inputs, ModelChecks, check_models, check_rooms, objection
from tuneshift.progress import Progress
from tuneshift.prompts.generators import PromptGenerator
from tuneshift.prompts.hosted import HostedGenerator
from tuneshift.prompts.listed import ListedPrompts
from tuneshift.prompts.pool import Steering
from tuneshift.prompts.stopping import Limits
from tuneshift.questions import answer_limit, questions_of
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate
from tuneshift.sections.engine import EndpointSection

Generator = PromptGenerator | HostedGenerator | ListedPrompts


@dataclass(frozen=True)
class SynthesisModels:
    """F, B and G, opened and checked.

    `instruments` measure what a criterion needs besides both answers; `fits` tells whether a prompt leaves room for a
    response everywhere, `learnable` whether T can read it with one.
    """

    source: Source
    instruments: Instruments
    generator: Generator
    fits: Callable[[str], bool]
    learnable: Callable[[str, str], bool]
    checks: ModelChecks


@contextmanager
def synthesis_models(loaded: LoadedConfig, inputs: Inputs, progress: Progress) -> Iterator[SynthesisModels]:
    """Open F, B and G, check them against the user's files, and free them at the end."""
    config = loaded.config
    seed_texts = [seed.text for seed in inputs.seeds]
    if (idle := idle_workers(config)) is not None:
        progress.note(f"Warning: {idle}")
    ready = hosted_generator(loaded, progress) or listed_prompts(loaded, inputs)
    if ready is not None:
        ready.check(seed_texts)  # before any weights are read
    progress.note(f"Checking the target: {config.target.model}")
    target = inspect_target(training_settings(loaded))
    regression = config.evaluation and config.evaluation.regression  # the target alone is asked these
    check_rooms([(one.place, one.prompt, answer_limit(config, regression)) for one in inputs.regression], [target])
    progress.note(f"Loading the source: {config.source.base} with {config.source.adapter or config.source.model}")
    together = _synthesis_engines(config)
    with ExitStack() as opened:
        source = open_run_source(loaded, inputs.seeds, substitute=True, open_at_once=together)
        opened.callback(source.close)
        plain = cache(lambda model: opened.enter_context(closing(open_plain(loaded, model, open_at_once=together))))
        readers = [*(engine.reader for engine in source.engines()), target]
        checks = check_models(
            source,
            inputs,
            readers=readers,
            decoding=answer_decoding(loaded),
            answer_tokens=answer_limit(config, config.evaluation),
            demos=0 if config.generator.kind == "file" else config.synthesis.demos,
        )
        progress.note(f"The adapter acts: it moves a seed token's log-probability by {checks.adapter_effect:.2f} nats")
        for warning in checks.warnings:
            progress.note(f"Warning: {warning}")
        own = _own_generator(config)
        if own is not None:
            progress.note(f"Loading the prompt generator: {own}")
        generator = ready or prompt_generator(loaded, source.engine if own is None else plain(own))
        if ready is None:
            generator.check(seed_texts)
        room = config.synthesis.max_new_tokens
        yield SynthesisModels(
            source=source,
            instruments=instruments(
                loaded, inputs.seeds, source=lambda: source, target=lambda: plain(config.target.model)
            ),
            generator=generator,
            fits=lambda prompt: objection(prompt, readers, room=room) is None,
            learnable=lambda prompt, response: target.can_learn(prompt, response),
            checks=checks,
        )


def instruments(
    loaded: LoadedConfig, seeds: Sequence[Seed], *, source: Callable[[], Source], target: Callable[[], Engine]
) -> Instruments:
    """Return what measures are taken with; each model is opened once, when it is first needed."""
    return Instruments(
        source=cache(source),
        target=cache(target),
        demonstrations=seeds[: loaded.config.synthesis.demos],
        decoding=answer_decoding(loaded),
        run_seed=loaded.config.run.seed,
    )


@contextmanager
def open_instruments(loaded: LoadedConfig, seeds: Sequence[Seed]) -> Iterator[Instruments]:
    """Yield instruments that open F and B or T when they need them; free the models at the end."""
    with ExitStack() as opened:
        yield instruments(
            loaded,
            seeds,
            source=lambda: opened.enter_context(closing(open_run_source(loaded, seeds, substitute=True))),
            target=lambda: opened.enter_context(closing(open_plain(loaded, loaded.config.target.model))),
        )


def open_plain(loaded: LoadedConfig, model: str, *, open_at_once: int = 1) -> Engine:
    """Open a model without a fine-tuning: a generator of its own, or T before its training."""
    return open_engine(Weights(model, resolve_model(model)), engine_options(loaded, open_at_once=open_at_once))


def open_run_source(loaded: LoadedConfig, seeds: Sequence[Seed], *, substitute: bool, open_at_once: int = 1) -> Source:
    """Open F and B as the configuration names them; the canary runs on the seeds. F alone needs no substitute base."""
    return open_source(
        source_weights(loaded),
        engines=engine_options(loaded, open_at_once=open_at_once),
        canary_prompts=[seed.prompt for seed in seeds],
        same_base=loaded.config.source.same_base,
        substitute_base=loaded.config.source.substitute_base if substitute else None,
    )


def source_weights(loaded: LoadedConfig) -> Weights:
    """Return the models of F and B."""
    section = loaded.config.source
    return Weights(
        name=section.base,
        base=resolve_model(section.base),
        adapter=resolve_adapter(section.adapter) if section.adapter else None,
        checkpoint=resolve_model(section.model) if section.model else None,
    )


def prompt_generator(loaded: LoadedConfig, engine: Engine) -> PromptGenerator:
    """Return the configured generator on an opened engine."""
    section, synthesis = loaded.config.generator, loaded.config.synthesis
    assert section.kind != "file"
    return PromptGenerator(
        engine=engine,
        kind=section.kind,
        instruction=section.instruction,
        demos=synthesis.demos,
        per_call=synthesis.per_call,
        decoding=_generator_decoding(loaded),
        run_seed=loaded.config.run.seed,
        fine_tuned=section.model == "source",
        back_generation=synthesis.back_generation,
    )


def hosted_generator(loaded: LoadedConfig, progress: Progress) -> HostedGenerator | None:
    """Return the generator behind an API, `None` where the configuration names none; see `read_secret` for the key."""
    section = loaded.config.generator.api
    if section is None:
        return None
    key = read_secret(section.api_key, setting="generator.api.api_key")
    return HostedGenerator(
        model=HostedModel(ApiSettings(**section.model_dump() | {"api_key": key}), note=progress.note),
        instruction=loaded.config.generator.instruction,
        demos=loaded.config.synthesis.demos,
        per_call=loaded.config.synthesis.per_call,
        decoding=_generator_decoding(loaded),
        run_seed=loaded.config.run.seed,
        back_generation=loaded.config.synthesis.back_generation,
    )


def listed_prompts(loaded: LoadedConfig, inputs: Inputs) -> ListedPrompts | None:
    """Return the prompts of the user's file as a generator, `None` where the configuration names no file."""
    if loaded.config.generator.prompts is None:
        return None
    return ListedPrompts(inputs.prompts, loaded.config.synthesis.per_call, loaded.config.run.seed)


def generator_usage(loaded: LoadedConfig, ledger: Ledger) -> dict[str, Any] | None:
    """Return what the requests to the generator's API took, with the cost; `None` for a local generator."""
    section = loaded.config.generator.api
    if section is None:
        return None
    usage = ledger.usage()
    spent = cost(ApiSettings(**section.model_dump()), usage.prompt_tokens, usage.completion_tokens)
    return {**asdict(usage), "cost": spent}


def _generator_decoding(loaded: LoadedConfig) -> Decoding:
    section, synthesis = loaded.config.generator, loaded.config.synthesis
    items = synthesis.per_call if section.kind == "chat" else 1  # a chat model writes all of a call in one text
    return Decoding(
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        max_new_tokens=section.max_new_tokens * items,
    )


def criterion_of(loaded: LoadedConfig) -> Criterion:
    """Return the configured rule; an automatic tau starts at the paper's and is calibrated in the first round."""
    section = loaded.config.criterion.model_dump(exclude={"calibration"})
    tau = 1.5 if section["tau"] == "auto" else section["tau"]
    return Criterion(**{**section, "tau": tau}, seed=loaded.config.run.seed)


def calibration_of(loaded: LoadedConfig) -> int | None:
    """Return on how many candidates tau is calibrated, or `None` for a fixed tau."""
    section = loaded.config.criterion
    return section.calibration if section.tau == "auto" else None


def criterion_on(loaded: LoadedConfig, candidates: Sequence[Candidate]) -> Criterion:
    """Return the configured rule for candidates that are all there; an automatic tau is calibrated on the first."""
    criterion, calibration = criterion_of(loaded), calibration_of(loaded)
    if calibration is None:
        return criterion
    return criterion.with_tau(calibrate_tau(candidates[:calibration], criterion) or criterion.tau)


def answer_decoding(loaded: LoadedConfig) -> Decoding:
    """Return how F and B answer."""
    section = loaded.config.synthesis
    temperature = 0.0 if section.decoding == "greedy" else 1.0
    return Decoding(temperature=temperature, max_new_tokens=section.max_new_tokens, stop=section.stop)


def limits_of(loaded: LoadedConfig, inputs: Inputs) -> Limits:
    """Return the loop's limits."""
    section = loaded.config.synthesis
    supply = len(inputs.prompts) if loaded.config.generator.kind == "file" else None
    wanted = math.ceil(section.oversample * section.target_size)
    unbalanced = section.target_size if section.select == "balanced" else None
    return Limits(wanted, section.max_candidates, section.max_rounds, section.patience, supply, unbalanced)


def steering_of(loaded: LoadedConfig) -> Steering:
    """Return how examples are drawn from the pool; prompts from a file need none."""
    section = loaded.config.synthesis
    if loaded.config.generator.kind == "file":
        return Steering()
    return Steering(section.seed_share, section.back_generation)


def load_options(loaded: LoadedConfig) -> LoadOptions:
    """Return how weights are placed."""
    section = loaded.config.run
    return LoadOptions(section.device, section.dtype, section.trust_remote_code, section.compile)


def engine_options(loaded: LoadedConfig, *, open_at_once: int = 1) -> EngineOptions:
    """Return what runs the models, of which `open_at_once` engines share the memory."""
    section = loaded.config.engine
    settings = section.model_dump(exclude={"gpu_memory_utilization", "fine_tuned", "base"})
    return EngineOptions(
        **settings,
        load=load_options(loaded),
        memory=section.gpu_memory_utilization / open_at_once,
        fine_tuned=_endpoint(section.fine_tuned, "engine.fine_tuned"),
        base=_endpoint(section.base, "engine.base"),
    )


def idle_workers(config: Config) -> str | None:
    """Tell that a round has fewer batches than there are workers, and what to do; `None` where all have work."""
    engine, synthesis = config.engine, config.synthesis
    prompts = synthesis.calls_per_round * synthesis.per_call
    batches = -(-prompts // engine.batch_size)
    if batches >= engine.workers:
        return None
    return (
        f"engine.workers = {engine.workers}, but a round of {prompts} prompts makes {batches} "
        f"{'batch' if batches == 1 else 'batches'} of up to {engine.batch_size}: set engine.batch_size to "
        f"{-(-prompts // engine.workers)}, or raise synthesis.calls_per_round"
    )


def _endpoint(section: EndpointSection | None, setting: str) -> Endpoint | None:
    if section is None:
        return None
    return Endpoint(section.base_url, section.model, read_secret(section.api_key, setting=f"{setting}.api_key"))


def _synthesis_engines(config: Config) -> int:
    """Return how many engines are open during synthesis: F and B, a substitute base, a generator of its own, T."""
    plain = {_own_generator(config), config.target.model if config.criterion.name in BY_TARGET else None} - {None}
    return 1 + (config.source.substitute_base is not None) + len(plain)


def _own_generator(config: Config) -> str | None:
    """Return the model that writes prompts, `None` where that is F, B, behind an API or a file."""
    if not config.generator.opens_model or config.generator.model in ("source", "base"):
        return None
    return config.target.model if config.generator.model == "target" else config.generator.model


def open_trained(loaded: LoadedConfig, adapter: Path) -> Engine:
    """Open T with the adapter that was trained for it."""
    target = loaded.config.target.model
    return open_engine(Weights(target, resolve_model(target), adapter=str(adapter)), engine_options(loaded))


def evaluation_questions(loaded: LoadedConfig, inputs: Inputs) -> Questions | None:
    """Return the verdict's questions, `None` where the configuration names none."""
    section = loaded.config.evaluation
    if section is None:
        return None
    return questions_of(loaded, section, inputs.items, inputs.digests["evaluation.data"])


def regression_of(loaded: LoadedConfig, inputs: Inputs) -> Regression | None:
    """Return the questions on something else with their margin, `None` where the configuration names none."""
    evaluation = loaded.config.evaluation
    section = evaluation.regression if evaluation is not None else None
    if section is None:
        return None
    digest = inputs.digests["evaluation.regression.data"]
    return Regression(questions_of(loaded, section, inputs.regression, digest), section.margin)


def examination(loaded: LoadedConfig, inputs: Inputs, adapter: Path) -> Examination:
    """Return what the configuration asks of the models; `adapter` is the trained one."""
    return Examination(
        questions=evaluation_questions(loaded, inputs),
        regression=regression_of(loaded, inputs),
        open_target=lambda: open_trained(loaded, adapter),
        open_source=lambda: open_run_source(loaded, inputs.seeds, substitute=False).engine,
        seed=loaded.config.run.seed,
    )


def named_models(loaded: LoadedConfig) -> dict[str, dict[str, str]]:
    """Return each model of the run by role: what the configuration calls it, and its path or address."""
    config = loaded.config
    alias = {"source": config.source.model or config.source.base, "base": config.source.base}
    alias["target"] = config.target.model
    named = {
        "source.base": config.source.base,
        "source.adapter": config.source.adapter,
        "source.model": config.source.model,
        "source.substitute_base": config.source.substitute_base,
        "target.model": config.target.model,
        "generator.model": alias.get(config.generator.model, config.generator.model),
    }
    api = config.generator.api
    if not config.generator.opens_model:
        named["generator.model"] = None
    resolve = {"source.adapter": resolve_adapter}
    found = {
        role: {"reference": reference, "path": resolve.get(role, resolve_model)(reference)}
        for role, reference in named.items()
        if reference is not None
    }
    return found if api is None else found | {"generator.api": {"reference": api.model, "path": api.base_url}}


def training_settings(loaded: LoadedConfig) -> TrainingSettings:
    """Return how the target is trained."""
    return TrainingSettings(
        **loaded.config.distill.model_dump(),
        target=resolve_model(loaded.config.target.model),
        seed=loaded.config.run.seed,
        load=load_options(loaded),
    )
