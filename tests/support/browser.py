"""One page in a real browser without a window: Chromium, driven as its own developer tools drive it."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from helm.chromium import chromium

DEADLINE_S = 30.0
_CODES = {"Tab": 9, "Enter": 13, " ": 32}


def can_draw() -> bool:
    """Whether there is all that helm.pictures needs of this machine."""
    return chromium() is not None and shutil.which("npm") is not None


class Page:
    def __init__(self, socket: ClientConnection) -> None:
        self.complaints: list[str] = []  # of the page: errors, and what its policy forbade
        self._socket = socket
        self._numbers = itertools.count(1)

    def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=url)

    def look(self, *, scheme: str = "light", width: int = 1280, height: int = 900) -> None:
        """Into a window of this size, by somebody who prefers that color scheme."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def js(self, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not self.js(f"new Promise(done => setTimeout(() => done({expression}), 20))"):
            assert time.monotonic() < end, f"not within {DEADLINE_S:g} s: {what}"

    def press(self, key: str) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            told = {"key": key, "windowsVirtualKeyCode": _CODES[key], "text": text if kind == "keyDown" else ""}
            self._call("Input.dispatchKeyEvent", type=kind, **told)

    def write(self, text: str) -> None:
        for character in text:
            self._call("Input.dispatchKeyEvent", type="char", text=character)

    def _call(self, method: str, **params: object) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(DEADLINE_S))
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self._note(told["method"], told["params"])

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


@contextmanager
def page() -> Iterator[Page]:
    binary = chromium()
    assert binary is not None
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [binary, *flags, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            port = int(line.rpartition(":")[2].partition("/")[0])
            targets = httpx.get(f"http://127.0.0.1:{port}/json", timeout=DEADLINE_S, trust_env=False).json()
            (url,) = (each["webSocketDebuggerUrl"] for each in targets if each["type"] == "page")
            with connect(url, max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.communicate()
