"""The server of the chat's page: this machine only, and nothing is fetched from or sent to anywhere else."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft_mllm.chat.conversation import SeenImage
from peft_mllm.chat.voice import Voice
from peft_mllm.data.images import MAX_FILE_BYTES
from peft_mllm.errors import EXIT_DONE, SpecError

FIRST_PORT = 7860
"""Gradio's usual one; another free one where it is taken."""
ONLY_FROM_HERE = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'self'"
)
"""The browser is told to load nothing from elsewhere, whatever a library's page or an answer asks for."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def require_gradio() -> None:
    """Raise `SpecError` where the extra is not installed."""
    if find_spec("gradio") is None:
        raise SpecError("--web needs Gradio, which is not installed: pip install 'peft-mllm[web]'")


def serve(
    voice: Voice, *, title: str, system: str | None, images: Sequence[SeenImage], host: str, port: int | None
) -> int:
    """Show the page until Ctrl-C; the exit code.

    Raises:
        SpecError: Gradio is not installed, or the address cannot be listened at.
    """
    require_gradio()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import uvicorn

    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="peft-mllm-chat-") as folder:
        # what visitors upload goes with the page
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = make_app(voice, title=title, system=system, images=images, folder=Path(folder))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        sys.stdout.write(f"The chat is at {address} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        # at the end it would tell of every page that is still open
        logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
        with suppress(KeyboardInterrupt):  # uvicorn raises it again when it has closed
            server.run(sockets=[listening])
    return EXIT_DONE


def make_app(voice: Voice, *, title: str, system: str | None, images: Sequence[SeenImage], folder: Path) -> Any:
    """The page as an ASGI application; `folder` holds what it shows."""
    import gradio as gr
    from fastapi import FastAPI

    from peft_mllm.chat.page import STYLE, Page, build

    page = Page(voice, system=system, images=images, previews=folder)
    app = FastAPI(openapi_url=None)
    app.add_middleware(_NothingFromElsewhere)
    return gr.mount_gradio_app(
        app,
        build(page, title=title),
        path="/",
        allowed_paths=[str(folder), *(str(image.path.resolve()) for image in images)],
        max_file_size=MAX_FILE_BYTES,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        css=STYLE,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at the port, or at a free one where none is given.

    Raises:
        SpecError: the address is taken or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wanted = [port] if port else [FIRST_PORT, 0]
    for each in wanted:
        try:
            return socket.create_server((host, each), family=family)
        except OSError as error:
            reason = error.strerror or str(error)
    raise SpecError(f"Cannot listen at {host}:{wanted[-1]}: {reason}. Choose another --port, or leave it out.")


class _NothingFromElsewhere:
    """Adds to every response what keeps the browser from asking other machines."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = (("content-security-policy", ONLY_FROM_HERE), ("referrer-policy", "no-referrer"))
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra)]
            await send(message)

        await self._app(scope, receive, with_policy)
