"""Run the benchmarks of preprocessing and write what they measured, beside the targets, to docs/benchmarks.md.

    python -m benchmarks.all_preprocessing --data DIR [--data DIR] [--quick]        (make bench DATA="DIR DIR")

Each DIR is a data set in the layout of the Medical Segmentation Decathlon. Superpixels are measured on every one,
the whole way from files to a cache and the cost of scheduling on the first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.page import Row, Values, at_least, at_most, run, table, times

TABLE_PATH = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def _points(metric: str) -> Callable[[Values], str]:
    def shown(values: Values) -> str:
        interval = values[f"{metric}_difference_ci"]
        if interval is None:
            return "no ground truth"
        return f"{values[f'{metric}_difference']:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"

    return shown


def _no_worse(metric: str, *, margin: float, sign: int = 1) -> Callable[[Values], bool]:
    """Whether the interval of a difference keeps within the margin; `sign` -1 where less is better."""

    def met(values: Values) -> bool:
        interval = values[f"{metric}_difference_ci"]
        return interval is None or min(sign * bound for bound in interval) >= -margin

    return met


SLIC = (
    Row("`fast` against scikit-image, 512 x 512", "80 x, then 100 x", times("fast_vs_skimage_512"),
        at_least("fast_vs_skimage_512", 80)),
    Row("... with the noise of the slice added", "", times("fast_vs_skimage_512_noise")),
    Row("`fast` against scikit-image, 256 x 256", "45 x", times("fast_vs_skimage_256"),
        at_least("fast_vs_skimage_256", 45)),
    Row("`fast` against scikit-image, native size", "25 x at 140 x 190", times("fast_vs_skimage_native")),
    Row("`fast` against OpenCV's SLIC, 512 x 512", "30 x", times("fast_vs_opencv_512"),
        at_least("fast_vs_opencv_512", 30)),
    Row("`exact` against scikit-image, 512 x 512", "5 x", times("exact_vs_skimage_512"),
        at_least("exact_vs_skimage_512", 5)),
    Row("pixels where `exact` agrees with scikit-image", "99.9 %", lambda v: f"{v['exact_agreement']:.4%}",
        at_least("exact_agreement", 0.999)),
    Row("ASA, points", "bound >= -0.2", _points("asa"), _no_worse("asa", margin=0.2)),
    Row("boundary recall (2 px), points", "bound >= -0.2", _points("boundary_recall"),
        _no_worse("boundary_recall", margin=0.2)),
    Row("under-segmentation error (less is better), points", "bound <= 0.2", _points("undersegmentation"),
        _no_worse("undersegmentation", margin=0.2, sign=-1)),
    Row("explained variance, points", "not lower", _points("explained_variance"),
        _no_worse("explained_variance", margin=0)),
    Row("superpixels a slice", "", _points("superpixels")),
    Row("CPU-hours for 17,525 slices of 512 x 512", "beside 153 published",
        lambda v: f"{v['cpu_hours_17525_slices_512']:.4f}"),
)  # fmt: skip

PREPROCESS = (
    Row("wall time against only reading the files with SimpleITK", "2 x at most", times("vs_reading"),
        at_most("vs_reading", 2)),
    Row("two workers against one", "1.8 x", times("two_workers_speedup"), at_least("two_workers_speedup", 1.8)),
    Row("slices a second, one worker on one core", "", lambda v: f"{v['slices_per_second']:.0f}"),
    Row("peak memory of a worker", "3 x the largest case + 500 MB",
        lambda v: f"{v['peak_memory_bytes'] / 1e6:.0f} MB (largest case {v['largest_case_bytes'] / 1e6:.0f} MB)",
        lambda v: v["peak_memory_bytes"] <= v["peak_memory_bound_bytes"]),
    Row("ASP kernel against memcpy of the bytes it reads", "1.5 x at most", times("asp_vs_memcpy"),
        at_most("asp_vs_memcpy", 1.5)),
    Row("statistics kernel (int16) against memcpy", "1.5 x at most", times("statistics_vs_memcpy"),
        at_most("statistics_vs_memcpy", 1.5)),
)  # fmt: skip

SCALING = (
    Row("scheduling cost of a case", "10 ms at most", lambda v: f"{1000 * v['overhead_seconds_per_case']:.1f} ms",
        at_most("overhead_seconds_per_case", 0.010)),
)  # fmt: skip


@click.command(help=__doc__)
@click.option("--data", "folders", required=True, multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--quick", is_flag=True, help="Fewer slices and cases: for a first look, not for docs.")
def main(folders: tuple[Path, ...], quick: bool) -> None:
    """Run everything; write the tables."""
    more = ["--quick"] if quick else []
    slic = [run("slic", "--data", folder, *more) for folder in folders]
    whole = run("preprocess", "--data", folders[0], *more)
    scaling = run("scaling", "--data", folders[0], *more)
    text = render(slic, whole, scaling, quick=quick)
    TABLE_PATH.write_text(text)
    print(text)


def render(slic: list[Values], whole: Values, scaling: Values, *, quick: bool) -> str:
    """The page, from the JSON objects of the benchmarks."""
    return "\n".join(
        [
            "# Benchmarks of preprocessing",
            "",
            f"Written by `make bench`{' with --quick' if quick else ''}: {slic[0]['processor']}, "
            f"{slic[0]['cores']} cores, Python {slic[0]['python']}. Every comparison was made in one run, by medians "
            "of interleaved calls; timings vary by 10 % from run to run. Conditions stand at the head of each script.",
            "",
            "## Superpixels: `benchmarks/slic.py`",
            "",
            "One core; 100 superpixels, 10 iterations. Differences: `fast` minus scikit-image at native size, mean "
            "over cases with a 95 % bootstrap interval over cases.",
            "",
            *table(SLIC, {values["data"]: values for values in slic}),
            "",
            *(
                f"{values['data']}: {values['num_slices_timed']} slices timed, {values['num_slices']} slices of "
                f"{values['num_cases']} cases compared."
                for values in slic
            ),
            "",
            "## From files to a cache: `benchmarks/preprocess.py`",
            "",
            f"{whole['num_cases']} compressed volumes of {whole['num_slices'] // whole['num_cases']} slices of "
            f"{whole['slice']} (ratio {whole['compression_ratio']:.1f}), each worker on a core of its own, page cache "
            "warm, start-up not counted.",
            "",
            *table(PREPROCESS, {whole["data"]: whole}),
            "",
            "Milliseconds a slice, of one case alone: "
            + ", ".join(f"{stage} {value:.2f}" for stage, value in whole["ms_per_slice"].items())
            + ". The bytes of a slice stay in the processor's cache here, which makes memcpy as fast as it gets.",
            "",
            "## Many cases: `benchmarks/scaling.py`",
            "",
            f"{scaling['num_cases']:,} tiny cases on one core that client, scheduler and worker share. The cost is "
            "that of a whole run, with start, planning, scheduling, tables and weak labels, minus a plain loop over "
            "the cases.",
            "",
            *table(SCALING, {scaling["data"]: scaling}),
            "",
        ]
    )


if __name__ == "__main__":
    main()
