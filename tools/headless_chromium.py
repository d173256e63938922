"""Runs a page in the Chromium of this machine, without a window: what it looks like, and what its
elements are then.

Uses the browser's own command line, so nothing needs to be installed but Debian's `chromium`.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SETTLE_MS = 6000
"""Of the page's own time, which runs as fast as its requests are answered."""
PICTURE_SETTLE_MS = 90_000
"""The same before a picture: so many looks at a gateway take some seconds of real time, and there
are rates to be seen.
"""
TIMEOUT_S = 90.0
NO_CHROMIUM = "there is no Chromium on this machine: `apt-get install chromium` brings one"


class BrowserError(Exception):
    """The browser did not do what it was asked; the message has the end of what it said."""


def find_chromium() -> str | None:
    """The browser's path; None when there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


async def dump_dom(url: str, width: int = 1440) -> str:
    """The page's elements as HTML, after its scripts have run for a while in a window of that width
    (500 at the least).
    """
    return await _run(url, f"--virtual-time-budget={SETTLE_MS}", f"--window-size={width},720", "--dump-dom")


async def take_screenshot(url: str, path: Path, width: int = 1440, height: int = 720, dark: bool = False) -> None:
    """A PNG of the page."""
    options = [f"--virtual-time-budget={PICTURE_SETTLE_MS}", f"--screenshot={path}", f"--window-size={width},{height}"]
    # 0 is what the engine calls dark.
    await _run(url, *options, "--hide-scrollbars", *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    if not await asyncio.to_thread(path.exists):
        raise BrowserError(f"no picture was written to {path}")


async def _run(url: str, *options: str) -> str:
    async with browser_process(url, *options) as (process, _):
        try:
            async with asyncio.timeout(TIMEOUT_S):
                output, errors = await process.communicate()
        except TimeoutError:
            raise BrowserError(f"the browser did not end within {TIMEOUT_S:g} s") from None
    if process.returncode:
        raise BrowserError(errors.decode(errors="replace")[-500:])
    return output.decode(errors="replace")


@contextlib.asynccontextmanager
async def browser_process(
    url: str, *options: str, output: int = asyncio.subprocess.PIPE
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """A browser with an empty profile, and the profile's folder; killed at the end if it still
    runs.

    Args:
        url: that it opens.
        options: of its command line, besides those that all have.
        output: where what it says goes.

    Raises:
        BrowserError: there is none on this machine.
    """
    chromium = find_chromium()
    if chromium is None:
        raise BrowserError(NO_CHROMIUM)
    with tempfile.TemporaryDirectory(prefix="kvrelay-browser-", ignore_cleanup_errors=True) as profile:
        common = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        common += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"]
        command = [chromium, *common, f"--user-data-dir={profile}", *options, url]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            yield process, Path(profile)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
