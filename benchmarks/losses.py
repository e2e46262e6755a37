"""How far the contrastive loss is from an independent plain reference, in value and in gradient, in float64.

    python -m benchmarks.losses        (part of make bench)

The reference is a loop in NumPy with a gradient derived by hand (tests/references.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from train.losses.contrastive import supervised_contrastive

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import references

GROUPS, ITEMS, WIDTH = 2, 24, 8


def main() -> None:
    """Print the largest differences for random and for degenerate pairs."""
    generator = np.random.default_rng(0)
    ids = {
        "random superpixels": generator.integers(0, 5, (GROUPS, ITEMS)),
        "one superpixel": np.zeros((GROUPS, ITEMS), int),
        "every pixel its own superpixel": np.tile(np.arange(ITEMS // 2), (GROUPS, 2)),
        "anchors without a positive": np.tile(np.maximum(np.arange(ITEMS), 3), (GROUPS, 1)),
        "no positive at all": np.tile(np.arange(ITEMS), (GROUPS, 1)),
    }
    print(f"{'loss against plain reference, float64':40} {'value':>9} {'gradient':>9}")
    for name, labels in ids.items():
        positives = labels[:, :, None] == labels[:, None, :]
        embeddings = generator.normal(size=(GROUPS, ITEMS, WIDTH))
        tensor = torch.from_numpy(embeddings).requires_grad_()
        value = supervised_contrastive(tensor, torch.from_numpy(positives))
        value.backward()
        assert tensor.grad is not None
        expected, gradient = references.supervised_contrastive(embeddings, positives)
        difference = np.abs(tensor.grad.numpy() - gradient).max()
        print(f"{name:40} {abs(value.item() - expected):9.1e} {difference:9.1e}")


if __name__ == "__main__":
    main()
