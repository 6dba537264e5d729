"""A size is given: precision of every layer and sparse share are chosen together.

The metric tells what every layer adds to the loss; a path integral splits ΔF over them exactly. Other precisions of a
layer are scaled by the error that they make in its output, which gives the cost of every option; a greedy allocation
follows. What the sparse part takes is tried in steps, each with the allocation of the rest, and the calibration loss of
the candidates decides, that of one precision for all layers among them. All of this is our own choice.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_requant.format import LayerSpec

from . import outliers
from .allocation import allocate, sparse_counts
from .bases import BASES
from .lazy import Positions
from .pqi import PathIntegral
from .quantizer import Dense, Masks
from .recipe import Precision, Recipe
from .selection import Search, Selection

__all__ = ["BudgetSearch", "layer_sizes"]

log = logging.getLogger(__name__)
_SHARES = (0.0, 0.0005, 0.002, 0.005)
_MAX_LAYER_SHARE = 0.1
_OUTLIER_PARTS = (0.5, 0.9)
_OUTLIER_TAU = 0.5

Precisions = dict[str, Precision]


class _Proposal(NamedTuple):
    """What to call it, the precision of every layer, and bits that the sparse part may take."""

    what: str
    precisions: Precisions
    room: float


def layer_sizes(shapes: Mapping[str, torch.Size], recipe: Recipe) -> dict[str, dict[Precision, float]]:
    """Stored bits of the dense part of every layer at every precision that a recipe with a target may choose.

    Args:
        shapes: ``[out_features, in_features]`` by layer.
        recipe: with a target.
    """
    bases = {precision: recipe.make_base(precision) for precision in recipe.precisions}
    return {
        name: {precision: 8.0 * base.spec(shape[1], shape[0]).dense_nbytes for precision, base in bases.items()}
        for name, shape in shapes.items()
    }


@dataclass
class BudgetSearch(Search):
    """The search under a target.

    Attributes:
        error: expected of every layer at every precision.
        best: of the candidates so far, by its calibration loss.
    """

    error: dict[Precision, dict[str, float]] = field(default_factory=dict)
    best: tuple[float, Precisions, Dense, Masks] | None = None

    def __post_init__(self) -> None:
        assert self.recipe.target_bpw is not None
        self.numel = sum(weight.numel() for weight in self.weights.values())
        self.budget = self.recipe.target_bpw * self.numel
        self.size = layer_sizes({name: weight.shape for name, weight in self.weights.items()}, self.recipe)
        self.uniform = {precision: dict.fromkeys(self.weights, precision) for precision in self.recipe.precisions}
        self.smallest = min(map(self._dense_bits, self.uniform.values()))
        # of the sparse part, which has no precisions
        widest = max(self.weights, key=lambda name: self.weights[name].shape[1])
        one, two = (8.0 * self._spec(widest, nnz).sparse_nbytes for nnz in (1, 2))
        self.element_bits = two - one
        self.pointer_bits = {name: 8.0 * self._spec(name, 1).sparse_nbytes - self.element_bits for name in self.weights}

    def select(self) -> Selection:
        """Run the search."""
        with self.stages.stage("expected_error"):
            self.error = {
                precision: self.quantizer.expected_error(precision, f"expected error, {_describe(precision)}")
                for precision in self.recipe.precisions
            }
        # without a path there is nothing to learn from a second look
        for number in range(self.recipe.rounds if self.measurements.metric.needs_path else 1):
            self._round(f"budget, round {number + 1}")
        assert self.best is not None
        _, precisions, dense, masks = self.best
        self.quantizer.precision = precisions
        counts = Counter(_describe(precision) for precision in precisions.values())
        log.info("%.3f bits per weight: layers by precision %s", self.recipe.target_bpw, dict(counts))
        report = {
            "allocation": {
                "target_bpw": self.recipe.target_bpw,
                "candidates": self.candidates,
                "precision": {name: precision._asdict() for name, precision in precisions.items()},
            }
        }
        return Selection(dense, masks, report)

    def _round(self, label: str) -> None:
        """Look at the best precisions known, allocate anew, and measure candidates."""
        now, fits = self._largest_uniform() if self.best is None else (self.best[1], False)
        restored = self.quantizer.restored(self._quantize_at(now, label), self.quantizer.no_masks())
        with self.stages.stage("integral"):
            path = self.measurements.path(restored, label)
            splits = self.measurements.splits(restored, path)
        del restored
        proposals = [_Proposal("one precision", now, self._left(now))] if fits else []
        for split, shares in splits.items():
            costs = self._costs(now, shares)
            for share, what in self._sparse_shares():
                room = self.budget - share * self.numel
                if not share or room >= self.smallest:
                    chosen = allocate(self.size, costs, room)
                    label = f"{what}, layers by {split}"
                    proposals.append(_Proposal(label, chosen, self._left(chosen) if share else 0.0))
        # several shares may lead to the same
        distinct = [p for number, p in enumerate(proposals) if all(p[1:] != other[1:] for other in proposals[:number])]
        self._try_outliers([(self._try(proposal, path), proposal) for proposal in distinct], path)

    def _try_outliers(self, tried: list[tuple[float, _Proposal]], path: PathIntegral | None) -> None:
        """Let ever more of the best sparse part be outliers, as long as that helps."""
        if self.recipe.significant is not None or not BASES[self.recipe.base].usual_shares[0]:
            return
        # outliers lie in all layers, whose pointers they have to pay for
        pointers = sum(self.pointer_bits.values())
        roomy = [(loss, proposal) for loss, proposal in tried if _OUTLIER_PARTS[0] * proposal.room > pointers]
        if not roomy:
            return
        loss, best = min(roomy, key=lambda candidate: candidate[0])
        for part in _OUTLIER_PARTS:
            before, loss = loss, self._try(best, path, outlier_part=part)
            if loss >= before:
                return

    def _largest_uniform(self) -> tuple[Precisions, bool]:
        """The largest precision that fits for all layers, or the smallest; and whether it fits."""
        given = self._sparse_shares()[0][0] * self.numel  # 0 if the share is to be chosen
        by_size = sorted(self.uniform.values(), key=self._dense_bits)
        fitting = [precisions for precisions in by_size if self._dense_bits(precisions) + given <= self.budget]
        return (fitting or by_size[:1])[-1], bool(fitting)

    def _sparse_shares(self) -> list[tuple[float, str]]:
        """Bits a weight for the sparse part, and what to call them."""
        if self.recipe.significant is not None:
            sparse = self.recipe.significant
            pointers = sum(self.pointer_bits.values()) / self.numel if sparse else 0.0
            return [(sparse * self.element_bits + pointers, f"{sparse:.2%} sparse")]
        return [(share * self.element_bits, f"{share:.2%} sparse") for share in _SHARES]

    # what an option costs -------------------------------------------------------------------------------------

    def _dense_bits(self, precisions: Precisions) -> float:
        return sum(self.size[name][precision] for name, precision in precisions.items())

    def _left(self, precisions: Precisions) -> float:
        return self.budget - self._dense_bits(precisions)

    def _spec(self, name: str, nnz: int) -> LayerSpec:
        shape = self.weights[name].shape
        return self.recipe.make_base().spec(shape[1], shape[0]).model_copy(update={"nnz": nnz})

    def _costs(self, now: Precisions, shares: Mapping[str, float]) -> dict[str, dict[Precision, float]]:
        # single shares may come out negative by chance
        least = 1e-3 * sum(abs(value) for value in shares.values()) / len(shares)
        return {
            name: {
                precision: max(share, least) * self.error[precision][name] / max(self.error[now[name]][name], 1e-30)
                for precision in self.recipe.precisions
            }
            for name, share in shares.items()
        }

    # candidates -----------------------------------------------------------------------------------------------

    def _quantize_at(self, precisions: Precisions, label: str) -> Dense:
        self.quantizer.precision = precisions
        return self.quantize(None, f"quantizing, {label}")

    def _try(self, proposal: _Proposal, path: PathIntegral | None, *, outlier_part: float = 0.0) -> float:
        """The loss of a candidate, so much of whose sparse part is outliers."""
        label, precisions, room = proposal
        if outlier_part:
            label += f", {outlier_part:.0%} of it outliers"
        dense = self._quantize_at(precisions, label)
        masks = self.quantizer.no_masks()
        if room > 0 and self.recipe.significant != 0:
            scores = self.measurements.scores(self.quantizer.restored(dense, masks), path)
            if outlier_part:
                masks = self._outliers(scores, outlier_part * room)
                dense = self.quantize(masks, f"re-quantizing, {label}")
                scores = self.measurements.scores(self.quantizer.restored(dense, masks), path)
            masks = self._detach(scores, masks, room) if self.recipe.significant is None else self._detach_given(scores)
            del scores
        with self.stages.stage("candidates"):
            loss = self.measurements.loss(self.quantizer.restored(dense, masks), label)
        nnz = sum(masks.counts.values())
        log.info("candidate: %s, %d sparse weights: calibration loss %.5f", label, nnz, loss)
        self.candidates.append({"what": label, "nnz": nnz, "calibration_loss": loss})
        if self.best is None or loss < self.best[0]:
            self.best = loss, precisions, dense, masks
        return loss

    def _outliers(self, scores: Mapping[str, Tensor], room: float) -> Masks:
        numel = {name: weight.numel() for name, weight in self.weights.items()}
        mean = {name: float(score.mean(dtype=torch.float64)) for name, score in scores.items()}
        budget = int((room - sum(self.pointer_bits.values())) / self.element_bits)
        return outliers.largest_magnitude(self.weights, outliers.adaptive_counts(mean, numel, budget, _OUTLIER_TAU))

    def _detach_given(self, scores: Mapping[str, Tensor]) -> Masks:
        """The share that the recipe gives, wherever the scores are highest."""
        assert self.recipe.significant is not None
        return outliers.top_over_layers(scores, round(self.recipe.significant * self.numel))

    def _detach(self, scores: Mapping[str, Tensor], masks: Masks, room: float) -> Masks:
        """Add the highest scores that fit, pointers of rows included."""
        paid = {
            name: self.pointer_bits[name] + count * self.element_bits for name, count in masks.counts.items() if count
        }
        room -= sum(paid.values())
        ranked = {}
        for name, score in scores.items():
            most = min(int(_MAX_LAYER_SHARE * score.numel()), max(int(room / self.element_bits), 0))
            ranked[name] = torch.topk(score.masked_fill(masks[name], 0.0).flatten(), most)
        counts = sparse_counts(
            {name: top.values for name, top in ranked.items()},
            {name: 0.0 if name in paid else self.pointer_bits[name] for name in scores},
            self.element_bits,
            room,
        )
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        best = {name: (ranked[name].indices[: counts[name]], shape) for name, shape in shapes.items()}
        return masks | Positions.of(best)


def _describe(precision: Precision) -> str:
    return f"{precision.bits} bit by {precision.group_size}"
