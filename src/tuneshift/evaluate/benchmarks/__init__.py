"""Public benchmarks by name: where their questions are, how they are asked and graded, what guessing gets."""

from __future__ import annotations

from tuneshift.evaluate.benchmarks.base import Benchmark
from tuneshift.evaluate.benchmarks.bbh import BBH
from tuneshift.evaluate.benchmarks.gsm8k import GSM8K
from tuneshift.evaluate.benchmarks.mbpp import MBPP
from tuneshift.evaluate.benchmarks.mbpp_plus import MBPP_PLUS
from tuneshift.evaluate.benchmarks.mmlu import MMLU

BENCHMARKS: dict[str, Benchmark] = {"gsm8k": GSM8K, "bbh": BBH, "mmlu": MMLU, "mbpp": MBPP, "mbpp_plus": MBPP_PLUS}
"""The values of `evaluation.task`, beside `jsonl`."""
