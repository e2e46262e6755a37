"""The training half: pre-training, fine-tuning and evaluation on a cache. Never imports `preprocess`, dask or numba.

`train.pretrain` and `train.finetune` do what the commands do; `train.SliceDataset` gives the cache's slices to any
training; `train.load_encoder` moves a pre-trained encoder into a network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data import SliceDataset
    from train.finetuning import finetune
    from train.models.weights import load_encoder
    from train.pretraining import pretrain

__all__ = ["SliceDataset", "finetune", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
    if name == "SliceDataset":
        from train.data import SliceDataset

        return SliceDataset
    if name == "pretrain":
        from train.pretraining import pretrain

        return pretrain
    if name == "finetune":
        from train.finetuning import finetune

        return finetune
    if name == "load_encoder":
        from train.models.weights import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
