"""The rules of weak labels that both halves follow, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from supercl_core.cache.schema import ASP_GRID
from supercl_core.cache.weak_labels import auto_level, expected_positives, grid_positions, labels_name, linked


def test_labels_are_named_after_their_descriptors_and_the_rule_of_the_links() -> None:
    assert labels_name("intensity", "auto") == "intensity"
    assert labels_name("intensity", "any") == "intensity-any"
    assert labels_name("run", "other-cases") == "run-other-cases"


def test_slices_of_one_patient_are_linked_where_there_is_no_other() -> None:
    assert linked("auto", np.array([3, 3, 3])) == "any"
    assert linked("auto", np.array([3, 3, 4])) == "other-cases"
    assert linked("any", np.array([3, 4])) == "any"


@pytest.mark.parametrize("size", [1, 7, 32, 33, 512, 1999])
def test_the_grid_lies_in_the_middle_of_equal_parts(size: int) -> None:
    centres = [int((cell + 0.5) / ASP_GRID * size) for cell in range(ASP_GRID)]
    np.testing.assert_array_equal(grid_positions(size), centres)


def test_expected_positives_by_hand() -> None:
    # Of the 4 other slices a batch of 3 holds 2; those labelled 0 have 2 partners, that labelled 1 one, that labelled
    # 2 none: 2 * (3 * 2 + 0 + 0) / (5 * 4).
    assert expected_positives(np.array([0, 0, 0, 1, 2]), 3) == pytest.approx(0.6)
    assert expected_positives(np.array([4]), 8) == 0
    assert expected_positives(np.zeros(10, int), 1) == 0


def test_expected_positives_are_those_of_drawn_batches() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, 60)
    counts = []
    for _ in range(4000):
        batch = labels[random.permutation(60)[:8]]
        counts.append((batch[:, None] == batch).sum() / 8 - 1)
    assert expected_positives(labels, 8) == pytest.approx(np.mean(counts), rel=0.03)


def test_the_level_taken_is_the_finest_with_a_positive_per_anchor() -> None:
    ccl = np.stack([np.arange(40) // 2, np.arange(40) // 10, np.zeros(40, int)])
    assert [auto_level(ccl, size) for size in (2, 5, 6, 39, 40)] == [2, 2, 1, 1, 0]
    assert auto_level(ccl[:2], 2) == 1  # none has, so the coarsest
