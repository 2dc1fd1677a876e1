"""Block scales as vLLM stores them for Marlin: what it cannot hold is brought into range first, weights kept.

Run on vLLM's own conversion, which is plain torch; the kernel itself: ``tests/gpu/test_nvfp4_layers.py``.
"""

from __future__ import annotations

import pytest
import torch

from tests.support import engine as _engine
from vllm_gemma4_spec.checkpoints import nvfp4

assert _engine


def stored(scale: torch.Tensor) -> torch.Tensor:
    """Block scales [N, 4 B] as Marlin reads them: the upper byte of a float16 without its sign, over vLLM's factor."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import nvfp4_marlin_process_scales

    raw, factor = nvfp4_marlin_process_scales(scale.to(torch.bfloat16), a_dtype=torch.bfloat16)
    value = (raw.view(torch.uint8).int() << 7).to(torch.int16).view(torch.float16).float() / (128 * factor)
    return value.view(-1, 4)[:, [0, 2, 1, 3]].view(scale.shape)  # its own inverse


def layer(*codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed weights uint8 [4, 128] with these four block scales, as bytes, among others."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (4, 128), generator=generator, dtype=torch.uint8)
    scale = torch.randint(0x30, 0x38, (4, 16), generator=generator, dtype=torch.uint8)
    scale[0, : len(codes)] = torch.tensor(codes, dtype=torch.uint8)
    return packed, scale.view(torch.float8_e4m3fn)


def test_vllm_alone_overflows() -> None:
    """448 beside 2 ** -9: the largest weights of the tensor are gone."""
    _, scale = layer(0x7E, 0x01)
    assert stored(scale)[0, 0].isinf()


@pytest.mark.parametrize("top", range(0x38, 0x7F))
def test_every_pair_of_scales_is_held(top: int) -> None:
    one = torch.ones(())
    for small in (0x00, 0x01, 0x02, 0x03, 0x05, 0x07, 0x08, 0x0F):
        packed, scale = layer(top, small)
        before = nvfp4.dequantize(packed, scale, one)
        nvfp4.narrow_(packed, scale)
        assert torch.equal(stored(scale), scale.float())
        after = nvfp4.dequantize(packed, scale, one)
        changed = (after - before).abs()
        assert changed.max() <= before.abs().max() / 20_000
        assert changed.view(4, -1, 16)[:, 2:].max() == 0  # no other block is touched


def test_what_fits_is_left_alone() -> None:
    packed, scale = layer(0x7E, 0x08, 0x00)  # 448, 1/64, 0
    kept = packed.clone(), scale.clone()
    nvfp4.narrow_(packed, scale)
    assert torch.equal(packed, kept[0])
    assert torch.equal(scale.view(torch.uint8), kept[1].view(torch.uint8))


def test_a_negative_scale_moves_its_sign_into_the_codes() -> None:
    """The repair of 0xFF is -448, which Marlin would read as +448."""
    one = torch.ones(())
    packed, scale = layer(0xFE, 0x7E, 0x80)
    before = nvfp4.dequantize(packed, scale, one)
    nvfp4.make_positive_(packed, scale)
    assert torch.equal(nvfp4.dequantize(packed, scale, one), before)
    assert not (scale.view(torch.uint8) & 0x80).any()


def test_experts_are_narrowed_together() -> None:
    """vLLM takes one factor for all experts of a layer."""
    packed, scale = (torch.stack(pair) for pair in zip(layer(0x7E), layer(0x01), strict=True))
    nvfp4.narrow_(packed, scale)
    assert torch.equal(stored(scale.flatten(0, 1)), scale.flatten(0, 1).float())
