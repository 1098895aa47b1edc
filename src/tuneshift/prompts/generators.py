"""The prompt generator G: how it is asked, and how its raw text becomes new prompts.

`few_shot` lets any model continue a list of examples; a call is one list with `per_call` continuations of one item
each, so the examples are read once. `chat` asks an instruct model with the paper's phrase (section 3.4) and reads the
list it writes. A forward call shows prompts only; a backward call shows what F's responses to them look like, too, and
asks for prompts to one of these responses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, Engine, derive_seed
from tuneshift.errors import ModelError
from tuneshift.prompts.parsing import parse_list
from tuneshift.prompts.pool import Plan, PoolItem, plan_calls, shorten
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import GeneratorCall

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptGenerator:
    """Asks an engine for new prompts like those of the pool.

    `demos` examples are drawn from the pool for each call by their weights, and `per_call` new prompts are asked for; a
    share `back_generation` of the calls is backward, see `plan_calls`. Kept prompts may be longer than the seeds: where
    the drawn ones do not fit into the model's context, the longest are left out.
    """

    engine: Engine
    kind: Literal["few_shot", "chat"]
    instruction: str | None
    demos: int
    per_call: int
    decoding: Decoding
    run_seed: int
    fine_tuned: bool = False
    back_generation: float = 0.0

    def check(self, texts: Sequence[str]) -> None:
        """Prove that the model can be asked at all, with the longest of `texts` as examples.

        Raises:
            ModelError: it has no chat template, or cannot read the examples.
        """
        longest = sorted(texts, key=len)[-self.demos :]
        _, ids = self._prompt(Plan("", tuple(PoolItem("", text) for text in longest)), separator(longest))
        objection = self.engine.reader.objection(ids, room=self.decoding.max_new_tokens)
        if objection is not None:
            raise ModelError(
                f"generator.model: asked with the longest {len(longest)} seeds, {objection}. Lower synthesis.demos or "
                "generator.max_new_tokens, or use another generator."
            )

    def write(
        self, pool: Sequence[PoolItem], *, round_index: int, calls: int, ledger: Ledger | None = None
    ) -> list[GeneratorCall]:
        """Make `calls` generator calls and return them with their raw text; a local model needs no `ledger` for it."""
        started = time.monotonic()
        between = separator([item.text for item in pool])
        asked = self._asked(pool, between, round_index=round_index, calls=calls)
        decoding = replace(self.decoding, stop=(between,)) if self.kind == "few_shot" else self.decoding
        copies = self.per_call if self.kind == "few_shot" else 1
        completions = self.engine.generate(
            [ids for _, _, ids in asked for _ in range(copies)],
            seeds=[derive_seed(self.run_seed, "write", plan.call_id, n) for plan, *_ in asked for n in range(copies)],
            decoding=decoding,
            fine_tuned=self.fine_tuned,
        )
        seconds = (time.monotonic() - started) / calls
        made = []
        for index, (plan, prompt, _) in enumerate(asked):
            own = completions[index * copies : (index + 1) * copies]
            made.append(
                GeneratorCall(
                    id=plan.call_id,
                    round=round_index,
                    demos=tuple(item.id for item in plan.demos),
                    prompt=prompt,
                    raw=tuple(completion.text for completion in own),
                    finished=tuple(completion.finish_reason != "length" for completion in own),
                    generated_tokens=sum(len(completion.token_ids) for completion in own),
                    seconds=seconds,
                    decoding=asdict(decoding),
                    strategy=plan.strategy,
                    cue=plan.cue,
                )
            )
        return made

    def parse(self, call: GeneratorCall) -> list[str | None]:
        """Return the new texts of a call; `None` for each that was asked for and is unusable."""
        if self.kind == "few_shot":
            # A continuation that hit the length limit may be half a sentence.
            return [raw.strip() if done else None for raw, done in zip(call.raw, call.finished, strict=True)]
        return chat_texts(call, asked=self.per_call)

    def _asked(
        self, pool: Sequence[PoolItem], between: str, *, round_index: int, calls: int
    ) -> list[tuple[Plan, str, list[int]]]:
        """Return what each call of a round shows, and its prompt with the ids."""
        drawn = plan_calls(
            pool,
            round_index=round_index,
            calls=calls,
            demos=self.demos,
            run_seed=self.run_seed,
            back_generation=self.back_generation,
        )
        asked = [self._fitting(plan, pool, between) for plan in drawn]
        wanted, shown = sum(len(plan.demos) for plan in drawn), sum(len(plan.demos) for plan, *_ in asked)
        if shown < wanted:
            logger.warning(
                "round %d: %d of %d examples are not shown to the generator: they do not fit into its context",
                *(round_index + 1, wanted - shown, wanted),
            )
        return asked

    def _fitting(self, plan: Plan, pool: Sequence[PoolItem], between: str) -> tuple[Plan, str, list[int]]:
        """Return the plan with as many of its examples as the model can read, and its prompt with the ids."""
        while True:
            prompt, ids = self._prompt(plan, between)
            fits = self.engine.reader.objection(ids, room=self.decoding.max_new_tokens) is None
            shorter = None if fits else shorten(plan, pool)
            if shorter is None:
                return plan, prompt, ids
            plan = shorter

    def _prompt(self, plan: Plan, between: str) -> tuple[str, list[int]]:
        tokenizer = self.engine.tokenizer
        if self.kind == "few_shot":
            prompt = few_shot_prompt(plan, between=between, instruction=self.instruction)
            return prompt, encode_prompt(tokenizer, prompt)
        if not tokenizer.chat_template:
            raise ModelError(
                "generator.kind is chat, but this model's tokenizer has no chat template. Use an instruct model, or "
                "generator.kind: few_shot."
            )
        request = chat_request(plan, asked=self.per_call, instruction=self.instruction)
        messages = [{"role": "user", "content": request}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        # The template writes its own special tokens; the tokenizer must not add a second BOS.
        return prompt, list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def chat_texts(call: GeneratorCall, *, asked: int) -> list[str | None]:
    """Return the items of a chat model's list, and `None` for each that is missing of the `asked` ones."""
    texts = parse_list(call.raw[0], asked=asked, finished=call.finished[0])
    if call.cue is not None:  # examples had answers behind arrows, and so may what imitates them
        parts = [text.rpartition(" => ") for text in texts]
        shown = [bool(head) and f" => {tail.strip()}\n" in f"{call.prompt} => {call.cue}\n" for head, _, tail in parts]
        texts = [part[0] if cut else text for text, part, cut in zip(texts, parts, shown, strict=True)]
    return [*texts, *[None] * (asked - len(texts))]


def few_shot_prompt(plan: Plan, *, between: str, instruction: str | None) -> str:
    """Return a list of examples that stops where the next one begins; in a backward call behind the wanted cue.

    Examples of one line are bullets; examples of several lines are blocks, ended by `between`.
    """
    head, bullets = f"{instruction}\n\n" if instruction else "", between == "\n"

    def start(cue: str | None) -> str:
        shown = "" if plan.cue is None else f" {cue}:" if bullets else f"{cue}\n"
        return f"-{shown}" if bullets else shown

    gap = " " if bullets else ""
    listed = [f"{start(demo.cue)}{gap}{demo.text}{between}" for demo in plan.demos]
    return head + "".join(listed) + start(plan.cue)


def separator(texts: Sequence[str]) -> str:
    """Return what ends an example in the list: a line break, or a rule where an example has several lines."""
    return "\n---\n" if any("\n" in text for text in texts) else "\n"


def chat_request(plan: Plan, *, asked: int, instruction: str | None) -> str:
    """Return the paper's request (section 3.4) with the examples as a numbered list; a backward call shows answers."""
    head, n = f"{instruction}\n\n" if instruction else "", len(plan.demos)
    if plan.cue is None:
        listed = "\n".join(f"{number}. {demo.text}" for number, demo in enumerate(plan.demos, start=1))
        return f"{head}Generate {asked} more samples like these {n}:\n\n{listed}"
    listed = "\n".join(f"{number}. {demo.text} => {demo.cue}" for number, demo in enumerate(plan.demos, start=1))
    return (
        f"{head}These are {n} samples, each with its answer behind an arrow:\n\n{listed}\n\nGenerate {asked} more "
        f"samples whose answer is {plan.cue}, without the answer."
    )
