"""What is installed from a wheel is what stands in the folders."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"vllm_requant"}
    for top in (ROOT / "vllm_requant", ROOT / "offline", ROOT / "kernels"):
        for file in top.glob("**/__init__.py"):
            parts = file.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "vllm_requant" else ("vllm_requant", *parts)))
    assert set(listed) == found
