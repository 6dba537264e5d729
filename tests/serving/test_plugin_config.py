"""Registration, the config object, and what vLLM does with it before it builds a model."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear

from tests.serving.vllm_layers import BY_ROW, FORMATS, load, quant_config, random_layer
from vllm_requant import kernels
from vllm_requant.format.rows import concat_rows, synthetic_layer, zero_layer
from vllm_requant.serving import register

LAYER = random_layer(64, 128, **FORMATS["uniform3-sparse"])


def test_registration_is_idempotent():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from vllm_requant.serving.config import RequantConfig

    for _ in range(3):
        register()
    assert get_quantization_config("requant") is RequantConfig
    assert QUANTIZATION_METHODS.count("requant") == 1


def test_importing_the_plugin_does_not_import_vllm():
    code = "import sys, vllm_requant.serving; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_config_survives_pickling():
    config = quant_config({"c": LAYER}, {"qkv_proj": ["q_proj"]})
    copy = pickle.loads(pickle.dumps(config))
    assert copy.layers == config.layers and copy.packed_modules_mapping == config.packed_modules_mapping
    assert copy.get_name() == "requant" and torch.bfloat16 in copy.get_supported_act_dtypes()


def test_malformed_config_is_refused():
    from vllm_requant.serving.config import RefusedCheckpointError, RequantConfig

    with pytest.raises(RefusedCheckpointError, match="format version 99"):
        RequantConfig.from_config({"quant_method": "requant", "format_version": 99, "layers": {}})


def test_layers_are_renamed_as_the_model_renames_its_modules():
    from vllm.model_executor.models.utils import WeightsMapper

    config = quant_config({"model.language_model.layers.0.mlp.down_proj": LAYER, "lm_head": LAYER})
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}))
    assert set(config.layers) == {"language_model.model.layers.0.mlp.down_proj", "lm_head"}
    with pytest.raises(ValueError, match="maps two quantized layers to one name"):
        config.apply_vllm_mapper(WeightsMapper(orig_to_new_regex={__import__("regex").compile(".*"): "x"}))


def test_headers_are_checked_before_anything_is_built(tmp_path):
    from vllm_requant.serving.config import RefusedCheckpointError

    config = quant_config({"c": LAYER})
    config.maybe_update_config("some-org/some-model")
    config.maybe_update_config(str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": config.checkpoint.model_dump(mode="json")})
    )
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(RefusedCheckpointError, match=r"model\.safetensors"):
        config.maybe_update_config(str(tmp_path))


def started_with(monkeypatch, additional_config) -> None:
    """As if vLLM built its model with that ``--additional-config``."""
    engine = SimpleNamespace(
        additional_config=additional_config,
        load_config=SimpleNamespace(load_format="auto"),
        device_config=SimpleNamespace(device_type="cpu"),
        lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    monkeypatch.setattr("vllm_requant.serving.config.get_current_vllm_config_or_none", lambda: engine)


@pytest.mark.parametrize(("given", "bits"), [({}, 16), ({"other": 1}, 16), ({"requant": {"activation_bits": 8}}, 8)])
def test_additional_config_says_how_wide_activations_are(as_rank, monkeypatch, given, bits):
    as_rank(0, 1)
    started_with(monkeypatch, given)
    module = ReplicatedLinear(128, 64, bias=False, quant_config=quant_config({"c": LAYER}), prefix="c")
    load(module, {None: LAYER})
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights = kernels.repack("uniform", LAYER.tensors, **LAYER.spec.kernel_settings, in_features=128, device="cpu")
    outputs = {
        width: kernels.linear(
            "uniform", x, weights, out_features=64, **LAYER.spec.kernel_settings, activation_bits=width
        )
        for width in (8, 16)
    }
    assert not torch.equal(outputs[8], outputs[16])
    assert torch.equal(module(x)[0], outputs[bits])


@pytest.mark.parametrize("wrong", [{"activation_bits": 4}, {"activation_bits": "8"}, {"activation-bits": 8}, 8])
def test_what_additional_config_says_must_mean_something(monkeypatch, wrong):
    started_with(monkeypatch, {"requant": wrong})
    with pytest.raises(ValueError, match="--additional-config"):
        quant_config({"c": LAYER}).get_quant_method(torch.nn.Module(), "c")


def test_compiled_artifacts_are_of_one_version_kernel_and_width(monkeypatch):
    """vLLM keeps what it compiled under the hash of its configuration."""

    from vllm_requant.serving import config as serving_config

    def compile_key(bits: int) -> str:
        engine = VllmConfig(additional_config={"requant": {"activation_bits": bits}})
        with set_current_vllm_config(engine):
            quant_config({"c": LAYER}).get_quant_method(torch.nn.Module(), "c")
        return engine.compute_hash()

    keys = [compile_key(16), compile_key(8)]
    assert keys[0] == compile_key(16)
    with monkeypatch.context() as patch:
        patch.setattr(serving_config, "__version__", "another")
        keys.append(compile_key(16))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "kernel_path", lambda kind, device: "another")
        keys.append(compile_key(16))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("fmt", BY_ROW.values(), ids=BY_ROW)
def test_concat_rows_stacks_the_weights(fmt):
    without = random_layer(16, 128, **(fmt | {"density": 0.0}))
    parts = [
        random_layer(32, 128, **fmt),
        without,
        zero_layer(without.spec, 16),
        random_layer(48, 128, seed=2, **fmt),
    ]
    stacked = concat_rows(parts)
    stacked.check(name="stacked")
    assert torch.equal(stacked.weight(), torch.cat([part.weight() for part in parts]))
    assert (stacked.weight()[48:64] == 0).all()


def test_concat_rows_refuses_other_formats():
    with pytest.raises(ValueError, match="can be stacked"):
        concat_rows([LAYER, random_layer(64, 128, **FORMATS["lut3"])])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("nnz", [0, 1, 13, 700, 16 * 96])
def test_synthetic_layer_is_valid_and_has_the_stated_size(fmt, nnz):
    spec = random_layer(16, 96, **fmt).spec.model_copy(update={"nnz": nnz})
    layer = synthetic_layer(spec)
    layer.check(name="synthetic")
    assert layer.spec.nnz == nnz and layer.weight().abs().max() < 0.1
