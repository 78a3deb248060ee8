"""A page in headless Chromium, driven by the DevTools protocol: opened, clicked, read, photographed."""

import base64
import json
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
    "--remote-allow-origins=*", "--window-size=1400,1800", "about:blank",
]  # fmt: skip


class Browser:
    """One tab. `with Browser(profile) as page: page.open(url)`; `profile` is a new, empty folder."""

    def __init__(self, profile: Path) -> None:
        self.profile, self.asked = profile, 0

    def __enter__(self) -> "Browser":
        command = [*CHROMIUM[:-1], f"--user-data-dir={self.profile}", CHROMIUM[-1]]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = self.profile / "DevToolsActivePort"
        wait_for(lambda: port_file.is_file() and port_file.read_text().strip())
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as tabs:
            tab = next(t for t in json.load(tabs) if t["type"] == "page")
        self.socket = connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=60)
        return self

    def __exit__(self, *error: Any) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.asked += 1
        self.socket.send(json.dumps({"id": self.asked, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=120))
            if answer.get("id") == self.asked:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def click(self, text: str) -> None:
        """The element with this text of its own."""
        find = f"[...document.querySelectorAll('button, a, [role=tab]')].find(e => e.textContent.trim() === '{text}')"
        wait_for(lambda: self.run(f"{find} !== undefined"))
        self.run(f"{find}.click()")

    def wait_for(self, script: str) -> None:
        """Wait until a script returns true."""
        wait_for(lambda: self.run(script))

    @property
    def html(self) -> str:
        return self.run("document.documentElement.outerHTML")

    @property
    def text(self) -> str:
        return self.run("document.body.innerText")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


def wait_for(what: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "the page took too long"
        time.sleep(0.2)
