"""Pictures of pages, taken by Chromium without a window."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from PIL import Image, ImageChops

_WINDOW: Final = (1440, 2400)  # pixels; what a page leaves free below is cut off
_MARGIN: Final = 16
_TIMEOUT_S: Final = 120.0
_FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    f"--window-size={_WINDOW[0]},{_WINDOW[1]}",
)


class ChromiumError(Exception):
    """There is no picture, or the page's scripts complained."""


def chromium() -> str | None:
    """The binary; None: it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def screenshot(page: Path) -> Image.Image:
    """Down to its last row. Raises ChromiumError."""
    binary = chromium()
    if binary is None:
        raise ChromiumError("Chromium is not installed: it takes the pictures")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        taken = Path(directory, "page.png")
        places = (f"--user-data-dir={directory}/profile", f"--screenshot={taken}", page.resolve().as_uri())
        try:
            done = subprocess.run(
                [binary, *_FLAGS, *places], check=False, capture_output=True, text=True, timeout=_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise ChromiumError(f"{page}: {error}") from error
        complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        if complaints or not taken.exists():
            raise ChromiumError(f"{page}: " + "\n".join(complaints or [done.stderr]))
        with Image.open(taken) as opened:
            shown = opened.convert("RGB")
    last_row = shown.crop((0, shown.height - 1, shown.width, shown.height))
    if last_row.getcolors(1) is None:
        raise ChromiumError(f"{page} is higher than {_WINDOW[1]} pixels")
    box = ImageChops.difference(shown, last_row.resize(shown.size)).getbbox()
    return shown.crop((0, 0, shown.width, min(shown.height, box[3] + _MARGIN))) if box else shown
