"""The published protocol: cases worked by hand, the centre crop against that of training, and agreement with loops."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from train.data import SliceDataset
from train.paper_protocol import PaperScores, centred

CLASSES = ("background", "organ", "vessel")


def scored(cases, crop=(6, 6)):
    scores = PaperScores(CLASSES, crop=crop)
    for prediction, truth in cases:
        scores.add(prediction, truth)
    return scores.result()


def squares(*columns, num_slices=1, class_number=1):
    """Slices of 6 x 6 with a 2 x 2 square of a class that begins at each of the columns; None for an empty one."""
    label_map = np.zeros((len(columns), 6, 6), np.uint8)
    for z, column in enumerate(columns):
        if column is not None:
            label_map[z, 2:4, column : column + 2] = class_number
    return label_map


def test_voxels_of_all_slices_and_cases_are_pooled():
    large = np.zeros((1, 6, 6), np.uint8)
    large[0] = 1
    result = scored([(squares(0), squares(4)), (large, large)])  # 4 voxels missed, 36 met
    organ = result["summary"]["organ"]
    assert organ["dsc"] == pytest.approx(2 * 36 / (40 + 40))  # by case, the mean would be 0.5
    assert organ["jc"] == pytest.approx(36 / 44)


def test_distances_are_means_over_slices_with_0_where_one_side_is_empty():
    prediction, truth = squares(0, 0, None, None), squares(2, None, 2, None)
    result = scored([(prediction, truth)])
    organ = result["summary"]["organ"]
    assert (organ["hd95"], organ["num_empty_slices"], result["num_slices"]) == (2 / 4, 3, 4)
    # From each square, two of the four pixels are 1 from the other, and two are 2.
    assert organ["asd"] == pytest.approx(1.5 / 4)
    assert (organ["dsc"], organ["jc"]) == (0, 0)


def test_the_mean_is_over_the_classes_that_any_slice_has():
    result = scored([(squares(0, 2), squares(0, 2))])
    vessel, mean = result["summary"]["vessel"], result["summary"]["mean"]
    assert (vessel["dsc"], vessel["jc"], vessel["hd95"], vessel["num_empty_slices"]) == (None, None, 0, 2)
    assert (mean["dsc"], mean["jc"], mean["hd95"], mean["num_empty_slices"]) == (1, 1, 0, 2)


def test_what_lies_outside_the_crop_does_not_count():
    prediction, truth = squares(1, 1), squares(1, 1)
    prediction[0, 0, 0] = truth[1, 5, 5] = 1
    assert scored([(prediction, truth)])["summary"]["organ"]["dsc"] < 1
    result = scored([(prediction, truth)], crop=(4, 8))
    assert result["summary"]["organ"]["dsc"] == 1
    assert result["crop"] == [4, 8]


@pytest.mark.parametrize("crop", [(16, 32), (32, 16), (48, 48), (16, 16)])
def test_slices_are_centred_as_in_training(cache_path, crop):
    from supercl_core.cache.reader import open_cache

    cache = open_cache(cache_path)  # slices of 24 x 20
    dataset = SliceDataset(cache, ["case_b"], patch_size=crop, ground_truth=True)
    truth = np.stack([dataset[index]["ground_truth"].numpy() for index in range(len(dataset))])
    np.testing.assert_array_equal(centred(np.array(cache.case("case_b").ground_truth_ZYX), crop), truth)


@pytest.mark.parametrize(
    ("size", "crop"), [((5, 8), (4, 5)), ((5, 8), (8, 9)), ((6, 5), (6, 5)), ((1, 1), (3, 2))]
)
def test_odd_differences_are_split_as_in_training(size, crop):
    label_map = np.arange(1, size[0] * size[1] + 1, dtype=np.uint8).reshape(1, *size)
    found = centred(label_map, crop)
    first = [(side - wanted) // 2 for side, wanted in zip(size, crop, strict=True)]
    for row, column in np.ndindex(*crop):
        y, x = row + first[0], column + first[1]
        inside = 0 <= y < size[0] and 0 <= x < size[1]
        assert found[0, row, column] == (label_map[0, y, x] if inside else 0)


def test_random_cases_agree_with_loops():
    random = np.random.default_rng(0)
    cases = [tuple(random.integers(0, 3, (4, 6, 6)).astype(np.uint8) for _ in range(2)) for _ in range(2)]
    cases[0][0][1] = 0
    result = scored(cases)
    for number, name in enumerate(CLASSES[1:], start=1):
        sums, distances = np.zeros(3), []
        for prediction, truth in cases:
            for z in range(4):
                masks = prediction[z] == number, truth[z] == number
                sums += [masks[0].sum(), masks[1].sum(), (masks[0] & masks[1]).sum()]
                distances.append(planar_distances(*masks))
        summary = result["summary"][name]
        assert summary["dsc"] == pytest.approx(2 * sums[2] / (sums[0] + sums[1]))
        assert summary["jc"] == pytest.approx(sums[2] / (sums[0] + sums[1] - sums[2]))
        wanted = np.mean(distances, axis=0)
        assert (summary["hd95"], summary["asd"]) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))


def planar_distances(prediction, truth):
    """HD95 and ASD between the borders of two masks in the plane; 0 where one is empty."""
    if not (prediction.any() and truth.any()):
        return 0.0, 0.0
    borders = []
    for mask in (prediction, truth):
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        borders.append(mask & ~inner)
    there = distance_transform_edt(~borders[1])[borders[0]]
    back = distance_transform_edt(~borders[0])[borders[1]]
    return max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate([there, back]).mean()
