"""The page in a real browser, on a model that needs no download: what its tests start (fixtures), and how to use it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from golden_models import ROOT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "CUDA_VISIBLE_DEVICES": "",
}
ALL_UNMASKED = "document.querySelector('{0} .cells.done') && !document.querySelector('{0} .m')"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def page_address(random_model, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("app") / "log"
    arguments = ["--port", str(port), "--model", str(random_model), "--model_args", "max_new_tokens=64"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "tests/slow_page.py", *arguments],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="session")
def browser(page_address):
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        yield started
        started.close()


@pytest.fixture
def page(browser, page_address):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(120_000)
    opened.goto(page_address)
    opened.wait_for_selector("#message textarea")
    yield opened
    opened.close()


def ask(page, text: str) -> None:
    page.fill("#message textarea", text)
    page.click("#send")


def set_number(page, control: str, value: float | str) -> None:
    number = page.locator(f"#{control} input[type=number]")
    end = time.monotonic() + 60
    while not number.is_visible():  # a click before the page is alive is forgotten
        assert time.monotonic() < end, "the settings do not open"
        page.locator("button.label-wrap", has_text="Settings").click()
        page.wait_for_timeout(1000)
    number.fill(str(value))
    number.press("Tab")
    page.wait_for_timeout(200)
    assert number.input_value() == str(value)


def shown_at_rest(page, seconds: float = 2.0) -> str:
    """The answer's cells once nothing in them has changed for a while."""
    before, since = page.inner_text("#cells"), time.monotonic()
    end = since + 60
    while time.monotonic() - since < seconds:
        assert time.monotonic() < end, "the answer goes on"
        time.sleep(0.1)
        if (now := page.inner_text("#cells")) != before:
            before, since = now, time.monotonic()
    return before
