"""``import vllm_requant.hf`` and transformers' own ``from_pretrained``."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from vllm_requant import hf
from vllm_requant.format import ReQuantFormatError
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save

IDS = torch.tensor([[256, 17, 250, 199, 3, 42, 7, 7]])
CASES: dict[str, dict[str, Any]] = {
    "llama": {"base": "squeezellm", "bits": 3, "lm_head_bits": 8},
    "qwen2": {"base": "rtn", "bits": 3, "group_size": 32, "lm_head_bits": 4},
    "gemma3": {"base": "qtip", "bits": 2, "lm_head_bits": 8},
    "phi3": {"base": "rtn", "bits": 4},
    "mixtral": {"base": "squeezellm", "bits": 4},
    "qwen3_moe": {"base": "gptq", "bits": 4, "group_size": 32},
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tied = {"tie_word_embeddings": True} if request.param == "qwen2" else {}
    source = tiny.save(folder / "in", request.param, **tied)
    recipe = {"outliers": 0.002, "significant": 0.002, "rounds": 1, "num_samples": 4, "seq_len": 32}
    convert_and_save(load_causal_lm(str(source)), folder / "out", Recipe(**recipe | CASES[request.param]))
    return folder / "out"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    recipe = Recipe(base="rtn", bits=4, significant=0.002, outliers=0.0, rounds=1, num_samples=4, seq_len=32)
    convert_and_save(load_causal_lm(str(tiny.save(folder / "in"))), folder / "out", recipe)
    return folder / "out"


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_logits_are_those_of_the_dequantized_model(checkpoint: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model.tie_weights()  # as lm-eval does: what is tied stays so
    expected = hf.load_dequantized(checkpoint, torch.float32)(IDS).logits
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() <= tolerance * expected.abs().max()
    assert model.is_quantized
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] <= IDS.shape[1] + 4


def test_quantized_modules_hold_nothing_else(one: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(one)
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    assert not any("proj" in name for name in names)
    assert "uniform" in repr(model)
    with pytest.raises(RuntimeError, match=r"q_proj: .*cannot move.*device_map"):
        model.to("meta")
    assert model.to(torch.float32) is model


def test_models_are_not_saved(one: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(one)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def first_tensor(folder: Path, suffix: str) -> tuple[Path, str, dict[str, torch.Tensor]]:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    return file, min(name for name in tensors if name.endswith(suffix)), tensors


def test_wrong_shapes_are_refused(one: Path, tmp_path: Path) -> None:
    folder = copied(one, tmp_path / "wrong")
    file, name, tensors = first_tensor(folder, "qweight")
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ReQuantFormatError, match=rf"{name}: is .*, the configuration demands"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_tensors_are_refused(one: Path, tmp_path: Path) -> None:
    folder = copied(one, tmp_path / "missing")
    file, name, tensors = first_tensor(folder, "sparse_values")
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ReQuantFormatError, match=rf"{name}: is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_broken_contents_are_refused(one: Path, tmp_path: Path) -> None:
    folder = copied(one, tmp_path / "broken")
    file, name, tensors = first_tensor(folder, "scales")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ReQuantFormatError, match="scales"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers, name: layers.update({"model.no_such": layers.pop(name)}), "is missing"),
        (lambda layers, name: layers[name].update(in_features=96, group_size=96), "the configuration demands"),
    ],
)
def test_configurations_that_do_not_fit_the_model(one: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = copied(one, tmp_path / "config")
    config = json.loads((folder / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    change(layers, min(layers))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ReQuantFormatError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_without_the_import_transformers_says_so(one: Path) -> None:
    """What the README says happens."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(one)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got requant" in done.stdout + done.stderr
    assert "MISSING" in done.stdout + done.stderr or done.returncode != 0
