"""ReQuant checkpoints in transformers.

Importing this package makes ``AutoModelForCausalLM.from_pretrained`` load them, computing with the same kernels as the
server (:mod:`.quantizer`). :func:`load_dequantized` expands the weights instead, for evaluation and for checking.
"""

from .dequantized import load_dequantized, load_tokenizer
from .quantizer import RequantTransformersConfig

__all__ = ["RequantTransformersConfig", "load_dequantized", "load_tokenizer"]
