"""Kills a process at the instant before it changes a file: on PYTHONPATH of whatever `stress.py` starts.

Python imports this file when it starts. Watched are the files below a folder `target`; an order lies beside it:
`log`, to note every change in `operations`, or `SERIAL ROLE KIND NUMBER SCOPE`: the first process in that role (`main`
or `worker`) that is about to make its NUMBER-th change of that kind (`any`, or an event of Python such as `os.rename`)
says so in `killed` and kills itself, or its process group.
"""

import collections
import os
import signal
import sys
import threading
from pathlib import Path

CHANGES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.utime")
ROLE = "main" if "supercl_core.cli" in sys.orig_argv else "worker"

_counts: collections.Counter[tuple[str, str]] = collections.Counter()
_lock = threading.Lock()


def hook(event: str, args: tuple) -> None:
    """Called by Python before every such event, in the thread that is about to cause it."""
    if event not in CHANGES or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    path = args[1] if event == "os.rename" else args[0]
    if not isinstance(path, (str, os.PathLike)):
        return
    path = Path(path)
    if event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] >= 0:
        path = Path(f"/proc/self/fd/{args[-1]}").readlink() / path
    head, found, name = str(path).partition("/target/")
    if not found:
        return
    folder = Path(head)
    try:
        order = (folder / "order").read_text()
    except FileNotFoundError:
        return
    if order == "log":
        with (folder / "operations").open("a") as file:
            file.write(f"{ROLE} {event} {name}\n")
        return
    _, role, kind, number, scope = order.split()
    if role != ROLE or kind not in ("any", event):
        return
    with _lock:
        _counts[head, order] += 1
        if _counts[head, order] != int(number):
            return
    mine = folder / f"order.{os.getpid()}"
    try:
        (folder / "order").rename(mine)
    except FileNotFoundError:
        return  # another process was faster
    mine.write_text(f"{event} {name}")
    mine.rename(folder / "killed")
    os.kill(0 if scope == "group" else os.getpid(), signal.SIGKILL)


sys.addaudithook(hook)
