"""Serving the annotation page to this machine, and keeping each answer on the disk before the page goes on.

The address has a secret part, so that no other page in the browser can read or answer.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from peft_mllm.annotate.answers import NO, YES, Answers, load_answers
from peft_mllm.annotate.items import Item, digest
from peft_mllm.annotate.page import render
from peft_mllm.errors import DataError, SpecError

MAX_BODY = 10_000


class AnnotationServer:
    """The page and its answers.

    Args:
        items: the captions.
        file: where the answers are kept; one that is there goes on, if it is about the same captions.
        annotator: who judges.
        port: of this machine; 0 takes a free one.

    Raises:
        DataError: the file is about other captions, or by somebody else.
        SpecError: the port is taken.
    """

    def __init__(self, items: Sequence[Item], file: Path, *, annotator: str, port: int = 0):
        self.answers = _opened(file, digest(items), len(items), annotator)
        self.file = file
        self._ids = {item.id for item in items}
        self._page = render(items, annotator=self.answers.annotator, served=True).encode()
        self._lock = threading.Lock()
        self._secret = secrets.token_urlsafe(16)
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        except OSError as error:
            raise SpecError(f"The port {port} cannot be used: {error.strerror}. Choose another with --port.") from None

    @property
    def address(self) -> str:
        """Where a browser of this machine finds the page."""
        return f"http://127.0.0.1:{self._server.server_port}/{self._secret}/"

    def run(self) -> None:
        """Serve until `stop`."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.shutdown()

    def close(self) -> None:
        """Give the port back."""
        self._server.server_close()

    def keep(self, change: Any) -> None:
        """Write one answer.

        Raises:
            ValueError: it is about no caption of the page, or is neither yes, no nor taken back.
        """
        if not isinstance(change, dict) or change.get("id") not in self._ids:
            raise ValueError("it is about no caption of this page")
        if change.get("answer") not in (YES, NO, None):
            raise ValueError("it is neither yes nor no")
        with self._lock:
            if change["answer"] is None:
                self.answers.answers.pop(change["id"], None)
            else:
                self.answers.answers[change["id"]] = change["answer"]
            self.answers.save(self.file)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == f"/{server._secret}/":
                    self._give(200, server._page, "text/html; charset=utf-8")
                elif self.path == f"/{server._secret}/answers":
                    self._give(200, json.dumps(server.answers.answers).encode())
                else:
                    self._give(404, b"{}")

            def do_PUT(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                if self.path != f"/{server._secret}/answers" or size > MAX_BODY:
                    self._give(404, b"{}")
                    return
                try:
                    server.keep(json.loads(self.rfile.read(size)))
                except ValueError as error:
                    self._give(400, json.dumps({"error": str(error)}).encode())
                except DataError as error:
                    self._give(500, json.dumps({"error": str(error)}).encode())
                else:
                    self._give(200, b"{}")

            def _give(self, code: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        return Handler


def _opened(file: Path, items: str, n: int, annotator: str) -> Answers:
    """The answers so far."""
    if not file.exists():
        made = Answers(items, n, annotator)
        made.save(file)
        return made
    found = load_answers(file)
    if found.items != items:
        raise DataError(f"{file} has answers about other captions. Give another file with --answers.")
    if annotator and found.annotator != annotator:
        raise DataError(f"{file} has the answers of '{found.annotator}', not of '{annotator}'. Give another file.")
    return found
