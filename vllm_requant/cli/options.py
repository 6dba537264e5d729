"""Options that several commands have."""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

__all__ = [
    "Changes",
    "Device",
    "EvaluationTexts",
    "LowMemory",
    "changed_choices",
    "evaluation_texts",
    "find_device",
    "named_models",
]

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
LowMemory = Annotated[
    bool,
    typer.Option("--low-memory", help="Compute activations twice, collect statistics in host memory (see --device)."),
]
EvaluationTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="[NAME=]TEXT",
        help="wikitext2, c4, a text or JSONL file, a Hub data set (test split), or python-docs (built in, no network; "
        "the default); NAME is what results call it; may be given more than once.",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="CHOICE=VALUE", help="Takes the place of a choice in all runs; may be repeated."),
]


def changed_choices(items: list[str] | None) -> dict[str, Any]:
    """Choices by name, from every ``--set``; which of them a recipe has is not looked at.

    Raises:
        BadParameter: one is not of that form.
    """
    return dict(map(_choice, items or []))


def _choice(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError
        return name, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        raise typer.BadParameter(
            f'--set {text}: write CHOICE=VALUE, the value as in TOML: bits=3, base="awq"'
        ) from None


def find_device(name: str) -> "torch.device":
    """The device of that name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        RecipeError: the name says nothing, or this machine has no such device.
    """
    import torch

    from ..offline.recipe import RecipeError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"--device {name}: choose auto, cpu, cuda, or one of several GPUs such as cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name}: only cpu and cuda are supported")
    present = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= present:
        raise RecipeError(f"--device {name}: PyTorch sees {present} GPUs here; use --device cpu, or a build with CUDA")
    return device


def evaluation_texts(items: list[str]) -> dict[str, str]:
    """Texts by name, from every ``--dataset``; one that has no name is called as it is, a file without its folder.

    Raises:
        RecipeError: one is not of that form, or its name is taken.
        CalibrationError: a text cannot be had.
    """
    from ..offline.evaluate import check_evaluation_text
    from ..offline.recipe import RecipeError

    texts: dict[str, str] = {}
    for item in items:
        name, separator, text = item.partition("=")
        if not separator or Path(item).is_file():
            name, text = Path(item).name if Path(item).is_file() else item, item
        if not name or not text:
            raise RecipeError(f"--dataset {item}: write NAME=TEXT, or TEXT alone")
        if name in texts:
            raise RecipeError(f"--dataset {item}: {name} is taken; write NAME=TEXT with another name")
        check_evaluation_text(text)
        texts[name] = text
    return texts


def named_models(items: list[str] | None, taken: Collection[str]) -> dict[str, Path]:
    """Parse the ``NAME=MODEL`` of every ``--peer``.

    Args:
        taken: names that peers cannot have.

    Raises:
        BadParameter: one is not of that form, or its name is taken.
        FileNotFoundError: there is no such model.
    """
    models: dict[str, Path] = {}
    for item in items or ():
        name, separator, model = item.partition("=")
        # a name becomes that of a log file
        if not separator or not name or not model or "/" in name:
            raise typer.BadParameter(f"--peer {item}: write NAME=MODEL")
        if not Path(model).exists():
            raise FileNotFoundError(f"--peer {item}: {model} does not exist")
        if name in models or name in taken:
            raise typer.BadParameter(f"--peer {item}: {name} is taken")
        models[name] = Path(model)
    return models
