"""What to do to a model: every choice of a conversion, checked before anything is loaded."""

from dataclasses import asdict, dataclass
from typing import Any

from .bases import BASES, Base
from .metrics import METRICS
from .pqi import COMPUTE_DTYPES, QUADRATURES, quadrature

__all__ = ["OUTLIER_RULES", "Recipe", "RecipeError"]

OUTLIER_RULES = ("magnitude", "range", "base")
_MAX_SHARE = 0.1


class RecipeError(ValueError):
    """A choice is out of range or contradicts another; the message names the flag."""


@dataclass(frozen=True)
class Recipe:
    """A conversion.

    Attributes:
        base: dense quantizer, a key of ``BASES``.
        bits: width of a code.
        target_bpw: stored bits a weight, everything counted; each layer's width is then chosen and ``bits`` not used.
        group_size: input features that share a scale, for bases with groups.
        state_bits: of the trellis, for qtip: a bit more halves the gap to the best code and doubles the time.
        outliers: r_o, share of all quantized weights removed before the dense part is fitted. None, which only a
            caller can give, becomes the base's usual share.
        significant: r_s, share detached after it; likewise.
        rounds: steps in which r_s is spent (r_s / β).
        metric: ranks significant weights and layers, a key of ``METRICS``; with "random" outliers are random too.
        outlier_rule: how outliers are found inside a layer: largest "magnitude"; largest reduction of the "range" of
            a group; or "base": the base's own rule for the whole sparse part, which then no metric chooses.
        refit: quantize the dense part anew around the detached weights, and keep it if the calibration loss falls.
        tune_epochs: passes over the calibration set in which scales, tables and norms are tuned at the end.
        quadrature, nodes: how the path is integrated.
        compute: precision of the gradients, a key of ``COMPUTE_DTYPES``.
        lm_head_bits: 4 or 8 to quantize the output head (and the embedding tied to it), 16 to leave it.
        num_samples, seq_len: size of the calibration set.
        seed: of calibration and of the random control.
    """

    base: str = "squeezellm"
    bits: int = 4
    target_bpw: float | None = None
    group_size: int = 64
    state_bits: int = 12
    outliers: float = None  # type: ignore[assignment]
    significant: float = None  # type: ignore[assignment]
    rounds: int = 2
    metric: str = "pqi"
    outlier_rule: str = "magnitude"
    refit: bool = True
    tune_epochs: int = 0
    quadrature: str = "gauss"
    nodes: int = 4
    compute: str = "float32"
    lm_head_bits: int = 16
    num_samples: int = 32
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise RecipeError(f"--base {self.base}: unknown; choose one of {', '.join(BASES)}")
        base = BASES[self.base]
        if self.bits not in base.bits:
            raise RecipeError(f"--bits {self.bits}: {self.base} has {', '.join(map(str, base.bits))}")
        if self.group_size < 32 or self.group_size % 32 or self.group_size > 65536:
            raise RecipeError(f"--group-size {self.group_size}: must be a multiple of 32, at most 65536")
        if not 8 <= self.state_bits <= 16:
            raise RecipeError(f"--state-bits {self.state_bits}: must lie between 8 and 16")
        for name, usual in zip(("outliers", "significant"), base.usual_shares, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        for flag, share in (("--outliers", self.outliers), ("--significant", self.significant)):
            if not 0 <= share <= _MAX_SHARE:
                raise RecipeError(f"{flag} {share:%}: must lie between 0% and {_MAX_SHARE:.0%}")
        if self.target_bpw is not None and not min(base.bits) <= self.target_bpw <= max(base.bits) + 1:
            raise RecipeError(
                f"--target-bpw {self.target_bpw:g}: {self.base} reaches from {min(base.bits)} to about {max(base.bits)}"
            )
        if self.metric not in METRICS:
            raise RecipeError(f"--metric {self.metric}: choose one of {', '.join(METRICS)}")
        if self.outlier_rule not in OUTLIER_RULES:
            raise RecipeError(f"--outlier-rule {self.outlier_rule}: choose one of {', '.join(OUTLIER_RULES)}")
        if self.outlier_rule == "base" and self.base != "squeezellm":
            raise RecipeError(f"--outlier-rule base: {self.base} has no rule of its own for sparse weights")
        if self.quadrature not in QUADRATURES:
            raise RecipeError(f"--quadrature {self.quadrature}: choose one of {', '.join(QUADRATURES)}")
        if self.compute not in COMPUTE_DTYPES:
            raise RecipeError(f"--compute {self.compute}: choose one of {', '.join(COMPUTE_DTYPES)}")
        for flag, value in (
            ("--nodes", self.nodes),
            ("--num-samples", self.num_samples),
            ("--rounds", self.rounds),
        ):
            if value < 1:
                raise RecipeError(f"{flag} {value}: must be at least 1")
        if self.seq_len < 2:
            raise RecipeError(f"--seq-len {self.seq_len}: must be at least 2")
        if self.tune_epochs < 0:
            raise RecipeError(f"--tune-epochs {self.tune_epochs}: must not be negative")
        if self.lm_head_bits not in (4, 8, 16):
            raise RecipeError(f"--lm-head-bits {self.lm_head_bits}: choose 4, 8 or 16")
        try:
            quadrature(self.quadrature, self.nodes)
        except ValueError as error:
            raise RecipeError(f"--nodes {self.nodes}: {error}") from None

    def make_base(self, bits: int | None = None) -> Base:
        """The base, at another width than the recipe's if one is given."""
        base = BASES[self.base]
        return base(bits or self.bits, **{option: getattr(self, option) for option in base.options})

    @property
    def typical_bits(self) -> int:
        """The width, or with a target the largest below it: what scales for the whole model are fitted to."""
        if self.target_bpw is None:
            return self.bits
        return max((bits for bits in BASES[self.base].bits if bits <= self.target_bpw), default=self.bits)

    @property
    def ranks(self) -> bool:
        """Whether the metric is asked at all."""
        return self.outlier_rule != "base" and (self.outliers > 0 or self.significant > 0)

    @property
    def refits(self) -> bool:
        """Whether the dense part is quantized anew around the sparse one."""
        return self.refit and self.ranks and BASES[self.base].can_refit

    @property
    def needs_start(self) -> bool:
        """Whether the gradients at the original weights are needed, the base's own wish apart."""
        return self.ranks and METRICS[self.metric].needs_start

    @property
    def needs_calibration(self) -> bool:
        """Whether any step looks at text."""
        chooses = self.ranks and self.metric != "random" and (METRICS[self.metric].needs_path or self.outliers > 0)
        base = BASES[self.base]
        needs = base.needs | (base.refit_needs if self.refits else frozenset())
        return bool(needs) or self.needs_start or chooses or self.target_bpw is not None or self.tune_epochs > 0

    def describe(self) -> dict[str, Any]:
        return asdict(self)
