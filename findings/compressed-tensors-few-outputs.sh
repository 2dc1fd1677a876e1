#!/usr/bin/env bash
# One would guess: a weight that compressed-tensors packs is unpacked by the same release, whatever the number of its rows.
# What happens: with 4 bits and zero points a layer of up to 8 outputs (a reward or a classification head, a router) is
# packed and never unpacked: decompress() raises. 9 outputs, other bits, or no zero points are right.
# Two things meet. The zero points of 8 rows or fewer fill one row of int32, which is transposed; and PyTorch's
# contiguous() hands such a column back as it is, since a dimension of size 1 counts as contiguous with any stride, while
# view() with a smaller type takes no stride but 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0 compressed-tensors==0.20.1
cat >outputs.py <<'PY'
from importlib.metadata import version
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

torch.manual_seed(0)

def unpacked(outputs, bits, zero_points):
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=not zero_points, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(outputs, 64)
    groups = weight.view(outputs, 2, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    packed = Compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    try:
        back = Compressor.decompress(packed, scheme)["weight"]
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    assert (back - weight).abs().max() < scale.max()
    return "right"

print("compressed-tensors", version("compressed-tensors"), "torch", torch.__version__)
for bits, zero_points in ((4, True), (4, False), (3, True), (8, True)):
    for outputs in (1, 8, 9):
        seen = unpacked(outputs, bits, zero_points)
        print(f"{bits} bits, zero points: {zero_points}, {outputs} outputs: {seen}")
        assert ("must be 1 to view Int as Byte" in seen) == (bits == 4 and zero_points and outputs <= 8)

column = torch.zeros(1, 2, dtype=torch.int32).t()
same = column.contiguous()
print("column of shape", tuple(column.shape), "and stride", column.stride(), "is contiguous:", column.is_contiguous())
assert column.is_contiguous() and same.stride() == (1, 2)
try:
    same.view(torch.uint8)
    raise SystemExit("contiguous().view(torch.uint8) is taken")
except RuntimeError as error:
    print("contiguous().view(torch.uint8): RuntimeError:", error)
PY
env/bin/python -W ignore outputs.py
