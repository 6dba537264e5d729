"""Faults of ``config.json``: its quantization_config, and the model that it describes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.format.checkpoints import edit_tensors

from .fault import LAYER, TRELLIS, UNIFORM, Fault, config, entry, layer, rename, tensors


def _many_layers(entry: dict[str, Any]) -> None:
    layer = {"kind": "lut", "bits": 2, "in_features": 1, "out_features": 1}
    entry["layers"].update((f"layer{number}", layer) for number in range(2**17))


def _norm_as_layer(folder: Path) -> None:
    """The last norm as a quantized layer of one row."""

    def tensors(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.norm.qweight"] = torch.zeros(1, 32, dtype=torch.uint8)
        tensors["model.norm.lookup_table"] = torch.zeros(1, 16, dtype=torch.float16)

    edit_tensors(folder, tensors)
    spec = {"kind": "lut", "bits": 4, "in_features": 64, "out_features": 1}
    entry(lambda entry: entry["layers"].update({"model.norm": spec}))(folder)


def _rename_layer(folder: Path) -> None:
    """A layer, and its tensors, under a name that the model does not have."""

    def tensors(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
            rename(tensors, name, name.replace(LAYER, "model.layers.0.mlp.other_proj"))

    edit_tensors(folder, tensors)
    entry(lambda entry: rename(entry["layers"], LAYER, "model.layers.0.mlp.other_proj"))(folder)


def _trellis_embedding(folder: Path) -> None:
    spec = {"kind": "trellis", "bits": 2, "state_bits": 12, "code": "mul1", "block_in": 16, "block_out": 16}
    shapes = {"qweight": [20, 8, 32], "signs_in": [8], "signs_out": [40]}

    def tensors(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.embed_tokens.weight"]
        for suffix, shape in shapes.items():
            tensors[f"model.embed_tokens.{suffix}"] = torch.zeros(shape, dtype=torch.uint8)
        tensors["model.embed_tokens.scales"] = torch.zeros(20, 4, dtype=torch.float16)

    edit_tensors(folder, tensors)
    sizes = {"in_features": 64, "out_features": 320}
    entry(lambda entry: entry["layers"].update({"model.embed_tokens": spec | sizes}))(folder)


def _experts(change: Callable[[str], bool]) -> Callable[[Path], None]:
    """Leave out layers of experts, as if they were not quantized."""
    return entry(lambda entry: [entry["layers"].pop(name) for name in list(entry["layers"]) if change(name)])


SCHEMA = [
    Fault("not-quantized", "no quantization_config", "not quantized", config(lambda c: c.pop("quantization_config"))),
    Fault(
        "entry-not-object",
        "quantization_config is no object",
        "not quantized",
        config(lambda c: c.update(quantization_config=[])),
    ),
    Fault(
        "method-other", "another quant_method", "quant_method is 'gptq'", entry(lambda e: e.update(quant_method="gptq"))
    ),
    Fault("version-newer", "format_version 2", "version 2", entry(lambda e: e.update(format_version=2))),
    Fault("version-missing", "no format_version", "version None", entry(lambda e: e.pop("format_version"))),
    Fault("version-bool", "format_version true", "version True", entry(lambda e: e.update(format_version=True))),
    Fault("version-float", "format_version 1.0", r"version 1\.0", entry(lambda e: e.update(format_version=1.0))),
    Fault("key-unknown", "an unknown key", "surprise", entry(lambda e: e.update(surprise=1))),
    Fault("layers-empty", "no layers", "layers", entry(lambda e: e["layers"].clear())),
    Fault("layers-many", "131,084 layers", "more than the 131072", entry(_many_layers)),
    Fault(
        "layer-name-escape",
        "a terminal's control sequence as a name",
        "not a name of a module",
        entry(lambda e: rename(e["layers"], LAYER, "\x1b[2J")),
    ),
    Fault(
        "layer-name-path",
        "a path as a name",
        "not a name of a module",
        entry(lambda e: rename(e["layers"], LAYER, "../../etc/passwd")),
    ),
    Fault(
        "layer-name-long",
        "a name of 501 characters",
        "not a name of a module",
        entry(lambda e: rename(e["layers"], LAYER, "a" * 501)),
    ),
    Fault("layer-not-object", "a layer that is no object", LAYER, entry(lambda e: e["layers"].update({LAYER: 1}))),
    Fault("layer-key-unknown", "an unknown key of a layer", "surprise", layer(surprise=1)),
    Fault(
        "layer-key-missing",
        "a layer without in_features",
        "in_features.*required",
        entry(lambda e: e["layers"][LAYER].pop("in_features")),
    ),
    Fault("kind-unknown", "an unknown kind", "ternary", layer(kind="ternary")),
    Fault("bits-unknown", "5 bits", "bits", layer(bits=5)),
    Fault("bits-bool", "true for a number", "bits", layer(TRELLIS, bits=True)),
    Fault("bits-text", "text for a number", "bits", layer(bits="4")),
    Fault("bits-float", "a fraction for a number", "bits", layer(bits=4.0)),
    Fault("group-not-multiple", "groups of 48", "group_size", layer(UNIFORM, group_size=48)),
    Fault("group-zero", "groups of nothing", "group_size", layer(UNIFORM, group_size=0)),
    Fault("group-huge", "groups of 2³⁰", "group_size", layer(UNIFORM, group_size=2**30)),
    Fault("features-zero", "no input features", "in_features", layer(in_features=0)),
    Fault("features-huge", "2³¹ input features", "in_features", layer(in_features=2**31)),
    Fault("nnz-negative", "a negative nnz", "nnz", layer(nnz=-1)),
    Fault("nnz-bool", "nnz true", "nnz", layer(nnz=True)),
    Fault("nnz-beyond-weights", "more sparse elements than weights", "exceeds", layer(nnz=64 * 164 + 1)),
    Fault("state-too-small", "a state of less than two steps", "state_bits", layer(TRELLIS, bits=6, state_bits=11)),
    Fault("code-unknown", "an unknown code of a trellis", "code", layer(TRELLIS, code="mul2")),
    Fault("block-unknown", "Hadamard blocks of 48", "block_in", layer(TRELLIS, block_in=48)),
    Fault(
        "block-not-dividing", "a Hadamard block that does not divide", "Hadamard block", layer(TRELLIS, block_in=128)
    ),
]
MODEL = [
    Fault(
        "head-tied-and-named",
        "a quantized head with tied embeddings",
        "must not name the head",
        config(lambda c: c.update(tie_word_embeddings=True)),
    ),
    Fault(
        "expert-left-out",
        "an expert that is not quantized",
        "3 of its 4 experts",
        _experts(lambda name: ".experts.3." in name),
        "experts",
    ),
    Fault(
        "expert-matrix-left-out",
        "a matrix of an expert that is not quantized",
        "quantize all or none",
        _experts(lambda name: name.endswith(".experts.2.w2")),
        "experts",
    ),
    Fault(
        "matrix-left-out-everywhere",
        "a matrix of all experts that is not quantized",
        "quantize all or none",
        _experts(lambda name: name.endswith(".w2")),
        "experts",
    ),
    Fault(
        "blocks-million",
        "a million decoder blocks",
        "num_hidden_layers: is 1000000",
        config(lambda c: c.update(num_hidden_layers=10**6)),
    ),
    Fault(
        "experts-million",
        "a million experts",
        "of its 1000000 experts",
        config(lambda c: c.update(num_local_experts=10**6)),
        "experts",
    ),
    Fault(
        "vocabulary-huge",
        "10¹² tokens, for which there are no embeddings",
        "the model's is",
        config(lambda c: c.update(vocab_size=10**12)),
    ),
    Fault(
        "architecture-unknown",
        "an unknown model_type",
        "builds no causal language model",
        config(lambda c: c.update(model_type="nonsense")),
    ),
    Fault(
        "architecture-missing",
        "no model_type",
        "builds no causal language model",
        config(lambda c: c.pop("model_type")),
    ),
    Fault(
        "heads-zero",
        "no attention heads",
        "builds no causal language model",
        config(lambda c: [c.pop("head_dim", None), c.update(num_attention_heads=0)]),
    ),
    Fault(
        "hidden-size-text",
        "text for the hidden size",
        "builds no causal language model",
        config(lambda c: c.update(hidden_size="wide")),
    ),
    Fault(
        "hidden-size-other",
        "another hidden size than the files'",
        "the model's is",
        config(lambda c: c.update(hidden_size=128, head_dim=16)),
    ),
    Fault("module-unknown", "a layer that the model does not have", "no such module", _rename_layer),
    Fault("module-no-layer", "a norm as a quantized layer", "cannot be quantized", _norm_as_layer),
    Fault("embedding-trellis", "an embedding of the trellis kind", "cannot be of the trellis kind", _trellis_embedding),
    Fault(
        "model-tensor-missing",
        "a norm that is not there",
        "does not hold this tensor",
        tensors(lambda t: t.pop("model.norm.weight")),
    ),
    Fault(
        "model-tensor-unknown",
        "a tensor that the model does not have",
        "no such tensor",
        tensors(lambda t: t.update(other=torch.zeros(1))),
    ),
    Fault(
        "model-tensor-shape",
        "a norm of another size",
        "the model's is",
        tensors(lambda t: t.update({"model.norm.weight": torch.zeros(65)})),
    ),
]
