"""The kernel behind two GPUs' all-reduces: compiled for every card it is for, and run by two ranks on a CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_gemma4_spec.kernels import all_reduce_norm, cuda

EPS = 1e-6
COMPILER = shutil.which("g++")


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize(("width", "forms"), [(5376, (True, True, True)), (2560, (True, False, False))])
def test_the_kernel_compiles(capability: int, width: int, forms: tuple[bool, bool, bool]) -> None:
    try:
        architecture = cuda.architecture(capability)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"this PyTorch brings no NVRTC: {error}")
    assert b"all_reduce_norm" in cuda.compiled(all_reduce_norm.source(width, EPS, *forms), architecture)


def bits(*tensors: Tensor) -> bytes:
    return b"".join(t.contiguous().view(torch.int16).numpy().tobytes() for t in tensors)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("width", "scaled"), [(320, True), (512, False)])  # a warp with threads to spare; full ones
def test_two_ranks_add_their_rows(width: int, scaled: bool, tmp_path: Path) -> None:
    calls, rows = 8, 3
    kernel = tmp_path / "kernel.cu"
    kernel.write_text(
        all_reduce_norm.source(width, EPS, True, scaled, True).replace("#define ROWS 256", "#define ROWS 4")
    )
    program, host = tmp_path / "program", Path(__file__).with_name("all_reduce_on_host.cpp")
    define = [f'-DKERNEL="{kernel}"', f"-DWIDTH={width}"]
    subprocess.run(
        [str(COMPILER), "-std=c++20", "-O1", "-w", "-pthread", *define, str(host), "-o", str(program)], check=True
    )

    torch.manual_seed(1)
    weight, following = ((1 + 0.2 * torch.randn(width)).bfloat16() for _ in range(2))
    scale = torch.full((width,), 0.75).bfloat16()
    inputs = torch.randn(calls, 3, rows, width).bfloat16()
    inputs[:, 1:, :, ::7] = -0.0  # the bits of a word that has not arrived
    done = subprocess.run(
        [str(program), str(calls), str(rows)],
        input=bits(weight, following, scale, inputs),
        capture_output=True,
        check=True,
        timeout=60,
    )
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.int16).view(torch.bfloat16)
    found = found.view(2, calls, 2, rows, width)
    for call in range(calls):
        live = rows - call % 3
        residual, first, second = inputs[call, :, :live]
        total = (first.float() + second.float()).bfloat16()
        want = all_reduce_norm.reference(total, weight, residual, scale[:1] if scaled else None, following, EPS)
        for rank in range(2):
            for got, wanted in zip(found[rank, call], want, strict=True):
                torch.testing.assert_close(got[:live], wanted, atol=1e-2, rtol=1e-2)
    assert torch.equal(found[0], found[1])
