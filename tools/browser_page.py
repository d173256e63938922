"""A page in the Chromium of this machine, without a window, in which a test types and clicks: over
its DevTools protocol.

async with open_page(url, width=420) as page:
    await page.click("#send")
    await page.wait_for("document.title === 'done'")
"""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tools.headless_chromium import TIMEOUT_S, BrowserError, browser_process

POLL_S = 0.02


class BrowserPage:
    """One page, and what a person does there."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it; a promise's when it is settled.

        Raises:
            BrowserError: it throws.
        """
        answer = await self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    async def wait_for(self, expression: str) -> None:
        """Until the expression is true; BrowserError when it is not in time."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not await self.evaluate(expression):  # noqa: ASYNC110  # the page is elsewhere
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise BrowserError(f"not true within {TIMEOUT_S:g} s: {expression}") from None

    async def text_of(self, selector: str) -> str:
        """What a person reads in the first element that the selector finds."""
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle of what the selector finds."""
        found = f"document.querySelector({json.dumps(selector)})"
        box = await self.evaluate(
            f"({found}.scrollIntoView({{block: 'center'}}), {found}.getBoundingClientRect().toJSON())"
        )
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            await self._call("Input.dispatchMouseEvent", type=kind, **place)

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self._call("Input.insertText", text=text)

    async def press_enter(self) -> None:
        """The key, without Shift."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        await self._call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        await self._call("Input.dispatchKeyEvent", type="keyUp", **key)

    async def take_screenshot(self, path: Path) -> None:
        """A PNG of the whole page, also of what one would have to scroll to."""
        answer = await self._call("Page.captureScreenshot", captureBeyondViewport=True)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(answer["data"]))

    async def set_size(self, width: int, height: int) -> None:
        """Of the window in pixels; here it may be as narrow as a telephone's."""
        await self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def go_to(self, url: str) -> None:
        """Opens the address, and waits until its scripts have begun."""
        await self._call("Page.navigate", url=url)
        await self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                message = await self._socket.receive_json()
                if message.get("id") == self._number:  # others are events
                    break
        if "error" in message:
            raise BrowserError(f"{method}: {message['error']['message']}")
        result: dict[str, Any] = message["result"]
        return result


@contextlib.asynccontextmanager
async def open_page(url: str, width: int = 1200, height: int = 900) -> AsyncIterator[BrowserPage]:
    """A page in a browser of its own, which ends with the block.

    Raises:
        BrowserError: there is no browser, or it does not start.
    """
    async with browser_process(
        "about:blank", "--remote-debugging-port=0", "--hide-scrollbars", output=asyncio.subprocess.DEVNULL
    ) as (
        process,
        profile,
    ):
        port = await _debugging_port(process, profile)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (target,) = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = BrowserPage(socket)
                await page.set_size(width, height)
                await page.go_to(url)
                yield page


async def _debugging_port(process: asyncio.subprocess.Process, profile: Path) -> int:
    """The browser writes the port that it chose into its profile."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TIMEOUT_S):
            while process.returncode is None:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    return int((profile / "DevToolsActivePort").read_text("utf-8").splitlines()[0])
                await asyncio.sleep(POLL_S)
    raise BrowserError("the browser opened no port to be told what to do")
