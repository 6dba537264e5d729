"""Token ids from vLLM's offline engine, in a process of its own.

Usage: ``python offline_generate.py JOBS_JSON RESULTS``, a list of what :func:`tests.serving.engine.job` makes, and a
file for the JSON list of what came of it, as :func:`tests.serving.engine.vllm_runs` says. The models are served one
after another, because importing vLLM takes longer than serving a tiny model.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from vllm_requant.serving import register

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# An installed package is found by its entry point; this process may run from a bare checkout.
# Tensor-parallel workers are spawned and run these lines, too.
register()


def serve(
    folder: str,
    prompts: list[list[int]],
    new_tokens: int,
    sampling: dict[str, Any],
    adapters: list[str | None] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = None
    options = {"skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 4, "seed": 0} | options
    try:
        engine = LLM(folder, **options)
        results = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            _sampling(new_tokens, sampling, detokenize=not options["skip_tokenizer_init"]),
            lora_request=adapters and _requests(adapters),
        )
        return {
            "tokens": [list(result.outputs[0].token_ids) for result in results],
            "texts": [result.outputs[0].text for result in results],
            "cached_tokens": [result.num_cached_tokens for result in results],
            "metrics": {} if options.get("disable_log_stats", True) else _metrics(engine),
            "config_hash": engine.llm_engine.vllm_config.compute_hash(),
        }
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        del engine
        cleanup_dist_env_and_memory()


def _sampling(new_tokens: int, options: dict[str, Any], *, detokenize: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in options:
        options = options | {"structured_outputs": StructuredOutputsParams(**options["structured_outputs"])}
    defaults = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": detokenize}
    return SamplingParams(**defaults | options)


def _requests(adapters: list[str | None]) -> list[Any]:
    from vllm.lora.request import LoRARequest

    numbers = {path: number for number, path in enumerate(dict.fromkeys(filter(None, adapters)), 1)}
    return [path and LoRARequest(path, numbers[path], path) for path in adapters]


def _metrics(engine: Any) -> dict[str, float]:
    """Values of counters and gauges, numbers of observations of histograms."""
    return {
        metric.name: metric.value if hasattr(metric, "value") else metric.count
        for metric in engine.get_metrics()
        if hasattr(metric, "value") or hasattr(metric, "count")
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps([serve(**job) for job in json.loads(sys.argv[1])]))
