"""The HTTP client: whatever a server does ends in data or in an ``HttpFault``, in time and in bounds."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from email.utils import formatdate

import pytest

from arft_fast.tools.http_client import HttpClient, HttpFault, check_url
from arft_fast.tools.http_client import _retry_after_s as retry_after_s

from .fault_server import FaultServer, fault_server


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server() as server:
        yield server


def post(url: str, **settings: float) -> object:
    async def run() -> object:
        client = HttpClient(**{"deadline_s": 5.0, "pause_s": 0.02, **settings})  # type: ignore[arg-type]
        try:
            return await client.post_json(url, {"q": "x"})
        finally:
            await client.close()

    return asyncio.run(run())


def fault_of(url: str, **settings: float) -> HttpFault:
    with pytest.raises(HttpFault) as caught:
        post(url, **settings)
    return caught.value


def organic(value: object) -> str:
    assert isinstance(value, dict)
    return str(value["organic"][0]["snippet"])


@pytest.mark.parametrize("path", ["good", "gzipped"])
def test_an_answer_is_its_json(server: FaultServer, path: str) -> None:
    assert organic(post(server.url(path))) == "It stands in Paris."


@pytest.mark.parametrize(("path", "tries"), [("fails_twice", 3), ("reset_once", 2), ("nonsense_later", 2)])
def test_a_passing_fault_is_tried_again(server: FaultServer, path: str, tries: int) -> None:
    server.served[path] = 0
    assert organic(post(server.url(path))) == "It stands in Paris."
    assert server.served[path] == tries


@pytest.mark.parametrize("path", ["later_seconds", "later_date"])
def test_retry_after_is_waited_for(server: FaultServer, path: str) -> None:
    server.served[path], started = 0, time.monotonic()
    assert organic(post(server.url(path))) == "It stands in Paris."
    assert 0.9 < time.monotonic() - started < 4


def test_a_retry_after_beyond_the_deadline_is_a_fault_at_once(server: FaultServer) -> None:
    started = time.monotonic()
    fault = fault_of(server.url("much_later"))
    assert time.monotonic() - started < 1
    assert fault.status == 429 and "a pause of 3600.0 s" in str(fault)


def test_retry_after_in_all_its_forms() -> None:
    assert retry_after_s({"Retry-After": "12"}) == 12
    past, now = formatdate(time.time() - 500, usegmt=True), formatdate(time.time() - 600, usegmt=True)
    assert retry_after_s({"Retry-After": past, "Date": now}) == pytest.approx(100, abs=1)  # by the server's clock
    assert retry_after_s({"Retry-After": past}) == 0
    for nonsense in ("", "-3", "soon", "1e9", "²", "Mon, 99 Foo 2020 00:00:00 GMT"):
        assert retry_after_s({"Retry-After": nonsense}) is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("bad_request", "HTTP 400 Bad Request: .*Not enough credits"),
        ("unauthorized", "HTTP 401"),
        ("forbidden", "HTTP 403"),
        ("html", "text/html, not JSON"),
        ("truncated_json", "not JSON"),
        ("deep_json", "not JSON"),
        ("huge_number", "not JSON"),
        ("big", "more than 4 MiB"),
        ("endless", "more than 4 MiB"),
        ("bomb", "more than 4 MiB"),
        ("broken_gzip", "broken gzip data"),
        ("short_gzip", "end early"),
        ("brotli", "encoding 'br'"),
        ("to_private", "HTTP 302: a redirect"),
        ("to_file", "HTTP 302: a redirect"),
        ("to_itself", "HTTP 307: a redirect"),
        ("to_good", "HTTP 307: a redirect"),
    ],
)
def test_a_lasting_fault_is_not_tried_again(server: FaultServer, path: str, words: str) -> None:
    server.served[path] = 0
    with pytest.raises(HttpFault, match=rf"127\.0\.0\.1:\d+: .*{words}"):
        post(server.url(path))
    assert server.served[path] == 1


def test_no_redirect_is_followed(server: FaultServer) -> None:
    server.served["good"] = 0
    fault_of(server.url("to_good"))
    assert server.served["good"] == 0


@pytest.mark.parametrize("path", ["fails", "reset", "cut_off"])
def test_a_fault_that_does_not_pass_ends_after_the_tries(server: FaultServer, path: str) -> None:
    server.served[path] = 0
    assert "(3 tries)" in str(fault_of(server.url(path), attempts=3))
    assert server.served[path] == 3


def test_refused_connections_and_unknown_hosts_are_faults() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "connection failed" in str(fault_of(f"http://127.0.0.1:{port}/", attempts=2))
    assert "connection failed" in str(fault_of("http://no-such-host.invalid/", attempts=2))


def test_plain_http_on_a_tls_port_is_no_secure_connection(server: FaultServer) -> None:
    assert "no secure connection" in str(fault_of(server.url("good").replace("http:", "https:")))


@pytest.mark.parametrize("path", ["drip", "drip_headers", "silent"])
def test_a_slow_answer_ends_at_the_deadline_and_frees_its_thread(server: FaultServer, path: str) -> None:
    started = time.monotonic()
    fault = fault_of(server.url(path), deadline_s=0.5)
    assert "no whole answer within deadline_s = 0.5" in str(fault)
    assert time.monotonic() - started < 2  # closing waits for the thread
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("http-client")]


def test_a_cancelled_call_frees_its_thread(server: FaultServer) -> None:
    async def run() -> None:
        client = HttpClient(concurrency=1, deadline_s=20.0)
        call = asyncio.create_task(client.post_json(server.url("drip"), {}))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert organic(await asyncio.wait_for(client.post_json(server.url("good"), {}), 3)) == "It stands in Paris."
        await client.close()

    asyncio.run(run())


def test_a_full_pool_keeps_the_deadline_and_the_loop_turning(server: FaultServer) -> None:
    async def run() -> list[object]:
        client = HttpClient(concurrency=2, deadline_s=0.6)
        calls = [asyncio.create_task(client.post_json(server.url("silent"), {})) for _ in range(6)]
        longest, before = 0.0, time.monotonic()
        while not all(call.done() for call in calls):
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        assert longest < 0.3
        await client.close()
        return [call.exception() for call in calls]

    assert all(isinstance(fault, HttpFault) for fault in asyncio.run(run()))


def test_closing_ends_what_is_under_way(server: FaultServer) -> None:
    async def run() -> None:
        client = HttpClient(deadline_s=20.0)
        call = asyncio.create_task(client.post_json(server.url("silent"), {}))
        await asyncio.sleep(0.2)
        await client.close()
        await client.close()
        with pytest.raises(HttpFault, match="closed"):
            await call
        with pytest.raises(HttpFault, match="closed"):
            await client.post_json(server.url("good"), {})

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("path", ["bomb", "big", "endless"])
def test_memory_is_bounded(server: FaultServer, path: str) -> None:
    tracemalloc.start()
    try:
        fault_of(server.url(path), max_body_mib=1.0)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20  # the server's own buffers are in it
    finally:
        tracemalloc.stop()


def test_a_broken_byte_costs_one_character(server: FaultServer) -> None:
    assert organic(post(server.url("invalid_utf8"))) == "b\ufffd\ufffdc"


def test_cookies_and_netrc_passwords_are_not_sent(
    server: FaultServer, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = f"{tmp_path}/netrc"
    with open(netrc, "w") as file:
        file.write("default login somebody password secret-password\n")
    monkeypatch.setenv("NETRC", netrc)
    post(server.url("good"))
    assert not {"Authorization", "Cookie"} & server.last_headers.keys()


def test_a_proxy_of_the_environment_is_used_and_held_to_the_deadline(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url(""))
    monkeypatch.delenv("no_proxy", raising=False)
    for path in ("good", "good"):
        assert organic(post(f"http://search.invalid/{path}")) == "It stands in Paris."
    assert server.last_headers["Host"] == "search.invalid"
    started = time.monotonic()
    assert "no whole answer" in str(fault_of("http://search.invalid/drip", deadline_s=0.5))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("url", ["", "host/x", "file:///etc/passwd", "ftp://host/", "http:///x", "http://a:b@host/"])
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url") as caught:
        check_url(url)
    assert "a:b" not in str(caught.value)


@pytest.mark.parametrize("setting", ["concurrency", "attempts", "deadline_s", "read_timeout_s", "max_body_mib"])
def test_a_bad_setting_is_named(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        HttpClient(**{setting: 0})
