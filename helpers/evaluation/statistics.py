"""How sure win rates are: intervals, a test, and the win rate at equal lengths.

An outcome is 1, 0.5 or 0: a win, a tie or a loss. Several outcomes may belong to one question (its turns, or several
people's votes); questions, not outcomes, are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
REFITS = 1_000  # resamples of the length-controlled rate
RIDGE = 1e-3 * np.eye(2)  # without one, outcomes that length alone decides have no finite fit


def bootstrap_interval(
    groups: list[object], statistic: Callable[[Floats], Floats], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of `statistic`: percentiles of the bootstrap (Efron, 1979), expanded for small samples
    (Hesterberg, 2015, The American Statistician 69(4), section 5.3).

    `groups` are the questions of the outcomes. `statistic` takes weights of shape (resamples, different groups), how
    often each group was drawn, and returns one value per resample.
    """
    count = len(set(groups))
    draw = np.random.default_rng(seed)
    values = [
        statistic(draw.multinomial(count, np.full(count, 1 / count), size=min(500, resamples - start)).astype(float))
        for start in range(0, resamples, 500)
    ]
    tail = 100 * _expanded_tail(count)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail])
    return float(low), float(high)


def _expanded_tail(n: int) -> float:
    """Φ(-√(n/(n-1)) t): a percentile interval with these tails is as wide for a mean as Student's t makes it."""
    if n < 3:
        return 0.0
    z, df = 1.959964, n - 1  # t by its expansion in 1/df (Abramowitz and Stegun, 26.7.5)
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    return NormalDist().cdf(-t * math.sqrt(n / df))


def mean_interval(outcomes: Floats, groups: list[object], seed: int) -> tuple[float, float]:
    """`bootstrap_interval` of the mean; where every question has the same mean, a resample has no other, and it is
    `zero_event_upper_bound` on either side."""
    sums, counts = _sums_by_group(outcomes, groups)
    if _is_uniform(outcomes, groups):
        bound, value = zero_event_upper_bound(len(sums), 0.025), float(sums[0] / counts[0])
        return value * (1 - bound), value + (1 - value) * bound
    return bootstrap_interval(groups, lambda weights: (weights @ sums) / (weights @ counts), seed)


def zero_event_upper_bound(questions: int, tail: float = 0.05) -> float:
    """The largest share, at 95 %, of outcomes that none of so many questions had (Clopper and Pearson, 1934)."""
    return float(1 - tail ** (1 / questions)) if questions else 1.0


def sign_test(outcomes: Floats, groups: list[object]) -> float:
    """The two-sided exact p of the sign test. A question counts once, for the model that its outcomes favour."""
    sums, counts = _sums_by_group(outcomes, groups)
    wins, losses = int((2 * sums > counts).sum()), int((2 * sums < counts).sum())
    tail: int = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return float(min(1.0, 2 * tail / 2 ** (wins + losses)))


def length_controlled(outcomes: Floats, lengths: Floats, weights: Floats | None = None) -> Floats:
    """The win rate at equal lengths, for each row of `weights` (resamples, outcomes); one row of ones by default.

    A logistic model of the outcome with an intercept and tanh(length difference / its standard deviation), whose term
    is then set to zero: the length control of AlpacaEval 2 (Dubois et al., 2024, arXiv:2404.04475) without its term
    for the difficulty of a question, which is known for its own questions only. `lengths` are differences in
    characters, positive where the candidate's answer is longer.
    """
    spread = lengths.std()
    x = np.stack([np.ones_like(lengths), np.tanh(lengths / spread) if spread else np.zeros_like(lengths)], axis=1)
    weights = np.ones((1, len(outcomes))) if weights is None else weights
    fit = np.zeros((len(weights), 2))
    for _ in range(100):  # Newton's method; the likelihood with its ridge is concave
        p = 1 / (1 + np.exp(-fit @ x.T))
        gradient = ((outcomes - p) * weights) @ x - fit @ RIDGE
        curvature = np.einsum("rn,ni,nj->rij", weights * p * (1 - p), x, x) + RIDGE
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        largest = np.abs(step).max(axis=1, keepdims=True)
        fit += step / np.maximum(1, largest)
        if largest.max() < 1e-9:
            break
    return np.asarray(1 / (1 + np.exp(-fit[:, 0])))


def length_controlled_rate(
    outcomes: Floats, lengths: Floats, groups: list[object], seed: int
) -> tuple[float | None, tuple[float, float] | None]:
    """The win rate at equal lengths and its interval; None where lengths never differ, or the questions' means."""
    if not lengths.any() or _is_uniform(outcomes, groups):
        return None, None
    index = _group_index(groups)
    interval = bootstrap_interval(groups, lambda w: length_controlled(outcomes, lengths, w[:, index]), seed, REFITS)
    return float(length_controlled(outcomes, lengths)[0]), interval


def _is_uniform(outcomes: Floats, groups: list[object]) -> bool:
    """Whether the mean outcome of every question is the same."""
    sums, counts = _sums_by_group(outcomes, groups)
    return not len(sums) or bool(np.ptp(sums / counts) < 1e-9)


def _group_index(groups: list[object]) -> NDArray[np.int64]:
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([order[group] for group in groups], dtype=int)


def _sums_by_group(outcomes: Floats, groups: list[object]) -> tuple[Floats, Floats]:
    """The sum and the number of the outcomes of each group."""
    index = _group_index(groups)
    return np.bincount(index, outcomes).astype(float), np.bincount(index).astype(float)
