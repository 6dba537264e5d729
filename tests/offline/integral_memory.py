"""What a path integral holds at its peak, measured in a process of its own.

python -m tests.offline.integral_memory SMALL_MODEL MODEL
"""

import json
import sys

import torch

from vllm_requant.offline.models import find_layers, load_causal_lm
from vllm_requant.offline.pqi import Objective
from vllm_requant.offline.stages import Stages

_TOKENS = 16  # few, so that activations take next to nothing


def integrate(folder: str) -> dict[str, int]:
    """Load a model and integrate; bytes of the model in 16 bits and of the accumulated gradients."""
    lm = load_causal_lm(folder)
    layers = find_layers(lm.model)
    end = {name: layer.weight.data * 1.01 for name, layer in layers.items()}
    Objective(lm.model, layers, torch.arange(_TOKENS)[None], compute="bfloat16").integrate(end, nodes=2)
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    return {"model": 2 * parameters, "accumulators": 4 * sum(layer.weight.numel() for layer in layers.values())}


def main(small: str, model: str) -> None:
    """Print one JSON object, in bytes; ``grown`` is the process's peak beyond what the small model had led to."""
    stages = Stages()
    with stages.stage("libraries"):
        integrate(small)
    with stages.stage("integral"):
        sizes = integrate(model)
    peak = stages.peak_bytes
    print(json.dumps(sizes | {"grown": peak["integral"] - peak["libraries"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
