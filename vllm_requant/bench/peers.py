"""The same model for others: in 16 bits and in 4 of its own for vLLM, in 4 bits for llama.cpp."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import hf
from ..format.reader import Checkpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["PEERS", "write_bfloat16", "write_gguf", "write_int4"]

_GROUPS = (128, 64, 32)
_PER_WORD = 8
_Q4_0_GROUP = 32


def write_bfloat16(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint's weights, expanded, as an ordinary model folder.

    Returns:
        The folder.

    Raises:
        ReQuantFormatError: the checkpoint is malformed.
    """
    _model(checkpoint).save_pretrained(folder)
    hf.load_tokenizer(checkpoint).save_pretrained(folder)
    return folder


def write_int4(checkpoint: Path, folder: Path) -> Path:
    """The same weights rounded to 4 bits in groups, symmetric, in the layout of compressed-tensors; good for timing.

    Embedding and head stay in 16 bits.

    Returns:
        The folder.

    Raises:
        ReQuantFormatError: the checkpoint is malformed.
        ValueError: no group that vLLM's kernels take divides the input features of all layers.
    """
    model = _model(checkpoint)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    fitting = [size for size in _GROUPS if all(module.in_features % size == 0 for module in linears.values())]
    if not fitting:
        raise ValueError(f"no group of {', '.join(map(str, _GROUPS))} divides the input features of all layers")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    for name in linears:
        weight = tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _packed(weight, fitting[0]).items()}
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    hf.load_tokenizer(checkpoint).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": _scheme(fitting[0])}))
    return folder


def write_gguf(checkpoint: Path, folder: Path) -> Path:
    """The same weights for llama.cpp, Q4_0 and the head Q8_0: what it runs fastest at 4 bits.

    Good for timing: the tokenizer's vocabulary and merges are there, what it does to a text before them is not.

    Returns:
        The file.

    Raises:
        ReQuantFormatError: the checkpoint is malformed.
        ValueError: the architecture is not Llama's, or has more than the file can say here.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
    from gguf.quants import quantize

    kind = Checkpoint(checkpoint).model_config["model_type"]
    if kind != "llama":
        raise ValueError(f"only Llama is written for llama.cpp; this is {kind}")
    model = _model(checkpoint)
    config = model.config
    rope = config.rope_parameters
    if config.attention_bias or config.mlp_bias or rope["rope_type"] != "default":
        raise ValueError("only Llama without biases and with plain rotary embeddings is written for llama.cpp")
    if any(size % _Q4_0_GROUP for size in (config.hidden_size, config.intermediate_size)):
        raise ValueError(f"llama.cpp's Q4_0 takes input features in groups of {_Q4_0_GROUP}")
    file = folder / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_tokenizer(writer, checkpoint, config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.named_parameters():  # a tied head is there once
        weight = tensor.detach().float()
        if count := heads.get(name.split(".")[-2]):
            # llama.cpp rotates neighbours, transformers the halves of a head
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        stored = GGMLQuantizationType.F32
        if weight.ndim == 2:
            head = name.startswith(("model.embed_tokens", "lm_head"))
            stored = GGMLQuantizationType.Q8_0 if head else GGMLQuantizationType.Q4_0
        theirs = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(theirs, quantize(weight.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_tokenizer(writer: "GGUFWriter", checkpoint: Path, vocab_size: int) -> None:
    from gguf import SpecialVocab, TokenType

    tokenizer = hf.load_tokenizer(checkpoint)
    tokens = [f"<unused {i}>" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    special = set(tokenizer.all_special_ids)
    for token, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = token, TokenType.CONTROL if i in special else TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(checkpoint, load_merges=True).add_to_gguf(writer)


def _model(checkpoint: Path) -> Any:
    return hf.load_dequantized(checkpoint, torch.bfloat16)


def _packed(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, group_size)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp(min=1e-8).bfloat16()
    codes = (groups / scales.float()).round().clamp(-8, 7).add(8).to(torch.int32).view(rows, -1, _PER_WORD)
    words = (codes << (4 * torch.arange(_PER_WORD, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": scales.squeeze(-1),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _scheme(group_size: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


PEERS = {"vLLM-bfloat16": write_bfloat16, "vLLM-int4": write_int4, "llama.cpp": write_gguf}
"""By the names that ``requant bench`` gives them."""
