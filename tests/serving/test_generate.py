"""A ReQuant checkpoint in vLLM's engine gives the tokens of transformers on the dequantized weights."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.serving.engine import greedy_tokens, job, vllm_tokens
from tests.serving.vllm_layers import FORMATS, random_layer
from vllm_requant.format import CheckpointConfig, QuantizedLayer
from vllm_requant.format.writer import write_tensors

VOCABULARY = 500  # no multiple of 64: vLLM pads it
PROMPTS = [[1, 17, 250, 499, 3], [42], [7, 7, 7, 120, 9, 300, 11]]


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    ).float()


def quantize(model: LlamaForCausalLM, modules: dict[str, str]) -> dict[str, QuantizedLayer]:
    """Replace the named modules' weights by those of random layers in the given formats."""
    layers = {}
    for seed, (name, fmt) in enumerate(modules.items()):
        weight = model.get_submodule(name).weight
        layers[name] = random_layer(*weight.shape, seed=seed, **FORMATS[fmt])
        weight.data = layers[name].weight()
    return layers


def write_checkpoint(folder: Path, model: LlamaForCausalLM, layers: dict[str, QuantizedLayer]) -> None:
    named = {f"{name}.weight" for name in layers}
    if model.config.tie_word_embeddings:
        named.add("lm_head.weight")
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in named}
    config = CheckpointConfig(layers={name: layer.spec for name, layer in layers.items()})
    folder.mkdir()
    write_tensors(folder, model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, config, layers, others)


def all_linears(model: LlamaForCausalLM) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def mixed_checkpoint(folder: Path, *, tied: bool) -> list[list[int]]:
    """A checkpoint with every linear layer and the embedding quantized, kinds mixed within and across fused
    layers; returns the tokens that it must give."""
    model = tiny_llama(tied=tied)
    names = [name for name in all_linears(model) if not (tied and name == "lm_head")]
    formats = list(FORMATS)
    modules = {name: formats[index % len(formats)] for index, name in enumerate(names)}
    if not tied:
        modules["lm_head"] = "lut3"  # rows of a trellis cannot be looked up or padded
    layers = quantize(model, modules | {"model.embed_tokens": "lut4-sparse"})
    if tied:
        model.tie_weights()
    write_checkpoint(folder, model, layers)
    return greedy_tokens(model, PROMPTS, 12)


def test_greedy_tokens_are_those_of_the_dequantized_model(tmp_path):
    own_head = mixed_checkpoint(tmp_path / "own", tied=False)
    tied = mixed_checkpoint(tmp_path / "tied", tied=True)
    assert own_head != tied
    # for dummy weights the configuration must be enough
    shutil.copytree(tmp_path / "own", tmp_path / "dummy", ignore=shutil.ignore_patterns("*.safetensors"))
    results = vllm_tokens(
        # first: with AMX, vLLM's bfloat16 attention must not depend on what ran before it in the process
        job(tmp_path / "own", PROMPTS, dtype="bfloat16"),
        job(tmp_path / "own", PROMPTS),
        job(tmp_path / "tied", PROMPTS),
        job(tmp_path / "dummy", PROMPTS, load_format="dummy"),
    )
    assert results[1:3] == [own_head, tied]
    # rounding to 16 bits, and arbitrary weights, leave only the length to be known
    for tokens in (results[0], results[3]):
        assert [len(sequence) for sequence in tokens] == [12] * len(PROMPTS)


def test_two_tensor_parallel_processes_give_the_same_tokens(tmp_path):
    expected = mixed_checkpoint(tmp_path / "model", tied=True)
    assert vllm_tokens(job(tmp_path / "model", PROMPTS, tensor_parallel_size=2)) == [expected]
