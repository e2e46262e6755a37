"""The drawings of a report: curves, box plots, and slices with label maps, each as a data: URI.

Drawings are small and hold no names, so that they stay legible when a page shrinks them to the width of a
telephone, and so that nothing in a name can disturb them: the page's text calls a run or an arm by its key (A, B,
...), and every plot marks it in the same way. Figures are built without pyplot, so nothing global changes.
Called by the other modules of the report.

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
from matplotlib.lines import Line2D

from supercl_core.showing.pictures import class_rgb

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which most colour-blind readers can tell apart."""

MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
"""As many as share no factor with the colours: their pairs repeat after 42."""

BORDER_COLOUR: Final = "#F0E442"
"""Of superpixel borders: the palette's yellow, which nothing else has."""

MAX_POINTS: Final = 250
"""Points of a curve; longer ones become means over equal stretches."""

LINES: Final = ("-", "--", ":")
"""One after another, whenever the colours begin again."""

NUM_MARKERS: Final = 8
"""On a curve."""

LEGEND_COLUMNS: Final = 6

_INK = "#333333"
_PLOT_INCHES = (4.4, 2.9)
_DPI = 180


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How plots and texts show one of several runs or arms."""

    key: str
    """A, B, ..."""
    colour: str
    marker: str
    line: str
    """Marker and line as matplotlib calls them."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The values of one run or arm in a plot."""

    mark: Mark
    y: np.ndarray
    x: np.ndarray | None = None
    """Steps or counts, where `y` is a curve."""
    interval: np.ndarray | None = None
    """(2, n): lower and upper ends around `y`; NaN where there is none."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The borders between the labels of a label map."""

    label_map_YX: np.ndarray
    """Integer or bool."""
    colour: str
    width: float
    """In points."""


def mark(index: int) -> Mark:
    """The mark of the run or arm at `index`."""
    key = chr(ord("A") + index) if index < 26 else str(index + 1)
    return Mark(
        key=key,
        colour=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        line=LINES[index // len(COLOURS) % len(LINES)],
    )


def class_colour(value: int) -> str:
    """The colour of a class, 1 or more, as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*class_rgb(value))


def curves(series: Sequence[Series], *, y_label: str) -> str:
    """Lines over training steps; an SVG."""
    figure, axes = _plot(x_label="step", y_label=y_label)
    for one in series:
        assert one.x is not None
        x, y = (_thinned(values) for values in (one.x, one.y))
        every = max(1, len(x) // NUM_MARKERS)
        axes.plot(x, y, linewidth=1.5, markevery=every, markersize=4, **_style(one.mark))
    axes.margins(x=0.03)
    axes.locator_params(axis="x", integer=True)
    _legend(figure, series)
    return _svg(figure)


def intervals(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Points with intervals over counts on a logarithmic axis, joined by lines; an SVG."""
    figure, axes = _plot(x_label=x_label, y_label=y_label)
    axes.set_xscale("log")
    for index, one in enumerate(series):
        assert one.x is not None
        assert one.interval is not None
        x = one.x * 1.04 ** (index - (len(series) - 1) / 2)  # side by side, so that no interval hides another
        lengths = np.abs(one.interval - one.y)
        axes.errorbar(
            x, one.y, yerr=lengths, linewidth=1.4, elinewidth=1.2, capsize=2, markersize=5, **_style(one.mark)
        )
    counts = sorted({float(count) for one in series if one.x is not None for count in one.x})
    axes.set_xticks(counts, [f"{count:g}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.12)
    _legend(figure, series)
    return _svg(figure)


def boxes(series: Sequence[Series], *, y_label: str) -> str:
    """One box a series (median, quartiles, whiskers to 1.5 interquartile ranges) with a dot a value; an SVG."""
    figure, axes = _plot(x_label="", y_label=y_label)
    random = np.random.default_rng(0)
    for position, one in enumerate(series):
        lines: dict[str, Any] = {"color": one.mark.colour, "linewidth": 1.4}
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
        style: dict[str, Any] = {"color": one.mark.colour, "marker": one.mark.marker, "linewidths": 0}
        axes.scatter(x, one.y, s=12, alpha=0.6, zorder=3, **style)
    axes.set_xticks(range(len(series)), [one.mark.key for one in series])
    axes.set_xlim(-0.6, len(series) - 0.4)
    return _svg(figure)


def slice_picture(
    slice_YX: np.ndarray,
    *,
    window: tuple[float, float],
    aspect: float = 1.0,
    filled_YX: np.ndarray | None = None,
    outlines: Sequence[Outline] = (),
    inches: float = 2.6,
) -> str:
    """A slice in grey with a label map and outlines over it, `inches` long on its longer side; a PNG.

    `slice_YX`: any real dtype; `window` goes from black to white. `aspect` is the height of a pixel over its
    width. `filled_YX`: integer classes, painted in their colours, 0 left as it is.
    """
    figure, axes = _picture(slice_YX, window, aspect, inches)
    if filled_YX is not None:
        tint_YX4 = np.zeros((*filled_YX.shape, 4))
        for value in np.unique(filled_YX[filled_YX > 0]):
            tint_YX4[filled_YX == value] = to_rgba(class_colour(int(value)), 0.4)
        axes.imshow(tint_YX4, aspect="auto", interpolation="nearest")
    for outline in outlines:
        borders = _borders(outline.label_map_YX)
        # The rim keeps a line visible on bright tissue.
        for colour, width in (("#000000", outline.width + 1), (outline.colour, outline.width)):
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
    inches = 2.6
    figure, axes = _picture(slice_YX, window, aspect, inches)
    axes.add_collection(LineCollection(_borders(superpixels_YX), colors="#ffffff", linewidths=0.4, alpha=0.6))
    tint_YX4 = np.zeros((*superpixels_YX.shape, 4))
    centres = [np.arange(stride // 2, size, stride) for size in superpixels_YX.shape]
    rows, columns = np.meshgrid(*centres, indexing="ij")
    ids = superpixels_YX[rows, columns]
    # In points; discs of a fine map must not cover one another.
    step = 72 * inches * stride / max(slice_YX.shape)
    axes.scatter(columns, rows, s=min(6, (0.2 * step) ** 2), color="#bbbbbb", linewidths=0)
    for index, (row, column) in enumerate(anchors):
        same = ids == ids[row, column]
        colour = COLOURS[index % len(COLOURS)]
        tint_YX4[superpixels_YX == ids[row, column]] = to_rgba(colour, 0.45)
        style: dict[str, Any] = {"color": colour, "edgecolors": "#ffffff", "linewidths": 0.6}
        axes.scatter(columns[same], rows[same], s=min(22, (0.7 * step) ** 2), zorder=2, **style)
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


def _legend(figure: Figure, series: Sequence[Series]) -> None:
    handles = [Line2D([], [], markersize=5, label=one.mark.key, **_style(one.mark)) for one in series]
    style: dict[str, Any] = {"frameon": False, "handlelength": 1.8, "columnspacing": 1.2, "labelcolor": _INK}
    figure.legend(handles=handles, loc="outside upper left", ncols=LEGEND_COLUMNS, **style)


def _style(mark: Mark) -> dict[str, Any]:
    return {"color": mark.colour, "marker": mark.marker, "linestyle": mark.line}


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
