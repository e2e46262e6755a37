"""The transcript of a new user's first minutes: `python -m benchmarks.first_minutes` writes docs/first-minutes.md anew.

Clones the repository as it is committed into an empty folder, types every command of the page there, one by one, and
puts below each block what the machine answered and how long it took. Ends with an error where a command fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import as_text, machine

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-minutes.md"
MOST_LINES = 30
"""Of an answer; of a longer one the beginning is shown."""


def main() -> None:
    """Run the page, and write it."""
    text = re.sub(r"\n```text\n.*?^```\n", "", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "supercl"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        start = time.monotonic()
        text = re.sub(
            r"^```sh\n(.*?)^```\n",
            lambda block: block[0] + transcript(block[1], clone),
            text,
            flags=re.M | re.S,
        )
        seconds = time.monotonic() - start
    measured = f"<!-- machine -->\nAll of it took {seconds / 60:.0f} minutes: {as_text(machine())}.\n"
    PAGE.write_text(re.sub(r"<!-- machine -->\n(?:All .*\n)?", measured, text), encoding="utf-8")


def transcript(commands: str, clone: Path) -> str:
    """What a shell in the folder `clone` answers to each line of `commands`, as a block of Markdown."""
    lines = ["", "```text"]
    for command in commands.splitlines():
        print(command, file=sys.stderr)
        start = time.monotonic()
        done = subprocess.run(
            shlex.split(command),
            cwd=clone,
            env={**os.environ, "PIP_QUIET": "1", "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode and "doctor" not in command:  # which fails where the machine has a problem
            sys.exit(f"{command}\n{done.stdout}")
        answer = done.stdout.replace(str(clone), "/home/me/supercl").splitlines()
        shown = [line.rstrip() for line in answer[:MOST_LINES]] + ["..."] * (len(answer) > MOST_LINES)
        lines += [f"$ {command}", *shown, f"[{time.monotonic() - start:.0f} s]", ""]
    return "\n".join([*lines[:-1], "```", ""])


if __name__ == "__main__":
    main()
