#!/usr/bin/env bash
# One would guess: ModelOpt's NVFP4 quantizer stores a weight of zeros as zeros. It takes care of them: a block of
# zeros beside another block gets the scale 1.0 and comes back as zeros.
# What happens: if the whole tensor is zero (an expert that was never trained, a LoRA-style branch at its start), the
# scale of the tensor is 0 and that of every block 0 / 0: NaN scales are written, and the weight comes back as NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 requests==2.32.5 transformers==5.24.0 nvidia-modelopt==0.47.0
env/bin/python -W ignore - <<'PY'
import modelopt, torch
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

print("nvidia-modelopt", modelopt.__version__)

def stored(weight):
    quantized, blocks, tensor = NVFP4QTensor.quantize(weight, 16)
    back = quantized.dequantize(scale=blocks, double_scale=tensor, block_sizes={-1: 16})
    print(f"block scales {blocks.float().flatten().tolist()}, tensor scale {tensor.item():.3g}, back: {back.unique().tolist()}")
    return blocks.float(), tensor, back

blocks, _, back = stored(torch.cat([torch.zeros(1, 16), torch.ones(1, 16)], 1))
assert blocks.tolist() == [[1.0, 448.0]] and back.isfinite().all() and not back[0, :16].any()
blocks, tensor, back = stored(torch.zeros(1, 32))
assert tensor == 0 and blocks.isnan().all() and back.isnan().all()
PY
