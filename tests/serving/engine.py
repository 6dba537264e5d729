"""vLLM's offline engine in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["job", "vllm_tokens"]


def job(folder: Path, prompts: list[list[int]], *, new_tokens: int = 12, **options: Any) -> dict[str, Any]:
    """A checkpoint, prompts and options of ``vllm.LLM``; float32 unless they say otherwise: in 16 bits a rounding can
    decide between two tokens."""
    options = {"dtype": "float32", "enforce_eager": True} | options
    return {"folder": str(folder), "prompts": prompts, "new_tokens": new_tokens, "options": options}


def vllm_tokens(*jobs: dict[str, Any], threads: int = 1) -> list[list[list[int]]]:
    """The greedy tokens of each job, of at most 64 tokens a prompt together with it."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_generate.py")), json.dumps(jobs)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # two ranks must start on a machine of two cores
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            # vLLM compiles the masking of token ids even with enforce_eager
            "TORCHDYNAMO_DISABLE": "1",
        },
    )
    assert run.returncode == 0, run.stderr[-4000:]
    result: list[list[list[int]]] = json.loads(run.stdout.splitlines()[-1])
    return result
