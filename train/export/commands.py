"""The command `supercl export`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="RUN|FILE", type=_PATH)
@click.argument("output", metavar="OUT", type=_PATH)
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["safetensors", "onnx", "monai", "smp", "nnunet"]),
    help="What it is written for.",
)
@click.option("--encoder", "encoder_only", is_flag=True, help="Of a fine-tuned RUN only the encoder.")
@click.option(
    "--plans",
    "plans_path",
    metavar="FILE",
    type=_PATH,
    help="With --to nnunet: the plans that nnU-Net made of the data set to train on.",
)
def export(source: Path, output: Path, target: str, encoder_only: bool, plans_path: Path | None) -> None:
    """Write a trained network to the new folder OUT, in a form that another framework loads.

    Of a fine-tuned RUN that is the whole network, of a pre-trained one, or a FILE of weights, the encoder. With it
    goes card.json: architecture, normalisation, origin, and the lines that load it, which are printed too.

    \b
    safetensors  any framework of Python; `supercl finetune --init OUT` takes it
    onnx         any runtime, images of any number and size; checked with ONNX Runtime
    monai        BasicUNet, or the encoder of a FlexibleUNet for backbones of MONAI
    smp          the encoder of segmentation-models-pytorch's networks
    nnunet       plans and weights for nnUNetv2_train -pretrained_weights

    \b
    Example:  supercl export runs/pretrained heart_onnx --to onnx
              supercl export runs/pretrain heart_nnunet --to nnunet --plans nnUNetPlans.json
    """
    from importlib import import_module

    from supercl_core.errors import UsageError
    from train.export.card import CARD_NAME, write_card
    from train.export.model import read_model

    if target == "nnunet" and plans_path is None:
        raise UsageError(
            "--to nnunet needs --plans.",
            expected="the plans that nnU-Net made of the data set to train on",
            found="none",
            next_step="Name $nnUNet_preprocessed/DATASET/nnUNetPlans.json.",
        )
    if target != "nnunet" and plans_path is not None:
        raise UsageError(
            "--plans goes with --to nnunet only.",
            expected="no --plans",
            found=f"--plans {plans_path} with --to {target}",
            next_step="Leave it out, or export --to nnunet.",
        )
    # Inside OUT, which may be a mount point or where the user is: such a folder can be filled, not replaced.
    wip = output / ".wip"
    is_new = not output.exists()
    if not is_new and (not output.is_dir() or {*output.iterdir()} - {wip}):
        raise UsageError(
            "There is something at OUT already.",
            where=output,
            expected="a new or an empty folder",
            found="a folder with files" if output.is_dir() else "a file",
            next_step="Name another folder, or remove this one.",
        )
    model = read_model(source, encoder_only=encoder_only)
    shutil.rmtree(wip, ignore_errors=True)
    wip.mkdir(parents=True)
    try:
        module = import_module(f"train.export.to_{target}")
        written = module.write(model, wip, *([plans_path] if plans_path else []))
        write_card(model, wip, target=target, written=written)
        for file in sorted(wip.iterdir(), key=lambda file: file.name == CARD_NAME):
            file.rename(output / file.name)
    finally:
        shutil.rmtree(wip, ignore_errors=True)
        if is_new and not any(output.iterdir()):
            output.rmdir()
    click.echo(f"{output}: {written.holds}; to load it there:")
    for line in written.load:
        click.echo(f"  {line}")
