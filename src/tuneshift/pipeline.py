"""TuneShift-KD on one page: from five example prompts to a target that knows what the adapter knew.

`transfer` is the whole method, numbered 1 to 6; it continues a stopped run from its ledger. `Synthesis` is its heart,
the loop of the paper's Figure 1; a round is numbered 1 to 5.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tuneshift.config import LoadedConfig
from tuneshift.coverage import coverage
from tuneshift.criteria import TOO_LONG, Criterion, calibrate_tau, decide_all, may_keep
from tuneshift.datafiles import Seed
from tuneshift.dataset import Row, choose, kept_rows, pairs, read_rows
from tuneshift.engines.base import Decoding
from tuneshift.engines.source import Answers, Source
from tuneshift.errors import NothingKeptError
from tuneshift.evaluate.evidence import gather_evidence
from tuneshift.evaluate.verdict import detectable_sentence
from tuneshift.launch import train
from tuneshift.measuring import Instruments
from tuneshift.preflight import Inputs, read_inputs
from tuneshift.progress import SILENT, Progress
from tuneshift.prompts.contamination import HeldOut
from tuneshift.prompts.pool import Steering, make_pool
from tuneshift.prompts.probing import ask_words, probe_words
from tuneshift.prompts.screening import UNANSWERED, Screen
from tuneshift.prompts.stopping import Limits, diagnosis, next_calls, stop_reason
from tuneshift.report.card import write_cards
from tuneshift.report.markdown import write_report
from tuneshift.report.page.render import write_page
from tuneshift.run.directory import RunDirectory, jsonl, read_json, write_atomically, write_json
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.manifest import origin, write_manifest
from tuneshift.run.records import Candidate, GeneratorCall
from tuneshift.run.resume import check_resumable, open_ledger, synthesis_finished
from tuneshift.run.usage import peak_memory, timed
from tuneshift.tracking import followed, verdict_numbers
from tuneshift.wiring import (
    Generator,
    SynthesisModels,
    answer_decoding,
    calibration_of,
    criterion_of,
    examination,
    generator_usage,
    limits_of,
    named_models,
    steering_of,
    synthesis_models,
    training_settings,
)


def transfer(loaded: LoadedConfig, run: RunDirectory, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Move what the source's fine-tuning knows to the target, and return the verdict.

    `run` is locked by the caller. A directory that holds a stopped run of the same configuration is continued.

    Raises:
        UserError: an input is wrong; nothing was written. ResumeRefused: the directory is another configuration's.
    """
    # 1) Preflight: every file and model that the run will need, before anything costs time.
    started = time.monotonic()
    inputs = read_inputs(loaded.config, folder=loaded.folder)
    resumed = check_resumable(loaded, run, inputs.digests)
    if resumed and run.manifest.exists():
        return dict(read_json(run.verdict))  # finished: nothing is measured again
    if inputs.items:
        progress.note(detectable_sentence(len(inputs.items)))
    if not (resumed and synthesis_finished(run)):
        with synthesis_models(loaded, inputs, progress) as models, open_ledger(loaded, run, inputs.digests) as ledger:
            ledger.add_seconds("preflight", time.monotonic() - started)
            # 2) Synthesis: new prompts, both answers, F's scores, the criterion; round by round.
            with followed(progress, loaded.config.run.trackers, run, ledger) as told:
                synthesize(loaded, inputs, models, ledger, told)
    with (
        open_ledger(loaded, run, inputs.digests) as ledger,
        followed(progress, loaded.config.run.trackers, run, ledger) as progress,
    ):
        # 3) Dataset: the kept pairs, with where each comes from.
        candidates, criterion, section = ledger.candidates(), loaded.config.criterion, loaded.config.synthesis
        kept = [candidate for candidate in candidates if candidate.kept]
        seed, probes = loaded.config.run.seed, ledger.probes() or ()
        chosen = choose(kept, section.target_size, section.select, seed=seed, probes=probes)
        rows = kept_rows(chosen, ledger.calls(), count_eos=criterion.count_eos)
        if not rows:
            tau = ledger.rounds()[-1].tau
            raise NothingKeptError(f"{run.path}: no candidate was kept. {diagnosis(candidates, tau=tau)}")
        write_atomically(run.dataset, jsonl(rows))
        progress.note(
            f"Kept {len(kept)} of {len(candidates)} candidates: {ledger.meta('stop_reason')}; {len(rows)} to learn"
        )

        # 4) Distillation: a LoRA on the target, loss on F's responses (paper, eq. 1).
        if not run.training.exists():
            with timed(ledger, "distill"):
                ledger.raise_peaks({"peak_cuda_memory_bytes": distill_run(loaded, run, progress)})
        shutil.rmtree(run.checkpoints, ignore_errors=True)

        # 5) Evidence: T before, T after, F and B on the same held-out items.
        with timed(ledger, "evaluate"):
            verdict = gather_evidence(run.evaluation, examination(loaded, inputs, run.adapter), progress=progress)
        verdict |= {"criterion": criterion.name, "trained_pairs": len(rows), **what_it_took(loaded, ledger, rows)}
        write_json(run.verdict, verdict)
        progress.log("evaluation", 1, verdict_numbers(verdict))

        # 6) Report, and last of all the manifest that vouches for every file.
        finish(run, ledger)
    return verdict


@dataclass(frozen=True)
class Synthesis:
    """The loop of the paper's Figure 1: write prompts, answer, score, keep, again.

    `fits` tells whether a prompt leaves room for a response, and `learnable` whether the target can read a prompt with
    its response; `held_out` are questions that must not be trained on. With
    `calibration`, the first round has at least that many candidates, and the tau that keeps the wanted share of them
    is frozen for the run. B answers where F's response could still be kept by a rule that reads y_b, or everywhere with
    `complete_scores`; a rule that needs more has it measured with `instruments`.
    """

    source: Source
    instruments: Instruments
    generator: Generator
    seeds: Sequence[Seed]
    template: str | None
    held_out: HeldOut
    fits: Callable[[str], bool]
    learnable: Callable[[str, str], bool]
    criterion: Criterion
    calibration: int | None
    complete_scores: bool
    decoding: Decoding
    limits: Limits
    steering: Steering
    probes: int
    calls_per_round: int
    run_seed: int

    def run(self, ledger: Ledger, progress: Progress = SILENT) -> str:
        """Make rounds until a stop rule holds, and return its name.

        A round commits whole, and all state is read back from the ledger, so a restart makes the same choices.
        """
        self.probe(ledger)
        candidates = ledger.candidates()
        screen = Screen(
            seeds=[seed.prompt for seed in self.seeds],
            held_out=self.held_out,
            seen=[candidate.prompt for candidate in candidates],
            fits=self.fits,
            template=self.template,
        )
        kept = [candidate for candidate in candidates if candidate.kept]
        size, limits, probes = self.limits.target_size, self.limits, ledger.probes() or ()
        with progress.stage("Synthesis", total=size, unit="kept pairs", done=min(len(kept), size)) as meter:
            while not (reason := stop_reason(candidates, rounds=len(ledger.rounds()), limits=limits, probes=probes)):
                candidates += self.round(candidates, ledger, screen, meter.say)
                kept = [candidate for candidate in candidates if candidate.kept]
                newest = f"{kept[-1].text!r} ->{kept[-1].y_f.text!r}" if kept and kept[-1].y_f else "nothing kept yet"
                meter.update(min(len(kept), size), f"{len(candidates)} candidates; {newest}")
                counts = {"kept": len(kept), "candidates": len(candidates)}
                progress.log("synthesis", candidates[-1].round + 1, counts | {"keep_rate": len(kept) / len(candidates)})
        return reason

    def probe(self, ledger: Ledger) -> None:
        """Let F answer single words, once for the run: what it says to several is a kind to ask prompts for."""
        if not self.probes or ledger.probes() is not None:
            return
        with timed(ledger, "synthesis"):
            words = probe_words(self.source.engine.tokenizer, self.probes, seed=self.run_seed)
            probes = ask_words(
                self.source, words, template=self.template, decoding=self.decoding, run_seed=self.run_seed
            )
            ledger.record_probes(probes)

    def round(
        self, candidates: Sequence[Candidate], ledger: Ledger, screen: Screen, say: Callable[[str], None]
    ) -> list[Candidate]:
        """Make one round behind `candidates`, commit it, and return its candidates with their decisions.

        `screen` has seen `candidates`; `say` is told what the round is at.
        """
        started = time.monotonic()
        rounds = ledger.rounds()
        say(f"round {len(rounds) + 1}: G writes prompts")

        # 1) The generator continues examples drawn from the pool: seeds and kept prompts (section 3.4).
        calls = ledger.calls(len(rounds)) or self.write_prompts(candidates, len(rounds), ledger)

        # 2) Prompts that need no answer are dropped: duplicates, copies, unreadable, too long, held-out.
        new = [candidate for call in calls for candidate in screen.sift(call, self.generator.parse(call))]

        # 3) Both models answer, and F scores both answers (section 3.2, eq. 2 to 4); some criteria measure more.
        criterion = self.criterion.with_tau(rounds[0].tau) if rounds else self.criterion
        calibrating = self.calibration is not None and not rounds
        everything = self.complete_scores or calibrating
        asks_base = self.complete_scores or not criterion.needs()
        fresh = {candidate.id: candidate.prompt for candidate in new if candidate.reason == UNANSWERED}
        answers = self.source.answer(
            fresh,
            decoding=self.decoding,
            run_seed=self.run_seed,
            worth=lambda y_f: asks_base and (everything or may_keep(y_f, criterion)),
            say=lambda info: say(f"round {len(rounds) + 1}: {info}"),
        )
        new = [self.answered(c, answers[c.id]) if c.id in answers else c for c in new]
        new = self.instruments.measure(new, criterion, gated=not everything)

        # 4) The criterion keeps what F is sure of and B would not have said.
        if calibrating:
            criterion = criterion.with_tau(calibrate_tau(new[: self.calibration], criterion) or criterion.tau)
        new = decide_all(new, criterion)

        # 5) The round is committed whole; what it kept joins the pool.
        seconds = time.monotonic() - started
        ledger.record_round(RoundSummary(len(rounds), criterion.tau, seconds, asdict(self.decoding)), new)
        ledger.raise_peaks(peak_memory())
        return new

    def answered(self, candidate: Candidate, answers: Answers) -> Candidate:
        """Return the candidate with its answers; what the target cannot read is dropped, whatever the criterion."""
        readable = self.learnable(candidate.prompt, answers.y_f.text)
        return replace(candidate, y_f=answers.y_f, y_b=answers.y_b, reason=candidate.reason if readable else TOO_LONG)

    def write_prompts(self, candidates: Sequence[Candidate], index: int, ledger: Ledger) -> list[GeneratorCall]:
        """Ask the generator for a round's prompts, and commit what it wrote before it is parsed."""
        n_calls = next_calls(
            candidates, per_call=self.generator.per_call, calls_per_round=self.calls_per_round, limits=self.limits
        )
        if index == 0 and self.calibration is not None:
            n_calls = max(n_calls, -(-self.calibration // self.generator.per_call))
        kept = [candidate for candidate in candidates if candidate.kept]
        pool = make_pool(self.seeds, kept, self.steering, ledger.probes() or ())
        calls = self.generator.write(pool, round_index=index, calls=n_calls, ledger=ledger)
        ledger.record_calls(calls)
        return calls


def synthesis(loaded: LoadedConfig, inputs: Inputs, models: SynthesisModels) -> Synthesis:
    """Return the loop that the configuration describes, on opened models."""
    return Synthesis(
        source=models.source,
        instruments=models.instruments,
        generator=models.generator,
        seeds=models.checks.answered(inputs.seeds),
        template=loaded.config.prompt_template,
        held_out=inputs.held_out,
        fits=models.fits,
        learnable=models.learnable,
        criterion=criterion_of(loaded),
        calibration=calibration_of(loaded),
        complete_scores=loaded.config.synthesis.complete_scores,
        decoding=answer_decoding(loaded),
        limits=limits_of(loaded, inputs),
        steering=steering_of(loaded),
        probes=0 if loaded.config.generator.kind == "file" else loaded.config.synthesis.probes,
        calls_per_round=loaded.config.synthesis.calls_per_round,
        run_seed=loaded.config.run.seed,
    )


def synthesize(
    loaded: LoadedConfig, inputs: Inputs, models: SynthesisModels, ledger: Ledger, progress: Progress
) -> None:
    """Run the loop to its end, and note why it ended and what it ran on."""
    reason = synthesis(loaded, inputs, models).run(ledger, progress)
    described = {"models": named_models(loaded), "engines": models.source.describe()}
    ledger.set_meta(stop_reason=reason, **{key: json.dumps(value) for key, value in described.items()})


def distill_run(loaded: LoadedConfig, run: RunDirectory, progress: Progress) -> int | None:
    """Train the target on the kept dataset, record what the training did, and return its peak CUDA memory in bytes."""
    rows = read_rows(run.dataset)
    progress.note(f"Training a LoRA on {loaded.config.target.model} with {len(rows)} kept pairs")
    with progress.stage(
        "Distillation", total=loaded.config.distill.num_train_epochs * len(rows), unit="pairs"
    ) as meter:
        logged: Mapping[str, float] = {}

        def on_step(done: int, total: int, numbers: Mapping[str, float]) -> None:
            nonlocal logged
            shown = f", loss {numbers['loss']:.3f} nats per token" if numbers else ""
            meter.update(meter.stage.total * done // total, f"step {done} of {total}{shown}")
            if numbers != logged:
                progress.log("distillation", done - 1, numbers)  # of the epoch that ended before this step
            logged = numbers

        summary = train(
            pairs(rows),
            training_settings(loaded),
            output_dir=run.adapter,
            checkpoint_dir=run.checkpoints,
            on_step=on_step,
        )
    progress.log("distillation", summary.steps, {"loss": summary.losses[-1]})  # the last epoch's, after the last step
    write_json(run.training, asdict(summary))
    return summary.peak_cuda_memory_bytes


def what_it_took(loaded: LoadedConfig, ledger: Ledger, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the verdict's counts, what the learnt rows cover, seconds by stage, the API's tokens and cost, memory."""
    candidates, rounds = ledger.candidates(), ledger.rounds()
    return {
        "kept": sum(candidate.kept for candidate in candidates),
        "candidates": len(candidates),
        "reasons": dict(Counter(candidate.reason for candidate in candidates).most_common()),
        "rounds": len(rounds),
        "tau": rounds[-1].tau if rounds else None,
        "stop_reason": ledger.meta("stop_reason"),
        "coverage": coverage(candidates, ledger.calls(), {row["id"] for row in rows}, ledger.probes()),
        "seconds": ledger.seconds(),
        "generator_usage": generator_usage(loaded, ledger),
        **ledger.peaks(("peak_memory_bytes", "peak_cuda_memory_bytes")),
    }


def finish(run: RunDirectory, ledger: Ledger) -> None:
    """Write everything that reads the verdict, and the manifest last."""
    made_from = origin(ledger)
    write_report(run, ledger)
    write_page(run, ledger, made_from)
    write_cards(run, ledger, made_from)
    write_manifest(run, made_from)
