"""Export as ONNX: one file with graph and weights, for images of any number and size that the network takes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from supercl_core.errors import SuperCLError, UsageError
from train.export.model import Model, Written

FILE_NAME: Final = "network.onnx"

TOLERANCE: Final = 1e-4
"""Between the outputs of PyTorch and ONNX Runtime: absolute, and relative to the largest value."""


def write(model: Model, folder: Path) -> Written:
    """Write the network, or the encoder, into `folder`.

    The input is `image`; outputs are `logits`, or of an encoder `stride_N` for each of its feature maps. Checks the
    file with ONNX Runtime, on two sizes that it was not traced with. Raises UsageError where a package is missing,
    SuperCLError where the network cannot be exported or its outputs differ.
    """
    encoder = model.network.encoder
    network: nn.Module = model.network if model.is_whole else encoder
    names = ["logits"] if model.is_whole else [f"stride_{stride}" for stride in encoder.strides]
    step = encoder.strides[-1]
    generator = torch.Generator().manual_seed(0)

    def images(count: int, rows: int, columns: int) -> Tensor:
        return torch.randn(count, model.in_channels, rows * step, columns * step, generator=generator)

    _export(network, images(2, 2, 3), folder / FILE_NAME, step=step, output_names=names)
    for size in ((1, 3, 2), (3, 1, 4)):
        _check(network, images(*size), folder / FILE_NAME)
    lines = [
        "import numpy as np",
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession("{FILE_NAME}", providers=["CPUExecutionProvider"])',
        f"images = np.zeros((1, {model.in_channels}, {4 * step}, {4 * step}), np.float32)",
        f'[{", ".join(names)}] = session.run(None, {{"image": images}})',
    ]
    return Written("the whole network" if model.is_whole else "the encoder", lines)


def _export(
    network: nn.Module, example_BCYX: Tensor, path: Path, *, step: int, output_names: list[str]
) -> None:
    """Trace the network and write the graph; rows and columns stay free as multiples of `step`."""
    sizes = {0: Dim("batch"), 2: step * Dim("rows", min=1), 3: step * Dim("columns", min=1)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own parts
            torch.onnx.export(
                network,
                (example_BCYX,),
                path,
                input_names=["image"],
                output_names=output_names,
                dynamic_shapes=(sizes,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    except OSError:  # such as of a full disk
        raise
    except Exception as error:  # a foreign encoder may use operators that have no counterpart
        raise SuperCLError(
            "The network cannot be exported as ONNX.",
            expected="an encoder of operators that ONNX has, for images of any size",
            found=f"{type(error).__name__}: {error!s:.300}",
            next_step="Export it as safetensors, or take another backbone.",
        ) from error


def _check(network: nn.Module, image_BCYX: Tensor, path: Path) -> None:
    """Raise SuperCLError unless ONNX Runtime gives what the network gives."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": image_BCYX.numpy()})
    with torch.inference_mode():
        outputs = network(image_BCYX)
    expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    for name, one, other in zip((o.name for o in session.get_outputs()), found, expected, strict=True):
        difference = float(np.abs(one - other.numpy()).max()) / max(1.0, float(other.abs().max()))
        if not difference <= TOLERANCE:
            raise SuperCLError(
                "ONNX Runtime and PyTorch disagree.",
                where=f"{path.name}, output {name}, images {tuple(image_BCYX.shape)}",
                expected=f"a difference of at most {TOLERANCE:g}",
                found=f"{difference:.2g}",
                next_step="Install current versions of torch, onnxscript and onnxruntime, or export as safetensors.",
            )


def _missing(error: ModuleNotFoundError) -> UsageError:
    return UsageError(
        "Export as ONNX needs the extra 'export'.",
        found=f"no module {error.name!r}",
        next_step="pip install 'supercl[export]'",
    )
