"""``bf16_rows.cu`` on a CPU, a thread per CUDA thread; which weights it takes, how it is launched, and the operator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import engine as _engine  # sets the environment
from vllm_gemma4_spec.kernels import bf16_gemm
from vllm_gemma4_spec.kernels.bf16_gemm import Launch

assert _engine
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernel for the CPU with")
    folder, sources = tmp_path_factory.mktemp("bf16"), resources.files("vllm_gemma4_spec.kernels")
    built: dict[tuple[int, bool], ctypes.CDLL] = {}

    def get(tiles: int, gelu: bool) -> ctypes.CDLL:
        if (tiles, gelu) not in built:
            out = folder / f"bf16-{tiles}-{int(gelu)}.so"
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
            macros = [f"-D{name}={value}" for name, value in bf16_gemm.macros(tiles, gelu).items()]
            macros += [f'-D{name.upper()}_SOURCE="{sources / name}.cu"' for name in ("rows_device", "bf16_rows")]
            subprocess.run([compiler, *flags, *macros, str(HERE / "on_host.cpp"), "-o", str(out)], check=True)
            built[tiles, gelu] = ctypes.CDLL(str(out))
        return built[tiles, gelu]

    return get


def run(library: ctypes.CDLL, x: Tensor, weight: Tensor, gelu: bool, how: Launch) -> Tensor:
    (rows, k), n = x.shape, len(weight)
    y = torch.full((rows, n // 2 if gelu else n), torch.nan, dtype=torch.bfloat16)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, x, y)]
    library.run(*pointers, rows, n, k, how.split, how.parts)
    return y


def exact(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    y = x.double() @ weight.double().T
    if not gelu:
        return y
    gate, up = y.bfloat16().double().chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize(
    ("rows", "n", "k", "gelu", "how"),
    [
        (1, 16, 256, False, Launch(1, 1)),  # one warp has work
        (5, 48, 768, False, Launch(2, 1)),  # warps with one and with two units; four tiles of which three are there
        (8, 32, 2048, False, Launch(8, 1)),
        (7, 32, 2816, False, Launch(4, 2)),  # eleven units for eight warps of two blocks
        (3, 16, 5376, False, Launch(8, 4)),  # fewer units than warps
        (16, 32, 1280, False, Launch(4, 2)),
        (9, 16, 512, False, Launch(2, 1)),
        (32, 32, 512, False, Launch(2, 2)),
        (1, 32, 256, True, Launch(2, 1)),
        (8, 96, 512, True, Launch(4, 1)),  # three pairs, two a block
        (13, 64, 768, True, Launch(2, 2)),
        (25, 64, 512, True, Launch(4, 1)),
    ],
)
def test_the_kernel_multiplies(libraries: Any, rows: int, n: int, k: int, gelu: bool, how: Launch) -> None:
    torch.manual_seed(rows + n)
    x, weight = torch.randn(rows, k).bfloat16(), (torch.randn(n, k) / k**0.5).bfloat16()
    tiles = next(t for t in bf16_gemm.TILES if rows <= 8 * t)
    y = run(libraries(tiles, gelu), x, weight, gelu, how)
    wanted = exact(x, weight, gelu)
    error = (y.double() - wanted).norm() / wanted.norm()
    assert error < 3e-3, f"{error:.1e}"
    assert torch.equal(y, run(libraries(tiles, gelu), x, weight, gelu, how)), "another result the second time"
