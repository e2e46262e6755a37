"""Descriptors from an encoder against a plain twin, slice by slice; what they depend on, and how they are stored."""

import hashlib
import shutil

import numpy as np
import pytest
import references
import torch
from made_caches import write_cache
from scipy.ndimage import map_coordinates

import train.descriptors
from supercl_core.cache.reader import open_cache
from supercl_core.cache.schema import ASP_GRID
from supercl_core.cache.writer import write_tables
from supercl_core.cache.zarr_files import read_attributes
from supercl_core.checks.verification import verify
from supercl_core.errors import CacheError, SuperCLError, UsageError
from supercl_core.locks import hold, lock_path
from train.descriptors import describe, read_encoder, store_descriptors
from train.models.backbones import build_encoder
from train.models.unet import Encoder, PretrainNet, UNet
from train.models.weights import save_weights
from train.pairs import asp

CPU = torch.device("cpu")
NUM_SLICES = 23
"""Of the tiny cache."""


def make_encoder(in_channels=1, seed=0):
    """A random encoder whose batch norms have seen images."""
    torch.manual_seed(seed)
    encoder = Encoder(in_channels, 4)
    with torch.no_grad():
        encoder(torch.randn(8, in_channels, 32, 32))
    return encoder


@pytest.fixture
def cache(cache_path):
    return open_cache(cache_path)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that holds nothing but its weights."""
    torch.manual_seed(0)
    save_weights(PretrainNet(Encoder(1, 4)), tmp_path / "my run" / "weights.safetensors", {})
    return tmp_path / "my run"


def twin(encoder, cache, n=0):
    """The descriptors of all slices, one by one, in float64 but for the encoder; with n slices on each side."""
    rows = []
    in_channels, stride = encoder.in_channels, encoder.strides[-1]
    encoder.eval()
    for row in cache.done:
        case = cache.case(row.id)
        low, high, mean, std = (
            row.statistic(name)[:, None, None]
            for name in ("percentile_00_5", "percentile_99_5", "mean", "std")
        )
        for z, superpixels in enumerate(case.superpixels_ZYX):
            images = []
            for other in range(z - n, z + n + 1):
                stored = case.image_ZCYX[min(max(other, 0), row.shape[1] - 1)]
                values = np.clip(stored * row.image_scale + row.image_offset, low, high)
                images.append((values - mean) / np.where(std > 0, std, 1))
            image = np.concatenate(images)
            height, width = image.shape[1:]
            image = np.pad(image, ((0, 0), (0, -height % stride), (0, -width % stride))).astype(np.float32)
            image = np.repeat(image, in_channels // len(image), axis=0)
            with torch.no_grad():
                features = encoder(torch.from_numpy(image)[None])[-1][0].double().mean(dim=0).numpy()
            y, x = ((np.arange(size) + 0.5) / stride - 0.5 for size in (height, width))
            pixels = map_coordinates(features, np.meshgrid(y, x, indexing="ij"), order=1, mode="nearest")
            means = references.superpixel_means(pixels, superpixels, int(superpixels.max()) + 1)
            centres = (np.arange(ASP_GRID) + 0.5) / ASP_GRID
            places = np.ix_(*(np.floor(centres * size).astype(int) for size in (height, width)))
            rows.append(means[superpixels[places]].ravel())
    return np.stack(rows)


def made_cache(path, num_channels):
    """Cases of several sizes, below the grid's and of whole steps of 16 too; with outliers, a scale and an offset."""
    cases = {}
    for case, (height, width) in enumerate([(16, 32), (50, 41), (49, 47), (7, 70)]):
        random = np.random.default_rng([case, num_channels])
        image = random.integers(0, 100, (num_channels, 2, height, width)).astype(np.int16)
        image[:, 0, 0, 0] = 30_000
        superpixels = random.integers(0, 300, (2, height, width)).astype(np.uint16)
        cases[f"case_{case}"] = {"image": image, "superpixels": superpixels}
    names = [f"c{channel}" for channel in range(num_channels)]
    scales = {"case_1": (0.5, -20.0)}
    return write_cache(path, cases, name="made", channel_names=names, class_names=(), scales=scales)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("in_channels", [1, 4])
def test_descriptors_equal_the_plain_twin(cache, in_channels):
    encoder = make_encoder(in_channels)
    descriptors = describe(encoder, cache, device=CPU)
    assert (descriptors.dtype, descriptors.shape) == (torch.float32, (NUM_SLICES, ASP_GRID**2))
    expected = twin(encoder, cache)
    np.testing.assert_allclose(descriptors, expected, atol=2e-6 * expected.max())
    assert descriptors.std(dim=1).min() > 0


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_slices_of_many_sizes_and_channels_equal_the_plain_twin(tmp_path, num_channels):
    cache = open_cache(made_cache(tmp_path / "made.zarr", num_channels))
    encoder = make_encoder(num_channels)
    expected = twin(encoder, cache)
    np.testing.assert_allclose(describe(encoder, cache, device=CPU), expected, atol=2e-6 * expected.max())


@pytest.mark.parametrize(("num_channels", "n"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_adjacent_slices_are_channels_as_in_the_plain_twin(tmp_path, num_channels, n):
    cache = open_cache(made_cache(tmp_path / "made.zarr", num_channels))
    encoder = make_encoder(num_channels * (2 * n + 1))
    expected = twin(encoder, cache, n)
    found = describe(encoder, cache, adjacent_slices=n, device=CPU, batch_size=3)
    np.testing.assert_allclose(found, expected, atol=2e-6 * expected.max())


def test_rows_are_in_the_order_of_the_cache_whatever_the_order_of_cases(cache):
    encoder = make_encoder()
    every = describe(encoder, cache, device=CPU, batch_size=1)
    some = describe(encoder, cache, ["case_d", "case_b"], device=CPU, batch_size=1)
    assert torch.equal(some, every[cache.case_slices(["case_b", "case_d"])])


def test_equal_bits_for_equal_batches_and_equal_values_for_others(cache):
    encoder = make_encoder()
    descriptors = describe(encoder, cache, device=CPU)
    assert torch.equal(describe(encoder, cache, device=CPU), descriptors)
    for batch_size in (1, 3, 64):
        other = describe(encoder, cache, device=CPU, batch_size=batch_size)
        torch.testing.assert_close(other, descriptors, rtol=1e-5, atol=1e-6)


def test_sums_do_not_depend_on_the_order_of_pixels(cache, monkeypatch):
    def shuffled_too(features, superpixels, **settings):
        order = torch.randperm(features[0, 0].numel(), generator=torch.Generator().manual_seed(0))
        shuffled = features.flatten(2)[..., order][..., None]
        maps = asp(features, superpixels, **settings)
        again = asp(shuffled, superpixels.flatten(1)[:, order][..., None], **settings)
        assert torch.equal(again.flatten(2), maps.flatten(2)[..., order])
        return maps

    def wide_range(module, arguments, outputs):
        scale = 10.0 ** torch.linspace(-20, 0, outputs[-1][0, 0].numel()).view_as(outputs[-1][0, 0])
        return *outputs[:-1], outputs[-1] * scale

    monkeypatch.setattr(train.descriptors, "asp", shuffled_too)
    encoder = make_encoder()
    encoder.register_forward_hook(wide_range)
    describe(encoder, cache, device=CPU)


def test_the_encoder_is_left_as_it_was(cache):
    encoder = make_encoder()
    encoder.contr_2_1.eval()
    modes = [module.training for module in encoder.modules()]
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    descriptors = describe(encoder, cache, device=CPU)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert not descriptors.requires_grad

    encoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        describe(encoder, cache, device=CPU)
    assert [module.training for module in encoder.modules()] == modes


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_name_case_and_slice(cache, value):
    encoder = make_encoder()
    calls = iter(range(NUM_SLICES))

    def spoil(module, arguments, outputs):
        outputs[-1][0, 0, 0, 0] = value if next(calls) in (7, 9) else 0.0

    encoder.register_forward_hook(spoil)
    with pytest.raises(SuperCLError, match=r"case case_b, slice 2\n(.*\n)*.*2 of 23 slices"):
        describe(encoder, cache, device=CPU, batch_size=1)


def test_an_encoder_of_another_number_of_channels_is_refused(tmp_path):
    cache = open_cache(made_cache(tmp_path / "made.zarr", 2))
    for in_channels in (1, 3):
        with pytest.raises(UsageError, match=rf"(?s)of 2 channels, or of one.*one of {in_channels}"):
            describe(make_encoder(in_channels), cache, device=CPU)
    for in_channels in (1, 2, 3):
        with pytest.raises(
            UsageError, match=rf"(?s)6 channels \(2 in each of 3 slices\).*one of {in_channels}"
        ):
            describe(make_encoder(in_channels), cache, adjacent_slices=1, device=CPU)


# ---------------------------------------------------------------- reading encoders


def test_the_encoder_of_every_kind_of_weights_is_read(tmp_path):
    torch.manual_seed(0)
    network = UNet(Encoder(4, 6), num_classes=3)
    save_weights(network, tmp_path / "run" / "weights.safetensors", {})
    published = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"net": published}, tmp_path / "published.pth")
    expected = network.encoder.state_dict()
    for source in (tmp_path / "run", tmp_path / "run" / "weights.safetensors", tmp_path / "published.pth"):
        for num_channels in (1, 4):
            encoder, adjacent_slices = read_encoder(source, num_channels=num_channels)
            assert adjacent_slices == 0
            found = encoder.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_encoder_of_one_channel_is_adapted_to_images_of_several(run):
    torch.manual_seed(1)
    image = torch.randn(1, 1, 32, 32)
    one, three = (read_encoder(run, num_channels=channels)[0].eval() for channels in (1, 3))
    with torch.no_grad():
        torch.testing.assert_close(three(image.expand(-1, 3, -1, -1))[-1], one(image)[-1])


@pytest.mark.parametrize(
    ("shape", "found"),
    [(None, "none"), ((4,), r"\(4,\)"), ((0, 1, 3, 3), r"\(0, 1, 3, 3\)")],
)
def test_weights_without_an_encoder_are_refused(tmp_path, shape, found):
    weights = {"head.0.weight": torch.ones(2)}
    if shape is not None:
        weights["encoder.contr_1_1.0.weight"] = torch.ones(shape)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(SuperCLError, match=rf"(?s)no encoder.*found: .*{found}"):
        read_encoder(tmp_path / "other.pth", num_channels=1)


def test_a_first_tensor_that_promises_a_huge_encoder_is_refused(tmp_path):
    torch.save({"encoder.contr_1_1.0.weight": torch.ones(60_000, 1, 3, 3)}, tmp_path / "huge.pth")
    with pytest.raises(SuperCLError, match="another architecture"):
        read_encoder(tmp_path / "huge.pth", num_channels=1)


RESNET = "monai:resnet10"


@pytest.fixture
def resnet_run(tmp_path):
    """The folder of a run with an encoder of another library, which has seen images."""
    torch.manual_seed(0)
    network = PretrainNet(build_encoder(RESNET, in_channels=1, filters=32))
    network(torch.randn(4, 1, 64, 64), None)
    metadata = {"backbone": RESNET, "in_channels": "1", "filters": "32"}
    save_weights(network, tmp_path / "resnet" / "weights.safetensors", metadata)
    return tmp_path / "resnet", network.encoder


def test_the_encoder_of_another_backbone_is_read_and_adapted(resnet_run):
    run, expected = resnet_run
    image = torch.randn(1, 1, 64, 64)
    for num_channels in (1, 2):
        encoder = read_encoder(run, num_channels=num_channels)[0].eval()
        assert encoder.in_channels == num_channels
        with torch.no_grad():
            found = encoder(image.expand(-1, num_channels, -1, -1))[-1]
            torch.testing.assert_close(found, expected.eval()(image)[-1])


def test_descriptors_of_another_backbone_equal_the_plain_twin(tmp_path, resnet_run):
    run, encoder = resnet_run
    path = made_cache(tmp_path / "made.zarr", 1)
    store(path, run)
    expected = twin(encoder, open_cache(path))
    found = open_cache(path).descriptors("resnet")
    np.testing.assert_allclose(found, expected, atol=2e-6 * expected.max())
    attributes = read_attributes(path / "descriptors" / "resnet", "descriptors/{name}")
    assert attributes["encoder"]["backbone"] == RESNET


@pytest.mark.parametrize("named", [{}, {"in_channels": "x"}, {"in_channels": "7"}, {"in_channels": "60000"}])
def test_metadata_that_do_not_fit_the_weights_are_refused(tmp_path, resnet_run, named):
    _, encoder = resnet_run
    save_weights(
        torch.nn.ModuleDict({"encoder": encoder}), tmp_path / "a.safetensors", {"backbone": RESNET, **named}
    )
    with pytest.raises(SuperCLError, match="no encoder of this project") as caught:
        read_encoder(tmp_path / "a.safetensors", num_channels=1)
    assert caught.value.found == named.get("in_channels", "none")


def test_weights_of_another_architecture_than_their_backbone_are_refused(tmp_path):
    metadata = {"backbone": RESNET, "in_channels": "1"}
    save_weights(PretrainNet(Encoder(1, 4)), tmp_path / "a.safetensors", metadata)
    with pytest.raises(SuperCLError, match="of backbone monai:resnet10 is of another architecture"):
        read_encoder(tmp_path / "a.safetensors", num_channels=1)


# ---------------------------------------------------------------- storing


def store(path, source, **settings):
    return store_descriptors(open_cache(path), source, device=CPU, batch_size=8, **settings)


def test_stored_descriptors_are_those_of_the_encoder(cache_copy, run):
    assert store(cache_copy, run) == "my run"
    cache = open_cache(cache_copy)
    expected = describe(read_encoder(run, num_channels=1)[0], cache, device=CPU, batch_size=8)
    np.testing.assert_array_equal(cache.descriptors("my run"), expected)
    attributes = read_attributes(cache_copy / "descriptors" / "my run", "descriptors/{name}")
    assert attributes["encoder"] == {
        "source": str(run),
        "digest": hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest(),
        "backbone": "unet",
        "filters": 4,
        "in_channels": 1,
    }
    assert attributes["slices_digest"] == cache.slices_digest
    assert attributes["provenance"]["versions"]["torch"] == torch.__version__
    assert verify(cache_copy, num_workers=1, on_case=lambda: None).damages == ()
    assert not lock_path(cache_copy).exists()


def save_adjacent(path, encoder, adjacent_slices):
    save_weights(PretrainNet(encoder), path, {"backbone": "unet", "adjacent_slices": adjacent_slices})
    return path


def test_an_encoder_trained_with_adjacent_slices_gets_them(cache_copy, tmp_path):
    encoder = make_encoder(5)
    store(cache_copy, save_adjacent(tmp_path / "five.safetensors", encoder, "2"))
    expected = twin(encoder, open_cache(cache_copy), 2)
    found = open_cache(cache_copy).descriptors("five")
    np.testing.assert_allclose(found, expected, atol=2e-6 * expected.max())


def test_an_encoder_of_other_channels_than_its_adjacent_slices_ask_for_is_refused(cache_copy, tmp_path):
    source = save_adjacent(tmp_path / "three.safetensors", make_encoder(3), "2")
    with pytest.raises(UsageError, match=r"(?s)of 5 channels \(1 in each of 5 slices\).*found: +one of 3"):
        store(cache_copy, source)
    assert open_cache(cache_copy).set_names("descriptors") == []


@pytest.mark.parametrize("adjacent_slices", ["", "-1", "1.0", "none", "9" * 5000])
def test_a_number_of_adjacent_slices_that_is_none_is_refused(tmp_path, adjacent_slices):
    source = save_adjacent(tmp_path / "a.safetensors", make_encoder(3), adjacent_slices)
    with pytest.raises(SuperCLError, match="no encoder of this project") as caught:
        read_encoder(source, num_channels=1)
    assert "adjacent_slices" in caught.value.expected
    assert adjacent_slices[:5] in caught.value.found


def test_the_name_is_that_of_the_run_or_file(cache_copy, run, tmp_path):
    assert store(cache_copy, run / "weights.safetensors") == "my run"
    torch.save(PretrainNet(Encoder(4, 4)).state_dict(), tmp_path / "v1.2.pth")
    assert store(cache_copy, tmp_path / "v1.2.pth") == "v1.2"
    assert store(cache_copy, tmp_path / "v1.2.pth", name="mine") == "mine"
    assert open_cache(cache_copy).set_names("descriptors") == ["mine", "my run", "v1.2"]


@pytest.mark.parametrize("name", ["", "intensity", "a/b", ".hidden", "x" * 300])
def test_impossible_names_are_refused(cache_copy, run, name):
    with pytest.raises(UsageError, match="--name"):
        store(cache_copy, run, name=name)
    assert open_cache(cache_copy).set_names("descriptors") == []


def test_a_cache_in_use_is_refused(cache_copy, run):
    with hold(cache_copy), pytest.raises(CacheError, match="in use"):
        store(cache_copy, run)


def test_the_slices_are_those_that_the_cache_has_under_the_lock(cache_copy, run):
    opened = open_cache(cache_copy)
    write_tables(cache_copy, opened.rows[:3], num_channels=1)
    store_descriptors(opened, run, device=CPU, batch_size=8)
    assert len(open_cache(cache_copy).descriptors("my run")) == 16


def test_what_is_interrupted_leaves_the_descriptors_before(cache_copy, run, monkeypatch):
    store(cache_copy, run)
    before = open_cache(cache_copy).descriptors("my run")
    torch.manual_seed(7)
    save_weights(PretrainNet(Encoder(1, 4)), run / "weights.safetensors", {})

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train.descriptors, "write_descriptors", stopped)
        with pytest.raises(KeyboardInterrupt):
            store(cache_copy, run)
    np.testing.assert_array_equal(open_cache(cache_copy).descriptors("my run"), before)

    def robbed(*arguments, **settings):
        shutil.rmtree(lock_path(cache_copy))
        return describe(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(train.descriptors, "describe", robbed)
        with pytest.raises(CacheError, match="lock of the cache was lost"):
            store(cache_copy, run)
    np.testing.assert_array_equal(open_cache(cache_copy).descriptors("my run"), before)

    store(cache_copy, run)
    assert not np.array_equal(open_cache(cache_copy).descriptors("my run"), before)
