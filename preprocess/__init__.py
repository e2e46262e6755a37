"""The offline half: volumes in, superpixel cache with weak labels out. Never imports `train` or torch.

`preprocess.run` does everything; `preprocess.weak_labels` computes the weak labels of a cache again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preprocess.ccl import weak_labels
    from preprocess.runner import run

__all__ = ["run", "weak_labels"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from preprocess.runner import run

        return run
    if name == "weak_labels":
        from preprocess.ccl import weak_labels

        return weak_labels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
