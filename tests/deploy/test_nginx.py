"""The gateway: what it lets through to a server, and what not."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

import pytest

from tests.deploy.tools import DEPLOY, nginx, program, run

PAUSE = 0.4  # seconds between the pieces of a stream
PIECES = 3


class Upstream(ThreadingHTTPServer):
    """Says what it was asked for; a completion comes in pieces."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._note()
        self._answer(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._note()
        if self.path != "/v1/completions":
            self._answer(b"{}")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(PIECES):
            self.wfile.write(b"3\r\nn%d\n\r\n" % number)
            self.wfile.flush()
            time.sleep(PAUSE)
        self.wfile.write(b"0\r\n\r\n")

    def _note(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers["Authorization"]))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def running() -> Iterator[Upstream]:
    with Upstream() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def upstream(running: Upstream) -> Upstream:
    """As if nothing had been asked yet."""
    running.asked.clear()
    return running


@pytest.fixture(scope="module")
def gateway(running: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nginx(tmp_path_factory.mktemp("nginx"), f"127.0.0.1:{running.server_address[1]}") as address:
        yield address


def ask(gateway: str, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
    """Status; the path goes out as it is, dots and all."""
    connection = http.client.HTTPConnection(urlparse(gateway).netloc, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_the_configuration_is_valid() -> None:
    assert "syntax is ok" in run(program("nginx"), "-t", "-c", DEPLOY / "nginx" / "nginx.conf")


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/v1/models?x=1"])
def test_what_may_be_read(gateway: str, upstream: Upstream, path: str) -> None:
    assert ask(gateway, "GET", path, Authorization="Bearer k") == 200
    assert upstream.asked == [("GET", path, "Bearer k")]
    assert ask(gateway, "POST", path, b"{}") == 403
    assert ask(gateway, "DELETE", path) == 403
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_may_be_asked(gateway: str, upstream: Upstream, path: str) -> None:
    assert ask(gateway, "POST", path, b"{}", Authorization="Bearer k") == 200
    assert upstream.asked == [("POST", path, "Bearer k")]
    assert ask(gateway, "GET", path) == 403
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/metrics", "/docs", "/openapi.json", "/version", "/load", "/ping", "/tokenize", "/detokenize"),
        *("/v1", "/v1/", "/v1/embeddings", "/v1/models/m", "/v1/completions/", "/v1/chat/completions/render"),
        *("/v1/load_lora_adapter", "/invocations", "/pause", "/V1/models", "/health/", "/healthz"),
        *(
            "/health/../metrics",
            "/v1/models/../../metrics",
            "/v1/%2e%2e/metrics",
            "//metrics",
            "/health%2f..%2fmetrics",
        ),
        *("/health;/../metrics", "/health%00", "/v1\\models"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_gets_through(gateway: str, upstream: Upstream, method: str, path: str) -> None:
    assert ask(gateway, method, path, b"{}" if method == "POST" else None) in (400, 404)
    assert upstream.asked == []


def test_the_server_gets_the_plain_path_however_it_is_spelled(gateway: str, upstream: Upstream) -> None:
    for spelled in ("/metrics/../health", "//health", "/he%61lth", "/./health"):
        assert ask(gateway, "GET", spelled) == 200
    assert {path for _, path, _ in upstream.asked} == {"/health"}


def test_streams_come_piece_by_piece(gateway: str) -> None:
    connection = http.client.HTTPConnection(urlparse(gateway).netloc, timeout=20)
    begin = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps({"stream": True}))
    answer = connection.getresponse()
    arrivals = []
    while answer.readline():
        arrivals.append(time.monotonic() - begin)
    connection.close()
    assert len(arrivals) == PIECES
    assert arrivals[0] < PAUSE < arrivals[1]
    assert all(later - earlier > PAUSE / 2 for earlier, later in pairwise(arrivals))
    # which a quick client alone would not tell: buffered pieces reach it in time as well
    assert "proxy_buffering off;" in (DEPLOY / "nginx" / "nginx.conf").read_text()


def test_servers_are_exchanged_without_a_gap(upstream: Upstream, tmp_path: Path) -> None:
    """An upgrade: the other server is named, nginx told to look. Streams end where they began, all else goes over."""
    with Upstream() as following, nginx(tmp_path, f"127.0.0.1:{upstream.server_address[1]}") as address:
        threading.Thread(target=following.serve_forever, daemon=True).start()
        stream = http.client.HTTPConnection(urlparse(address).netloc, timeout=20)
        stream.request("POST", "/v1/completions", b"{}")
        begun = stream.getresponse()
        assert begun.readline() == b"n0\n"
        config = tmp_path / "nginx"
        port = following.server_address[1]
        (config / "upstream.conf").write_text(f"upstream requant {{ server 127.0.0.1:{port}; }}\n")
        run(program("nginx"), "-c", config / "nginx.conf", "-s", "reload")
        deadline = time.monotonic() + 10
        while not following.asked and time.monotonic() < deadline:
            assert ask(address, "POST", "/v1/chat/completions", b"{}") == 200
        assert following.asked
        assert begun.read() == b"n1\nn2\n"
        stream.close()
        following.shutdown()


def test_large_bodies_are_refused(gateway: str, upstream: Upstream) -> None:
    assert ask(gateway, "POST", "/v1/chat/completions", bytes(2**20)) == 200
    assert ask(gateway, "POST", "/v1/chat/completions", bytes(2 * 2**20 + 1)) == 413
    assert len(upstream.asked) == 1


def test_too_many_requests_are_refused(gateway: str, upstream: Upstream) -> None:
    """Those of a burst pass, 40 and one, and as many as a second allows."""
    time.sleep(2)  # what the tests before have asked for is forgotten
    begin = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: ask(gateway, "GET", "/v1/models"), range(200)))
    passed = statuses.count(200)
    assert set(statuses) == {200, 429}
    assert 41 <= passed <= 43 + 20 * (time.monotonic() - begin)
    assert len(upstream.asked) == passed
    assert ask(gateway, "GET", "/health") == 200, "probes are not counted"
