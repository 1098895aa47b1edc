"""The prompt generator G behind an API: the paper's request (section 3.4) to a model such as its GPT-4o.

Examples and calls are drawn by id, as for a local generator, so a run that was stopped asks for exactly what is
missing. What the server samples cannot be repeated: the ledger's bodies are the record.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tuneshift.engines.base import Decoding
from tuneshift.engines.dispatch import HostedModel, Question
from tuneshift.prompts.generators import chat_request, chat_texts
from tuneshift.prompts.pool import PoolItem, plan_calls
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import GeneratorCall


@dataclass(frozen=True)
class HostedGenerator:
    """Asks a hosted chat model for new prompts like those of the pool; see `PromptGenerator` for the fields."""

    model: HostedModel
    instruction: str | None
    demos: int
    per_call: int
    decoding: Decoding
    run_seed: int
    back_generation: float = 0.0

    def check(self, texts: Sequence[str]) -> None:
        """Prove that the server answers and takes the key; what it can read shows when it is asked.

        Raises:
            GeneratorError: it does not.
        """
        self.model.check()

    def write(self, pool: Sequence[PoolItem], *, round_index: int, calls: int, ledger: Ledger) -> list[GeneratorCall]:
        """Make `calls` generator calls; those whose answer is in the ledger are not paid for again.

        Raises:
            GeneratorError: the server refuses or keeps failing, or the budget is reached.
        """
        started = time.monotonic()
        plans = plan_calls(
            pool,
            round_index=round_index,
            calls=calls,
            demos=self.demos,
            run_seed=self.run_seed,
            back_generation=self.back_generation,
        )
        questions = [
            Question(plan.call_id, chat_request(plan, asked=self.per_call, instruction=self.instruction))
            for plan in plans
        ]
        replies = self.model.answer(questions, decoding=self.decoding, ledger=ledger)
        seconds = (time.monotonic() - started) / calls
        return [
            GeneratorCall(
                id=question.id,
                round=round_index,
                demos=tuple(item.id for item in plan.demos),
                prompt=question.prompt,
                raw=(reply.text,),
                finished=(reply.finished,),
                generated_tokens=reply.completion_tokens,
                seconds=seconds,
                decoding=asdict(self.decoding),
                strategy=plan.strategy,
                cue=plan.cue,
            )
            for question, plan, reply in zip(questions, plans, replies, strict=True)
        ]

    def parse(self, call: GeneratorCall) -> list[str | None]:
        """Return the new texts of a call; `None` for each that was asked for and is missing or unusable."""
        return chat_texts(call, asked=self.per_call)
