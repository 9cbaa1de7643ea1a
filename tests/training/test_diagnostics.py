"""Each diagnostic is reported for a history with its problem, and not for one without.

histories/ has logs of real runs of the demo: at its defaults (demo, sft), and of 02_dpo.py with one change:
--learning_rate 0.05 (100 times too high), half of the labels flipped, --loss_type sigmoid --dpo_beta 0.001
--max_steps 500, and --loss_type sigmoid --train_rows 64 --max_steps 400.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.runs.curves import Diagnostic, History, no_problem_text, read_history
from helpers.settings.fields import DIAGNOSTIC_NAMES
from helpers.training.diagnostics import ADVICE, DIAGNOSTICS, diagnose

HISTORIES = Path(__file__).parents[1] / "histories"
STEPS = 100


def recorded(name: str) -> History:
    return read_history(HISTORIES / f"{name}.jsonl")


def names(history: History, max_steps: float = 0) -> set[str]:
    return {diagnostic.name for diagnostic in diagnose(history, max_steps)}


def first_seen(history: History) -> dict[str, float]:
    """The step at which the run would first have reported each diagnostic."""
    seen: dict[str, float] = {}
    for i, log in enumerate(history):
        for name in names(history[: i + 1], history[-1]["step"]):
            seen.setdefault(name, log["step"])
    return seen


def trained(**values: list[float]) -> History:
    """Training logs of a run of 100 steps; `__` in a name becomes a slash."""
    count = len(next(iter(values.values())))
    columns = {name.replace("__", "/"): column for name, column in values.items()}
    logs = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    return [{"step": STEPS * (i + 1) // count, "loss": 1 / (i + 1), **log} for i, log in enumerate(logs)]


def held_out(name: str, values: list[float]) -> History:
    steps = range(0, STEPS + 1, STEPS // (len(values) - 1))
    return [{"step": step, "eval_loss": 1.0, f"eval_{name}": value} for step, value in zip(steps, values, strict=True)]


def of_300_tokens(chosen: float, rejected: float, beta: float) -> History:
    """A run with answers of 300 tokens, a nat each, which become more likely by `chosen` and `rejected` nats."""

    def log(step: float, of_all: float) -> dict[str, float]:
        told = {"loss": 0.69 - 0.2 * of_all, "rewards/accuracies": 0.75 * (step > 0)}
        told |= {"rewards/margins": beta * (chosen - rejected) * of_all, "rewards/chosen": beta * chosen * of_all}
        told |= {"logps/chosen": -300 + chosen * of_all, "logps/rejected": -290 + rejected * of_all}
        return {"step": step} | {f"eval_{name}": value for name, value in told.items()}

    losses = trained(loss=[0.69 - 0.02 * i for i in range(10)])
    return [log(0, 0), *losses, *(log(step, step / STEPS) for step in (20, 40, 60, 80, 100))]


@pytest.mark.parametrize("run", ["demo", "sft"])
def test_the_demo_at_its_defaults_has_no_diagnostic_at_any_of_its_steps(run: str) -> None:
    assert len(recorded(run)) > 30
    assert first_seen(recorded(run)) == {}


def test_a_learning_rate_100_times_too_high_is_seen_within_a_fifth_of_the_run() -> None:
    assert first_seen(recorded("rate_100_times")) == {
        "grad_norm_spikes": 12, "displacement": 20, "entropy": 20, "diverged": 20,
    }  # fmt: skip
    said = {diagnostic.name: str(diagnostic) for diagnostic in diagnose(recorded("rate_100_times"))}
    assert "fell from -2.16 to -27.6, their reward to -2.5" in said["displacement"]
    assert "the gradient norm was 261 at step 12" in said["grad_norm_spikes"]
    assert "the loss went from 0.929 to 3.66" in said["diverged"]
    assert all("a lower --learning_rate" in text for text in said.values())


def test_flipped_labels_teach_nothing() -> None:
    assert first_seen(recorded("labels_flipped")) == {"no_learning": 52}
    (diagnostic,) = diagnose(recorded("labels_flipped"))
    assert "46% of pairs are ranked correctly" in diagnostic.observation
    assert "checking the labels" in diagnostic.suggestion


def test_a_tiny_beta_lets_the_policy_run_away() -> None:
    found = {diagnostic.name: diagnostic for diagnostic in diagnose(recorded("beta_0.001"))}
    assert {"displacement", "runaway_margin"} <= set(found)
    assert "a higher --dpo_beta" in found["runaway_margin"].suggestion
    assert "chosen and rejected grew by" in found["runaway_margin"].observation  # its reward margin is as small as β
    assert found["runaway_margin"].observation.startswith("the reward margin is 0.1")


def test_few_pairs_are_told_apart_before_a_fifth_of_the_run_is_over() -> None:
    seen = first_seen(recorded("64_pairs"))
    assert seen["saturated"] <= 120
    assert "displacement" in seen
    assert "saturated" not in names(recorded("64_pairs"), math.inf)  # of a run without an end, no half is over


def test_displacement_needs_no_evaluation_and_a_reward_below_the_reference() -> None:
    falling = [-20.0 - i for i in range(10)]
    assert names(trained(logps__chosen=falling, rewards__chosen=[-0.1 * i for i in range(10)])) == {"displacement"}
    # other batches have other log-probabilities; against the reference, on the same rows, these gained
    assert names(trained(logps__chosen=falling, rewards__chosen=[0.1 * i for i in range(10)])) == set()
    assert names(trained(logps__chosen=[-20.0, -20.8] * 5, rewards__chosen=[-0.1] * 10)) == set()  # by a 25th
    assert names(of_300_tokens(chosen=-10, rejected=-30, beta=0.1)) == set()
    assert names(of_300_tokens(chosen=-20, rejected=-40, beta=0.1)) == {"displacement"}


def test_a_reward_margin_above_ten_runs_away_and_one_of_nine_does_not() -> None:
    logps = {"logps__chosen": [-20.0] * 10, "logps__rejected": [-25.0] * 10, "rewards__accuracies": [0.9] * 10}
    assert names(trained(rewards__margins=[float(2 * i) for i in range(10)], **logps)) == {"runaway_margin"}
    assert names(trained(rewards__margins=[float(i) for i in range(10)], **logps)) == set()
    one_log = [1.0] * 9 + [50.0]
    assert names(trained(rewards__margins=one_log, **logps)) == set()


def test_long_answers_are_further_apart_in_nats_than_short_ones() -> None:
    """As in a published QLoRA DPO of a 7B with β = 0.01: a margin of 1.09 (109 nats), and 75 % ranked correctly."""
    assert "runaway_margin" not in names(of_300_tokens(chosen=-100, rejected=-209, beta=0.01))
    assert "runaway_margin" in names(of_300_tokens(chosen=-100, rejected=-600, beta=0.01))


def test_ipo_asks_for_a_margin_of_its_own() -> None:
    logps = {"logps__chosen": [-20.0] * 10, "logps__rejected": [-25.0] * 10, "rewards__accuracies": [0.9] * 10}
    far = trained(rewards__margins=[15.0 * i for i in range(10)], **logps)
    assert [diagnostic.name for diagnostic in diagnose(far, 0, ["sigmoid"])] == ["runaway_margin"]
    assert diagnose(far, 0, ["ipo"]) == diagnose(far, 0, ["sigmoid_norm"]) == []


def test_pairs_told_apart_late_or_not_always_are_not_saturated() -> None:
    margins = [1.0] * 40
    for accuracies, expected in (
        ([0.5] * 4 + [0.975] + [1.0] * 35, {"saturated"}),  # a log has 40 pairs
        ([0.5] * 24 + [0.975] + [1.0] * 15, set()),  # in the second half
        ([0.5] * 5 + [1.0, 1.0, 1.0, 0.9] * 8 + [1.0] * 3, set()),
        ([0.5] * 5 + [0.75] + [1.0] * 34, set()),  # of 4 pairs a log, 34 are 136
    ):
        assert names(trained(rewards__accuracies=accuracies, rewards__margins=margins)) == expected


def test_held_out_margins_that_fall_while_training_s_rise_are_overfitting() -> None:
    rising = trained(rewards__margins=[i / 20 for i in range(20)], rewards__accuracies=[0.9] * 20)
    falls, noise = [0.0, 0.3, 0.5, 0.4, 0.35, 0.3], [0.0, 0.3, 0.5, 0.49, 0.48, 0.5]
    found = {diagnostic.name: diagnostic for diagnostic in diagnose(rising + held_out("rewards/margins", falls))}
    assert set(found) == {"overfitting"}
    assert "from 0.5 at step 40 to 0.3, the training margin from 0.2" in found["overfitting"].observation
    assert names(rising + held_out("rewards/margins", noise)) == set()
    both_fall = trained(rewards__margins=[1 - i / 20 for i in range(20)], rewards__accuracies=[0.9] * 20)
    assert names(both_fall + held_out("rewards/margins", falls)) == set()


def test_a_held_out_loss_that_rises_is_overfitting_though_margins_grow_on_both_sides() -> None:
    """As in published DPO runs of three epochs on a 7B."""
    grow = [i / 20 for i in range(20)]
    training = trained(rewards__margins=grow, rewards__accuracies=[0.9] * 20, loss=[0.69 - g / 2 for g in grow])
    losses, margins = [0.693, 0.49, 0.55, 0.65, 0.74, 0.75], [0.0, 1.0, 2.0, 3.0, 3.5, 3.8]
    evaluations = held_out("rewards/margins", margins)
    for log, loss in zip(evaluations, losses, strict=True):
        log["eval_loss"] = loss
    (diagnostic,) = diagnose(training + evaluations)
    assert diagnostic.name == "overfitting"
    assert (
        "the held-out loss went from 0.49 at step 20 to 0.75, the training loss from 0.652 to 0.265"
        in diagnostic.observation
    )


def test_a_loss_above_where_it_began_has_diverged_and_is_not_called_unlearned() -> None:
    def dpo(loss: float, accuracy: float, margin: float) -> History:
        begun = {"step": 0, "eval_loss": 0.693, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0}
        now = {"eval_loss": loss, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin}
        return [begun, *trained(rewards__margins=[margin] * 10), *({"step": step} | now for step in (50, 100))]

    assert names(dpo(0.85, 0.5, -0.3)) == names(dpo(1.8, 0.25, -1.5)) == {"diverged"}
    assert names(dpo(0.75, 0.5, -0.01)) == {"no_learning"}
    assert names(dpo(0.6, 0.7, 0.3)) == set()


def test_a_held_out_loss_that_rises_while_training_s_falls_is_overfitting_of_sft() -> None:
    logs = trained(loss=[2 - i / 20 for i in range(20)])
    losses = [2.0, 1.5, 1.4, 1.6, 1.7, 1.8]
    evaluations = [{"step": 20 * i, "eval_loss": loss} for i, loss in enumerate(losses)]
    assert names(logs + evaluations) == {"overfitting"}
    assert names(logs + evaluations[:3]) == set()


def test_entropy_collapses_for_dpo_alone_and_explodes_for_either() -> None:
    dpo = {"rewards__margins": [0.1] * 20, "rewards__accuracies": [0.8] * 20}
    assert names(trained(entropy=[2.0] * 10 + [0.3] * 10, **dpo)) == {"entropy"}
    assert names(trained(entropy=[2.0] * 10 + [0.6] * 10, **dpo)) == set()
    assert names(trained(entropy=[2.0] * 10 + [0.3] * 10)) == set()  # SFT is to be certain of the form
    assert names(trained(entropy=[1.0] * 10 + [2.6] * 10)) == {"entropy"}
    assert names(trained(entropy=[1.0] * 10 + [2.6, 1.0] * 5)) == set()


def test_two_jumps_of_the_gradient_are_spikes_and_one_is_a_batch() -> None:
    assert names(trained(grad_norm=[1.0] * 8 + [12.0] + [1.0] * 4 + [30.0] + [1.0] * 6)) == {"grad_norm_spikes"}
    assert names(trained(grad_norm=[1.0] * 8 + [12.0] + [1.0] * 11)) == set()
    assert names(trained(grad_norm=[1.0] * 8 + [120.0] + [1.0] * 11)) == {"grad_norm_spikes"}
    assert names(trained(grad_norm=[3.0, 1.0] * 10)) == set()


def test_a_warmup_as_long_as_the_run_leaves_it_cold() -> None:
    rising = [1e-6 * i for i in range(1, 21)]
    assert names(trained(learning_rate=rising)) == {"lr_never_warm"}
    assert names(trained(learning_rate=rising)[:9], STEPS) == set()  # half of the run is not over
    assert names(trained(learning_rate=rising[:4] + rising[:16][::-1])) == set()
    assert names(trained(learning_rate=[0.0] * 20)) == {"lr_never_warm"}


def test_sampled_answers_that_get_half_as_long_again_drift() -> None:
    def sampled(*lengths: float, cut: Sequence[float] = (), dpo: bool = True) -> History:
        logs = [{"step": 20.0 * i, "samples/mean_length": length} for i, length in enumerate(lengths)]
        return [{"step": 0.0, "rewards/margins": 0.1}] * dpo + [
            log | ({"samples/cut": cut[i]} if cut else {}) for i, log in enumerate(logs)
        ]

    assert names(sampled(100, 120, 160, 170)) == {"length_drift"}
    assert names(sampled(100, 120, 170)) == set()  # once
    assert names(sampled(100, 60, 40, 40)) == set()  # briefer is often what was chosen
    assert names(sampled(100, 30, 20)) == {"length_drift"}
    assert names(sampled(500, 30, 20, dpo=False)) == set()  # SFT learns to end an answer
    # most of them reach --completion_tokens, and what they would have become is not seen
    (diagnostic,) = diagnose(sampled(400, 480, 500, 512, cut=(0.25, 0.5, 0.75, 1.0)))
    assert diagnostic.observation == "sampled answers went from 400 to 512 tokens by step 60, where 100% are cut off"
    assert names(sampled(400, 480, 500, 512, cut=(0.5, 0.5, 0.75, 1.0))) == set()


def test_the_accuracy_of_0_at_step_0_is_no_diagnostic() -> None:
    start = {"step": 0, "eval_loss": 0.7, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0}
    logs = trained(rewards__accuracies=[0.9] * 10, rewards__margins=[0.3] * 10)
    assert names([start, *logs]) == set()
    assert names([start, *logs[:1]]) == set()
    assert names([]) == set()


def test_sft_learned_nothing_when_its_loss_stays_within_a_hundredth() -> None:
    assert names(trained(loss=[2.0, 2.01] * 5)) == {"no_learning"}
    assert names(trained(loss=[2.0 - 0.02 * i for i in range(10)])) == set()
    # the first evaluation comes after a fifth of the run, when most is learned
    late = [{"step": 20 * i, "eval_loss": loss} for i, loss in enumerate([0.972, 0.968, 0.966, 0.965, 0.965], 1)]
    assert names(sorted(trained(loss=[1.45, 1.2, 1.0] + [0.97] * 17) + late, key=lambda log: log["step"])) == set()


def test_a_diagnostic_prints_its_observation_reason_and_suggestion() -> None:
    assert str(Diagnostic("margin", "it is 12", "It runs away.", "a higher --dpo_beta")) == (
        "margin: it is 12. It runs away. Try a higher --dpo_beta."
    )
    assert (*DIAGNOSTICS, "nan") == (*ADVICE, "nan") == DIAGNOSTIC_NAMES


def test_a_run_of_few_steps_is_not_judged() -> None:
    flat = [{"step": step, "loss": 0.69, "rewards/accuracies": 0.5, "rewards/margins": 0.0} for step in range(1, 41)]
    assert names(flat) == {"no_learning"}
    assert names(flat[:19]) == set()
    assert no_problem_text(flat[:19]) == "Too few steps to judge: 19. Diagnostics need 20 or more."
    assert no_problem_text(flat[:20]) == "No training problems detected."
