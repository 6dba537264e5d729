"""Low-bit language models with a sparse residual chosen by the post-quantization integral.

Importing this package imports neither torch nor vLLM. The parts are:

``vllm_requant.kernels``   y = x · (dense + sparse)ᵀ on low-bit weights
``vllm_requant.format``    the ReQuant checkpoint: schema, packing, reading, writing, validation
``vllm_requant.offline``   the converter
``vllm_requant.serving``   the vLLM plugin
``vllm_requant.hf``        a checkpoint as a transformers model
``vllm_requant.cli``       the ``requant`` command
"""

__version__ = "0.1.0"
