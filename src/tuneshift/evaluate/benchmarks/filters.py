"""Finding the answer in a response, and comparing it, as lm-evaluation-harness 0.4.13 does.

Source: lm_eval/filters/extraction.py (`RegexFilter`) and lm_eval/api/metrics.py (`exact_match`), MIT licence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

INVALID = "[invalid]"
"""What the harness puts where a response holds no answer."""


def extract(pattern: str, text: str, *, index: int = 0) -> str:
    """Return the match of that index, its first group that took part if it has groups; `INVALID` without a match."""
    found = re.findall(pattern, text)
    if not found:
        return INVALID
    match = found[index]
    if isinstance(match, tuple):
        match = next((group for group in match if group), INVALID)
    return str(match.strip())


def exact_match(prediction: str, reference: str, *, ignored: Sequence[str]) -> bool:
    """Tell whether both are equal but for upper case and for what the `ignored` patterns match, removed in order."""
    for pattern in ignored:
        prediction, reference = re.sub(pattern, "", prediction), re.sub(pattern, "", reference)
    return prediction.lower() == reference.lower()
