"""Faults of tensors, of the values in them, and of checksums."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from .fault import (
    LAYER,
    SUMS,
    TAIL,
    TRELLIS,
    UNIFORM,
    WEIGHTS,
    Fault,
    instead,
    layer,
    tensors,
    value,
    write_bytes,
)


def _swap_columns(tensors: dict[str, torch.Tensor]) -> None:
    pointers, indices = tensors[f"{LAYER}.sparse_indptr"].tolist(), tensors[f"{LAYER}.sparse_indices"]
    begin = next(begin for begin, end in pairwise(pointers) if end - begin > 1)
    indices[begin], indices[begin + 1] = indices[begin : begin + 2].tolist()[::-1]


def _repeat_column(tensors: dict[str, torch.Tensor]) -> None:
    pointers, indices = tensors[f"{LAYER}.sparse_indptr"].tolist(), tensors[f"{LAYER}.sparse_indices"]
    begin = next(begin for begin, end in pairwise(pointers) if end - begin > 1)
    indices[begin + 1] = int(indices[begin])


def _fall(tensors: dict[str, torch.Tensor]) -> None:
    pointers = tensors[f"{LAYER}.sparse_indptr"]
    pointers[1] = int(pointers[-1])


def _sums(change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    return lambda folder: (folder / SUMS).write_text("".join(change((folder / SUMS).read_text().splitlines(True))))


TENSORS = [
    Fault(
        "tensor-missing",
        "a layer without its codes",
        "qweight: is missing",
        tensors(lambda t: t.pop(f"{LAYER}.qweight")),
    ),
    Fault(
        "companion-missing",
        "a layer without its table",
        "lookup_table: is missing",
        tensors(lambda t: t.pop(f"{LAYER}.lookup_table")),
    ),
    Fault(
        "sparse-missing",
        "a sparse part without its columns",
        "sparse_indices: is missing",
        tensors(lambda t: t.pop(f"{LAYER}.sparse_indices")),
    ),
    Fault("sparse-not-declared", "a sparse part that nnz denies", "does not belong", layer(nnz=0)),
    Fault("nnz-other", "another nnz than the files'", "demands U16", layer(nnz=3)),
    Fault(
        "weight-beside-codes",
        "a 16-bit weight beside the codes",
        "does not belong",
        tensors(lambda t: t.update({f"{LAYER}.weight": torch.zeros(164, 64).bfloat16()})),
    ),
    Fault(
        "companion-of-another-kind",
        "scales of a layer with a table",
        "does not belong",
        tensors(lambda t: t.update({f"{LAYER}.scales": torch.ones(164, 2).half()})),
    ),
    Fault(
        "tensor-type",
        "scales of another type",
        "demands F16",
        tensors(lambda t: t.update({f"{UNIFORM}.scales": t[f"{UNIFORM}.scales"].float()})),
    ),
    Fault(
        "tensor-rank",
        "codes in one dimension",
        "demands U8",
        tensors(lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].flatten()})),
    ),
    Fault(
        "tensor-shape",
        "codes of a column less",
        "demands U8",
        tensors(lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:, 1:]})),
    ),
    Fault(
        "index-type",
        "columns of another type",
        "demands U16",
        tensors(lambda t: t.update({f"{LAYER}.sparse_indices": t[f"{LAYER}.sparse_indices"].int()})),
    ),
    Fault(
        "features-declared-huge",
        "2³⁰ × 2³⁰ declared",
        "the configuration demands",
        layer(in_features=2**30, out_features=2**30, nnz=0),
    ),
    Fault(
        "bias-shape",
        "a bias of another size",
        "demands BF16",
        tensors(lambda t: t.update({f"{UNIFORM}.bias": torch.zeros(65).bfloat16()})),
    ),
    Fault(
        "ordinary-type",
        "an unquantized tensor of 8 bits",
        "tensors of no quantized layer",
        tensors(lambda t: t.update({"model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)})),
    ),
]
VALUES = [
    Fault("scale-nan", "NaN for a scale", "not finite and positive", value(f"{UNIFORM}.scales", (0, 0), float("nan"))),
    Fault(
        "scale-infinite",
        "an infinite scale",
        "not finite and positive",
        value(f"{UNIFORM}.scales", (63, 1), float("inf")),
    ),
    Fault("scale-zero", "a scale of 0", "not finite and positive", value(f"{UNIFORM}.scales", (0, 0), 0.0)),
    Fault("scale-negative", "a negative scale", "not finite and positive", value(f"{UNIFORM}.scales", (0, 0), -1.0)),
    Fault(
        "pad-bits-zeros",
        "pad bits behind the zero points",
        "qzeros: pad bits",
        value(f"{UNIFORM}.qzeros", (5, -1), 255),
    ),
    Fault("pad-bits-codes", "pad bits behind the codes", "qweight: pad bits", value(f"{TAIL}.qweight", (5, -1), 255)),
    Fault(
        "table-nan", "NaN in a table", "an entry is not finite", value(f"{LAYER}.lookup_table", (163, 15), float("nan"))
    ),
    Fault(
        "table-infinite",
        "an infinity in a table",
        "an entry is not finite",
        value(f"{LAYER}.lookup_table", (0, 0), float("-inf")),
    ),
    Fault(
        "trellis-scale-nan",
        "NaN for a scale of a trellis",
        "not finite and non-negative",
        value(f"{TRELLIS}.scales", (0, 0), float("nan")),
    ),
    Fault(
        "trellis-scale-negative",
        "a negative scale of a trellis",
        "not finite and non-negative",
        value(f"{TRELLIS}.scales", (0, 0), -1.0),
    ),
    Fault("pointers-start", "row pointers that start at 1", "must start at 0", value(f"{LAYER}.sparse_indptr", 0, 1)),
    Fault("pointers-fall", "row pointers that fall", "row pointers decrease", tensors(_fall)),
    Fault(
        "pointers-negative", "a negative row pointer", "row pointers decrease", value(f"{LAYER}.sparse_indptr", 1, -5)
    ),
    Fault(
        "pointers-end",
        "row pointers that end elsewhere",
        "but there are",
        value(f"{LAYER}.sparse_indptr", -1, 2**31 - 1),
    ),
    Fault("column-outside", "a column outside the matrix", "lies outside", value(f"{LAYER}.sparse_indices", -1, 64)),
    Fault("columns-unsorted", "columns of a row that fall", "not strictly increasing", tensors(_swap_columns)),
    Fault(
        "columns-repeated", "a column that stands twice in a row", "not strictly increasing", tensors(_repeat_column)
    ),
    Fault(
        "sparse-nan",
        "NaN for a sparse value",
        "sparse_values: a value is not finite",
        value(f"{LAYER}.sparse_values", 0, float("nan")),
    ),
    Fault(
        "sparse-infinite",
        "an infinite sparse value",
        "sparse_values: a value is not finite",
        value(f"{TRELLIS}.sparse_values", -1, float("inf")),
    ),
    Fault(
        "norm-nan", "NaN in a norm", "norm.weight: a value is not finite", value("model.norm.weight", 3, float("nan"))
    ),
    Fault(
        "embedding-infinite",
        "an infinity in the embedding",
        "embed_tokens.weight: a value is not finite",
        value("model.embed_tokens.weight", (319, 63), float("inf")),
    ),
]
CHECKSUMS = [
    Fault(
        "sum-other",
        "a file that is not the one listed",
        "has SHA-256",
        lambda f: (f / "tokenizer.json").write_text("{}"),
        by="verify",
    ),
    Fault(
        "sum-of-missing-file",
        "a listed file is missing",
        "is missing, but SHA256SUMS lists it",
        lambda f: (f / "tokenizer.json").unlink(),
        by="verify",
    ),
    Fault(
        "sum-not-listed",
        "the weights are not listed",
        "does not list model.safetensors",
        _sums(lambda lines: [line for line in lines if WEIGHTS not in line]),
        by="verify",
    ),
    Fault(
        "sum-path",
        "a path out of the folder",
        "not a SHA-256 and a plain file name",
        _sums(lambda lines: [*lines, "0" * 64 + "  ../x\n"]),
        by="verify",
    ),
    Fault("sum-twice", "a file stands twice", "again", _sums(lambda lines: [*lines, lines[0]]), by="verify"),
    Fault("sum-not-text", "bytes that are not text", "is not text", write_bytes(SUMS, b"\xff\xfe"), by="verify"),
    Fault("sums-pipe", "SHA256SUMS is a pipe", "not a regular file", instead(SUMS, os.mkfifo), by="verify"),
]
