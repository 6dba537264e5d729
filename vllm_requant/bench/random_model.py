"""``python -m vllm_requant.bench.random_model DIR``: a model of random weights in a known shape, for timing.

Speed depends on shapes, not on what the weights are. The folder is one that ``requant convert`` takes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from ..offline.models import ModelError, load_tokenizer

__all__ = ["SHAPES", "write"]

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "rope_theta": 100000.0,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
"""Settings of configurations."""


def write(folder: Path, shape: str, tokenizer: str, layers: int | None = None) -> None:
    """Write a random model.

    Args:
        folder: must not exist.
        shape: a key of :data:`SHAPES`.
        layers: so many decoder blocks instead of the shape's.
        tokenizer: a model, as the converter names one, whose tokenizer is taken; the vocabulary may be smaller.

    Raises:
        ModelError: there is no such tokenizer.
        FileExistsError: ``folder`` exists.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # before the work: what is wrong with either comes to light here
    text = load_tokenizer(tokenizer)
    folder.mkdir(parents=True)
    settings = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = AutoConfig.for_model(**settings, max_position_embeddings=8192)
    torch.manual_seed(0)
    # bfloat16 from the start: half the memory
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    text.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_requant.bench.random_model", description=__doc__)
    parser.add_argument("folder", type=Path, help="to be written; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="default: llama-3.2-1b")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder blocks; default: those of the shape")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder, Hub id or GGUF file to take it of")
    options = parser.parse_args()
    try:
        write(options.folder, options.shape, options.tokenizer, options.layers)
    except (ModelError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
