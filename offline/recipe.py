"""What to do to a model: every choice of a conversion, checked before anything is loaded."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from .bases import BASES, Base, Rtn
from .metrics import METRICS
from .models import COMPUTE_DTYPES, fastest_compute
from .objections import ObjectionError
from .pqi import LABELS, QUADRATURES, quadrature
from .statistics import HESSIANS

__all__ = ["OUTLIER_RULES", "Precision", "Recipe", "RecipeError"]

OUTLIER_RULES = ("magnitude", "range", "base")
_MAX_SHARE = 0.1


class Precision(NamedTuple):
    """What may differ from layer to layer.

    Attributes:
        bits: width of a code.
        group_size: input features that share a scale; of no meaning to bases without groups.
    """

    bits: int
    group_size: int


_GROUP_SIZES = (32, 64, 128)  # to choose from under a target
_EIGHT = Precision(8, 128)  # of any base, for the few layers that are worth it: plain rounding is as good as any


class RecipeError(ObjectionError):
    """Choices are out of range or contradict each other; every reason names the flag."""

    exit_status = 2


@dataclass(frozen=True)
class Recipe:
    """A conversion.

    Attributes:
        base: dense quantizer, a key of ``BASES``.
        bits: width of a code.
        target_bpw: stored bits a weight, everything counted; the width of each layer, the size of its groups and the
            share of sparse weights are then chosen, and ``bits`` and ``group_size`` not used. Bases of up to 4 bits
            give a layer 8 where that pays, as a plain uniform one.
        target_size: the same as bytes of all weights of the checkpoint, quantized or not.
        group_size: input features that share a scale, for bases with groups.
        state_bits: of the trellis, for qtip: a bit more halves the gap to the best code and doubles the time.
        outliers: r_o, share of all quantized weights removed before the dense part is fitted. None, which only a
            caller can give, becomes the base's usual share; under a target it becomes 0.
        significant: r_s, share detached after it; likewise, but under a target None leaves the share to be chosen.
        rounds: steps in which r_s is spent (r_s / β).
        metric: ranks weights and layers, a key of ``METRICS``; with "random" outliers are random too.
        outlier_rule: how outliers are found inside a layer: largest "magnitude"; largest reduction of the "range" of
            a group; or "base": the base's own rule for the whole sparse part, which then no metric chooses.
        refit: quantize the dense part anew around the detached weights, and keep it if the calibration loss falls.
        tune_epochs: passes over the calibration set in which scales, tables and norms are tuned at the end. None,
            which only a caller can give, becomes 1, or 0 if no other step looks at text.
        hessian: what weights the squared error of a layer's output in bases and refits that look at it, one of
            ``HESSIANS``: "guided": the loss's gradients; "inputs": nothing, as in GPTQ and its peers.
        quadrature, nodes: how the path is integrated.
        labels: what F measures, a key of ``LABELS``.
        path_samples: so many of the calibration sequences are set apart for losses and path integrals; gradients at
            the original weights, statistics of the inputs and tuning see only the others: a loss on text that codes
            and tables were fitted to is too good. 0 uses all sequences for everything; None, which only a caller can
            give, becomes a quarter of them.
        compute: precision of forward and backward passes, a key of ``COMPUTE_DTYPES``, or "auto": the faster one.
        lm_head_bits: 4 or 8 to quantize the output head (and the embedding tied to it), 16 to leave it.
        num_samples, seq_len: size of the calibration set.
        seed: of calibration and of the random control.
    """

    base: str = "squeezellm"
    bits: int = 4
    target_bpw: float | None = None
    target_size: int | None = None
    group_size: int = 64
    state_bits: int = 12
    outliers: float = None  # type: ignore[assignment]
    significant: float | None = None
    rounds: int = 2
    metric: str = "pqi-fisher"
    outlier_rule: str = "magnitude"
    refit: bool = True
    tune_epochs: int = None  # type: ignore[assignment]
    hessian: str = "guided"
    quadrature: str = "gauss"
    nodes: int = 4
    labels: str = "text"
    path_samples: int = None  # type: ignore[assignment]
    compute: str = "float32"
    lm_head_bits: int = 16
    num_samples: int = 64
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        base = BASES.get(self.base)
        if base is not None:
            self._resolve_shares(base)
        if self.path_samples is None:
            object.__setattr__(self, "path_samples", self.num_samples // 4)
        reasons = [*self._base_objections(base), *self._choice_objections(), *self._number_objections()]
        if reasons:
            raise RecipeError(*reasons)
        if self.tune_epochs is None:
            object.__setattr__(self, "tune_epochs", int(self._needs_text))

    def _resolve_shares(self, base: type[Base]) -> None:
        outliers, significant = base.usual_shares
        if self.outliers is None:
            object.__setattr__(self, "outliers", 0.0 if self.has_target else outliers)
        if self.significant is None and not self.has_target:
            object.__setattr__(self, "significant", significant)

    def _base_objections(self, base: type[Base] | None) -> Iterator[str]:
        """To the base, its options and the size."""
        if self.target_bpw is not None and self.target_size is not None:
            yield "--target-size: --target-bpw is given too; choose one of them"
        if self.group_size < 32 or self.group_size % 32 or self.group_size > 65536:
            yield f"--group-size {self.group_size}: must be a multiple of 32, at most 65536"
        if not 8 <= self.state_bits <= 16:
            yield f"--state-bits {self.state_bits}: must lie between 8 and 16"
        if base is None:
            yield f"--base {self.base}: unknown; choose one of {', '.join(BASES)}"
            return
        if self.bits not in base.bits:
            yield f"--bits {self.bits}: {self.base} has {', '.join(map(str, base.bits))}"
        elif "state_bits" in base.options and not self.has_target and 8 <= self.state_bits < 2 * self.bits:
            yield f"--state-bits {self.state_bits}: must be at least twice --bits {self.bits}"
        if self.target_bpw is not None:
            widest = max([*base.bits, *(precision.bits for precision in self.precisions)])
            if not min(base.bits) <= self.target_bpw <= widest + 1:
                yield f"--target-bpw {self.target_bpw:g}: {self.base} reaches from {min(base.bits)} to about {widest}"
        if self.outlier_rule == "base" and self.base != "squeezellm":
            yield f"--outlier-rule base: {self.base} has no rule of its own for sparse weights"

    def _choice_objections(self) -> Iterator[str]:
        """To names that are not known, and to the sparse part."""
        choices: dict[str, tuple[str, Collection[str]]] = {
            "--metric": (self.metric, METRICS),
            "--outlier-rule": (self.outlier_rule, OUTLIER_RULES),
            "--hessian": (self.hessian, HESSIANS),
            "--quadrature": (self.quadrature, QUADRATURES),
            "--labels": (self.labels, LABELS),
            "--compute": (self.compute, (*COMPUTE_DTYPES, "auto")),
        }
        for flag, (choice, known) in choices.items():
            if choice not in known:
                yield f"{flag} {choice}: choose one of {', '.join(known)}"
        if self.lm_head_bits not in (4, 8, 16):
            yield f"--lm-head-bits {self.lm_head_bits}: choose 4, 8 or 16"
        if self.has_target and (self.outliers or self.outlier_rule == "base"):
            flag = "--outliers" if self.outliers else "--outlier-rule base"
            yield f"{flag}: under a target the sparse part is chosen, or --significant is its share"

    def _number_objections(self) -> Iterator[str]:
        """To numbers that are out of range."""
        for flag, share in (("--outliers", self.outliers), ("--significant", self.significant)):
            if share is not None and not 0 <= share <= _MAX_SHARE:
                yield f"{flag} {share:%}: must lie between 0% and {_MAX_SHARE:.0%}"
        for flag, value, least in (
            ("--nodes", self.nodes, 1),
            ("--num-samples", self.num_samples, 1),
            ("--rounds", self.rounds, 1),
            ("--seq-len", self.seq_len, 2),
        ):
            if value < least:
                yield f"{flag} {value}: must be at least {least}"
        if self.num_samples >= 1 and not 0 <= self.path_samples < self.num_samples:
            yield (
                f"--path-samples {self.path_samples}: must not be negative, and less than --num-samples "
                f"{self.num_samples}"
            )
        if (self.tune_epochs or 0) < 0:
            yield f"--tune-epochs {self.tune_epochs}: must not be negative"
        if self.nodes >= 1 and self.quadrature in QUADRATURES:
            try:
                quadrature(self.quadrature, self.nodes)
            except ValueError as error:
                yield f"--nodes {self.nodes}: {error}"

    @property
    def has_target(self) -> bool:
        """Whether a size is given and precisions are chosen."""
        return self.target_bpw is not None or self.target_size is not None

    def on(self, device: torch.device) -> "Recipe":
        """The recipe with what depends on the device decided."""
        return replace(self, compute=fastest_compute(device)) if self.compute == "auto" else self

    def make_base(self, precision: Precision | None = None) -> Base:
        """The base, at another precision than the recipe's if one is given."""
        base, options = BASES[self.base], asdict(self)
        bits, options["group_size"] = precision or self.precision
        if bits not in base.bits:
            return Rtn(bits, options["group_size"])
        return base(bits, **{option: options[option] for option in base.options})

    @property
    def precision(self) -> Precision:
        """That of every layer, or with a target a typical one: what scales for the whole model are fitted to."""
        bits = self.bits
        if self.target_bpw is not None:
            bits = max((bits for bits in BASES[self.base].bits if bits <= self.target_bpw), default=bits)
        return Precision(bits, self.group_size)

    @property
    def precisions(self) -> list[Precision]:
        """What a layer may get under a target: widths up to those next to it, with every size of groups; and 8 bit."""
        assert self.target_bpw is not None
        base = BASES[self.base]
        target = self.target_bpw
        near = [bits for bits in base.bits if bits < min(target + 2, _EIGHT.bits)]
        if "state_bits" in base.options:
            near = [bits for bits in near if target - 2 < bits and 2 * bits <= self.state_bits]
            return [Precision(bits, self.group_size) for bits in near]
        sizes = _GROUP_SIZES if "group_size" in base.options else (self.group_size,)
        return [Precision(bits, size) for bits in near for size in sizes] + [_EIGHT]

    @property
    def ranks(self) -> bool:
        """Whether the metric is asked at all."""
        return self.outlier_rule != "base" and (self.outliers > 0 or self.significant != 0)

    @property
    def refits(self) -> bool:
        """Whether the dense part is quantized anew around the sparse one."""
        return self.refit and (self.ranks or self.has_target) and BASES[self.base].can_refit

    @property
    def needs_start(self) -> bool:
        """Whether the gradients at the original weights are needed, the base's own wish apart."""
        return (self.ranks or self.has_target) and METRICS[self.metric].needs_start

    @property
    def needs_calibration(self) -> bool:
        """Whether any step looks at text."""
        return self._needs_text or self.tune_epochs > 0

    @property
    def _needs_text(self) -> bool:
        """Whether a step before tuning does."""
        chooses = self.ranks and self.metric != "random" and (METRICS[self.metric].needs_path or self.outliers > 0)
        base = BASES[self.base]
        needs = base.needs | (base.refit_needs if self.refits else frozenset())
        return bool(needs) or self.needs_start or chooses or self.has_target

    def describe(self) -> dict[str, Any]:
        return asdict(self)
