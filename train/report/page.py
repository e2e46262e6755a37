"""The report: one self-contained HTML page for one or several runs, or for a study, finished or not.

What a page shows is gathered by `train.report.runs` or `train.report.study` and rendered here with a template of the
same name. Called by the command `supercl report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from supercl_core.errors import UsageError
from supercl_core.files import write_text
from train.bootstrap import DIFFERENCE_RULE, INTERVAL_RULE
from train.comparison import difference_text, number
from train.report.runs import runs_page
from train.report.study import study_page


def write_report(paths: Sequence[Path], output: Path, *, cache_path: Path | None = None) -> Path:
    """Write the report of at least one run folder, or of one study folder, to `output`, atomically; return `output`.

    Pictures of cases come from the cache at `cache_path`, or else from the one that the first run names; they
    are left out, with a sentence, where it cannot be read. The page asks for nothing outside itself.

    Raises UsageError where a study is not the only path, and SuperCLError where a path is no run, where a file of a
    run or the results of a study are damaged, and where evaluated runs cannot be compared.
    """
    studies = [path for path in paths if is_study(path)]
    if studies and len(paths) > 1:
        raise UsageError(
            "A study has a page of its own.",
            where=studies[0],
            expected="one study, or runs only",
            found=f"{len(paths)} paths",
            next_step="Write a page for each: `supercl report STUDY -o study.html`.",
        )
    if studies:
        name, page = "study.html.jinja", study_page(studies[0], cache_path=cache_path)
    else:
        name, page = "runs.html.jinja", runs_page(paths, cache_path=cache_path)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(interval_rule=INTERVAL_RULE, difference_rule=DIFFERENCE_RULE)
    environment.filters.update(number=number, percent=_percent, difference=difference_text)
    write_text(output, environment.get_template(name).render(page))
    return output


def is_study(path: Path) -> bool:
    """Whether a folder is that of a study, and not of a run."""
    return (path / "study.json").is_file()


def _percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)
