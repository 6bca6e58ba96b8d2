"""A page in headless Chromium, by its DevTools protocol over a pair of pipes.

To look at a page: python tests/helpers/browser.py page.html FOLDER writes pictures of it.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# As Debian and others call it.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
# Of one that hangs, in seconds.
_PATIENCE = 60


class Tab:
    """One tab: what is evaluated in it, what it asked for, and what it complained about.

    Attributes:
        complaints: Errors of scripts, lines of the console, and what its policy refused.
        requests: Addresses of all that was loaded.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._left, self._session = 0, b"", ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Load a page and wait until all of it is there."""
        self._call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression of JavaScript is true in the page."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.01)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """Press a key and let it go."""
        code = {"Tab": 9, "Enter": 13, " ": 32}.get(key, ord(key[0].upper()))
        common = {"key": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def show(self, *, width: int, height: int, dark: bool) -> None:
        """Give the window a size, and the page the scheme of its reader."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._answers], [], [], _PATIENCE)
            assert ready, "the browser does not answer"
            more = os.read(self._answers, 1 << 16)
            assert more, "the browser has ended"
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        kind, values = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif kind in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(values))


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """Start the browser with a profile of its own in a folder, and end it at last."""
    assert CHROMIUM is not None
    (their_commands, commands), (answers, their_answers) = os.pipe(), os.pipe()
    # The browser reads at 3 and writes at 4: what is moved there must not lie there already.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_commands, their_answers)]
    os.close(their_commands)
    os.close(their_answers)
    options = [
        "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
        "--disable-background-networking", "--disable-dev-shm-usage", f"--user-data-dir={folder}",
        # It does not run as root otherwise.
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", CHROMIUM, *options],
        pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for end in ends:
        os.close(end)
    try:
        yield Tab(commands, answers)
    finally:
        # Whose commands end, ends itself.
        os.close(commands)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers)


def take_pictures(page: Path, folder: Path) -> None:
    """Write pictures of the whole page, wide and narrow, light and dark; print complaints."""
    views = {
        f"{name}-{'dark' if dark else 'light'}": (width, dark)
        for name, width in {"wide": 1200, "narrow": 360}.items()
        for dark in (False, True)
    }
    with tempfile.TemporaryDirectory() as profile, tab(Path(profile)) as browser:
        for name, (width, dark) in views.items():
            browser.show(width=width, height=900, dark=dark)
            browser.open(page.resolve().as_uri())
            height = browser.evaluate("document.documentElement.scrollHeight")
            browser.show(width=width, height=height, dark=dark)
            browser.picture(folder / f"{name}.png")
        print(*browser.complaints, sep="\n")


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), Path(sys.argv[2]))
