"""Devices and precisions by name, and networks prepared for training."""

from pathlib import Path

import pytest
import torch
from torch import nn

from supercl_core.errors import SuperCLError, UsageError
from train import device as module
from train.device import peak_memory, prepare, resolve_precision, select_device
from train.loop import LoopConfig

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def settings(**changes):
    values = {"steps": 1, "batch_size": 1, "lr": 1.0, "final_lr": 0.0, "warmup_steps": 0}
    return LoopConfig(**{**values, "precision": "float32", **changes})


class Spy(nn.Module):
    """A convolution that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, image, other=None, *, passes=1):
        self.called = (image, other, passes)
        return self.conv(image)


# ---------------------------------------------------------------- devices


def test_devices_by_name():
    assert select_device("cpu") == CPU
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu-v9", "cuda:99", ""):
        with pytest.raises(UsageError, match="cannot be used") as refused:
            select_device(name)
        assert repr(name) in refused.value.what


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"bf16": True, "neon": True}, "bfloat16"),
        ({"bf16": False, "neon": True}, "float32"),
        ({"avx512_bf16": False, "avx512_f": True, "architecture": "x86_64"}, "float32"),
    ],
)
def test_auto_takes_bfloat16_where_a_cpu_multiplies_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == precision


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("flags : fpu avx512f avx512_bf16", "bfloat16"),
        ("Features : fp asimd bf16", "bfloat16"),
        ("fpu", "float32"),
    ],
)
def test_linux_is_asked_where_torch_does_not_tell(monkeypatch, tmp_path, flags, precision):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / Path(name).name)
    assert resolve_precision("auto", CPU) == "float32"  # no such file
    (tmp_path / "cpuinfo").write_text(flags)
    assert resolve_precision("auto", CPU) == precision


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_auto_takes_bfloat16_from_ampere_on(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", GPU) == precision


def test_auto_takes_float32_on_other_devices():
    assert resolve_precision("auto", torch.device("mps")) == "float32"


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="far slower than float32"):
        resolve_precision("float16", CPU)
    assert resolve_precision("float16", GPU) == "float16"
    assert [resolve_precision(name, CPU) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_weights_are_channels_last_where_it_is_set(channels_last):
    network = Spy()
    call = prepare(network, config=settings(channels_last=channels_last), device=CPU)
    image, vector = torch.ones(2, 2, 8, 8), torch.ones(2, 5)
    output = call(image, vector, passes=2)
    given, other, passes = network.called
    formats = [
        x.is_contiguous(memory_format=torch.channels_last) for x in (given, network.conv.weight, output)
    ]
    assert formats == [channels_last] * 3
    assert torch.equal(given, image)
    assert other is vector
    assert passes == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_only_what_the_network_computes_has_the_precision(precision):
    network = Spy()
    output = prepare(network, config=settings(precision=precision), device=CPU)(torch.ones(2, 2, 8, 8))
    output.float().sum().backward()
    assert output.dtype == getattr(torch, precision)
    assert network.conv.weight.dtype == network.conv.weight.grad.dtype == torch.float32
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_missing_input_stays_none():
    network = Spy()
    prepare(network, config=settings(), device=CPU)(torch.ones(1, 2, 8, 8), None)
    assert network.called[1] is None


@pytest.mark.filterwarnings(
    "ignore:.*script_method.*deprecated:DeprecationWarning"
)  # what torch itself imports
def test_a_compiled_network_keeps_its_values_and_the_names_of_its_weights():
    image = torch.randn(2, 2, 8, 8)
    plain, compiled = Spy(), Spy()
    expected = prepare(plain, config=settings(), device=CPU)(image)
    output = prepare(compiled, config=settings(compile=True), device=CPU)(image)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # the trial, and this network
    torch.testing.assert_close(output, expected)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.compiler.reset()


def test_a_missing_compiler_is_named_before_the_first_step(monkeypatch):
    def broken(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(SuperCLError, match="cannot be compiled") as refused:
        prepare(Spy(), config=settings(compile=True), device=CPU)
    assert refused.value.found == "InvalidCxxCompiler: No working C++ compiler found"


def test_freed_memory_is_kept_on_the_cpu(monkeypatch):
    called = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: called.append(True))
    prepare(Spy(), config=settings(), device=CPU)
    assert called == [True]


def test_peak_memory_is_that_since_the_last_call(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device: calls.append(("read", device)) or 12
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    assert peak_memory(GPU) == {"memory_bytes": 12}
    assert calls == [("read", GPU), ("reset", GPU)]
    assert peak_memory(CPU) == {}
