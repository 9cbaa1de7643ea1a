"""What a run's log history says is wrong with it: named findings, each with its numbers and what to try.

Every threshold is a change of the run against its own beginning, seen on the same held-out rows or over a window of
logs, so that one noisy log says nothing. They were set on runs of the demo: at its defaults and around them none speaks; with a
learning rate 100 times too high, labels flipped, or a β of 0.001 the ones do that should.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable
from statistics import median

from helpers.history import History, series

WINDOW = 5  # logs of training that are looked at together
NAN = "nan"  # ends every run, asked for or not: see guard.py


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was seen (with numbers), why it matters, and which settings to try."""

    name: str
    seen: str
    why: str
    try_: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}. {self.why} Try {self.try_}."


def examine(history: History, max_steps: float = 0) -> list[Finding]:
    """Every finding of a history. `max_steps` is the length that the run is to have; 0 where the history is whole."""
    end = max_steps or max((log["step"] for log in history), default=0)
    return [found for find in FINDINGS.values() if (found := find(history, end))]


def displacement(history: History, end: float) -> Finding | None:
    """Chosen answers become less likely than they were: likelihood displacement.

    DPO's loss asks for a difference, and falls as well when both likelihoods sink (Pal et al., 2024, arXiv:2402.13228);
    what gains may be an answer of the opposite meaning (Razin et al., 2024, arXiv:2410.08847). Speaks when the held-out
    log-probability of chosen answers (nats an answer) is a tenth and half a nat below the first evaluation, and their
    reward is negative: below the reference, on the same rows. Without evaluations: medians of training logs.
    """
    values = _ends(history, "logps/chosen", max)
    rewards = _ends(history, "rewards/chosen", max)
    if not values or not rewards or rewards[1] >= 0 or values[0] - values[1] < max(0.5, 0.1 * abs(values[0])):
        return None
    return Finding(
        "displacement",
        f"log-probability of chosen answers fell from {values[0]:.3g} to {values[1]:.3g} (reward {rewards[1]:.2g})",
        "The loss can fall while the answers that were chosen become less likely; others take their place.",
        "--loss_type sigmoid sft, a lower --learning_rate, or a higher --dpo_beta",
    )


def margin(history: History, end: float) -> Finding | None:
    """The policy runs away from its reference.

    Either the reward margin is above 10 over a window: at σ(-10) = 5e-5 of its weight a pair teaches nothing more, and
    what still moves is how far apart the two are driven. Or, whatever β makes of it, the log-probabilities of chosen
    and rejected answers have moved apart by more than 100 nats and three times as far as they were: far from the
    reference DPO's policies get worse while the loss still falls (Rafailov et al., 2024, arXiv:2406.02900).
    """
    _, margins = series(history, "rewards/margins")
    chosen, rejected = _ends(history, "logps/chosen", max), _ends(history, "logps/rejected", max)
    apart = [c - r for c, r in zip(chosen, rejected, strict=True)] if chosen and rejected else [0.0, 0.0]
    moved = apart[1] - apart[0]
    last = median(margins[-WINDOW:]) if len(margins) >= WINDOW else 0.0
    if last <= 10 and moved <= max(100, 3 * abs(apart[0])):
        return None
    return Finding(
        "margin",
        f"the reward margin is {last:.3g}, and chosen and rejected are {moved:.3g} nats further apart than at first",
        "The pairs are told apart long since; what goes on is the distance from the reference.",
        "a higher --dpo_beta, a lower --learning_rate, or fewer --num_train_epochs",
    )


def saturated(history: History, end: float) -> Finding | None:
    """Pairs are told apart before the run is half over, without exception.

    Speaks when the accuracy of training has a median of 0.99 or more, and is never below 0.95, for two windows or
    longer, the first of which ended in the first half of the run. It is often one feature that gives the label away,
    such as length (Park et al., 2024, arXiv:2403.19159), which the data report looks for.
    """
    steps, values = series(history, "rewards/accuracies")
    since = len(values)
    while since and values[since - 1] >= 0.95:
        since -= 1
    high = values[since:]
    if len(high) < 2 * WINDOW or steps[since + WINDOW - 1] > end / 2:
        return None
    if median(high[:WINDOW]) < 0.99 or median(high) < 0.99:
        return None
    return Finding(
        "saturated",
        f"from step {steps[since]:.0f} of {end:.0f} on {sum(high) / len(high):.1%} of pairs are told apart",
        "What is left of the run teaches little; the pairs may be told apart by their length or opening.",
        "a look at the data report, harder pairs (--min_margin 0, --pairing random), or fewer steps",
    )


def overfitting(history: History, end: float) -> Finding | None:
    """Held-out margins fall while those of training rise: pairs are learned by heart.

    Speaks when the last two evaluations are a tenth or more below the best one (which for the Trainer's own curves
    is the sign to stop at), and the training margin of the last window is above that of the window around the best.
    For an SFT run, where there are no margins, the same of the held-out loss, which rises.
    """
    name, sign = ("rewards/margins", 1) if _is_dpo(history) else ("loss", -1)
    at, held_out = series(history, f"eval_{name}")
    steps, training = series(history, name)
    if len(held_out) < 3 or len(training) < 2 * WINDOW:
        return None
    best = max(range(len(held_out)), key=lambda i: sign * held_out[i])
    worse = min(sign * (held_out[best] - value) for value in held_out[-2:])
    before = [value for step, value in zip(steps, training, strict=True) if step <= at[best]][-WINDOW:]
    if best >= len(held_out) - 2 or not before or worse < 0.1 * abs(held_out[best]):
        return None
    if sign * (median(training[-WINDOW:]) - median(before)) <= 0:
        return None
    what = "margin" if sign > 0 else "loss"
    return Finding(
        "overfitting",
        f"the held-out {what} went from {held_out[best]:.3g} at step {at[best]:.0f} to {held_out[-1]:.3g}, in training "
        f"from {median(before):.3g} to {median(training[-WINDOW:]):.3g}",
        "Rows are learned by heart, and what is learned no longer holds beyond them.",
        "fewer --num_train_epochs, --early_stopping_patience 2, a lower --learning_rate, or more data",
    )


def entropy(history: History, end: float) -> Finding | None:
    """The policy's next-token entropy (nats) collapses or explodes.

    Speaks when it is below a quarter, or above two and a half times, what it was at the beginning, in two
    evaluations or a window of training logs. DPO lowers it somewhat and SFT to what the data has; further down answers
    become one answer, and far up they become noise.
    """
    low, high = _ends(history, "entropy", max), _ends(history, "entropy", min)
    if not low or not high or (low[1] >= low[0] / 4 and high[1] <= 2.5 * high[0]):
        return None
    collapsed = low[1] < low[0] / 4
    if collapsed and not _is_dpo(history):
        return None  # an SFT run learns a form, which is to be certain of it
    return Finding(
        "entropy",
        f"the entropy went from {low[0]:.3g} to {(low if collapsed else high)[1]:.3g} nats a token",
        "Every prompt gets much the same answer." if collapsed else "The model no longer knows how answers go on.",
        "a lower --learning_rate, a higher --dpo_beta, or fewer --num_train_epochs"
        if _is_dpo(history)
        else "a lower --learning_rate",
    )


def spikes(history: History, end: float) -> Finding | None:
    """The gradient's norm (before clipping) jumps.

    Speaks when two logs are more than 10 times, or one more than 100 times, the median of all logs before. Single
    batches differ by a factor of a few; a spike of this size stays in Adam's second moments for long.
    """
    steps, norms = series(history, "grad_norm")
    before, times = norms[:1], [0.0] * len(norms[:1])
    for norm in norms[1:]:
        times.append(norm / (before[len(before) // 2] or math.inf))
        bisect.insort(before, norm)
    if sum(t > 10 for t in times) < 2 and max(times, default=0.0) <= 100:
        return None
    worst = max(range(len(times)), key=times.__getitem__)
    return Finding(
        "spikes",
        f"the gradient norm was {norms[worst]:.3g} at step {steps[worst]:.0f}, {times[worst]:.0f} times the median "
        "until then",
        "Such a step undoes many, even when it is clipped.",
        "a lower --learning_rate, a lower --max_grad_norm, a larger --warmup_steps, or a larger batch",
    )


def cold(history: History, end: float) -> Finding | None:
    """The learning rate never gets warm: half of the run is over and it has risen in every log, or it is 0 in all."""
    steps, rates = series(history, "learning_rate")
    if len(rates) < WINDOW:
        return None
    rising = all(a < b for a, b in zip(rates, rates[1:], strict=False)) and steps[-1] >= end / 2
    if not rising and max(rates) > 0:
        return None
    return Finding(
        "cold",
        f"at step {steps[-1]:.0f} of {end:.0f} the learning rate is {rates[-1]:.3g}"
        + (" and still rising" if rising else ""),
        "The warmup is as long as the run, so it never trains at the rate that was set.",
        "a smaller --warmup_steps (below 1 it is a share of all steps), or a longer run",
    )


def length(history: History, end: float) -> Finding | None:
    """Sampled answers get longer, or much shorter, than they were before training.

    Speaks when the mean length (tokens) of the last two samplings is above 1.5 times the first, or below a third of it.
    DPO takes length for quality where longer answers are chosen more often (Park et al., 2024, arXiv:2403.19159).
    """
    steps, lengths = series(history, "samples/mean_length")
    if len(lengths) < 3:
        return None
    first, last = lengths[0], lengths[-2:]
    if not (min(last) > 1.5 * first or max(last) < first / 3):
        return None
    return Finding(
        "length",
        f"sampled answers went from {first:.3g} to {lengths[-1]:.3g} tokens by step {steps[-1]:.0f}",
        "Length is learned in the place of quality, or answers break off.",
        "a higher --dpo_beta, --loss_type sigmoid_norm, or a look at the lengths in the data report",
    )


def nothing(history: History, end: float) -> Finding | None:
    """Half of the run is over and nothing is learned.

    Speaks for DPO when fewer than 55 % of held-out pairs are told apart, where half is chance, or when their reward
    margin is below 0.01, at which the loss is still log 2 to two places; for SFT when the loss is within 1 % of where
    it began. At step 0 policy and reference are one, margins are 0 and the accuracy with them: that is never looked at.
    """
    last = max((log["step"] for log in history if "loss" in log), default=0)
    accuracy, margins = _ends(history, "rewards/accuracies", max), _ends(history, "rewards/margins", max)
    loss = _ends(history, "loss", min)
    if last < end / 2 or not loss:
        return None
    at = f"at step {last:.0f} of {end:.0f} "
    if not accuracy or not margins:
        learned = loss[1] <= 0.99 * loss[0] or _is_dpo(history)
        seen, more = f"{at}the loss is {loss[1]:.3g}, and was {loss[0]:.3g}", ""
    else:
        learned = accuracy[1] >= 0.55 and margins[1] >= 0.01
        seen = f"{at}{accuracy[1]:.0%} of pairs are told apart, where half is chance, by a reward of {margins[1]:.2g}"
        more = "a higher --dpo_beta where they are told apart by little, "
    if learned:
        return None
    return Finding(
        "nothing",
        seen,
        "Either the steps are too small, or there is nothing in the data to be learned.",
        f"a higher --learning_rate, {more}more steps, or a look at the labels (is chosen what is better?)",
    )


def _is_dpo(history: History) -> bool:
    return any("rewards/margins" in log for log in history)


def _ends(history: History, name: str, of: Callable[..., float]) -> list[float]:
    """Where a value began and where it is now: the first evaluation and `of` (min or max) the last two of the others,
    which are of the same rows; or, without, medians of the first and the last window of training. [] where there is too
    little of both."""
    _, held_out = series(history, f"eval_{name}")
    if len(held_out) > 1:
        return [held_out[0], of(held_out[1:][-2:])]
    _, training = series(history, name)
    if len(training) < 2 * WINDOW:
        return []
    return [median(training[:WINDOW]), median(training[-WINDOW:])]


FINDINGS = {
    find.__name__: find
    for find in (displacement, margin, saturated, overfitting, entropy, spikes, cold, length, nothing)
}
NAMES = (*FINDINGS, NAN)
