"""Writing and reading: bit-exact, complete or not there at all, and never fooled by a broken folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.format.builders import random_layer
from vllm_requant.format import CheckpointConfig, QuantizedLayer, ReQuantFormatError
from vllm_requant.format.reader import Checkpoint
from vllm_requant.format.writer import staged_folder, write_tensors


def _content() -> tuple[dict[str, QuantizedLayer], dict[str, torch.Tensor]]:
    layers = {
        "model.a": random_layer("uniform", 3, 24, 200, density=0.05)[0],
        "model.b": random_layer("lut", 4, 24, 100, density=0)[0],
        "model.c": random_layer("lut", 2, 40, 100, density=1.0)[0],
    }
    others = {
        "model.norm.weight": torch.linspace(-1, 1, 64).bfloat16(),
        "model.a.bias": torch.ones(24).bfloat16(),
    }
    return layers, others


def _write(folder: Path, max_shard_size: int | str = "5GB") -> Path:
    layers, others = _content()
    config = CheckpointConfig(layers={name: layer.spec for name, layer in layers.items()})
    with staged_folder(folder, overwrite=False) as staging:
        write_tensors(staging, {"model_type": "llama"}, config, layers, others, max_shard_size=max_shard_size)
    return folder


@pytest.mark.parametrize("max_shard_size", ["5GB", 4000])
def test_round_trip_is_bit_exact(tmp_path: Path, max_shard_size: int | str) -> None:
    folder = _write(tmp_path / "out", max_shard_size)
    assert (folder / "model.safetensors").exists() == (max_shard_size == "5GB")
    layers, others = _content()
    checkpoint = Checkpoint(folder)
    assert checkpoint.model_config["model_type"] == "llama"
    read = dict(checkpoint.layers())
    assert read.keys() == layers.keys()
    for name, layer in layers.items():
        assert read[name].spec == layer.spec
        assert read[name].tensors.keys() == layer.tensors.keys()
        for suffix, tensor in layer.tensors.items():
            assert torch.equal(read[name].tensors[suffix], tensor)
    assert {name: tensor.tolist() for name, tensor in checkpoint.other_tensors()} == {
        name: tensor.tolist() for name, tensor in others.items()
    }
    assert checkpoint.other_nbytes() == sum(t.numel() * t.element_size() for t in others.values())


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", overwrite=False) as staging:
        (staging / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RuntimeError), staged_folder(folder, overwrite=True) as staging:
        (staging / "config.json").write_text("{}")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_output_is_refused_without_overwrite(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"), staged_folder(folder, overwrite=False):
        pass
    with staged_folder(folder, overwrite=True) as staging:
        (staging / "new").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nonfinite_tensor_is_not_written(tmp_path: Path) -> None:
    layers, others = _content()
    layers["model.b"].tensors["lookup_table"][0, 0] = float("nan")
    config = CheckpointConfig(layers={name: layer.spec for name, layer in layers.items()})
    with (
        pytest.raises(ReQuantFormatError, match="lookup_table"),
        staged_folder(tmp_path / "o", overwrite=False) as s,
    ):
        write_tensors(s, {}, config, layers, others)
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_number_of_the_model_s_configuration_is_not_written_as_something_else(tmp_path: Path) -> None:
    layers, others = _content()
    config = CheckpointConfig(layers={name: layer.spec for name, layer in layers.items()})
    with pytest.raises(ValueError, match="not JSON compliant"), staged_folder(tmp_path / "o", overwrite=False) as s:
        write_tensors(s, {"rms_norm_eps": float("nan")}, config, layers, others)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 7, 100, 2000, -1])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = _write(tmp_path / "out") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ReQuantFormatError, match="truncated"):
        Checkpoint(tmp_path / "out")


def test_folder_without_config_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out")
    (folder / "config.json").unlink()
    with pytest.raises(ReQuantFormatError, match="interrupted"):
        Checkpoint(folder)
    with pytest.raises(ReQuantFormatError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")


def _edit_tensors(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("model.a.scales"), r"model\.a\.scales: is missing"),
        (lambda t: t.update({"model.a.scales": t["model.a.scales"].float()}), "demands F16"),
        (lambda t: t.update({"model.a.qweight": t["model.a.qweight"][:, :-1].clone()}), "demands U8"),
        (lambda t: t.update({"model.a.weight": torch.zeros(2)}), "does not belong"),
        (lambda t: t.update({"model.b.sparse_values": torch.zeros(2).half()}), "does not belong"),
        (
            lambda t: t.update({"model.c.sparse_values": t["model.c.sparse_values"][:5].clone()}),
            "demands F16",
        ),
    ],
)
def test_tensors_that_contradict_the_configuration(tmp_path: Path, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    folder = _write(tmp_path / "out")
    _edit_tensors(folder, change)
    with pytest.raises(ReQuantFormatError, match=reason):
        Checkpoint(folder)


def test_values_are_checked_when_a_layer_is_read(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out")

    def break_columns(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.a.sparse_indices"][0] = 60000

    _edit_tensors(folder, break_columns)
    checkpoint = Checkpoint(folder)
    with pytest.raises(ReQuantFormatError, match=r"model\.safetensors: model\.a\.sparse_indices"):
        checkpoint.layer("model.a")


def _edit_index(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update({"model.norm.weight": "../evil.safetensors"}), "plain safetensors file name"),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "plain safetensors file name"),
        (lambda m: m.update({"model.norm.weight": "gone.safetensors"}), "is missing"),
        (lambda m: m.pop("model.norm.weight"), "not listed in the index"),
        (lambda m: m.update({"model.ghost": m["model.norm.weight"]}), "not in its file"),
    ],
)
def test_index_that_contradicts_the_shards(tmp_path: Path, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    folder = _write(tmp_path / "out", 4000)
    _edit_index(folder, change)
    with pytest.raises(ReQuantFormatError, match=reason):
        Checkpoint(folder)


def _as_hub_snapshot(folder: Path, cache: Path) -> Path:
    """A checkpoint as the Hub's cache keeps it: links to files that are called by their sums."""
    snapshot = cache / "models--org--name" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_snapshots_of_the_hub_s_cache_are_read(tmp_path: Path) -> None:
    snapshot = _as_hub_snapshot(_write(tmp_path / "out", 4000), tmp_path / "cache")
    assert len(list(Checkpoint(snapshot).layers())) == 3
    link = min(snapshot.glob("*.safetensors"))
    (tmp_path / "elsewhere").write_bytes(link.read_bytes())
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReQuantFormatError, match="outside the checkpoint"):
        Checkpoint(snapshot)


def test_links_inside_the_folder_are_read(tmp_path: Path) -> None:
    folder = _write(tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "link").symlink_to("out")
    assert len(list(Checkpoint(tmp_path / "link").layers())) == 3


def test_code_that_the_original_names_is_not_written(tmp_path: Path) -> None:
    layers, others = _content()
    config = CheckpointConfig(layers={name: layer.spec for name, layer in layers.items()})
    named = {"auto_map": {"AutoModel": "a.B"}, "text_config": {"auto_map": {}, "hidden_size": 8}, "model_type": "llama"}
    with staged_folder(tmp_path / "out", overwrite=False) as staging:
        write_tensors(staging, named, config, layers, others)
    written = Checkpoint(tmp_path / "out").model_config
    assert "auto_map" not in json.dumps(written)
    assert written["text_config"] == {"hidden_size": 8}
