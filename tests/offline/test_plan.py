"""What is known of a conversion before a weight is read, held against what it then does."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from tests import tiny
from vllm_requant.offline import estimate
from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.models import ModelError, decoder_blocks, find_layers, load_causal_lm, model_of, skeleton
from vllm_requant.offline.objections import ObjectionError
from vllm_requant.offline.observer import RunObserver, observing
from vllm_requant.offline.plan import check_stream, plan, tokens_to_refit, with_target
from vllm_requant.offline.recipe import Recipe, RecipeError
from vllm_requant.offline.resources import check_disk, check_memory, disk_needed, memory_needed
from vllm_requant.offline.save import convert_and_save
from vllm_requant.offline.serving_memory import ServedModel
from vllm_requant.offline.workload import Workload, workload


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return model_of(config, "test")


def test_a_recipe_says_all_that_is_wrong_with_it() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(base="rtn", bits=5, group_size=40, nodes=0, metric="best", num_samples=0, seq_len=1, lm_head_bits=3)
    flags = ["--group-size", "--bits", "--metric", "--lm-head-bits", "--nodes", "--num-samples", "--seq-len"]
    assert [reason.split()[0] for reason in caught.value.args] == flags
    with pytest.raises(RecipeError) as caught:
        Recipe(base="best", group_size=40)
    assert len(caught.value.args) == 2, "what depends on the base is not guessed at"


def test_layers_that_a_base_cannot_take_are_named_once_a_reason() -> None:
    model = on_meta(tiny.CONFIGS["llama"](intermediate_size=100, hidden_size=72, head_dim=16))
    with pytest.raises(ModelError) as caught:
        plan(model, Recipe(base="qtip"))
    of_hidden, of_inner = caught.value.args
    assert "72 features are not a multiple of 16" in of_hidden
    # what reads 72 features is refused for that already
    assert of_hidden.startswith("model.layers.0.self_attn.q_proj") and "and 9 more:" in of_hidden
    assert of_inner.startswith("model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: 100 features")


def test_objections_of_several_kinds_come_together(tmp_path: Path) -> None:
    tiny.save(tmp_path / "in", "qwen3_moe")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config |= {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ObjectionError) as caught:
        plan(skeleton(str(tmp_path / "in")), Recipe(base="awq"))
    *others, folds = caught.value.args
    assert any("model.layers.0.mlp.experts.down_proj, model.layers.1.mlp.experts.down_proj: [4, " in s for s in others)
    assert folds.startswith("--base awq: nothing is known about olmoe")


def test_all_that_forbids_streaming() -> None:
    with pytest.raises(RecipeError) as caught:
        check_stream("x.gguf", Recipe(), torch.device("cuda"))
    assert len(caught.value.args) == 3


class Passes(RunObserver):
    """Counts sequences that go through the model, by stage."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len, self.running = seq_len, [""]
        self.sequences: Counter[str] = Counter()

    def stage_began(self, stage: str) -> None:
        self.running.append(stage)

    def stage_ended(self, *_: object) -> None:
        self.running.pop()

    def advanced(self, done: int, total: int, tokens: int) -> None:
        self.sequences[self.running[-1]] += tokens // self.seq_len


def sequences(work: Workload) -> dict[str, int]:
    passes = ("forward", "inputs", "gradient", "guided", "tune")
    counts = {stage: sum(names.get(name, 0) for name in passes) for stage, names in work.items()}
    return {stage: count for stage, count in counts.items() if count}


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"metric": "pqi", "rounds": 3, "path_samples": 0},
        {"metric": "fisher", "significant": 0.0, "tune_epochs": 0},
        {"base": "awq", "outliers": 0.0, "hessian": "inputs"},
        {"base": "qtip", "metric": "path-fisher", "refit": False},
        {"outlier_rule": "base", "tune_epochs": 2},
        {"base": "rtn", "metric": "magnitude", "tune_epochs": 0},
    ],
    ids=str,
)
def test_passes_and_room_are_those_of_the_conversion(tmp_path: Path, choices: dict[str, Any]) -> None:
    source = tiny.save(tmp_path / "in", num_hidden_layers=1, intermediate_size=64)
    sizes = {"num_samples": 15, "path_samples": 3, "seq_len": 24, "nodes": 2, "outliers": 0.01, "significant": 0.004}
    recipe = Recipe(**sizes | choices)
    model = skeleton(str(source))
    specs = plan(model, recipe)
    refits = recipe.refits and 24 * (15 - recipe.path_samples) >= tokens_to_refit(model, find_layers(model))
    work = workload(recipe, writes_text=True, refits=refits)
    with observing(passes := Passes(24)):
        convert_and_save(load_causal_lm(str(source)), tmp_path / "out", recipe, cache=TensorCache(tmp_path / "work"))
    assert {stage: count for stage, count in passes.sequences.items() if count} == sequences(work)
    disk = disk_needed(model, specs, work)
    kept = sum(path.stat().st_size for path in (tmp_path / "work").rglob("*.safetensors"))
    # text, headers and what tuning leaves are not counted; layers that come out alike lie there once
    assert 0.95 * disk["work"] <= kept <= 1.3 * disk["work"] + 100_000
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert disk["checkpoint"] == pytest.approx(written, abs=10_000)


def test_too_little_memory_or_disk_is_refused_with_a_way_out(tmp_path: Path) -> None:
    check_memory({"cpu": 1 << 20}, device=torch.device("cpu"), low_memory=False)
    with pytest.raises(ObjectionError, match=r"takes 1048576\.0 GiB of memory, there are .*; --stream"):
        check_memory({"cpu": 1 << 50}, device=torch.device("cpu"), low_memory=False)
    check_disk([(tmp_path, 1 << 10, "-o")])
    with pytest.raises(ObjectionError, match=r"out takes 0.* and .*work takes .*-o or --work-dir"):
        check_disk([(tmp_path / "out", 0, "-o"), (tmp_path / "work", 1 << 60, "--work-dir")])


def test_low_memory_leaves_less_on_the_device() -> None:
    model = on_meta(tiny.CONFIGS["llama"]())
    recipe = Recipe()
    work = workload(recipe, writes_text=True, refits=True)

    def needed(device: str, **settings: Any) -> dict[str, int]:
        settings = {"low_memory": False} | settings
        return memory_needed(model, find_layers(model), recipe, work, device=torch.device(device), **settings)

    (all_of_it,) = needed("cuda").values()
    assert needed("cpu") == {"cpu": all_of_it}
    low = needed("cuda", low_memory=True)
    assert sum(low.values()) == all_of_it
    assert low["cuda"] < 0.4 * all_of_it
    files = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert needed("cpu", processes=3) == {"cpu": 3 * all_of_it - 2 * files}


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_memory_when_serving_is_shared_out(architecture: str) -> None:
    inner = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 192)
    model = on_meta(tiny.CONFIGS[architecture](**inner))
    served = ServedModel(model, plan(model, Recipe(base="rtn", group_size=32)))
    sizes = {size["tensor_parallel_size"]: size for size in served.describe()["sizes"]}
    assert "4 attention heads" in sizes[8]["refused"]
    assert sizes[1]["unquantized_bytes"] == 2 * sum(tensor.numel() for tensor in served.others.values())
    # two heads for four ranks
    assert [sizes[ranks]["kv_cache_bytes_per_token"] for ranks in (1, 2)] == [256, 128]
    for key in ("cpu", "cuda"):
        whole, half = (sizes[ranks]["quantized_bytes"][key] for ranks in (1, 2))
        assert whole / 2 <= half < 0.65 * whole
    config = model.config
    assert bool(served.describe()["notes"]) is (architecture == "gemma3"), config


def test_a_quantized_embedding_counts_once_and_padded() -> None:
    model = on_meta(tiny.CONFIGS["llama"](vocab_size=300, intermediate_size=192, tie_word_embeddings=True))
    plain, quantized = (ServedModel(model, plan(model, Recipe(base="rtn", lm_head_bits=bits))) for bits in (16, 8))
    rows, hidden = 320, 64
    assert plain.unquantized_bytes(2) - quantized.unquantized_bytes(2) == 2 * rows // 2 * hidden
    more = quantized.quantized_bytes(2, "cpu") - plain.quantized_bytes(2, "cpu")
    assert rows // 2 * hidden < more < 1.2 * rows // 2 * hidden


def test_a_model_that_is_split_in_unknown_ways_says_so() -> None:
    model = on_meta(tiny.CONFIGS["llama"](head_dim=16))
    specs = {name.replace("q_proj", "query"): spec for name, spec in plan(model, Recipe(base="rtn")).items()}
    described = ServedModel(model, specs).describe()
    assert not described["sizes"]
    assert "how vLLM splits model.layers.0.self_attn.query" in described["notes"][0]


@pytest.mark.parametrize(
    ("architecture", "choices"),
    [
        ("llama", {"base": "squeezellm", "target_bpw": 3.6}),
        ("qwen2_moe", {"base": "awq"}),
        ("gemma3", {"base": "qtip", "labels": "model", "compute": "bfloat16"}),
        ("phi3", {"base": "rtn", "hessian": "inputs", "tune_epochs": 0}),
    ],
)
def test_every_stage_is_given_a_time(architecture: str, choices: dict[str, Any]) -> None:
    model = on_meta(tiny.CONFIGS[architecture]())
    recipe = with_target(model, Recipe(bits=3, seq_len=32, state_bits=8, **choices))
    work = workload(recipe, writes_text=True, refits=recipe.refits)
    seconds = estimate.estimate(model, recipe, work, device=torch.device("cpu"), low_memory=False)
    assert seconds.keys() == {stage for stage, counts in work.items() if any(counts.values())}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=2,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
        Qwen3MoeConfig(
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
        ),
    ],
    ids=["70B", "30B-A3B"],
)
def test_of_a_large_model_a_narrow_block_is_timed(config: Any) -> None:
    model = on_meta(config)
    small = on_meta(estimate._narrow_config(model))
    weights = sum(parameter.numel() for parameter in decoder_blocks(small)[1].parameters())
    assert (1 << 22) < weights <= 1 << 26
    # layers of the whole width
    assert small.config.hidden_size == config.hidden_size
    if hasattr(config, "num_experts"):
        assert small.config.num_experts / small.config.num_experts_per_tok == 16
