"""The commands that apply a fine-tuned network or score label maps: `evaluate` and `predict`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from supercl_core.options import json_option, layout_option

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("scored", metavar="RUN|PREDICTIONS", type=_PATH)
@click.argument("cache", type=_PATH)
@click.option(
    "--split",
    metavar="FILE[:SECTION]",
    help="With PREDICTIONS: score the test cases of this split [default: all cases with ground truth].",
)
@click.option(
    "--part",
    type=click.Choice(["test", "validation"]),
    help="With RUN: which of its cases to segment and score [default: test].",
)
@click.option(
    "--protocol",
    type=click.Choice(["volume", "paper"]),
    default="volume",
    show_default=True,
    help="`paper` adds the scores that the published code would give.",
)
@click.option(
    "--crop",
    nargs=2,
    type=click.IntRange(min=1),
    metavar="ROWS COLUMNS",
    help="The patch of --protocol paper [default: that of RUN].",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE.json",
    type=_PATH,
    help="With PREDICTIONS: where the scores go [default: PREDICTIONS/evaluation.json].",
)
@click.option("--device", help="With RUN: such as cpu or cuda:1 [default: auto].")
@json_option
def evaluate(
    scored: Path,
    cache: Path,
    split: str | None,
    part: Literal["test", "validation"] | None,
    protocol: Literal["volume", "paper"],
    crop: tuple[int, int] | None,
    output: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Score segmentations against the ground truth in CACHE: DSC, JC, HD95 and ASD per case and class.

    With a fine-tuned RUN, its test cases are segmented first. Writes RUN/predictions (NIfTI, in the geometry of the
    sources), RUN/evaluation.json and RUN/evaluation.csv (a row a case and class), and prints the means. With --part
    validation the names are validation_predictions, validation.json and validation.csv.

    With a folder of PREDICTIONS made elsewhere, its label maps are scored as they are: one file a case, named like the
    case (the `_0000` of nnU-Net may follow), in any format that preprocessing reads, in the geometry of the case's
    source, with the classes of CACHE. Files that are missing or do not fit are listed, and stop no other (exit code 3).

    Distances are in mm, or in voxels where the data set has no spacing. The table says what counts where a structure
    is missing, and how often that was.

    \b
    Example:  supercl evaluate runs/pretrained heart.zarr
              supercl evaluate nnunet/predictions heart.zarr --split heart_split.json
    """
    from supercl_core.cache.reader import open_cache
    from supercl_core.errors import cases_failed
    from supercl_core.splits import read_split
    from train.evaluate import evaluate as evaluate_run
    from train.evaluate import evaluate_folder

    is_folder = scored.is_dir() and not (scored / "run.json").exists()
    _check_options(
        is_folder, protocol=protocol, crop=crop, split=split, output=output, part=part, device=device
    )
    opened = open_cache(cache)
    if not is_folder:
        result = evaluate_run(
            scored,
            opened,
            device_name=device or "auto",
            part=part or "test",
            crop=crop or ("patch" if protocol == "paper" else None),
        )
        _print_scores(result, scored / ("validation" if part == "validation" else "evaluation"), as_json)
        return
    case_ids = None
    if split is not None:
        ids = [row.id for row in opened.rows]
        case_ids = read_split(split, ids, data_set=opened.name, num_labelled=None).test
    result = evaluate_folder(scored, opened, case_ids=case_ids, crop=crop, output_path=output)
    _print_scores(result, (output or scored / "evaluation.json").with_suffix(""), as_json)
    if result["unused"]:
        _note("they belong to none of the cases to score", result["unused"])
    if result["failed"]:
        raise cases_failed(
            result["failed"],
            f"{len(result['failed'])} cases have no score; the means are over the others.",
            where=scored,
            next_step="Mend or add these files and run the same command again.",
        )


@click.command()
@click.argument("run", type=_PATH)
@click.argument("input_path", metavar="INPUT", type=_PATH)
@click.argument("output", metavar="OUT", type=_PATH)
@layout_option
@click.option("--device", default="auto", show_default=True, help="Such as cpu or cuda:1.")
@json_option
def predict(
    run: Path, input_path: Path, output: Path, layout: str | None, device: str, as_json: bool
) -> None:
    """Segment the volumes of INPUT with the fine-tuned RUN: OUT/<name>.nii.gz, in the geometry of each volume.

    INPUT is one file, or a folder in any layout that preprocessing takes, with as many channels as the training data.
    Volumes are normalised as preprocessing and training do. Voxels are the classes of the training data, 0 being
    background.

    The same command goes on where it stopped: files that the same network has segmented are kept, and those that are
    damaged, changed or of another network are done again (OUT/predictions.jsonl tells). A volume that cannot be
    segmented is listed at the end, and stops no other (exit code 3); what an earlier call made of it is removed.

    \b
    Example:  supercl predict runs/pretrained new_scans segmentations
              supercl predict runs/pretrained scan.nii.gz segmentations
    """
    from dataclasses import asdict

    from supercl_core.errors import cases_failed
    from train.predict import predict as start

    result = start(run, input_path, output, layout=layout, device_name=device)
    if as_json:
        click.echo(json.dumps(asdict(result), indent=1))
    else:
        classes = ", ".join(f"{number} {name}" for number, name in enumerate(result.class_names))
        click.echo(
            f"{output}: {result.num_predicted} volumes segmented, {result.num_kept} kept from before, "
            f"{len(result.failed)} failed; classes: {classes}"
        )
    if result.leftover:
        _note("they are in OUT, but of no volume of INPUT", list(result.leftover))
    if result.failed:
        raise cases_failed(
            result.failed,
            f"{len(result.failed)} volumes could not be segmented; the others are done.",
            where=input_path,
            next_step="Mend these files and run the same command again; finished ones are kept.",
        )


def _check_options(is_folder: bool, *, protocol: str, crop: tuple[int, int] | None, **options: Any) -> None:
    """Raise UsageError for options without an effect, and for a missing crop."""
    from supercl_core.errors import UsageError

    of_other = ("part", "device") if is_folder else ("split", "output")
    for name in of_other:
        if options[name] is not None:
            raise UsageError(
                f"--{name} has no effect on {'a folder of predictions' if is_folder else 'a run'}.",
                expected="a fine-tuned run" if is_folder else "predictions made elsewhere",
                found="a folder without run.json"
                if is_folder
                else "a run, whose own split and folder are used",
                next_step="Leave the option out.",
            )
    if crop is not None and protocol != "paper":
        raise UsageError(
            "--crop has no effect without --protocol paper.", next_step="Add it, or leave --crop out."
        )
    if is_folder and protocol == "paper" and crop is None:
        raise UsageError(
            "A folder of predictions does not tell the patch of the published protocol.",
            next_step="Add --crop ROWS COLUMNS; the published patches are in the split file.",
        )
    output = options["output"]
    if output is not None and output.suffix != ".json":
        raise UsageError(
            "The scores are JSON; a CSV goes beside it.",
            where=output,
            expected="a name that ends in .json",
            found=output.suffix or "no ending",
            next_step="Name such a file.",
        )


def _print_scores(result: dict[str, Any], path: Path, as_json: bool) -> None:
    """The means of an evaluation, and below them those of the published protocol where they are asked for.

    `path`: the files that hold all of it, without their endings. JSON is what such a file holds.
    """
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    _print_means(result)
    click.echo(f"scores: {path}.json and .csv")


def _print_means(result: dict[str, Any]) -> None:
    from train.metrics import METRICS

    rows = [
        (
            name,
            [values[metric] for metric in METRICS],
            values["num_cases"],
            values["num_distances"],
            f"{values['num_missing_in_prediction']} + {values['num_missing_in_truth']}",
        )
        for name, values in result["summary"].items()
    ]
    num_cases = len({row["case"] for row in result["rows"]})
    failed = f" of {num_cases + len(result['failed'])}" if result.get("failed") else ""
    _print_table(
        ("n", "distances", "missing"),
        rows,
        f"Means over {num_cases}{failed} cases, each in 3-D: DSC and JC in %, HD95 and ASD in {result['unit']}. "
        f"{result['missing_rule']}",
        "n: structures behind DSC and JC. distances: those behind HD95 and ASD. missing: in prediction + in truth.",
    )
    if (paper := result["paper"]) is None:
        return
    height, width = paper["crop"]
    _print_table(
        ("empty",),
        [
            (name, [values[metric] for metric in METRICS], values["num_empty_slices"])
            for name, values in paper["summary"].items()
        ],
        f"The published protocol, only to compare with published numbers: {paper['num_slices']} slices of {height} x "
        f"{width} pixels. {paper['description']}",
        "empty: slices whose distances count 0.",
    )


def _print_table(counts: Sequence[str], rows: Iterable[tuple[Any, ...]], *notes: str) -> None:
    """A row a class, the mean last: its name, its scores (DSC and JC in 0..1, HD95, ASD), its counts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from train.comparison import number
    from train.metrics import MEAN

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("class", overflow="fold", min_width=6)
    for title in ("DSC", "JC", "HD95", "ASD", *counts):
        table.add_column(title, justify="right", no_wrap=True)
    for name, (dsc, jc, *distances), *numbers in rows:
        in_percent = [None if value is None else 100 * value for value in (dsc, jc)]
        # Text, since a name may hold what rich takes for markup.
        cells = (name, *map(number, [*in_percent, *distances]), *map(str, numbers))
        table.add_row(*map(Text, cells), style="bold" if name == MEAN else None)
    console = Console()
    console.print(table, *map(Text, notes), sep="\n")


def _note(text: str, names: list[str]) -> None:
    """Say something of some files on stderr."""
    from supercl_core.errors import some_of
    from supercl_core.messages import note

    note(f"{len(names)} files ({some_of(names)}): {text}")
