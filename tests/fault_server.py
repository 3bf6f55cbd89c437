"""A search service on this machine that fails in every way that one can: each path of it is a fault.

``POST /<fault>`` answers by the function ``Faults.<fault>``; ``served`` says how often each was asked. Answers are in
Serper's form, but for ``/retrieve``.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ORGANIC = [{"title": "Eiffel Tower", "snippet": "It stands in Paris.", "link": "https://example.org", "position": 1}]
GOOD = json.dumps({"searchParameters": {"q": "?"}, "organic": ORGANIC}).encode()
KEY = "k3y-that-must-not-show-0123456789"


class FaultServer(ThreadingHTTPServer):
    """``served``: requests by path. ``answering``: most requests that were answered at the same time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Faults)
        self.served: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.last_headers: dict[str, str] = {}

    def url(self, fault: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{fault}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients break off: that is what is tested."""


class Faults(BaseHTTPRequestHandler):
    """One method for each path."""

    protocol_version = "HTTP/1.1"
    server: FaultServer

    def do_POST(self) -> None:
        fault = self.path.rsplit("/", 1)[-1]  # a proxy is asked for a whole URL
        self.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.served[fault] += 1
            self.time = self.server.served[fault]
            self.server.last_headers = dict(self.headers)
        getattr(self, fault)()

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def say(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def good(self) -> None:
        self.say(200, GOOD)

    def slow_good(self) -> None:
        time.sleep(0.2)
        self.say(200, GOOD)

    def echo(self) -> None:
        self.say(200, json.dumps({"organic": [{"title": self.asked["q"], "snippet": self.asked["q"]}]}).encode())

    def empty(self) -> None:
        self.say(200, b'{"searchParameters": {}, "organic": []}')

    def leak(self) -> None:
        """Sends the key back, in results."""
        key = self.headers["X-API-KEY"]
        self.say(200, json.dumps({"organic": [{"title": key, "snippet": f"your key is {key}!"}]}).encode())

    def leak_in_error(self) -> None:
        self.say(400, json.dumps({"message": f"Not enough credits for {self.headers['X-API-KEY']}"}).encode())

    def unauthorized(self) -> None:
        self.say(401, json.dumps({"message": f"Unauthorized: {self.headers['X-API-KEY']}"}).encode())

    def forbidden(self) -> None:
        self.say(403, b'{"message": "Forbidden"}')

    def bad_request(self) -> None:
        self.say(400, b'{"message": "Not enough credits"}')

    def fails_twice(self) -> None:
        self.say(503, b"busy", "text/plain") if self.time <= 2 else self.good()

    def fails(self) -> None:
        self.say(500, b"broken", "text/plain")

    def later_seconds(self) -> None:
        self.say(429, b"{}", Retry_After="1") if self.time == 1 else self.good()

    def later_date(self) -> None:
        now = time.time()
        headers = {"Retry_After": formatdate(now + 1, usegmt=True)}
        self.say(429, b"{}", **headers) if self.time == 1 else self.good()

    def much_later(self) -> None:
        self.say(429, b"{}", Retry_After="3600")

    def nonsense_later(self) -> None:
        self.say(429, b"{}", Retry_After="-1e999 soon") if self.time == 1 else self.good()

    def drip(self) -> None:
        """A byte every 50 ms, and no end."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while not self.server.stopping.wait(0.05):
            self.wfile.write(b" ")

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.stopping.wait(0.05):
            self.wfile.write(b"x")

    def silent(self) -> None:
        self.server.stopping.wait(30)

    def html(self) -> None:
        self.say(200, b"<html>log in</html>", "text/html")

    def truncated_json(self) -> None:
        self.say(200, GOOD[:-20])

    def cut_off(self) -> None:
        """Less than its Content-Length says."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(GOOD)))
        self.end_headers()
        self.wfile.write(GOOD[:20])
        self.close_connection = True

    def wrong_json(self) -> None:
        self.say(200, b'{"message": "hello"}')

    def wrong_organic(self) -> None:
        self.say(200, b'{"organic": [1, 2]}')

    def deep_json(self) -> None:
        self.say(200, b"[" * 200_000)

    def huge_number(self) -> None:
        self.say(200, b'{"organic": [], "n": ' + b"9" * 10_000 + b"}")

    def half_character(self) -> None:
        self.say(200, rb'{"organic": [{"title": "a\ud800", "snippet": "b\udfffc"}]}')

    def invalid_utf8(self) -> None:
        self.say(200, b'{"organic": [{"title": "a", "snippet": "b\xff\xfec"}]}')

    def big(self) -> None:
        """50 MB, honest about it."""
        self.send_response(200)
        self.send_header("Content-Length", str(50_000_000))
        self.end_headers()
        for _ in range(50):
            self.wfile.write(b" " * 1_000_000)

    def endless(self) -> None:
        """A body of no length."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.server.stopping.is_set():
            self.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")

    def bomb(self) -> None:
        """200 MB of zeros in 200 kB."""
        self.say(200, _BOMB, Content_Encoding="gzip")

    def gzipped(self) -> None:
        self.say(200, gzip.compress(GOOD), Content_Encoding="gzip")

    def broken_gzip(self) -> None:
        self.say(200, b"this is not gzip", Content_Encoding="gzip")

    def short_gzip(self) -> None:
        self.say(200, gzip.compress(GOOD)[:-12], Content_Encoding="gzip")

    def brotli(self) -> None:
        self.say(200, b"?", Content_Encoding="br")

    def to_private(self) -> None:
        self.say(302, Location="http://169.254.169.254/latest/meta-data/")

    def to_itself(self) -> None:
        self.say(307, Location=self.server.url("to_itself"))

    def to_good(self) -> None:
        self.say(307, Location=self.server.url("good"))

    def to_file(self) -> None:
        self.say(302, Location="file:///etc/passwd")

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def reset_once(self) -> None:
        self.reset() if self.time == 1 else self.good()

    def retrieve(self) -> None:
        document = {"id": "7", "contents": '"Eiffel Tower"\nIt stands in Paris.'}
        found = [{"document": document, "score": 0.5}] if self.asked.get("return_scores") else [document]
        self.say(200, json.dumps({"result": [found * self.asked["topk"] for _ in self.asked["queries"]]}).encode())

    def retrieve_plain(self) -> None:
        plain = [{"contents": '"A"\nfirst'}, {"title": "B", "text": "second"}, "third", {"title": "D", "contents": "x"}]
        self.say(200, json.dumps({"result": [plain]}).encode())

    def retrieve_wrong(self) -> None:
        self.say(200, b'{"result": [[{"document": {"id": 1}}]]}')


_BOMB = gzip.compress(bytes(200_000_000), compresslevel=6)


@contextmanager
def fault_server() -> Iterator[FaultServer]:
    """A running server; it stops with the block."""
    server = FaultServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
