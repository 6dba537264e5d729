"""An engine as slow as a test wants it."""

import time

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

FLAGS = ("--logits-processors", f"{__name__}:Slow")  # of a server whose requests may ask for it


def slowly(seconds: float) -> dict[str, dict[str, float]]:
    """What a request adds to its body so that each of its tokens takes ``seconds`` more, in which nothing computes."""
    return {"vllm_xargs": {"seconds_per_token": seconds}}


class Slow(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False  # it would be left out where tokens are the likeliest

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        seconds = (params.extra_args or {}).get("seconds_per_token")
        if seconds is None:
            return None

        def wait(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return logits

        return wait
