"""The commands of the offline half: `phantom`, `preprocess`, `weak-labels`."""

from __future__ import annotations

from pathlib import Path

import click


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
    from supercl_core.progress import progress

    with progress("phantom", total=cases, unit="cases") as advance:
        write_phantom(out, num_cases=cases, seed=seed, on_case=lambda _: advance())
    click.echo(f"{out}: {cases} cases")


@click.command()
@click.argument("input_path", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes on this machine [default: one a core]."
)
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask scheduler, such as tcp://host:8786.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Settings in a TOML file.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; may be repeated."
)
def preprocess(
    input_path: Path,
    cache: Path,
    workers: int | None,
    scheduler: str | None,
    config_path: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Turn the volumes in INPUT into the superpixel cache CACHE; run it again to go on after a stop.

    INPUT is a task of the Medical Segmentation Decathlon, or any folder of volumes (NIfTI, NRRD, MetaImage).
    Every slice gets SLIC superpixels and an average-superpixel map; the data set gets CCL weak labels.
    A case that fails is listed at the end and stops nothing (exit code 3).

    \b
    Settings (for --config and --set):
      n_segments   superpixels that SLIC aims at in a slice     [100]
      compactness  weight of distance against lightness         [10.0]
      image_dtype  source (lossless) or int16 (quantised)       [source]
      spacing      file, or unknown where the files' spacing
                   means nothing (distances then in voxels)     [file]

    \b
    Example:  supercl preprocess Task02_Heart heart.zarr --workers 8
    """
    from preprocess.pipeline import PreprocessConfig
    from preprocess.runner import run
    from supercl_core.config import resolve
    from supercl_core.errors import CasesFailedError, UsageError

    if workers and scheduler:
        raise UsageError(
            "--workers has no effect with --scheduler.",
            next_step="Leave one of them out: a scheduler has workers of its own.",
        )
    config = resolve(PreprocessConfig, config_path=config_path, assignments=assignments)
    result = run(input_path, cache, config=config, num_workers=workers, scheduler=scheduler)
    for case_id in result.vanished:
        click.echo(f"note: the input no longer has the case {case_id}; the cache keeps it", err=True)
    click.echo(
        f"{cache}: {result.num_computed} cases computed, {result.num_kept} kept from before, "
        f"{len(result.failed)} failed"
    )
    if result.failed:
        lines = "\n".join(f"    {row.id}: {row.reason}" for row in result.failed)
        raise CasesFailedError(
            f"{len(result.failed)} cases failed; the others are in the cache.",
            where=cache,
            found=f"\n{lines}",
            next_step="Mend these files and run the same command again; finished cases are kept.",
        )


@click.command("weak-labels")
@click.argument("cache", type=click.Path(path_type=Path))
def weak_labels(cache: Path) -> None:
    """Compute the CCL weak labels of CACHE again, from its average-superpixel maps.

    \b
    Example:  supercl weak-labels heart.zarr
    """
    from preprocess.ccl import weak_labels as compute
    from supercl_core.cache_reader import open_cache

    hierarchy = compute(open_cache(cache))
    click.echo(f"{cache}: components of each level: {' '.join(map(str, hierarchy.num_components))}")
