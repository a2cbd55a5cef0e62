"""A headless Chromium that looks at a built site: what is wider than its place, and what the search box finds.

The site is served on this machine. One page of ours (``browser.html``) opens every page of it in a frame of the wanted
width, measures, and sends back what it found; so no driver of a browser is needed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from typing_extensions import override

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HARNESS = Path(__file__).parent / "browser.html"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def find() -> str | None:
    """The path of a Chromium; None: there is none. The variable CHROMIUM names one that is nowhere on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class _Served(SimpleHTTPRequestHandler):
    """The files of a site; beside them the page that measures, the tasks that it gets, and the place for its answer."""

    def __init__(
        self, *args: Any, tasks: list[dict[str, Any]], answers: list[Any], done: threading.Event, **kwargs: Any
    ):
        self.tasks, self.answers, self.done = tasks, answers, done
        super().__init__(*args, **kwargs)

    @override
    def do_GET(self) -> None:
        if self.path == "/measure":
            self._send("text/html", HARNESS.read_bytes())
        elif self.path == "/tasks":
            self._send("application/json", json.dumps(self.tasks).encode())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.answers.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send("text/plain", b"")
        self.done.set()

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def _serving(site: Path, tasks: list[dict[str, Any]]) -> Iterator[tuple[str, list[Any], threading.Event]]:
    answers: list[Any] = []
    done = threading.Event()
    handler = functools.partial(_Served, directory=str(site), tasks=tasks, answers=answers, done=done)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", answers, done
        finally:
            server.shutdown()
            thread.join()


def ask(browser: str, site: Path, tasks: list[dict[str, Any]], seconds: float) -> list[Any]:
    """What the browser says of each task, in order.

    Args:
        browser: path of a Chromium.
        site: the folder of the site.
        tasks: ``{"page": path, "width": pixels}``: the elements that stick out, a list of strings; or
            ``{"search": words}``: the address that the search finds first, a string.
        seconds: to wait for all of them.

    Raises:
        TimeoutError: there was no answer in time.
    """
    with _serving(site, tasks) as (address, answers, done), tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            *_FLAGS,
            f"--user-data-dir={profile}",
            "--window-size=1400,1000",
            "--remote-debugging-port=0",
        ]
        process = subprocess.Popen(
            [*command, f"{address}/measure"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            if not done.wait(seconds):
                raise TimeoutError(f"{browser} gave no answer in {seconds} s")
        finally:
            process.terminate()
            process.wait(30)
    return answers


def screenshot(browser: str, site: Path, page: str, size: tuple[int, int], to: Path) -> None:
    """A picture of the upper end of a page, ``size`` (width, height) in pixels."""
    with _serving(site, []) as (address, _, _), tempfile.TemporaryDirectory() as profile:
        window = f"--window-size={size[0]},{size[1]}"
        command = [browser, *_FLAGS, f"--user-data-dir={profile}", window, f"--screenshot={to}", f"{address}/{page}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
