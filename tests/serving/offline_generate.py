"""Greedy token ids from vLLM's offline engine, in a process of its own.

Usage: ``python offline_generate.py JOBS_JSON``, a list of what :func:`tests.serving.engine.job` makes. The models are
served one after another, because importing vLLM takes longer than serving a tiny model. The last line of the output is
the JSON list of the jobs' lists of token id lists.
"""

import json
import os
import sys
from typing import Any

from vllm_requant.serving import register

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# An installed package is found by its entry point; this process may run from a bare checkout.
# Tensor-parallel workers are spawned and run these lines, too.
register()


def serve(folder: str, prompts: list[list[int]], new_tokens: int, options: dict[str, Any]) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(folder, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, seed=0, **options)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    results = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    del engine
    cleanup_dist_env_and_memory()
    return [list(result.outputs[0].token_ids) for result in results]


if __name__ == "__main__":
    print(json.dumps([serve(**job) for job in json.loads(sys.argv[1])]))
