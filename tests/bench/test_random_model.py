"""A random model has the shape that was asked for, and nothing is written where it cannot be."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from vllm_requant.bench import random_model
from vllm_requant.offline.models import ModelError


def test_the_folder_is_a_model_of_that_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setitem(random_model.SHAPES, "small", random_model.SHAPES["llama-3.1-8b"] | small)
    source, folder = tiny.save(tmp_path / "source"), tmp_path / "model"
    random_model.write(folder, "small", str(source))
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert {name: getattr(config, name) for name in small} == small
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny.tokenizer().get_vocab()
    with pytest.raises(FileExistsError):
        random_model.write(folder, "small", str(source))


def test_a_part_of_a_mixture_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 400, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "head_dim": 16}
    monkeypatch.setitem(random_model.SHAPES, "small", random_model.SHAPES["qwen3-30b-a3b"] | small)
    source = tiny.save(tmp_path / "source")
    random_model.write(tmp_path / "model", "small", str(source), layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert len(model.model.layers) == 2
    assert tuple(model.model.layers[1].mlp.experts.down_proj.shape) == (4, 64, 32)


def test_a_missing_tokenizer_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf"):
        random_model.write(tmp_path / "model", "llama-3.2-1b", str(tmp_path / "none.gguf"))
    assert not (tmp_path / "model").exists()
