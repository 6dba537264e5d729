"""A mixture of experts on the CPU: the packed weights of all experts of a block in one piece of memory, and the op
``requant::packed_experts`` that sends every token through its own.

A decode step reads the weights of the experts that its tokens were sent to, and no others.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import cpu
from .cpu import memory
from .ops import planes_for

__all__ = ["ACTIVATIONS", "join", "packed_experts"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
"""Of the gate, by name."""

_SCHEMA = (
    "packed_experts(Tensor x, Tensor routing, Tensor ids, Tensor packed, Tensor pieces, "
    "int intermediate, str activation, int planes) -> Tensor"
)


def join(experts: Sequence[tuple[Sequence[Tensor], Tensor]]) -> dict[str, Tensor]:
    """The packed weights of experts in one piece.

    Args:
        experts: of each the gate and the up matrix, stacked into one packed weight or as two, and the down matrix;
            uint8, as :func:`vllm_requant.kernels.repack` packs them for the CPU.

    Returns:
        ``packed``: uint8; ``pieces``: int64 ``[experts, 3, 2]``, where in it gate, up and down begin and how many bytes
        they have; up has none where it is stacked on gate.
    """
    placed: list[tuple[int, Tensor]] = []
    pieces = torch.zeros(len(experts), 3, 2, dtype=torch.int64)
    end = 0
    for number, (first, down) in enumerate(experts):
        for place, weight in [*enumerate(first), (2, down)]:
            pieces[number, place] = torch.tensor([end, weight.numel()])
            placed.append((end, weight))
            end += -(-weight.numel() // memory.ALIGNMENT) * memory.ALIGNMENT
    packed = memory.empty(end)
    for begin, weight in placed:
        packed[begin : begin + weight.numel()] = weight
    return {"packed": packed, "pieces": pieces}


def packed_experts(
    x: Tensor,
    routing: Tensor,
    ids: Tensor,
    weights: dict[str, Tensor],
    *,
    intermediate: int,
    activation: str,
    activation_bits: int = 16,
) -> Tensor:
    """``Σ_e routing_e · down_e(activation(gate_e x) · up_e x)`` over the experts of each token, in their order.

    Args:
        x: ``[tokens, hidden]``, float32, bfloat16 or float16, on the CPU.
        routing: float32 ``[tokens, k]``, what the output of each of a token's experts is multiplied with.
        ids: integers ``[tokens, k]``, the experts; a negative one stands for an expert that is not here.
        weights: what :func:`join` returned.
        intermediate: rows of gate and of up.
        activation: a key of :data:`ACTIVATIONS`.
        activation_bits: as :func:`vllm_requant.kernels.linear` takes them.

    Returns:
        ``[tokens, hidden]`` of ``x.dtype``; sums over experts are float32. A token's result depends on its own input
        alone, as long as no expert is sent more tokens than are multiplied from codes.

    Raises:
        TypeError, ValueError: as :func:`vllm_requant.kernels.linear` raises them, and for unknown activations.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    planes = planes_for(x.dtype, activation_bits)
    return torch.ops.requant.packed_experts(  # type: ignore[no-any-return]
        x, routing, ids, weights["packed"], weights["pieces"], intermediate, activation, planes
    )


def _packed_experts(
    x: Tensor,
    routing: Tensor,
    ids: Tensor,
    packed: Tensor,
    pieces: Tensor,
    intermediate: int,
    activation: str,
    planes: int,
) -> Tensor:
    hidden, k = x.shape[1], ids.shape[1]
    # inputs are laid out by expert, so that what an expert reads and writes is one piece each
    order = ids.flatten().argsort(stable=True)
    runs = _runs(ids.flatten()[order], packed, pieces)
    inputs = x[order // k]
    halves = x.new_empty(len(order), 2 * intermediate)
    for begin, end, (gate, up, _) in runs:
        if up.numel():
            for column, half in ((0, gate), (intermediate, up)):
                out = x.new_empty(end - begin, intermediate)
                _multiply(inputs[begin:end], half, out, planes)
                halves[begin:end, column : column + intermediate] = out
        else:
            _multiply(inputs[begin:end], gate, halves[begin:end], planes)
    gated, up = halves.float().chunk(2, dim=1)
    inner = (ACTIVATIONS[activation](gated) * up).to(x.dtype)
    outputs = x.new_zeros(len(order), hidden)
    for begin, end, (_, _, down) in runs:
        _multiply(inner[begin:end], down, outputs[begin:end], planes)
    placed = torch.empty_like(outputs)
    placed[order] = outputs
    return (placed.view(-1, k, hidden).float() * routing[:, :, None].float()).sum(1).to(x.dtype)


def _runs(numbers: Tensor, packed: Tensor, pieces: Tensor) -> list[tuple[int, int, list[Tensor]]]:
    """Where the rows of each expert that is here begin and end among sorted numbers of experts, and its matrices."""
    found, counts = torch.unique_consecutive(numbers, return_counts=True)
    ends = counts.cumsum(0)
    matrices = pieces[found.clamp(min=0)].tolist()
    return [
        (end - count, end, [packed[begin : begin + nbytes] for begin, nbytes in places])
        for number, count, end, places in zip(found.tolist(), counts.tolist(), ends.tolist(), matrices, strict=True)
        if number >= 0
    ]


def _multiply(x: Tensor, packed: Tensor, out: Tensor, planes: int) -> None:
    if len(x) <= cpu.fused_batch(packed, x.dtype):
        cpu.linear_into(x, packed, out, planes=planes)
    else:
        out.copy_(torch.ops.requant.packed_linear_any(x, packed, out.shape[1], planes))


def _packed_experts_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


if not hasattr(torch.ops.requant, "packed_experts"):
    _library = torch.library.Library("requant", "FRAGMENT")
    _library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl("packed_experts", _packed_experts, "CPU")
    torch.library.register_fake("requant::packed_experts", _packed_experts_fake, lib=_library)
    # alive as long as the ops, see ops.py
    setattr(torch.ops.requant, "experts_registrations", _library)  # noqa: B010 (a namespace made at run time)
