"""Measures against full logits of the same models by transformers and peft alone; eq. 8 by enumeration; the command."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS, Tiny, write_jsonl, write_project
from peft import PeftModel
from test_kill import PRELOADED, SERVER
from test_sandbox import needs_sandbox
from test_transfer import merged, run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneshift.criteria import Criterion, decide, score_of
from tuneshift.datafiles import Seed
from tuneshift.encoding import encode_prompt, encode_response
from tuneshift.engines.base import Decoding, ScoreRequest, Weights
from tuneshift.engines.decoding import compare_distributions
from tuneshift.engines.hf import HfEngine
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.source import Source, open_source
from tuneshift.errors import ModelError
from tuneshift.measuring import PASSES, Instruments
from tuneshift.models import LoadOptions
from tuneshift.prompts.screening import normalize
from tuneshift.report.decomposition import decomposition, decomposition_title
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.records import Candidate, Response

LOAD = LoadOptions(device="cpu", dtype="float32")
CLOSE = 1e-4  # nats
DECODING = Decoding(temperature=1, max_new_tokens=24)
PROMPTS = [f"Request: {text}\nIntent:" for text in CORPUS[:5]] * 6
TEXTS = CORPUS[:2]
SEEDS = [Seed(f"s{n}", f"seeds.jsonl:{n + 1}", t, f"Request: {t}\nIntent:", " play") for n, t in enumerate(TEXTS)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, many times so beside another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Source:
    return open_source(
        Weights(str(tiny.llama), str(tiny.llama), adapter=str(tiny.adapter)),
        engines=EngineOptions(load=LOAD, batch_size=7),
        canary_prompts=CORPUS[:3],
    )


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> HfEngine:
    return HfEngine.open(str(tiny.gemma), load=LOAD)


@pytest.fixture(scope="module")
def models(tiny: Tiny) -> dict[str, Any]:
    """F, B and T, loaded by transformers and peft alone."""
    adapted = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    return {
        "F": PeftModel.from_pretrained(adapted, str(tiny.adapter)).eval(),
        "B": AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32).eval(),
        "T": AutoModelForCausalLM.from_pretrained(tiny.gemma, dtype=torch.float32).eval(),
    }


def tools(source: Source, target: HfEngine, **options: Any) -> Instruments:
    defaults: dict[str, Any] = {"demonstrations": SEEDS, "decoding": DECODING, "run_seed": 0}
    return Instruments(source=lambda: source, target=lambda: target, **{**defaults, **options})


@pytest.fixture(scope="module")
def candidates(source: Source) -> list[Candidate]:
    """Candidates with both answers; some of y_f hit the length limit, which no rule keeps."""
    asked = {f"r0000-c000-p{number:03d}": prompt for number, prompt in enumerate(PROMPTS)}
    answers = source.answer(asked, decoding=DECODING, run_seed=0)
    return [
        Candidate(name, 0, "r0000-c000", prompt, prompt, kept=False, reason="", y_f=a.y_f, y_b=a.y_b)
        for (name, prompt), a in zip(asked.items(), answers.values(), strict=True)
    ]


def usable(candidates: Sequence[Candidate]) -> list[Candidate]:
    found = [c for c in candidates if c.y_f and c.y_f.finish_reason != "length" and c.y_f.text.strip()]
    assert found
    return found


def tables(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of the whole vocabulary at each position of a response, in double precision."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), -1)


def prompt_ids(candidate: Candidate, source: Source) -> list[int]:
    return encode_prompt(source.engine.tokenizer, candidate.prompt)


def measured(instruments: Instruments, candidates: Sequence[Candidate], rule: str) -> list[Candidate]:
    found = usable(instruments.measure(candidates, Criterion(rule)))
    assert all(set(Criterion(rule).needs()) <= set(candidate.measures) for candidate in found)
    return found


# Against the full logits


def test_lift_is_the_difference_of_two_mean_log_probabilities(
    source: Source, target: HfEngine, models: dict[str, Any], candidates: list[Candidate]
) -> None:
    for one in measured(tools(source, target), candidates, "lift"):
        assert one.y_f is not None
        ids = list(one.y_f.token_ids)
        means = [
            tables(models[side], prompt_ids(one, source), ids).gather(-1, torch.tensor(ids)[:, None]).mean().item()
            for side in "FB"
        ]
        assert one.measures["logprob_b_f"] == pytest.approx(means[1], abs=CLOSE)
        assert score_of(one, Criterion("lift")) == pytest.approx(means[0] - means[1], abs=CLOSE)


@pytest.mark.parametrize("merge", [True, False])
def test_divergences_and_entropies_are_those_of_the_full_distributions(
    tiny: Tiny, target: HfEngine, models: dict[str, Any], candidates: list[Candidate], merge: bool
) -> None:
    engine = HfEngine.open(str(tiny.llama), load=LOAD, batch_size=7)
    engine.attach(str(tiny.adapter), merge=merge)
    source = Source(engine, canary=None)  # type: ignore[arg-type]
    for one in measured(tools(source, target), candidates, "kl"):
        assert one.y_f is not None
        assert one.y_b is not None
        f, b = (tables(models[side], prompt_ids(one, source), one.y_f.token_ids) for side in "FB")
        truth = {
            "kl": (f.exp() * (f - b)).sum(-1).mean().item(),
            "entropy_f": -(f.exp() * f).sum(-1).mean().item(),
            "entropy_b": -(b.exp() * b).sum(-1).mean().item(),
        }
        if one.y_b.n_tokens:
            f, b = (tables(models[side], prompt_ids(one, source), one.y_b.token_ids) for side in "FB")
            truth["kl_b"] = (b.exp() * (b - f)).sum(-1).mean().item()
            truth["entropy_b_yb"] = -(b.exp() * b).sum(-1).mean().item()
        assert one.measures == pytest.approx(truth, abs=CLOSE)


def test_the_vocabulary_is_compared_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    f, b = (torch.randn(50, 300, generator=generator) * 3 for _ in range(2))
    whole = compare_distributions(f, b)
    monkeypatch.setattr("tuneshift.engines.decoding.CHUNK_BYTES", 4 * 300 * 7 * 6)
    assert torch.equal(compare_distributions(f, b), whole)
    assert compare_distributions(f.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_a_token_that_a_side_rules_out() -> None:
    impossible = torch.tensor([[0.0, 0.0, -math.inf]])
    even = torch.tensor([[0.0, 0.0, 0.0]])
    there, back, entropy_f, entropy_b = compare_distributions(impossible, even)[:, 0].tolist()
    assert there == pytest.approx(math.log(3 / 2))
    assert back == math.inf
    assert (entropy_f, entropy_b) == pytest.approx((math.log(2), math.log(3)))
    assert compare_distributions(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)).isnan().sum() == 3


def test_an_infinite_divergence_is_stored_as_none(
    source: Source, target: HfEngine, candidates: list[Candidate]
) -> None:
    class Ruling:
        tokenizer = source.engine.tokenizer

        def compare(self, requests: Sequence[ScoreRequest]) -> Any:
            return [replace(c, kl_fb=math.inf, entropy_f=math.nan) for c in source.engine.compare(requests)]

    ruling = Source(Ruling(), canary=source.canary)  # type: ignore[arg-type]
    for one in measured(tools(ruling, target), candidates, "kl"):
        assert one.measures["kl"] is one.measures["entropy_f"] is None
        assert one.measures["entropy_b"] is not None


def test_models_of_other_vocabularies_are_not_compared(tiny: Tiny, tmp_path: Path) -> None:
    larger = AutoModelForCausalLM.from_pretrained(merged(tiny, tmp_path / "full"))
    larger.resize_token_embeddings(50)
    engine = HfEngine(
        AutoModelForCausalLM.from_pretrained(tiny.llama),
        AutoTokenizer.from_pretrained(tiny.llama),
        name="grown",
        fine_tuned_model=larger,
    )
    with pytest.raises(ModelError, match="vocabularies of 44 and 50 tokens"):
        engine.compare([ScoreRequest((5,), (6,))])


# Equation 8


@pytest.mark.parametrize("length", [1, 2])
def test_the_expected_margin_is_the_entropy_drop_and_the_divergence(source: Source, length: int) -> None:
    """Sum over every response of a length, each weighted with its probability: both sides of eq. 8 are equal."""
    engine, size = source.engine, source.engine.reader.vocabulary_size
    prompt = tuple(encode_prompt(engine.tokenizer, PROMPTS[0]))
    requests = [ScoreRequest(prompt, ids) for ids in itertools.product(range(size), repeat=length)]
    l_f, l_b = ([sum(s) for s in engine.score(requests, fine_tuned=side)] for side in (True, False))
    compared = engine.compare(requests)

    def expected(logprobs: list[float], values: Sequence[float]) -> float:
        return sum(math.exp(p) * value for p, value in zip(logprobs, values, strict=True))

    per_token = [total / length for total in l_f]
    margin = expected(l_f, per_token) - expected(l_b, per_token)
    entropy_drop = expected(l_b, [c.entropy_b for c in compared]) - expected(l_f, [c.entropy_f for c in compared])
    divergence = expected(l_b, [c.kl_bf for c in compared])
    assert divergence > 0.01
    assert margin == pytest.approx(entropy_drop + divergence, abs=CLOSE)
    # The divergence along y_f is what lift estimates.
    lift = expected(l_f, [(f - b) / length for f, b in zip(l_f, l_b, strict=True)])
    assert lift == pytest.approx(expected(l_f, [c.kl_fb for c in compared]), abs=CLOSE)


# The target, the vote, the demonstrations


def test_target_gap_compares_two_tokenizers_byte_by_byte(
    source: Source, target: HfEngine, models: dict[str, Any], candidates: list[Candidate]
) -> None:
    other = 0
    for one in measured(tools(source, target), candidates, "target_gap"):
        assert one.y_f is not None
        ids = encode_response(target.tokenizer, one.y_f.text)
        other += tuple(ids) != one.y_f.token_ids
        table = tables(models["T"], encode_prompt(target.tokenizer, one.prompt), ids)
        total = table.gather(-1, torch.tensor(ids)[:, None]).sum().item()
        n_bytes = len(one.y_f.text.encode("utf-8"))
        assert one.measures["logprob_t_byte"] == pytest.approx(total / n_bytes, abs=CLOSE)
        gap = one.y_f.sum_logprob / n_bytes - total / n_bytes
        assert score_of(one, Criterion("target_gap")) == pytest.approx(gap, abs=CLOSE)
    assert other


def test_what_the_target_cannot_read_has_no_gap(source: Source, target: HfEngine, candidates: list[Candidate]) -> None:
    long = [replace(c, prompt="a b " * 200) for c in usable(candidates)]
    assert all(c.measures == {"logprob_t_byte": None} for c in measured(tools(source, target), long, "target_gap"))


def test_a_vote_is_the_share_of_new_answers_with_the_same_normalised_text(
    source: Source, target: HfEngine, candidates: list[Candidate]
) -> None:
    class Saying:
        tokenizer = source.engine.tokenizer

        def generate(self, prompts: Any, *, seeds: Sequence[int], decoding: Decoding, fine_tuned: bool) -> Any:
            assert fine_tuned
            assert decoding == replace(DECODING, temperature=1.0)
            assert len(set(seeds)) == len(seeds)
            said = source.engine.generate(prompts, seeds=seeds, decoding=decoding, fine_tuned=True)
            return [replace(c, text=[" Play!", "play", "PLAY it", "stop", " pLaY "][n % 5]) for n, c in enumerate(said)]

    saying = Source(Saying(), canary=source.canary)  # type: ignore[arg-type]
    record = usable(candidates)[0]
    assert record.y_f is not None
    twin = replace(record, id="r0000-c001-p000", y_f=replace(record.y_f, text="play it"))
    records = [replace(record, y_f=replace(record.y_f, text="play")), twin]
    assert normalize(" Play!") == normalize(" pLaY ") == "play"
    voted = tools(saying, target, decoding=replace(DECODING, temperature=0.0)).measure(records, Criterion("vote"))
    assert [c.measures for c in voted] == [{"vote_5": 3 / 5}, {"vote_5": 1 / 5}]


def test_other_brackets_are_another_vote(source: Source, target: HfEngine, candidates: list[Candidate]) -> None:
    class Closing:
        tokenizer = source.engine.tokenizer

        def generate(self, prompts: Any, *, seeds: Sequence[int], decoding: Decoding, fine_tuned: bool) -> Any:
            said = source.engine.generate(prompts, seeds=seeds, decoding=decoding, fine_tuned=True)
            return [replace(c, text=[" ] ) }", "])}", " ] } )", ")", ""][n % 5]) for n, c in enumerate(said)]

    closing = Source(Closing(), canary=source.canary)  # type: ignore[arg-type]
    record = usable(candidates)[0]
    assert record.y_f is not None
    records = [replace(record, y_f=replace(record.y_f, text=" ] ) }"))]
    (voted,) = tools(closing, target).measure(records, Criterion("vote"))
    assert voted.measures == {"vote_5": 2 / 5}


def test_a_vote_asks_anew_for_each_candidate_and_alike_for_the_same(
    source: Source, target: HfEngine, candidates: list[Candidate]
) -> None:
    short = replace(DECODING, max_new_tokens=2)
    records = [replace(c, y_f=Response(" a", (5,), (-0.1,), None, "stop", False)) for c in usable(candidates)]
    again = [tools(source, target, decoding=short).measure(records, Criterion("vote", samples=9)) for _ in range(2)]
    assert again[0] == again[1]
    assert all(list(c.measures) == ["vote_9"] for c in again[0])


def test_b_answers_behind_the_demonstrations_and_f_scores_behind_the_prompt(
    source: Source, target: HfEngine, models: dict[str, Any], candidates: list[Candidate]
) -> None:
    seen: list[tuple[Any, ...]] = []

    class Watching(HfEngine):
        def __init__(self) -> None:
            self.__dict__ = source.engine.__dict__

        def generate(self, prompts: Any, **options: Any) -> Any:
            seen.append((prompts, options, super().generate(prompts, **options)))
            return seen[-1][2]

    watched = Source(Watching(), canary=source.canary)
    found = measured(tools(watched, target), candidates, "few_shot_base")
    ((prompts, options, written),) = seen
    assert options["fine_tuned"] is False
    shown = "".join(f"Request: {text}\nIntent: play\n\n" for text in TEXTS)
    tokenizer = source.engine.tokenizer
    scored = 0
    for one, prompt, answer in zip(found, prompts, written, strict=True):
        assert list(prompt) == encode_prompt(tokenizer, shown + one.prompt)
        if not answer.token_ids:
            assert one.measures["few_shot_ppl"] is one.measures["few_shot_ppl_eos"] is None
            continue
        ids = [*answer.token_ids, *([answer.eos[0]] if answer.eos else [])]
        table = tables(models["F"], prompt_ids(one, source), ids)
        logprobs = table.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        truth = {
            "few_shot_ppl": math.exp(-logprobs[: len(answer.token_ids)].mean().item()),
            "few_shot_ppl_eos": math.exp(-logprobs.mean().item()),
        }
        assert one.measures == pytest.approx(truth, rel=1e-3)
        scored += 1
    assert scored >= 5


def test_demonstrations_that_leave_no_room_give_no_number(
    source: Source, target: HfEngine, candidates: list[Candidate]
) -> None:
    many = [replace(SEEDS[0], prompt=SEEDS[0].prompt * 6)]
    found = measured(tools(source, target, demonstrations=many), candidates, "few_shot_base")
    assert all(c.measures == {"few_shot_ppl": None, "few_shot_ppl_eos": None} for c in found)


def test_a_program_that_runs_counts_as_one(source: Source, target: HfEngine, candidates: list[Candidate]) -> None:
    asked: list[str] = []

    def runs(program: str) -> bool:
        asked.append(program)
        return "def" in program

    texts = ["def f(): pass", "x = 1", "Here it is:\n```python\ndef g(): pass\n```\nDone."]
    record = usable(candidates)[0]
    assert record.y_f is not None
    records = [replace(record, id=text, y_f=replace(record.y_f, text=text)) for text in texts]
    found = tools(source, target, runs=runs).measure(records, Criterion("exec"))
    assert sorted(asked) == sorted([*texts[:2], "def g(): pass\n"])
    assert [c.measures for c in found] == [{"exec": 1.0}, {"exec": 0.0}, {"exec": 1.0}]
    assert [decide(c, Criterion("exec")).kept for c in found] == [True, False, True]


@needs_sandbox
def test_programs_run_in_the_sandbox(source: Source, target: HfEngine, candidates: list[Candidate]) -> None:
    texts = ["def f(): return 1", "def f(:", "print(1)", "def f(): pass\nraise ValueError", "import os\ndef f(): pass"]
    record = usable(candidates)[0]
    assert record.y_f is not None
    records = [replace(record, id=text, y_f=replace(record.y_f, text=text)) for text in texts]
    found = tools(source, target).measure(records, Criterion("exec"))
    assert [c.measures["exec"] for c in found] == [1.0, 0.0, 0.0, 0.0, 1.0]


# What is measured, and what not


RULES_HERE = [pytest.param(rule, marks=needs_sandbox) if rule == "exec" else rule for rule in sorted(PASSES)]


@pytest.mark.parametrize("rule", RULES_HERE)
def test_only_what_a_rule_could_keep_is_measured_and_only_once(
    source: Source, target: HfEngine, candidates: list[Candidate], rule: str
) -> None:
    once = tools(source, target).measure(candidates, Criterion(rule))
    worth = {c.id for c in usable(candidates)}
    assert {c.id for c in once if c.measures} == worth
    assert [replace(c, measures={}) for c in once] == candidates

    def closed() -> Any:
        raise AssertionError("everything is measured")

    assert Instruments(closed, closed, SEEDS, DECODING, 0).measure(once, Criterion(rule)) == once


# The command


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the paper's rule, with both answers everywhere; its seeds have responses."""
    folder = tmp_path_factory.mktemp("measured")
    config = write_project(
        folder,
        tiny,
        synthesis={"complete_scores": True, "target_size": 4, "max_rounds": 6},
        criterion={"name": "ppl_diff", "tau": 8.0},
        distill={"num_train_epochs": 1},
        evaluation=None,
    )
    rows = [{"prompt": f"Request: {text}\nIntent:", "response": " play"} for text in CORPUS[:5]]
    write_jsonl(folder / "seeds.jsonl", rows)
    assert run_cli("transfer", str(config), "--run-dir", str(folder / "run")) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def stored(run: Path) -> list[Candidate]:
    with Ledger(run / "ledger.sqlite") as ledger:
        return ledger.candidates()


@pytest.mark.parametrize("rule", RULES_HERE)
def test_measure_then_reselect(run: Path, capsys: pytest.CaptureFixture[str], rule: str) -> None:
    criterion = ["--set", f"criterion.name={rule}", "--set", "criterion.threshold=0.01", "--set", "criterion.tau=8"]
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and "ledger" not in path.name}
    assert run_cli("reselect", str(run), *criterion) == 2
    refused = capsys.readouterr().err
    command = re.search(r"tuneshift (measure .*)", refused)
    assert command is not None
    assert not (run / "reselected").exists()
    assert run_cli(*command.group(1).split(), "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    worth = usable(stored(run))
    assert (result["measured"], result["candidates"]) == (len(worth), len(stored(run)))
    assert result["judged"] <= result["measured"]
    assert run_cli("measure", str(run), *criterion, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] == 0
    assert run_cli("reselect", str(run), *criterion, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(result["reasons"].values()) == result["candidates"]
    assert not any("unscored" in reason for reason in result["reasons"])
    rows = Path(result["dataset"]).read_text().splitlines()
    assert len(rows) == result["written"] == min(result["kept"], 4)  # the run's target_size
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and "ledger" not in path.name}
    assert after == before  # the run's own results stay


def test_the_length_control_needs_no_measure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = ["--set", "criterion.name=length", "--set", "criterion.tau=8"]
    assert run_cli("reselect", str(run), *setting, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kept"] == result["kept_before"] > 0
    assert run_cli("measure", str(run), *setting) == 2
    assert "criterion length needs no measure" in capsys.readouterr().err


def test_measuring_takes_criterion_and_engine_settings_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("measure", str(run), "--set", "criterion=kl", "--set", "synthesis.demos=2") == 2
    assert "synthesis.demos=2" in capsys.readouterr().err


def test_measuring_with_other_seeds_is_refused(run: Path, capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    seeds = finished.parent / "seeds.jsonl"
    text = seeds.read_text()
    try:
        seeds.write_text(text.replace("play", "stop"))
        assert run_cli("measure", str(run), "--set", "criterion=kl") == 4
    finally:
        seeds.write_text(text)
    assert "other content in seeds" in capsys.readouterr().err


def measure_and_die(run: str, shards: int) -> None:
    """Measure in small shards, and die when that many are committed."""
    from tuneshift import cli, measuring

    measuring.SHARD = 3
    torch.set_num_threads(1)
    original, seen = Ledger.record_measures, []

    def record_measures(self: Ledger, candidates: Any) -> None:
        original(self, candidates)
        seen.append(candidates)
        if len(seen) == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.record_measures = record_measures  # type: ignore[method-assign]
    import sys

    sys.argv = ["tuneshift", "measure", run, "--set", "criterion=vote", "--set", "criterion.samples=2"]
    cli.main()


def test_a_killed_measure_loses_at_most_a_shard_and_ends_with_the_same_values(run: Path, tmp_path: Path) -> None:
    SERVER.set_forkserver_preload(PRELOADED)
    worth = len(usable(stored(run)))
    whole, killed = (Path(shutil.copytree(run, tmp_path / name)) for name in ("whole", "killed"))
    for copy, stops in ((whole, (0,)), (killed, (2, 0))):
        for stop in stops:
            process = SERVER.Process(target=measure_and_die, args=(str(copy), stop))
            process.start()
            process.join(120)
            assert process.exitcode == (-signal.SIGKILL if stop else 0)
            assert sum(bool(c.measures) for c in stored(copy)) == (3 * stop if stop else worth)
    assert worth > 3 * 2
    assert stored(killed) == stored(whole)


# What people see of it


def test_the_means_of_both_sides_of_equation_8() -> None:
    def record(l_f: float, l_b: float, measures: dict[str, float | None]) -> Candidate:
        y_f, y_b = (Response(" a", (5, 6), (mean, mean), None, "eos", False) for mean in (l_f, l_b))
        return Candidate("id", 0, "call", "a", "a", kept=False, reason="", y_f=y_f, y_b=y_b, measures=measures)

    records = [
        record(-0.25, -1.25, {"entropy_f": 0.25, "entropy_b_yb": 0.75, "kl_b": 0.25}),
        record(-0.5, -3.5, {"entropy_f": 0.5, "entropy_b_yb": 2.0, "kl_b": 1.0}),
        record(-0.5, -3.5, {"entropy_f": 0.5, "entropy_b_yb": 2.0, "kl_b": None}),  # does not count
        record(-0.5, -3.5, {}),
        replace(record(-0.5, -3.5, {"entropy_f": 0.5}), y_b=None),
        Candidate("id", 0, "call", "", "", kept=False, reason="duplicate"),
    ]
    rounds = [RoundSummary(0, 1.5, 1.0, {"temperature": 1.0})]
    found = decomposition(records, rounds)
    assert found is not None
    assert (found["n"], found["answered"], found["greedy"]) == (2, 5, False)
    means = {name: found[name]["mean"] for name in ("margin", "entropy_drop", "divergence", "sum", "difference")}
    assert means == pytest.approx(
        {"margin": 2.0, "entropy_drop": 1.0, "divergence": 0.625, "sum": 1.625, "difference": 0.375}
    )
    assert found["margin"]["standard_error"] == pytest.approx(1.0)  # of 1 and 3
    assert decomposition(records[:1], rounds)["margin"]["standard_error"] is None  # type: ignore[index]
    assert decomposition(records[3:], rounds) is None
    greedy = decomposition(records, [RoundSummary(0, 1.5, 1.0, {"temperature": 0.0})])
    assert greedy is not None
    assert "greedy" in decomposition_title(greedy)


def test_show_and_a_renewed_report_tell_the_expected_margin(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("show", str(run), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["expected_margin"] is None
    assert "Expected margin" not in (run / "report.md").read_text()
    assert run_cli("measure", str(run), "--set", "criterion=kl") == 0
    capsys.readouterr()
    assert run_cli("report", str(run)) == 0
    written = [f"report: {run / 'report.html'}", f"markdown: {run / 'report.md'}"]
    assert capsys.readouterr().out.splitlines() == written
    assert run_cli("show", str(run)) == 0
    found = decomposition(stored(run), [])
    assert found is not None
    shown = capsys.readouterr().out
    assert f"over {found['n']} of {found['answered']} answered candidates" in shown
    assert "entropy_b_yb" in shown
    for text in (shown, (run / "report.md").read_text()):
        assert f"{found['margin']['mean']:+.3f}" in text
        assert f"{found['sum']['standard_error']:.3f}" in text


# In the loop


@pytest.mark.parametrize("rule", RULES_HERE)
def test_a_run_by_a_rule_that_measures(tiny: Tiny, tmp_path: Path, rule: str) -> None:
    criterion = {"name": rule, "threshold": 0.01, "tau": 8.0, "vote_share": 0.2, "samples": 2}
    config = write_project(
        tmp_path,
        tiny,
        synthesis={"target_size": 4, "max_rounds": 3, "patience": 9, "max_new_tokens": 12},
        criterion=criterion,
        distill={"num_train_epochs": 1},
        evaluation=None,
    )
    rows = [{"prompt": f"Request: {text}\nIntent:", "response": " play"} for text in CORPUS[:5]]
    write_jsonl(tmp_path / "seeds.jsonl", rows)
    code = run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"))
    found = stored(tmp_path / "run")
    kept = [candidate for candidate in found if candidate.kept]
    assert code == (0 if kept else 2)
    if kept:
        rows = [json.loads(line) for line in (tmp_path / "run/dataset/kept.jsonl").read_text().splitlines()]
        assert [(row["id"], row["ppl_b"]) for row in rows] == [(candidate.id, None) for candidate in kept[:4]]
        assert "not asked" in (tmp_path / "run/report.md").read_text()
    needs = set(Criterion(rule, samples=2).needs())
    for candidate in found:
        assert candidate.y_b is None  # no such rule reads it
        if candidate.kept:
            assert needs <= set(candidate.measures)
    measured = [c for c in found if c.measures]
    assert measured
    gated = rule == "few_shot_base"
    hopeful = [c for c in usable(found) if c.y_f and (not gated or c.y_f.perplexity() < 8)]
    assert [c.id for c in measured] == [c.id for c in hopeful]


def test_few_shot_base_wants_seeds_with_responses(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_project(tmp_path, tiny, criterion={"name": "few_shot_base"})
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    assert "seeds.jsonl:1: criterion few_shot_base shows B the seeds with their responses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("criterion", "setting", "says"),
    [
        ("kl", "engine.kind=vllm", "criterion kl needs engine.kind: hf"),
        ("entropy_drop", "engine.kind=vllm", "criterion entropy_drop needs engine.kind: hf"),
        ("lift", "source.substitute_base=org/other", "criterion lift compares F with B token by token"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_door(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], criterion: str, setting: str, says: str
) -> None:
    config = write_project(tmp_path, tiny, criterion={"name": criterion})
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"), "--set", setting) == 2
    assert says in capsys.readouterr().err


# The ledger
