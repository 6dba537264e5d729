"""A layer is dense + sparse, and a block of it is a layer with the same weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.format.builders import random_layer
from vllm_requant.format import ReQuantFormatError

KINDS = [("uniform", 2), ("uniform", 3), ("uniform", 4), ("uniform", 8), ("lut", 2), ("lut", 3), ("lut", 4)]
TRELLIS = [("trellis", 2), ("trellis", 3), ("trellis", 4)]


@pytest.mark.parametrize(("kind", "bits"), KINDS + TRELLIS)
def test_residual_restores_the_weight_to_one_rounding(kind: str, bits: int) -> None:
    layer, weight, mask = random_layer(kind, bits, 32, 224, density=0.05)
    dense = layer.dense_weight()
    restored = layer.weight()
    assert torch.equal(restored[~mask], dense[~mask])
    # half a unit in the last place of the stored float16 residual, and of the float32 sum
    bound = (weight - dense).abs() * 2.0**-11 + 2.0**-25 + weight.abs() * 2.0**-23
    assert ((restored - weight).abs()[mask] <= bound[mask]).all()


def test_uniform_weight_is_code_minus_zero_times_scale() -> None:
    """Checked element by element against the bit string as SPEC.md describes it."""
    layer, _, _ = random_layer("uniform", 3, 5, 70, density=0, group_size=32)
    tensors = layer.tensors

    def code(packed: torch.Tensor, row: int, j: int) -> int:
        bits = "".join(f"{byte:08b}"[::-1] for byte in packed[row].tolist())
        return int(bits[3 * j : 3 * j + 3][::-1], 2)

    weight = layer.weight()
    for row in range(5):
        for k in range(70):
            group = k // 32
            scale = float(tensors["scales"][row, group])
            expected = (code(tensors["qweight"], row, k) - code(tensors["qzeros"], row, group)) * scale
            assert float(weight[row, k]) == expected


@pytest.mark.parametrize(("kind", "bits"), TRELLIS)
def test_trellis_weight_is_a_window_of_bits_rotated(kind: str, bits: int) -> None:
    """Checked element by element against the bit strings and matrices that SPEC.md describes."""
    layer, _, _ = random_layer(kind, bits, 32, 64, density=0)
    tensors = layer.tensors

    def bit_string(data: torch.Tensor) -> str:
        return "".join(f"{byte:08b}"[::-1] for byte in data.tolist())

    rotated = torch.zeros(32, 64, dtype=torch.float64)
    for block in range(2):
        for tile in range(8):
            string = bit_string(tensors["qweight"][block, tile])
            circle = string + string
            for v in range(128):
                state = int(circle[v * bits : v * bits + 12][::-1], 2)
                product = state * 0x83DCD12D % 2**32
                value = sum(product >> shift & 255 for shift in (0, 8, 16, 24)) - 510
                row, column = block * 16 + v % 16, tile * 8 + v // 16
                rotated[row, column] = value * float(tensors["scales"][block, column // 32])

    def transform(size: int, block: int, signs: torch.Tensor) -> torch.Tensor:
        """Signs, then block Hadamard transform: element (i, j) of a block is (−1)^popcount(i & j) / √block."""
        matrix = torch.zeros(size, size, dtype=torch.float64)
        flips = bit_string(signs)
        for i in range(size):
            for j in range(i // block * block, (i // block + 1) * block):
                matrix[i, j] = (-1) ** ((i % block & j % block).bit_count() + int(flips[j])) / block**0.5
        return matrix

    expected = transform(32, 16, tensors["signs_out"]).T @ rotated @ transform(64, 32, tensors["signs_in"])
    torch.testing.assert_close(layer.weight().double(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("kind", "bits"), TRELLIS)
def test_trellis_slices_at_hadamard_blocks(kind: str, bits: int) -> None:
    layer, _, _ = random_layer(kind, bits, 64, 128, density=0.05)
    block = layer.slice((16, 48), (32, 96))
    block.check(name="block")
    torch.testing.assert_close(block.weight(), layer.weight()[16:48, 32:96], rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"output features 8:64.*multiples of 16"):
        layer.slice(rows=(8, 64))
    with pytest.raises(ValueError, match=r"input features 0:48.*multiples of 32"):
        layer.slice(columns=(0, 48))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_slice_is_the_block(data: st.DataObject) -> None:
    kind, bits = data.draw(st.sampled_from(KINDS))
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(33, 300))
    density = data.draw(st.sampled_from([0.0, 0.02, 1.0]))
    layer, _, _ = random_layer(kind, bits, rows, columns, density=density, group_size=96, seed=rows * columns)
    row_start = data.draw(st.integers(0, rows - 1))
    row_stop = data.draw(st.integers(row_start + 1, rows))
    if kind == "uniform":
        # borders at multiples of 32, or at the end of the row
        column_start = 32 * data.draw(st.integers(0, (columns - 1) // 32))
        stops = [*range(column_start + 32, columns, 32), columns]
        column_stop = data.draw(st.sampled_from(stops))
    else:
        column_start = data.draw(st.integers(0, columns - 1))
        column_stop = data.draw(st.integers(column_start + 1, columns))
    block = layer.slice((row_start, row_stop), (column_start, column_stop))
    block.check(name="block")
    assert torch.equal(block.weight(), layer.weight()[row_start:row_stop, column_start:column_stop])


def test_uniform_refuses_a_border_inside_a_block_of_32() -> None:
    layer, _, _ = random_layer("uniform", 4, 4, 128, density=0)
    with pytest.raises(ValueError, match="multiples of 32"):
        layer.slice(columns=(40, 128))


@pytest.mark.parametrize("rows", [(0, 0), (3, 2), (0, 5), (-1, 2)])
def test_slice_outside_is_refused(rows: tuple[int, int]) -> None:
    layer, _, _ = random_layer("lut", 4, 4, 64, density=0)
    with pytest.raises(ValueError, match="outside"):
        layer.slice(rows=rows)


def _corrupt(suffix: str, change):  # type: ignore[no-untyped-def]
    layer, _, _ = random_layer("uniform", 3, 8, 70, density=0.1)
    tensors = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    tensors[suffix] = change(tensors[suffix])
    return type(layer)(layer.spec, tensors)


def _set(index, value):  # type: ignore[no-untyped-def]
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("suffix", "change", "reason"),
    [
        ("scales", _set((0, 0), float("nan")), "not finite and positive"),
        ("scales", _set((0, 0), 0.0), "not finite and positive"),
        ("scales", _set((0, 0), -1.0), "not finite and positive"),
        ("scales", lambda t: t[:, :1], "demands"),
        ("scales", lambda t: t.float(), "demands"),
        ("qweight", _set((0, -1), 255), "pad bits"),
        ("qzeros", _set((0, -1), 255), "pad bits"),
        ("sparse_indptr", _set(0, 1), "start at 0"),
        ("sparse_indptr", _set(-1, 3), "decrease|ends at"),
        ("sparse_indptr", _set(1, 2**30), "decrease"),
        ("sparse_indices", _set(0, 70), "outside"),
        ("sparse_indices", lambda t: t[torch.arange(len(t) - 1, -1, -1)], "strictly increasing"),
        ("sparse_values", _set(0, float("inf")), "not finite"),
    ],
)
def test_broken_values_are_refused(suffix: str, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    broken = _corrupt(suffix, change)
    with pytest.raises(ReQuantFormatError, match=reason) as caught:
        broken.check(name="model.layer", file="shard.safetensors")
    assert caught.value.tensor == f"model.layer.{suffix}"
    assert caught.value.file == "shard.safetensors"


def test_missing_and_superfluous_tensors_are_refused() -> None:
    layer, _, _ = random_layer("lut", 4, 4, 64, density=0.1)
    with pytest.raises(ReQuantFormatError, match=r"lookup_table: is missing"):
        type(layer)(layer.spec, {k: v for k, v in layer.tensors.items() if k != "lookup_table"}).check(name="m")
    with pytest.raises(ReQuantFormatError, match=r"m\.weight: does not belong"):
        type(layer)(layer.spec, {**layer.tensors, "weight": torch.zeros(1)}).check(name="m")


def test_size_counts_every_stored_byte() -> None:
    for kind, bits in KINDS:
        layer, _, _ = random_layer(kind, bits, 16, 200, density=0.03)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors.values())
        assert layer.spec.nbytes == stored
        assert layer.spec.bits_per_weight == 8 * stored / (16 * 200)
