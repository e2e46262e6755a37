"""Connected components of a graph given by its edges. Called by `preprocess.ccl`."""

from __future__ import annotations

import numpy as np

from preprocess.kernels import kernel


@kernel
def connected_components(num_nodes: int, edges_start: np.ndarray, edges_end: np.ndarray) -> np.ndarray:
    """Component of every node of an undirected graph.

    `edges_start`, `edges_end`: integers (e,), each in 0..num_nodes-1. Returns int32 (num_nodes,): components are
    numbered from 0 in the order of their smallest node. Union-find with path halving; the smaller root wins, so
    the result does not depend on the order of the edges (Tarjan, J. ACM 22, 1975).
    """
    parent = np.arange(num_nodes)
    for edge in range(len(edges_start)):
        a, b = edges_start[edge], edges_end[edge]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        else:
            parent[a] = b
    labels = np.empty(num_nodes, np.int32)
    count = 0
    for node in range(num_nodes):
        # A parent is never larger than its node, so the parent's label is known already.
        if parent[node] == node:
            labels[node] = count
            count += 1
        else:
            labels[node] = labels[parent[node]]
    return labels
