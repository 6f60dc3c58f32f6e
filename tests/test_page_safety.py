"""What the page refuses: files, foreign host names, bodies and queues without a bound, looks at the server's disk."""

from __future__ import annotations

import http.client
import json
import urllib.parse

import pytest

from fast_dllm.errors import UsageError
from fast_dllm.ui.chat import ChatSettings, parse_model_args
from fast_dllm.ui.gate import MAX_BODY_BYTES, Gate


def answer_of(address: str, method: str, path: str, body: str | bytes = b"", **headers: str) -> tuple[int, str]:
    """(status, text) of one request."""
    server = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(server.hostname, server.port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def test_no_file_is_taken_from_anybody(page_address):
    form = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    for path in ("/gradio_api/upload", "/gradio_api/upload?upload_id=1", "/gradio_api/process_recording"):
        assert answer_of(page_address, "POST", path, form, Content_Type=kind) == (403, "this page takes no files")


def test_a_request_under_a_foreign_name_is_refused_and_one_under_an_own_name_served(page_address):
    port = urllib.parse.urlsplit(page_address).port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        for path in ("/", "/config", "/gradio_api/queue/data?session_hash=x"):
            status, text = answer_of(page_address, "GET", path, Host=host)
            assert status == 421, (host, path)
            assert "not served under the name" in text
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "[::1]", "10.1.2.3"):
        assert answer_of(page_address, "GET", "/config", Host=host)[0] == 200, host


def test_a_name_that_is_given_is_served_and_its_end_alone_is_not():
    gate = Gate(None, ["Lab.example", ".gradio.live"])
    for host in ("lab.example", "LAB.example:80", "a1b2.gradio.live"):
        assert gate.serves(host), host
    for host in ("other.lab.example", "lab.example.evil.example", "gradio.live.evil.example"):
        assert not gate.serves(host), host


def test_a_body_has_a_bound(page_address):
    status, text = answer_of(page_address, "POST", "/gradio_api/queue/join", Content_Length=str(MAX_BODY_BYTES + 1))
    assert (status, str(MAX_BODY_BYTES) in text) == (413, True)
    status, _ = answer_of(page_address, "POST", "/gradio_api/queue/join", Transfer_Encoding="chunked")
    assert status == 413


@pytest.fixture
def served(random_model):
    """(address, the page's events by the name of their function) of a page of this process's own."""
    import app
    from fast_dllm.decode.arguments import ModelArguments
    from fast_dllm.ui.chat import Chatbot

    chatbot = Chatbot(ModelArguments.parse(model_path=str(random_model), max_new_tokens=64, device="cpu"))
    blocks = app.build(chatbot)
    _, address, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.launch_options([])
    )
    yield address, {event.fn.__name__: event for event in blocks.fns.values() if event.fn is not None}
    blocks.close()


def join(address: str, event, visitor: str, message: str | None = None) -> int:
    """Put an event into the queue for a visitor, as the page does; returns the HTTP status. No message: it fails."""
    data = [message, *(None if each.stateful else getattr(each, "value", None) for each in event.inputs[1:])]
    body = json.dumps({"data": data, "fn_index": event._id, "session_hash": visitor})
    return answer_of(address, "POST", "/gradio_api/queue/join", body, Content_Type="application/json")[0]


def test_the_queue_has_a_bound_and_bare_calls_put_nobody_before_a_visitor(served):
    import app

    address, events = served
    json_body = {"Content_Type": "application/json"}
    for number in range(100):
        path, body = "/gradio_api/run/begin", {"data": [None], "session_hash": f"bare{number}"}
        assert answer_of(address, "POST", path, json.dumps(body), **json_body)[0] == 200
    assert join(address, events["answer"], "visitor") == 200
    server = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(server.hostname, server.port, timeout=60)
    connection.request("GET", "/gradio_api/queue/data?session_hash=visitor")
    response = connection.getresponse()
    messages = []
    while not messages or messages[-1]["msg"] != "process_completed":
        line = response.readline().decode()
        if line.startswith("data:"):
            messages.append(json.loads(line[5:]))
    connection.close()
    assert all(each["rank"] == 0 for each in messages if each["msg"] == "estimation")
    states = [join(address, events["answer"], f"flood{number}") for number in range(app.MAX_WAITING + 20)]
    assert states.count(503) >= 10


@pytest.mark.slow
def test_a_message_that_a_full_queue_refuses_gets_a_note_and_stays_in_its_box(served, browser):
    import app

    address, events = served
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(address)
    page.fill("#message textarea", "Hello")
    for number in range(app.MAX_WAITING + 20):
        join(address, events["answer"], f"flood{number}", "Hello")
    page.click("#send")
    page.wait_for_selector("#note :text('too many messages wait')")
    assert page.input_value("#message textarea") == "Hello"
    page.close()


@pytest.mark.parametrize("path", ["/etc", "tiny"])
def test_the_settings_of_a_visitor_say_nothing_about_the_servers_folders(path):
    for name in ("model_path", "device", "dtype"):
        with pytest.raises(UsageError, match=f"unknown setting '{name}'"):
            ChatSettings.parse().changed(**parse_model_args(f"{name}={path}"))
    with pytest.raises(UsageError, match="unknown experiment") as refused:
        ChatSettings.parse().changed(experiment_name=path)
    assert str(refused.value) == f"unknown experiment {path!r}; " + str(refused.value).partition("; ")[2]
