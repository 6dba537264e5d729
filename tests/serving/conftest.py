"""Environment of the serving tests: small vLLM, no subprocess unless a test asks for one."""

import os

# read when vLLM is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.serving.vllm_layers import RankSetter


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> RankSetter:
    """``as_rank(rank, size)``: layers built from now on believe to be this tensor-parallel rank.

    Collectives return their own input, so that a test can combine the ranks' outputs itself.
    """
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    def set_rank(rank: int, size: int) -> None:
        for module in (linear, vocab_parallel_embedding, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        for module in (linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", lambda tensor: tensor)

    return set_rank


@pytest.fixture(autouse=True)
def eager():
    """vLLM compiles the masking of token ids, which takes longer than all tests of this folder together."""
    with torch.compiler.set_stance("force_eager"):
        yield
