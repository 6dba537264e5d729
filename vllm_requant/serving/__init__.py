"""The vLLM plugin: ReQuant checkpoints in stock vLLM, on CPU and CUDA, with tensor parallelism.

vLLM calls :func:`register` in every one of its processes through the entry point group
``vllm.general_plugins``. This is the only package of the project that imports vLLM, and importing it alone
does not: an installed plugin costs nothing until vLLM asks for it.
"""

__all__ = ["register"]


def register() -> None:
    """Make the quantization method ``requant`` known to vLLM; safe to call any number of times."""
    from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config

    from ..format import QUANT_METHOD
    from .config import RequantConfig

    try:
        known = get_quantization_config(QUANT_METHOD)
    except ValueError:
        known = None
    if known is not RequantConfig:
        register_quantization_config(QUANT_METHOD)(RequantConfig)
