"""The peers' checkpoints hold the weights that they are said to hold."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from vllm_requant import hf
from vllm_requant.bench.peers import write_bfloat16, write_gguf, write_int4
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save


def convert(folder: Path, architecture: str = "llama") -> Path:
    recipe = Recipe(base="rtn", bits=4, outliers=0, significant=0, num_samples=2, seq_len=24, path_samples=1)
    convert_and_save(load_causal_lm(str(tiny.save(folder / "model", architecture))), folder / "checkpoint", recipe)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("peers"))


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


def test_llama_cpp_gets_the_same_model_in_its_own_4_bits(checkpoint: Path, tmp_path: Path) -> None:
    file = write_gguf(checkpoint, tmp_path)
    # transformers reads the file on its own, names and order of heads included
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = hf.load_dequantized(checkpoint).state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        error = float((weight - ours[name]).norm() / ours[name].norm())
        assert error < (0.01 if "embed" in name or "lm_head" in name else 0.08), name
    tokens = GGUFReader(file).get_field("tokenizer.ggml.tokens")
    assert tokens is not None
    assert len(tokens.contents()) == tiny.VOCAB_SIZE
    assert {token: tokens.contents().index(token) for token in ("a", "<s>")} == {
        token: tiny.tokenizer().get_vocab()[token] for token in ("a", "<s>")
    }


def test_an_architecture_that_is_not_written_for_llama_cpp_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qwen2"):
        write_gguf(convert(tmp_path, "qwen2"), tmp_path)
