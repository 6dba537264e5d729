"""The peers' checkpoints hold the weights that they are said to hold."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from vllm_requant import hf
from vllm_requant.bench.peers import write_bfloat16, write_int4
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    recipe = Recipe(base="rtn", bits=4, outliers=0, significant=0, num_samples=2, seq_len=24, path_samples=1)
    convert_and_save(load_causal_lm(str(tiny.save(folder / "model"))), folder / "checkpoint", recipe)
    return folder / "checkpoint"


def test_16_bits_are_the_expanded_weights(checkpoint: Path, tmp_path: Path) -> None:
    write_bfloat16(checkpoint, tmp_path)
    ours = hf.load_dequantized(checkpoint, torch.bfloat16).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_4_bits_are_the_weights_rounded_in_groups(checkpoint: Path, tmp_path: Path) -> None:
    write_int4(checkpoint, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group_size = config["config_groups"]["group_0"]["weights"]["group_size"]
    tensors = load_file(tmp_path / "model.safetensors")
    original = hf.load_dequantized(checkpoint).state_dict()
    packed = [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]
    assert len(packed) == 14
    for name in packed:
        weight = original[name]
        assert tensors[f"{name}_shape"].tolist() == list(weight.shape)
        codes = (tensors[f"{name}_packed"][..., None] >> (4 * torch.arange(8))) & 15
        scales = tensors[f"{name}_scale"].float()
        restored = (codes.reshape(weight.shape) - 8) * scales.repeat_interleave(group_size, 1)
        # the largest code is 7, its opposite -8: a group's largest weight may miss the grid by half a step more
        assert ((restored - weight).abs() <= 1.01 * scales.repeat_interleave(group_size, 1)).all()
        assert (restored - weight).abs().mean() < 0.3 * scales.mean()
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
