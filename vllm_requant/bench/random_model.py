"""``python -m vllm_requant.bench.random_model DIR``: a model of random weights in a known shape, for timing.

Speed depends on shapes, not on what the weights are. The folder is one that ``requant convert`` takes.
"""

import argparse
from pathlib import Path

import torch

from ..offline.models import ModelError, load_tokenizer

__all__ = ["SHAPES", "write"]

SHAPES = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Settings of Llama configurations."""


def write(folder: Path, shape: str, tokenizer: str) -> None:
    """Write a random Llama.

    Args:
        folder: must not exist.
        shape: a key of :data:`SHAPES`.
        tokenizer: a model, as the converter names one, whose tokenizer is taken; the vocabulary may be smaller.

    Raises:
        ModelError: there is no such tokenizer.
        FileExistsError: ``folder`` exists.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    # before the work: what is wrong with either comes to light here
    text = load_tokenizer(tokenizer)
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0)
    torch.manual_seed(0)
    # bfloat16 from the start: half the memory
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    text.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_requant.bench.random_model", description=__doc__)
    parser.add_argument("folder", type=Path, help="to be written; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="default: llama-3.2-1b")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder, Hub id or GGUF file to take it of")
    options = parser.parse_args()
    try:
        write(options.folder, options.shape, options.tokenizer)
    except (ModelError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
