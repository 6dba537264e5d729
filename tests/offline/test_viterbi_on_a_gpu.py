"""The Viterbi of a GPU, by its own code on threads of the CPU: the paths that tensor operations find."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.on_threads import compiled
from vllm_requant.kernels.reference import trellis_code
from vllm_requant.offline.bases import viterbi
from vllm_requant.offline.bases.qtip import code_fit
from vllm_requant.offline.bases.viterbi import closed_paths


@pytest.fixture
def on_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """In place of a GPU and its compiler; the kernels that were launched."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++20 compiler")
    launched: list[str] = []

    def module(state_bits: int, bits: int, device: int) -> SimpleNamespace:
        threads = viterbi._threads(1 << state_bits, bits)
        macros = {"BF16": 0, "STATE_BITS": state_bits, "BITS": bits, "THREADS": threads}
        source, file = viterbi.SOURCE.read_text(), tmp_path / f"{state_bits}-{bits}.cpp"
        made = compiled(source, macros, ["viterbi"], file)

        def kernel(name: str) -> Callable:
            launched.append(name)
            return made.kernel(name)

        return SimpleNamespace(kernel=kernel)

    monkeypatch.setattr(viterbi, "_module", module)
    monkeypatch.setattr(viterbi, "_on_gpu", lambda x, code, bits: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return launched


@pytest.mark.parametrize("rotations", [0, 1, 2])
@pytest.mark.parametrize(("bits", "state_bits"), [(1, 6), (2, 9), (3, 8), (6, 12)])
def test_paths_are_those_of_tensor_operations(
    on_threads: list[str], monkeypatch: pytest.MonkeyPatch, bits: int, state_bits: int, rotations: int
) -> None:
    code = trellis_code(state_bits)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(bits)) / code_fit(bits, state_bits).scale
    found = closed_paths(x, code, bits, rotations=rotations)
    assert on_threads == ["viterbi"] * max(1, 2 * rotations)
    monkeypatch.setattr(viterbi, "_on_gpu", lambda x, code, bits: False)
    expected = closed_paths(x, code, bits, rotations=rotations)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    # where two ways cost the same either may be taken
    error, least = ((code[states.long()] - x).square().sum(1) for states in (found, expected))
    torch.testing.assert_close(error, least, rtol=1e-5, atol=0)
    assert (found == expected).float().mean() > 0.9
    windows = found if rotations == 0 else torch.cat([found, found[:, :1]], dim=1)
    assert torch.equal(windows[:, 1:] & ((1 << (state_bits - bits)) - 1), windows[:, :-1] >> bits)


def test_what_the_kernel_cannot_do_is_left_to_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viterbi.driver, "available", lambda: True)
    x, cuda = SimpleNamespace(device=SimpleNamespace(type="cuda")), torch.device("cpu")
    code = viterbi.code_on(cuda, 12)
    assert torch.equal(code, trellis_code(12)) and viterbi.code_on(cuda, 12) is code
    assert viterbi._on_gpu(x, code, 2)
    assert not viterbi._on_gpu(x, code.clone(), 2)  # it may be another one
    assert not viterbi._on_gpu(x, viterbi.code_on(cuda, 16), 1)  # 256 KB of costs
    assert not viterbi._on_gpu(torch.zeros(1, 8), code, 2)
