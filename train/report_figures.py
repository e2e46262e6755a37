"""The pictures of a report: curves, box plots, and slices with outlines, each as a data: URI.

Pictures are small and hold no names, so that they stay legible when a page shrinks them to the width of a
telephone, and so that nothing in a name can disturb them: the page's text names a run by its key (A, B, ...),
and every picture draws it in the same colour. Figures are built without pyplot, so nothing global changes.
Called by `train.report`.

Axes: y row, x column.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

RUN_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which most colour-blind readers can tell apart; repeated after six runs."""

TRUTH_COLOUR: Final = "#FFFFFF"
"""Of the ground truth, with a black rim: all colours of runs stand out on it."""

BORDER_COLOUR: Final = "#F0E442"
"""Of superpixel borders: the palette's yellow, which no run has."""

MAX_POINTS: Final = 250
"""Points of a curve; longer ones become means over equal stretches."""

_INK = "#333333"
_PLOT_INCHES = (4.4, 2.7)
_DPI = 180


@dataclass(frozen=True, kw_only=True)
class Series:
    """The values of one run in a plot."""

    key: str
    """What stands beside its line or below its box."""
    colour: str
    y: np.ndarray
    x: np.ndarray | None = None
    """Steps, where `y` is a curve."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The borders between the labels of a label map."""

    label_map_YX: np.ndarray
    """Integer or bool."""
    colour: str
    width: float
    """In points."""
    rim: float = 0.0
    """By how much a black line below is wider, in points."""


def run_colour(index: int) -> str:
    """The colour of the run at `index`."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def curves(series: Sequence[Series], *, y_label: str) -> str:
    """Lines over training steps, each marked with its key at its end; an SVG."""
    figure, axes = _plot(x_label="step", y_label=y_label)
    for index, one in enumerate(series):
        assert one.x is not None
        x, y = (_thinned(values) for values in (one.x, one.y))
        axes.plot(x, y, color=one.colour, linewidth=1.6, marker="o" if len(x) < 20 else None, markersize=3)
        axes.annotate(
            one.key,
            (x[-1], y[-1]),
            xytext=(5 + 9 * index, 0),  # side by side, where curves end together
            textcoords="offset points",
            color=one.colour,
            weight="bold",
            va="center",
        )
    axes.margins(x=0.06)
    axes.locator_params(axis="x", integer=True)
    return _svg(figure)


def boxes(series: Sequence[Series], *, y_label: str) -> str:
    """One box a run (median, quartiles, whiskers to 1.5 interquartile ranges) with a dot a case; an SVG."""
    figure, axes = _plot(x_label="run", y_label=y_label)
    random = np.random.default_rng(0)
    for position, one in enumerate(series):
        lines: dict[str, Any] = {"color": one.colour, "linewidth": 1.4}
        axes.boxplot(
            one.y,
            positions=[position],
            widths=0.5,
            showfliers=False,
            boxprops=lines,
            whiskerprops=lines,
            capprops=lines,
            medianprops={**lines, "linewidth": 2.6},
            manage_ticks=False,
        )
        x = position + random.uniform(-0.16, 0.16, size=len(one.y))
        axes.scatter(x, one.y, s=12, color=one.colour, alpha=0.6, linewidths=0, zorder=3)
    axes.set_xticks(range(len(series)), [one.key for one in series])
    axes.set_xlim(-0.6, len(series) - 0.4)
    return _svg(figure)


def slice_picture(
    slice_YX: np.ndarray,
    *,
    window: tuple[float, float],
    aspect: float = 1.0,
    outlines: Sequence[Outline] = (),
    inches: float = 2.6,
) -> str:
    """A slice in grey with outlines over it, `inches` long on its longer side; a PNG.

    `slice_YX`: any real dtype; `window` goes from black to white. `aspect` is the height of a pixel over its
    width.
    """
    figure, axes = _picture(slice_YX, window, aspect, inches)
    for outline in outlines:
        borders = _borders(outline.label_map_YX)
        # The rim keeps a line visible on bright tissue.
        for colour, width in (("#000000", outline.width + outline.rim), (outline.colour, outline.width)):
            axes.add_collection(
                LineCollection(borders, colors=colour, linewidths=width, capstyle="projecting")
            )
    return _png(figure)


def pixel_pairs_picture(
    slice_YX: np.ndarray,
    *,
    superpixels_YX: np.ndarray,
    stride: int,
    anchors: Sequence[tuple[int, int]],
    window: tuple[float, float],
    aspect: float = 1.0,
) -> str:
    """A slice with the pixels of a feature map: anchors as stars, positives as discs; a PNG.

    The feature map has one pixel at the centre of every `stride` x `stride` pixels of the slice. `anchors` are
    (row, column) in the feature map; their positives are the pixels of the same superpixel. Other pixels are
    small and grey. The superpixels of the anchors are tinted.
    """
    figure, axes = _picture(slice_YX, window, aspect, 2.6)
    axes.add_collection(LineCollection(_borders(superpixels_YX), colors="#ffffff", linewidths=0.4, alpha=0.6))
    tint_YX4 = np.zeros((*superpixels_YX.shape, 4))
    centres = [np.arange(stride // 2, size, stride) for size in superpixels_YX.shape]
    rows, columns = np.meshgrid(*centres, indexing="ij")
    ids = superpixels_YX[rows, columns]
    axes.scatter(columns, rows, s=6, color="#bbbbbb", linewidths=0)
    for index, (row, column) in enumerate(anchors):
        same = ids == ids[row, column]
        tint_YX4[superpixels_YX == ids[row, column]] = to_rgba(run_colour(index), 0.45)
        style: dict[str, Any] = {"color": run_colour(index), "edgecolors": "#ffffff", "linewidths": 0.6}
        axes.scatter(columns[same], rows[same], s=22, zorder=2, **style)
        axes.scatter(centres[1][column], centres[0][row], s=110, marker="*", zorder=3, **style)
    axes.imshow(tint_YX4, aspect="auto", interpolation="nearest")
    return _png(figure)


def _plot(*, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_PLOT_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(colors=_INK, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _picture(
    image_YX: np.ndarray, window: tuple[float, float], aspect: float, inches: float
) -> tuple[Figure, Axes]:
    height, width = image_YX.shape[0] * aspect, image_YX.shape[1]
    longest = max(height, width)
    figure = Figure(figsize=(inches * width / longest, inches * height / longest), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image_YX, cmap="gray", vmin=window[0], vmax=window[1], aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    axes.autoscale(False)
    return figure, axes


def _borders(label_map_YX: np.ndarray) -> list[np.ndarray]:
    """The pixel edges between different labels, each as two ends (x, y) in pixel coordinates."""
    y, x = np.nonzero(label_map_YX[:, 1:] != label_map_YX[:, :-1])
    upright = np.stack([x + 0.5, y - 0.5, x + 0.5, y + 0.5], axis=-1)
    y, x = np.nonzero(label_map_YX[1:] != label_map_YX[:-1])
    level = np.stack([x - 0.5, y + 0.5, x + 0.5, y + 0.5], axis=-1)
    return list(np.concatenate([upright, level]).reshape(-1, 2, 2))


def _thinned(values: np.ndarray) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(values, min(MAX_POINTS, len(values)))])


def _svg(figure: Figure) -> str:
    # A fixed salt and no date: the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "supercl"}):
        return _data_uri(figure, "svg", "image/svg+xml", {"Date": None})


def _png(figure: Figure) -> str:
    return _data_uri(figure, "png", "image/png", None)


def _data_uri(figure: Figure, kind: str, media_type: str, metadata: dict[str, None] | None) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return f"data:{media_type};base64,{base64.b64encode(buffer.getvalue()).decode()}"
