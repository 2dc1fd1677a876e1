"""NVFP4 as ModelOpt writes it: decode, encode, find and repair block scales that are NaN.

    W[n, k] = E2M1[code[n, k]] * (float32(weight_scale[n, k // 16]) * weight_scale_2)

``weight`` is uint8 [N, K/2] with the even column in the low nibble; ``weight_scale`` is float8_e4m3fn
[N, K/16] in linear order; ``weight_scale_2`` is a float32 scalar that multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_gemma4_spec.checkpoints import BLOCK as BLOCK

SCALE_MAX = 448.0  # largest finite float8_e4m3fn
CODE_MAX = 6.0  # largest E2M1 value

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbours of E2M1's positive half
_LOST = 0x77  # both nibbles 7: what dividing by a NaN scale leaves


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> codes uint8 [..., K], even column from the low nibble."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 [..., K] -> uint8 [..., K/2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``E2M1 * weight_scale`` without ``weight_scale_2``: exact in bfloat16 (6 significant bits).

    ``packed`` uint8 [..., K/2], ``scale`` float8_e4m3fn [..., K/16] -> ``dtype`` [..., K].
    """
    table = torch.tensor(E2M1, dtype=dtype, device=packed.device)
    values = table[unpack(packed).int()].unflatten(-1, (-1, BLOCK))
    return (values * scale.to(dtype).unsqueeze(-1)).flatten(-2)


def dequantize(packed: Tensor, scale: Tensor, scale_2: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, computed in float32 as ModelOpt's own decoder does, then cast. [..., K].

    ``scale_2`` is broadcast over the leading dimensions (scalar, or [E] for stacked experts).
    """
    table = torch.tensor(E2M1, dtype=torch.float32, device=packed.device)
    values = table[unpack(packed).int()].unflatten(-1, (-1, BLOCK))
    lead = scale_2.float().reshape(scale_2.shape + (1,) * (scale.dim() - scale_2.dim()))
    return (values * (scale.float() * lead).unsqueeze(-1)).flatten(-2).to(dtype)


def block_scale(weight: Tensor, scale_2: Tensor) -> Tensor:
    """float8_e4m3fn [..., K/16], saturated: the clamp that ModelOpt lacks before 0.45."""
    amax = weight.float().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    scale = amax / (CODE_MAX * scale_2.float())
    scale[scale == 0] = 1.0  # ModelOpt's choice for blocks of zeros
    return scale.nan_to_num(nan=1.0).clamp(max=SCALE_MAX).to(torch.float8_e4m3fn)


def encode(weight: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Packed codes for given scales, rounded to nearest, ties to even, as ModelOpt rounds. uint8 [..., K/2].

    Computed in the dtype that ModelOpt divides in: ``weight``'s, promoted by the float32 scale.
    """
    scaled = weight.unflatten(-1, (-1, BLOCK)) / (scale.float() * scale_2.float()).unsqueeze(-1)
    scaled = scaled.flatten(-2)
    bounds = torch.tensor(_BOUNDS, dtype=torch.float32, device=weight.device)
    size = scaled.abs().float()
    code = torch.searchsorted(bounds, size.contiguous(), out_int32=True).to(torch.uint8)
    code += torch.isin(size, bounds[1::2]).to(torch.uint8)  # a tie above an odd code goes up
    return pack(code | ((scaled < 0).to(torch.uint8) << 3))


@dataclass(frozen=True)
class NanBlocks:
    """NaN block scales of one tensor.

    ``index`` int64 [n, scale.dim()] names the blocks; ``destroyed`` bool [n] says whether the nibbles
    are gone too (all sixteen are 7).
    """

    index: Tensor
    destroyed: Tensor

    @property
    def count(self) -> int:
        return self.index.shape[0]

    @property
    def lost(self) -> int:
        return int(self.destroyed.sum())


def survey(scale: Tensor) -> tuple[bool, bool]:
    """Whether any block scale is NaN, and whether any is negative, in one pass over the bytes.

    Read as int8, 0x7F is the maximum, 127. Scales are written positive, so a negative byte is rare and
    only then is 0xFF looked for.
    """
    if scale.numel() == 0:
        return False, False
    low, high = torch.stack(torch.aminmax(scale.view(torch.int8))).tolist()  # one wait for the device
    negative = low < 0
    return high == 127 or (negative and bool((scale.view(torch.uint8) == 0xFF).any())), negative


def has_nan(scale: Tensor) -> bool:
    return survey(scale)[0]


def find_nan(packed: Tensor, scale: Tensor) -> NanBlocks:
    """Every NaN block of a weight uint8 [..., N, K/2] with scales float8_e4m3fn [..., N, K/16]."""
    sizes = scale.view(torch.uint8) & 0x7F
    rows = (sizes.amax(-1) == 0x7F).nonzero()  # few, and finding places is what takes time
    inside = (sizes[tuple(rows.T)] == 0x7F).nonzero()
    index = torch.cat((rows[inside[:, 0]], inside[:, 1:]), -1)
    blocks = packed.unflatten(-1, (-1, BLOCK // 2))[tuple(index.T)]  # [n, 8]
    return NanBlocks(index, (blocks == _LOST).all(-1))


def repair_(scale: Tensor, found: NanBlocks) -> None:
    """The blind repair, in place: intact nibbles get 448 with the NaN's sign, destroyed ones scale 0.

    Zero is the best that can be done without the parent: size and sign of the weights are gone, and a
    scale of 448 on sixteen sevens is two to four times worse (relative block error 2.3 to 3.6).
    """
    codes = scale.view(torch.uint8)
    where = tuple(found.index.T)
    saturated = codes[where] - 1  # 0x7F -> 0x7E (448), 0xFF -> 0xFE (-448)
    codes[where] = torch.where(found.destroyed, torch.zeros_like(saturated), saturated)


def make_positive_(packed: Tensor, scale: Tensor) -> None:
    """Move the sign of negative block scales into their codes, in place: the same weights.

    Marlin reads block scales as unsigned.
    """
    codes = scale.view(torch.uint8)
    where = tuple((codes & 0x80).nonzero().T)
    blocks = packed.unflatten(-1, (-1, BLOCK // 2))  # a view
    blocks[where] = blocks[where] ^ 0x88
    codes[where] = codes[where] & 0x7F


def clear_zero_(packed: Tensor, scale: Tensor) -> None:
    """Codes of blocks whose scale is zero become zero, in place: the same weights.

    ``nvfp4_stream.cu`` reads a scale of zero as the smallest one.
    """
    codes = scale.view(torch.uint8)
    if codes.numel() == 0 or int(codes.min()) > 0:
        return
    blocks = packed.unflatten(-1, (-1, BLOCK // 2))  # a view
    blocks[tuple((codes == 0).nonzero().T)] = 0


def narrow_(packed: Tensor, scale: Tensor) -> None:
    """Bring positive block scales into the range that Marlin's can have in bfloat16, in place.

    vLLM multiplies all scales of a tensor by a power of two until the smallest is 1/64, and stores 128 times that
    as a float16's upper byte, which overflows above 480: a 448 beside a 1/512 is lost. So blocks whose scale is
    too small for the largest are rounded to codes of the smallest scale that fits. Their weights are below
    1/20,000 of the tensor's largest.
    """
    codes = scale.view(torch.uint8)
    # Codes of positive scales are in the order of their values; 0 becomes 255 in the second term.
    top, least = torch.stack([codes.max(), (codes - 1).min()]).cpu()
    largest = top.view(torch.float8_e4m3fn).float()
    factor = 2 ** torch.floor(torch.log2(480 / largest.clamp(min=1))).clamp(max=8)
    floor = (1 / (64 * factor)).to(torch.float8_e4m3fn)
    if int(least) + 1 >= int(floor.view(torch.uint8)):
        return
    floor = floor.to(scale.device)
    where = tuple(((codes > 0) & (codes < floor.view(torch.uint8))).nonzero().T)
    blocks = packed.unflatten(-1, (-1, BLOCK // 2))  # a view
    small = codes[where].view(torch.float8_e4m3fn).unsqueeze(-1)  # [n, 1]
    wanted = decode(blocks[where], small)
    raised = floor.expand(small.shape)
    blocks[where] = encode(wanted, raised, torch.ones((), device=scale.device))
    codes[where] = floor.view(torch.uint8)
