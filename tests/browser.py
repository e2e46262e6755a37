"""Pages of ours in a real browser: chromium without a window."""

from __future__ import annotations

import html
import json
import subprocess
from pathlib import Path
from typing import Any


def found_by(wrapper: Path, *, width: int) -> Any:
    """The JSON that the scripts of a page leave in its element `found`; nothing may reach the browser's console.

    `width`: pixels that the content of the page needs.
    """
    finished = subprocess.run(
        [
            "chromium",
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
            *(f"--user-data-dir={wrapper.parent / 'profile'}", f"--window-size={width + 50},1000"),
            *("--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert "CONSOLE" not in finished.stderr
    return json.loads(html.unescape(finished.stdout.rsplit('<pre id="found">', 1)[1].split("</pre>")[0]))
