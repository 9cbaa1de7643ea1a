"""A setting that would have no effect is refused; which losses read which setting comes from TRL's source."""

from __future__ import annotations

import re

import pytest

from helpers.core import SettingsError
from helpers.settings.load import load_settings
from helpers.settings.sources import compared_values, losses_that_read
from tests.conftest import REPO, code_cells
from tests.notebooks.test_three_ways import _settings_class

SFT, DPO = (_settings_class(code_cells(REPO / "notebooks" / name)) for name in ("01_sft.py", "02_dpo.py"))


def test_losses_read_label_smoothing_as_they_did_in_trl_1_16() -> None:
    assert losses_that_read("label_smoothing") == {"exo_pair", "robust", "aot", "aot_unpaired"}
    assert losses_that_read("discopop_tau") == {"discopop"}
    assert losses_that_read("beta") == compared_values("loss_type") - {"sft"}
    assert compared_values("self.f_divergence_type") == {
        "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--label_smoothing 0.1", "--label_smoothing has no effect with --loss_type sigmoid"),
        ("--label_smoothing 0.1 --loss_type ipo sft", "no effect with --loss_type ipo sft"),
        ("--discopop_tau 0.1", "or use discopop"),
        ("--loss_type exo_pair", "needs --label_smoothing above 0"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor has no effect"),
        ("--padding_free", "--padding_free has no effect"),
        ("--save_only_model", "so that no run can be resumed. Use --save_total_limit 1."),
        ("--ignore_data_skip True", "would train on the first rows again after a resume. Remove it."),
        ("--neftune_noise_alpha 5", "would also add noise to the reference"),
        ("--f_divergence_type bogus", "--f_divergence_type bogus is unknown"),
        ("--f_alpha_divergence_coef 0.5", "has no effect without --f_divergence_type alpha_divergence"),
        ("--loss_type sigmoid sft --loss_weights 1", "has 1 values for 2 losses"),
        ("--loss_type sigmoit", "--loss_type sigmoit is none of TRL's losses"),
        (
            "--use_weighting --loss_type sigmoid sft",
            "works with one loss in TRL 1.16, not with --loss_type",
        ),
        (
            "--group_by_length",
            "group_by_length needs rows with one length, and a pair has two",
        ),
        ("--train_sampling_strategy batch_rebalance", "needs rows with one length"),
        ("--dataloader_prefetch_factor 2", "needs --dataloader_num_workers above 0"),
    ],
)
def test_what_has_no_effect_on_dpo_is_refused(flags: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(DPO, {}, flags.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--label_smoothing 0.1 --loss_type robust", "--label_smoothing 0.1 --loss_type sigmoid aot",
        "--loss_type exo_pair --label_smoothing 0.001", "--tuning full --neftune_noise_alpha 5", "--label_smoothing 0",
        "--f_divergence_type alpha_divergence --f_alpha_divergence_coef 0.5",
    ],
)  # fmt: skip
def test_what_has_an_effect_is_taken(flags: str) -> None:
    assert load_settings(DPO, {}, flags.split()).trl


def test_answers_alone_are_learned_as_always() -> None:
    for name in ("completion_only_loss", "assistant_only_loss"):
        assert load_settings(SFT, {}, [f"--{name}", "True"]).trl == {}
        with pytest.raises(SettingsError, match="The loss counts answers only"):
            load_settings(SFT, {}, [f"--{name}", "False"])


@pytest.mark.parametrize(
    ("flags", "flag", "package"),
    [
        ("--optim galore_adamw", "--optim galore_adamw", "galore_torch"),
        ("--optim adamw_torch_4bit", "--optim adamw_torch_4bit", "torchao"),
        ("--optim schedule_free_adamw", "--optim schedule_free_adamw", "schedulefree"),
        ("--use_liger_kernel", "--use_liger_kernel", "liger_kernel"),
        ("--deepspeed zero2.json", "--deepspeed", "deepspeed"),
    ],
)
def test_a_setting_whose_package_is_missing_is_refused_before_data_is_read(
    flags: str, flag: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = f"{flag} needs the package {package}, which is not installed. Install it, or remove the setting."
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_settings(DPO, {}, flags.split())
