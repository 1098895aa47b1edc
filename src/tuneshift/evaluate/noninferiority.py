"""Non-inferiority: is a model worse than another by less than a margin that was fixed beforehand?

"No significant loss" is no such claim: few items show no loss of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuneshift.evaluate.stats import check_open_unit, paired_arrays

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHARES = 201  # of discordant pairs that are tried for the largest p value; ten times as many changed none by 0.0002
HALVINGS = 20  # of the range [-1, 1] that holds the bound: 2e-6 is far below one item


@dataclass(frozen=True)
class NonInferiority:
    """Whether the second model's accuracy lies less than `margin` below the first's.

    `p_value` is of "it lies `margin` or more below", and `shown` is `p_value <= 1 - level`; `lower_bound` is the
    difference's one-sided bound at `level`, so that `shown` means that it lies above -margin.
    """

    difference: float
    lower_bound: float
    margin: float
    level: float
    p_value: float
    shown: bool


def non_inferior(
    first: Sequence[bool], second: Sequence[bool], margin: float, *, level: float = 0.95
) -> NonInferiority:
    """Test that the second model is not worse than the first by `margin` or more, exactly.

    Of all outcomes (b, c) of n items, b of them right by the first model only and c by the second only, those count as
    extreme whose score is at least the observed one: z = (c - b - n D) / sqrt(n (2 q + D - D^2)), with D = -margin
    and q the maximum likelihood estimate of the first-only share given D. The p value is the probability of such an
    outcome when the difference is D, at the share of discordant pairs where it is largest: so the chance of a false
    claim is at most 1 - level whatever that share is. The bound holds every D that is not rejected; without any
    discordant pair it is about -3 / n, where the bootstrap's interval has no width.
    Source: Tango 1998 (the score), Hsueh, Liu and Chen 2001 (the unconditional exact test).
    """
    check_open_unit(margin=margin, level=level)
    a, b = paired_arrays(first=first, second=second)
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    difference = (only_second - only_first) / len(a)
    p_value = _largest_p(only_first, only_second, len(a), -margin)
    bound, beyond = -1.0, difference
    for _ in range(HALVINGS):
        middle = (bound + beyond) / 2
        if _largest_p(only_first, only_second, len(a), middle) <= 1 - level:
            bound = middle
        else:
            beyond = middle
    return NonInferiority(difference, bound, margin, level, p_value, shown=p_value <= 1 - level)


def _largest_p(only_first: int, only_second: int, n: int, difference: float) -> float:
    """Return the largest probability of an outcome as extreme, over the shares of discordant pairs."""
    import numpy as np
    from scipy.stats import binom

    observed = _score(np.array(only_first), np.array(only_second), n, difference)
    lost = np.arange(n + 1)
    # The score rises with the items gained, so for each number lost the extreme outcomes begin at one number gained.
    low, high = np.zeros(n + 1, dtype=int), n - lost + 1
    while (low < high).any():
        middle = (low + high) // 2
        extreme = _score(lost, middle, n, difference) >= observed - 1e-9
        low, high = np.where(extreme | (low == high), low, middle + 1), np.where(extreme, middle, high)
    smallest = abs(difference)
    shares = (smallest + (1 - smallest) * np.linspace(0, 1, SHARES) ** 2)[:, None]  # peaks lie near the smallest share
    first, second = (shares - difference) / 2, (shares + difference) / 2
    tails = binom.sf(low - 1, n - lost, np.minimum(second / np.maximum(1 - first, 1e-300), 1))
    return min(1.0, float((binom.pmf(lost, n, first) * tails).sum(axis=1).max()))


def _score(lost: NDArray[np.int_], gained: NDArray[np.int_], n: int, difference: float) -> NDArray[np.float64]:
    """Return Tango's score for an assumed difference; 0 where no pair is discordant and none is assumed."""
    import numpy as np

    linear = (2 * n - gained + lost) * difference - lost - gained
    constant = -lost * difference * (1 - difference)
    q = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    distance = gained - lost - n * difference
    return distance / np.sqrt(np.where(variance > 0, variance, np.inf))
