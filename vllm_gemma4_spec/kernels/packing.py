"""NVFP4 weights in the order in which ``nvfp4_rows.cu`` reads them.

A lane of a warp loads 16 bytes: 32 codes, four A fragments of mma.m16n8k16. With row ``16 r + 8 h + g`` and
column ``256 b + 64 q + 16 t + 4 j + 2 e + l``, the code is in word ``[r, b, q, 4 g + t, j]``, fragment register
``p = 2 e + h``, half ``l``. So the 16 columns of a block scale belong to one lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_gemma4_spec.checkpoints import nvfp4

ROWS, COLUMNS = 16, 256  # of a block; N and K must be multiples


def pack(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Reorder one layer's weight.

    Args:
        weight: ``[N, K / 2]`` uint8, two E2M1 codes a byte, low nibble first, as ModelOpt writes them.
        weight_scale: ``[N, K / 16]`` float8_e4m3fn, without NaN, in linear order.

    Returns:
        Codes, ``[N / 16, K / 256, 4, 32, 4]`` int32, and scales, ``[N / 16, K / 256, 32, 8]`` uint8.
    """
    rows, columns = weight.shape[0], weight.shape[1] * 2
    scale_bytes = weight_scale.view(torch.uint8)
    # A scale of zero or below has no form of its own: its codes take the zero or the sign.
    keep = (scale_bytes & 0x7F != 0).to(torch.uint8) * 15
    flip = (scale_bytes >> 7) << 3
    codes = nvfp4.unpack(weight).view(rows, columns // nvfp4.BLOCK, nvfp4.BLOCK)
    codes = (codes ^ flip[:, :, None]) & keep[:, :, None]
    # [r, h, g, b, q, t, j, e, l] -> [r, b, q, g, t, j, e, h, l]
    codes = codes.view(rows // ROWS, 2, 8, columns // COLUMNS, 4, 4, 4, 2, 2).permute(0, 3, 4, 2, 5, 6, 7, 1, 8)
    words = torch.zeros(codes.shape[:6], dtype=torch.int32, device=weight.device)
    for e in range(2):
        for h in range(2):
            for half in range(2):
                words |= _placed(codes[..., e, h, half].int(), 2 * e + h) << (16 * half)
    table = torch.tensor([_scale_code(b) for b in range(128)], dtype=torch.uint8, device=weight.device)
    scales = table[(scale_bytes & 0x7F).long()]
    # [r, h, g, b, q, t] -> [r, b, g, t, q, h]
    scales = scales.view(rows // ROWS, 2, 8, columns // COLUMNS, 4, 4).permute(0, 3, 2, 5, 4, 1)
    shape = (rows // ROWS, columns // COLUMNS)
    return words.view(*shape, 4, 32, 4), scales.reshape(*shape, 32, 8).contiguous()


def _placed(code: Tensor, register: int) -> Tensor:
    """Bits of a code within its half of a word: registers 0 to 2 need one shift to decode, 3 takes what is left."""
    sign, magnitude = code >> 3, code & 7
    if register < 3:
        return (sign << 15 | magnitude << 6) >> (3 * register)
    return sign << 14 | (magnitude >> 2) << 13 | (magnitude & 3) << 10


def _scale_code(e4m3: int) -> int:
    """``(exponent + 10) << 3 | mantissa`` of a positive E4M3 value, subnormals normalized; 0 for zero."""
    exponent, mantissa = e4m3 >> 3, e4m3 & 7
    if exponent == 0:
        if mantissa == 0:
            return 0
        shift = 4 - mantissa.bit_length()
        exponent, mantissa = 1 - shift, (mantissa << shift) & 7
    return (exponent + 3) << 3 | mantissa
