"""From a map of labels to superpixels: 4-connected regions with contiguous ids, none of them a mere fragment.

Works on the runs of equal labels in each row, of which a slice has some twenty times fewer than pixels. Called by
`preprocess.kernels.slic_fast` and, without a smallest size, for labels that another algorithm gave. In the names
below, a run is known by its number in raster order, and a region by the number of its first run, its root.
"""

from __future__ import annotations

import numpy as np

from preprocess.kernels import kernel

BACKGROUND = np.uint16(65_535)
"""The label of pixels outside of the foreground."""

# What a fragment knows as long as it touches no whole region:
LARGEST = -1  # it is larger than every other fragment that it touches
TOUCHES_LARGER = -2


@kernel
def connect_regions(
    labels_YX: np.ndarray, features_CYX: np.ndarray, means_CK: np.ndarray, smallest_pixels: int
) -> int:
    """Make every label one 4-connected region, in place, and return the number of regions.

    `labels_YX`: uint16 (y, x), each 0..K-1 or BACKGROUND. `features_CYX`: float32 (c, y, x). `means_CK`: float64
    (c, k), the mean feature of every label.

    Regions below `smallest_pixels` join the touching region of nearest mean feature, of equals the first met. All
    others stay: the first of each label keeps its id, further ones get new ids, and ids that became free are
    filled, so that ids are 0..count-1. Each region of the background stays whatever its size, and none of the
    foreground joins it. Source: our choice (SLIC as published joins a fragment to any neighbour).
    """
    height = len(labels_YX)
    starts, ends, first_of_row = _find_runs(labels_YX)
    num_runs = len(starts)
    run_labels = np.empty(num_runs, np.uint16)
    run_rows = np.empty(num_runs, np.int32)
    for y in range(height):
        for run in range(first_of_row[y], first_of_row[y + 1]):
            run_labels[run] = labels_YX[y, starts[run]]
            run_rows[run] = y
    roots, above, below = _link_rows(ends, first_of_row, run_labels)
    sizes = np.zeros(num_runs, np.int32)
    for run in range(num_runs):
        roots[run] = roots[roots[run]]  # a root is never behind its run: one step is enough
        sizes[roots[run]] += ends[run] - starts[run]
    _join_fragments(
        starts, ends, first_of_row, run_labels, run_rows, above, below,
        sizes, roots, features_CYX, means_CK, smallest_pixels,
    )  # fmt: skip
    ids, count = _number_regions(roots, run_labels, means_CK.shape[1])
    for run in range(num_runs):
        region = ids[roots[roots[run]]]
        if region != run_labels[run]:
            row = labels_YX[run_rows[run]]
            for x in range(starts[run], ends[run]):
                row[x] = region
    return count


@kernel
def _find_runs(labels_YX: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal labels in every row, in raster order.

    `labels_YX`: integers (y, x). Returns their first columns and the columns behind their last, each int32
    (runs,), and the number of the first run of each row, int32 (y + 1,).
    """
    height, width = labels_YX.shape
    starts = np.empty(height * width + 8, np.int32)
    first_of_row = np.empty(height + 1, np.int32)
    changes = np.zeros(-(-width // 8) * 8, np.uint8)
    eights = changes.view(np.uint64)
    count = 0
    for y in range(height):
        row = labels_YX[y]
        before, behind, change = row[: width - 1], row[1:], changes[1:width]
        for x in range(width - 1):
            change[x] = before[x] != behind[x]
        first_of_row[y] = count
        starts[count] = 0
        count += 1
        for eight in range(len(eights)):
            if eights[eight] != 0:
                for x in range(8 * eight, 8 * eight + 8):
                    starts[count] = x
                    count += changes[x]
    first_of_row[height] = count
    ends = np.empty(count, np.int32)
    ends[: count - 1] = starts[1:count]
    for y in range(height):
        ends[first_of_row[y + 1] - 1] = width
    return starts[:count], ends, first_of_row


@kernel
def _link_rows(
    ends: np.ndarray, first_of_row: np.ndarray, run_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Union-find over runs of equal label that touch in neighbouring rows; the smaller root wins.

    Returns, for each run, a run nearer to its root (itself for a root), and the last run that touches it in the
    row above and in the row below.
    """
    num_runs = len(ends)
    roots = np.arange(num_runs).astype(np.int32)
    above = np.empty(num_runs, np.int32)
    below = np.empty(num_runs, np.int32)
    for y in range(1, len(first_of_row) - 1):
        upper, lower = first_of_row[y - 1], first_of_row[y]
        upper_end, lower_end = first_of_row[y], first_of_row[y + 1]
        while upper < upper_end and lower < lower_end:
            above[lower], below[upper] = upper, lower
            if run_labels[upper] == run_labels[lower]:
                a, b = roots[upper], roots[lower]
                while roots[a] != a:
                    a = roots[a]
                while roots[b] != b:
                    b = roots[b]
                root = min(a, b)
                roots[a] = roots[b] = roots[lower] = root
            end, other_end = ends[upper], ends[lower]
            upper += end <= other_end
            lower += other_end <= end
    return roots, above, below


@kernel
def _join_fragments(
    starts: np.ndarray, ends: np.ndarray, first_of_row: np.ndarray, run_labels: np.ndarray, run_rows: np.ndarray,
    above: np.ndarray, below: np.ndarray, sizes: np.ndarray, roots: np.ndarray,
    features_CYX: np.ndarray, means_CK: np.ndarray, smallest_pixels: int,
) -> None:  # fmt: skip
    """Make the root of every fragment point to the root of the region that it joins.

    In rounds: every fragment joins the nearest of the whole regions that it touches, and then counts as part of
    it. When none is left that touches one, those that are the largest around them become whole regions.
    """
    num_channels = len(means_CK)
    num_runs = len(starts)
    is_fragment = np.zeros(num_runs, np.bool_)
    means = np.empty((num_runs, num_channels))
    nearest = np.empty(num_runs, np.int32)
    distances = np.empty(num_runs)
    touching = np.empty(2 * features_CYX.shape[2] + 2, np.int32)
    waiting = np.empty(num_runs, np.int32)
    num_waiting = 0
    for run in range(num_runs):
        root = roots[run]
        if run_labels[run] == BACKGROUND:
            continue
        if sizes[root] >= smallest_pixels:
            if root == run:
                for c in range(num_channels):
                    means[run, c] = means_CK[c, run_labels[run]]
            continue
        waiting[num_waiting] = run
        num_waiting += 1
        if root == run:
            is_fragment[run] = True
            for c in range(num_channels):
                means[run, c] = 0
        for c in range(num_channels):
            row = features_CYX[c, run_rows[run]]
            total = 0.0
            for x in range(starts[run], ends[run]):
                total += row[x]
            means[root, c] += total / sizes[root]
    while num_waiting > 0:
        for i in range(num_waiting):
            root = roots[waiting[i]]
            nearest[root], distances[root] = LARGEST, np.inf
        for i in range(num_waiting):
            run = waiting[i]
            root, y = roots[run], run_rows[run]
            touching[0], touching[1] = max(run - 1, first_of_row[y]), min(run + 1, first_of_row[y + 1] - 1)
            num_touching = 2
            if y > 0:
                near = above[run]
                while near >= first_of_row[y - 1] and ends[near] > starts[run]:
                    touching[num_touching] = near
                    num_touching += 1
                    near -= 1
            if y + 2 < len(first_of_row):
                near = below[run]
                while near >= first_of_row[y + 1] and ends[near] > starts[run]:
                    touching[num_touching] = near
                    num_touching += 1
                    near -= 1
            last = root
            for j in range(num_touching):
                other = roots[roots[touching[j]]]
                if other in (last, root) or run_labels[other] == BACKGROUND:
                    continue
                last = other
                if is_fragment[other]:
                    larger = sizes[other] > sizes[root] or (sizes[other] == sizes[root] and other < root)
                    if larger and nearest[root] == LARGEST:
                        nearest[root] = TOUCHES_LARGER
                    continue
                distance = 0.0
                for c in range(num_channels):
                    distance += (means[other, c] - means[root, c]) ** 2
                if distance < distances[root]:
                    nearest[root], distances[root] = other, distance
        num_before, num_waiting = num_waiting, 0
        for i in range(num_before):
            run = waiting[i]
            root = roots[run]
            if nearest[root] < 0:
                waiting[num_waiting] = run
                num_waiting += 1
            elif root == run:
                roots[root] = nearest[root]
        if num_waiting == num_before:
            num_waiting = 0
            for i in range(num_before):
                run = waiting[i]
                if nearest[roots[run]] == LARGEST:
                    is_fragment[roots[run]] = False
                else:
                    waiting[num_waiting] = run
                    num_waiting += 1


@kernel
def _number_regions(roots: np.ndarray, run_labels: np.ndarray, num_labels: int) -> tuple[np.ndarray, int]:
    """An id for every run that is the root of a region, int32 (runs,), and the number of regions."""
    num_runs = len(roots)
    ids = np.empty(num_runs, np.int32)
    owner = np.full(num_labels, -1, np.int32)
    further = np.empty(num_runs, np.int32)
    num_owners, num_further = 0, 0
    for run in range(num_runs):
        if roots[run] == run:
            label = run_labels[run]
            if label != BACKGROUND and owner[label] < 0:
                owner[label] = run
                ids[run] = label
                num_owners += 1
            else:
                further[num_further] = run
                num_further += 1
    # Labels without a region leave gaps: filled by further regions first, then by the highest labels.
    free = 0
    for i in range(num_further):
        while free < num_labels and owner[free] >= 0:
            free += 1
        ids[further[i]] = free
        if free < num_labels:
            owner[free] = further[i]
        else:
            free += 1
    last = num_labels - 1
    while free < num_labels:
        while free < num_labels and owner[free] >= 0:
            free += 1
        while last > free and owner[last] < 0:
            last -= 1
        if last <= free:
            break
        ids[owner[last]] = free
        owner[free], owner[last] = owner[last], -1
    return ids, num_owners + num_further
