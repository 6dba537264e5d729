"""What conversions hold of their own at their peaks, measured in a process of its own.

python -m tests.offline.conversion_memory stream|whole WORK MODEL…
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.mapped import load_mapped
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save

_EVERY_SECONDS = 0.002
# collects gradients and their squares of all layers; few tokens, so that activations take next to nothing
_RECIPE: dict[str, Any] = {"base": "rtn", "outliers": 0, "significant": 0.001, "rounds": 1, "metric": "pqi"}
_RECIPE |= {"num_samples": 2, "path_samples": 0, "seq_len": 16, "nodes": 2, "tune_epochs": 0, "refit": False}


class _Peak(threading.Thread):
    """Watches the process's memory that belongs to no file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._ended = _own(), threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self.bytes = max(self.bytes, _own())

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.bytes


def _own() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def main(how: str, work: str, *models: str) -> None:
    """Convert one model after another, and print how far each led beyond what there was before, in bytes."""
    grown = []
    for number, model in enumerate(models):
        folder = Path(work) / str(number)
        before, peak = _own(), _Peak()
        peak.start()
        lm = load_mapped(model, folder / "rounded") if how == "stream" else load_causal_lm(model)
        convert_and_save(lm, folder / "out", Recipe(**_RECIPE), cache=TensorCache(folder / "cache"))
        del lm
        grown.append(peak.end() - before)
    print(json.dumps(grown))


if __name__ == "__main__":
    main(*sys.argv[1:])
