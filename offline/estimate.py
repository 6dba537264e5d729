"""How long a conversion takes on this machine: what it does often is timed for a second or two, and multiplied.

Passes are timed on a model of one block with random weights: the real one's, of fewer heads, inner features and
experts if it is large, in all of which a pass is about linear. Bases are timed on a few rows of a layer of the real
width. No weights of the model are read.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_requant.format.experts import MIXTURES
from vllm_requant.format.rows import synthetic_layer

from .bases import Awq, Base, DenseLayer, LayerData
from .bases.awq import FOLD_ROWS
from .bases.base import EXPECTED_ERROR_ROWS
from .calibration import GENERATION_BATCH
from .folding import Fold
from .lazy import Positions
from .losses import sequence_loss
from .models import StoredLinear, computing_in, decoder_blocks, find_layers, model_of, round_weights
from .pqi import Objective
from .recipe import Recipe
from .statistics import InputStatistics, guided_statistics, input_statistics
from .tuning import tune
from .workload import Workload

__all__ = ["estimate"]

_LARGEST_BLOCK = 1 << 26  # weights that are timed at most
_LARGEST_PASS = 1 << 31  # the same times tokens
_LARGEST_HEAD = 1 << 25
_LARGEST_WIDTH = 2048
_NARROWEST = 64  # parts into which a block is divided at most
_ROWS = 64
_VOCABULARY = 256
_TOKENS_WRITTEN = 4
_SHORT = 0.1  # seconds


class _Cost(NamedTuple):
    """Seconds for a layer, and for each of its rows."""

    layer: float
    row: float


def estimate(model: Any, recipe: Recipe, work: Workload, *, device: torch.device, low_memory: bool) -> dict[str, float]:
    """Seconds by stage, as ``requant_timings.json`` has them; reading and writing of files apart.

    Args:
        model: on the "meta" device.
        recipe: with a precision for every layer, or a target in bits per weight.
        work: what is done.
        device, low_memory: as for the conversion.
    """
    passes = _Passes(model, recipe, device, low_memory)
    layers = _Layers(model, recipe, device)
    seconds: dict[str, float] = {}
    units: dict[str, float] = {}
    for stage, counts in work.items():
        for name, count in counts.items():
            if name == "integral" or not count:
                continue
            if name not in units:
                units[name] = layers.seconds(name) if name in _Layers.NAMES else passes.seconds(name)
            seconds[stage] = seconds.get(stage, 0.0) + count * units[name]
    return seconds


@dataclass
class _Passes:
    """Passes through the model, timed on one of its blocks and on the head."""

    model: Any
    recipe: Recipe
    device: torch.device
    low_memory: bool

    def seconds(self, name: str) -> float:
        """Of one of the passes that :data:`~.workload.Workload` names."""
        if name == "token":
            return self.scale * self._block_token() + self._head_token()
        length = min(self.recipe.seq_len, max(32, _LARGEST_PASS // self.block_weights))
        block = self._block(name, length)
        if length < self.recipe.seq_len:
            # a part of it does not depend on the tokens: weights are looked at
            per_token = max(block - self._block(name, length // 2), 0.0) / (length - length // 2)
            block += per_token * (self.recipe.seq_len - length)
        return self.scale * block + self._head(name)

    @cached_property
    def small(self) -> Any:
        """A model of one block."""
        small: Any = model_of(_narrow_config(self.model), type(self.model).__name__)
        round_weights(small, torch.bfloat16)
        small.config.use_cache = False
        return small.eval().requires_grad_(False).to(self.device)

    @cached_property
    def block_weights(self) -> int:
        return _weights(self.small)

    @property
    def scale(self) -> float:
        """How many times the work of the timed block the model's blocks are."""
        return _weights(self.model) / self.block_weights

    def _block(self, name: str, length: int) -> float:
        """A pass of that many tokens through the timed block."""
        layers = find_layers(self.small)
        tokens = torch.randint(_VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0))
        dtype = torch.float32 if self.recipe.compute == "float32" else torch.bfloat16
        end = {layer: module.weight.to(dtype) for layer, module in layers.items()}

        def objective(sequences: int) -> Objective:
            return Objective(
                self.small,
                layers,
                tokens[:sequences],
                compute=self.recipe.compute,
                checkpointing=self.low_memory,
                accumulate_on="cpu" if self.low_memory else None,
            )

        runs: dict[str, Callable[[int], object]] = {
            "forward": lambda count: objective(count).loss(end),
            "gradient": lambda count: objective(count).integrate(end, rule="midpoint", nodes=1, squares=True),
            "guided": lambda count: guided_statistics(objective(count)),
            "inputs": lambda count: input_statistics(
                self.small, layers, tokens[:count], compute=self.recipe.compute, accumulate_on=objective(1).accumulators
            ),
            "tune": lambda count: tune(objective(count), dense, masks, epochs=1),
        }
        dense, masks = ({}, {}) if name != "tune" else self._dense(layers)
        run = runs[name]
        objective(1).loss(end)  # threads and libraries are there
        # what is prepared and given back once is in both
        one, three = (self._timed(lambda count=count: run(count)) for count in (1, 3))  # type: ignore[misc]
        return max((three - one) / 2, three / 6)

    def _dense(self, layers: Mapping[str, nn.Linear]) -> tuple[dict[str, DenseLayer], Positions]:
        base = self.recipe.make_base()
        dense = {}
        for name, layer in layers.items():
            made = synthetic_layer(base.spec(layer.in_features, layer.out_features)).to(self.device)
            dense[name] = DenseLayer(made.spec, dict(made.tensors))
        return dense, Positions.empty({name: layer.weight.shape for name, layer in layers.items()}, self.device)

    def _head(self, name: str) -> float:
        """A pass through the output head and the loss."""
        forward, backward = self._head_passes
        # a step of tuning asks the original too
        return {"inputs": 0.0, "forward": forward, "tune": forward + backward}.get(name, backward)

    @cached_property
    def _head_passes(self) -> list[float]:
        """Forward, and forward and backward."""
        rows, hidden = self.model.get_output_embeddings().weight.shape
        head = self._cut_head(rows, hidden)
        tokens = torch.randint(head.out_features, (self.recipe.seq_len,), device=self.device)
        x = torch.randn(self.recipe.seq_len - 1, hidden, device=self.device)

        def forward() -> object:
            with torch.no_grad():
                return sequence_loss(head(x), tokens, None)

        def backward() -> object:
            return sequence_loss(head(x.detach().requires_grad_(True)), tokens, None).backward()

        with computing_in(self.recipe.compute, self.device):
            return [rows / head.out_features * self._timed(run) for run in (forward, backward)]

    def _cut_head(self, rows: int, hidden: int) -> StoredLinear:
        head = StoredLinear(hidden, min(rows, max(1, _LARGEST_HEAD // hidden)), bias=False, device=self.device)
        head.weight = nn.Parameter(head.weight.data.to(torch.bfloat16), requires_grad=False)
        return head

    @torch.no_grad()
    def _block_token(self) -> float:
        """A token of every sequence of a batch through the timed block, half of the text being there."""
        text = torch.zeros(1, max(1, self.recipe.seq_len // 2), dtype=torch.int64, device=self.device)
        cache = self.small(text, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(GENERATION_BATCH)
        step = torch.zeros(GENERATION_BATCH, 1, dtype=torch.int64, device=self.device)

        def write() -> None:
            for _ in range(_TOKENS_WRITTEN):
                self.small(step, past_key_values=cache, use_cache=True, logits_to_keep=1)

        write()
        return self._timed(write) / _TOKENS_WRITTEN

    @torch.no_grad()
    def _head_token(self) -> float:
        """The draw of a token for every sequence of a batch."""
        rows, hidden = self.model.get_output_embeddings().weight.shape
        head = self._cut_head(rows, hidden)
        x = torch.randn(GENERATION_BATCH, hidden, device=self.device)

        def draw() -> None:
            torch.multinomial(torch.softmax(head(x).double().cpu(), dim=-1), 1)

        draw()
        return rows / head.out_features * self._timed(draw)

    def _timed(self, run: Callable[[], object]) -> float:
        return _timed(run, self.device)


class _Layers:
    """What is done to layers one by one."""

    NAMES = frozenset({"quantize", "refit", "fold", "expected_error"})

    def __init__(self, model: Any, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.shapes = Counter(tuple(layer.weight.shape) for layer in find_layers(model).values())

    def seconds(self, name: str) -> float:
        """Of all layers together."""
        costs = {width: self._cost(name, width) for width in {width for _, width in self.shapes}}
        total = sum(
            count * (costs[width].layer + costs[width].row * self._rows_seen(name, rows))
            for (rows, width), count in self.shapes.items()
        )
        return total * (len(self.recipe.precisions) if name == "expected_error" else 1)

    def _rows_seen(self, name: str, rows: int) -> int:
        """Some are evenly spaced and stand for all; see :meth:`LayerData.rows`."""
        most = {"fold": FOLD_ROWS, "expected_error": EXPECTED_ERROR_ROWS}.get(name, rows)
        if name == "expected_error" and type(self.recipe.make_base()).expected_error is not Base.expected_error:
            most = rows
        return -(-rows // -(-rows // most))

    def _cost(self, name: str, width: int) -> _Cost:
        if width <= _LARGEST_WIDTH:
            return self._measured(name, width)
        # how it grows with the width is measured too
        narrow, wide = (self._measured(name, columns) for columns in (_LARGEST_WIDTH // 2, _LARGEST_WIDTH))

        def grown(small: float, large: float) -> float:
            power = min(max(math.log2(large / small), 0.0), 3.0) if small > 0 and large > 0 else 1.0
            return large * (width / _LARGEST_WIDTH) ** power

        return _Cost(grown(narrow.layer, wide.layer), grown(narrow.row, wide.row))

    def _measured(self, name: str, width: int) -> _Cost:
        few, many = (self._timed_rows(name, width, rows) for rows in (_ROWS, 2 * _ROWS))
        row = max(many - few, 0.0) / _ROWS
        return _Cost(max(few - _ROWS * row, 0.0), row)

    def _timed_rows(self, name: str, width: int, rows: int) -> float:
        base = self.recipe.make_base(self.recipe.precisions[0]) if name == "expected_error" else self.recipe.make_base()
        layer = self._layer(width, rows)
        if name == "refit":
            dense, nothing = base.quantize(layer), torch.zeros_like(layer.weight, dtype=torch.bool)
            return _timed(lambda: base.refit(layer, dense, nothing), self.device)
        runs: dict[str, Callable[[], object]] = {
            "quantize": lambda: base.quantize(layer).weight(),
            "expected_error": lambda: base.expected_error(layer),
            "fold": lambda: _fold(base, layer),
        }
        return _timed(runs[name], self.device)

    def _layer(self, width: int, rows: int) -> LayerData:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(width + 64, width, generator=generator).to(self.device)
        weight = torch.randn(rows, width, generator=generator).to(self.device)
        return LayerData(weight, weight.square(), InputStatistics(x.t() @ x / len(x), x.abs().mean(0)))


def _fold(base: Base, layer: LayerData) -> Tensor:
    assert isinstance(base, Awq)
    rows, width = layer.weight.shape
    consumer = nn.Linear(width, rows, bias=False, device=layer.weight.device)
    consumer.weight.data = layer.weight
    fold = Fold(None, {"consumer": consumer}, torch.arange(width, device=layer.weight.device))
    return base.fold_scale(fold, {"consumer": layer.require_inputs()})


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds; of what takes little, the least of a few times."""
    best, total = math.inf, 0.0
    while total < _SHORT:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        best, total = min(best, seconds), total + seconds
    return best


def _weights(model: nn.Module) -> int:
    """Weights of all blocks."""
    return sum(parameter.numel() for parameter in decoder_blocks(model)[1].parameters())


def _narrow_config(model: Any) -> Any:
    """The configuration of a model of one block that is small enough to be timed."""
    for parts in (2**power for power in range(_NARROWEST.bit_length())):
        config = _divided(model, parts)
        with torch.device("meta"):
            if _weights(model_of(config, type(model).__name__)) <= _LARGEST_BLOCK:
                break
    return config


def _divided(model: Any, parts: int) -> Any:
    """The configuration of one block with a part of the heads, inner features and experts, and a small vocabulary."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    mixture = MIXTURES.get(text.model_type)
    if getattr(text, "head_dim", None) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads

    def divide(name: str, by: int, least: int = 1) -> None:
        value = getattr(text, name, None)
        if isinstance(value, int):
            setattr(text, name, max(value // by, least))

    kv_parts = math.gcd(parts, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    for name in ("num_attention_heads", "num_key_value_heads"):
        divide(name, kv_parts)
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        divide(name, parts, least=_NARROWEST)
    if mixture is not None:
        # an expert of fewer sees as many tokens
        fewer = math.gcd(parts, text.num_experts_per_tok)
        divide(mixture.count, fewer)
        divide("num_experts_per_tok", fewer)
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = [Counter(text.layer_types).most_common(1)[0][0]]
    text.vocab_size = _VOCABULARY
    text.pad_token_id = text.bos_token_id = text.eos_token_id = 0
    text.tie_word_embeddings = False
    return config
