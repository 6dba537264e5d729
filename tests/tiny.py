"""Tiny random models with a tokenizer, for tests that need an architecture but no language."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    # neither a multiple of the group size nor of 64: a tail group everywhere
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
CONFIGS = {
    "llama": lambda **extra: LlamaConfig(**_SHAPE | extra),
    "mistral": lambda **extra: MistralConfig(**_SHAPE | extra),
    "qwen2": lambda **extra: Qwen2Config(**_SHAPE | extra),
    "qwen3": lambda **extra: Qwen3Config(**_SHAPE | {"head_dim": 16} | extra),
    "gemma3": lambda **extra: Gemma3TextConfig(**_SHAPE | {"head_dim": 16, "sliding_window": 64} | extra),
    "phi3": lambda **extra: Phi3Config(**_SHAPE | extra),
    "mixtral": lambda **extra: MixtralConfig(**_SHAPE | {"num_local_experts": 4} | extra),
    "qwen2_moe": lambda **extra: Qwen2MoeConfig(**_SHAPE | _EXPERTS | {"shared_expert_intermediate_size": 96} | extra),
    "qwen3_moe": lambda **extra: Qwen3MoeConfig(**_SHAPE | _EXPERTS | {"head_dim": 16} | extra),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, plus a beginning and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def model(architecture: str = "llama", *, seed: int = 0, **extra: Any) -> Any:
    """A random model in float32 whose weights bfloat16 represents exactly."""
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(CONFIGS[architecture](**extra)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            # larger than an initialization, so that layers matter and quantization hurts
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return built.to(torch.bfloat16).float()


def save(folder: Path, architecture: str = "llama", **extra: Any) -> Path:
    """Write a model and its tokenizer as a Hugging Face folder in bfloat16."""
    model(architecture, **extra).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
