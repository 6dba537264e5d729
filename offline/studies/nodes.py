"""How many nodes of which rule the path integral takes: prediction of ΔF, and which weights come out on top.

python -m vllm_requant.offline.studies.nodes MODEL --calibration-dataset c4.txt -o nodes.json
"""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.calibration import load_calibration
from vllm_requant.offline.lazy import Positions
from vllm_requant.offline.models import find_layers, load_causal_lm
from vllm_requant.offline.outliers import top_over_layers
from vllm_requant.offline.pqi import QUADRATURES, Objective
from vllm_requant.offline.quantizer import LayerQuantizer
from vllm_requant.offline.recipe import Recipe

from .plots import plot_nodes

__all__ = ["main"]

log = logging.getLogger(__name__)
_NODES = (2, 4, 8, 16, 32)
_SHARE = 0.005


def main(
    model: Annotated[str, typer.Argument(help="Local folder, Hub id, or GGUF file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")],
    calibration_dataset: Annotated[str, typer.Option(help="Calibration text, as for requant convert.")] = "self",
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    bits: Annotated[int, typer.Option(help="Width of SqueezeLLM's tables, at the end of the path.")] = 3,
    labels: Annotated[str, typer.Option(help="As for requant convert.")] = "text",
    compute: Annotated[str, typer.Option(help="As for requant convert.")] = "auto",
) -> None:
    """Integrate the same path with every rule and number of nodes; the picture goes beside the JSON file."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    lm = load_causal_lm(model)
    layers = find_layers(lm.model)
    tokens = load_calibration(
        calibration_dataset, lm.model, lm.tokenizer, num_samples=num_samples, seq_len=seq_len, seed=0
    ).tokens
    recipe = Recipe(base="squeezellm", bits=bits, labels=labels, compute=compute).on(lm.device)
    objective = Objective(lm.model, layers, tokens, labels=labels, compute=recipe.compute)
    weights = objective.start
    quantizer = LayerQuantizer(recipe, weights, {}, objective.gradients(), TensorCache())
    end = quantizer.restored(quantizer.quantize(None, "quantizing"), quantizer.no_masks())
    actual = objective.loss(end) - objective.loss()
    count = round(_SHARE * sum(weight.numel() for weight in weights.values()))

    def top(rule: str, nodes: int) -> tuple[float, Positions]:
        integral = objective.integrate(end, rule=rule, nodes=nodes, label=f"{rule}, {nodes} nodes")
        gradient = integral.moments.gradient
        scores = {name: ((end[name] - weights[name]) * gradient[name]).abs_() for name in weights}
        return sum(integral.predicted().values()), top_over_layers(scores, count)

    finest = ("gauss", _NODES[-1])
    measured = {finest: top(*finest)}
    best = measured[finest][1]
    rows: list[dict[str, Any]] = []
    for rule in QUADRATURES:
        for nodes in _NODES:
            predicted, chosen = measured.get((rule, nodes)) or top(rule, nodes)
            same = sum(int((chosen[name] & best[name]).sum()) for name in best)
            rows.append(
                {"rule": rule, "nodes": nodes, "predicted": predicted, "actual": actual}
                | {
                    "relative_error": abs(predicted - actual) / abs(actual),
                    "top_share": _SHARE,
                    "agreement": same / count,
                }
            )
            log.info("%s", rows[-1])
            output.write_text(
                json.dumps(
                    {
                        "tokens": list(tokens.shape),
                        "bits": bits,
                        "labels": labels,
                        "compute": recipe.compute,
                        "rows": rows,
                    },
                    indent=2,
                )
                + "\n"
            )
    plot_nodes(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
