"""Random quantized layers."""

import torch

from vllm_requant.format import LayerSpec, LutSpec, QuantizedLayer, TrellisSpec, UniformSpec
from vllm_requant.kernels.bitstream import pack_codes


def random_layer(
    kind: str,
    bits: int,
    out_features: int,
    in_features: int,
    *,
    density: float,
    group_size: int = 64,
    seed: int = 0,
) -> tuple[QuantizedLayer, torch.Tensor, torch.Tensor]:
    """A layer, the full-precision weight its residual was taken from, and the mask of the residual."""
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    spec: LayerSpec
    if kind == "uniform":
        spec = UniformSpec(bits=bits, group_size=group_size, in_features=in_features, out_features=out_features)
        zeros = torch.randint(0, 1 << bits, (out_features, spec.groups), generator=generator)
        dense = {
            "qweight": pack_codes(codes, bits),
            "scales": (torch.rand(out_features, spec.groups, generator=generator) * 0.01 + 1e-4).half(),
            "qzeros": pack_codes(zeros, bits),
        }
    elif kind == "trellis":
        spec = TrellisSpec(
            bits=bits, state_bits=12, block_in=32, block_out=16, in_features=in_features, out_features=out_features
        )
        dense = {
            name: torch.randint(256, wanted.shape, dtype=torch.uint8, generator=generator)
            for name, wanted in spec.dense_tensors().items()
        }
        # layers of one width share their input signs, as the converter's do
        dense["signs_in"] = torch.arange(in_features // 8, dtype=torch.uint8) * 37
        dense["scales"] = (torch.rand(dense["scales"].shape, generator=generator) * 3e-4 + 1e-5).half()
    else:
        spec = LutSpec(bits=bits, in_features=in_features, out_features=out_features)
        table = torch.randn(out_features, 1 << bits, generator=generator).mul(0.05).half()
        dense = {"qweight": pack_codes(codes, bits), "lookup_table": table.sort(dim=1).values}
    weight = torch.randn(shape, generator=generator).mul(0.05).bfloat16().float()
    mask = torch.rand(shape, generator=generator) < density
    return QuantizedLayer.build(spec, dense, weight=weight, mask=mask), weight, mask
