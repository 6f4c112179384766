import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.partition import partition
from core.data.sources import DataError

# Labels and contents of a data set with duplicates; contents say nothing of the class.
IMAGES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), min_size=1, max_size=80)


def _hashes(n: int, salt: str = "") -> list[str]:
    return [hashlib.sha256(f"{salt}{i}".encode()).hexdigest() for i in range(n)]


@settings(deadline=None)
@given(images=IMAGES, n_folds=st.integers(2, 10), seed=st.integers(0, 3))
def test_folds_hold_every_image_once_with_its_duplicates(
    images: list[tuple[str, int]], n_folds: int, seed: int
) -> None:
    labels, contents = [label for label, _ in images], [f"{k}" for _, k in images]
    folds = partition(labels, contents, n_folds, seed)
    assert len(folds) == len(images) and set(folds) <= set(range(n_folds))
    assert len(set(zip(contents, folds, strict=True))) == len(set(contents))


@pytest.mark.parametrize("n_folds", [2, 5, 10])
def test_folds_are_stratified_and_of_equal_size(n_folds: int) -> None:
    labels = [k for k, n in enumerate((31, 8, 17, 3)) for _ in range(n)]
    folds = partition(labels, _hashes(len(labels)), n_folds, 0)
    for label in set(labels):
        counts = np.bincount(folds[np.array(labels) == label], minlength=n_folds)
        assert np.ptp(counts) <= 1
    assert np.ptp(np.bincount(folds, minlength=n_folds)) <= 1


def test_folds_follow_contents_and_seed_whatever_the_order() -> None:
    labels, contents = ["a", "b", "b"] * 20, _hashes(60)
    first = partition(labels, contents, 4, 7)
    order = np.random.default_rng(0).permutation(60)
    again = partition([labels[i] for i in order], [contents[i] for i in order], 4, 7)
    assert np.array_equal(first[order], again)
    assert not np.array_equal(first, partition(labels, contents, 4, 8))


def test_a_new_image_moves_at_most_one_other_per_fraction() -> None:
    contents = _hashes(50)
    before = partition(["a"] * 50, contents, [0.2, 0.2], 0)
    after = partition(["a"] * 51, [*contents, *_hashes(1, "new")], [0.2, 0.2], 0)
    assert (before != after[:50]).sum() <= 2


def test_an_image_of_several_classes_is_in_the_last_part() -> None:
    labels, contents = ["a"] * 20 + ["b"] * 20, _hashes(20) * 2
    contents[25:] = _hashes(15, "b")  # five are shared
    for seed in range(5):
        parts = partition(labels, contents, [0.4, 0.4], seed)
        assert set(parts[:5]) == set(parts[20:25]) == {2}


def test_a_class_of_too_few_different_images_is_refused() -> None:
    contents = _hashes(7)
    contents[6] = contents[5]
    with pytest.raises(DataError, match=r"class b must have at least 3 different .* has 2\."):
        partition(["a"] * 4 + ["b"] * 3, contents, [0.2, 0.2], 0)
