"""Connected components of a graph given by its edges. Called by `preprocess.ccl`."""

from __future__ import annotations

import numpy as np

from preprocess.kernels import kernel


@kernel
def connected_components(num_nodes: int, edges_start: np.ndarray, edges_end: np.ndarray) -> np.ndarray:
    """Component of every node of an undirected graph.

    `edges_start`, `edges_end`: integers (e,), each in 0..num_nodes-1. Returns int32 (num_nodes,): components are
    numbered from 0 in the order of their smallest node, so the result does not depend on the order of the edges.
    Union-find by Rem's algorithm (Patwary, Blair, Manne, SEA 2010): the two paths to the roots are walked together,
    the step with the larger parent first, and each node passed is hung below the smaller one.
    """
    parent = np.arange(num_nodes, dtype=np.int32)
    for edge in range(len(edges_start)):
        a, b = edges_start[edge], edges_end[edge]
        parent_a, parent_b = parent[a], parent[b]
        while parent_a != parent_b:
            if parent_a < parent_b:
                a, parent_a, b, parent_b = b, parent_b, a, parent_a
            parent[a] = parent_b
            if parent_a == a:  # a root: now the trees are one
                break
            a, parent_a = parent_a, parent[parent_a]
    labels, count = parent, 0
    for node in range(num_nodes):
        # A parent is never larger than its node, so the parent holds its label already.
        if parent[node] == node:
            labels[node] = count
            count += 1
        else:
            labels[node] = labels[parent[node]]
    return labels
