"""Everything that reads what others wrote, each with valid inputs, mutations that know its format, and a check.

An input is one byte that chooses among the files that a parser reads (or among their kinds), then the bytes of the
file. `check` gives an input to a parser: only a SuperCLError with a readable message may come out of it, soon and
without much memory, and a result must keep its contract. Called by `tests/test_fuzz.py` for a moment and by
`tests/fuzz/run.py` for long. A parser is added by a function that prepares it and a line in PARSERS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from fuzz import mutations
from fuzz.mutations import Mutation

from supercl_core.cache.schema import SETS
from supercl_core.errors import SuperCLError

MOST_SECONDS = 2.0
"""Of processor time that an input of a few kilobytes may take."""
MOST_MEMORY_BYTES = 1 << 30
"""That an input may take."""
MOST_MESSAGE = 5000
"""Characters of an error."""

Target = Callable[[bytes], None]
FINDINGS = Path(__file__).parent / "findings"
"""Inputs that once broke a parser, in a folder for each, named after the symptom."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Valid files, to start from."""

    msd: Path
    """The tiny data set of the tests."""
    cache: Path
    """Its cache, with descriptors `intensity`."""
    scratch: Path
    """An empty folder."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A parser that is ready to be given inputs."""

    target: Target
    seeds: Sequence[bytes]
    mutate: Sequence[Mutation]
    """By the first byte of an input; the last one serves the rest."""

    def mutated(self, random: Random, data: bytes) -> bytes:
        """Another input, made of `data`."""
        if not data or random.random() < 0.02:
            return bytes([random.randrange(256)]) + data[1:]
        mutation = self.mutate[min(data[0], len(self.mutate) - 1)]
        return data[:1] + mutation(random, data[1:])


class BrokenContractError(AssertionError):
    """A parser took what it must refuse, gave what it must not give, or took too much of the machine."""


def check(target: Target, data: bytes) -> bool:
    """Give `data` to a parser; return whether it took it. Raises whatever may not come out of a parser."""
    start = time.process_time()
    try:
        target(data)
        taken = True
    except SuperCLError as error:
        taken = False
        message = error.message()
        message.encode()
        if len(message) > MOST_MESSAGE or any(ord(c) < 32 and c not in "\n\t" for c in message):
            raise BrokenContractError(f"an error nobody can read: {message[:300]!r}") from error
    seconds = time.process_time() - start
    if seconds > MOST_SECONDS:
        raise BrokenContractError(f"{seconds:.1f} s for {len(data):,} bytes")
    return taken


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """Let this process have MOST_MEMORY_BYTES of address space more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MOST_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def findings(name: str) -> list[Path]:
    """The inputs that once broke the parser `name`."""
    return sorted((FINDINGS / name).glob("*"))


def _settings(world: World) -> Prepared:
    from preprocess.pipeline import PreprocessConfig
    from supercl_core.config import as_dict, digest, from_dict, resolve
    from train.methods import PretrainConfig
    from train.recipes import FinetuneConfig

    kinds: list[Any] = [PreprocessConfig, PretrainConfig, FinetuneConfig]
    file = world.scratch / "settings.toml"

    def resolved(kind: Any, **sources: Any) -> None:
        config = resolve(kind, **sources)
        expect(from_dict(kind, as_dict(config)) == config, "settings that change on their way through JSON")
        digest(as_dict(config))

    def target(data: bytes) -> None:
        kind = kinds[data[0] % len(kinds)]
        for line in data[1:].decode(errors="surrogateescape").split("\n")[:20]:
            with contextlib.suppress(SuperCLError):
                resolved(kind, assignments=[line])
        file.write_bytes(data[1:])
        resolved(kind, config_path=file)

    seeds = []
    for index, kind in enumerate(kinds):
        values = as_dict(kind())
        nested = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines = [f"{key} = {_toml(value)}" for key, value in values.items() if key not in nested]
        for key, part in nested.items():
            lines += [f"[{key}]", *(f"{name} = {_toml(value)}" for name, value in part.items())]
        seeds.append(bytes([index]) + "\n".join(line for line in lines if "null" not in line).encode())
    return Prepared(target=target, seeds=seeds, mutate=[mutations.mutate_text])


def _slurm(world: World) -> Prepared:
    from preprocess.cluster import job_script, read_slurm

    file = world.scratch / "slurm.toml"

    def target(data: bytes) -> None:
        file.write_bytes(data[1:])
        job_script(read_slurm(file))

    seed = b"""\0maximum_jobs = 4
minimum_jobs = 1
cores = 8
memory = "16GB"
processes = 2
queue = "normal"
walltime = "01:00:00"
job_extra_directives = ["--exclusive"]
job_script_prologue = ["source activate"]
death_timeout = 60
[scheduler_options]
port = 8786
"""
    return Prepared(target=target, seeds=[seed], mutate=[mutations.mutate_text])


def _study(world: World) -> Prepared:
    from train.study.declaration import Study, read_study

    file = world.scratch / "study.toml"

    def target(data: bytes) -> None:
        file.write_bytes(data[1:])
        study = read_study(file)
        expect(Study.from_dict(study.as_dict()) == study, "a study that changes on its way through JSON")
        for cell in study.cells():
            expect(
                cell.path(world.scratch).is_relative_to(world.scratch), "a run outside of the study's folder"
            )
            study.finetune_config(cell, device="cpu")

    seeds = [
        b"\0" + file.read_bytes() for file in sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
    ]
    return Prepared(target=target, seeds=seeds, mutate=[mutations.mutate_text])


def _split(world: World) -> Prepared:
    from supercl_core.splits import read_split

    file = world.scratch / "split.json"
    case_ids = ["case_a", "case_b", "case_c", "case_d"]

    def target(data: bytes) -> None:
        file.write_bytes(data[1:])
        for name in (str(file), f"{file}:tiny"):
            for num_labelled in (None, 1, 2):
                split = read_split(name, case_ids, data_set="Task99_Tiny", num_labelled=num_labelled)
                expect({*split.test, *split.labelled} <= {*case_ids}, "a case that does not exist")
                expect(not {*split.test} & {*split.labelled}, "a test case among the labelled ones")

    one = {"labelled": {"1": ["case_a"], "2": ["case_a", 2]}, "test": ["case_d"]}
    seeds = [b"\0" + json.dumps(value).encode() for value in (one, {"tiny": one, "other": one})]
    text = "# tiny\nsample 1 train_keys: [case_a]\nsample 2 train_keys:[case_a 2]\ntest: [ case_d\n]\n"
    mutate = [mutations.mutate_json, mutations.mutate_json, mutations.mutate_text]
    return Prepared(target=target, seeds=[*seeds, b"\0" + text.encode()], mutate=mutate)


def _data_set(world: World) -> Prepared:
    from supercl_core.sources import discover

    folder = Path(shutil.copytree(world.msd, world.scratch / "data_set"))

    def use() -> None:
        for case in discover(folder).cases:
            inside = all(path.resolve().is_relative_to(folder.resolve()) for path in case.paths)
            expect(bool(case.problem) or inside, f"a file outside of the data set: {case.paths}")
            expect(bool(case.problem) or "/" not in case.id, f"the case id {case.id!r}")

    return _replacing([folder / "dataset.json"], use, mutations.mutate_json)


def _nnunet(world: World) -> Prepared:
    from supercl_core.sources import discover

    folder = world.scratch / "nnunet"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "imagesTr/a_0000.nii.gz").touch()
    declared = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(declared))

    def use() -> None:
        source = discover(folder)
        expect(0 < len(source.class_names or "") <= 256, "no classes, or more than a byte holds")
        for case in source.cases:
            expect(all(path.parent == folder / "imagesTr" for path in case.paths), f"files {case.paths}")

    return _replacing([folder / "dataset.json"], use, mutations.mutate_json)


def _run(world: World) -> Prepared:
    import jinja2
    from rich.console import Console

    from train import runs
    from train.comparison import compare_runs, read_runs, render_table
    from train.metrics import METRICS, summarise
    from train.report import figures
    from train.report.page import write_report

    folder = world.scratch / "run"
    description: dict[str, Any] = {
        "kind": "finetune",
        "config": {"steps": 20, "lr": 0.1, "augment": {"p_blur": 0.5}, "patch_size": [32, 32]},
        "world_size": 1,
        "model": {"backbone": "unet", "in_channels": 1, "num_classes": 2, "filters": 4},
        "inference": {"adjacent_slices": 0, "mirror_axes": ["y"], "largest_component": [1]},
        "cache": {
            "path": "/nowhere/a.zarr",
            "name": "a",
            "config_digest": "d",
            "num_channels": 1,
            "num_slices": 9,
            "class_names": ["background", "heart"],
        },
        "cases": {"train": ["case_a"], "validation": [], "test": ["case_b", "case_c"]},
        "content_digests": {"case_a": "d"},
        "split": {"file": "split.json", "labelled": 2},
        "init": {"source": "runs/pretrain", "loaded": ["encoder.a"], "adapted": [], "skipped": []},
        "lineage": [],
        "unlabelled_test_cases_seen": 0,
        "weak_labels": {"name": "intensity", "level": 0},
    }
    runs.start_run(folder, description)
    step = {"loss": 0.5, "lr": 0.1, "samples_per_s": 9.5, "data_wait_share": 0.1, "seconds": 1.5}
    lines = [json.dumps({"step": number, **step}) + "\n" for number in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    rows: list[dict[str, Any]] = [
        {"case": case, "class": "heart", **dict.fromkeys(METRICS, value), "state": "ok"}
        for case, value in (("case_b", 0.5), ("case_c", 0.75))
    ]
    names = ["background", "heart"]
    evaluation = {
        "protocol": "p",
        "unit": "mm",
        "class_names": names,
        "rows": rows,
        "summary": summarise(rows),
        "paper": None,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))

    page = world.scratch / "report.html"
    make_environment = jinja2.Environment
    kept: list[jinja2.Environment] = []

    def one_environment(**options: Any) -> jinja2.Environment:
        if not kept:  # compiling the template is most of the work
            kept.append(make_environment(**options))
        return kept[0]

    def use() -> None:
        read = read_runs([folder])
        Console(file=io.StringIO()).print(render_table(compare_runs(read)))
        with contextlib.suppress(SuperCLError):
            runs.start_run(folder, description)
        drawn = mock.Mock(return_value="data:,")
        with (
            mock.patch.multiple(figures, boxes=drawn, curves=drawn),
            mock.patch.object(jinja2, "Environment", one_environment),
        ):
            write_report([folder], page)
        expect("<script" not in page.read_text().lower(), "a script in the page")

    files = [folder / name for name in ("run.json", "metrics.jsonl", "evaluation.json")]
    return _replacing(files, use, mutations.mutate_json)


def _weights(world: World) -> Prepared:
    import torch

    from train.checkpoints import State, load_checkpoint, save_checkpoint
    from train.models.unet import Encoder, UNet
    from train.models.weights import load_encoder, read_weights, save_weights

    network = UNet(Encoder(1, 1), num_classes=2)
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.1)
    folder = world.scratch / "weights"
    folder.mkdir()
    files = [folder / name for name in ("a.safetensors", "a.pt", "old.pt")]
    small = {"encoder.a": torch.ones(2, 3), "b": torch.arange(4)}
    save_weights(network, files[0], {"filters": "1"})
    torch.save({"net": small}, files[1])
    torch.save(small, files[2], _use_new_zipfile_serialization=False)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = State(network=network, optimiser=optimiser, scaler=scaler)
    save_checkpoint(checkpoints, 7, state, keep=1)
    files.append(checkpoints / "step_00000007.pt")
    chosen: list[Path] = []

    def use() -> None:
        if chosen[0] is files[3]:
            expect(load_checkpoint(checkpoints, state, torch.device("cpu")) >= 0, "a negative step")
            return
        for tensor in read_weights(chosen[0]).values():
            tensor.sum()
        load_encoder(network, chosen[0])

    replaced = _replacing(files, use, mutations.mutate_bytes)

    def target(data: bytes) -> None:
        chosen[:] = [files[data[0] % len(files)]]
        replaced.target(data)

    kinds = [mutations.in_safetensors, mutations.in_zip, mutations.mutate_bytes, mutations.in_zip]
    return Prepared(target=target, seeds=replaced.seeds, mutate=kinds)


def _volumes(world: World, suffixes: Sequence[str], mutate: Sequence[Mutation]) -> Prepared:
    import SimpleITK as sitk

    from supercl_core.formats.volumes import read_header, read_volume

    files = [world.scratch / f"volume{suffix}" for suffix in suffixes]
    arrays = [
        np.arange(60, dtype=np.int16).reshape(3, 4, 5),
        np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    ]
    seeds = []
    for index, file in enumerate(files):
        for array in arrays:
            for compressed in {False, file.suffix == ".nrrd", file.suffix == ".mha"}:
                sitk.WriteImage(sitk.GetImageFromArray(array), str(file), useCompression=compressed)
                seeds.append(bytes([index]) + file.read_bytes())

    def target(data: bytes) -> None:
        file = files[data[0] % len(files)]
        file.write_bytes(data[1:])
        header = read_header(file)
        array = read_volume(file).array_CZYX
        expect(array.shape == header.shape, f"shape {array.shape} where the header has {header.shape}")
        expect(array.size > 0 and bool(np.isfinite(array).all()), "an empty volume, or one with NaN")

    return Prepared(target=target, seeds=seeds, mutate=mutate)


def _pictures(world: World) -> Prepared:
    from PIL import Image

    from supercl_core.formats.flat_images import read_image, read_image_header

    files = [world.scratch / f"picture{suffix}" for suffix in (".png", ".jpg", ".tif", ".bmp")]
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    seeds = []
    for index, file in enumerate(files):
        for array in (grey, np.stack([grey] * 3, axis=-1)):
            Image.fromarray(array).save(file)
            seeds.append(bytes([index]) + file.read_bytes())

    def target(data: bytes) -> None:
        file = files[data[0] % len(files)]
        file.write_bytes(data[1:])
        for is_label in (False, True):
            header = read_image_header(file, is_label=is_label)
            array = read_image(file, is_label=is_label).array_CZYX
            expect(array.shape == header.shape, f"shape {array.shape} where the header has {header.shape}")

    return Prepared(target=target, seeds=seeds, mutate=[mutations.mutate_bytes])


def _array_files(world: World) -> Prepared:
    from supercl_core.formats.array_files import has_label, read_array, read_array_header

    files = [world.scratch / f"arrays{suffix}" for suffix in (".npy", ".npz")]
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    np.save(files[0], array)
    np.savez_compressed(files[1], image=array, label=array)

    def target(data: bytes) -> None:
        file = files[data[0] % len(files)]
        file.write_bytes(data[1:])
        header = read_array_header(file)
        array = read_array(file, "label" if has_label(file) else "image").array_CZYX
        expect(array.ndim == len(header.shape) == 4 and array.size > 0, f"shape {array.shape}")
        expect(array.dtype.kind in "iuf" and array.dtype.isnative, f"the type {array.dtype}")

    seeds = [bytes([index]) + file.read_bytes() for index, file in enumerate(files)]
    return Prepared(target=target, seeds=seeds, mutate=[mutations.mutate_bytes, mutations.in_zip])


def _nifti(world: World) -> Prepared:
    return _volumes(
        world, (".nii", ".nii.gz"), (mutations.mutate_bytes, mutations.in_gzip(mutations.mutate_bytes))
    )


def _other_volumes(world: World) -> Prepared:
    def header(random: Random, data: bytes) -> bytes:
        return (mutations.mutate_text if random.random() < 0.5 else mutations.mutate_bytes)(random, data)

    return _volumes(world, (".nrrd", ".mha"), (header,))


def _cache_metadata(world: World) -> Prepared:
    cache = Path(shutil.copytree(world.cache, world.scratch / "metadata.zarr"))
    case = "cases/case_a"
    nodes = ["", "cases", case, f"{case}/image", f"{case}/labels", f"{case}/labels/superpixels"]
    nodes += [
        f"{case}/labels/superpixels/0",
        f"{case}/asp",
        "table",
        "table/id",
        "table/shape",
        "table/statistics",
    ]
    nodes += ["slices/case", "weak_labels/intensity", "weak_labels/intensity/ccl"]
    nodes += ["descriptors/intensity", "descriptors/intensity/values"]
    return _replacing(
        [cache / node / "zarr.json" for node in nodes], _use_cache(cache), mutations.mutate_json
    )


def _cache_tables(world: World) -> Prepared:
    cache = Path(shutil.copytree(world.cache, world.scratch / "tables.zarr"))
    chunks = sorted(file for part in ("table", "slices", *SETS) for file in (cache / part).glob("**/c/**/*"))
    return _replacing([file for file in chunks if file.is_file()], _use_cache(cache), mutations.with_checksum)


def _cache_shards(world: World) -> Prepared:
    cache = Path(shutil.copytree(world.cache, world.scratch / "shards.zarr"))
    shards = sorted(file for file in (cache / "cases" / "case_a").glob("**/c/**/*") if file.is_file())
    originals = [file.read_bytes() for file in shards]
    use = _use_cache(cache)

    def use_and_compare() -> None:
        damages = use()
        same = all(file.read_bytes() == original for file, original in zip(shards, originals, strict=True))
        expect(same or bool(damages), "a changed shard that verification takes for right")

    return _replacing(shards, use_and_compare, mutations.with_checksum)


def _archive(world: World) -> Prepared:
    from supercl_core.archive.forms import pack

    archive = world.scratch / "archive"
    pack(world.cache, archive, num_workers=1)
    nodes = ["", "table", "table/id", "weak_labels/intensity", "cases/case_a", "cases/case_a/image"]
    nodes += ["cases/case_a/labels/superpixels/0", "cases/case_a/asp"]
    chunks = [
        file for file in sorted(archive.glob("**/c/**/*")) if file.is_file() and "case_d" not in file.parts
    ]
    files = [*(archive / node / "zarr.json" for node in nodes), *chunks]
    kinds = [*(mutations.mutate_json for _ in nodes), mutations.with_checksum]
    return dataclasses.replace(_replacing(files, _use_archive(world, archive), kinds[0]), mutate=kinds)


def _archive_zip(world: World) -> Prepared:
    from supercl_core.archive.forms import pack

    archive = world.scratch / "archive.zip"
    pack(world.cache, archive, num_workers=1)

    def near_the_directory(random: Random, data: bytes) -> bytes:
        directory = data.rfind(b"PK\1\2") - random.randrange(1000)
        return data[:directory] + mutations.mutate_bytes(random, data[directory:])

    def mutate(random: Random, data: bytes) -> bytes:
        return random.choice((mutations.mutate_bytes, mutations.in_zip, near_the_directory))(random, data)

    return _replacing([archive], _use_archive(world, archive), mutate)


def _use_archive(world: World, archive: Path) -> Callable[[], object]:
    """Unpack an archive; nothing but a cache may come out of it, and nothing at all beside that."""
    from supercl_core.archive.forms import unpack
    from supercl_core.checks.verification import verify

    place = world.scratch / f"{archive.name}_unpacked"
    place.mkdir()
    names = {file.relative_to(world.cache) for file in world.cache.rglob("*")}

    def use() -> None:
        path = place / "back.zarr"
        try:
            with mock.patch("os.sync"):  # the disk has better to do
                unpack(archive, path, num_workers=1)
            expect(
                {file.relative_to(path) for file in path.rglob("*")} == names, "other files than a cache has"
            )
            damages = verify(path, num_workers=1, on_case=lambda: None).damages
            in_labels = [damage.where.startswith("weak_labels/") for damage in damages]
            expect(all(in_labels), f"a damaged cache, beyond values that nothing seals: {damages}")
        finally:
            expect({*place.iterdir()} <= {path}, "files beside the cache")
            shutil.rmtree(path, ignore_errors=True)

    return use


def _use_cache(path: Path) -> Callable[[], Sequence[object]]:
    """Verify a cache, then read all of it; gives what verification found."""
    from supercl_core.cache.reader import open_cache
    from supercl_core.checks.verification import verify
    from supercl_core.showing import inspection

    def use() -> Sequence[object]:
        damages = verify(path, num_workers=1, on_case=lambda: None).damages
        try:
            cache = open_cache(path)
            for row in cache.done:
                case = cache.case(row.id)
                case.geometry()
                for array in (case.image_ZCYX, case.superpixels_ZYX, case.ground_truth_ZYX, case.asp_ZGG):
                    if array is not None:
                        _expect_inside(array)
                        np.ascontiguousarray(array)
                inspection.case_summary(cache, row.id)
            inspection.summary(cache)
            cache.weak_labels()
            cache.descriptors("intensity")
        except SuperCLError:
            expect(bool(damages), "a cache that verification takes for right, but that cannot be read")
            raise
        return damages

    return use


def _expect_inside(array: np.ndarray) -> None:
    """A mapped array lies inside of the map that it is a view of."""
    low, high = np.lib.array_utils.byte_bounds(array)
    whole: Any = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    first, last = np.lib.array_utils.byte_bounds(whole)
    expect(first <= low <= high <= last, f"an array of {array.shape} that reaches outside of its file")


PARSERS: dict[str, Callable[[World], Prepared]] = {
    "settings": _settings,
    "slurm": _slurm,
    "split": _split,
    "study": _study,
    "data_set": _data_set,
    "nnunet": _nnunet,
    "pictures": _pictures,
    "array_files": _array_files,
    "run": _run,
    "weights": _weights,
    "nifti": _nifti,
    "other_volumes": _other_volumes,
    "cache_metadata": _cache_metadata,
    "cache_tables": _cache_tables,
    "cache_shards": _cache_shards,
    "cache_archive": _archive,
    "cache_archive_zip": _archive_zip,
}
"""By name, in the order in which they are run."""


def expect(kept: bool, broken: str) -> None:
    """Raise BrokenContractError, saying what is `broken`, unless the contract is `kept`."""
    if not kept:
        raise BrokenContractError(broken)


def _replacing(files: Sequence[Path], use: Callable[[], object], mutation: Mutation) -> Prepared:
    """A parser of several files together, one of which is replaced by the input."""
    originals = [file.read_bytes() for file in files]

    def target(data: bytes) -> None:
        index = data[0] % len(files)
        files[index].write_bytes(data[1:])
        try:
            use()
        finally:
            files[index].write_bytes(originals[index])

    seeds = [bytes([index]) + content for index, content in enumerate(originals)]
    return Prepared(target=target, seeds=seeds, mutate=[mutation])


def _toml(value: Any) -> str:
    return json.dumps(value)
