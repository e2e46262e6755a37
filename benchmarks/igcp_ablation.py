"""IGCP: none, online, from the cache, refreshed by the encoder; neighbours of any or of other cases: what it brings.

    python -m benchmarks.igcp_ablation OUT --data DIR --splits FILE [--jobs 2]

DIR is a data set in the layout of the Medical Segmentation Decathlon, FILE the published splits. Defaults are chosen by
the outcome, so no case of the published test list takes part, not even as an image: all others are copied to OUT
(smaller with --shrink) and preprocessed; a quarter of the patients is held out and plays the test list, the labelled
ones are drawn from the rest. Every arm is pre-trained without the held-out cases and fine-tuned on the labelled ones
with each seed; both stages get equal steps in every arm. Printed, and written to OUT/ablation.json: DSC of the held-out
cases as mean and standard deviation over seeds, its difference to the arm without IGCP paired by seed, and how alike
the anatomy of positive pairs is (Dice of class masks on a common grid, pairs of different patients only) beside that of
random pairs. Run it again after a stop: every run goes on where it was.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import click

if not __package__:  # run by its path: beside it lies a script that has the name of a package
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.machine import as_text, conditions
from benchmarks.shrink import shrink as write_smaller

HELD_OUT: Final = 0.25
"""Share of the cases outside of the published test list that is held out."""
REFRESH_EVERY: Final = 1
ARMS: Final[dict[str, dict[str, Any]]] = {
    "no IGCP": {"igcp": "none"},
    "online": {"igcp": "online"},
    "cached, any": {"weak_labels": "intensity-any"},
    "cached, other-cases": {"weak_labels": "intensity"},
    "cached, other-cases, finest": {"weak_labels": "intensity", "ccl_level": 0},
    "refreshed, other-cases": {
        "weak_labels": "intensity",
        "refresh_every": REFRESH_EVERY,
        "neighbours": "other-cases",
    },
}
"""By name, the settings of pre-training that differ from the others'."""
SCRATCH: Final = "from scratch"


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A data set in MSD layout.")
@click.option("--splits", required=True, type=click.Path(path_type=Path), help="The published splits (JSON).")
@click.option("--shrink", default=1, show_default=True, help="Pixels along rows and columns that become one.")
@click.option("--labelled", default=8, show_default=True, help="Labelled patients.")
@click.option("--seeds", default=3, show_default=True, help="Seeds of every arm.")
@click.option("--pretrain-steps", default=1000, show_default=True)
@click.option("--finetune-steps", default=600, show_default=True)
@click.option("--batch-size", default=32, show_default=True, help="Of pre-training.")
@click.option("--finetune-batch-size", default=32, show_default=True)
@click.option("--finetune-lr", default=5e-3, show_default=True)
@click.option("--filters", default=8, show_default=True)
@click.option("--patch", default=None, type=(int, int), help="Rows and columns [default: the median slice].")
@click.option("--jobs", default=2, show_default=True, help="Runs at a time, of one thread each.")
def main(
    out: Path,
    data: Path,
    splits: Path,
    shrink: int,
    labelled: int,
    seeds: int,
    pretrain_steps: int,
    finetune_steps: int,
    batch_size: int,
    finetune_batch_size: int,
    finetune_lr: float,
    filters: int,
    patch: tuple[int, int] | None,
    jobs: int,
) -> None:
    """Run all arms on one data set and print the table."""
    run_with = conditions(data, "torch", quick=False)
    print(as_text(run_with))
    prepare(out, data, splits, labelled, shrink)
    shared = {"filters": filters, "patch_size": patch, "log_every": 50}
    pretraining = {**shared, "steps": pretrain_steps, "batch_size": batch_size}
    finetuning = {**shared, "steps": finetune_steps, "batch_size": finetune_batch_size, "lr": finetune_lr}
    work = [(out, arm, seed, pretraining, finetuning) for seed in range(seeds) for arm in (SCRATCH, *ARMS)]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        dsc = list(pool.map(train_and_score, *zip(*work, strict=True)))
    scores: dict[str, list[float]] = {}
    for (_, arm, *_), value in zip(work, dsc, strict=True):
        scores.setdefault(arm, []).append(value)
    result = {
        **run_with,
        "pretraining": pretraining,
        "finetuning": finetuning,
        "shrink": shrink,
        "labelled": labelled,
        "held_out_cases": len(json.loads((out / "split.json").read_text())["test"]),
        "arms": {arm: summary(arm, scores, out) for arm in scores},
    }
    (out / "ablation.json").write_text(json.dumps(result, indent=1))
    print(table(result["arms"]))
    print(json.dumps(result))


def prepare(out: Path, data: Path, splits: Path, num_labelled: int, shrink: int) -> None:
    """The cache of all cases outside of the published test list, both sets of labels, and a split of these cases."""
    from preprocess import run, weak_labels
    from preprocess.pipeline import PreprocessConfig
    from supercl_core.cache.cases import patients
    from supercl_core.cache.reader import open_cache
    from supercl_core.sources import discover
    from supercl_core.splits import read_split

    if (out / "split.json").exists():
        return
    source = discover(data)
    labelled = {case.id: case for case in source.cases if case.label_paths}
    test = set(read_split(str(splits), sorted(labelled), data_set=source.name, num_labelled=None).test)
    folder = out / "input"
    write_smaller(data, folder, factor=shrink, left_out=test)
    cache_path = out / "cache.zarr"
    run(folder, cache_path, config=PreprocessConfig(spacing="unknown"))
    weak_labels(open_cache(cache_path), neighbours="any", make_default=False)

    rows = open_cache(cache_path).done
    patient = dict(zip((row.id for row in rows), patients(rows).tolist(), strict=True))
    order = sorted(set(patient.values()))
    random.Random(0).shuffle(order)
    num_held_out = round(len(order) * HELD_OUT)
    held_out, chosen = order[:num_held_out], order[num_held_out : num_held_out + num_labelled]
    train = [case_id for case_id, of in patient.items() if of in chosen]
    split = {
        "labelled": {str(len(train)): train},
        "test": [case_id for case_id, of in patient.items() if of in held_out],
    }
    (out / "split.json").write_text(json.dumps(split))


def train_and_score(
    out: Path, arm: str, seed: int, pretraining: dict[str, Any], finetuning: dict[str, Any]
) -> float:
    """Mean DSC (%) of the held-out cases for one arm and seed, with the settings of both stages."""
    import torch

    from supercl_core.cache.reader import open_cache
    from supercl_core.splits import read_split
    from train import finetune, pretrain
    from train.evaluate import evaluate
    from train.methods import PretrainConfig
    from train.metrics import MEAN
    from train.recipes import FinetuneConfig
    from train.runs import read_evaluation

    torch.set_num_threads(1)
    cache = open_cache(out / "cache.zarr")
    [count] = json.loads((out / "split.json").read_text())["labelled"]
    split = read_split(
        str(out / "split.json"), [row.id for row in cache.rows], data_set="", num_labelled=int(count)
    )
    init = SCRATCH.split()[-1]
    if arm != SCRATCH:
        run_path = run_folder(out, "pretrain", arm, seed)
        pretrain_config = PretrainConfig(seed=seed, **pretraining, **ARMS[arm])
        pretrain(cache, run_path, config=pretrain_config, excluded=split.test)
        init = str(run_path)
    run_path = run_folder(out, "finetune", arm, seed)
    config = FinetuneConfig(seed=seed, **finetuning)
    finetune(cache, run_path, split=split, init=init, config=config)
    evaluation = read_evaluation(run_path) or evaluate(run_path, cache)
    return 100 * float(evaluation["summary"][MEAN]["dsc"])


def run_folder(out: Path, stage: str, arm: str, seed: int) -> Path:
    """Where the run of one stage, arm and seed lies."""
    return out / stage / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"


def summary(arm: str, scores: dict[str, list[float]], out: Path) -> dict[str, Any]:
    """The figures of an arm: DSC by seed, its difference to the arm without IGCP, and the purity of its pairs."""
    dsc, base = scores[arm], scores["no IGCP"]
    differences = [value - other for value, other in zip(dsc, base, strict=True)]
    purities = [] if arm == SCRATCH else [purity(out, arm, seed) for seed in range(len(dsc))]
    return {
        "dsc": dsc,
        "dsc_mean": statistics.fmean(dsc),
        "dsc_sd": statistics.stdev(dsc) if len(dsc) > 1 else None,
        "difference_to_none": differences,
        "difference_mean": statistics.fmean(differences),
        **({key: statistics.fmean(one[key] for one in purities) for key in purities[0]} if purities else {}),
    }


def purity(out: Path, arm: str, seed: int) -> dict[str, float]:
    """Of the positive pairs that an arm trained with at the end, those of two patients: their share and mask Dice (%).

    For the arm without IGCP these are pairs drawn at random.
    """
    import numpy as np
    import torch

    from supercl_core.cache.reader import open_cache
    from supercl_core.showing.pair_audit import anatomy, draw_pairs, mask_dice
    from train.runs import read_run

    cache = open_cache(out / "cache.zarr")
    run_path = run_folder(out, "pretrain", arm, seed)
    run = read_run(run_path)
    slices = cache.case_slices(run["cases"]["train"])
    patient = cache.slice_patient[slices]
    generator = np.random.default_rng(0)
    if arm == "online":
        pairs = online_pairs(cache, run, run_path, slices)
        share = float((patient[pairs[:, 0]] != patient[pairs[:, 1]]).mean())
        pairs = pairs[patient[pairs[:, 0]] != patient[pairs[:, 1]]]
    else:
        labels = np.zeros(len(slices), np.int64)
        if arm != "no IGCP":
            labels = cache.weak_labels(run["weak_labels"]["name"]).ccl[run["weak_labels"]["level"]][slices]
        if arm.startswith("refreshed"):
            last = max((run_path / "checkpoints").glob("step_*.pt"))
            labels = torch.load(last, weights_only=True)["refresh"]["labels"].numpy()
        every = draw_pairs(labels, np.arange(len(slices)), reach=1, num_pairs=20_000, generator=generator)
        share = float((patient[every[:, 0]] != patient[every[:, 1]]).mean())
        pairs = draw_pairs(labels, patient, reach=1, num_pairs=20_000, generator=generator)
    _, masks = anatomy(cache, slices)
    [dice] = mask_dice(masks, [pairs])
    return {"pairs_across_patients": 100 * share, "mask_dice_across": 100 * float(dice.mean())}


def online_pairs(cache: Any, run: dict[str, Any], run_path: Path, slices: Any) -> Any:
    """Positive pairs of online IGCP in 30 batches of the trained network, as places in `slices`: integers (p, 2)."""
    import numpy as np
    import torch

    from supercl_core.config import from_dict
    from train.augment import pretrain_views
    from train.data import SliceDataset, normalise
    from train.methods import PretrainConfig
    from train.models.backbones import build_encoder
    from train.models.unet import PretrainNet
    from train.models.weights import read_weights
    from train.pairs import online_igcp_positives

    config = from_dict(PretrainConfig, run["config"])
    encoder = build_encoder(config.backbone, in_channels=run["model"]["in_channels"], filters=config.filters)
    network = PretrainNet(encoder, projection=config.projection)
    network.load_state_dict(read_weights(run_path))
    dataset = SliceDataset(cache, run["cases"]["train"], patch_size=config.patch_size)
    random_state, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    found = []
    with torch.no_grad():
        for _ in range(30):
            places = random_state.choice(len(slices), config.batch_size, replace=False)
            chosen = slices[places]
            batch = normalise(dataset.gather(chosen, dataset.place(chosen, random_state)))
            views = pretrain_views(batch.image_BCYX, generator, config=config.augment)
            output = network(torch.cat(views[:2]), torch.cat(views[2:]))
            x1, x2 = output.features.chunk(2)
            positives = online_igcp_positives(
                x1, x2, batch.superpixels_Bhw, num_superpixels=max(row.num_superpixels for row in cache.done)
            )
            anchors, partners = np.nonzero(positives.numpy())
            both = np.stack([places[anchors % len(places)], places[partners % len(places)]], axis=1)
            found.append(both[both[:, 0] != both[:, 1]])
    return np.concatenate(found)


def table(arms: dict[str, dict[str, Any]]) -> str:
    """The figures as lines of Markdown."""
    lines = [
        "| arm | DSC %, mean of seeds | s.d. | by seed | minus no IGCP | pairs of two patients % | their mask Dice % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, found in arms.items():
        spread = "" if found["dsc_sd"] is None else f"{found['dsc_sd']:.2f}"
        cells = [
            arm,
            f"{found['dsc_mean']:.2f}",
            spread,
            ", ".join(f"{value:.2f}" for value in found["dsc"]),
            f"{found['difference_mean']:+.2f}",
            *(
                f"{found[key]:.1f}" if key in found else ""
                for key in ("pairs_across_patients", "mask_dice_across")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
