"""The fake behind HTTP, with SGLang's routes and faults to order."""

from __future__ import annotations

import base64
import binascii
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .core import FakeSglang, SchedulerDied
from .model import Refused


class FakeServer:
    """The core behind HTTP, on a port of its own. Use as a context manager.

    ``plan(path, *faults)`` sets what the next calls of a path meet instead of an answer: a status (``500``), ``reset``
    (the connection breaks), ``hang`` (until the server stops) or ``garbage`` (200 and no JSON).
    """

    def __init__(self, core: FakeSglang, *, key: str = "", model_type: str = "qwen2_5_vl", dp_size: int = 1) -> None:
        self.core = core
        self.key = key
        self.info = {"model_type": model_type, "is_generation": True, "has_image_understanding": True}
        self.server_info = {"tp_size": core.tp_size, "dp_size": dp_size, "version": "0.5.21"}
        self.absent: set[str] = set()
        self.workers: list[str] = []
        """Of a router; a server has no such route."""
        self.requests: list[tuple[str, Any]] = []
        self._faults: dict[str, list[int | str]] = {}
        self._stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def plan(self, path: str, *faults: int | str) -> None:
        self._faults.setdefault(path, []).extend(faults)

    def asked(self, path: str) -> list[Any]:
        """The bodies that came to a path."""
        return [body for asked, body in self.requests if asked == path]

    def answer(self, path: str, body: Any, authorization: str) -> tuple[int, Any]:
        """Status and content; a str is sent as it is."""
        self.requests.append((path, body))
        if faults := self._faults.get(path):
            fault = faults.pop(0)
            if fault == "hang":
                self._stopped.wait(60)
            if fault in ("hang", "reset"):
                raise ConnectionAbortedError
            return (
                (200, "<html>garbage")
                if fault == "garbage"
                else (int(fault), {"error": {"message": f"planned {fault}"}})
            )
        if self.core.dead:
            raise ConnectionAbortedError
        if self.key and authorization != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        route = ROUTES.get(path)
        return (404, {"detail": "Not Found"}) if route is None or path in self.absent else route(self, body)

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        try:
            steps = self.core.generate({"rid": f"{time.monotonic_ns()}", **body})
            while not self.core.dead:
                with self.core.lock:
                    reply = next(steps)
                if reply is not None:
                    return 200, reply
                time.sleep(self.core.token_s)
            raise SchedulerDied
        except Refused as error:
            return 400, {"error": {"message": str(error)}}

    def control(self, method: str, *arguments: Any, **named: Any) -> tuple[int, Any]:
        with self.core.lock:
            success, message = self.core.control(method, *arguments, **named)
        return 200 if success else 400, {"success": success, "message": message}

    def tensors(self, body: dict[str, Any]) -> tuple[int, Any]:
        try:
            payloads = [base64.b64decode(payload, validate=True) for payload in body["serialized_named_tensors"]]
        except binascii.Error as error:
            return 422, {"detail": str(error)}
        return self.control("update_weights_from_tensor", payloads, body["load_format"])

    def flush(self, body: Any) -> tuple[int, Any]:
        status, reply = self.control("flush_cache")
        return status, reply["message"] or "Cache flushed.\n"

    def abort(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.core.abort(body.get("rid", ""), body.get("abort_all", False))
        return 200, ""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def _answer(self, body: Any) -> None:
        try:
            status, reply = self.fake.answer(self.path, body, self.headers.get("Authorization", ""))
        except (ConnectionAbortedError, SchedulerDied):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
        except BrokenPipeError:
            return  # a client that gave up

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent."""


ROUTES: dict[str, Any] = {
    "/workers": lambda s, b: (200, {"workers": [{"url": url} for url in s.workers]}) if s.workers else (404, {}),
    "/model_info": lambda s, b: (200, {**s.info, "weight_version": s.core.weight_version}),
    "/server_info": lambda s, b: (200, s.server_info),
    "/generate": FakeServer.generate,
    "/abort_request": FakeServer.abort,
    "/pause_generation": lambda s, b: s.control("pause_generation", b["mode"]),
    "/continue_generation": lambda s, b: s.control("continue_generation"),
    "/flush_cache": FakeServer.flush,
    "/begin_weight_update": lambda s, b: s.control("begin_weight_update"),
    "/end_weight_update": lambda s, b: s.control("end_weight_update"),
    "/update_weights_from_tensor": FakeServer.tensors,
    "/update_weights_from_disk": lambda s, b: s.control("update_weights_from_disk", b["model_path"]),
    "/update_weights_from_distributed": lambda s, b: s.control(
        "update_weights_from_distributed", b["names"], b["dtypes"], b["shapes"]
    ),
    "/update_weight_version": lambda s, b: s.control("update_weight_version", b["new_version"]),
    "/init_weights_update_group": lambda s, b: s.control("init_weights_update_group", **b),
    "/destroy_weights_update_group": lambda s, b: s.control("destroy_weights_update_group", b["group_name"]),
}
