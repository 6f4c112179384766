import pytest

from reports.intervals import Interval, difference_interval, wilson_interval


def test_wilson_interval_matches_the_textbook() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I: 81 of 263.
    told = wilson_interval(81, 263)
    assert (round(told.low, 4), round(told.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("n_correct", "n"), [(0, 10), (10, 10), (0, 1), (1, 1)])
def test_wilson_interval_stays_a_share(n_correct: int, n: int) -> None:
    told = wilson_interval(n_correct, n)
    assert 0 <= told.low <= told.estimate <= told.high <= 1
    assert told.low < told.high


def test_difference_interval_matches_newcombe() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 873), table II, contrast (a), method 10.
    told = difference_interval(wilson_interval(56, 70), wilson_interval(48, 80))
    assert told.estimate == pytest.approx(0.2)
    assert (round(told.low, 4), round(told.high, 4)) == (0.0524, 0.3339)


def test_difference_of_equal_shares_holds_zero() -> None:
    same = wilson_interval(45, 50)
    told = difference_interval(same, same)
    assert told == Interval(0.0, pytest.approx(-told.high), pytest.approx(told.high))
