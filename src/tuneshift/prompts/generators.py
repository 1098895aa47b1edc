"""The prompt generator G: how it is asked, and how its raw text becomes new prompts.

`few_shot` lets any model continue a list of examples; a call is one list with `per_call` continuations of one item
each, so the examples are read once. `chat` asks an instruct model with the paper's phrase (section 3.4) and reads the
list it writes. Only prompts are shown to the generator, never responses: what it needs is what prompts look like.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, Engine, derive_seed
from tuneshift.errors import ModelError
from tuneshift.prompts.parsing import drop_truncated, parse_list
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import GeneratorCall


@dataclass(frozen=True)
class PoolItem:
    """A seed or a kept candidate, as an example for the generator."""

    id: str
    text: str


@dataclass(frozen=True)
class PromptGenerator:
    """Asks an engine for new prompts like those of the pool.

    `demos` examples are drawn from the pool for each call, uniformly (paper, section 3.4), and `per_call` new
    prompts are asked for.
    """

    engine: Engine
    kind: Literal["few_shot", "chat"]
    instruction: str | None
    demos: int
    per_call: int
    decoding: Decoding
    run_seed: int
    fine_tuned: bool = False

    def check(self, texts: Sequence[str]) -> None:
        """Prove that the model can be asked at all, with the longest of `texts` as examples.

        Raises:
            ModelError: it has no chat template, or cannot read the examples.
        """
        longest = sorted(texts, key=len)[-self.demos :]
        _, ids = self._prompt(longest, separator(longest))
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
        plans = draw_demos(pool, round_index=round_index, calls=calls, demos=self.demos, run_seed=self.run_seed)
        between = separator([item.text for item in pool])
        prompts = [self._prompt([item.text for item in demos], between) for _, demos in plans]
        decoding = replace(self.decoding, stop=(between,)) if self.kind == "few_shot" else self.decoding
        copies = self.per_call if self.kind == "few_shot" else 1
        completions = self.engine.generate(
            [ids for _, ids in prompts for _ in range(copies)],
            seeds=[derive_seed(self.run_seed, "write", c, n) for c, _ in plans for n in range(copies)],
            decoding=decoding,
            fine_tuned=self.fine_tuned,
        )
        seconds = (time.monotonic() - started) / calls
        made = []
        for index, ((call_id, demos), (prompt, _)) in enumerate(zip(plans, prompts, strict=True)):
            own = completions[index * copies : (index + 1) * copies]
            made.append(
                GeneratorCall(
                    id=call_id,
                    round=round_index,
                    demos=tuple(item.id for item in demos),
                    prompt=prompt,
                    raw=tuple(completion.text for completion in own),
                    finished=tuple(completion.finish_reason != "length" for completion in own),
                    generated_tokens=sum(len(completion.token_ids) for completion in own),
                    seconds=seconds,
                    decoding=asdict(decoding),
                )
            )
        return made

    def parse(self, call: GeneratorCall) -> list[str | None]:
        """Return the new texts of a call; `None` for each that was asked for and is unusable."""
        if self.kind == "few_shot":
            # A continuation that hit the length limit may be half a sentence.
            return [raw.strip() if done else None for raw, done in zip(call.raw, call.finished, strict=True)]
        return chat_texts(call, asked=self.per_call)

    def _prompt(self, texts: Sequence[str], between: str) -> tuple[str, list[int]]:
        tokenizer = self.engine.tokenizer
        if self.kind == "few_shot":
            prompt = few_shot_prompt(texts, between=between, instruction=self.instruction)
            return prompt, encode_prompt(tokenizer, prompt)
        if not tokenizer.chat_template:
            raise ModelError(
                "generator.kind is chat, but this model's tokenizer has no chat template. Use an instruct model, or "
                "generator.kind: few_shot."
            )
        request = chat_request(texts, asked=self.per_call, instruction=self.instruction)
        messages = [{"role": "user", "content": request}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        # The template writes its own special tokens; the tokenizer must not add a second BOS.
        return prompt, list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def draw_demos(
    pool: Sequence[PoolItem], *, round_index: int, calls: int, demos: int, run_seed: int
) -> list[tuple[str, list[PoolItem]]]:
    """Return each call's id with the examples that it shows, drawn by that id alone."""
    ids = [f"r{round_index:04d}-c{index:03d}" for index in range(calls)]
    size = min(demos, len(pool))
    return [(i, random.Random(derive_seed(run_seed, "demos", i)).sample(pool, size)) for i in ids]


def chat_texts(call: GeneratorCall, *, asked: int) -> list[str | None]:
    """Return the items of a chat model's list, and `None` for each that is missing of the `asked` ones."""
    texts = drop_truncated(parse_list(call.raw[0], asked=asked), finished=call.finished[0])
    return [*texts, *[None] * (asked - len(texts))]


def few_shot_prompt(texts: Sequence[str], *, between: str, instruction: str | None) -> str:
    """Return a list of examples that stops where the next one begins.

    Examples of one line are bullets; examples of several lines are blocks, ended by `between`.
    """
    head = f"{instruction}\n\n" if instruction else ""
    if between == "\n":
        return head + "".join(f"- {text}\n" for text in texts) + "-"
    return head + "".join(f"{text}{between}" for text in texts)


def separator(texts: Sequence[str]) -> str:
    """Return what ends an example in the list: a line break, or a rule where an example has several lines."""
    return "\n---\n" if any("\n" in text for text in texts) else "\n"


def chat_request(texts: Sequence[str], *, asked: int, instruction: str | None) -> str:
    """Return the paper's request (section 3.4) with the examples as a numbered list."""
    head = f"{instruction}\n\n" if instruction else ""
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
    return f"{head}Generate {asked} more samples like these {len(texts)}:\n\n{listed}"
