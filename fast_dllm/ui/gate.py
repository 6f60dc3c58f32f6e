"""Which HTTP requests the page answers: none that upload a file, none under a name that is not the page's own.

Gradio serves an upload to everybody and any `Host` header. A foreign `Host` is how a web page elsewhere reaches a
server on its visitor's own machine (DNS rebinding): its name is made to point at 127.0.0.1, and the browser then takes
the server for that page's own.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

UPLOADS = ("upload", "process_recording")  # the last part of the paths under which gradio takes a file
MAX_BODY_BYTES = 8 * 2**20  # of a request: a conversation and the settings


class Gate:
    """ASGI middleware that refuses uploads, foreign names and bodies above MAX_BODY_BYTES, with a line of text.

    names: the host names under which the page is served; one that begins with a dot is the end of a name. Numeric
    addresses, localhost and this machine's name are always served: no other page can have them as its name.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] = ()):
        self.app = app
        self.names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), *map(str.lower, names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page opens none
            await send({"type": "websocket.close"})
            return
        refused = self.refusal(scope) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def refusal(self, scope: Scope) -> PlainTextResponse | None:
        """The answer to a request that is refused, None for one that is served."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.serves(host):
            text = f"this page is not served under the name {host!r}; app.py --name NAME adds one"
            return PlainTextResponse(text, 421)
        if scope["path"].rstrip("/").rpartition("/")[2] in UPLOADS:
            return PlainTextResponse("this page takes no files", 403)
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return PlainTextResponse(f"a request must say its length, at most {MAX_BODY_BYTES} bytes", 413)
        return None

    def serves(self, host: str) -> bool:
        """Whether a `Host` header names this page."""
        name = host.lower()
        if not name.endswith("]"):  # else it is an IPv6 address without a port
            name = name.rpartition(":")[0] or name
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            ends = tuple(each for each in self.names if each.startswith("."))
            return name in self.names or name.endswith(ends)
        return True
