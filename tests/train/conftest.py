"""What tests of training share: encoders of other libraries, and one thread, so that sums are in one order."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smp():
    """Makes sure that segmentation-models-pytorch can be imported.

    A torchvision that was built for another PyTorch does not load its operators, and its import fails at the first
    one that it describes. No encoder uses them, so it is enough that they are declared.
    """
    library = None
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pytest.skip("without torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pytest.importorskip("segmentation_models_pytorch")
    yield
    del library  # which ends the declarations
