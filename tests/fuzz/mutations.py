"""Changing valid inputs into crafted ones: mutations that know the format, so that they get past its first check.

Each takes a `random.Random` and the bytes of a file, and returns other bytes. Called by `parsers`.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import google_crc32c

Mutation = Callable[[Random, bytes], bytes]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63) - 1, 2**64, 10**4000,
    0.5, -0.0, 1e-320, 1e30, 1e308, float("nan"), float("inf"),
    "", "0", "1", "none", "a" * 300, "a" * 70_000, "..", "../../x", "/etc/passwd", "a/b", "a\0b", "\ud800",
    "\x1b[31m", "\u202e", "<script>alert(1)</script>", "zarr.json", "float64", "object", "|O", "NaN",
    [], {}, [[]], [0] * 40, ["a", 1], {"": {}}, {"a": {"b": {"c": 1}}},
)  # fmt: skip
"""Values that programs stumble over, in the place of any value of a document."""

TOKENS = (
    b"[", b"]", b"{", b"}", b"[[a]]\n", b"=", b".", b",", b'"', b"'''", b'"""', b"\n", b"\r", b"#", b"\\", b"\0",
    b"\xef\xbb\xbf", b"\xff", b"inf", b"nan", b"-0", b"1e999", b"0x" + b"f" * 40, b"9" * 5000, b"1979-05-27",
    b"07:32:00", b"true", b"none", b'"\\ud800"', b"'a'", b"a.b.c", b"x = 1\n", b"[a]\n", b"{a = 1}", b"[1, 2]",
)  # fmt: skip
"""Pieces of TOML and JSON."""

_LARGEST = 20_000
"""Characters, after which a document does not grow."""

NUMBERS = (
    0,
    1,
    2,
    4,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Change a few places, most of them near the beginning or the end, where formats keep what they declare."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = _place(random, len(out))
        match random.randrange(8):
            case 0 if out:
                out[at] ^= 1 << random.randrange(8)
            case 1 if out:
                out[at] = random.randrange(256)
            case 2 | 3:
                size = random.choice((1, 2, 4, 8))
                number = random.choice(NUMBERS) % 256**size
                out[at : at + size] = number.to_bytes(size, random.choice(("little", "big")))
            case 4:
                out[at:at] = random.choice(TOKENS)
            case 5:
                del out[at : at + random.choice((1, 2, 16, 400))]
            case 6:
                del out[at:]
            case _:
                source = _place(random, len(out))
                out[at:at] = out[source : source + random.choice((1, 8, 64))] * random.choice((1, 2, 50))
    return bytes(out)


def mutate_text(random: Random, data: bytes) -> bytes:
    """Change words, numbers and signs of a text such as TOML."""
    pieces = re.findall(rb"\w+|\s+|.", data, re.DOTALL) or [b""]
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(pieces))
        match random.randrange(6):
            case 0:
                pieces[at] = random.choice(TOKENS)
            case 1:
                pieces.insert(at, random.choice(TOKENS))
            case 2:
                pieces[at] *= min(random.choice((0, 2, 100, 1000)), _LARGEST // (1 + len(pieces[at])))
            case 3:
                pieces[at] = random.choice(pieces)
            case 4:
                pieces[at : at + 4] = pieces[at : at + 4] * random.choice((0, 2, 100)) or [b""]
            case _:
                value = random.choice(VALUES)
                pieces[at] = (json.dumps(value) if isinstance(value, str) else _number_text(value)).encode()
    return b"".join(pieces)


def mutate_json(random: Random, data: bytes) -> bytes:
    """Change values and keys of a JSON document, or of one of its lines."""
    lines = data.split(b"\n") if random.random() < 0.5 else [data]
    at = random.randrange(len(lines))
    try:
        document = [json.loads(lines[at])]
    except (ValueError, RecursionError):
        return mutate_text(random, data)
    for _ in range(random.choice((1, 1, 2, 4))):
        _change_node(random, document)
        try:
            text = json.dumps(document[0] if document else None)
        except ValueError:  # a number of more digits than Python writes
            return mutate_text(random, data)
        if len(text) > _LARGEST:
            break
        document = [json.loads(text)]  # no part of it twice
    lines[at] = text.encode()
    out = b"\n".join(lines)
    return mutate_text(random, out) if random.random() < 0.1 else out


def in_gzip(mutation: Mutation) -> Mutation:
    """Change what is compressed, most of the time."""

    def mutate(random: Random, data: bytes) -> bytes:
        try:
            content = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return mutate_bytes(random, data)
        if random.random() < 0.2:
            return mutate_bytes(random, data)
        return gzip.compress(mutation(random, content), compresslevel=1, mtime=0)

    return mutate


def in_zip(random: Random, data: bytes) -> bytes:
    """Change a member of a zip archive, most of the time, leaving the archive itself in order."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # what was changed before may be no archive any more, in any way
        return mutate_bytes(random, data)
    if random.random() < 0.2 or not members:
        return mutate_bytes(random, data)
    pickles = [name for name in members if name.endswith(".pkl")]
    name = random.choice(pickles if pickles and random.random() < 0.8 else list(members))
    members[name] = mutate_bytes(random, members[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def in_safetensors(random: Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, most of the time, and mend the header's length."""
    size = int.from_bytes(data[:8], "little")
    if random.random() < 0.2 or size > len(data):
        return mutate_bytes(random, data)
    header = mutate_json(random, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def with_checksum(random: Random, data: bytes) -> bytes:
    """Change a chunk, or the index of a shard, and mend the crc32c at its end, most of the time."""
    if random.random() < 0.2 or len(data) < 5:
        return mutate_bytes(random, data)
    content = mutate_bytes(random, data[:-4])
    start = max(0, len(content) - 16 * random.choice((0, 1, 5, 6, 7))) if random.random() < 0.5 else 0
    return content + google_crc32c.value(content[start:]).to_bytes(4, "little")


def _place(random: Random, size: int) -> int:
    near = min(size, 400)
    match random.randrange(3):
        case 0:
            return random.randrange(near + 1) if near < size else random.randrange(max(1, size))
        case 1:
            return size - random.randrange(near) - 1 if size else 0
        case _:
            return random.randrange(max(1, size))


def _number_text(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # more digits than Python writes
        return "9" * 5000


def _change_node(random: Random, document: list[Any]) -> None:
    """Change one value or key of the only item of `document`, in place."""
    nodes: list[tuple[Any, Any]] = []
    waiting: list[Any] = [document]
    while waiting:
        node = waiting.pop()
        inner = list(node.items() if isinstance(node, dict) else enumerate(node))
        nodes += [(node, key) for key, _ in inner]
        waiting += [value for _, value in inner if isinstance(value, dict | list)]
    if not nodes:
        return
    node, key = random.choice(nodes)
    match random.randrange(7):
        case 0 if node is not document:
            del node[key]
        case 1:
            other, other_key = random.choice(nodes)
            node[key] = copy.deepcopy(other[other_key])
        case 2 if isinstance(node, dict):
            name = random.choice(VALUES)
            node[name if isinstance(name, str) else f"{key}x"] = node.pop(key)
        case 3:
            for _ in range(random.choice((1, 3, 80))):
                node[key] = [node[key]]
        case 4 if isinstance(node, list) and node is not document:
            node[:] = node * random.choice((0, 2, 50))
        case 5 if isinstance(node[key], int | float):
            node[key] = node[key] * random.choice((-1, 2, 1000, 2**31)) + random.choice((-1, 0, 1))
        case _:
            node[key] = copy.deepcopy(random.choice(VALUES))
