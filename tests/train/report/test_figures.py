"""The drawings of a report, decoded again: whether what is drawn can be told apart."""

import base64
import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from train.report import figures


def pixels(uri):
    """The RGB values 0..1 of a PNG."""
    return imread(io.BytesIO(base64.b64decode(uri.split(",")[1])))[..., :3]


def holds(image_YXC, colour):
    return bool((np.abs(image_YXC - colour).max(axis=-1) < 0.02).any())


def test_each_class_has_a_colour_of_its_own():
    truth, found = np.zeros((2, 20, 20), np.uint8)
    truth[2:8, 2:8], truth[12:18, 2:8] = 1, 2
    found[2:8, 10:18], found[12:18, 10:18] = 1, 2
    outlines = [
        figures.Outline(label_map_YX=found == value, colour=figures.class_colour(value), width=1.5)
        for value in (1, 2)
    ]
    black = np.zeros((20, 20))
    image = pixels(figures.slice_picture(black, window=(0, 1), filled_YX=truth, outlines=outlines))
    for value in (1, 2):
        colour = np.array(to_rgb(figures.class_colour(value)))
        assert holds(image, colour)  # the line
        assert holds(image, 0.4 * colour)  # the area, seen through
    assert not holds(image, to_rgb(figures.class_colour(3)))


def test_marks_stay_different_when_colours_begin_again():
    marks = [figures.mark(index) for index in range(42)]
    assert len({(mark.colour, mark.marker) for mark in marks}) == len({mark.key for mark in marks}) == 42
    assert marks[0].colour == marks[6].colour
    assert marks[0].line != marks[6].line


@pytest.mark.parametrize("count", [1, 3, 42])
def test_intervals_are_drawn_for_any_number_of_arms(count):
    series = [
        figures.Series(
            mark=figures.mark(index),
            x=np.array([3.0, 21.0]),
            y=np.array([80.0, 85.0]),
            interval=np.array([[79.0, np.nan], [81.0, np.nan]]),
        )
        for index in range(count)
    ]
    uri = figures.intervals(series, x_label="labelled", y_label="DSC [%]")
    assert base64.b64decode(uri.split(",")[1]).rstrip().endswith(b"</svg>")
