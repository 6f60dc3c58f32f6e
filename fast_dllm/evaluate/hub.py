"""Finds out in seconds whether the Hugging Face hub can be reached, because its own client tries for minutes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import MutableMapping
from urllib.parse import urlsplit

HUB = "https://huggingface.co"
SECONDS = 4.0  # for the name and the connection together


def use_cache_without_network(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set HF_HUB_OFFLINE if the hub cannot be reached; returns whether it was set.

    Otherwise the hub's client tries for half a minute per file before it uses its cache. Call this before
    `huggingface_hub` is imported, which reads the variable once. With a proxy it does nothing: only the hub's client
    can use the proxy.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(environment.get(name) for name in ("HF_HUB_OFFLINE", *proxies)):
        return False
    if is_reachable(environment.get("HF_ENDPOINT") or HUB):
        return False
    environment["HF_HUB_OFFLINE"] = "1"
    return True


def prepare_hub_client() -> bool:
    """Make the hub's client quick and quiet, for a program that people wait for; returns whether the hub is silent.

    If the hub cannot be reached, the client uses its cache alone. It does not log each time that it tries again.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    is_silent = use_cache_without_network()
    if is_silent:
        constants.HF_HUB_OFFLINE = True  # the client may be imported already, and has read the variable then
    return is_silent


def is_reachable(url: str) -> bool:
    """Whether the host of a URL accepts a connection."""
    parts = urlsplit(url)
    connected = threading.Event()

    def connect() -> None:
        try:
            port = parts.port or (80 if parts.scheme == "http" else 443)
            socket.create_connection((parts.hostname, port), timeout=SECONDS).close()
        except (OSError, ValueError):
            return
        connected.set()

    # In a thread, because Python has no timeout for the name server.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return connected.is_set()
