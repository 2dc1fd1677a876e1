"""A stand-in for what torch.compile makes between the per-layer-input GEMMs."""

import triton
import triton.language as tl


@triton.jit
def gated(gate, by, out, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """gelu(gate) * by."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    v = tl.load(gate + at, mask, 0.0).to(tl.float32)
    b = tl.load(by + at, mask, 0.0).to(tl.float32)
    if not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    inner = 0.7978845608028654 * (v + 0.044715 * v * v * v)
    tl.store(out + at, v * tl.sigmoid(2.0 * inner) * b, mask)
