"""A full-precision model made of one whose published weights come from a low-bit file.

Weights that lie on a grid flatter every quantizer with a similar grid. Uniform noise of one step, which is how far the
unknown originals can lie from it, takes them off; a short training towards the predictions of the model as it was heals
most of what the noise broke.

    python -m vllm_requant.offline.studies.off_grid MODEL.gguf -o DIR --calibration-dataset text.txt
"""

import logging
import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_requant.offline.calibration import load_calibration
from vllm_requant.offline.losses import divergence
from vllm_requant.offline.models import computing_in, find_layers, load_causal_lm
from vllm_requant.offline.progress import track

__all__ = ["main"]

log = logging.getLogger(__name__)
_RATE, _WARM_UP = 1e-4, 20


def main(
    model: Annotated[str, typer.Argument(help="Local folder, Hub id, or GGUF file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model; must not exist.")],
    calibration_dataset: Annotated[str, typer.Option(help="Text to heal on, as for requant convert.")],
    block: Annotated[int, typer.Option(help="Weights that share a grid in the low-bit file.")] = 32,
    bits: Annotated[int, typer.Option(help="Width of its codes.")] = 4,
    steps: Annotated[int, typer.Option(help="Sequences of 512 tokens to train on.")] = 120,
    compute: Annotated[str, typer.Option(help="As for requant convert.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the noise and the text.")] = 0,
) -> None:
    """Take the weights off their grid."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if output.exists():
        raise typer.BadParameter(f"{output} exists", param_hint="--output")
    lm = load_causal_lm(model)
    layers = find_layers(lm.model)
    tokens = load_calibration(
        calibration_dataset, lm.model, lm.tokenizer, num_samples=steps, seq_len=512, seed=seed
    ).tokens
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    original = [layer.weight.data for layer in layers.values()]
    noisy = []
    for weight in original:
        grid = weight.float().view(len(weight), -1, block)
        step = (grid.amax(2, keepdim=True) - grid.amin(2, keepdim=True)) / ((1 << bits) - 1)
        noisy.append((grid + step * (torch.rand(grid.shape, generator=generator) - 0.5)).view_as(weight))
    parameters = [layer.weight for layer in layers.values()]

    def predictions(row: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        with computing_in(compute, torch.device("cpu")):
            logits: torch.Tensor = lm.model(row[None]).logits[0]
        return logits

    optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    )
    for number, row in enumerate(track(tokens, "healing", total=steps)):
        with torch.no_grad():
            teacher = predictions(row, original)
        for parameter in parameters:
            parameter.requires_grad_(True)
        student = predictions(row, noisy)
        loss = divergence(student, teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        if number % 20 == 0:
            log.info("step %d: divergence %.4f", number, float(loss.detach()))
    stored = {name: tensor.to(lm.dtype) for name, tensor in lm.model.state_dict().items()}
    lm.model.config.dtype = lm.dtype
    lm.model.save_pretrained(output, state_dict=stored)
    lm.tokenizer.save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
