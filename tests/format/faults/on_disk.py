"""Faults of files: what they are, their JSON, the index, the headers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.format.checkpoints import split_file, write_file

from .fault import (
    CONFIG,
    INDEX,
    LAYER,
    WEIGHTS,
    Fault,
    config,
    entry,
    header,
    index,
    instead,
    outside,
    rename,
    replace_text,
    shard,
    write_bytes,
)

_BIG = "9" * 5000


def _map(value: Any) -> Callable[[Path], None]:
    """Another file for a tensor in the index."""
    return index(lambda index: index["weight_map"].update({f"{LAYER}.qweight": value}))


def _header_of(tensor: str = f"{LAYER}.qweight", **values: Any) -> Callable[[Path], None]:
    return header(lambda header: header[tensor].update(values))


def _header_text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        header, data = split_file(folder / WEIGHTS)
        write_file(folder / WEIGHTS, change(header), data)

    return make


def _file(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def _second_copy(folder: Path) -> None:
    """A tensor of the first shard in the last one, too."""
    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = []
    for path in (shards[0], shards[-1]):
        header, data = split_file(path)
        tensors.append((json.loads(header), data))
    (first, _), (last, data) = tensors
    name = next(name for name in first if name != "__metadata__")
    last[name] = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}
    write_file(shards[-1], json.dumps(last).encode(), data)


def _mib(count: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / CONFIG, count * 2**20)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


FILES = [
    Fault("no-folder", "no folder", "no such folder", shutil.rmtree),
    Fault("no-config", "no config.json", "holds no config.json", lambda f: (f / CONFIG).unlink()),
    Fault("no-weights", "no safetensors file", "holds neither", lambda f: (f / WEIGHTS).unlink()),
    Fault("pickle", "weights in a pickled file", "holds neither", lambda f: (f / WEIGHTS).rename(f / "model.bin")),
    Fault("config-pipe", "config.json is a pipe", "not a regular file", instead(CONFIG, os.mkfifo)),
    Fault("config-device", "config.json is a device", "not a regular file", instead(CONFIG, _device)),
    Fault(
        "config-link-outside", "config.json links to another folder", "outside the checkpoint", instead(CONFIG, outside)
    ),
    Fault("weights-pipe", "the weights are a pipe", "not a regular file", instead(WEIGHTS, os.mkfifo)),
    Fault("weights-folder", "the weights are a folder", "not a regular file", instead(WEIGHTS, Path.mkdir)),
    Fault(
        "weights-link-outside",
        "the weights link to another folder",
        "outside the checkpoint",
        instead(WEIGHTS, outside),
    ),
    Fault(
        "weights-link-dangling",
        "the weights link to nothing",
        "not a regular file",
        instead(WEIGHTS, lambda p: p.symlink_to("gone")),
    ),
    Fault(
        "weights-link-loop",
        "the weights link to themselves",
        "not a regular file",
        instead(WEIGHTS, lambda p: p.symlink_to(p.name)),
    ),
    Fault("index-pipe", "the index is a pipe", "not a regular file", lambda f: os.mkfifo(f / INDEX)),
    Fault(
        "index-link-outside",
        "the index links to another folder",
        "outside the checkpoint",
        instead(INDEX, outside),
        "shards",
    ),
    Fault(
        "stray-file",
        "a safetensors file that the index does not list",
        "not part of the checkpoint",
        lambda f: shutil.copy(shard(f), f / "more.safetensors"),
        "shards",
    ),
    Fault(
        "consolidated-file",
        "consolidated.safetensors, which vLLM would read instead",
        "not part of the checkpoint",
        lambda f: shutil.copy(f / WEIGHTS, f / "consolidated.safetensors"),
    ),
]
JSON = [
    Fault("config-empty", "config.json is empty", "not valid JSON", write_bytes(CONFIG, b"")),
    Fault("config-not-json", "config.json is not JSON", "not valid JSON", write_bytes(CONFIG, b"{'a': 1}")),
    Fault(
        "config-not-utf8",
        "config.json is not UTF-8",
        "not valid JSON",
        write_bytes(CONFIG, '{"a": 1}'.encode("utf-16")),
    ),
    Fault("config-not-object", "config.json is a list", "not a JSON object", write_bytes(CONFIG, b"[]")),
    Fault(
        "config-duplicate-key",
        "a name stands twice",
        "'bits' stands twice",
        replace_text(CONFIG, ('"bits": 4', '"bits": 4, "bits": 4')),
    ),
    Fault("config-nan", "NaN", "NaN is no number", config(lambda c: c.update(rms_norm_eps=float("nan")))),
    Fault(
        "config-infinity",
        "an infinity",
        "-Infinity is no number",
        config(lambda c: c.update(rms_norm_eps=float("-inf"))),
    ),
    Fault(
        "config-overflowing-number",
        "a number beyond float64",
        "1e999 is no number",
        replace_text(CONFIG, ("1e-06", "1e999")),
    ),
    Fault(
        "config-huge-integer",
        "an integer of 5,000 digits",
        "not valid JSON",
        replace_text(CONFIG, ('"vocab_size": 320', f'"vocab_size": {_BIG}')),
    ),
    Fault("config-deep", "nested 100,000 levels deep", "nested deeper", write_bytes(CONFIG, b'{"a":' * 100_000)),
    Fault(
        "config-deep-legal",
        "nested 100 levels deep",
        "nested deeper",
        entry(lambda e: e.update(provenance=json.loads('{"a":' * 100 + "1" + "}" * 100))),
    ),
    Fault(
        "config-surrogate",
        "half a surrogate pair",
        "not valid JSON",
        replace_text(CONFIG, ('"LlamaForCausalLM"', '"\\ud800"')),
    ),
    Fault("config-too-large", "config.json of 65 MiB", "more than the", _mib(65)),
    Fault(
        "config-many-values",
        "3 million values",
        "holds more than",
        write_bytes(CONFIG, b'{"a": [' + b"[]," * 1_500_000 + b"1]}"),
    ),
    Fault(
        "config-names-code",
        "auto_map",
        "names code",
        config(lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Model"})),
    ),
    Fault(
        "config-names-code-inside",
        "auto_map inside",
        "names code",
        config(lambda c: c.update(text_config={"auto_map": {}})),
    ),
]
INDEXES = [
    Fault("index-not-json", "the index is not JSON", "not valid JSON", write_bytes(INDEX, b"{"), "shards"),
    Fault(
        "index-duplicate-key",
        "a tensor stands twice in the index",
        "stands twice",
        replace_text(INDEX, ('"weight_map": {', '"weight_map": {"a": "b", "a": "b", ')),
        "shards",
    ),
    Fault("index-without-map", "no weight_map", "no weight_map", index(lambda i: i.pop("weight_map")), "shards"),
    Fault(
        "index-absolute",
        "an absolute path",
        "not a plain safetensors file name",
        _map("/etc/passwd.safetensors"),
        "shards",
    ),
    Fault(
        "index-parent",
        "a path out of the folder",
        "not a plain safetensors file name",
        _map("../x.safetensors"),
        "shards",
    ),
    Fault(
        "index-subfolder",
        "a path into a folder",
        "not a plain safetensors file name",
        _map("a/b.safetensors"),
        "shards",
    ),
    Fault(
        "index-nul", "a name with a zero byte", "not a plain safetensors file name", _map("a\0.safetensors"), "shards"
    ),
    Fault("index-number", "a number for a file name", "not a plain safetensors file name", _map(1), "shards"),
    Fault(
        "index-pickle",
        "a file that is not safetensors",
        "not a plain safetensors file name",
        _map("weights.bin"),
        "shards",
    ),
    Fault(
        "index-file-missing",
        "a shard that is not there",
        "shard gone.safetensors is missing",
        _map("gone.safetensors"),
        "shards",
    ),
    Fault(
        "index-other-file",
        "another shard than the tensor's",
        "not listed in the index for its file",
        lambda f: _map(max(f.glob("model-*.safetensors")).name)(f),
        "shards",
    ),
    Fault(
        "index-tensor-missing",
        "a tensor that the index leaves out",
        "not listed in the index",
        index(lambda i: i["weight_map"].pop(f"{LAYER}.qweight")),
        "shards",
    ),
    Fault(
        "index-tensor-extra",
        "a tensor that its shard lacks",
        "not in its file",
        lambda f: index(lambda i: i["weight_map"].update(ghost=shard(f).name))(f),
        "shards",
    ),
    Fault("tensor-in-two-shards", "a tensor in two shards", "stands in two shards", _second_copy, "shards"),
    Fault(
        "index-total-size",
        "another total_size",
        "total_size is 1,",
        index(lambda i: i["metadata"].update(total_size=1)),
        "shards",
    ),
    Fault(
        "index-total-size-bool",
        "total_size true",
        "total_size is True",
        index(lambda i: i["metadata"].update(total_size=True)),
        "shards",
    ),
]
HEADERS = [
    Fault("file-empty", "an empty file", "truncated or not", _file(lambda b: b"")),
    Fault("file-truncated-header", "a file that ends in its header", "truncated or not", _file(lambda b: b[:300])),
    Fault("file-truncated", "a file that ends in its data", "is truncated or", _file(lambda b: b[:-1])),
    Fault("file-trailing-bytes", "bytes behind the last tensor", "belong to no tensor", _file(lambda b: b + b"\0")),
    Fault(
        "lfs-pointer",
        "a pointer of Git LFS",
        "git lfs pull",
        _file(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    Fault(
        "pickle-named-safetensors",
        "a pickled file under the name",
        "truncated or not",
        _file(lambda b: b"\x80\x04\x95" + b"." * 97),
    ),
    Fault(
        "header-length-huge",
        "a header of 2⁶⁴ − 1 bytes",
        "a header of 18446744073709551615",
        _file(lambda b: b"\xff" * 8 + b[8:]),
    ),
    Fault(
        "header-too-long",
        "a header of 100 MB and a byte",
        "at most 100000000",
        lambda f: [(f / WEIGHTS).write_bytes((10**8 + 1).to_bytes(8, "little")), os.truncate(f / WEIGHTS, 10**8 + 9)],
    ),
    Fault("header-not-json", "a header that is not JSON", "header is not JSON", _header_text(lambda h: b"x" + h[1:])),
    Fault("header-broken-json", "a header that breaks off", "not valid JSON", _header_text(lambda h: h[: len(h) // 2])),
    Fault(
        "header-deep",
        "a header nested 100,000 levels deep",
        "nested deeper",
        _header_text(lambda h: b'{"a":' * 100_000),
    ),
    Fault(
        "header-duplicate",
        "a tensor stands twice in a header",
        "stands twice",
        _header_text(lambda h: h.rstrip()[:-1] + b"," + h.rstrip()[1:]),
    ),
    Fault(
        "header-metadata", "metadata that is not text", "metadata", header(lambda h: h.update(__metadata__={"a": 1}))
    ),
    Fault(
        "header-entry-list",
        "an entry that is no object",
        "its entry in the header",
        header(lambda h: h.update({f"{LAYER}.qweight": []})),
    ),
    Fault("header-entry-key", "an unknown key of an entry", "its entry in the header", _header_of(more=1)),
    Fault("header-dtype", "an unknown type", "unknown type 'F7'", _header_of(dtype="F7")),
    Fault(
        "header-shape-overflow", "a shape whose size overflows", "but data_offsets", _header_of(shape=[2**62, 2**62])
    ),
    Fault("header-shape-negative", "a negative size", "not numbers of elements", _header_of(shape=[-164, -32])),
    Fault("header-shape-bool", "true for a size", "not numbers of elements", _header_of(shape=[164, 32, True])),
    Fault("header-shape-long", "a thousand dimensions", "not numbers of elements", _header_of(shape=[1] * 1000)),
    Fault(
        "header-shape-other", "a shape that is not that of the data", "but data_offsets", _header_of(shape=[164, 33])
    ),
    Fault("header-offsets-three", "three offsets", "not numbers of elements", _header_of(data_offsets=[0, 1, 2])),
    Fault(
        "header-offsets-reversed",
        "an end before the begin",
        "but data_offsets",
        header(lambda h: h[f"{LAYER}.qweight"]["data_offsets"].reverse()),
    ),
    Fault(
        "header-overlap",
        "two tensors at one place",
        "its data begins at",
        header(lambda h: h.update({f"{LAYER}.qweight": h["lm_head.qweight"] | {"shape": [320, 64]}})),
    ),
    Fault("header-hole", "a hole between tensors", "its data begins at", header(lambda h: h.pop(f"{LAYER}.qweight"))),
    Fault(
        "header-name-escape",
        "a terminal's control sequence as a name",
        "not a name of a tensor",
        header(lambda h: rename(h, "model.norm.weight", "\x1b[2Jmodel.norm.weight")),
    ),
]
