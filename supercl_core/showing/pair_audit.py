"""An audit of the pairs that weak labels make: how many, how close together, and how alike in their anatomy.

Two slices with one weak label are a positive pair of IGCP. Per level of the labels the audit counts components and
pairs and, where there is ground truth, measures how alike paired slices are, against random pairs and against pairs
at close positions, which need no weak labels. Called by `supercl inspect --pairs`. The picture of the components is
`supercl_core.showing.pair_gallery`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from supercl_core.cache.reader import Cache, WeakLabels
from supercl_core.cache.weak_labels import auto_level, expected_positives
from supercl_core.errors import printable
from supercl_core.splits import cases_without

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

NUM_PAIRS: Final = 20_000
"""Pairs drawn for every mean over pairs."""

CLOSE: Final = 0.1
"""Positions nearer than this make a pair by position, as in L_ins (METHOD, positional contrast)."""

MASK_GRID: Final = 64
"""Rows and columns of the grid on which masks of different sizes are compared."""

NUM_RESAMPLES: Final = 200
"""Bootstrap resamples behind a standard error."""

MIN_PATIENTS: Final = 3
"""Fewest patients with a standard error: all resamples that keep a pair of two patients are the same."""


TABLE_COLUMNS: Final = 100
"""Width of `render`."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over pairs."""

    mean: float
    standard_error: float | None
    """By a bootstrap over patients; None below MIN_PATIENTS."""


@dataclass(frozen=True, kw_only=True)
class Alikeness:
    """How alike the ground truth of paired slices is, 0..1."""

    areas: Mean
    """`area_dice`: whether the same classes are as large in both slices, wherever they lie."""
    masks: Mean
    """`mask_dice`: whether they lie in the same places."""


@dataclass(frozen=True, kw_only=True)
class LevelAudit:
    """One level of the labels. What is None has no pair to be a mean over."""

    level: int
    is_auto: bool
    """Whether training takes this level by itself, with the batch size of the audit."""
    num_components: int
    smallest: int
    """Slices of the smallest component."""
    median: float
    """Slices of the median component."""
    largest: int
    """Slices of the largest component."""
    share_alone: float
    """Slices that are a component of their own, over all slices."""
    expected_positives: float
    """Per anchor, in a random batch."""
    share_one_patient: float | None
    """Pairs within one patient, over all pairs."""
    position_distance: float | None
    """Mean of |p - q| over all pairs, p and q being the positions of the two slices."""
    reach: float
    """Slices that have a partner of another patient, over all slices."""
    all_pairs: Alikeness | None
    across_patients: Alikeness | None
    """Of pairs of two patients: neighbouring slices of one patient are alike without any method."""


@dataclass(frozen=True, kw_only=True)
class PairAudit:
    """The audit of one set of weak labels."""

    labels: str
    """Name of the labels."""
    descriptors: str
    """What they were computed from."""
    neighbours: str
    """Whether slices of one case could be linked: `any`, or `other-cases`."""
    batch_size: int
    num_pairs: int
    """Pairs drawn for each mean."""
    num_left_out: int
    """Cases left out: test cases, and those of identical content."""
    num_slices: int
    num_with_ground_truth: int
    """Slices that the alikeness is about."""
    levels: tuple[LevelAudit, ...]
    """Finest first."""
    random: Alikeness | None
    """Of slices of two patients, whichever they are."""
    by_position: Alikeness | None
    """Of slices of two patients, closer in position than CLOSE."""


def audit(
    cache: Cache,
    labels: WeakLabels,
    *,
    batch_size: int,
    test_case_ids: Sequence[str] = (),
    num_pairs: int = NUM_PAIRS,
    seed: int = 0,
) -> PairAudit:
    """Audit the pairs of `labels`, for random batches of `batch_size` slices.

    `test_case_ids` are left out of everything, as are the cases of identical content: what is left are the slices
    that pre-training with the same split draws from. A mean over pairs is one over `num_pairs` pairs, drawn with
    replacement: the anchor uniformly among the slices that have a partner, then one of its partners uniformly. A
    patient is a case, or all cases that are one patient (`cases.patients`). Memory: about 10 KiB a slice.

    Raises UsageError where no case is left.
    """
    slices = audited_slices(cache, test_case_ids)
    rows = [cache.rows[index] for index in cache.slice_case[slices]]
    patient = cache.slice_patient[slices]
    truth = np.flatnonzero([row.has_ground_truth for row in rows])
    position = cache.slice_position[slices].astype(np.float64)
    ccl = labels.ccl[:, slices]

    def draw(keys: np.ndarray, owners: np.ndarray, *, reach: float) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return draw_pairs(keys, owners, reach=reach, num_pairs=num_pairs, generator=generator)

    kinds = [
        draw(np.zeros(len(truth)), patient[truth], reach=1),
        draw(position[truth], patient[truth], reach=CLOSE),
        *(draw(component[truth], truth, reach=1) for component in ccl),
        *(draw(component[truth], patient[truth], reach=1) for component in ccl),
    ]
    random, by_position, *alike = _alikeness(cache, slices[truth], kinds, patient[truth], seed)
    auto = auto_level(ccl, batch_size)
    levels = []
    for level, component in enumerate(ccl):
        sizes = np.unique(component, return_counts=True)[1]
        num_patients = np.bincount(np.unique(np.stack([component, patient]), axis=1)[0])
        anchors, partners = draw(component, np.arange(len(slices)), reach=1).T
        levels.append(
            LevelAudit(
                level=level,
                is_auto=level == auto,
                num_components=len(sizes),
                smallest=int(sizes.min()),
                median=float(np.median(sizes)),
                largest=int(sizes.max()),
                share_alone=float((sizes == 1).sum() / len(slices)),
                expected_positives=expected_positives(component, batch_size),
                share_one_patient=_mean(patient[anchors] == patient[partners]),
                position_distance=_mean(np.abs(position[anchors] - position[partners])),
                reach=float((num_patients[component] > 1).mean()),
                all_pairs=alike[level],
                across_patients=alike[len(ccl) + level],
            )
        )
    return PairAudit(
        labels=labels.name,
        descriptors=labels.descriptors,
        neighbours=labels.neighbours,
        batch_size=batch_size,
        num_pairs=num_pairs,
        num_left_out=len(cache.done) - len(np.unique(cache.slice_case[slices])),
        num_slices=len(slices),
        num_with_ground_truth=len(truth),
        levels=tuple(levels),
        random=random,
        by_position=by_position,
    )


def audited_slices(cache: Cache, test_case_ids: Sequence[str]) -> np.ndarray:
    """Indices (int64, ascending) of the slices of all cases but `test_case_ids` and those of identical content.

    Raises UsageError where no case is left.
    """
    return cache.case_slices(cases_without(cache.rows, test_case_ids))


def draw_pairs(
    keys: np.ndarray, owners: np.ndarray, *, reach: float, num_pairs: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw pairs of elements of different `owners` whose `keys` are less than `reach` apart, with replacement.

    `keys`: numbers (n,); `owners`: integers (n,), 0 or more. Returns int64 (num_pairs, 2), or (0, 2) where there is
    no such pair. The anchor, first of a pair, is drawn uniformly among the elements that have a partner, the other
    uniformly among the anchor's partners.

    Example: pairs within a component, of two patients: `draw_pairs(ccl[level], patient, reach=1, ...)`.
    """
    n = len(keys)
    order = np.argsort(keys, kind="stable")
    low = np.searchsorted(keys[order], keys - reach, side="right")
    high = np.searchsorted(keys[order], keys + reach, side="left")
    places = np.sort(owners[order] * n + np.arange(n))  # of each owner in `order`, one owner after the other
    num_own = np.searchsorted(places, owners * n + high) - np.searchsorted(places, owners * n + low)
    with_partner = np.flatnonzero(high - low > num_own)
    if len(with_partner) == 0:
        return np.empty((0, 2), np.int64)
    anchors = generator.choice(with_partner, num_pairs)
    partners = anchors.copy()
    while len(own := np.flatnonzero(owners[partners] == owners[anchors])):
        partners[own] = order[generator.integers(low[anchors[own]], high[anchors[own]])]
    return np.stack([anchors, partners], axis=1)


def area_dice(areas: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Dice of the class histograms of paired slices: twice the shared areas over the sum of all areas.

    `areas`: float (n, classes), of each foreground class over the area of the slice; `pairs`: integers (p, 2).
    Returns float (p,), 0..1; 1 for two slices without foreground. Our choice.
    """
    first, second = areas[pairs[:, 0]], areas[pairs[:, 1]]
    total = (first + second).sum(axis=1)
    shared = 2 * np.minimum(first, second).sum(axis=1)
    return np.divide(shared, total, out=np.ones_like(total), where=total > 0)


def mask_dice(masks: np.ndarray, kinds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Dice of the masks of paired slices, mean over the foreground classes that either slice has.

    `masks`: classes, uint8 (n, pixels), 0 is background; `kinds`: lists of pairs, integers (p, 2) each. Returns for
    each of them float64 (p,), 0..1; 1 for two slices without foreground.
    """
    sums = [np.zeros(len(pairs)) for pairs in kinds]
    counts = [np.zeros(len(pairs), np.int64) for pairs in kinds]
    for value in range(1, int(masks.max(initial=0)) + 1):
        bits = np.packbits(masks == value, axis=1)
        sizes = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
        for pairs, of_pairs, num_classes in zip(kinds, sums, counts, strict=True):
            first, second = pairs.T
            both = np.bitwise_count(bits[first] & bits[second]).sum(axis=1, dtype=np.int64)
            total = sizes[first] + sizes[second]
            of_pairs += 2 * both / np.maximum(total, 1)
            num_classes += total > 0
    return [
        np.where(count, total / np.maximum(count, 1), 1.0) for total, count in zip(sums, counts, strict=True)
    ]


def render(audits: Sequence[PairAudit]) -> Group:
    """Audits of one cache as tables for a terminal of TABLE_COLUMNS, with the meaning of their columns below."""
    from rich.console import Group
    from rich.text import Text

    # Text, since a name may hold what rich takes for markup.
    return Group(*(_table(found) for found in audits), Text("\n".join(_notes(audits[0]))))


# ---------------------------------------------------------------- ground truth


def _alikeness(
    cache: Cache, slices: np.ndarray, kinds: Sequence[np.ndarray], patient: np.ndarray, seed: int
) -> list[Alikeness | None]:
    """The alikeness of each list of pairs, (p, 2) indices into `slices`. `patient`: integers, of each slice."""
    areas, masks = anatomy(cache, slices)
    found: list[Alikeness | None] = []
    for pairs, by_mask in zip(kinds, mask_dice(masks, kinds), strict=True):
        if len(pairs) == 0:
            found.append(None)
            continue
        scores = np.stack([area_dice(areas, pairs), by_mask])
        errors = _standard_errors(scores, patient[pairs], np.random.default_rng(seed))
        means = [
            Mean(mean=float(score.mean()), standard_error=error)
            for score, error in zip(scores, errors, strict=True)
        ]
        found.append(Alikeness(areas=means[0], masks=means[1]))
    return found


def anatomy(cache: Cache, slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas of the foreground classes over that of the slice, float32 (n, 255), and masks, uint8 (n, MASK_GRID^2).

    `slices`: ascending indices of whole cases with ground truth. A mask is read at the pixels nearest to the centres
    of the grid's cells.
    """
    areas = np.zeros((len(slices), 256), np.float32)
    masks = np.zeros((len(slices), MASK_GRID**2), np.uint8)
    done = 0
    for index in np.unique(cache.slice_case[slices]):
        case = cache.case(cache.rows[index].id)
        truth_ZYX = case.ground_truth_ZYX
        assert truth_ZYX is not None
        _, num_slices, height, width = case.row.shape
        rows, columns = (
            ((np.arange(MASK_GRID) + 0.5) * size / MASK_GRID).astype(int) for size in (height, width)
        )
        for z, truth_YX in enumerate(truth_ZYX, start=done):
            areas[z] = np.bincount(truth_YX.ravel(), minlength=256) / truth_YX.size
            masks[z] = truth_YX[rows[:, None], columns].ravel()
        done += num_slices
    return areas[:, 1:], masks


def _standard_errors(
    scores: np.ndarray, patients: np.ndarray, generator: np.random.Generator
) -> tuple[float | None, ...]:
    """Standard errors of the means of `scores` (k, p) over pairs, by a bootstrap over patients.

    `patients`: integers (p, 2), of the slices of each pair. A resample draws as many patients, with replacement, and
    counts a pair as often as it has both of its patients: pairs that share a patient are not independent. Source:
    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007).
    """
    known, patients = np.unique(patients, return_inverse=True)
    if len(known) < MIN_PATIENTS:
        return (None,) * len(scores)
    drawn = generator.multinomial(len(known), np.full(len(known), 1 / len(known)), size=NUM_RESAMPLES)
    times = drawn.T.astype(np.float32)
    first, second = patients.T
    weights = times[first] * np.where((first == second)[:, None], 1, times[second])
    total = weights.sum(axis=0)
    means = (scores.astype(np.float32) @ weights)[:, total > 0] / total[total > 0]
    return tuple(float(error) for error in means.std(axis=1, ddof=1))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# ---------------------------------------------------------------- texts

_NOTHING: Final = "–"


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.1f}"


def _table(found: PairAudit) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = (
        f"Weak labels {found.labels!r}: descriptors {found.descriptors}, neighbours {found.neighbours}; "
        f"{found.num_slices:,} slices, batches of {found.batch_size:,}"
    )
    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("level", no_wrap=True, vertical="bottom")
    for name in (
        "compo-\nnents",
        "their slices\nmin/median/max",
        "alone\n%",
        "posi-\ntives",
        "one pa-\ntient %",
        "dis-\ntance",
        "areas\nall %",
        "masks\nall %",
        "reach\n%",
        "areas\nacross %",
        "masks\nacross %",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for level in found.levels:
        table.add_row(
            f"{level.level} auto" if level.is_auto else f"{level.level}",
            f"{level.num_components:,}",
            f"{level.smallest:,}/{level.median:,g}/{level.largest:,}",
            _percent(level.share_alone),
            f"{level.expected_positives:,.2f}",
            _percent(level.share_one_patient),
            _NOTHING if level.position_distance is None else f"{level.position_distance:.2f}",
            *_alike_cells(level.all_pairs, with_errors=False),
            _percent(level.reach),
            *_alike_cells(level.across_patients),
            style="bold" if level.is_auto else None,
            end_section=level is found.levels[-1],
        )
    for name, alike in (("random", found.random), ("position", found.by_position)):
        table.add_row(name, *[""] * 9, *_alike_cells(alike))
    return table


def _notes(found: PairAudit) -> list[str]:
    notes = [
        "auto: the level that training takes by itself",
        "alone: slices without a partner",
        "positives: partners of a slice in a random batch",
        "one patient: pairs within one patient",
        "distance: of the positions (0 to 1) of a pair",
        "reach: slices with a partner of another patient",
    ]
    if found.num_left_out:
        notes.append(
            f"left out: {found.num_left_out:,} cases, the split's test cases and those of identical content"
        )
    if not found.num_with_ground_truth:
        return [*notes, "", "There is no ground truth to tell how alike the anatomy of a pair is."]
    notes += [
        "areas, masks: Dice of the classes' areas and of their masks, 100 for two slices without foreground;",
        f"    over {found.num_with_ground_truth:,} slices with ground truth",
        f"across, random, position: pairs of two patients, by label, at random, closer than {CLOSE} in position",
        f"±: standard error, by a bootstrap over patients; {found.num_pairs:,} pairs are drawn for each mean",
        "",
        "Look at `masks across`. Where it lies above `random`, the labels know more than chance;",
        "where it lies above `position`, they know more than the position of a slice.",
    ]
    if not found.num_left_out:
        notes.append("Before you choose labels by it, leave the test cases out: --split FILE.")
    return notes


def _alike_cells(alike: Alikeness | None, *, with_errors: bool = True) -> list[str]:
    """Areas and masks in %."""
    if alike is None:
        return [_NOTHING, _NOTHING]
    cells = []
    for found in (alike.areas, alike.masks):
        error = found.standard_error if with_errors else None
        cells.append(_percent(found.mean) + ("" if error is None else f" ±{_percent(error)}"))
    return cells
