"""One malformed checkpoint for every rule of SPEC.md, each made of a good one by breaking that rule alone.

``python -m tests.format.faults`` prints the table of FAULTS.md, which a test holds against this list.
"""

from .fault import BASES, Fault
from .in_config import MODEL, SCHEMA
from .in_tensors import CHECKSUMS, TENSORS, VALUES
from .on_disk import FILES, HEADERS, INDEXES, JSON

__all__ = ["BASES", "FAULTS", "Fault", "table"]

_GROUPS = {
    "Files": FILES,
    "JSON": JSON,
    "quantization_config": SCHEMA,
    "The model": MODEL,
    "The index": INDEXES,
    "Headers of safetensors files": HEADERS,
    "Tensors": TENSORS,
    "Values": VALUES,
    "Checksums": CHECKSUMS,
}
FAULTS = [fault for group in _GROUPS.values() for fault in group]


def table() -> str:
    """The content of FAULTS.md."""
    lines = [
        "# What a malformed checkpoint comes to",
        "",
        "Made by `python -m tests.format.faults`; a test holds it against the faults. Each is refused, with a reason",
        "that matches what stands here and names the file: by `requant verify` and `vllm_requant.format.validation`",
        "(`tests/format/test_faults.py::test_refused[NAME]`) and, checksums apart, by the vLLM plugin before a model",
        "is built (`tests/serving/test_malformed.py::test_refused_by_the_plugin[NAME]`).",
    ]
    for title, faults in _GROUPS.items():
        lines += ["", f"## {title}", "", "| name | fault | the refusal matches |", "| --- | --- | --- |"]
        lines += [f"| `{fault.name}` | {fault.what} | `{fault.says}` |" for fault in faults]
    return "\n".join(lines) + "\n"
