"""The whole road on a system without what POSIX has: Linux with the gaps of Windows, as far as our modules see it.

What mypy finds for `--platform win32` and `darwin` (calls that are not there) is part of `make lint`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

WINDOWS = '''
import errno, fcntl, importlib, json, os, pathlib, signal, sys

NO_OS = """sched_getaffinity sched_setaffinity geteuid getuid getegid getgid pread pwrite preadv sync posix_fadvise
posix_fallocate O_NONBLOCK O_NOFOLLOW O_CLOEXEC O_DIRECTORY statvfs fstatvfs fork killpg getpgid setsid getloadavg
sysconf sysconf_names uname mkfifo mknod chown fchown lchown nice openpty sendfile memfd_create fchmod""".split()
NO_SIGNAL = "SIGUSR1 SIGUSR2 SIGHUP SIGQUIT SIGKILL SIGALRM SIGCHLD SIGPIPE".split()
NO_MODULES = "fcntl resource pwd grp termios".split()


class Without:
    """A module without some names, and with others changed."""

    def __init__(self, module, missing=(), **changed):
        self.__dict__.update(changed, _module=module, _missing=missing)

    def __getattr__(self, name):
        if name in self._missing:
            raise AttributeError(name)
        return getattr(self._module, name)


def fsync(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "open for reading only")
    os.fsync(descriptor)


def kill(pid, number):
    raise AssertionError("a signal that would end the process")


def rename(self, target):
    if pathlib.Path(target).exists():
        raise FileExistsError(errno.EEXIST, "it exists", str(self))
    os.rename(self, target)
    return self.__class__(target)


def import_ours():
    for name in MODULES:
        importlib.import_module(name)


import_ours()  # and with them whatever they import, on the system as it is
for name in [name for name in sys.modules if name.split(".")[0] in ("supercl_core", "preprocess", "train")]:
    del sys.modules[name]
before = {name: sys.modules.get(name) for name in ("os", "signal", "sys", *NO_MODULES)}
sys.modules.update(
    os=Without(os, NO_OS, fsync=fsync, kill=kill),
    signal=Without(signal, NO_SIGNAL),
    sys=Without(sys, platform="win32"),
    **dict.fromkeys(NO_MODULES),
)
import_ours()
sys.modules.update({name: module for name, module in before.items() if module is not None})
pathlib.Path.rename = rename
'''

ROAD = """
import supercl_core.machine
from preprocess import run
from supercl_core import locks
from supercl_core.archive import forms
from supercl_core.cache import mapped_shard
from supercl_core.cache.reader import open_cache
from supercl_core.checks.verification import verify
from train.methods import PretrainConfig
from train.pretraining import pretrain
from train.stopping import STOP_SIGNALS
from distributed import LocalCluster

assert mapped_shard._libc is None and "affinity" not in supercl_core.machine.core_limits()
assert [number.name for number in STOP_SIGNALS] == ["SIGTERM", "SIGINT"]
assert not locks._this_process("").is_dead()

data, out = map(pathlib.Path, sys.argv[1:])
with LocalCluster(
    n_workers=1, threads_per_worker=1, processes=False, memory_limit=0, dashboard_address="127.0.0.1:0"
) as cluster:
    for num_computed in (4, 0):
        result = run(data, out / "tiny.zarr", scheduler=cluster.scheduler_address)
        assert (result.num_computed, result.failed) == (num_computed, ())
for archive in ("tiny.zip", "archive.zarr"):
    forms.pack(out / "tiny.zarr", out / archive, num_workers=2)
    forms.unpack(out / archive, out / f"again-{archive}", num_workers=2)
    assert not verify(out / f"again-{archive}", num_workers=1, on_case=lambda: None).damages
cache = open_cache(out / "again-tiny.zip")
config = PretrainConfig(steps=2, filters=4, batch_size=2, patch_size=(16, 16), device="cpu")
print(pretrain(cache, out / "run", config=config, excluded=()).name)
"""


@pytest.mark.slow
def test_the_road_without_what_windows_lacks(msd_path: Path, tmp_path: Path) -> None:
    files = sorted(
        file
        for package in ("supercl_core", "preprocess", "train")
        for file in (REPOSITORY / package).rglob("*.py")
        if "export" not in file.parts  # other frameworks may be there or not
    )
    modules = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    finished = subprocess.run(
        [sys.executable, "-c", f"MODULES = {modules!r}\n{WINDOWS}\n{ROAD}", msd_path, tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "weights.safetensors\n"
