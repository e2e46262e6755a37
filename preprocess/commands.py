"""The commands of the offline half: `phantom`, `preprocess`, `repair`, `weak-labels`, `quality`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from supercl_core.options import json_option, layout_option

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from preprocess.ccl import Search
    from preprocess.cluster import SlurmConfig
    from preprocess.pipeline import PreprocessConfig
    from preprocess.runner import RunResult
    from supercl_core.cache.cases import CaseRow
    from supercl_core.cache.weak_labels import LinkRule
    from supercl_core.errors import SuperCLError


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--cases", default=24, show_default=True, help="Number of cases.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
def phantom(out: Path, cases: int, seed: int) -> None:
    """Write a labelled data set of synthetic anatomy to the new folder OUT (Medical Segmentation Decathlon layout).

    \b
    Example:  supercl phantom phantom --cases 24
              supercl preprocess phantom phantom.zarr
    """
    from preprocess.phantom import write_phantom
    from supercl_core.messages import next_command
    from supercl_core.progress import progress

    with progress("phantom", total=cases, unit="cases") as advance:
        write_phantom(out, num_cases=cases, seed=seed, on_case=lambda _: advance())
    click.echo(f"{out}: {cases} cases")
    next_command("preprocess", out, f"{out}.zarr")


@click.command()
@click.argument("input_path", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@layout_option
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes on this machine [default: one a core]."
)
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask scheduler, such as tcp://host:8786.")
@click.option(
    "--slurm",
    "slurm_path",
    metavar="FILE.toml",
    type=click.Path(path_type=Path),
    help="Jobs of a Slurm cluster.",
)
@click.option(
    "--slic",
    type=click.Choice(["fast", "exact", "skimage"]),
    help="The same as --set slic=...: how superpixels are found.",
)
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Settings in a TOML file.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; may be repeated."
)
@click.option("--retry-failed", is_flag=True, help="Also try failed cases again whose files are unchanged.")
@click.option("--dry-run", is_flag=True, help="Measure a few slices, and print what the run would take.")
@json_option
def preprocess(
    input_path: Path,
    cache: Path,
    layout: str | None,
    workers: int | None,
    scheduler: str | None,
    slurm_path: Path | None,
    slic: str | None,
    config_path: Path | None,
    assignments: tuple[str, ...],
    retry_failed: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Turn the volumes in INPUT into the superpixel cache CACHE; run it again to go on after a stop.

    INPUT is a folder: volumes (NIfTI, NRRD, MetaImage), DICOM series, 2-D images or arrays; a data set as the Medical
    Segmentation Decathlon, nnU-Net v2 or BIDS arrange it; or one of the publication's as it is distributed. Which of
    these is recognised (docs/inputs.md); --layout names it where it is not.

    Every slice gets SLIC superpixels and an average-superpixel map; the data set gets CCL weak labels.
    A case that fails is listed at the end, and by `supercl inspect`, and stops nothing (exit code 3).

    Run again on a finished cache, it computes what is new, what changed (by the content of its files) and failed cases
    whose files were mended. While it runs, CACHE.lock beside the cache keeps other writers out.

    --slurm starts and ends jobs as needed; FILE.toml holds maximum_jobs, cores and memory (of a job), and any other
    option of dask-jobqueue's SLURMCluster, such as queue, account, walltime and job_script_prologue.

    \b
    Settings (for --config and --set):
      slic              fast; exact (scikit-image's superpixels, six
                        times faster); skimage (itself)          [fast]
      n_segments        superpixels that SLIC aims at in a slice [100]
      compactness       weight of distance against lightness     [10.0]
      foreground_above  pixels of at most this value in every channel
                        get no superpixels of their own          [none]
      image_dtype       source (lossless) or int16 (quantised)   [source]
      spacing           file, or unknown where the files' spacing
                        means nothing (distances then in voxels) [file]

    \b
    Example:  supercl preprocess Task02_Heart heart.zarr --dry-run
              supercl preprocess Task02_Heart heart.zarr --workers 8
    """
    from preprocess.cluster import read_slurm
    from preprocess.pipeline import PreprocessConfig
    from preprocess.runner import run
    from supercl_core.cache.reader import open_cache
    from supercl_core.config import resolve
    from supercl_core.errors import UsageError
    from supercl_core.messages import next_command
    from supercl_core.splits import next_after_cache

    if sum(way is not None for way in (workers, scheduler, slurm_path)) > 1:
        raise UsageError(
            "--workers, --scheduler and --slurm exclude each other.",
            next_step="Keep one of them: a scheduler and Slurm jobs have workers of their own.",
        )
    if slic is not None:
        assignments = (*assignments, f"slic={slic}")
    config = resolve(PreprocessConfig, config_path=config_path, assignments=assignments)
    slurm = None if slurm_path is None else read_slurm(slurm_path)
    if dry_run:
        _dry_run(input_path, cache, config, layout, workers, scheduler, slurm, as_json)
        return
    result = run(
        input_path,
        cache,
        config=config,
        num_workers=workers,
        scheduler=scheduler,
        slurm=slurm,
        retry_failed=retry_failed,
        layout=layout,
    )
    _note("their files changed, they were computed again", result.changed)
    _note("the input no longer has them, the cache keeps them", result.vanished)
    for ids in result.identical:
        _note("their content is identical; keep them together in a split", ids)
    if as_json:
        click.echo(json.dumps(_values(result), indent=1))
    else:
        click.echo(
            f"{cache}: {result.num_computed} cases computed, {result.num_kept} kept from before, "
            f"{len(result.failed)} failed"
        )
    if result.failed:
        raise _failed(cache, result.failed)
    next_command(*next_after_cache(cache, open_cache(cache).done))


def _values(result: RunResult) -> dict[str, Any]:
    """What a run did, as values that JSON can hold."""
    from dataclasses import asdict

    failed = [{"case": row.id, "reason": row.reason} for row in result.failed]
    return {**asdict(result), "cache_path": str(result.cache_path), "failed": failed}


def _note(text: str, case_ids: tuple[str, ...]) -> None:
    """Say something of some cases on stderr."""
    from supercl_core.errors import some_of
    from supercl_core.messages import note

    if case_ids:
        note(f"{len(case_ids)} cases ({some_of(case_ids)}): {text}")


def _failed(cache: Path, failed: tuple[CaseRow, ...]) -> SuperCLError:
    from supercl_core.errors import CasesFailedError

    lines = "\n".join(f"    {row.id}: {row.reason}" for row in failed)
    return CasesFailedError(
        f"{len(failed)} cases failed; the others are in the cache.",
        where=cache,
        found=f"\n{lines}",
        next_step="Mend these files and run the same command again; finished cases are kept. With --retry-failed it "
        "tries cases again whose files are the same.",
    )


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("input_path", metavar="[INPUT]", required=False, type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: one a core].")
@json_option
def repair(cache: Path, input_path: Path | None, workers: int | None, as_json: bool) -> None:
    """Find all damage of CACHE, and compute damaged cases again from the volumes that it was made from.

    Only these are computed; tables and weak labels are written anew. INPUT is needed where the volumes are not where
    they were.

    \b
    Example:  supercl verify heart.zarr
              supercl repair heart.zarr
    """
    from dataclasses import asdict

    from preprocess.runner import repair as mend
    from supercl_core.errors import printable

    found, result = mend(cache, input_path, num_workers=workers)
    if as_json:
        mended = None if result is None else _values(result)
        click.echo(json.dumps({"found": asdict(found), "mended": mended}, indent=1))
    else:
        for damage in found.damages:
            click.echo(printable(f"{damage.where}: {damage.problem}"))
        click.echo(
            f"{cache}: no damage"
            if result is None
            else f"{cache}: {result.num_computed} cases computed again"
        )
    if result is not None and result.failed:
        raise _failed(cache, result.failed)


def _dry_run(
    input_path: Path,
    cache: Path,
    config: PreprocessConfig,
    layout: str | None,
    workers: int | None,
    scheduler: str | None,
    slurm: SlurmConfig | None,
    as_json: bool,
) -> None:
    """Print what a run would take, and the script of a Slurm job."""
    from dataclasses import asdict

    from preprocess.cluster import THREADS_PER_WORKER, connect, job_script
    from preprocess.estimate import estimate, render
    from preprocess.plan import make_plan
    from supercl_core.machine import num_cores
    from supercl_core.messages import note
    from supercl_core.sources import discover

    source = discover(input_path, layout)
    note(*source.notes(input_path))
    plan = make_plan(source, cache.resolve(), config)
    note(*(f"cannot be read: {row.id}: {row.reason}" for row in plan.failed))
    if slurm is not None:
        workers = slurm.maximum_jobs * slurm.num_processes
    elif scheduler is not None:
        with connect(scheduler=scheduler) as cluster:
            workers = max(1, cluster.num_threads() // THREADS_PER_WORKER)
    workers = workers or num_cores()
    measured = estimate(plan, cache.resolve(), config=config) if plan.todo else None
    if as_json:
        values: dict[str, Any] = {
            "num_kept": len(plan.kept),
            "num_failed": len(plan.failed),
            "num_workers": workers,
        }
        if measured is not None:
            bounds = {"worker_bytes": measured.worker_bytes, "wall_s": measured.wall_s(workers)}
            values |= {**asdict(measured), **bounds}
        click.echo(json.dumps(values, indent=1))
        return
    if measured is None:
        click.echo(f"{cache}: nothing to do; {len(plan.kept)} cases kept, {len(plan.failed)} cannot be read")
        return
    click.echo(render(measured, plan, workers))
    if slurm is not None:
        click.echo(f"\n{job_script(slurm)}")


@click.command("weak-labels")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--descriptors",
    metavar="NAME",
    default="intensity",
    show_default=True,
    help="What slices are compared by: intensity, or what `supercl describe` has stored under NAME.",
)
@click.option(
    "--neighbours",
    type=click.Choice(["auto", "any", "other-cases"]),
    default="auto",
    show_default=True,
    help="Whether slices of one patient may be linked; auto: not where there are two patients.",
)
@click.option(
    "--search",
    type=click.Choice(["auto", "exact", "approximate"]),
    default="auto",
    show_default=True,
    help="auto is exact up to 250,000 slices; approximate needs the extra `index`.",
)
@click.option(
    "--keep-default", is_flag=True, help="Store the labels, but leave the cache's default as it is."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Dask processes [default: threads of this one, one a core]."
)
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask scheduler, such as tcp://host:8786.")
def weak_labels(
    cache: Path,
    descriptors: str,
    neighbours: LinkRule,
    search: Search,
    keep_default: bool,
    workers: int | None,
    scheduler: str | None,
) -> None:
    """Compute CCL weak labels of CACHE: which slices are positive pairs in pre-training (IGCP).

    Every slice is linked to its nearest neighbour; linked slices share a label; groups are averaged and linked again,
    to coarser and coarser levels. Labels are stored under the name of their descriptors (NAME, or NAME-any) beside
    those that are there, and become the default of the cache. Equal descriptors give equal labels, whatever the
    workers. A stop leaves the labels of before.

    \b
    Example:  supercl weak-labels heart.zarr --neighbours any
              supercl describe heart.zarr --encoder runs/pretrain
              supercl weak-labels heart.zarr --descriptors pretrain
              supercl inspect heart.zarr --pairs
    """
    from concurrent.futures import ThreadPoolExecutor

    from preprocess.ccl import weak_labels as compute
    from preprocess.cluster import connect
    from supercl_core.cache.reader import open_cache
    from supercl_core.errors import UsageError
    from supercl_core.machine import num_cores

    if workers is not None and scheduler is not None:
        raise UsageError(
            "--workers and --scheduler exclude each other.",
            next_step="Keep one of them: a scheduler has workers of its own.",
        )
    opened = open_cache(cache)
    with ExitStack() as stack:
        executor: Executor
        if workers is None and scheduler is None:
            executor = stack.enter_context(ThreadPoolExecutor(num_cores()))
        else:
            cluster = stack.enter_context(connect(num_workers=workers or 1, scheduler=scheduler))
            executor = cluster.client.get_executor(pure=False)
        name = compute(
            opened,
            descriptors,
            neighbours=neighbours,
            search=search,
            executor=executor,
            make_default=not keep_default,
        )
    labels = open_cache(cache).weak_labels(name)
    counts = " > ".join(f"{count:,}" for count in labels.num_components)
    click.echo(f"{cache}: weak labels {name!r} of {labels.ccl.shape[1]:,} slices: {counts} components")


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--slices",
    "num_slices",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Slices to measure, spread over the cases.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: one a core].")
@click.option("--picture", metavar="FILE.png", type=click.Path(path_type=Path), help="Draw a few slices.")
@json_option
def quality(cache: Path, num_slices: int, workers: int | None, picture: Path | None, as_json: bool) -> None:
    """Compare the superpixels of CACHE with scikit-image's of the same slices.

    Shown in percent points, as means over cases, with a 95 % interval of the difference by bootstrap over cases:
    explained variance, and where there is ground truth achievable segmentation accuracy, boundary recall and
    under-segmentation error (the only one where less is better). Then number and size of the superpixels.

    \b
    Example:  supercl quality heart.zarr --picture heart.png
    """
    from rich.console import Console

    from preprocess import quality_report
    from supercl_core.cache.reader import open_cache
    from supercl_core.errors import UsageError
    from supercl_core.machine import num_cores

    if picture is not None and picture.suffix.lower() != ".png":
        raise UsageError(
            "The picture has another format than PNG.",
            where=picture,
            expected="a file name that ends in .png",
            found=picture.suffix or "no ending",
            next_step="Name it --picture quality.png, for example.",
        )
    opened = open_cache(cache)
    if picture is not None:
        quality_report.write_picture(picture, opened)
    values = quality_report.assess(opened, num_slices=num_slices, num_workers=workers or num_cores())
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        Console().print(quality_report.render(values))
