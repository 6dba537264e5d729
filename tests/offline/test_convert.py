"""From a folder to a checkpoint and back, on tiny random models of every architecture."""

import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from vllm_requant import hf
from vllm_requant.format.experts import MIXTURES
from vllm_requant.format.reader import Checkpoint
from vllm_requant.offline import pipeline
from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.calibration import CalibrationError, load_calibration
from vllm_requant.offline.metrics import METRICS
from vllm_requant.offline.models import ModelError, find_layers, load_causal_lm, skeleton
from vllm_requant.offline.outliers import TAUS
from vllm_requant.offline.plan import plan
from vllm_requant.offline.pqi import Objective
from vllm_requant.offline.recipe import Recipe, RecipeError
from vllm_requant.offline.save import convert_and_save
from vllm_requant.offline.statistics import HESSIANS, guided_statistics, input_statistics

# what is tuned is no longer what the base made; the default tunes, see test_tuning_and_sequences_set_apart_unless_named
SMALL = {"num_samples": 3, "seq_len": 24, "nodes": 2, "outliers": 0.01, "significant": 0.004, "tune_epochs": 0}


def _convert(source: Path, out: Path, **choices):  # type: ignore[no-untyped-def]
    lm = load_causal_lm(str(source))
    _, conversion = convert_and_save(lm, out, Recipe(**SMALL | choices))
    return lm, conversion


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
@pytest.mark.parametrize(("base", "bits"), [("squeezellm", 3), ("rtn", 4), ("gptq", 3), ("awq", 4), ("qtip", 2)])
def test_checkpoint_reproduces_the_quantized_model(tmp_path: Path, architecture: str, base: str, bits: int) -> None:
    source = tiny.save(tmp_path / "in", architecture)
    lm, conversion = _convert(source, tmp_path / "out", base=base, bits=bits)
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    original = lm.model(tokens).logits
    # the same weights put into the original model by hand
    for name, layer in find_layers(lm.model).items():
        layer.weight.data = conversion.layers[name].weight()
    expected = lm.model(tokens).logits
    restored = hf.load_dequantized(tmp_path / "out")
    torch.testing.assert_close(restored(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, original, atol=1e-3), "quantization must have changed something"
    checkpoint = Checkpoint(tmp_path / "out")
    share = checkpoint.config.nnz / checkpoint.config.numel
    assert share == pytest.approx(SMALL["outliers"] + SMALL["significant"], rel=0.02)


def test_sparse_positions_hold_the_original_weight(tmp_path: Path) -> None:
    lm, conversion = _convert(tiny.save(tmp_path / "in"), tmp_path / "out", bits=2)
    exact = 0
    for name, layer in conversion.layers.items():
        weight = lm.model.get_submodule(name).weight.data
        residual = layer.weight() - layer.dense_weight()
        exact += int((residual != 0).sum())
        # one rounding of the stored float16 residual
        bound = 2.0**-11 * (weight - layer.dense_weight()).abs() + 1e-7
        assert ((layer.weight() - weight).abs() <= bound)[residual != 0].all()
    assert exact > 0.9 * sum(layer.spec.nnz for layer in conversion.layers.values())


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "in")
    for run in ("first", "second"):
        _convert(source, tmp_path / run, seed=5)
    _convert(source, tmp_path / "other", seed=6)

    def digest(run: str) -> str:
        return hashlib.sha256((tmp_path / run / "model.safetensors").read_bytes()).hexdigest()

    assert digest("first") == digest("second")
    assert digest("first") != digest("other")


@pytest.mark.parametrize(
    ("metric", "stages"),
    # with the default the path says only how many outliers each layer has
    [("pqi", ["pre-quantized", "detach, round 1", "detach, round 2"]), ("pqi-fisher", ["pre-quantized"])],
)
def test_report_holds_prediction_and_truth(tmp_path: Path, metric: str, stages: list[str]) -> None:
    _convert(tiny.save(tmp_path / "in"), tmp_path / "out", nodes=8, bits=4, base="rtn", metric=metric)
    report = json.loads((tmp_path / "out" / "requant_report.json").read_text())
    assert [integral["stage"] for integral in report["integrals"]] == stages
    for integral in report["integrals"]:
        assert sum(integral["predicted_by_layer"].values()) == pytest.approx(integral["predicted"])
        assert integral["relative_error"] < 0.05
    assert {candidate["tau"] for candidate in report["outlier_ratio_candidates"]} == {0.0, 0.5, 1.0}
    assert report["provenance"]["calibration"]["dataset"] == "self"


def test_detaching_lowers_the_calibration_loss(tmp_path: Path) -> None:
    """Every metric beats the random control."""
    source = tiny.save(tmp_path / "in")
    loss = {}
    for metric in METRICS:
        _, conversion = _convert(
            source, tmp_path / metric, bits=2, metric=metric, outliers=0.0, significant=0.02, refit=False
        )
        loss[metric] = conversion.report["calibration_loss"]
    for metric in ("pqi", "pqi-fisher", "path-fisher", "fisher"):
        assert loss[metric] < loss["random"], loss


def test_layers_by_pqi_and_weights_by_fisher(tmp_path: Path) -> None:
    """One integral, for the layers' ratios; under a target both ways to compare layers are tried."""
    source = tiny.save(tmp_path / "in")
    _, conversion = _convert(source, tmp_path / "fixed", bits=2, metric="pqi-fisher")
    assert [integral["stage"] for integral in conversion.report["integrals"]] == ["pre-quantized"]
    choices = {"target_bpw": 4.6, "outliers": None, "significant": 0.0, "metric": "pqi-fisher", "rounds": 1}
    _, conversion = _convert(source, tmp_path / "target", **choices)
    tried = [candidate["what"] for candidate in conversion.report["allocation"]["candidates"]]
    assert tried[0] == "one precision"
    assert tried[1:] in (
        ["0.00% sparse, layers by PQI", "0.00% sparse, layers by Fisher"],
        ["0.00% sparse, layers by PQI"],  # both came to the same
    )


@pytest.mark.parametrize(
    ("base", "significant", "labels"),
    [
        ("qtip", None, "model"),
        ("qtip", 0.0, "text"),
        ("gptq", 0.004, "text"),
        ("squeezellm", None, "text"),
        ("rtn", None, "model"),
        ("awq", 0.004, "model"),
    ],
)
def test_target_is_met_with_precision_where_it_pays(
    tmp_path: Path, base: str, significant: float | None, labels: str
) -> None:
    source = tiny.save(tmp_path / "in")
    # tables and scales weigh heavily in layers this small
    target = {"qtip": 2.9, "squeezellm": 4.6}.get(base, 3.9)
    choices = {"base": base, "outliers": None, "significant": significant, "labels": labels}
    _, conversion = _convert(source, tmp_path / "out", target_bpw=target, **choices)
    checkpoint = Checkpoint(tmp_path / "out")
    assert target - 0.3 < checkpoint.config.bits_per_weight <= target
    allocation = conversion.report["allocation"]
    chosen = {name: precision["bits"] for name, precision in allocation["precision"].items()}
    assert chosen == {name: layer.spec.bits for name, layer in conversion.layers.items()}
    # never worse than one precision for all layers at the same size
    loss = {candidate["what"]: candidate["calibration_loss"] for candidate in allocation["candidates"]}
    best = min(loss.values())
    assert best <= loss["one precision"]
    assert conversion.report["calibration_loss"] <= best + 1e-3
    if significant:
        share = checkpoint.config.nnz / checkpoint.config.numel
        assert share == pytest.approx(significant, rel=0.02)


def test_layers_that_are_worth_it_get_eight_bits(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "in")
    _, conversion = _convert(source, tmp_path / "out", target_bpw=7.0, outliers=None, significant=0.0)
    kinds = {(layer.spec.kind, layer.spec.bits) for layer in conversion.layers.values()}
    assert ("uniform", 8) in kinds
    assert any(kind == "lut" for kind, _ in kinds)
    assert Checkpoint(tmp_path / "out").config.bits_per_weight <= 7.0


def test_a_size_of_the_checkpoint_is_met(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "in")
    _convert(source, tmp_path / "uniform", base="gptq", bits=3, outliers=0.0, significant=0.0)

    def stored(folder: Path) -> int:
        return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())

    wanted = stored(tmp_path / "uniform")
    _convert(source, tmp_path / "out", base="gptq", target_size=wanted, outliers=None, significant=None)
    assert 0.97 * wanted < stored(tmp_path / "out") <= wanted
    with pytest.raises(RecipeError, match=r"too small: squeezellm takes at least"):
        plan(skeleton(str(source)), Recipe(target_bpw=2.05))
    with pytest.raises(RecipeError, match=r"--target-size 50000: \d+ bytes are not quantized"):
        plan(skeleton(str(source)), Recipe(target_size=50000))


@pytest.mark.parametrize("base", ["qtip", "gptq", "squeezellm"])
def test_tuning_lowers_the_loss_of_the_result(tmp_path: Path, base: str) -> None:
    source = tiny.save(tmp_path / "in")
    loss = {}
    for epochs in (0, 6):
        out = tmp_path / str(epochs)
        lm, conversion = _convert(source, out, base=base, bits=2, tune_epochs=epochs, num_samples=4, path_samples=0)
        loss[epochs] = conversion.report["calibration_loss"]
        restored = hf.load_dequantized(out)
        tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
        # norms included, the checkpoint is the model that was measured
        for name, layer in find_layers(lm.model).items():
            layer.weight.data = conversion.layers[name].weight()
        torch.testing.assert_close(restored(tokens).logits, lm.model(tokens).logits, rtol=1e-4, atol=1e-4)
        decision = conversion.report["tuning"]
        assert (decision is None) is (epochs == 0)
    assert loss[6] < loss[0]


@pytest.mark.parametrize("base", ["awq", "qtip"])
def test_tuned_norms_do_not_move_the_original(tmp_path: Path, base: str) -> None:
    """The divergence in the report is that from the model as it came."""
    source = tiny.save(tmp_path / "in")
    lm, conversion = _convert(source, tmp_path / "out", base=base, bits=2, tune_epochs=8, labels="model")
    assert conversion.report["tuning"]["kept"]
    tokens = load_calibration(
        "self", load_causal_lm(str(source)).model, lm.tokenizer, num_samples=3, seq_len=24, seed=0
    )
    original, quantized = (
        torch.log_softmax(model(tokens.tokens).logits[:, :-1].float(), -1)
        for model in (load_causal_lm(str(source)).model, hf.load_dequantized(tmp_path / "out"))
    )
    divergence = (original.exp() * (original - quantized)).sum(-1).mean().detach()
    assert conversion.report["calibration_loss"] == pytest.approx(float(divergence), rel=1e-2)


@pytest.mark.parametrize("base", ["gptq", "squeezellm", "qtip"])
def test_refit_never_raises_the_calibration_loss(tmp_path: Path, base: str) -> None:
    source = tiny.save(tmp_path / "in")
    loss = {}
    for refit in (False, True):
        _, conversion = _convert(
            source, tmp_path / str(refit), base=base, bits=2, refit=refit, num_samples=30, path_samples=0
        )
        loss[refit] = conversion.report["calibration_loss"]
        decision = conversion.report["refit"]
        assert (decision is not None) is (refit and base != "qtip")
    assert loss[True] <= loss[False] + 1e-4


@pytest.mark.parametrize("hessian", HESSIANS)
def test_losses_are_measured_on_sequences_set_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hessian: str
) -> None:
    seen = {}
    loss = Objective.loss

    def statistics(model, layers, tokens, **settings):  # type: ignore[no-untyped-def]
        seen["statistics"] = tokens
        return input_statistics(model, layers, tokens, **settings)

    def guided(objective, **settings):  # type: ignore[no-untyped-def]
        seen["statistics"] = objective.tokens
        return guided_statistics(objective, **settings)

    def measured(self, *arguments, **settings):  # type: ignore[no-untyped-def]
        seen["losses"] = self.tokens
        return loss(self, *arguments, **settings)

    monkeypatch.setattr(pipeline, "input_statistics", statistics)
    monkeypatch.setattr(pipeline, "guided_statistics", guided)
    monkeypatch.setattr(Objective, "loss", measured)
    _convert(tiny.save(tmp_path / "in"), tmp_path / "out", base="gptq", num_samples=8, path_samples=3, hessian=hessian)
    assert (len(seen["losses"]), len(seen["statistics"])) == (3, 5)
    assert not set(map(tuple, seen["losses"].tolist())) & set(map(tuple, seen["statistics"].tolist()))


def test_no_tables_are_refitted_to_a_handful_of_tokens(tmp_path: Path) -> None:
    """3 × 24 tokens say nothing about the second moments of 160 features."""
    source = tiny.save(tmp_path / "in")
    _, conversion = _convert(source, tmp_path / "out", bits=2)
    assert conversion.report["refit"] is None
    # 30 × 24 would do, but not those that are left when some are set apart
    _, conversion = _convert(source, tmp_path / "apart", bits=2, num_samples=30, path_samples=5)
    assert conversion.report["refit"] is None


def test_the_base_rule_spends_the_whole_sparse_budget(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "in")
    _, conversion = _convert(source, tmp_path / "out", bits=2, outlier_rule="base", outliers=0.01, significant=0.01)
    assert not conversion.report["integrals"]
    total = sum(layer.spec.numel for layer in conversion.layers.values())
    assert sum(layer.spec.nnz for layer in conversion.layers.values()) == pytest.approx(0.02 * total, rel=0.02)


def test_cached_results_give_the_same_checkpoint(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "in")
    small = SMALL | {"metric": "pqi"}  # of which every step takes an integral

    def convert(run: str, **choices: Any) -> tuple[bytes, Counter[str]]:
        cache = TensorCache(tmp_path / "cache")
        convert_and_save(load_causal_lm(str(source)), tmp_path / run, Recipe(**small | choices), cache=cache)
        files = (tmp_path / "cache").rglob("*.safetensors")
        kept = Counter(file.relative_to(tmp_path / "cache").parts[0] for file in files)
        return (tmp_path / run / "model.safetensors").read_bytes(), kept

    first, kept = convert("first")
    assert convert("second") == (first, kept)
    layers = len(find_layers(load_causal_lm(str(source)).model))
    assert (kept["calibration_text"], kept["gradients"]) == (1, layers)
    assert kept["integral"] == 3 * layers, "algorithm 1, two rounds of algorithm 2"
    assert kept["quantized"] == layers * (1 + len(TAUS)), "pre-quantized, and with every candidate's outliers removed"
    # another path is another entry
    _, after = convert("third", bits=3)
    assert {stage for stage in kept if after[stage] == kept[stage]} == {"calibration_text", "gradients"}
    assert after["integral"] == 6 * layers
    _, before = convert("groups of 32", base="gptq", num_samples=8, group_size=32)
    _, after = convert("groups of 64", base="gptq", num_samples=8, group_size=64)
    assert after["gradients_and_inputs"] == before["gradients_and_inputs"] == layers, (
        "statistics of the inputs are the same"
    )
    assert after["integral"] == before["integral"] + 3 * layers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_head(tmp_path: Path, tied: bool, bits: int) -> None:
    source = tiny.save(tmp_path / "in", tie_word_embeddings=tied)
    _convert(source, tmp_path / "out", base="rtn", outliers=0, significant=0, lm_head_bits=bits)
    checkpoint = Checkpoint(tmp_path / "out")
    name = "model.embed_tokens" if tied else "lm_head"
    assert checkpoint.config.layers[name].bits == bits
    assert checkpoint.model_config["tie_word_embeddings"] is tied
    model = hf.load_dequantized(tmp_path / "out")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model.lm_head.weight, checkpoint.layer(name).weight())


def test_plan_predicts_the_size(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "in")
    recipe = Recipe(**SMALL | {"metric": "random"})
    planned = plan(skeleton(str(source)), recipe)
    _, conversion = _convert(source, tmp_path / "out", metric="random")
    assert planned.keys() == conversion.layers.keys()
    expected = sum(spec.nbytes for spec in planned.values())
    # shares are rounded in every layer there, over all layers here: an element a layer, of four bytes
    assert sum(la.spec.nbytes for la in conversion.layers.values()) == pytest.approx(expected, abs=4 * len(planned))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_are_stored_one_by_one_under_the_names_of_the_architecture(tmp_path: Path, architecture: str) -> None:
    source = tiny.save(tmp_path / "in", architecture)
    _convert(source, tmp_path / "out", base="rtn", bits=4)
    # transformers itself writes the names that files of an architecture have
    original = set(load_file(source / "model.safetensors"))
    checkpoint = Checkpoint(tmp_path / "out")
    quantized = {f"{name}.weight" for name in checkpoint.config.layers}
    others = {name for name, _ in checkpoint.other_tensors()}
    assert quantized | others == original
    assert not quantized & others
    assert sum("experts." in name for name in quantized) == 2 * 4 * 3
    assert any(name.endswith("gate.weight") for name in others), "what routes stays"


def test_experts_of_an_unknown_architecture_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    tiny.save(tmp_path / "in", "qwen3_moe")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config |= {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"experts of an architecture that is unknown here"):
        plan(skeleton(str(tmp_path / "in")), Recipe())


def test_an_expert_that_no_token_reaches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is known about its inputs, and it is quantized all the same."""
    source = tiny.save(tmp_path / "in", "mixtral", num_local_experts=16, num_experts_per_tok=1)
    for hessian in HESSIANS:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _, conversion = _convert(source, tmp_path / hessian, base="gptq", num_samples=2, seq_len=4, hessian=hessian)
        assert "were given no token of the calibration set" in caplog.text
        assert all(torch.isfinite(layer.weight()).all() for layer in conversion.layers.values())


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_causal_lm(str(empty))
    with pytest.raises(ModelError, match="no such GGUF"):
        load_causal_lm(str(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match="no such folder"):
        load_causal_lm("./nowhere")
    _convert(tiny.save(tmp_path / "in"), tmp_path / "out", base="rtn", outliers=0, significant=0)
    with pytest.raises(ModelError, match=r"quantized already \(requant\)"):
        load_causal_lm(str(tmp_path / "out"))
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        load_causal_lm(str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("choice", "flag"),
    [
        ({"base": "gptq9"}, "--base"),
        ({"bits": 5}, "--bits"),
        ({"bits": 8}, "--bits"),
        ({"group_size": 50}, "--group-size"),
        ({"state_bits": 17}, "--state-bits"),
        ({"base": "qtip", "bits": 5, "state_bits": 8}, "--state-bits"),
        ({"outliers": -0.1}, "--outliers"),
        ({"significant": 0.5}, "--significant"),
        ({"metric": "best"}, "--metric"),
        ({"outlier_rule": "smallest"}, "--outlier-rule"),
        ({"outlier_rule": "base", "base": "rtn"}, "--outlier-rule"),
        ({"quadrature": "simpson"}, "--quadrature"),
        ({"nodes": 0}, "--nodes"),
        ({"compute": "int8"}, "--compute"),
        ({"target_bpw": 1.5}, "--target-bpw"),
        ({"target_bpw": 9.5}, "--target-bpw"),
        ({"target_bpw": 3.0, "target_size": 1000}, "--target-size"),
        ({"target_bpw": 3.0, "outliers": 0.001}, "--outliers"),
        ({"target_bpw": 3.0, "outlier_rule": "base"}, "--outlier-rule"),
        ({"labels": "both"}, "--labels"),
        ({"hessian": "outputs"}, "--hessian"),
        ({"path_samples": -1}, "--path-samples"),
        ({"tune_epochs": -1}, "--tune-epochs"),
        ({"path_samples": 4, "num_samples": 4}, "--path-samples"),
        ({"nodes": 1, "quadrature": "uniform"}, "--nodes"),
        ({"lm_head_bits": 3}, "--lm-head-bits"),
        ({"num_samples": 0}, "--num-samples"),
        ({"seq_len": 1}, "--seq-len"),
    ],
)
def test_impossible_recipes_name_the_flag(choice: dict[str, object], flag: str) -> None:
    with pytest.raises(RecipeError, match=flag):
        Recipe(**choice)


def test_sparse_shares_follow_the_base_unless_named() -> None:
    assert (Recipe().outliers, Recipe().significant) == (0.0045, 0.0005)
    assert (Recipe(base="qtip").outliers, Recipe(base="qtip").significant) == (0.0, 0.0005)
    assert Recipe(base="qtip", outliers=0.002).describe()["outliers"] == 0.002


def test_tuning_and_sequences_set_apart_unless_named(tmp_path: Path) -> None:
    assert (Recipe().tune_epochs, Recipe().path_samples, Recipe().num_samples) == (1, 16, 64)
    assert Recipe(num_samples=3).path_samples == 0, "too few to spare one"
    plain = {"base": "rtn", "outliers": 0, "significant": 0}
    assert not Recipe(**plain).needs_calibration, "plain rounding asks for no text"
    assert Recipe(**plain, tune_epochs=1).needs_calibration
    choices = {"num_samples": 8, "tune_epochs": None, "bits": 2}
    _, conversion = _convert(tiny.save(tmp_path / "in"), tmp_path / "out", **choices)
    assert len(conversion.report["tuning"]["divergence"]) == 6


def _file_calibration(path: Path, **size: int) -> torch.Tensor:
    return load_calibration(
        str(path),
        None,
        tiny.tokenizer(),
        num_samples=size["n"],
        seq_len=size["len"],
        seed=size.get("seed", 0),
    ).tokens


def test_calibration_from_files(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    tokens = _file_calibration(text, n=10, len=50)
    assert tokens.shape == (10, 50)
    assert torch.equal(tokens, _file_calibration(text, n=10, len=50))
    assert not torch.equal(tokens, _file_calibration(text, n=10, len=50, seed=1))
    lines = tmp_path / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": "abc " * 50}) for _ in range(5)))
    assert _file_calibration(lines, n=4, len=100).shape == (4, 100)
    with pytest.raises(CalibrationError, match="lower --num-samples or --seq-len"):
        _file_calibration(text, n=100, len=50)
    lines.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(CalibrationError, match="line 2"):
        _file_calibration(lines, n=1, len=2)
    with pytest.raises(CalibrationError, match="no such file"):
        _file_calibration(tmp_path / "gone.txt", n=1, len=2)


def test_calibration_windows_do_not_overlap(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i // 10 % 90) for i in range(900)))
    tokens = _file_calibration(text, n=9, len=100)
    assert len(set(map(tuple, tokens.tolist()))) == 9
    assert torch.equal(
        tokens.flatten().sort().values,
        torch.tensor(tiny.tokenizer()(text.read_text()).input_ids).sort().values,
    )


def test_self_calibration_is_reproducible_and_seeded() -> None:
    model = tiny.model()
    arguments = {"num_samples": 3, "seq_len": 20}
    first = load_calibration("self", model, tiny.tokenizer(), seed=0, **arguments).tokens
    assert first.shape == (3, 20)
    assert (first[:, 0] == 256).all()
    assert torch.equal(first, load_calibration("self", model, tiny.tokenizer(), seed=0, **arguments).tokens)
    assert not torch.equal(first, load_calibration("self", model, tiny.tokenizer(), seed=1, **arguments).tokens)
