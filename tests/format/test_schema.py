"""The configuration says everything, and nothing that it must not."""

import copy
from typing import Any

import pytest

from vllm_requant.format import ReQuantFormatError, parse_config

GOOD: dict[str, Any] = {
    "quant_method": "requant",
    "format_version": 1,
    "producer": {"name": "test", "anything": [1, 2]},
    "provenance": {},
    "layers": {
        "a": {"kind": "uniform", "bits": 3, "group_size": 64, "in_features": 96, "out_features": 8, "nnz": 5},
        "b": {"kind": "lut", "bits": 4, "in_features": 96, "out_features": 8, "nnz": 0},
    },
}


def test_good_configuration_round_trips() -> None:
    config = parse_config(GOOD)
    assert config.model_dump(mode="json") == GOOD
    assert config.nnz == 5
    assert config.numel == 2 * 96 * 8


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("quant_method",), "gptq", "quantization_config"),
        (("format_version",), 2, "format_version"),
        (("format_version",), "1", "format_version"),
        (("format_version",), True, "format_version"),
        (("surprise",), 1, "surprise"),
        (("layers",), {}, "layers"),
        (("layers", "a", "kind"), "ternary", "layers.a"),
        (("layers", "a", "bits"), 5, "layers.a.uniform.bits"),
        (("layers", "b", "bits"), 8, "layers.b.lut.bits"),
        (("layers", "a", "bits"), "3", "layers.a.uniform.bits"),
        (("layers", "a", "group_size"), 48, "layers.a.uniform.group_size"),
        (("layers", "a", "group_size"), 0, "layers.a.uniform.group_size"),
        (("layers", "b", "group_size"), 64, "layers.b.lut.group_size"),
        (("layers", "a", "in_features"), 0, "layers.a.uniform.in_features"),
        (("layers", "a", "in_features"), 2**31, "layers.a.uniform.in_features"),
        (("layers", "a", "nnz"), -1, "layers.a.uniform.nnz"),
        (("layers", "a", "nnz"), 96 * 8 + 1, "layers.a"),
        (("layers", "a", "nnz"), True, "layers.a.uniform.nnz"),
        (("layers", "a", "nnz"), 1.0, "layers.a.uniform.nnz"),
    ],
)
def test_bad_configuration_names_the_entry(path: tuple[str, ...], value: Any, where: str) -> None:
    config = copy.deepcopy(GOOD)
    target = config
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ReQuantFormatError) as caught:
        parse_config(config, file="config.json")
    assert where in (caught.value.tensor or "")
    assert "config.json" in str(caught.value)


def test_missing_key_is_named() -> None:
    config = copy.deepcopy(GOOD)
    del config["layers"]["a"]["in_features"]
    with pytest.raises(ReQuantFormatError, match=r"in_features.*required"):
        parse_config(config)
