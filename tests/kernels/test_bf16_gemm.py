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
from vllm_gemma4_spec.kernels.bf16_gemm import Form

assert _engine
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernel for the CPU with")
    folder, sources = tmp_path_factory.mktemp("bf16"), resources.files("vllm_gemma4_spec.kernels")
    built: dict[tuple[Form, bool], ctypes.CDLL] = {}

    def get(form: Form, gelu: bool) -> ctypes.CDLL:
        if (form, gelu) not in built:
            out = folder / f"bf16-{len(built)}.so"
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
            macros = [f"-D{name}={value}" for name, value in bf16_gemm.macros(form, gelu).items()]
            macros += [f'-D{name.upper()}_SOURCE="{sources / name}.cu"' for name in ("rows_device", "bf16_rows")]
            subprocess.run([compiler, *flags, *macros, str(HERE / "on_host.cpp"), "-o", str(out)], check=True)
            built[form, gelu] = ctypes.CDLL(str(out))
        return built[form, gelu]

    return get


def run(library: ctypes.CDLL, x: Tensor, weight: Tensor, gelu: bool, split: int) -> Tensor:
    (rows, k), n = x.shape, len(weight)
    y = torch.full((rows, n // 2 if gelu else n), torch.nan, dtype=torch.bfloat16)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, x, y)]
    library.run(*pointers, rows, n, k, split)
    return y


def exact(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    y = x.double() @ weight.double().T
    if not gelu:
        return y
    gate, up = y.bfloat16().double().chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def form_of(gelu: bool, pair: int, rows: int) -> Form:
    return bf16_gemm.form_for(bf16_gemm.WIDE if pair == 2 else 32, rows, gelu)


@pytest.mark.parametrize(
    ("rows", "n", "k", "gelu", "pair", "split"),
    [
        (1, 32, 256, False, 1, 1),  # two warps have work
        (5, 96, 768, False, 1, 2),  # warps with one and with two units; eight tiles a block, of which six are there
        (8, 32, 2048, False, 1, 8),
        (7, 32, 2816, False, 1, 4),  # eleven units for four warps
        (3, 32, 5376, False, 1, 16),
        (4, 32, 1024, False, 1, 16),  # fewer units than warps
        (16, 32, 1280, False, 1, 4),
        (9, 32, 512, False, 1, 2),
        (6, 96, 512, False, 2, 4),
        (12, 64, 1280, False, 2, 16),
        (1, 32, 256, True, 2, 2),
        (8, 96, 512, True, 2, 4),  # three pairs, four a block
        (13, 64, 768, True, 2, 8),
    ],
)
def test_the_kernel_multiplies(libraries: Any, rows: int, n: int, k: int, gelu: bool, pair: int, split: int) -> None:
    torch.manual_seed(rows + n)
    x, weight = torch.randn(rows, k).bfloat16(), (torch.randn(n, k) / k**0.5).bfloat16()
    library = libraries(form_of(gelu, pair, rows), gelu)
    y = run(library, x, weight, gelu, split)
    wanted = exact(x, weight, gelu)
    error = (y.double() - wanted).norm() / wanted.norm()
    assert error < 3e-3, f"{error:.1e}"
    alone = run(libraries(form_of(gelu, pair, 1), gelu), x[:1], weight, gelu, split)
    assert torch.equal(y[:1], alone) or rows > 8, "a row's bits depend on the rows beside it"


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
@pytest.mark.parametrize(
    ("n", "k", "gelu"),
    [
        (16384, 1024, False),  # 31B's assistant, a full layer's queries
        (1024, 16384, False),
        (16384, 1024, True),
        (1024, 10752, False),
        (5376, 1024, False),
        (1024, 2048, False),  # half of 26B's
        (256, 2048, False),  # E4B's assistant
        (4096, 256, True),
        (10752, 2560, False),  # E4B's per-layer inputs
    ],
)
def test_a_block_has_a_multiprocessor_and_every_warp_work(n: int, k: int, gelu: bool, rows: int) -> None:
    form = bf16_gemm.form_for(n, rows, gelu)
    split = bf16_gemm.split_for(n, k, form, 132)
    outputs, units = n // 16 // form.pair, k // (32 * form.chunks)
    assert form.warps % split == 0
    assert split <= units
    blocks = outputs * split / form.warps
    assert blocks <= 132 or split == 1
    assert split in (form.warps, 1) or split * 2 > units or blocks * 2 > 132, "more warps would run at once"
