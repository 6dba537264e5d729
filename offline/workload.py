"""How often a recipe does each of the things that take long: what times and sizes of a conversion follow from."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from .bases import BASES, Need
from .calibration import GENERATION_BATCH
from .metrics import METRICS
from .outliers import TAUS
from .recipe import Recipe

__all__ = ["Workload", "workload"]

Workload = Mapping[str, Mapping[str, int]]
"""By stage, as ``requant_timings.json`` names them: how often by the name of what is done.

Of a sequence: ``forward``, a loss; ``inputs``, a forward pass whose inputs are added up; ``gradient``, forward and
backward; ``guided``, the same with inputs; ``tune``, a step of tuning. ``token``: a batch of sequences that the model
writes grows by a token. Of all layers: ``quantize``, ``refit``, ``fold``, ``expected_error``. ``integral`` takes no
time by itself: it counts what path integrals leave on the disk.
"""

_SHARES_TRIED = 4  # under a target, with each split of the loss over layers
_OUTLIER_TRIES = 2
_PRECISIONS_OF_A_LAYER = 3  # that candidates under a target ask for, about


def workload(recipe: Recipe, *, writes_text: bool, refits: bool) -> Workload:
    """What a conversion does; with a target a typical one, since its search depends on what it finds.

    Args:
        recipe: what to do.
        writes_text: the model writes its calibration text itself.
        refits: whether there is text enough to quantize anew around the sparse part.
    """
    stages: defaultdict[str, Counter[str]] = defaultdict(Counter)
    apart = recipe.path_samples or recipe.num_samples
    fitted = recipe.num_samples - recipe.path_samples
    metric = METRICS[recipe.metric]

    def losses(stage: str, count: int = 1) -> None:
        stages[stage]["forward"] += count * apart

    def integrals(stage: str, count: int = 1) -> None:
        losses(stage, count)
        stages[stage]["gradient"] += count * apart * recipe.nodes
        stages[stage]["integral"] += count

    # a loss that was taken before is not taken again
    chosen_by_loss = recipe.has_target

    if recipe.needs_calibration:
        if writes_text:
            batches = -(-recipe.num_samples // GENERATION_BATCH)
            stages["calibration_text"]["token"] += batches * recipe.seq_len
        losses("original_loss")
    _measure(recipe, stages, fitted, refits)
    if recipe.has_target:
        rounds = recipe.rounds if metric.needs_path else 1
        stages["expected_error"]["expected_error"] += 1
        stages["quantize"]["quantize"] += _PRECISIONS_OF_A_LAYER + rounds - 1
        if metric.needs_path:
            integrals("integral", rounds)
        losses("candidates", rounds * (1 + _SHARES_TRIED * len(metric.splits)))
        if recipe.significant is None and BASES[recipe.base].usual_shares[0]:
            stages["quantize"]["quantize"] += rounds * _OUTLIER_TRIES
            losses("candidates", rounds * _OUTLIER_TRIES)
        if refits:
            stages["quantize"]["refit"] += stages["quantize"]["quantize"]
    else:
        stages["quantize"]["quantize"] += 1
        if recipe.outliers and recipe.outlier_rule != "base" and recipe.metric != "random":
            stages["quantize"]["quantize"] += len(TAUS)
            if metric.needs_path:
                integrals("outlier_ratio")
            losses("outlier_ratio", len(TAUS))
            chosen_by_loss = True
        if recipe.significant and recipe.outlier_rule != "base":
            if metric.needs_path and not metric.path_is_for_layers:
                integrals("significant", recipe.rounds)
                losses("significant", -int(chosen_by_loss))
            chosen_by_loss = False
    if refits:
        stages["refit"]["refit"] += 1
        losses("refit_loss", 2 - chosen_by_loss)
        chosen_by_loss = True
    if recipe.tune_epochs:
        losses("tuning", 2 - chosen_by_loss)
        stages["tuning"]["tune"] += recipe.tune_epochs * fitted
    if recipe.needs_calibration:
        losses("final_loss")
    return stages


def _measure(recipe: Recipe, stages: Mapping[str, Counter[str]], fitted: int, refits: bool) -> None:
    """What is measured before anything is quantized."""
    base = BASES[recipe.base]
    needs = base.needs | (base.refit_needs if refits else frozenset())
    has_start = False
    if Need.INPUTS in needs:
        has_start = recipe.hessian == "guided" and not base.folds
        stages["inputs"]["guided" if recipe.hessian == "guided" else "inputs"] += fitted
    if base.folds:
        stages["fold"]["fold"] += 1
    if (Need.FISHER in needs or recipe.needs_start) and not has_start:
        stages["gradients"]["gradient"] += fitted
