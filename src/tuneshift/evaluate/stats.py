"""Statistics of paired evaluations: the same items, answered by two or three models, each right or wrong.

Outcomes are sequences of True (right) and False (wrong), one per item and in the same order for every
model. Two models agree on most items, so a paired test sees far smaller gains than two separate
intervals do (Miller 2024, arXiv 2411.00640). All shares and differences are fractions, not percent.

Missing is never zero: an unscored item has to be left out by the caller (anything but True and False is
refused), empty input raises, and a value that does not exist is None, with its reason beside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Name = TypeVar("Name", bound=Hashable)

# Guess. The resamples left out are those with the most extreme ratios, so the interval is a little narrow.
MAX_UNDEFINED_RESAMPLES = 0.05


@dataclass(frozen=True)
class Interval:
    """A confidence interval; `level` is its coverage, such as 0.95."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Proportion:
    """`correct` right answers among `n` items."""

    correct: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n = {self.n}: the accuracy of no items is undefined; at least one is needed")
        if not 0 <= self.correct <= self.n:
            raise ValueError(f"correct = {self.correct}: expected 0 to n = {self.n}")

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.correct / self.n

    def interval(self, level: float = 0.95) -> Interval:
        """Return the Wilson score interval of the accuracy.

        (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with z the normal quantile of
        (1 + level) / 2. Unlike p ± z SE it has a width at p = 0 and p = 1. Source: Wilson 1927.
        """
        check_open_unit(level=level)
        z = NormalDist().inv_cdf((1 + level) / 2)
        p, n = self.accuracy, self.n
        scale = 1 + z**2 / n
        centre = (p + z**2 / (2 * n)) / scale
        half = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
        # Exact at the ends, where rounding would leave 1e-18 or 0.9999999999999999.
        low = 0.0 if self.correct == 0 else centre - half
        high = 1.0 if self.correct == n else centre + half
        return Interval(low, high, level)


@dataclass(frozen=True)
class McNemar:
    """McNemar's test: the items that only one of the two models got right, and two-sided p values.

    `p_value` is exact and never too liberal; `mid_p` is sharper, and may pass the level by a little.
    """

    only_first: int
    only_second: int
    p_value: float
    mid_p: float


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Test whether two models that answered the same items are equally accurate.

    With b and c the items that only the first and only the second got right:
    p = min(1, 2 P[X <= min(b, c)]), X ~ Binomial(b + c, 1/2); p = 1 when b + c = 0. The mid-p value counts
    half of the observed outcome's probability: 2 P[X <= min(b, c)] - P[X = min(b, c)].
    Source: McNemar 1947, in its exact (binomial) form; Fagerland, Lydersen and Laake 2013 (mid-p).
    """
    from scipy.stats import binom

    a, b = paired_arrays(first=first, second=second)
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    fewer, both = min(only_first, only_second), only_first + only_second
    tail, point = float(binom.cdf(fewer, both, 0.5)), float(binom.pmf(fewer, both, 0.5))
    return McNemar(only_first, only_second, p_value=min(1.0, 2 * tail), mid_p=min(1.0, 2 * tail - point))


@dataclass(frozen=True)
class PairedDifference:
    """The second model's accuracy minus the first's, with its bootstrap interval."""

    difference: float
    interval: Interval
    resamples: int


def paired_difference(
    first: Sequence[bool],
    second: Sequence[bool],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Return mean(second) - mean(first), with the percentile bootstrap interval over items.

    An item's difference is -1, 0 or 1, so drawing n items with replacement is one multinomial draw of
    these values' counts. The interval's half width is about z sd(d) / sqrt(n). With no discordant pair its
    width is 0: a bootstrap cannot show differences that the data never showed.
    Source: Efron 1979 (percentile bootstrap); Miller 2024, arXiv 2411.00640 (paired standard error).
    """
    import numpy as np

    a, b = paired_arrays(first=first, second=second)
    values, counts = np.unique(b.astype(int) - a, return_counts=True)
    draws = resampled_counts(counts, resamples=resamples, seed=seed) @ values / len(a)
    return PairedDifference(float(counts @ values / len(a)), percentile_interval(draws, level), resamples)


@dataclass(frozen=True)
class Recovery:
    """The share of the source's lead that the target took over.

    `ratio` or `interval` is None when it does not exist; `reason` then says why, and is None otherwise.
    """

    ratio: float | None
    interval: Interval | None
    reason: str | None


def recovery(
    before: Sequence[bool],
    after: Sequence[bool],
    source: Sequence[bool],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Recovery:
    """Return (T_after - T_before) / (F - T_before), with the joint paired bootstrap interval over items.

    T_before, T_after and F are the accuracies of the target before and after the transfer and of the
    fine-tuned source. The ratio is None when F - T_before <= 0 (there is nothing to recover). Resamples
    with such a denominator are left out of the interval; it is None when they are more than
    `MAX_UNDEFINED_RESAMPLES`. The ratio may lie below 0 (harm) or above 1 (better than the source).
    An item has one of 2^3 outcome patterns, so a resample is one multinomial draw of eight counts.
    Source: Efron 1979 (percentile bootstrap), all three models on the same resampled items.
    """
    import numpy as np

    t0, t1, f = paired_arrays(before=before, after=after, source=source)
    counts = np.bincount(4 * t0 + 2 * t1 + f, minlength=8)
    pattern = np.arange(8)
    gain = (pattern >> 1 & 1) - (pattern >> 2 & 1)
    lead = (pattern & 1) - (pattern >> 2 & 1)
    if counts @ lead <= 0:
        right = f"of {len(f)} items, the source got {f.sum()} right and the target {t0.sum()} before"
        return Recovery(None, None, reason=f"nothing to recover: {right}")
    draws = resampled_counts(counts, resamples=resamples, seed=seed)
    return ratio_of_draws(float(counts @ gain / (counts @ lead)), draws @ gain, draws @ lead, n=len(f), level=level)


def ratio_of_draws(ratio: float, gains: NDArray[np.int_], leads: NDArray[np.int_], *, n: int, level: float) -> Recovery:
    """Return a recovery with its interval from each resample's gain and lead over `n` items; see `recovery`."""
    undefined = leads <= 0
    if undefined.mean() > MAX_UNDEFINED_RESAMPLES:
        share = f"in {undefined.mean():.1%} of the resamples there is no lead to recover"
        return Recovery(ratio, None, reason=f"no interval: {share}; {n} items are too few")
    return Recovery(ratio, percentile_interval(gains[~undefined] / leads[~undefined], level), reason=None)


def minimum_detectable_difference(n: int, discordant: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest paired gain that McNemar's test on `n` items finds with the given power.

    (z_{1 - alpha/2} + z_power) sqrt(discordant / n), the normal approximation with sd(d)^2 =
    discordant, the share of items that exactly one model gets right. A gain cannot exceed that share:
    a result above `discordant` means that `n` items can show no gain at all.
    Source: Miller 2024, arXiv 2411.00640 (power of a paired comparison). The exact test is a little
    weaker than this.
    """
    if n < 1:
        raise ValueError(f"n = {n}: at least one item is needed")
    if not 0 < discordant <= 1:
        raise ValueError(f"discordant = {discordant}: expected a share of the items, above 0 and at most 1")
    check_open_unit(power=power, alpha=alpha)
    z = NormalDist().inv_cdf
    return (z(1 - alpha / 2) + z(power)) * sqrt(discordant / n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for multiple comparisons, in the order given.

    With m values sorted p_(1) <= ... <= p_(m): adjusted p_(i) = max over j <= i of
    min(1, (m - j + 1) p_(j)). Rejecting where adjusted p <= alpha keeps the chance of any false
    rejection at alpha or below, however the tests depend on each other. Source: Holm 1979.
    """
    if len(p_values) == 0 or not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"expected one or more p values from 0 to 1, got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def holm_family(p_values: Mapping[Name, float | None]) -> dict[Name, float | None]:
    """Return the adjusted p value of each named comparison, in the order given; see `holm`.

    A comparison that was not made (`None`) stays `None` and makes the family no larger.
    """
    made = {name: p for name, p in p_values.items() if p is not None}
    adjusted = dict(zip(made, holm(list(made.values())), strict=True)) if made else {}
    return {name: adjusted.get(name) for name in p_values}


def paired_arrays(**outcomes: Sequence[bool]) -> list[NDArray[np.bool_]]:
    """Return the models' outcomes as arrays [items]; refuse what is not True or False, or not of the same items."""
    import numpy as np

    sizes = {name: len(values) for name, values in outcomes.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"expected outcomes of the same one or more items for every model, got {sizes}")
    arrays = [np.asarray(values) for values in outcomes.values()]
    # A cast would count None as wrong and NaN as right.
    if any(array.dtype != np.bool_ or array.ndim != 1 for array in arrays):
        raise ValueError(f"{', '.join(sizes)}: expected only True and False; leave unscored items out of all")
    return arrays


def resampled_counts(counts: NDArray[np.int_], *, resamples: int, seed: int) -> NDArray[np.int64]:
    """Return [resamples, kinds]: how often each kind is drawn where as many items as there are get drawn anew."""
    import numpy as np

    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: at least one is needed")
    n = counts.sum()
    return np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)


def percentile_interval(draws: NDArray[np.float64], level: float) -> Interval:
    """Return the interval between the quantiles (1 - level) / 2 and (1 + level) / 2 of bootstrap draws."""
    import numpy as np

    check_open_unit(level=level)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def check_open_unit(**values: float) -> None:
    """Refuse a level, margin or power that does not lie between 0 and 1."""
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} = {value}: expected a number between 0 and 1, both excluded")
