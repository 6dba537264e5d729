"""``requant_*`` on the ``/metrics`` of a real server, and through a real Prometheus."""

import json
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny
from tests.e2e.conftest import Server, get, serve
from vllm_requant.bench.servers import free_port
from vllm_requant.cli.inspect import describe
from vllm_requant.format.architecture import model_without_weights
from vllm_requant.format.reader import Checkpoint
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save
from vllm_requant.offline.serving_memory import ServedModel
from vllm_requant.serving.metrics import METRICS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


SHORT = ("--max-model-len", "128")


def samples(server: Server) -> dict[str, list[tuple[dict[str, str], float]]]:
    families = text_string_to_metric_families(server.metrics())
    return {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in families
        if family.name.startswith("requant_")
    }


def check(found: dict[str, list[tuple[dict[str, str], float]]], folder: Path) -> None:
    expected = describe(folder)
    assert found.keys() == METRICS.keys()

    def only(name: str) -> tuple[dict[str, str], float]:
        (sample,) = found[name]
        return sample

    labels, one = only("requant_checkpoint_info")
    assert one == 1
    assert labels["model_name"] == "m"
    assert labels["base"] == expected["provenance"]["recipe"]["base"]
    assert labels["source"] == expected["provenance"]["source"]
    assert only("requant_bits_per_weight")[1] == pytest.approx(expected["bits_per_weight"])
    assert only("requant_sparse_share")[1] == pytest.approx(expected["sparse_share"])
    assert only("requant_residual_nnz")[1] == expected["nnz"]
    stored = {labels["kind"]: value for labels, value in found["requant_checkpoint_weight_bytes"]}
    assert stored.pop("unquantized") == expected["bytes"]["unquantized"]
    assert stored.pop("residual") == expected["bytes"]["sparse"]
    assert sum(stored.values()) == expected["bytes"]["dense"]
    held = sum(value for _, value in found["requant_runtime_weight_bytes"])
    in_checkpoint = expected["bytes"]["dense"] + expected["bytes"]["sparse"]
    assert in_checkpoint <= held < 1.15 * in_checkpoint
    stored = Checkpoint(folder)
    foretold = ServedModel(model_without_weights(stored), stored.config.layers).quantized_bytes(1, "cpu")
    assert held == pytest.approx(foretold, rel=0.01), "what a dry run says"
    assert 0 < only("requant_read_bytes_per_token")[1] <= held
    assert all(labels["kernel"].startswith("cpu-") for labels, _ in found["requant_kernel_info"])
    assert 0 < only("requant_repack_seconds")[1] < only("requant_load_seconds")[1] < 600


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny random model: what is measured does not depend on the weights."""
    folder = tmp_path_factory.mktemp("metrics")
    source = tiny.save(folder / "in", hidden_size=256, intermediate_size=512, head_dim=64, tie_word_embeddings=True)
    recipe = Recipe(base="awq", outliers=0.0, significant=0.002, rounds=1, lm_head_bits=8, num_samples=4, seq_len=32)
    convert_and_save(load_causal_lm(str(source)), folder / "out", recipe)
    return folder / "out"


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(checkpoint, tmp_path_factory.mktemp("log") / "one.log", *SHORT) as running:
        yield running


def test_one_api_server(server: Server, checkpoint: Path) -> None:
    check(samples(server), checkpoint)


def test_prometheus_scrapes_and_answers(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed")
    port, target = free_port(), server.address.removeprefix("http://")
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: requant, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = [binary, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as prometheus:
        try:
            result = _ask(port, "requant_bits_per_weight")
            ratio = _ask(port, "sum(requant_runtime_weight_bytes) / sum(requant_checkpoint_weight_bytes)")
        finally:
            prometheus.terminate()
    (series,) = result
    assert series["metric"]["model_name"] == "m"
    assert float(series["value"][1]) == pytest.approx(describe(checkpoint)["bits_per_weight"])
    assert len(ratio) == 1


def _ask(port: int, query: str) -> list[Any]:
    """What an instant query returns, once there is something."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    deadline = time.monotonic() + 60
    while True:
        try:
            result: list[Any] = json.loads(get(url))["data"]["result"]
        except OSError:
            result = []
        if result or time.monotonic() > deadline:
            return result
        time.sleep(0.5)


def test_two_api_servers(checkpoint: Path, tmp_path: Path) -> None:
    with serve(checkpoint, tmp_path / "two.log", *SHORT, "--api-server-count", "2") as running:
        for _ in range(8):  # whichever of them answers
            check(samples(running), checkpoint)
