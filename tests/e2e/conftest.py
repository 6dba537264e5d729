"""The real model, converted once, and real servers."""

import copy
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from vllm_requant.bench.servers import REQUANT, free_port, start_server, stop, wait_until_healthy
from vllm_requant.bench.soak import own_anonymous_bytes
from vllm_requant.offline.models import CausalLM, load_causal_lm
from vllm_requant.offline.pipeline import Conversion
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "The three primary colours are",
]
NEW_TOKENS = 32
RECIPE = Recipe(bits=4, num_samples=8, path_samples=4, seq_len=128)


@pytest.fixture(scope="session")
def original() -> CausalLM:
    """SmolLM2-135M-Instruct; `make test` says where it lies."""
    path = os.environ.get("REQUANT_TEST_MODEL")
    if not path:
        pytest.skip("REQUANT_TEST_MODEL names no model; `make test` sets it")
    return load_causal_lm(path)


@pytest.fixture(scope="session")
def original_folder(original: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original as a bfloat16 Hugging Face folder, for serving it beside the checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    original.tokenizer.save_pretrained(folder)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in original.model.state_dict().items()}
    original.model.save_pretrained(folder, state_dict=state)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    return folder


@dataclass(frozen=True)
class Converted:
    folder: Path
    conversion: Conversion


@pytest.fixture(scope="session")
def converted(original: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The default recipe with little calibration; of a copy, because tuning moves the norms."""
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    _, conversion = convert_and_save(replace(original, model=copy.deepcopy(original.model)), folder, RECIPE)
    return Converted(folder, conversion)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        client: the official OpenAI client, connected to it.
        pid: its process; the engine and the workers are descendants.
        log: what it printed.
    """

    client: openai.OpenAI
    pid: int
    log: Path

    def worker_bytes(self) -> int:
        """Resident memory, mapped files apart, of the process that holds the weights: the largest one."""
        root = psutil.Process(self.pid)
        return max(own_anonymous_bytes(process.pid) for process in [root, *root.children(recursive=True)])

    @property
    def address(self) -> str:
        """URL of its root, without a slash at the end."""
        return str(self.client.base_url).removesuffix("/v1/")

    def metrics(self) -> str:
        """What it says to Prometheus."""
        return get(f"{self.address}/metrics")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


@contextmanager
def serve(folder: Path, log: Path, *flags: str, plugin: bool = True, **environment: str) -> Iterator[Server]:
    """vLLM's own server on ``folder``; without ``plugin`` nothing of ours is on its command line."""
    port = free_port()
    stock = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command = [*([*REQUANT, "serve"] if plugin else stock), str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    command += ["--max-model-len", "512", "--enforce-eager", *flags]
    process = start_server(command, log, **environment)
    try:
        wait_until_healthy(process, port, log)
        client: Any = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
        yield Server(client, process.pid, log)
    finally:
        stop(process)
