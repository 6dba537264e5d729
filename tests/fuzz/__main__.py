"""``python -m tests.fuzz [OPTIONS OF LIBFUZZER]``: coverage-guided inputs for :class:`tests.fuzz.target.Target`.

``make fuzz`` runs it for ten minutes. It says every 15 seconds what it counted; a crash, an input that takes 10
seconds, or one that needs more memory than twice the files and an allowance ends it at once and leaves the input in a
file.
"""

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vllm_requant.format"]):
    from vllm_requant.format import validation  # noqa: F401

from tests.format.bounded import allocating_at_most
from tests.fuzz.target import Target

ALLOWANCE = 32 * 2**20
"""What an input may make the process allocate beside twice the files: parsed JSON, modules of transformers."""
REPORT_SECONDS = 15


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="requant-fuzz-") as folder:
        target = Target(Path(folder))
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds()):
            (corpus / str(number)).write_bytes(seed)
            assert target.run(seed) == [], "a seed changes nothing"
        outcomes: Counter[str] = Counter()
        slowest = reported = 0.0

        def one_input(data: bytes) -> None:
            nonlocal slowest, reported
            began = time.monotonic()
            with allocating_at_most(2 * target.size + ALLOWANCE):
                found = target.run(data)
            slowest = max(slowest, time.monotonic() - began)
            outcomes["refused" if found else "good"] += 1
            if began - reported > REPORT_SECONDS:  # libFuzzer ends the process without a word to Python
                reported = began
                report()

        def report() -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{sum(outcomes.values())} inputs: {outcomes['refused']} refused, {outcomes['good']} good; "
                f"slowest {slowest:.2f} s, resident at most {peak:.0f} MiB",
                flush=True,
            )

        options = ["-max_len=16384", "-timeout=10", "-rss_limit_mb=0", *sys.argv[1:]]
        atheris.Setup([sys.argv[0], str(corpus), *options], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
