"""The CUDA kernel of small-batch NVFP4 GEMMs, run on the CPU as it stands, against W = E2M1 * scale * scale_2."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vllm_gemma4_spec.kernels import packing, small_batch_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import Launch

HERE = Path(__file__).parent
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GLOBAL_SCALE = 0.01


def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and every kind of block scale: subnormal, zero, negative, the largest."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scale = torch.randint(0, 256, (n, k // 16), dtype=torch.uint8)
    scale[(scale & 0x7F) == 0x7F] = 0x7E  # NaN is repaired before
    return codes, scale.view(torch.float8_e4m3fn)


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``[n, k]`` float64, without the global scale."""
    values = torch.cat([E2M1, -E2M1]).double()[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(1)
    return values * scale.double().repeat_interleave(16, dim=1)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernel for the CPU with")
    folder = tmp_path_factory.mktemp("rows")
    source = Path(str(resources.files("vllm_gemma4_spec.kernels").joinpath("nvfp4_rows.cu")))
    built: dict[tuple[int, bool, bool], ctypes.CDLL] = {}

    def get(tiles: int, gelu: bool, scaled: bool = False) -> ctypes.CDLL:
        if (tiles, gelu, scaled) not in built:
            out = folder / f"rows-{tiles}-{int(gelu)}-{int(scaled)}.so"
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
            macros = [
                f"-DMT={tiles}",
                f"-DGELU={int(gelu)}",
                f"-DSCALED={int(scaled)}",
                f'-DNVFP4_ROWS_SOURCE="{source}"',
            ]
            subprocess.run([compiler, *flags, *macros, str(HERE / "on_host.cpp"), "-o", str(out)], check=True)
            built[tiles, gelu, scaled] = ctypes.CDLL(str(out))
        return built[tiles, gelu, scaled]

    return get


def run(
    library: ctypes.CDLL,
    x: torch.Tensor,
    n: int,
    packed: Any,
    how: Launch,
    gelu: bool,
    pre: torch.Tensor | None = None,
) -> torch.Tensor:
    tiles = small_batch_gemm.tiles_for(len(x))
    y = torch.full((len(x), n // 2 if gelu else n), torch.nan, dtype=torch.bfloat16)
    scale = torch.tensor([GLOBAL_SCALE])
    partial = torch.full((how.parts * n * 8 * tiles,), torch.nan)
    arrivals = torch.zeros(n // 16, dtype=torch.int32)
    pointers = [
        ctypes.c_void_p(t.data_ptr()) for t in (*packed, x, x if pre is None else pre, y, scale, partial, arrivals)
    ]
    library.run(*pointers, len(x), n, x.shape[1], how.warps, how.split, how.parts)
    assert not arrivals.any()  # ready for the next GEMM
    return y


@pytest.mark.parametrize(
    ("tokens", "n", "k", "how", "gelu"),
    [
        (1, 64, 512, Launch(4, 1, 1), False),
        (5, 32, 768, Launch(2, 2, 1), False),
        (3, 32, 1024, Launch(2, 2, 2), False),
        (8, 32, 1280, Launch(2, 1, 4), False),  # parts of unequal length
        (1, 64, 512, Launch(4, 2, 1), True),
        (6, 64, 512, Launch(2, 1, 2), True),
        (11, 32, 256, Launch(2, 1, 1), False),
        (17, 64, 256, Launch(4, 1, 1), True),
        (61, 32, 256, Launch(2, 1, 1), False),
    ],
)
def test_the_kernel_gives_the_gemm(libraries: Any, tokens: int, n: int, k: int, how: Launch, gelu: bool) -> None:
    torch.manual_seed(tokens)
    codes, scale = weight(n, k)
    x = torch.randn(tokens, k).bfloat16()
    wanted = x.double() @ dequantized(codes, scale).T * GLOBAL_SCALE
    if gelu:
        gate, up = wanted.bfloat16().float().chunk(2, dim=-1)
        wanted = (F.gelu(gate, approximate="tanh") * up).double()
    got = run(libraries(small_batch_gemm.tiles_for(tokens), gelu), x, n, packing.pack(codes, scale), how, gelu).double()
    error = (got - wanted).norm() / wanted.norm()
    assert error < 4e-3, f"{error:.1e}"  # bfloat16's own rounding of the result


@pytest.mark.parametrize(("tokens", "how"), [(3, Launch(2, 2, 2)), (17, Launch(2, 1, 1))])
def test_the_input_is_multiplied_by_its_scale_as_a_tensor_would_be(libraries: Any, tokens: int, how: Launch) -> None:
    torch.manual_seed(tokens)
    codes, scale = weight(32, 1024)
    x, pre = torch.randn(tokens, 1024).bfloat16(), (torch.rand(1024) * 4 + 0.1).bfloat16()
    packed, tiles = packing.pack(codes, scale), small_batch_gemm.tiles_for(tokens)
    got = run(libraries(tiles, False, True), x, 32, packed, how, False, pre)
    assert torch.equal(got, run(libraries(tiles, False), x * pre, 32, packed, how, False))
    assert not torch.equal(got, run(libraries(tiles, False), x, 32, packed, how, False))


def test_wrong_scales_and_codes_are_noticed(libraries: Any) -> None:
    codes, scale = weight(32, 256)
    x = torch.randn(2, 256).bfloat16()
    wanted = x.double() @ dequantized(codes, scale).T * GLOBAL_SCALE
    swapped = (codes << 4) | (codes >> 4)

    def turned(axis: int) -> torch.Tensor:
        return scale.view(torch.uint8).flip(axis).view(torch.float8_e4m3fn)

    for bad in (packing.pack(swapped, scale), packing.pack(codes, turned(1)), packing.pack(codes, turned(0))):
        got = run(libraries(1, False), x, 32, bad, Launch(2, 1, 1), False).double()
        assert (got - wanted).norm() / wanted.norm() > 0.3


def test_every_scale_that_e4m3_has_is_exact(libraries: Any) -> None:
    """One column block per scale byte; x picks one column of each, so a product is a single weight."""
    every = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    every = torch.nn.functional.pad(every, (0, 256 - len(every))).view(torch.float8_e4m3fn)
    codes = torch.randint(0, 256, (32, 256 * 8), dtype=torch.uint8)
    scale = every.repeat(32, 1)
    w = dequantized(codes, scale)
    for column in (0, 7, 15):
        for first in range(0, 256, 64):
            x = torch.zeros(64, 4096)
            x[torch.arange(64), (first + torch.arange(64)) * 16 + column] = 1
            got = run(
                libraries(8, False),
                x.bfloat16(),
                32,
                packing.pack(codes, scale),
                Launch(2, 1, 1),
                False,
            )
            wanted = (x.double() @ w.T).float() * (torch.tensor(GLOBAL_SCALE) * 256) / 256
            torch.testing.assert_close(got.float(), wanted.bfloat16().float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_plan_covers_every_output_and_input_once(tiles: int, gelu: bool) -> None:
    for n, k in [(20480, 2560), (2560, 10240), (3072, 2560), (6144, 2560), (2560, 2048), (256, 2560), (2560, 256)]:
        for multiprocessors in (48, 132, 188):
            how = small_batch_gemm.plan(n, k, tiles, gelu, multiprocessors)
            assert how.warps % how.split == 0
            slots = how.warps // how.split
            assert (n // 16) % slots == 0
            assert slots % 2 == 0 or not gelu
            assert how.split * how.parts <= k // 256
            assert how.warps <= (8 if tiles == 8 else 16)
