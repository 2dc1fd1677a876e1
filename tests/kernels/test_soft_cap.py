"""Why the soft cap's bits do not depend on whose tanh it is; the kernel itself: ``tests/gpu/test_kernels.py``."""

from __future__ import annotations

import torch

SMALL = 2.0**-10  # below it the kernel takes a value for its tanh


def positive() -> torch.Tensor:
    """All finite bfloat16 values above 0, in float64."""
    values = torch.arange(1, 0x7F80).to(torch.int16).view(torch.bfloat16)
    assert bool(values.isfinite().all())
    return values.double()


def test_no_tanh_lies_near_where_its_rounding_changes() -> None:
    """In units of float32's last place; CUDA's tanh, which Triton links, is wrong by two at most (its guide)."""
    values = positive()
    tanh = values[values >= SMALL].tanh()
    exponent = torch.frexp(tanh).exponent
    steps = torch.ldexp(tanh, 8 - exponent)  # in steps of bfloat16's last place
    far = (steps - steps.floor() - 0.5).abs() * 2**16
    assert far.min() > 100


def test_a_small_values_tanh_rounds_to_it() -> None:
    values = positive()
    small = values[values < SMALL]
    assert torch.equal(small.tanh().bfloat16(), small.bfloat16())
    assert len(small) > 14_000
