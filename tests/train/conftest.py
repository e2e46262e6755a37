"""What tests of training share: a fine-tuned run, encoders of other libraries, and one thread (sums in one order)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tuned_path(cache_path, tmp_path_factory):
    """A run fine-tuned on case_b, long enough to predict every class somewhere; its test cases are case_a and case_c.

    For reading only.
    """
    from supercl_core.cache.reader import open_cache
    from supercl_core.splits import Split
    from train.augment import AugmentConfig
    from train.finetuning import finetune
    from train.recipes import FinetuneConfig

    path = tmp_path_factory.mktemp("tuned") / "run"
    split = Split(file="s.json", labelled=("case_b",), test=("case_a", "case_c"), num_labelled_keys=1)
    config = FinetuneConfig(
        steps=40,
        batch_size=6,
        patch_size=(32, 32),
        filters=4,
        lr=1e-2,
        warmup_steps=2,
        ema_decay=0,
        foreground_share=0,
        augment=AugmentConfig(p_brightness=0, p_contrast=0, p_blur=0, p_geometric=0, crop=(1.0, 1.0)),
        device="cpu",
        precision="float32",
    )
    finetune(open_cache(cache_path), path, split=split, config=config)
    return path


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
