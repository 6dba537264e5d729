"""Checkpoints whose layers differ in width, group and kind, at the size of the real model, in vLLM's engine.

``REQUANT_TEST_CHECKPOINTS=DIR`` takes the checkpoints in a folder instead, such as those that ``requant sweep
--checkpoints`` left, and holds each against its own reference.
"""

import os
from itertools import cycle
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import NEW_TOKENS, PROMPTS
from tests.serving.engine import job, vllm_tokens
from vllm_requant import hf
from vllm_requant.format import QuantizedLayer
from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.calibration import load_calibration
from vllm_requant.offline.models import CausalLM, find_layers
from vllm_requant.offline.outliers import random_positions
from vllm_requant.offline.pipeline import Conversion
from vllm_requant.offline.pqi import Objective
from vllm_requant.offline.quantizer import LayerQuantizer
from vllm_requant.offline.recipe import Precision, Recipe
from vllm_requant.offline.save import save
from vllm_requant.offline.statistics import guided_statistics

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

# a width that no layer of the base has is a plain uniform one, as a search for a size may choose it
WIDTHS = {
    "squeezellm": [(2, 64), (3, 64), (4, 64), (8, 128)],
    "gptq": [(2, 32), (3, 64), (4, 128), (8, 128)],
    "qtip": [(1, 64), (2, 64), (3, 64), (4, 64), (5, 64), (6, 64)],
}
QUANTIZED_BLOCKS = 6


def _block(name: str) -> int:
    return int(name.removeprefix("model.layers.").partition(".")[0])


def _mixed(lm: CausalLM, base: str, folder: Path) -> None:
    """Every layer in the next of the base's widths, with 0.1 % of its weights sparse: no width stands out anywhere.

    The last blocks stay as they are: the first six hold every width in every layer of a block, beside every neighbour.
    """
    recipe = Recipe(base=base, num_samples=4, seq_len=128)
    layers = {name: layer for name, layer in find_layers(lm.model).items() if _block(name) < QUANTIZED_BLOCKS}
    weights = {name: layer.weight.data for name, layer in layers.items()}
    calibration = load_calibration("self", lm.model, lm.tokenizer, num_samples=4, seq_len=128, seed=0)
    start, inputs = guided_statistics(Objective(lm.model, layers, calibration.tokens))
    quantizer = LayerQuantizer(recipe, weights, inputs, start, TensorCache())
    widths = cycle(WIDTHS[base])
    quantizer.precision = {name: Precision(*next(widths)) for name in weights}
    masks = random_positions(weights, 0.001, seed=0)
    dense = quantizer.quantize(masks, f"quantizing, {base}")
    built = {
        name: QuantizedLayer.build(layer.spec, layer.tensors, weight=weights[name], mask=masks[name])
        for name, layer in dense.items()
    }
    save(
        folder,
        lm,
        recipe,
        calibration,
        Conversion(built, {name: layer.spec for name, layer in built.items()}, {"stages": {}}),
        overwrite=False,
    )


@pytest.fixture(scope="module")
def folders(original: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    given = os.environ.get("REQUANT_TEST_CHECKPOINTS")
    if given:
        return sorted(path.parent for path in Path(given).glob("*/config.json"))
    made = tmp_path_factory.mktemp("mixed")
    for base in WIDTHS:
        _mixed(original, base, made / base)
    return [made / base for base in WIDTHS]


def _expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = hf.load_dequantized(folder)
    model.generation_config.eos_token_id = None  # no token ends a text
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]


def test_vllm_gives_the_tokens_of_the_dequantized_model(folders: list[Path]) -> None:
    assert folders
    prompts = [hf.load_tokenizer(folders[0])(prompt).input_ids for prompt in PROMPTS]
    served = vllm_tokens(*(job(folder, prompts, new_tokens=NEW_TOKENS) for folder in folders), threads=2)
    expected = {folder.name: _expected(folder, prompts) for folder in folders}
    print({name: len(tokens) for name, tokens in expected.items()})
    assert {folder.name: tokens for folder, tokens in zip(folders, served, strict=True)} == expected
