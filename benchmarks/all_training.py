"""Run the benchmarks of training and write what they measured, beside the targets, to a page of docs/.

    python -m benchmarks.all_training [--quick] [--device NAME]        (make bench-training)

They make the data that they need. The page is benchmarks-training.md, on a GPU benchmarks-training-gpu.md.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.page import Row, Values, at_least, at_most, run, table, times

PAGES = {
    "cpu": Path(__file__).parent.parent / "docs" / "benchmarks-training.md",
    "gpu": Path(__file__).parent.parent / "docs" / "benchmarks-training-gpu.md",
}

READ = (
    Row("slices a second from the memory map, warm", "", lambda v: f"{v['mmap_slices_per_second']:,.0f}"),
    Row("time against a memcpy of the same bytes", "1.25 x at most", times("mmap_vs_memcpy"),
        at_most("mmap_vs_memcpy", 1.25)),
    Row("faster than zarr-python", "15 x", times("mmap_vs_zarr"), at_least("mmap_vs_zarr", 15)),
    Row("faster than tensorstore", "2 x", times("mmap_vs_tensorstore"), at_least("mmap_vs_tensorstore", 2)),
    Row("faster than `.npy` files", "2.5 x", times("mmap_vs_npy"), at_least("mmap_vs_npy", 2.5)),
    Row("faster than `.npy` files, cold", "1.4 x", times("mmap_cold_vs_npy"), at_least("mmap_cold_vs_npy", 1.4)),
    Row("arrays of the cache that equal what Zarr reads", "all",
        lambda v: f"{v['arrays_equal_zarr']} of {v['arrays']}", lambda v: v["arrays_equal_zarr"] == v["arrays"]),
    Row("opening a cache of 10,000 cases for training", "2 s at most", lambda v: f"{v['open_10000_cases_s']:.2f} s",
        at_most("open_10000_cases_s", 2)),
)  # fmt: skip

INPUT = (
    Row("faster than the published way", "500 x", times("vs_published"), at_least("vs_published", 500)),
    Row("batches a second", "", lambda v: f"{v['batches_per_second']:.1f}"),
)  # fmt: skip

STEP_CPU = (
    Row("faster than the published step, both in float32", "1.15 x", times("vs_published"),
        at_least("vs_published", 1.15)),
    Row("ours in the best precision against the published step in float32", "2 x", times("vs_published_best"),
        at_least("vs_published_best", 2)),
)  # fmt: skip

STEP_GPU = (
    Row("faster than the published step, both in float32", "", times("vs_published")),
    Row("ours in the best precision against the published step in float32", "3 x", times("vs_published_best"),
        at_least("vs_published_best", 3)),
)  # fmt: skip

PARTS = (
    Row("... the published step with autocast in that precision too", "", times("vs_published_mixed")),
    Row("both in float32, and the published process told to keep freed memory, as ours is", "",
        times("vs_published_memory_kept")),
)  # fmt: skip

STEP = (
    Row("peak memory against the published step's", "1 x at most", times("peak_memory_vs_published"),
        at_most("peak_memory_vs_published", 1)),
    Row("share of a step spent waiting for data", "2 % at most (GPU)", lambda v: f"{v['data_wait_share']:.2%}",
        at_most("data_wait_share", 0.02)),
)  # fmt: skip

SPEED = {
    "cpu": Row("slices a second, four views each", "", lambda v: f"{v['slices_per_second']:.1f}"),
    "gpu": Row("slices a second, four views each", "300", lambda v: f"{v['slices_per_second']:.1f}",
               at_least("slices_per_second", 300)),
}  # fmt: skip

LOSSES = (
    Row("largest difference to a plain reference in float64, value or gradient", "",
        lambda v: f"{v['largest_difference']:.0e}"),
    Row("share of ILCP, all 1,024 positions at 512 x 512", "5 % at most", lambda v: f"{v['ilcp_share_of_step']:.1%}",
        at_most("ilcp_share_of_step", 0.05)),
)  # fmt: skip


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Small sizes: for a first look, not for docs.")
@click.option("--device", default="auto", show_default=True, help="Of the steps.")
def main(quick: bool, device: str) -> None:
    """Run everything; write the tables."""
    more = ["--quick"] if quick else []
    figures = {
        "read": run("read", *more),
        "input": run("input", *more),
        "step": run("step", "--device", device, *more),
        "losses": run("losses", "--device", device, *more),
    }
    text = render(**figures, quick=quick)
    PAGES[_kind(figures["step"])].write_text(text)
    print(text)


def render(*, read: Values, input: Values, step: Values, losses: Values, quick: bool) -> str:
    """The page, from the JSON objects of the benchmarks."""
    kind = _kind(step)
    rows = (*(STEP_CPU if kind == "cpu" else STEP_GPU), *PARTS, SPEED[kind], *STEP)
    return "\n".join(
        [
            "# Benchmarks of training",
            "",
            f"Written by `make bench-training`{' with --quick' if quick else ''}: {step['processor']}, "
            f"{step['cores']} cores, Python {step['python']}, torch {step['torch']}. Every comparison was made in one "
            "run, by medians of interleaved calls; timings vary by 10 % from run to run. Conditions stand at the head "
            "of each script.",
            "",
            "## Reading: `benchmarks/read.py`",
            "",
            "Random batches of 16 whole slices, image and superpixels, as training gathers them; one core.",
            "",
            *table(READ, {"": read}),
            "",
            "## Input: `benchmarks/input.py`",
            "",
            "Our loader against a DataLoader whose workers run scikit-image's SLIC on both views of each sample; one "
            "core.",
            "",
            *table(INPUT, {"": input}),
            "",
            "## The step: `benchmarks/step.py`",
            "",
            f"{step['side']} x {step['side']}, {step['filters']} filters, {step['batch_size']} slices of four views, "
            f"{step['device']}, best precision {step['precision']}. The published step is restated in plain eager "
            "PyTorch: four forward passes, a loop over the batch, components through SciPy.",
            "",
            *table(rows, {"": step}),
            "",
            "## Losses: `benchmarks/losses.py`",
            "",
            *table(LOSSES, {losses["device"]: losses}),
            "",
            *(_not_on_a_gpu() if kind == "cpu" and not PAGES["gpu"].exists() else []),
        ]
    )


def _kind(step: Values) -> str:
    return "cpu" if step["device"] == "cpu" else "gpu"


def _not_on_a_gpu() -> list[str]:
    """The targets that only a GPU can show."""
    return [
        "## On a GPU: not measured yet",
        "",
        "`make bench-training` on a machine with one writes these rows to a page of their own. Targets are for one "
        "H100, 512 x 512, 32 filters, bfloat16.",
        "",
        "| | target |",
        "| --- | --- |",
        *(f"| {row.what} | {row.target} |" for row in (STEP_GPU[1], SPEED["gpu"], *STEP, LOSSES[-1])),
        "",
    ]


if __name__ == "__main__":
    main()
