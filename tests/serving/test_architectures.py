"""Every architecture from a model folder to tokens: converted, served by vLLM's engine in one process and in two,
tokens equal to those of the dequantized transformers model."""

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.serving.engine import greedy_tokens, job, vllm_tokens
from vllm_requant import hf
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save

pytestmark = pytest.mark.timeout(900)

PROMPTS = [[256, 17, 250, 199, 3], [42], [7, 7, 7, 120, 9, 200, 11]]
NEW_TOKENS = 12
# heads of 32, which vLLM's attention has on a CPU; two ranks have halves that groups of 32 fit
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192}
HEADS = {"head_dim": 32}
EXPERTS = {"moe_intermediate_size": 128}
# an architecture, what its configuration needs beside the shape, and how it is converted; every base that splits by
# rows once, head quantized or not, tied or not
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (HEADS, {"base": "squeezellm", "bits": 3, "lm_head_bits": 8}),
    "mistral": (HEADS | {"sliding_window": 16}, {"base": "awq", "bits": 4, "group_size": 32}),
    "qwen2": ({"tie_word_embeddings": True}, {"base": "rtn", "bits": 3, "group_size": 32, "lm_head_bits": 8}),
    "qwen3": (HEADS, {"base": "gptq", "bits": 4, "group_size": 32, "lm_head_bits": 4}),
    "gemma3": (HEADS, {"base": "squeezellm", "bits": 4, "lm_head_bits": 8}),
    "phi3": ({}, {"base": "rtn", "bits": 4, "group_size": 32}),
    "mixtral": (HEADS, {"base": "squeezellm", "bits": 3}),
    "qwen2_moe": (
        EXPERTS | {"shared_expert_intermediate_size": 192},
        {"base": "gptq", "bits": 4, "group_size": 32, "lm_head_bits": 8},
    ),
    "qwen3_moe": (HEADS | EXPERTS, {"base": "awq", "bits": 4, "group_size": 32}),
}


def convert(architecture: str, folder: Path) -> Path:
    extra, recipe = CASES[architecture]
    source = tiny.save(folder / architecture, architecture, **SHAPE, **extra)
    settings = {"outliers": 0.002, "significant": 0.002, "rounds": 1, "num_samples": 4, "seq_len": 32} | recipe
    out = folder / f"{architecture}-requant"
    convert_and_save(load_causal_lm(str(source)), out, Recipe(**settings))
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    return {architecture: convert(architecture, folder) for architecture in CASES}


@pytest.fixture(scope="module")
def tokens(converted: dict[str, Path]) -> dict[str, list[list[int]]]:
    return {
        architecture: greedy_tokens(hf.load_dequantized(folder), PROMPTS, NEW_TOKENS)
        for architecture, folder in converted.items()
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_those_of_the_dequantized_model(
    converted: dict[str, Path], tokens: dict[str, list[list[int]]], ranks: int
) -> None:
    options = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    results = vllm_tokens(*(job(folder, PROMPTS, **options) for folder in converted.values()))
    assert dict(zip(converted, results, strict=True)) == tokens
    assert len({str(sequences) for sequences in tokens.values()}) == len(tokens)


def test_ranks_with_experts_of_their_own(converted: dict[str, Path], tokens: dict[str, list[list[int]]]) -> None:
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    mixtures = ("mixtral", "qwen2_moe")  # without and with a shared expert, which every rank has a part of
    results = vllm_tokens(*(job(converted[architecture], PROMPTS, **options) for architecture in mixtures))
    assert results == [tokens[architecture] for architecture in mixtures]
