"""Files and folders are whole or absent, whatever stops the writer; what is read can do no harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from supercl_core.files import (
    DEEPEST,
    atomic_file,
    parse_json,
    parse_toml,
    read_json,
    read_text,
    read_toml,
    replace_folder,
    sync,
    wip_path,
    write_json,
    write_text,
)


def test_file_replaces_the_older_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for text in ("first", "größer"):
        write_text(tmp_path / "deep" / "x.txt", text)
        assert (tmp_path / "deep" / "x.txt").read_text(encoding="utf-8") == text
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.txt"]


def test_an_error_while_writing_keeps_the_older_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x.nii.gz", "old")

    def write_half() -> None:
        with atomic_file(tmp_path / "x.nii.gz") as wip:
            assert wip.name.endswith(".nii.gz")
            assert wip.parent == tmp_path
            wip.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "x.nii.gz").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.nii.gz"]


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}


def test_folder_replaces_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for name in ("first", "second"):
        wip = wip_path(tmp_path / "out")
        wip.mkdir()
        (wip / name).touch()
        replace_folder(wip, target)
        assert [file.name for file in target.iterdir()] == [name]
        assert not wip.exists()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]
    assert [file.name for file in tmp_path.iterdir()] == ["deep"]


def test_wip_is_a_sibling(tmp_path: Path) -> None:
    assert wip_path(tmp_path / "a.zarr") == tmp_path / "a.zarr.wip"


# ---------------------------------------------------------------- reading


def test_text_is_read_up_to_the_limit_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffgröße\r\n".encode())
    assert read_text(tmp_path / "x.txt", limit_bytes=12) == "größe\r\n"
    with pytest.raises(ValueError, match="more than 11 bytes"):
        read_text(tmp_path / "x.txt", limit_bytes=11)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_does_not_hang_the_reader(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.toml"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        read_text(file, limit_bytes=100)


def test_an_endless_file_takes_no_more_memory_than_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_text(tmp_path / "x", limit_bytes=100)


@pytest.mark.parametrize("name", ["none", ".", "a\0b", "x" * 300])
def test_what_cannot_be_opened_raises_nothing_unexpected(tmp_path: Path, name: str) -> None:
    with pytest.raises((OSError, ValueError)):
        read_text(tmp_path / name, limit_bytes=100)


NESTED = DEEPEST + 1
HARMFUL_JSON = {
    "[" * NESTED + "]" * NESTED: "nested deeper",
    "[" * 100_000: "nested deeper",
    '{"a":' * NESTED + "1" + "}" * NESTED: "nested deeper",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "'c' appears twice",
    "[1e999]": "number inf",
    "[NaN]": "number nan",
    '{"a": -Infinity}': "number -inf",
    f"[{1 << 64}]": "64 bits",
    f"[-{(1 << 63) + 1}]": "64 bits",
    f"[{'9' * 5000}]": "limit",
    '["\\ud800"]': "surrogates not allowed",
    '{"\\udfff": 1}': "surrogates not allowed",
    '["a\\u0000"]': "NUL",
    "": "Expecting value",
}


@pytest.mark.parametrize("text", HARMFUL_JSON, ids=lambda text: text[:12])
def test_harmful_json_is_refused_with_its_reason(text: str) -> None:
    with pytest.raises(ValueError, match=HARMFUL_JSON[text]):
        parse_json(text)


def test_json_up_to_its_limits_is_read(tmp_path: Path) -> None:
    text = "[" * DEEPEST + f'{(1 << 64) - 1}, {-(1 << 63)}, 1e308, "\\ud83d\\ude00"' + "]" * DEEPEST
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json", limit_bytes=200) == json.loads(text)


HARMFUL_TOML = {
    "a = " + "[" * NESTED + "]" * NESTED: "nested deeper",
    "a = " + "[" * 100_000: "nested deeper",
    "a." * 100 + "a = 1": "nested deeper",
    "a = nan": "number nan",
    "a = [-inf]": "number -inf",
    "a = 0x" + "f" * 5000: "64 bits",
    "a = " + "9" * 5000: "limit",
    'a = "\\u0000"': "NUL",
    "a = 1\na = 2": "overwrite",
}


@pytest.mark.parametrize("text", HARMFUL_TOML, ids=lambda text: text[:12])
def test_harmful_toml_is_refused_with_its_reason(text: str) -> None:
    with pytest.raises(ValueError, match=HARMFUL_TOML[text]):
        parse_toml(text)


def test_toml_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = 1\n[b]\nc = [0.5, 'x']\n")
    assert read_toml(tmp_path / "x.toml", limit_bytes=100) == {"a": 1, "b": {"c": [0.5, "x"]}}


# ---- what other systems lack


def test_without_signs_for_pipes_and_for_syncing_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("O_NONBLOCK", "sync"):
        monkeypatch.delattr(os, name)
    write_text(tmp_path / "file", "text")
    assert read_text(tmp_path / "file", limit_bytes=4) == "text"
    sync()


def test_what_is_synced_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to sync what is open for reading only."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.write(descriptor, b"")))
    write_text(tmp_path / "file", "text")
    assert synced == [0]
