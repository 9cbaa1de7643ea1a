"""Training problems that a run's log history shows. diagnostics.yaml says what each means and which settings to try.

A threshold compares the run with its own beginning, on the same held-out rows or over a window of logs, so that one
noisy log reports nothing. Thresholds without a citation are our own, set on demo runs with and without a problem and on
curves like those in the cards of 7B models.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from helpers.runs.curves import MIN_STEPS, WINDOW, Diagnostic, History, first_and_last, is_dpo_history, series

ADVICE: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def diagnose(history: History, max_steps: float = 0, loss_types: Collection[str] = ()) -> list[Diagnostic]:
    """Return every diagnostic of a history. `max_steps` is the planned length; 0 means that the history is complete.
    A run of fewer than MIN_STEPS has none.

    `runaway_margin` does not apply to losses that divide by the length of an answer, whose β is larger: IPO, which asks
    for a margin of 1 / 2β nats a token, and sigmoid_norm.
    """
    end = max_steps or max((log["step"] for log in history), default=0)
    diagnostics = []
    for name, check in DIAGNOSTICS.items() if end >= MIN_STEPS else ():
        does_not_apply = name == "runaway_margin" and {"ipo", "sigmoid_norm"} & {*loss_types}
        if not does_not_apply and (observation := check(history, end)):
            options = [each for each in ADVICE[name]["try"] if "--dpo_beta" not in each or is_dpo_history(history)]
            suggestion = ", or ".join(filter(None, (", ".join(options[:-1]), options[-1])))
            diagnostics.append(Diagnostic(name, observation, ADVICE[name]["reason"], suggestion))
    return diagnostics


def displacement(history: History, end: float) -> str:
    """Likelihood displacement: chosen answers become less likely.

    DPO's loss also falls when both likelihoods fall (Pal et al., 2024, arXiv:2402.13228; Razin et al., 2024,
    arXiv:2410.08847). Reported when the log-probability of chosen answers (nats an answer) is a twentieth, and half a
    nat, below its beginning, and their reward is negative: they are less likely than under the reference.
    """
    logps, rewards = first_and_last(history, "logps/chosen", max), first_and_last(history, "rewards/chosen", max)
    if not logps or not rewards or rewards[1] >= 0 or logps[0] - logps[1] < max(0.5, 0.05 * abs(logps[0])):
        return ""
    fall = f"fell from {logps[0]:.3g} to {logps[1]:.3g}, their reward to {rewards[1]:.2g}"
    return f"the log-probability of chosen answers {fall}"


def runaway_margin(history: History, end: float) -> str:
    """The policy moves far from its reference, and gets worse while the loss still falls.

    See Rafailov et al., 2024, arXiv:2406.02900. Reported when the reward margin is above 10 over a window (a pair's
    weight in the gradient of the sigmoid loss is then below 5e-5), or when the log-probabilities of chosen and rejected
    answers moved apart by 100 nats, by more than an answer has at first, and by three times their first distance.
    """
    _, margins = series(history, "rewards/margins")
    chosen, rejected = first_and_last(history, "logps/chosen", max), first_and_last(history, "logps/rejected", max)
    distances = [c - r for c, r in zip(chosen, rejected, strict=False)] or [0.0, 0.0]
    moved, margin = distances[1] - distances[0], median(margins[-WINDOW:]) if len(margins) >= WINDOW else 0.0
    if margin <= 10 and moved <= max(100, *map(abs, chosen[:1]), 3 * abs(distances[0])):
        return ""
    return f"the reward margin is {margin:.3g}, and the distance between chosen and rejected grew by {moved:.3g} nats"


def saturated(history: History, end: float) -> str:
    """All pairs are ranked correctly before half of the run is over.

    Reported when the training accuracy has a median of at least 0.99 and stays above 0.98 for the last two windows and
    200 pairs or longer, starting in the first half of the run. Its smallest drop below 1 is one pair of a log.
    """
    steps, values = series(history, "rewards/accuracies")
    since = len(values)
    while since and values[since - 1] >= 0.98:
        since -= 1
    high, one_pair = values[since:], min((1 - value for value in values if value < 1), default=0.0)
    is_long = len(high) >= max(2 * WINDOW, 200 * one_pair) and median(high) >= 0.99
    if not is_long or not steps[since + WINDOW - 1] <= end / 2 < math.inf:
        return ""
    return f"since step {steps[since]:.0f} of {end:.0f}, {sum(high) / len(high):.1%} of pairs are ranked correctly"


def overfitting(history: History, end: float) -> str:
    """Held-out margins fall, or the held-out loss rises, while the same value improves in training.

    Reported when the last two evaluations are at least a tenth worse than the best one, and the last window of training
    is better than the one before the best evaluation.
    """
    for label, name, sign in (("margin", "rewards/margins", 1), ("loss", "loss", -1)):
        (at, held_out), (steps, training) = series(history, f"eval_{name}"), series(history, name)
        best = max(range(len(held_out)), key=lambda i: sign * held_out[i], default=0)
        before = [value for step, value in zip(steps, training, strict=True) if best < len(at) and step <= at[best]]
        if best > len(held_out) - 3 or not before or len(training) < 2 * WINDOW:
            continue
        then, now = median(before[-WINDOW:]), median(training[-WINDOW:])
        worse = min(sign * (held_out[best] - value) for value in held_out[-2:])
        if worse >= 0.1 * abs(held_out[best]) and sign * (now - then) > 0:
            return (
                f"the held-out {label} went from {held_out[best]:.3g} at step {at[best]:.0f} to {held_out[-1]:.3g}, "
                f"the training {label} from {then:.3g} to {now:.3g}"
            )
    return ""


def diverged(history: History, end: float) -> str:
    """The loss is at least a tenth above its beginning in the last two evaluations."""
    loss = first_and_last(history, "loss", min)
    return f"the loss went from {loss[0]:.3g} to {loss[1]:.3g}" if loss and loss[1] > 1.1 * loss[0] else ""


def entropy(history: History, end: float) -> str:
    """The entropy of the next token (nats) is above 2.5 times its beginning, or for DPO below a quarter of it."""
    low, high = first_and_last(history, "entropy", max), first_and_last(history, "entropy", min)
    is_low = bool(low) and low[1] < low[0] / 4 and is_dpo_history(history)
    if not is_low and not (high and high[1] > 2.5 * high[0]):
        return ""
    return f"the entropy went from {low[0]:.3g} to {(low if is_low else high)[1]:.3g} nats a token"


def grad_norm_spikes(history: History, end: float) -> str:
    """The gradient norm, before clipping, is above 10 times the median of all logs before it twice, or 100 times once.

    Batches differ by a small factor. A step of this size stays in Adam's second moments for long.
    """
    steps, norms = series(history, "grad_norm")
    before, ratios = norms[:1], [0.0] * len(norms[:1])
    for norm in norms[1:]:
        ratios.append(norm / (before[len(before) // 2] or math.inf))
        bisect.insort(before, norm)
    if sum(ratio > 10 for ratio in ratios) < 2 and max(ratios, default=0.0) <= 100:
        return ""
    worst = max((i for i, ratio in enumerate(ratios) if ratio > 10), key=norms.__getitem__)
    compared = f"{ratios[worst]:.0f} times the median of the steps before"
    return f"the gradient norm was {norms[worst]:.3g} at step {steps[worst]:.0f}, {compared}"


def lr_never_warm(history: History, end: float) -> str:
    """The learning rate still rises after half of the run, or is always 0."""
    steps, rates = series(history, "learning_rate")
    is_rising = len(rates) >= WINDOW and all(a < b for a, b in itertools.pairwise(rates))
    if len(rates) < WINDOW or (max(rates) > 0 and not (is_rising and steps[-1] >= end / 2)):
        return ""
    trend = " and still rising" if is_rising else ""
    return f"at step {steps[-1]:.0f} of {end:.0f} the learning rate is {rates[-1]:.3g}{trend}"


def length_drift(history: History, end: float) -> str:
    """Sampled answers get longer, or much shorter, than before training.

    DPO confuses length with quality where longer answers were chosen (Park et al., 2024, arXiv:2403.19159). Reported
    for DPO when the mean length (tokens) of the last two samples is above 1.5 times the first or below a third of it,
    or when half of the answers more than at first are cut off.
    """
    steps, lengths = series(history, "samples/mean_length")
    cut = series(history, "samples/cut")[1] or [0.0]
    if len(lengths) < 3 or not is_dpo_history(history):
        return ""
    more_cut = min(cut[-2:]) - cut[0]
    if lengths[0] / 3 <= max(lengths[-2:]) and min(lengths[-2:]) <= 1.5 * lengths[0] and more_cut < 0.5:
        return ""
    share = f", where {cut[-1]:.0%} are cut off" if cut[-1] else ""
    return f"sampled answers went from {lengths[0]:.3g} to {lengths[-1]:.3g} tokens by step {steps[-1]:.0f}{share}"


def no_learning(history: History, end: float) -> str:
    """Half of the run is over and nothing is learned.

    Reported for DPO when fewer than 55 % of pairs are ranked correctly (half is chance) or the reward margin is below
    0.01, where the loss is still log 2; for SFT when the loss is within 1 % of its beginning.
    """
    last = max((log["step"] for log in history if "loss" in log), default=0)
    loss, at = first_and_last(history, "loss", min), f"at step {last:.0f} of {end:.0f}"
    if last < end / 2 or not loss or diverged(history, end):
        return ""
    if not is_dpo_history(history):
        change = f"{at} the loss is {loss[1]:.3g}, compared with {loss[0]:.3g} at the start"
        return change if loss[1] > 0.99 * loss[0] else ""
    accuracy, margins = (first_and_last(history, f"rewards/{name}", max) for name in ("accuracies", "margins"))
    if not accuracy or not margins or (accuracy[1] >= 0.55 and margins[1] >= 0.01):
        return ""
    return f"{at} the reward margin is {margins[1]:.2g}, and {accuracy[1]:.0%} of pairs are ranked correctly"


DIAGNOSTICS = {
    check.__name__: check
    for check in (
        displacement, runaway_margin, saturated, overfitting, diverged, entropy, grad_norm_spikes, lr_never_warm,
        length_drift, no_learning,
    )
}  # fmt: skip
