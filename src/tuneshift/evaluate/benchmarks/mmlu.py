"""MMLU: questions with four options in 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300).

Asked as the harness's `mmlu`: without examples, the option whose letter is the likeliest continuation is the answer.
Only the harness grades it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tuneshift.evaluate.benchmarks.base import Benchmark, Question

LETTERS = "ABCD"

SUBJECTS = (  # noqa: SIM905 - as a list it takes 57 lines
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics "
    "high_school_microeconomics high_school_physics high_school_psychology high_school_statistics "
    "high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence "
    "logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes "
    "moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine "
    "professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions"
).split()


class MmluQuestion(Question):
    """A question, four choices, the right one's number from 0, and the subject unless `evaluation.subtask` tells it."""

    question: str = Field(min_length=1)
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: int = Field(ge=0, le=3)
    subject: str | None = None


def ask(question: MmluQuestion, subtask: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return prompt, reference letter and the harness's fields.

    Raises:
        ValueError: the subject is missing or none of MMLU's.
    """
    subject = question.subject or subtask
    if subject not in SUBJECTS:
        raise ValueError(f"subject: expected one of MMLU's, such as {SUBJECTS[1]}, got {subject!r}.")
    about = subject.replace("_", " ")
    prompt = (
        f"The following are multiple choice questions (with answers) about {about}.\n\n"
        f"{_with_choices(question)}\nAnswer:"
    )
    return prompt, LETTERS[question.answer], question.model_dump() | {"subject": subject}


def _with_choices(question: MmluQuestion) -> str:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}\n{options}"


MMLU = Benchmark(
    hub=("cais/mmlu", "all"),
    subtasks=SUBJECTS,
    question=MmluQuestion,
    ask=ask,
    bare=_with_choices,
    stem=lambda question: question.question,
    metrics=("acc",),
    grade=None,
    stop=(),
    max_new_tokens=1,  # nothing is generated; room for a letter
    harness_task=lambda item: f"mmlu_{item.doc['subject']}",
    options=lambda item: len(LETTERS),
)
