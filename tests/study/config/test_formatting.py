import dataclasses
import math

import pytest

from study.config.formatting import (
    format_accuracy,
    format_duration,
    format_params,
    hide_password,
    json_text,
)


def test_passwords_are_not_passed_on() -> None:
    url = "--storage postgresql+psycopg://me:p@ss:w/rd@host:5432/db --name x"
    assert hide_password(url) == "--storage postgresql+psycopg://me:***@host:5432/db --name x"
    assert hide_password("sqlite:///studies.db a@b") == "sqlite:///studies.db a@b"


def test_missing_values_are_a_dash() -> None:
    assert format_accuracy(None) == format_accuracy(math.nan) == format_duration(None) == "-"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (61, "1 min 01 s"), (7322, "2 h 02 min")]
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_params_are_one_line() -> None:
    assert format_params({"base_lr": 0.00123456, "clip_norm": None}) == (
        "base_lr=0.00123, clip_norm=none"
    )


def test_json_has_no_numbers_that_json_lacks() -> None:
    @dataclasses.dataclass
    class Row:
        loss: float
        names: tuple[str, ...]

    assert json_text(Row(math.inf, ("a",))) == '{"loss": null, "names": ["a"]}'
