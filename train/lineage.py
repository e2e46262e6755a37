"""What weights have learned from: the runs behind them, and the cases of each.

A run keeps it in its run.json, `supercl export` in the header of safetensors files. Called by both ends: fine-tuning,
which refuses weights that know the labels of held-out cases, and the export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from supercl_core.errors import SuperCLError
from supercl_core.files import parse_json
from train import run_shapes, runs
from train.models.weights import read_metadata

KEY: Final = "lineage"
"""In the header of a safetensors file."""


def read_lineage(source: Path | str) -> list[dict[str, Any]]:
    """The runs that the weights `source` (a run, or a file of weights) come from, the last one last.

    Each has its `kind`, the name of its `data_set`, and its `content_digests`: case id -> digest of the content. Empty
    where nobody wrote it down, as in foreign weights. Raises SuperCLError where what is written cannot be read.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if (folder / "run.json").is_file():
        run = runs.read_run(folder)
        own = {
            "kind": run["kind"],
            "data_set": run["cache"]["name"],
            "content_digests": run["content_digests"],
        }
        return [*run["lineage"], own]
    try:
        lineage: list[dict[str, Any]] = parse_json(read_metadata(path).get(KEY, "[]"))
        run_shapes.check(lineage, run_shapes.LINEAGE)
    except ValueError as error:
        raise SuperCLError(
            "What the weights have learned from cannot be read.",
            where=path,
            expected=f"{KEY!r} in the header as `supercl export` writes it",
            found=error,
            next_step="Export the run again, or start from the run itself.",
        ) from error
    return lineage
