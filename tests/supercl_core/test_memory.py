"""Freed memory stays with the process where it was asked to, and with the system where it was not."""

import ctypes
import subprocess
import sys

import pytest

from supercl_core import memory

SCRIPT = """
import ctypes, resource, sys
from supercl_core.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
limit, size, count = sys.argv[1], int(sys.argv[2]) << 20, int(sys.argv[3])
if limit != "none":
    keep_freed_memory(None if limit == "all" else int(limit) << 20)

def faults():
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

faults(), faults()
print(faults())
"""
"""Page faults of the third round of taking so many blocks of so many MiB, filling and freeing them."""

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc here")


@glibc
@pytest.mark.parametrize(
    ("limit_mib", "size_mib", "count", "kept"),
    [
        ("none", 64, 4, False),
        ("all", 64, 4, True),
        ("all", 4, 20, True),
        ("none", 4, 20, False),
        (256, 4, 20, True),
        (8, 4, 20, False),
        (256, 64, 4, False),
    ],
)
def test_freed_pages_are_new_unless_they_are_kept(limit_mib, size_mib, count, kept):
    command = [sys.executable, "-c", SCRIPT, *(str(value) for value in (limit_mib, size_mib, count))]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    least_pages = size_mib * count // 2  # of 2 MiB, the largest ones
    assert (faults < least_pages / 4) == kept


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory.__wrapped__()


def test_on_windows_nothing_happens(monkeypatch):
    def refuse(name):
        raise TypeError("there is no library without a name")

    monkeypatch.setattr(memory.ctypes, "CDLL", refuse)
    monkeypatch.setattr(sys, "platform", "win32")
    memory.keep_freed_memory.__wrapped__()
