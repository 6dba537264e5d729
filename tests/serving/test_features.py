"""vLLM's features with ReQuant checkpoints: each gives the tokens that it should, or is refused when the engine starts.

Tiny random models in vLLM's offline engine, in as few processes as keep the features apart.
"""

import functools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.e2e.conftest import Server, serve
from tests.serving.engine import greedy_tokens, job, vllm_runs
from vllm_requant import hf
from vllm_requant.bench.servers import REQUANT, free_port, start_server, stop
from vllm_requant.format.reader import Checkpoint
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save

pytestmark = pytest.mark.timeout(900)

NEW_TOKENS = 12
PROMPTS = [[256, 17, 250, 199, 3], [42], [7, 7, 7, 120, 9, 200, 11]]
BLOCK = 32  # tokens that vLLM caches together
LONG = [256, *(37 * index % 251 for index in range(150))]
REPETITIVE = [5, 6, 7, 8] * 12
REGEX = "(ab|cd)+[0-9]{3}"
ROOM: dict[str, Any] = {"max_model_len": 256}
# heads of 32, which vLLM's attention has on a CPU
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "uniform": (
        {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
        {"base": "rtn", "bits": 4, "group_size": 32},
        "5GB",
    ),
    "tied": (
        {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "tie_word_embeddings": True},
        {"base": "squeezellm", "bits": 3, "lm_head_bits": 8},
        "5GB",
    ),
    # every layer's rows and columns in two halves of 128, a trellis's step; in files of one or two layers
    "trellis": (
        {
            "hidden_size": 256,
            "intermediate_size": 256,
            "head_dim": 32,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        {"base": "qtip", "bits": 2},
        "100KB",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The converted models, and as ``dense`` the first one's weights expanded."""
    root = tmp_path_factory.mktemp("features")
    common: dict[str, Any] = {"outliers": 0.002, "significant": 0.002, "rounds": 1, "num_samples": 4, "seq_len": 32}
    for name, (shape, recipe, shard) in MODELS.items():
        source = tiny.save(root / f"{name}-source", **shape)
        convert_and_save(load_causal_lm(str(source)), root / name, Recipe(**common | recipe), max_shard_size=shard)
    hf.load_dequantized(root / "uniform").save_pretrained(root / "dense")
    hf.load_tokenizer(root / "uniform").save_pretrained(root / "dense")
    return {name: root / name for name in (*MODELS, "dense")}


def expected(model: Any, prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    return greedy_tokens(model, prompts, new_tokens)


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random LoRA adapters in PEFT's format on every linear layer of the models' blocks."""
    result = {}
    for name in ("uniform", "tied"):
        result[name] = tmp_path_factory.mktemp("adapter") / name
        _write_adapter(result[name], Checkpoint(folders[name]))
    return result


RANK, ALPHA = 4, 8


def _write_adapter(folder: Path, checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    tensors, modules = {}, set()
    for name, spec in checkpoint.config.layers.items():
        if name.startswith("model.layers."):
            # vLLM takes a model apart by its modules' last names
            modules.add(name.rpartition(".")[2])
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, spec.in_features) / 8
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(spec.out_features, RANK) / 8
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _merged(folder: Path, adapter: Path) -> Any:
    model = hf.load_dequantized(folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            model.get_submodule(module).weight.data += ALPHA / RANK * b @ a
    return model


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], adapters: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Every feature that needs no process of its own, one after another in the same."""
    uniform, tied = folders["uniform"], folders["tied"]
    on_off = PROMPTS + PROMPTS
    # a slot more than adapters: vLLM on a CPU takes that of the last slot for requests that ask for none
    lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    jobs = {
        "plain": job(uniform, [*PROMPTS, LONG], **ROOM),
        "again": job(uniform, PROMPTS, **ROOM),
        "prefix caching": job(uniform, [[*LONG, 1, 2, 3], [*LONG, 9, 8]], **ROOM, block_size=BLOCK, max_num_seqs=1),
        "chunked prefill": job(uniform, [LONG], **ROOM, max_num_batched_tokens=32),
        "whole prefill": job(uniform, [LONG], **ROOM, max_num_batched_tokens=32, enable_chunked_prefill=False),
        "structured output": job(
            uniform,
            PROMPTS,
            sampling={"structured_outputs": {"regex": REGEX}, "ignore_eos": False, "max_tokens": 24},
            skip_tokenizer_init=False,
        ),
        "fp8 cache": job(uniform, PROMPTS, kv_cache_dtype="fp8"),
        "fp8 cache, dense": job(folders["dense"], PROMPTS, kv_cache_dtype="fp8"),
        "8 bit activations": job(uniform, PROMPTS, **ROOM, additional_config={"requant": {"activation_bits": 8}}),
        "sleep": job(uniform, PROMPTS, enable_sleep_mode=True),
        "sleep, dense": job(folders["dense"], PROMPTS, enable_sleep_mode=True),
        "lora": job(uniform, on_off, adapters=[None, None, None, *[adapters["uniform"]] * 3], **lora),
        "lora, tied": job(tied, on_off, adapters=[None, None, None, *[adapters["tied"]] * 3], **lora),
        # last: vLLM on a CPU starts no further engine in a process that has speculated
        "speculative": job(
            uniform,
            [REPETITIVE],
            new_tokens=64,
            **ROOM,
            disable_log_stats=False,
            speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
        ),
    }
    return dict(zip(jobs, vllm_runs(*jobs.values()), strict=True))


@pytest.fixture(scope="module")
def dense(folders: dict[str, Path]) -> Any:
    return hf.load_dequantized(folders["uniform"])


def tokens(run: dict[str, Any]) -> list[list[int]]:
    assert "error" not in run, run["error"]
    found: list[list[int]] = run["tokens"]
    return found


def test_plain_engine(runs: dict[str, dict[str, Any]], dense: Any) -> None:
    assert tokens(runs["plain"]) == expected(dense, [*PROMPTS, LONG])
    assert tokens(runs["again"]) == tokens(runs["plain"])[:3]


def test_prefix_caching(runs: dict[str, dict[str, Any]], dense: Any) -> None:
    run = runs["prefix caching"]
    assert tokens(run) == expected(dense, [[*LONG, 1, 2, 3], [*LONG, 9, 8]])
    # the second prompt begins with the whole blocks of the first one's
    assert run["cached_tokens"] == [0, len(LONG) // BLOCK * BLOCK]


def test_chunked_prefill(runs: dict[str, dict[str, Any]], dense: Any) -> None:
    assert tokens(runs["chunked prefill"]) == expected(dense, [LONG])
    # chunks are what made the prompt's 151 tokens fit into steps of 32
    assert "max_num_batched_tokens (32) is smaller than max_model_len (256)" in runs["whole prefill"]["error"]


def test_speculative_decoding(runs: dict[str, dict[str, Any]], dense: Any) -> None:
    run = runs["speculative"]
    assert tokens(run) == expected(dense, [REPETITIVE], new_tokens=64)
    assert run["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_structured_output(runs: dict[str, dict[str, Any]]) -> None:
    tokens(runs["structured output"])
    texts = runs["structured output"]["texts"]
    assert len(texts) == len(PROMPTS) and all(re.fullmatch(REGEX, text) for text in texts)


def test_8_bit_cache(runs: dict[str, dict[str, Any]]) -> None:
    """As with the expanded weights in the same engine; the cache's rounding moves the tokens of both."""
    assert tokens(runs["fp8 cache"]) == tokens(runs["fp8 cache, dense"]) != tokens(runs["plain"])[:3]


@pytest.mark.parametrize("name", ["uniform", "tied"])
def test_lora(runs: dict[str, dict[str, Any]], folders: dict[str, Path], adapters: dict[str, Path], name: str) -> None:
    """One batch, half of it with an adapter on every layer, fused ones included."""
    found = tokens(runs["lora" if name == "uniform" else f"lora, {name}"])
    plain, adapted = hf.load_dequantized(folders[name]), _merged(folders[name], adapters[name])
    assert found == expected(plain) + expected(adapted)
    assert found[:3] != found[3:]


def test_sleep_is_refused_as_for_every_model(runs: dict[str, dict[str, Any]]) -> None:
    for name in ("sleep", "sleep, dense"):
        assert "Sleep mode is not supported on current platform" in runs[name]["error"]


def test_activation_bits_are_part_of_the_compile_caches_key(runs: dict[str, dict[str, Any]]) -> None:
    tokens(runs["8 bit activations"])
    assert runs["plain"]["config_hash"] == runs["again"]["config_hash"] != runs["8 bit activations"]["config_hash"]


def test_several_files_of_a_trellis_on_two_ranks(folders: dict[str, Path]) -> None:
    assert len(list(folders["trellis"].glob("*.safetensors"))) > 2
    (run,) = vllm_runs(job(folders["trellis"], PROMPTS, tensor_parallel_size=2))
    assert tokens(run) == expected(hf.load_dequantized(folders["trellis"]))


def test_compiled_and_in_two_pipeline_stages(folders: dict[str, Path], tmp_path: Path) -> None:
    """The quantized embedding is the first stage's, the head that is tied to it the second's.

    Both at once: vLLM on a CPU answers nothing from several stages with ``enforce_eager``, whatever the model.
    """
    compiled: dict[str, Any] = {"enforce_eager": False}
    results = vllm_runs(
        job(folders["tied"], PROMPTS, **compiled),
        job(folders["tied"], PROMPTS, **compiled, pipeline_parallel_size=2),
        TORCHDYNAMO_DISABLE="0",
        VLLM_CACHE_ROOT=str(tmp_path),
    )
    wanted = expected(hf.load_dequantized(folders["tied"]))
    assert [tokens(run) for run in results] == [wanted, wanted]
    # one compiled model of the first engine, two of the second
    assert len(list((tmp_path / "torch_compile_cache").rglob("rank_*/model"))) == 3


def ask(server: Server, prompt: list[int]) -> list[int]:
    """Tokens of a server's answer."""
    done: Any = server.client.completions.create(
        model="m",
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    found: list[int] = done.choices[0].token_ids
    return found


def test_two_nodes(folders: dict[str, Path], dense: Any, tmp_path: Path) -> None:
    """Started as on two machines, one rank each: vLLM's own way, without Ray."""
    folder = folders["uniform"]
    shared = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    shared += ["--tensor-parallel-size", "2", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    second = [*REQUANT, "serve", str(folder), "--headless", "--node-rank", "1", *shared]
    worker = start_server(second, tmp_path / "second.log", VLLM_CPU_OMP_THREADS_BIND="1")
    try:
        with serve(folder, tmp_path / "first.log", *shared, VLLM_CPU_OMP_THREADS_BIND="0") as server:
            assert [ask(server, prompt) for prompt in PROMPTS] == expected(dense)
    finally:
        stop(worker)


@pytest.fixture(scope="module")
def two_engines(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[list[int]], dict[str, dict[str, float]]]:
    """What data-parallel engines answered to each prompt four times, and their metrics by name and engine."""
    log = tmp_path_factory.mktemp("log") / "engines.log"
    flags = ("--dtype", "float32", "--max-model-len", "128", "--data-parallel-size", "2")
    with serve(folders["uniform"], log, *flags, VLLM_CPU_OMP_THREADS_BIND="0|1") as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(functools.partial(ask, server), PROMPTS * 4))
        text = server.metrics()
    metrics: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "engine" in sample.labels:
                metrics.setdefault(sample.name, {})[sample.labels["engine"]] = sample.value
    return answers, metrics


def test_two_data_parallel_engines(
    two_engines: tuple[list[list[int]], dict[str, dict[str, float]]], dense: Any
) -> None:
    answers, metrics = two_engines
    assert answers == expected(dense) * 4
    generated = metrics["vllm:generation_tokens_total"]
    assert generated.keys() == {"0", "1"} and all(value > 0 for value in generated.values())
    assert sum(generated.values()) == NEW_TOKENS * len(answers)


def test_metrics_of_both_data_parallel_engines(
    two_engines: tuple[list[list[int]], dict[str, dict[str, float]]],
) -> None:
    held = two_engines[1]["requant_runtime_weight_bytes"]
    assert held.keys() == {"0", "1"} and held["0"] == held["1"] > 0
