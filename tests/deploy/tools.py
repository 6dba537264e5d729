"""Validators and servers for the tests of deploy/: a test whose program is missing is skipped, and says which."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_requant.bench.servers import free_port

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules" / "vllm-requant.rules.yml"


def program(name: str) -> str:
    """Path of an installed program: beside this Python, on the path, or where Debian keeps servers."""
    for place in (str(Path(sys.executable).parent), None, "/usr/sbin"):
        if found := shutil.which(name, path=place):
            return found
    pytest.skip(f"{name} is not installed")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a program prints; where it fails the test does, and shows that."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(words)}\n{text}"
    return text


def preview() -> ModuleType:
    """``deploy/grafana/preview.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location("preview", DEPLOY / "grafana" / "preview.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["preview"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def dashboard(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def rules() -> list[dict[str, Any]]:
    """All of them, recording and alerting."""
    yaml = pytest.importorskip("yaml")
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def selectors(expr: str) -> list[str]:
    """What a query takes from the database: names with their matchers, as PromQL."""
    promql = pytest.importorskip("promql_parser")
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(f"{node.name or ''}{node.matchers}" if node.matchers else str(node.name))

    promql.walk(promql.parse(expr), visit)
    return [re.sub(r"\{\}$", "", selector) for selector in found]


@contextmanager
def running(command: Sequence[str | Path], log: Path, ready: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A server, from the moment that ``ready``, a URL, answers, whatever it says."""
    with (
        log.open("wb") as output,
        subprocess.Popen([str(word) for word in command], stdout=output, stderr=output) as server,
    ):
        try:
            deadline = time.monotonic() + 30
            while status(ready) is None:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.1)
            yield server
        finally:
            server.terminate()


def status(url: str) -> int | None:
    """Of the response to a GET; None if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    address: str

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of what the HTTP API answers."""
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[Any]:
        result: list[Any] = self.get("query", query=expr)["result"]
        return result

    def alerts(self, name: str) -> list[str]:
        """States of the alerts of a rule: pending or firing; none while its expression is false."""
        return [alert["state"] for alert in self.get("alerts")["alerts"] if alert["labels"]["alertname"] == name]


@contextmanager
def prometheus(
    folder: Path, servers: Sequence[str], converters: Sequence[str], waits: str | None = None
) -> Iterator[Prometheus]:
    """Prometheus with what deploy/ ships, looking every second and at other targets.

    Args:
        folder: for the copy, the data and the log.
        servers: host and port of what ``requant serve`` runs.
        converters: of node_exporters.
        waits: in the place of every alert's ``for``; as shipped if None.
    """
    binary, config, port = program("prometheus"), folder / "prometheus", free_port()
    shutil.copytree(DEPLOY / "prometheus", config)
    main = config / "prometheus.yml"
    main.write_text(main.read_text().replace("_interval: 15s", "_interval: 1s"))
    (config / "targets" / "servers.yml").write_text(json.dumps([{"targets": list(servers)}]))
    (config / "targets" / "converters.yml").write_text(json.dumps([{"targets": list(converters)}]))
    if waits:
        copy = config / "rules" / RULES.name
        copy.write_text(re.sub(r"(?m)^( +for:) \d+[smh]$", rf"\1 {waits}", copy.read_text()))
    address = f"http://127.0.0.1:{port}"
    command = [binary, f"--config.file={main}", f"--storage.tsdb.path={folder / 'data'}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with running(command, folder / "prometheus.log", f"{address}/-/ready"):
        yield Prometheus(address)


@contextmanager
def node_exporter(textfiles: Path, log: Path) -> Iterator[str]:
    """Host and port of a node_exporter that reads a folder and nothing else, with the flags of compose.yaml."""
    address = f"127.0.0.1:{free_port()}"
    command = [program("prometheus-node-exporter"), "--collector.disable-defaults", "--collector.textfile"]
    command += [f"--collector.textfile.directory={textfiles}", f"--web.listen-address={address}"]
    with running(command, log, f"http://{address}/metrics"):
        yield address


@contextmanager
def nginx(folder: Path, upstream: str) -> Iterator[str]:
    """Address of an nginx with the shipped configuration, which stands before ``upstream``, a host and port."""
    binary, port = program("nginx"), free_port()
    shutil.copytree(DEPLOY / "nginx", folder / "nginx")
    main = folder / "nginx" / "nginx.conf"
    main.write_text(main.read_text().replace("/tmp/", f"{folder}/"))
    (folder / "nginx" / "upstream.conf").write_text(f"upstream requant {{ server {upstream}; keepalive 32; }}\n")
    (folder / "nginx" / "listen.conf").write_text(f"listen 127.0.0.1:{port};\n")
    address = f"http://127.0.0.1:{port}"
    with running([binary, "-c", main, "-g", "daemon off;"], folder / "nginx.log", f"{address}/nothing"):
        yield address
