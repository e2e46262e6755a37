"""The commands that need neither half: `inspect`, `view`, `verify`, `pack`, `unpack`, `split`, `doctor`."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from supercl_core.errors import printable
from supercl_core.options import json_option

if TYPE_CHECKING:
    from supercl_core.archive.forms import Conversion
    from supercl_core.cache.reader import Cache


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("case", required=False)
@click.option("--pairs", is_flag=True, help="Audit the pairs that the weak labels of CACHE make.")
@click.option(
    "--labels", metavar="NAME", help="With --pairs: these weak labels [default: all, the default ones first]."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="With --pairs: slices of a batch, for the positives to expect [default: 32].",
)
@click.option(
    "--split",
    metavar="FILE[:SECTION]",
    help="With --pairs: leave the test cases of this split out, also those under other names.",
)
@click.option(
    "--gallery",
    metavar="FILE.png",
    type=click.Path(path_type=Path),
    help="With --pairs: draw components of the (first) labels.",
)
@json_option
def inspect(
    cache: Path,
    case: str | None,
    pairs: bool,
    labels: str | None,
    batch_size: int | None,
    split: str | None,
    gallery: Path | None,
    as_json: bool,
) -> None:
    """Show what CACHE holds, or one CASE of it: cases, slices, sizes, spacing, weak labels, settings, failures.

    With --pairs, how good the pairs of its weak labels are: per level how many there are, and how alike the ground
    truth of paired slices is. To choose labels by it, leave the test cases out with --split.

    \b
    Example:  supercl inspect heart.zarr
              supercl inspect heart.zarr la_003 --json
              supercl inspect heart.zarr --pairs --split heart_split.json --gallery pairs.png
    """
    from supercl_core.cache.reader import open_cache
    from supercl_core.showing import inspection

    options = {"--labels": labels, "--batch-size": batch_size, "--split": split, "--gallery": gallery}
    _check_pairs_options(pairs, case, {name: value for name, value in options.items() if value is not None})
    opened = open_cache(cache)
    if pairs:
        _inspect_pairs(opened, labels, batch_size or 32, split, gallery, as_json)
        return
    values = inspection.summary(opened) if case is None else inspection.case_summary(opened, case)
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        _print_rows(inspection.summary_rows(values) if case is None else inspection.case_rows(values))


def _check_pairs_options(pairs: bool, case: str | None, given: dict[str, Any]) -> None:
    """Raise UsageError for options of `inspect` that do not go together."""
    from supercl_core.errors import UsageError

    if given and not pairs:
        raise UsageError(
            "The option is about pairs.",
            expected=f"{', '.join(given)} together with --pairs",
            found="no --pairs",
            next_step="Add --pairs.",
        )
    if pairs and case is not None:
        raise UsageError(
            "Pairs are those of a whole cache.",
            expected="--pairs without a case",
            found=f"the case {case}",
            next_step="Leave the case or --pairs out.",
        )
    if "--gallery" in given:
        _check_suffix(given["--gallery"], ".png")


def _inspect_pairs(
    cache: Cache, name: str | None, batch_size: int, split: str | None, gallery: Path | None, as_json: bool
) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from supercl_core.messages import note
    from supercl_core.showing import pair_audit
    from supercl_core.splits import read_split

    test_case_ids: tuple[str, ...] = ()
    if split is not None:
        ids = [row.id for row in cache.rows]
        test_case_ids = read_split(split, ids, data_set=cache.name, num_labelled=None).test
    default = cache.attributes["default_weak_labels"]
    names = [name or default]
    if name is None:
        stored = sorted(cache.set_names("weak_labels"), key=lambda other: other != default)
        stale = [other for other in stored if cache.is_stale("weak_labels", other)]
        names = [other for other in stored if other not in stale] or names
        if stale:
            note(f"stale, left out: {', '.join(stale)}")
    labels = [cache.weak_labels(one) for one in names]
    audits = [
        pair_audit.audit(cache, one, batch_size=batch_size, test_case_ids=test_case_ids) for one in labels
    ]
    if gallery is not None:
        from supercl_core.showing.pair_gallery import write_gallery

        write_gallery(gallery, cache, labels[0], batch_size=batch_size, test_case_ids=test_case_ids)
    if as_json:
        values = {"path": str(cache.path), "weak_labels": [asdict(found) for found in audits]}
        click.echo(json.dumps(values, indent=1, allow_nan=False))
    else:
        # Where there is no terminal, rich takes 80 columns.
        width = None if sys.stdout.isatty() else pair_audit.TABLE_COLUMNS
        Console(width=width).print(pair_audit.render(audits))
    if gallery is not None:
        click.echo(gallery, err=as_json)


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("case")
@click.argument("z", type=int, required=False)
@click.option("--html", "as_page", is_flag=True, help="A page to scroll through the whole case.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write it [default: CASE_zZ.png or CASE.html, here].",
)
def view(cache: Path, case: str, z: int | None, as_page: bool, output: Path | None) -> None:
    """Draw slice Z of a CASE of CACHE: superpixels, ASP map, ground truth, nearest neighbours. Z counts from 0.

    With --html a page of all slices, which opens at Z or in the middle of the case, and needs no network.

    \b
    Example:  supercl view heart.zarr la_003 60
              supercl view heart.zarr la_003 --html -o la_003.html
    """
    from supercl_core.cache.reader import open_cache
    from supercl_core.errors import UsageError

    opened = open_cache(cache).case(case)
    if z is None and not as_page:
        last = opened.row.shape[1] - 1
        raise UsageError(
            "The slice is missing.",
            where=f"case {case}",
            expected=f"Z, 0 to {last}",
            found="none",
            next_step="Name a slice, or ask for a page of all slices with --html.",
        )
    suffix = ".html" if as_page else ".png"
    path = output or Path(case + suffix if as_page else f"{case}_z{z}{suffix}")
    _check_suffix(path, suffix)
    if as_page:
        from supercl_core.showing.view_page import write_page

        write_page(path, opened, z)
    else:
        from supercl_core.showing.view import write_contact_sheet

        assert z is not None
        write_contact_sheet(path, opened, z)
    click.echo(path)


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: one a core].")
@json_option
def verify(cache: Path, workers: int | None, as_json: bool) -> None:
    """Check all of CACHE: files, checksums, shard indexes, metadata, tables, superpixels and weak labels.

    Every byte is read, and nothing is changed. Damage is listed, the file below CACHE with its problem (exit code 4);
    `supercl repair CACHE` computes the damaged cases again, and only those. Of a cache that is not complete yet, the
    cases that are in it are checked.

    \b
    Example:  supercl verify heart.zarr
              supercl verify heart.zarr --json | jq -r '.damages[].case_id' | sort -u
    """
    from dataclasses import asdict

    from supercl_core.checks import verification
    from supercl_core.errors import CacheError
    from supercl_core.machine import num_cores
    from supercl_core.progress import progress

    num_workers = workers or num_cores()
    with progress("verify", total=verification.num_committed(cache), unit="cases") as advance:
        found = verification.verify(cache, num_workers=num_workers, on_case=advance)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        for damage in found.damages:
            click.echo(printable(f"{damage.where}: {damage.problem}"))
        click.echo(f"{cache}: {found.summary()}")
    if found.damages:
        num_cases = len({damage.case_id for damage in found.damages} - {""})
        raise CacheError(
            "The cache is damaged.",
            where=cache,
            found=f"{len(found.damages):,} damages, {num_cases:,} damaged cases",
            next_step=f"supercl repair {cache}",
        )


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: one a core].")
def pack(cache: Path, archive: Path, workers: int | None) -> None:
    """Write CACHE as ARCHIVE, compressed: a folder for an object store, or one file where its name ends in .zip.

    ARCHIVE is Zarr like CACHE, and opens with any reader of Zarr; training needs the cache. Every slice is checked
    on the way. Run again after a stop, it goes on with the cases that ARCHIVE.wip does not have yet.

    \b
    Example:  supercl pack heart.zarr heart.zip
              supercl unpack heart.zip heart.zarr
    """
    from supercl_core.archive import forms
    from supercl_core.machine import num_cores

    done = forms.pack(cache, archive, num_workers=workers or num_cores())
    click.echo(f"{archive}: {_conversion(done)}")


@click.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Threads [default: one a core].")
def unpack(archive: Path, cache: Path, workers: int | None) -> None:
    """Write the cache that ARCHIVE holds to CACHE, equal in every byte to the one that was packed.

    Every slice is checked on the way; damaged cases are listed, and the others unpacked (exit code 4). Run again after
    a stop, or with a sound copy of ARCHIVE, it goes on with the cases that CACHE does not have yet.

    \b
    Example:  supercl unpack heart.zip heart.zarr
    """
    from supercl_core.archive import forms
    from supercl_core.machine import num_cores

    done = forms.unpack(archive, cache, num_workers=workers or num_cores())
    click.echo(f"{cache}: {_conversion(done)}")


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--test-fraction", default=0.25, show_default=True, help="Share of the labelled cases for testing."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffle.")
def split(cache: Path, file: Path, test_fraction: float, seed: int) -> None:
    """Write a random split of CACHE's labelled cases to FILE (JSON), with nested lists of 1, 2, 4, ... cases.

    Cases of one patient stay together, on one side of the split and in the same lists: both frames of a patient of
    ACDC, and cases of identical content.

    \b
    Example:  supercl split heart.zarr heart_split.json
              supercl pretrain heart.zarr runs/pretrain --split heart_split.json
    """
    from supercl_core.cache.cases import identical_cases
    from supercl_core.cache.reader import open_cache
    from supercl_core.errors import UsageError, some_of
    from supercl_core.messages import next_command, note
    from supercl_core.splits import next_pretraining, write_random_split

    if not 0 < test_fraction < 1:
        raise UsageError(
            "The test fraction is out of range.",
            expected="a number between 0 and 1",
            found=test_fraction,
            next_step="Ask for --test-fraction 0.25, for example.",
        )
    rows = open_cache(cache).done
    num_test, num_train = write_random_split(file, rows, test_fraction=test_fraction, seed=seed)
    for identical in identical_cases([row for row in rows if row.has_ground_truth]):
        note(f"cases of identical content stay together: {some_of(identical)}")
    click.echo(f"{file}: {num_test} cases for testing, {num_train} for training")
    next_command(*next_pretraining(cache, rows, "--split", file))


@click.command()
@click.argument(
    "folder", required=False, default=".", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@json_option
def doctor(folder: Path, as_json: bool) -> None:
    """Show what this machine and this installation have, and what is missing for which command.

    Cores and threads with what limits them, memory, GPUs, versions; free space of FOLDER [default: here] and how fast
    it takes a file of 32 MiB, which is removed. Problems come first (exit code 1). A half that is not installed is
    none: a node often needs only one.

    \b
    Example:  supercl doctor /scratch
              supercl doctor --json | jq .extras.train.missing
    """
    from supercl_core.doctor import examine, problems, rows
    from supercl_core.errors import SuperCLError

    facts = examine(folder)
    found = list(problems(facts))
    if as_json:
        listed = [{"what": what, "next_step": next_step} for what, next_step in found]
        click.echo(json.dumps({"problems": listed, **facts}, indent=1))
    else:
        _print_rows(rows(facts))
    if found:
        raise SuperCLError(
            f"Problems: {len(found)}.", next_step="Mend what the first lines above say; the rest is in order."
        )


def _check_suffix(path: Path, suffix: str) -> None:
    """Raise UsageError where the name of a file to be written asks for another format."""
    from supercl_core.errors import UsageError

    if path.suffix.lower() != suffix:
        raise UsageError(
            "The name of the file asks for another format.",
            where=path,
            expected=f"a name that ends in {suffix}",
            found=path.suffix or "no ending",
            next_step=f"Name it {path.stem}{suffix}, for example.",
        )


def _conversion(done: Conversion) -> str:
    """One line on what packing or unpacking did."""
    share = done.archive_bytes / max(done.cache_bytes, 1)
    kept = "all of them" if done.num_kept == done.num_cases else f"{done.num_kept:,}"
    return (
        f"{done.num_cases:,} cases, {kept} from before; {done.cache_bytes / 1e6:,.1f} MB in the cache, "
        f"{done.archive_bytes / 1e6:,.1f} MB in the archive ({share:.0%})"
    )


def _print_rows(rows: list[tuple[str, str]]) -> None:
    """Print names and texts in two columns, folded to a terminal's width; one line each where there is none."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    indent = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        lines = textwrap.wrap(printable(text), max(columns - indent, 20), break_on_hyphens=False) or [""]
        for index, line in enumerate(lines):
            click.echo(click.style(("" if index else name).ljust(indent), bold=True) + line)
