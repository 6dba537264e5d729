"""vLLM's offline engine in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["greedy_tokens", "job", "vllm_runs", "vllm_tokens"]


def greedy_tokens(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """What transformers generates: so many tokens for each prompt, whatever they are."""
    options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        # a mask, or transformers takes zeros of the prompt for padding
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        result.append(out[0, len(prompt) :].tolist())
    return result


def job(
    folder: Path,
    prompts: list[list[int]],
    *,
    new_tokens: int = 12,
    sampling: dict[str, Any] | None = None,
    adapters: Sequence[Path | None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What an engine is to do.

    Args:
        folder: of the model.
        sampling: options of ``vllm.SamplingParams`` other than greedy; ``structured_outputs`` as a mapping.
        adapters: for each prompt the folder of a LoRA adapter, or None.
        options: of ``vllm.LLM``; float32 unless they say otherwise: in 16 bits a rounding can decide between two
            tokens.
    """
    return {
        "folder": str(folder),
        "prompts": prompts,
        "new_tokens": new_tokens,
        "sampling": sampling or {},
        "adapters": adapters and [path and str(path) for path in adapters],
        "options": {"dtype": "float32", "enforce_eager": True} | options,
    }


def vllm_runs(*jobs: dict[str, Any], threads: int = 1, **environment: str | None) -> list[dict[str, Any]]:
    """Do the jobs one after another, with other variables in the ``environment``, or without them if None.

    Returns:
        Of each ``tokens``, ``texts`` (if tokens become text) and ``cached_tokens`` of every prompt, the engine's
        ``metrics`` (if ``disable_log_stats`` is False) and ``config_hash``; or the ``error`` that ended it.
    """
    defaults: dict[str, str | None] = {
        "PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # two ranks must start on a machine of two cores
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        # vLLM compiles the masking of token ids even with enforce_eager
        "TORCHDYNAMO_DISABLE": "1",
    }
    wanted = os.environ | defaults | environment
    # a file: what workers print may follow what this process prints
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        run = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("offline_generate.py")), json.dumps(jobs), str(results)],
            capture_output=True,
            text=True,
            check=False,
            env={name: value for name, value in wanted.items() if value is not None},
        )
        assert run.returncode == 0, run.stderr[-4000:]
        done: list[dict[str, Any]] = json.loads(results.read_text())
        return done


def vllm_tokens(*jobs: dict[str, Any], threads: int = 1) -> list[list[list[int]]]:
    """The tokens of each job, of at most 64 tokens a prompt together with it unless it says otherwise."""
    runs = vllm_runs(*jobs, threads=threads)
    for run in runs:
        assert "error" not in run, run["error"]
    return [run["tokens"] for run in runs]
