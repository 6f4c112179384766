import math

from study.config.formatting import (
    format_accuracy,
    format_duration,
    format_params,
    hide_password,
    json_text,
)


def test_passwords_are_not_passed_on() -> None:
    url = "--storage postgresql+psycopg://me:p@ss:w/rd@host:5432/db --name x"
    hidden = "--storage postgresql+psycopg://me:***@host:5432/db --name x"
    assert hide_password(url) == hide_password(hidden) == hidden
    assert hide_password("sqlite:///studies.db a@b") == "sqlite:///studies.db a@b"
    assert hide_password("pg://me@host/db?password=x&y=a z") == "pg://me@host/db?*** z"
    assert hide_password("pg://me:p%3Fw d@host/db") == "pg://me:***@host/db"
    assert hide_password("pg://host:1/db?key=a@b") == "pg://host:***@b"
    assert json_text({"a": ["pg://me:p@h/d?q=1", 2]}) == '{"a": ["pg://me:***@h/d?***", 2]}'


def test_figures_are_short_and_missing_ones_a_dash() -> None:
    assert format_accuracy(None) == format_accuracy(math.nan) == format_duration(None) == "-"
    text = format_params({"base_lr": 0.00123456, "clip_norm": None})
    assert text == "base_lr=0.00123, clip_norm=none"
