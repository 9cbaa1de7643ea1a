"""Every setting that is a number has a range, which is checked before anything is written."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from helpers.core import SettingsError
from helpers.settings.fields import check_range
from helpers.settings.load import load_settings, own_types
from helpers.settings.sources import NAMES, field_types
from tests.conftest import REPO, code_cells
from tests.notebooks.test_three_ways import _settings_class

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.py"))
CLASSES = {file.stem: _settings_class(code_cells(file)) for file in NOTEBOOKS}
RANGES = {name: interval for interval, names in NAMES["ranges"].items() for name in names.split()}
ODD = ["nan", "inf", "-inf", "-1", "-0.5", "0", "0.5", "1", "1.5", "7", "1e30", "-1e30", "99999999999999999999"]


def is_number(kind: Any) -> bool:
    return kind in (int, float) or any(map(is_number, get_args(kind)))


def numbers(notebook: str) -> dict[str, Any]:
    cls = CLASSES[notebook]
    kinds = field_types(cls.step) | own_types(cls)
    return {name: kind for name, kind in kinds.items() if is_number(kind)}


@pytest.mark.parametrize("notebook", CLASSES)
def test_every_number_has_a_range(notebook: str) -> None:
    assert numbers(notebook).keys() - RANGES.keys() == set()


def attempt(cls: Any, flag: str) -> tuple[Any, str]:
    """The settings that one flag gives, or None and why it is refused."""
    try:
        return load_settings(cls, {}, [flag]), ""
    except SettingsError as error:
        return None, str(error)


@pytest.mark.parametrize("notebook", CLASSES)
def test_odd_numbers_are_refused_in_one_line_or_are_in_range(notebook: str) -> None:
    cls = CLASSES[notebook]
    kept = tried = 0
    for name in numbers(notebook):
        low, high = (float(end) for end in RANGES[name][1:-1].split(","))
        for value in ODD:
            number = float(value)
            inside = low <= number <= high or (name == "max_steps" and number == -1)
            tried += 1
            settings, message = attempt(cls, f"--{name}={value}")
            if settings is None:
                assert name in message
                assert "\n" not in message
                continue
            kept += 1
            got = settings.values()[NAMES["aliases"].get(name, name)]
            assert inside, (name, value)
            assert all(map(math.isfinite, got if isinstance(got, list) else [got])), (name, value)
    print(f"{notebook}: {tried} values tried, {kept} in range")  # seen with pytest -rP
    assert kept > 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dpo_beta", -1.0, "--dpo_beta -1.0 is out of range. Use more than 0."),
        ("dpo_beta", math.nan, "--dpo_beta nan is out of range. Use more than 0."),
        ("label_smoothing", 0.5, "--label_smoothing 0.5 is out of range. Use less than 0.5."),
        ("num_train_epochs", 1e30, "--num_train_epochs 1e+30 is out of range. Use at most 10000."),
        ("seed", -1, "--seed -1 is out of range. Use at least 0."),
        ("loss_weights", [1.0, -1.0], "--loss_weights -1.0 is out of range. Use at least 0."),
        ("eval_steps", 1.5, "--eval_steps 1.5 is neither a share below 1 nor an integer."),
    ],
)
def test_the_message_names_the_setting_the_value_and_the_limit(name: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_range(name, value, RANGES[name])
    assert str(caught.value) == message


def test_none_and_no_limit_of_steps_are_in_range() -> None:
    check_range("max_length", None, RANGES["max_length"])
    check_range("max_steps", -1, RANGES["max_steps"])
