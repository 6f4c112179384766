import io
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import PermutationMethod, friedmanchisquare, rankdata, wilcoxon

from reports.rank_plots import diagram_size, plot_critical_difference
from reports.ranks import ArmRank, RankComparison, RankMethod, compare_ranks, signed_rank_p
from reports.style import style

# Demšar 2006, table 6: AUC on 14 data sets. The last row but one is printed as 0.975 twice, but
# the paper ranks C4.5+cf above C4.5+m+cf there, from decimals that it does not print.
DEMSAR = pd.DataFrame(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ],
    columns=["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"],
)
METHODS: list[RankMethod] = ["nemenyi", "wilcoxon-holm"]


def table(n_datasets: int, n_arms: int, spread: float = 0.0, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    values = 0.3 * rng.random((n_datasets, n_arms)) + np.linspace(0.0, spread, n_arms)
    names = [f"weights = imagenet:IMAGENET1K_V{i}" for i in range(n_arms)]
    return pd.DataFrame(values, columns=names)


def test_ranks_and_tests_are_those_of_demsar() -> None:
    told = compare_ranks(DEMSAR)
    ranks = {arm.name: round(arm.mean_rank, 3) for arm in told.arms}
    assert ranks == {"C4.5+m+cf": 1.964, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5": 3.143}
    assert told.critical_difference == pytest.approx(1.25, abs=0.005)
    # The paper does not correct for ties.
    n, k = DEMSAR.shape
    ties = [np.unique(row, return_counts=True)[1] for row in DEMSAR.to_numpy()]
    factor = 1 - sum((t**3 - t).sum() for t in ties) / (n * k * (k**2 - 1))
    assert told.friedman is not None
    chi_square = told.friedman.statistic * factor
    assert chi_square == pytest.approx(9.28, abs=0.005)
    assert (n - 1) * chi_square / (n * (k - 1) - chi_square) == pytest.approx(3.69, abs=0.005)


def test_at_ten_per_cent_nemenyi_tells_apart_what_demsar_says() -> None:
    # Section 3.2.2: C4.5 differs from C4.5+m and from C4.5+m+cf; CD is 1.12.
    told = compare_ranks(DEMSAR, alpha=0.1)
    assert told.critical_difference == pytest.approx(1.12, abs=0.005)
    distinct = {(pair.first, pair.second) for pair in told.pairs if pair.is_distinct}
    assert distinct == {("C4.5+m+cf", "C4.5"), ("C4.5+m", "C4.5")}
    assert told.cliques == (("C4.5+m+cf", "C4.5+m", "C4.5+cf"), ("C4.5+cf", "C4.5"))


@pytest.mark.parametrize("n_arms", [3, 4, 9])
def test_the_tests_over_all_arms_agree_with_scipy_and_with_their_definition(n_arms: int) -> None:
    scores = table(8, n_arms, 0.2).round(1)  # with ties
    told = compare_ranks(scores)
    expected = friedmanchisquare(*scores.to_numpy().T)
    assert told.friedman is not None and told.iman_davenport is not None
    assert told.friedman.statistic == pytest.approx(expected.statistic, abs=1e-9)
    assert told.friedman.p_value == pytest.approx(expected.pvalue, abs=1e-9)
    # Iman and Davenport 1980: the F of a two-way analysis of variance of the ranks.
    ranks = rankdata(-scores.to_numpy(), axis=1)
    between = len(ranks) * ((ranks.mean(axis=0) - ranks.mean()) ** 2).sum() / (n_arms - 1)
    rest = ranks - ranks.mean(axis=0) - ranks.mean(axis=1, keepdims=True) + ranks.mean()
    within = (rest**2).sum() / ((n_arms - 1) * (len(ranks) - 1))
    assert told.iman_davenport.statistic == pytest.approx(between / within, abs=1e-9)


@pytest.mark.parametrize("decimals", [12, 1])
def test_signed_rank_p_agrees_with_scipy(decimals: int) -> None:
    differences = (np.random.default_rng(1).random(9) - 0.3).round(decimals)
    method = PermutationMethod(n_resamples=2**10)  # all signs
    expected = wilcoxon(differences, method=method).pvalue
    assert signed_rank_p(differences) == pytest.approx(expected, abs=1e-9)
    if decimals == 12:
        exact = wilcoxon(differences, method="exact").pvalue
        assert signed_rank_p(differences) == pytest.approx(exact, abs=1e-9)


def test_signed_rank_p_takes_rounding_errors_for_ties() -> None:
    assert signed_rank_p(np.array([0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.8])) == 1.0
    assert signed_rank_p(np.zeros(4)) == 1.0


def test_holm_corrects_by_hand() -> None:
    # Seven data sets, c always worst: p = 2 / 2**7 for its two pairs; a and b are tied.
    scores = pd.DataFrame({"a": [0.9] * 7, "b": [0.9] * 7, "c": [0.1] * 7})
    told = compare_ranks(scores, method="wilcoxon-holm")
    assert [pair.p_value for pair in told.pairs] == [1.0, 3 / 64, 3 / 64]
    assert told.cliques == (("a", "b"),)
    assert told.critical_difference is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_cliques_are_maximal_and_hold_each_pair_not_told_apart(
    method: RankMethod, seed: int
) -> None:
    told = compare_ranks(table(15, 9, 0.3, seed), method=method)
    equal = {frozenset((p.first, p.second)) for p in told.pairs if not p.is_distinct}
    held = {frozenset(two) for clique in told.cliques for two in combinations(clique, 2)}
    assert held == equal
    names = [arm.name for arm in told.arms]
    for clique in told.cliques:
        others = set(names) - set(clique)
        assert not any(all(frozenset((o, c)) in equal for c in clique) for o in others)
        start = names.index(clique[0])
        is_run = list(clique) == names[start : start + len(clique)]
        assert is_run or method == "wilcoxon-holm"


def test_nemenyi_p_and_critical_difference_say_the_same() -> None:
    told = compare_ranks(table(15, 9, 0.3))
    assert told.critical_difference is not None
    for pair in told.pairs:
        assert pair.is_distinct == (pair.rank_difference >= told.critical_difference)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n_arms", "n_datasets"), [(3, 10), (4, 8), (6, 14)])
def test_false_positives_under_the_null_hold(
    n_arms: int, n_datasets: int, method: RankMethod
) -> None:
    n_tables = 400
    hits = 0
    for seed in range(n_tables):
        told = compare_ranks(table(n_datasets, n_arms, seed=seed).round(2), method=method)
        hits += any(pair.is_distinct for pair in told.pairs)
    # Three standard errors above 5 %.
    assert hits / n_tables <= 0.05 + 3 * (0.05 * 0.95 / n_tables) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_large_differences_are_found(method: RankMethod) -> None:
    told = compare_ranks(table(20, 4, 0.7), method=method)
    assert told.pairs[2].is_distinct  # best against worst


def test_a_failed_arm_takes_the_worst_rank_and_is_told() -> None:
    scores = pd.DataFrame(
        {"a": [0.9, 0.9, 0.9], "b": [0.0, np.nan, 0.1], "c": [np.nan, np.nan, 0.2]},
    )
    told = compare_ranks(scores)
    assert told.arms == (
        ArmRank("a", 1.0, 0),
        ArmRank("b", pytest.approx(7.5 / 3), 1),  # ranks 2, 2.5, 3
        ArmRank("c", pytest.approx(7.5 / 3), 2),  # ranks 3, 2.5, 2
    )
    assert any("b on 1, c on 2 of 3 data sets" in note for note in told.notes)


def test_to_wilcoxon_a_failure_is_the_largest_loss() -> None:
    b = [0.2, 0.3, 0.1, 0.4, 0.5, np.nan]
    scores = pd.DataFrame({"a": [0.1] * 2 + [0.9, 0.9, 0.9, 0.3], "b": b})
    expected = wilcoxon([-0.1, -0.2, 0.8, 0.5, 0.4, 2.0], method="exact").pvalue
    assert compare_ranks(scores).pairs[0].p_value == pytest.approx(expected, abs=1e-12)


def test_a_data_set_on_which_all_arms_failed_is_left_out() -> None:
    scores = pd.concat([DEMSAR, DEMSAR.iloc[:1] * np.nan], ignore_index=True)
    told = compare_ranks(scores)
    assert told.pairs == compare_ranks(DEMSAR).pairs
    assert told.n_datasets == 14
    assert "Data sets left out, since no arm finished there: 1." in told.notes


def test_two_arms_are_compared_by_wilcoxon() -> None:
    told = compare_ranks(DEMSAR.iloc[:, :2])
    assert (told.method, told.friedman, told.iman_davenport) == ("wilcoxon-holm", None, None)
    assert "need three arms" in told.notes[0]


@pytest.mark.parametrize(("n_arms", "needed"), [(2, 6), (3, 7), (4, 8), (20, 13)])
def test_too_few_data_sets_for_wilcoxon_are_told_exactly(n_arms: int, needed: int) -> None:
    steps = np.linspace(0.1, 0.9, n_arms)
    for n, is_told in ((needed - 1, True), (needed, False)):
        told = compare_ranks(pd.DataFrame([steps] * n), method="wilcoxon-holm")
        assert any(f"before there are {needed}." in note for note in told.notes) == is_told
        # These arms differ as clearly as can be.
        assert any(pair.is_distinct for pair in told.pairs) != is_told


@pytest.mark.parametrize("n_arms", [3, 4, 9, 20])
def test_too_few_data_sets_for_nemenyi_are_told_exactly(n_arms: int) -> None:
    steps = np.linspace(0.1, 0.9, n_arms)
    for n in range(2, 7):
        told = compare_ranks(pd.DataFrame([steps] * n))
        is_told = any("exceeds the range of ranks" in note for note in told.notes)
        assert any(pair.is_distinct for pair in told.pairs) != is_told


def test_data_sets_that_all_agree_or_say_nothing_have_a_p() -> None:
    same = compare_ranks(pd.DataFrame([[0.1, 0.2, 0.3]] * 3))
    assert same.iman_davenport is not None
    assert same.iman_davenport.statistic == np.inf
    # By counting: both other data sets in the order of the first, of 6 orders.
    orders = list(product(range(6), repeat=3))
    share = sum(len(set(order)) == 1 for order in orders) / len(orders)
    assert same.iman_davenport.p_value == pytest.approx(share)
    tied = compare_ranks(pd.DataFrame([[0.5, 0.5, 0.5]] * 3))
    assert tied.friedman is not None and tied.iman_davenport is not None
    assert (tied.friedman.p_value, tied.iman_davenport.p_value) == (1.0, 1.0)
    assert len(tied.cliques[0]) == 3


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (DEMSAR.iloc[:, :1], {}, "two arms or more, but got n_arms=1"),
        (DEMSAR.iloc[:1], {}, "two data sets or more, but got n_datasets=1"),
        (DEMSAR * 100, {}, r"in \[0, 1\] or NaN, but got 76.3"),
        (DEMSAR.iloc[[0, 0, 1]], {}, "Each data set must be there once; average '0'"),
        (DEMSAR.iloc[:, [0, 0, 1]], {}, "Each arm must be there once; average 'C4.5'"),
        (DEMSAR, {"alpha": 1.0}, "alpha must be above 0 and below 1, but got alpha=1.0"),
        (DEMSAR, {"method": "t"}, "method must be one of .*nemenyi.*, but got method='t'"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    scores: pd.DataFrame, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_ranks(scores, **options)


def drawn(comparison: RankComparison) -> Figure:
    with style():
        figure = Figure(figsize=diagram_size(comparison), dpi=200)
        ax = figure.add_subplot()
        assert plot_critical_difference(comparison, ax) is ax
        figure.savefig(io.BytesIO())
    return figure


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n_arms", "n_datasets"), [(2, 3), (4, 2), (9, 12), (20, 25)])
def test_labels_lie_apart_and_inside_a_column(
    n_arms: int, n_datasets: int, method: RankMethod
) -> None:
    told = compare_ranks(table(n_datasets, n_arms, 0.5), method=method)
    figure = drawn(told)
    texts = figure.axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert figure.get_size_inches()[0] == 3.3
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    written = {text.get_text().replace("\n", "").replace(" ", "") for text in texts}
    assert {arm.name.replace(" ", "") for arm in told.arms} <= written
    assert any(word.startswith("CD=") for word in written) == (told.method == "nemenyi")
