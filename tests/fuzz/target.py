"""What the fuzzer runs: bytes become one file of a good checkpoint, which is then checked.

Whatever the bytes are, the checkpoint is good, or is refused with a ``ReQuantFormatError``; anything else is a defect
of the reader.
"""

import json
from pathlib import Path

from tests.format.bounded import tree_size
from tests.format.checkpoints import split_file, write_checkpoint, write_file
from vllm_requant.format.validation import findings

__all__ = ["Target"]

_CHOICES = 7


class Target:
    """Two good checkpoints, a file of which an input replaces while it runs.

    Args:
        folder: an existing, empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._one = write_checkpoint(folder / "one")
        self._shards = write_checkpoint(folder / "shards", max_shard_size=40_000)
        self._weights = self._one / "model.safetensors"
        self._shard = min(self._shards.glob("model-*.safetensors"))
        self._index = self._shards / "model.safetensors.index.json"
        self._config, self._sums = self._one / "config.json", self._one / "SHA256SUMS"
        self._good = {
            path: path.read_bytes() for path in (self._weights, self._shard, self._index, self._config, self._sums)
        }
        # no input could match them; those of the other folder stay, for the inputs that are a list of sums
        (self._shards / "SHA256SUMS").unlink()
        self.size = tree_size(self._one)

    def seeds(self) -> list[bytes]:
        """Inputs that change nothing, one for every kind of input."""
        config = json.loads(self._good[self._config])
        contents = [
            json.dumps(config).encode(),
            json.dumps(config["quantization_config"]).encode(),
            self._good[self._index],
            split_file(self._weights)[0],
            self._good[self._shard],
            b"\0\0\0" + split_file(self._weights)[1][:1],
            self._good[self._sums],
        ]
        return [bytes([choice]) + content for choice, content in enumerate(contents)]

    def run(self, data: bytes) -> list[str]:
        """What is wrong with the checkpoint that an input makes.

        Args:
            data: the first byte chooses what the others are: ``config.json``, its quantization_config, the index, a
                header, a whole safetensors file, places (three bytes) and values (one) of bytes of tensor data,
                ``SHA256SUMS``.
        """
        choice, content = (data[0] % _CHOICES, data[1:]) if data else (0, b"")
        path = [self._config, self._config, self._index, self._weights, self._shard, self._weights, self._sums][choice]
        good = self._good[path]
        try:
            if choice == 1:
                entry = b'"quantization_config": ' + content
                path.write_bytes(good[: good.index(b'"quantization_config": ')] + entry + b"}")
            elif choice == 3:
                write_file(path, content, split_file(path)[1])
            elif choice == 5:
                path.write_bytes(_with_bytes(good, content))
            else:
                path.write_bytes(content)
            if choice != 6:
                self._sums.unlink()
            return [str(finding) for finding in findings(path.parent)]
        finally:
            path.write_bytes(good)
            self._sums.write_bytes(self._good[self._sums])


def _with_bytes(file: bytes, changes: bytes) -> bytes:
    header = 8 + int.from_bytes(file[:8], "little")
    changed = bytearray(file)
    for start in range(0, len(changes) - 3, 4):
        place = int.from_bytes(changes[start : start + 3], "little") % (len(file) - header)
        changed[header + place] = changes[start + 3]
    return bytes(changed)
