import math

import pytest

from reports.words import (
    count,
    duration,
    markdown_table,
    markdown_text,
    percent,
    points,
    setting,
    shorten,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (7322, "2 h 02 min"), (None, "–")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_missing_figures_are_a_dash() -> None:
    assert percent(None) == percent(math.nan) == count(None) == setting(math.nan) == "–"


def test_settings_read_as_in_the_configuration() -> None:
    assert [setting(v) for v in (0.001234, 3, True, None, "cosine")] == [
        "0.00123", "3", "true", "none", "cosine",
    ]  # fmt: skip


def test_points_have_a_sign() -> None:
    assert (points(0.021), points(-0.021)) == ("+2.1", "−2.1")


@pytest.mark.parametrize("limit", [3, 4, 9, 10])
def test_shortened_names_keep_both_ends(limit: int) -> None:
    told = shorten("abcdefghijklmnop", limit)
    assert len(told) == limit
    assert told[0] == "a" and told[-1] == "p"


def test_markdown_text_is_literal() -> None:
    told = markdown_text("<script>alert(1)</script>|*x*\n# not a heading")
    assert "<" not in told and ">" not in told
    assert r"\|\*x\*" in told
    assert "\n" not in told


def test_markdown_text_stays_readable() -> None:
    told = "freeze_depth (5): 3.2 to 4 % - up to 1.5 times"
    assert markdown_text(told) == told
    assert markdown_text("_x_ and - y") == r"\_x\_ and - y"
    assert markdown_text("- x") == r"\- x"


def test_markdown_table_has_as_many_cells_in_every_row() -> None:
    lines = markdown_table(("a|b", "c"), [("1|2", "3"), ("x", "y|")]).splitlines()
    assert len(lines) == 4
    for line in (lines[0], lines[2], lines[3]):
        assert line.replace(r"\|", "").count("|") == 3
