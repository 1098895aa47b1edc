"""lm-evaluation-harness on our engines: its tasks, prompts, filters and metrics; our weights, decoding and encoding.

The harness asks a model for texts and for log-likelihoods; `Engine` gives both, whatever runs the model, so every kind
of engine is evaluated, and with the join of prompt and response that the target was trained with. The questions are
those that were read and checked before: they are given to the harness's own task in place of its dataset.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tuneshift.datafiles import Item
from tuneshift.encoding import encode_response
from tuneshift.engines.base import Engine, ScoreRequest
from tuneshift.errors import ConfigError
from tuneshift.evaluate.benchmarks.base import Benchmark
from tuneshift.evaluate.tasks import Outcome, complete_items, encode_items
from tuneshift.run.records import FinishReason

FOLDERS = ("gsm8k", "bbh/zeroshot", "mmlu/default")
"""Where the harness keeps the tasks that we run: reading all of its thousands would take half a minute."""


def harness_version() -> str:
    """Return the installed version of lm-evaluation-harness.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.harness: lm_eval is not installed. Install it with pip install 'tuneshift[eval]', or set "
            "evaluation.harness: native where the task allows it."
        )
    return importlib.metadata.version("lm-eval")


def check_harness(items: Sequence[Item], benchmark: Benchmark) -> None:
    """Prove that the installed harness would ask exactly the items' prompts, without a model.

    Raises:
        ConfigError: it is not installed, or asks otherwise.
    """
    version = harness_version()
    with _silence():
        for name, task in _load(grouped := _by_task(items, benchmark))["tasks"].items():
            task.set_config(key="num_fewshot", value=0)
            task.build_all_requests(rank=0, world_size=1)
            for request in task.instances:
                item = grouped[name][request.doc_id]
                if request.args[0] != item.prompt:
                    raise ConfigError(
                        f"evaluation.harness: lm-eval {version} asks {item.place} as {request.args[0]!r}, but "
                        f"{item.prompt!r} was expected. Install lm-eval 0.4.13."
                    )


def ask_through_harness(
    engine: Engine,
    items: Sequence[Item],
    *,
    fine_tuned: bool,
    benchmark: Benchmark,
    metric: str,
    max_new_tokens: int,
) -> list[Outcome]:
    """Let the harness ask a model the items and grade the answers; `metric` names the grading that counts.

    Raises:
        DataError: a prompt and its answer do not fit into the model's context.
    """
    grouped = _by_task(items, benchmark)
    model = _engine_model(engine, grouped, fine_tuned=fine_tuned, max_new_tokens=max_new_tokens)
    with _silence():
        from lm_eval.evaluator import evaluate

        results = evaluate(model, _load(grouped), log_samples=True, bootstrap_iters=0)
    responses: dict[str, str] = {}
    graded: dict[str, dict[str, bool]] = defaultdict(dict)
    for name, samples in results["samples"].items():
        for sample in samples:
            item = grouped[name][sample["doc_id"]]
            (found,) = sample["metrics"]
            grading = found if sample["filter"] == "none" else sample["filter"].replace("-", "_")
            graded[item.id][grading] = bool(sample[found] == 1)
            responses[item.id] = _response(sample)
    return [
        Outcome(item.id, responses[item.id], graded[item.id][metric], model.finished.get(item.id), graded[item.id])
        for item in items
    ]


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what the harness prints and its warnings of how tasks are set up; its errors are exceptions."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _response(sample: dict[str, Any]) -> str:
    """Return what was generated, or the likeliest of the choices."""
    answers = [answer for (answer,) in sample["resps"]]
    if isinstance(answers[0], str):
        return answers[0]
    likeliest = max(range(len(answers)), key=lambda choice: answers[choice][0])
    return str(sample["arguments"][likeliest][1]).strip()


def _by_task(items: Sequence[Item], benchmark: Benchmark) -> dict[str, list[Item]]:
    """Return the items by the harness's task; an item's place in its list is its `doc_id` there."""
    assert benchmark.harness_task is not None  # the configuration is refused where the harness has no such task
    grouped: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        grouped[benchmark.harness_task(item)].append(item)
    return dict(grouped)


def _load(grouped: dict[str, list[Item]]) -> Any:
    """Return the harness's tasks, as it keeps them, on our questions and without examples."""
    import lm_eval.tasks
    from datasets import Dataset

    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_path=[root / name for name in FOLDERS], include_defaults=False)

    def on_our_questions(name: str, items: list[Item]) -> dict[str, Any]:
        questions = {"test": Dataset.from_list([item.doc for item in items])}
        without_examples = {"num_fewshot": 0, "fewshot_split": None, "fewshot_config": None, "training_split": None}
        return {"task": name, "custom_dataset": lambda **_: questions, "dataset_kwargs": None, **without_examples}

    tasks = [on_our_questions(name, items) for name, items in grouped.items()]
    return manager.load([{"group": "tuneshift", "task": tasks}])


def _engine_model(engine: Engine, grouped: dict[str, list[Item]], *, fine_tuned: bool, max_new_tokens: int) -> Any:
    """Return the engine as a model of the harness, which keeps by item why a response ended."""
    from lm_eval.api.model import LM

    stderr = sys.stderr  # the engine may speak, the harness may not

    class EngineModel(LM):  # type: ignore[misc]  # the harness has no types
        def __init__(self) -> None:
            super().__init__()
            self.finished: dict[str, FinishReason] = {}

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [grouped[request.task_name][request.doc_id] for request in requests]
            (stop,) = {tuple(request.args[1]["until"]) for request in requests}
            with redirect_stderr(stderr):
                answers = complete_items(engine, asked, fine_tuned=fine_tuned, max_new_tokens=max_new_tokens, stop=stop)
            self.finished = {item.id: answer.finish_reason for item, answer in zip(asked, answers, strict=True)}
            return [answer.text for answer in answers]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            asked = [grouped[request.task_name][request.doc_id] for request in requests]
            choices = [tuple(encode_response(engine.tokenizer, request.args[1])) for request in requests]
            prompts = encode_items(engine, asked, room=max(map(len, choices)))
            pairs = [ScoreRequest(tuple(prompt), choice) for prompt, choice in zip(prompts, choices, strict=True)]
            with redirect_stderr(stderr):
                scores = engine.score(pairs, fine_tuned=fine_tuned)
            # Whether greedy decoding would write the choice is not computed: accuracy compares likelihoods alone.
            return [(sum(logprobs), False) for logprobs in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            raise NotImplementedError("none of our tasks asks for the likelihood of whole texts")

    return EngineModel()
