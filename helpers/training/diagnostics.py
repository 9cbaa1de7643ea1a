"""What a run's log history says is wrong with it: named diagnostics, each with its numbers and what to try.

A threshold is a change of the run against its own beginning, on the same held-out rows or over a window of logs, so
that one noisy log says nothing. Where no paper is named it is our own: set on runs of the demo (at its defaults none
speaks; with a learning rate 100 times too high, labels flipped or a β of 0.001 those speak that should) and on curves
shaped as those that cards of 7B models publish, with answers of 300 tokens.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection
from statistics import median

from helpers.runs.curves import WINDOW, Diagnostic, History, first_and_last, is_dpo_history, series

Words = tuple[str, str, str]  # what was seen, why it matters, which settings to try


def diagnose(history: History, max_steps: float = 0, loss_types: Collection[str] = ()) -> list[Diagnostic]:
    """Every diagnostic of a history. `max_steps` is the length that the run is to have; 0 where the history is whole.

    IPO (of `loss_types`) asks for a margin of its own, of 1 / 2β nats a token: that is not running away.
    """
    end = max_steps or max((log["step"] for log in history), default=0)
    asked = [find for find in DIAGNOSTICS.values() if find is not runaway_margin or "ipo" not in loss_types]
    return [Diagnostic(find.__name__, *words) for find in asked if (words := find(history, end))]


def displacement(history: History, end: float) -> Words | None:
    """Chosen answers become less likely than they were: likelihood displacement.

    DPO's loss asks for a difference, and falls as well when both likelihoods sink (Pal et al., 2024, arXiv:2402.13228);
    what gains instead may even be of the opposite meaning (Razin et al., 2024, arXiv:2410.08847). Speaks when the
    log-probability of chosen answers (nats an answer) is a twentieth, and half a nat, below where it began, and their
    reward is negative: they are less likely than by the reference, on the same rows.
    """
    values, rewards = first_and_last(history, "logps/chosen", max), first_and_last(history, "rewards/chosen", max)
    if not values or not rewards or rewards[1] >= 0 or values[0] - values[1] < max(0.5, 0.05 * abs(values[0])):
        return None
    return (
        f"the log-probability of chosen answers fell from {values[0]:.3g} to {values[1]:.3g}, their reward to "
        f"{rewards[1]:.2g}",
        "The loss can fall while the answers that were chosen become less likely, and others take their place.",
        "--loss_type sigmoid sft, a lower --learning_rate, or a higher --dpo_beta",
    )


def runaway_margin(history: History, end: float) -> Words | None:
    """The policy runs away from its reference.

    Far from the reference policies get worse while the loss still falls (Rafailov et al., 2024, arXiv:2406.02900).
    Speaks when the reward margin is above 10 over a window, where a pair's weight in the gradient of the sigmoid loss
    is below 5e-5 and it teaches nothing more; or, whatever β makes of it, when the log-probabilities of chosen and
    rejected answers moved apart by 100 nats, by as many as an answer has, and by three times what they were apart.
    """
    _, margins = series(history, "rewards/margins")
    chosen, rejected = first_and_last(history, "logps/chosen", max), first_and_last(history, "logps/rejected", max)
    apart = [c - r for c, r in zip(chosen, rejected, strict=False)] or [0.0, 0.0]
    moved, last = apart[1] - apart[0], median(margins[-WINDOW:]) if len(margins) >= WINDOW else 0.0
    if last <= 10 and moved <= max(100, *map(abs, chosen[:1]), 3 * abs(apart[0])):
        return None
    return (
        f"the reward margin is {last:.3g}, and chosen and rejected are {moved:.3g} nats further apart than at first",
        "What still grows is the distance from the reference, and no longer what is told apart.",
        "a higher --dpo_beta, a lower --learning_rate, or fewer --num_train_epochs",
    )


def saturated(history: History, end: float) -> Words | None:
    """Pairs are told apart, without exception, before the run is half over.

    Speaks when the accuracy of training has a median of 0.99 or more, and is never below 0.98, for two windows and 200
    pairs or longer until now, and the first of these windows ended in the first half of the run. How many pairs a log
    has shows in the share that a single one takes off.
    """
    steps, values = series(history, "rewards/accuracies")
    since = len(values)
    while since and values[since - 1] >= 0.98:
        since -= 1
    high, one_pair = values[since:], min((1 - value for value in values if value < 1), default=0.0)
    long = len(high) >= max(2 * WINDOW, 200 * one_pair) and median(high) >= 0.99
    if not long or not steps[since + WINDOW - 1] <= end / 2 < math.inf:
        return None
    return (
        f"from step {steps[since]:.0f} of {end:.0f} on {sum(high) / len(high):.1%} of pairs are told apart",
        "What is left of the run teaches little; it may be length or an opening that gives the chosen answer away.",
        "a look at the data report, harder pairs (--pairing best_vs_random), or fewer --num_train_epochs",
    )


def overfitting(history: History, end: float) -> Words | None:
    """Held-out margins fall, or the held-out loss rises, while training goes on as it should: learned by heart.

    Speaks when the last two evaluations are a tenth or more below the best, and the last window of training is above
    the one before the best. The loss likewise, turned around: it also rises where margins grow on both sides, and more
    of the pairs that are told apart wrongly are so without a doubt.
    """
    for what, name, sign in (("margin", "rewards/margins", 1), ("loss", "loss", -1)):
        (at, held_out), (steps, training) = series(history, f"eval_{name}"), series(history, name)
        best = max(range(len(held_out)), key=lambda i: sign * held_out[i], default=0)
        before = [value for step, value in zip(steps, training, strict=True) if best < len(at) and step <= at[best]]
        if best > len(held_out) - 3 or not before or len(training) < 2 * WINDOW:
            continue
        then, now = median(before[-WINDOW:]), median(training[-WINDOW:])
        worse = min(sign * (held_out[best] - value) for value in held_out[-2:])
        if worse >= 0.1 * abs(held_out[best]) and sign * (now - then) > 0:
            return (
                f"the held-out {what} went from {held_out[best]:.3g} at step {at[best]:.0f} to {held_out[-1]:.3g}, "
                f"that of training from {then:.3g} to {now:.3g}",
                "Rows are learned by heart, and what is learned no longer holds beyond them.",
                "fewer --num_train_epochs, --early_stopping_patience 2, a lower --learning_rate, or more data",
            )
    return None


def diverged(history: History, end: float) -> Words | None:
    """The loss is above where it began, by a tenth or more in the last two evaluations: the model got worse."""
    loss = first_and_last(history, "loss", min)
    if not loss or loss[1] <= 1.1 * loss[0]:
        return None
    return (
        f"the loss went from {loss[0]:.3g} to {loss[1]:.3g}",
        "The run makes the model worse than it was.",
        "a lower --learning_rate, a larger --warmup_steps, or a look at the labels",
    )


def entropy(history: History, end: float) -> Words | None:
    """The entropy of the next token (nats) collapses or explodes.

    Speaks when it is below a quarter, or above two and a half times, what it was at first: answers become one answer,
    or noise. For SFT only the latter, as certainty about a form is what it is to learn.
    """
    low, high = first_and_last(history, "entropy", max), first_and_last(history, "entropy", min)
    collapsed = bool(low) and low[1] < low[0] / 4 and is_dpo_history(history)
    if not collapsed and not (high and high[1] > 2.5 * high[0]):
        return None
    return (
        f"the entropy went from {low[0]:.3g} to {(low if collapsed else high)[1]:.3g} nats a token",
        "Every prompt gets much the same answer." if collapsed else "The model no longer knows how answers go on.",
        "a lower --learning_rate" + (", or a higher --dpo_beta" if is_dpo_history(history) else ""),
    )


def grad_norm_spikes(history: History, end: float) -> Words | None:
    """The gradient's norm, before it is clipped, jumps.

    Speaks when two logs are more than 10 times, or one is more than 100 times, the median of all logs before. Batches
    differ by a factor of a few; a step of this size stays in Adam's second moments for long.
    """
    steps, norms = series(history, "grad_norm")
    before, times = norms[:1], [0.0] * len(norms[:1])
    for norm in norms[1:]:
        times.append(norm / (before[len(before) // 2] or math.inf))
        bisect.insort(before, norm)
    if sum(t > 10 for t in times) < 2 and max(times, default=0.0) <= 100:
        return None
    worst = max((i for i, t in enumerate(times) if t > 10), key=norms.__getitem__)
    return (
        f"the gradient norm was {norms[worst]:.3g} at step {steps[worst]:.0f}, {times[worst]:.0f} times the median "
        "until then",
        "Such a step undoes many, even when it is clipped.",
        "a lower --learning_rate, a lower --max_grad_norm, a larger --warmup_steps, or a larger batch",
    )


def lr_never_warm(history: History, end: float) -> Words | None:
    """The learning rate never gets warm: half of the run is over and every log had a higher one, or all had none."""
    steps, rates = series(history, "learning_rate")
    rising = len(rates) >= WINDOW and all(a < b for a, b in itertools.pairwise(rates))
    if len(rates) < WINDOW or (max(rates) > 0 and not (rising and steps[-1] >= end / 2)):
        return None
    return (
        f"at step {steps[-1]:.0f} of {end:.0f} the learning rate is {rates[-1]:.3g}{' and rising' if rising else ''}",
        "The run hardly trains at the rate that was set.",
        "a smaller --warmup_steps (below 1 it is a share of all steps), or a longer run",
    )


def length_drift(history: History, end: float) -> Words | None:
    """Sampled answers get longer, or much shorter, than before training.

    DPO takes length for quality where longer answers are the chosen ones (Park et al., 2024, arXiv:2403.19159). Speaks
    of DPO when the mean length (tokens) in the last two samplings is above 1.5 times the first, or below a third of it,
    or half of the answers more than at first are cut off (--completion_tokens). What SFT starts from knows no end yet.
    """
    steps, lengths = series(history, "samples/mean_length")
    cut = series(history, "samples/cut")[1] or [0.0]
    if len(lengths) < 3 or not is_dpo_history(history):
        return None
    more_cut = min(cut[-2:]) - cut[0]
    if lengths[0] / 3 <= max(lengths[-2:]) and min(lengths[-2:]) <= 1.5 * lengths[0] and more_cut < 0.5:
        return None
    return (
        f"sampled answers went from {lengths[0]:.3g} to {lengths[-1]:.3g} tokens by step {steps[-1]:.0f}"
        + (f", where {cut[-1]:.0%} are cut off" if cut[-1] else ""),
        "Length is learned in the place of quality, or answers break off.",
        "a higher --dpo_beta, --ld_alpha 0.5, or a look at the lengths in the data report",
    )


def no_learning(history: History, end: float) -> Words | None:
    """Half of the run is over and nothing is learned.

    Speaks for DPO when fewer than 55 % of pairs are told apart, where half is chance, or their reward margin is below
    0.01, at which the loss is log 2 still; for SFT when the loss is within 1 % of where it began. At step 0 policy and
    reference are one, margins are 0 and the accuracy with them: that is never looked at.
    """
    last = max((log["step"] for log in history if "loss" in log), default=0)
    accuracy, margins = (
        first_and_last(history, "rewards/accuracies", max),
        first_and_last(history, "rewards/margins", max),
    )
    loss, at = first_and_last(history, "loss", min), f"at step {last:.0f} of {end:.0f}"
    if last < end / 2 or not loss or diverged(history, end) or (is_dpo_history(history) and not (accuracy and margins)):
        return None
    if is_dpo_history(history):
        learned = accuracy[1] >= 0.55 and margins[1] >= 0.01
        seen = f"{at} the reward margin is only {margins[1]:.2g}, and {accuracy[1]:.0%} of pairs are told apart"
    else:
        learned, seen = loss[1] <= 0.99 * loss[0], f"{at} the loss is {loss[1]:.3g}, and was {loss[0]:.3g}"
    if learned:
        return None
    return (
        seen,
        "Either the steps are too small, or there is nothing in the data to be learned.",
        f"a higher --learning_rate, {'a higher --dpo_beta, ' * is_dpo_history(history)}more steps, or a look at the labels",
    )


DIAGNOSTICS = {
    find.__name__: find
    for find in (
        displacement, runaway_margin, saturated, overfitting, diverged, entropy, grad_norm_spikes, lr_never_warm,
        length_drift, no_learning,
    )
}  # fmt: skip
