"""Each finding speaks on a history that has its fault, and is silent on one that has not.

histories/ has logs of real runs of the demo: at its defaults (demo, sft), and of 02_dpo.py with one thing changed:
--learning_rate 0.05 (100 times too high), half of the labels flipped, --loss_type sigmoid --dpo_beta 0.001
--max_steps 500, and --loss_type sigmoid --train_rows 64 --max_steps 400.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from helpers.health import FINDINGS, NAMES, Finding, examine
from helpers.history import History, read_history

HISTORIES = Path(__file__).parent / "histories"
STEPS = 100


def recorded(name: str) -> History:
    return read_history(HISTORIES / f"{name}.jsonl")


def names(history: History, max_steps: float = 0) -> set[str]:
    return {finding.name for finding in examine(history, max_steps)}


def first_seen(history: History) -> dict[str, float]:
    """The step at which each finding would have been said while the run went on."""
    seen: dict[str, float] = {}
    for i, log in enumerate(history):
        for name in names(history[: i + 1], history[-1]["step"]):
            seen.setdefault(name, log["step"])
    return seen


def trained(**values: list[float]) -> History:
    """A history of training logs of a run of 100 steps; `__` stands for the slash of a name."""
    count = len(next(iter(values.values())))
    columns = {name.replace("__", "/"): column for name, column in values.items()}
    logs = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    return [{"step": STEPS * (i + 1) // count, "loss": 1 / (i + 1), **log} for i, log in enumerate(logs)]


def held_out(name: str, values: list[float]) -> History:
    steps = range(0, STEPS + 1, STEPS // (len(values) - 1))
    return [{"step": step, "eval_loss": 1.0, f"eval_{name}": value} for step, value in zip(steps, values, strict=True)]


@pytest.mark.parametrize("run", ["demo", "sft"])
def test_the_demo_at_its_defaults_has_no_finding_at_any_of_its_steps(run: str) -> None:
    assert len(recorded(run)) > 30
    assert first_seen(recorded(run)) == {}


def test_a_learning_rate_100_times_too_high_is_seen_within_a_fifth_of_the_run() -> None:
    assert first_seen(recorded("rate_100_times")) == {"spikes": 12, "displacement": 20, "entropy": 20}
    said = {finding.name: str(finding) for finding in examine(recorded("rate_100_times"))}
    assert "fell from -2.16 to -27.6, their reward to -2.5" in said["displacement"]
    assert "the gradient norm was 261 at step 12" in said["spikes"]
    assert all("a lower --learning_rate" in text for text in said.values())


def test_flipped_labels_teach_nothing() -> None:
    assert first_seen(recorded("labels_flipped")) == {"nothing": 52}
    (finding,) = examine(recorded("labels_flipped"))
    assert "46% of pairs are told apart, where half is chance" in finding.seen
    assert "a look at the labels" in finding.try_


def test_a_beta_that_holds_nothing_back_lets_the_policy_run_away() -> None:
    found = {finding.name: finding for finding in examine(recorded("beta_0.001"))}
    assert {"displacement", "margin"} <= set(found)
    assert "a higher --dpo_beta" in found["margin"].try_
    assert "nats further apart" in found["margin"].seen  # its reward margin is small, for β is
    assert found["margin"].seen.startswith("the reward margin is 0.1")


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
    assert names(trained(logps__chosen=[-20.0, -21.0] * 5, rewards__chosen=[-0.1] * 10)) == set()  # by a twentieth


def test_a_reward_margin_above_ten_runs_away_and_one_of_nine_does_not() -> None:
    logps = {"logps__chosen": [-20.0] * 10, "logps__rejected": [-25.0] * 10, "rewards__accuracies": [0.9] * 10}
    assert names(trained(rewards__margins=[float(2 * i) for i in range(10)], **logps)) == {"margin"}
    assert names(trained(rewards__margins=[float(i) for i in range(10)], **logps)) == set()
    one_log = [1.0] * 9 + [50.0]
    assert names(trained(rewards__margins=one_log, **logps)) == set()


def test_pairs_told_apart_late_or_not_always_are_not_saturated() -> None:
    margins = [1.0] * 40
    for accuracies, expected in (
        ([0.5] * 5 + [1.0] * 35, {"saturated"}),
        ([0.5] * 25 + [1.0] * 15, set()),  # in the second half
        ([0.5] * 5 + [1.0, 1.0, 1.0, 0.9] * 8 + [1.0] * 3, set()),
    ):
        assert names(trained(rewards__accuracies=accuracies, rewards__margins=margins)) == expected


def test_held_out_margins_that_fall_while_training_s_rise_are_overfitting() -> None:
    rising = trained(rewards__margins=[i / 20 for i in range(20)], rewards__accuracies=[0.9] * 20)
    falls, noise = [0.0, 0.3, 0.5, 0.4, 0.35, 0.3], [0.0, 0.3, 0.5, 0.49, 0.48, 0.5]
    found = {finding.name: finding for finding in examine(rising + held_out("rewards/margins", falls))}
    assert set(found) == {"overfitting"}
    assert "from 0.5 at step 40 to 0.3, that of training from 0.2" in found["overfitting"].seen
    assert names(rising + held_out("rewards/margins", noise)) == set()
    both_fall = trained(rewards__margins=[1 - i / 20 for i in range(20)], rewards__accuracies=[0.9] * 20)
    assert names(both_fall + held_out("rewards/margins", falls)) == set()


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
    assert names(trained(grad_norm=[1.0] * 8 + [12.0] + [1.0] * 4 + [30.0] + [1.0] * 6)) == {"spikes"}
    assert names(trained(grad_norm=[1.0] * 8 + [12.0] + [1.0] * 11)) == set()
    assert names(trained(grad_norm=[1.0] * 8 + [120.0] + [1.0] * 11)) == {"spikes"}
    assert names(trained(grad_norm=[3.0, 1.0] * 10)) == set()


def test_a_warmup_as_long_as_the_run_leaves_it_cold() -> None:
    rising = [1e-6 * i for i in range(1, 21)]
    assert names(trained(learning_rate=rising)) == {"cold"}
    assert names(trained(learning_rate=rising)[:9], STEPS) == set()  # half of the run is not over
    assert names(trained(learning_rate=rising[:4] + rising[:16][::-1])) == set()
    assert names(trained(learning_rate=[0.0] * 20)) == {"cold"}


def test_sampled_answers_that_get_half_as_long_again_drift() -> None:
    def sampled(*lengths: float) -> History:
        return [{"step": 20 * i, "samples/mean_length": length} for i, length in enumerate(lengths)]

    assert names(sampled(100, 120, 160, 170)) == {"length"}
    assert names(sampled(100, 120, 170)) == set()  # once
    assert names(sampled(100, 60, 40, 40)) == set()  # briefer is often what was chosen
    assert names(sampled(100, 30, 20)) == {"length"}


def test_the_accuracy_of_0_at_step_0_alarms_nobody() -> None:
    start = {"step": 0, "eval_loss": 0.7, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0}
    logs = trained(rewards__accuracies=[0.9] * 10, rewards__margins=[0.3] * 10)
    assert names([start, *logs]) == set()
    assert names([start, *logs[:1]]) == set()
    assert names([]) == set()


def test_sft_learned_nothing_when_its_loss_stays_within_a_hundredth() -> None:
    assert names(trained(loss=[2.0, 2.01] * 5)) == {"nothing"}
    assert names(trained(loss=[2.0 - 0.02 * i for i in range(10)])) == set()


def test_a_finding_says_what_was_seen_why_it_matters_and_what_to_try() -> None:
    assert str(Finding("margin", "it is 12", "It runs away.", "a higher --dpo_beta")) == (
        "margin: it is 12. It runs away. Try a higher --dpo_beta."
    )
    assert (*FINDINGS, "nan") == NAMES
