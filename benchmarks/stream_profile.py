"""One GEMM of one form, to be run under ncu."""

import sys

import torch
from layer_chain import PARTS, text_of
from stream_forms import loaded

from vllm_gemma4_spec.kernels import cuda, stream_gemm

torch.zeros(1, device="cuda").cpu()  # a context that stays
name, rows = sys.argv[1], int(sys.argv[2])
n, k = 43008, 5376
variant = PARTS["few"][name]
tiles = stream_gemm.tiles_for(rows, variant.forms)
form = variant.forms[tiles]
made = loaded(tiles, form, cuda.compiled(text_of(variant, tiles), "sm_90a" if form.wgmma else "sm_90"))
stream_gemm.kernel = lambda *_: made
stream_gemm.SCRATCH.reserve(torch.device("cuda", 0), 132 * 2 * 128 * 256, -(-n // 256) * 8)
words = torch.randint(-(2**31), 2**31 - 1, (k // 16, 2 * n), dtype=torch.int32, device="cuda")
scales = torch.randint(0xD0, 0xE8, (k // 16, n), dtype=torch.int16, device="cuda").to(torch.uint8)
x = torch.randn(rows, k, device="cuda").bfloat16()
one = torch.tensor([2.0**100], device="cuda")
for _ in range(3):
    stream_gemm.launch(tiles, form, x, None, words, scales, one, n)
torch.cuda.synchronize()
