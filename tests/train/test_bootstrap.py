"""Intervals of means: a slow restatement, cases by hand, coverage, patients, folds and missing classes."""

from __future__ import annotations

import itertools
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import norm, t

from train import bootstrap
from train.bootstrap import mean_interval, mean_score, paired_difference, score_same_cases, scores

T_OF_2 = 4.302653 / 1.959964
"""Student's t with two degrees of freedom to the normal quantile, from a printed table."""


def evaluation(dsc_by_case, class_names=("anterior", "posterior")):
    """What evaluation.json holds; `dsc_by_case`: case -> DSC (0..1) of each class, None meaning absent in both."""
    return {
        "rows": [
            {"case": case, "class": name, "dsc": dsc}
            for case, values in dsc_by_case.items()
            for name, dsc in zip(class_names, values, strict=True)
        ]
    }


def single(values):
    """Scores of one seed and one class, and names of its cases."""
    return np.array(values, float)[None, :, None], [f"case_{index}" for index in range(len(values))]


def unbounded(values, case_ids):
    return mean_interval(values, case_ids, bounds=(-np.inf, np.inf))


def mean_of(resample):
    """The mean over classes of the means of (seed, case) lists of class scores."""
    classes = list(zip(*resample, strict=True))
    known = [[value for value in values if not np.isnan(value)] for values in classes]
    return fmean(fmean(values) for values in known if values)


def slow_interval(values_SCK, patients):
    """Every resample drawn out in full: the seeds' scores of all cases of each drawn patient, as often as drawn."""
    random = np.random.default_rng(bootstrap.SEED)
    num_seeds, names = len(values_SCK), sorted(set(patients))

    def draws(count):
        chances = np.full(count, 1 / count)
        return [
            [index for index, times in enumerate(row) for _ in range(times)]
            for row in random.multinomial(count - 1, chances, size=bootstrap.NUM_RESAMPLES)
        ]

    def mean(seeds, drawn):
        return mean_of(
            [
                values_SCK[seed, case]
                for seed in seeds
                for index in drawn
                for case, patient in enumerate(patients)
                if patient == names[index]
            ]
        )

    patient_draws = draws(len(names))
    seed_draws = draws(num_seeds) if num_seeds > 1 else [[0]] * len(patient_draws)
    both = [mean(*pair) for pair in zip(seed_draws, patient_draws, strict=True)]
    variances = [(np.var([mean(range(num_seeds), drawn) for drawn in patient_draws]), len(names) - 1)]
    if num_seeds > 1:
        variances.append((np.var([mean(drawn, range(len(names))) for drawn in seed_draws]), num_seeds - 1))
    freedom = sum(part for part, _ in variances) ** 2 / sum(part**2 / count for part, count in variances)
    stretch = t.ppf(0.975, freedom) / norm.ppf(0.975)
    centre = mean(range(num_seeds), range(len(names)))
    return tuple(centre + stretch * (bound - centre) for bound in np.percentile(both, [2.5, 97.5]))


@pytest.mark.parametrize("num_seeds", [1, 2, 3])
def test_the_interval_is_that_of_resamples_drawn_out_in_full(num_seeds, monkeypatch):
    monkeypatch.setattr(bootstrap, "NUM_RESAMPLES", 200)
    values = np.random.default_rng(1).normal(80, 5, size=(num_seeds, 8, 2))
    values[:, 1, 0] = values[0, 3, 1] = np.nan
    case_ids = [f"patient{patient:03}_frame{frame}" for patient in (4, 1, 9, 7) for frame in (1, 12)]
    expected = slow_interval(values, [4, 4, 1, 1, 9, 9, 7, 7])
    # Patients are sorted as texts, which for numbers of one digit is their order.
    assert mean_interval(values, case_ids) == pytest.approx(expected)


def test_three_patients_by_hand():
    # Two of three are drawn: nine equally likely means, the lowest and the highest each with a chance of one in nine.
    low, high = unbounded(*single([0.0, 3.0, 12.0]))
    assert low == pytest.approx(5 + T_OF_2 * (0 - 5), rel=1e-5)
    assert high == pytest.approx(5 + T_OF_2 * (12 - 5), rel=1e-5)


def test_four_cases_against_all_their_resamples():
    values = [1.0, 2.0, 6.0, 20.0]
    means = [fmean(drawn) for drawn in itertools.product(values, repeat=3)]
    stretch = t.ppf(0.975, 3) / norm.ppf(0.975)
    expected = [7.25 + stretch * (bound - 7.25) for bound in np.percentile(means, [2.5, 97.5])]
    assert unbounded(*single(values)) == pytest.approx(expected, abs=1.5)


def test_below_three_patients_there_is_no_interval():
    assert mean_interval(*single([1.0, 2.0])) is None
    frames = [f"patient{patient:03}_frame{frame}" for patient in (1, 2) for frame in (1, 12)]
    assert mean_interval(np.ones((2, 4, 1)), frames) is None
    assert mean_interval(*single([1.0, 1.0, 1.0])) == (1.0, 1.0)


def test_an_interval_ends_where_values_do():
    low, high = mean_interval(*single([99.0, 98.0, 70.0]))
    assert (low, high) == (pytest.approx(89 + T_OF_2 * (70 - 89)), 100.0)
    assert mean_interval(*single([-80.0, 90.0, 99.0]), bounds=(-100.0, 100.0)) == (-100.0, 100.0)


def test_a_second_frame_that_tells_nothing_new_does_not_narrow_the_interval():
    values, case_ids = single([1.0, 4.0, 2.0, 9.0, 5.0])
    frames = [f"patient{index:03}_frame{frame}" for index in range(5) for frame in (1, 12)]
    assert mean_interval(values.repeat(2, axis=1), frames) == pytest.approx(mean_interval(values, case_ids))


def test_seeds_that_differ_widen_the_interval():
    random = np.random.default_rng(0)
    cases = random.normal(size=(1, 20, 1))
    names = [f"case_{index}" for index in range(20)]
    alike = cases + np.zeros((3, 1, 1))
    apart = cases + np.array([-1.0, 0.0, 1.0])[:, None, None]
    one, three, wide = (unbounded(values, names) for values in (cases, alike, apart))
    assert np.ptp(three) == pytest.approx(np.ptp(one), rel=0.1)
    assert np.ptp(wide) > 2 * np.ptp(one)


def test_seeds_that_scored_different_cases_are_not_resampled():
    values, names = single([1.0, 4.0, 2.0, 9.0, 5.0, 3.0])
    folds = np.full((3, 6, 1), np.nan)
    for case in range(6):
        folds[case % 3, case] = values[0, case]
    assert mean_score(folds) == pytest.approx(mean_score(values))
    assert mean_interval(folds, names, same_cases=False) == pytest.approx(mean_interval(values, names))


def test_a_class_that_few_cases_have_counts_as_much_as_the_others():
    values = np.array([[[10.0, np.nan], [20.0, np.nan], [30.0, 60.0], [np.nan, np.nan]]])
    assert mean_score(values) == 40
    low, high = mean_interval(values, list("abcd"))
    # In resamples without case c there is no second class.
    assert low < 20 < 40 < high
    assert np.isnan(mean_score(np.full((1, 2, 2), np.nan)))


@pytest.mark.parametrize(
    ("num_seeds", "num_patients", "sd_of_seeds", "sd_of_patients"),
    [
        (1, 4, 0.0, 1.0),
        (1, 20, 0.0, 1.0),
        (3, 5, 0.5, 2.0),
        (3, 20, 0.5, 1.0),
        (3, 20, 2.0, 1.0),
        (3, 40, 0.0, 0.5),
    ],
)
def test_the_interval_covers_the_mean_about_as_often_as_it_says(
    num_seeds, num_patients, sd_of_seeds, sd_of_patients, monkeypatch
):
    monkeypatch.setattr(bootstrap, "NUM_RESAMPLES", 500)
    random = np.random.default_rng(0)
    names = [f"case_{index:02}" for index in range(num_patients)]
    covered, trials = 0, 300
    for _ in range(trials):
        values = (
            sd_of_seeds * random.normal(size=(num_seeds, 1, 1))
            + sd_of_patients * random.normal(size=(1, num_patients, 1))
            + random.normal(size=(num_seeds, num_patients, 1))
        )
        low, high = unbounded(values, names)
        covered += low <= 0 <= high
    # The standard error of 95 % of 300 trials is 1.3 points.
    assert covered / trials > 0.91


# ---------------------------------------------------------------- differences


def test_differences_are_between_the_same_case_class_and_seed():
    baseline = [
        evaluation({"a": (0.5, 0.7), "b": (0.6, 0.8)}),
        evaluation({"a": (0.4, 0.2), "b": (0.3, 0.3)}),
    ]
    other = [evaluation({"b": (0.7, 0.8), "a": (0.5, 0.8)}), evaluation({"a": (0.5, 0.2), "c": (0.9, 0.9)})]
    found = paired_difference(baseline, other, class_names=["anterior", "posterior"])
    # anterior 0, 10, 10; posterior 10, 0, 0
    assert found.mean == pytest.approx((20 / 3 + 10 / 3) / 2)
    assert (found.num_cases, found.num_seeds, found.interval) == (2, 2, None)
    assert paired_difference(baseline, other, class_names=["posterior"]).mean == pytest.approx(10 / 3)
    assert paired_difference(baseline[:1], [evaluation({"z": (1.0, 1.0)})], class_names=["anterior"]) is None
    assert paired_difference([], [], class_names=["anterior"]) is None


def test_one_structure_absent_in_both_does_not_switch_the_resampling_of_seeds_off():
    random = np.random.default_rng(0)

    def arm(without):
        return [
            evaluation(
                {
                    f"c{case}": (None if (seed, case) == without else 0.7 + shift + 0.01 * random.normal(),)
                    for case in range(8)
                },
                ("a",),
            )
            for seed, shift in enumerate((-0.2, 0.0, 0.2))
        ]

    names = [f"c{case}" for case in range(8)]
    whole, holed = arm(None), arm((0, 3))
    assert score_same_cases(holed)
    assert not score_same_cases([evaluation({"c0": (0.5, 0.5)}), evaluation({"c1": (0.5, 0.5)})])
    widths = [
        np.ptp(mean_interval(scores(found, case_ids=names, class_names=["a"]), names))
        for found in (whole, holed)
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)
    # Where seeds differ by 20 points and cases by 1, it is the seeds that an interval has to tell of.
    level = [evaluation(dict.fromkeys(names, (0.5,)), ("a",))] * 3
    assert not paired_difference(holed, level, class_names=["a"]).is_clear
    assert paired_difference(holed[2:], level[2:], class_names=["a"]).is_clear


def test_what_one_side_rightly_leaves_empty_and_the_other_does_not_is_no_tie():
    fills = [evaluation({"a": (0.5,), "b": (0.0,), "c": (0.5,)}, ("x",))]
    leaves = [evaluation({"a": (0.5,), "b": (None,), "c": (0.5,)}, ("x",))]
    found = paired_difference(fills, leaves, class_names=["x"])
    assert (found.mean, found.num_cases) == (pytest.approx(100 / 3), 3)
    assert paired_difference(leaves, fills, class_names=["x"]).mean == pytest.approx(-100 / 3)
    assert paired_difference(leaves, leaves, class_names=["x"]).num_cases == 2


def test_pairing_takes_away_what_cases_have_in_common():
    random = np.random.default_rng(0)
    hard = random.uniform(0.2, 0.8, size=30)
    baseline = [evaluation({f"c{i:02}": (value,) for i, value in enumerate(hard)}, ("a",))]
    better = hard + 0.02 + random.normal(0, 0.01, size=30)
    other = [evaluation({f"c{i:02}": (value,) for i, value in enumerate(better)}, ("a",))]
    found = paired_difference(baseline, other, class_names=["a"])
    assert found.is_clear
    assert found.interval[0] > 1
    assert found.interval[1] < 3
    assert not paired_difference(baseline, baseline, class_names=["a"]).is_clear


def test_scores_are_percentages_in_the_order_asked_for():
    found = scores(
        [evaluation({"b": (0.5, None), "a": (0.1, 0.2)})], case_ids=["a", "x", "b"], class_names=["posterior"]
    )
    np.testing.assert_allclose(found, [[[20.0], [np.nan], [np.nan]]])
