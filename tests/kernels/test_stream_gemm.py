"""The CUDA kernel that streams Marlin's weights, run on the CPU as it stands, against W = E2M1 * scale * scale_2."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.test_small_batch_gemm import dequantized
from vllm_gemma4_spec.kernels import cuda, stream_gemm
from vllm_gemma4_spec.kernels.stream_gemm import Form

HERE = Path(__file__).parent
GLOBAL_SCALE = 0.01
SLOW = pytest.mark.slow


def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and positive block scales; where a scale is zero the codes are, as loading leaves them."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scale = (torch.rand(n, k // 16) * 400 + 0.1).to(torch.float8_e4m3fn)
    scale[::7, ::5] = 0
    codes.view(n, k // 16, 8)[::7, ::5] = 0
    return codes, scale


def marlin(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and global scale as vLLM's own functions hand them to Marlin."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_fp4
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights

    n, k = codes.shape[0], codes.shape[1] * 2
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).int()
    words = marlin_weights(nibbles.T.contiguous(), k, n, 4, get_weight_perm(4))
    permuted = marlin_utils.marlin_permute_scales(scale.T.contiguous().bfloat16(), k, n, 16)
    scales, factor = marlin_utils_fp4.nvfp4_marlin_process_scales(permuted, a_dtype=torch.bfloat16)
    shift = marlin_utils_fp4.nvfp4_marlin_process_global_scale(torch.tensor([GLOBAL_SCALE]), torch.bfloat16)
    return words, scales.view(torch.uint8), shift / factor


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernel for the CPU with")
    folder = tmp_path_factory.mktemp("stream")
    source = Path(str(resources.files("vllm_gemma4_spec.kernels").joinpath("nvfp4_stream.cu")))
    built: dict[Any, ctypes.CDLL] = {}

    def get(tiles: int, scaled: bool, form: Form, rank: int = 0, gelu: bool = False) -> ctypes.CDLL:
        key = (tiles, scaled, form, rank, gelu)
        if key not in built:
            out = folder / f"stream-{len(built)}.so"
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
            macros = [f"-D{k}={v}" for k, v in stream_gemm.macros(tiles, scaled, form, rank, gelu).items()]
            macros.append(f'-DNVFP4_STREAM_SOURCE="{source}"')
            subprocess.run([compiler, *flags, *macros, str(HERE / "stream_on_host.cpp"), "-o", str(out)], check=True)
            built[key] = ctypes.CDLL(str(out))
        return built[key]

    return get


FORM = Form(stages=3)
WGMMA = Form(stages=3, wgmma=True)


def run(
    get: Any,
    x: torch.Tensor,
    packed: Any,
    n: int,
    blocks: int,
    pre: torch.Tensor | None = None,
    form: Form = FORM,
    tiles: int | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    gelu: bool = False,
) -> torch.Tensor:
    tiles, k = tiles or stream_gemm.tiles_for(len(x)), x.shape[1]
    y = torch.full((len(x), n // 2 if gelu else n), torch.nan, dtype=torch.bfloat16)
    partial = torch.full((stream_gemm.parts(blocks, n, gelu) * tiles * 2048 + 1,), torch.nan)
    arrivals = torch.zeros(-(-n // 256) * 8, dtype=torch.int32)
    rank = low_rank[0].shape[0] if low_rank else 0
    branch = torch.full((stream_gemm.SLICES * tiles * 8 * max(rank, 1),), torch.nan)
    t, met = torch.full((len(x), max(rank, 1)), torch.nan).bfloat16(), torch.zeros(2, dtype=torch.int32)
    words, scales, shift = packed
    pointers = [
        ctypes.c_void_p(t.data_ptr())
        for t in (words, scales, x, x if pre is None else pre, y, shift, partial, arrivals)
    ]
    more = [ctypes.c_void_p(of.data_ptr()) for of in (*(low_rank or (x, x)), branch, t, met)]
    get(tiles, pre is not None, form, rank, gelu).run(*pointers, len(x), n, k, blocks, *more)
    assert partial[-1].isnan()  # nothing behind what is reserved
    assert not arrivals.any()  # ready for the next GEMM
    assert not met.any()
    return y


@pytest.mark.parametrize(
    ("rows", "n", "k", "blocks", "scaled", "form"),
    [
        (1, 512, 384, 4, False, FORM),  # shares end within tiles of outputs: two, then three parts
        (43, 512, 384, 3, False, WGMMA),  # the middle one of three blocks shares both tiles
        pytest.param(64, 512, 896, 5, False, WGMMA, marks=SLOW),
        pytest.param(61, 256, 1024, 8, False, WGMMA, marks=SLOW),  # eight parts
        pytest.param(61, 512, 640, 7, False, FORM, marks=SLOW),
        pytest.param(80, 512, 896, 5, False, Form(3, groups=1, wgmma=True), marks=SLOW),
        pytest.param(128, 256, 1024, 6, False, Form(3, groups=1, wgmma=True), marks=SLOW),
        pytest.param(9, 256, 1024, 8, False, WGMMA, marks=SLOW),
        pytest.param(5, 256, 512, 4, False, WGMMA, marks=SLOW),  # four parts of one tile
        pytest.param(13, 512, 128, 2, False, WGMMA, marks=SLOW),  # no parts
        (13, 256, 1280, 1, False, WGMMA),  # stages are filled again and again
        pytest.param(13, 256, 1280, 1, False, Form(2, groups=1, wgmma=True), marks=SLOW),
        (7, 320, 192, 3, True, FORM),  # the last tile and the last stage are not whole
        (7, 320, 192, 3, False, FORM),
        pytest.param(7, 320, 192, 3, False, WGMMA, marks=SLOW),
        pytest.param(61, 256, 256, 2, False, WGMMA, marks=SLOW),
        pytest.param(45, 320, 192, 3, False, WGMMA, marks=SLOW),
        pytest.param(11, 512, 896, 3, True, FORM, marks=SLOW),
        pytest.param(30, 320, 192, 3, True, FORM, marks=SLOW),
        pytest.param(50, 320, 192, 3, False, FORM, marks=SLOW),
        pytest.param(77, 256, 384, 3, False, Form(2, groups=1, wgmma=True), marks=SLOW),
        pytest.param(77, 320, 192, 3, False, Form(2, groups=1, wgmma=True, first=3, pace=0), marks=SLOW),
    ],
)
def test_the_kernel_gives_the_gemm(
    libraries: Any, rows: int, n: int, k: int, blocks: int, scaled: bool, form: Form
) -> None:
    torch.manual_seed(rows)
    codes, scale = weight(n, k)
    x = torch.randn(rows, k).bfloat16()
    pre = (torch.rand(k) + 0.5).bfloat16() if scaled else None
    wanted = (x if pre is None else x * pre).double() @ dequantized(codes, scale).T * GLOBAL_SCALE
    got = run(libraries, x, marlin(codes, scale), n, blocks, pre, form).double()
    error = (got - wanted).norm() / wanted.norm()
    assert error < 4e-3, f"{error:.1e}"  # bfloat16's own rounding of the result


def test_a_row_has_the_same_bits_whatever_stands_beside_it(libraries: Any) -> None:
    torch.manual_seed(0)
    codes, scale = weight(256, 384)
    x, packed = torch.randn(11, 384).bfloat16(), marlin(codes, scale)
    whole = run(libraries, x, packed, 256, 2)
    for rows in (1, 6):
        assert torch.equal(run(libraries, x[:rows].contiguous(), packed, 256, 2), whole[:rows]), rows


LARGE = Form(3, groups=1, wgmma=True)


@pytest.mark.parametrize(
    ("rows", "n", "k", "blocks", "form"),
    [
        (1, 512, 384, 2, FORM),  # a block each for gate and up
        (5, 1024, 384, 3, FORM),  # shares end within tiles; the middle one has the ends of two pairs
        pytest.param(1, 512, 384, 1, FORM, marks=SLOW),  # a pair of one block
        pytest.param(8, 512, 384, 3, FORM, marks=SLOW),  # three blocks
        (8, 1536, 192, 2, FORM),  # whole tiles and a whole pair within a share; the last stage is not whole
        pytest.param(8, 512, 1024, 12, FORM, marks=SLOW),  # as many parts as are loaded in two rounds
        (16, 1024, 384, 3, WGMMA),
        pytest.param(16, 1536, 192, 2, WGMMA, marks=SLOW),
        pytest.param(16, 512, 640, 5, WGMMA, marks=SLOW),
        pytest.param(33, 1024, 384, 3, WGMMA, marks=SLOW),
        (43, 1024, 384, 3, WGMMA),  # all blocks of a pair add up
        pytest.param(33, 1536, 192, 2, WGMMA, marks=SLOW),
        pytest.param(48, 512, 1024, 8, WGMMA, marks=SLOW),
        pytest.param(64, 1536, 192, 2, WGMMA, marks=SLOW),  # a pair that is one block's alone
        pytest.param(64, 1024, 448, 7, WGMMA, marks=SLOW),
        pytest.param(65, 1024, 384, 3, LARGE, marks=SLOW),
        pytest.param(80, 1536, 192, 2, LARGE, marks=SLOW),
        pytest.param(128, 512, 896, 7, LARGE, marks=SLOW),
        pytest.param(30, 1024, 384, 3, FORM, marks=SLOW),
        pytest.param(50, 1024, 384, 3, FORM, marks=SLOW),
    ],
)
def test_the_kernel_gives_the_activation(libraries: Any, rows: int, n: int, k: int, blocks: int, form: Form) -> None:
    torch.manual_seed(rows)
    codes, scale = weight(n, k)
    x = torch.randn(rows, k).bfloat16() * 0.05  # a gate of some units: beyond, gelu is the identity or zero
    gate, up = (x.double() @ dequantized(codes, scale).T * GLOBAL_SCALE).chunk(2, 1)
    wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up
    got = run(libraries, x, marlin(codes, scale), n, blocks, form=form, gelu=True).double()
    error = (got - wanted).norm() / wanted.norm()
    rounded = torch.nn.functional.gelu(gate.bfloat16().double(), approximate="tanh") * up.bfloat16().double()
    least = (rounded.bfloat16().double() - wanted).norm() / wanted.norm()
    assert error < 1.2 * least, f"{error:.1e} for {least:.1e}"
    assert least < 6e-3


@pytest.mark.parametrize(
    ("form", "tiles", "n", "blocks"),
    [
        (WGMMA, 2, 1024, 3),
        (WGMMA, 6, 1024, 3),
        pytest.param(WGMMA, 8, 1024, 3, marks=SLOW),
        pytest.param(WGMMA, 4, 1536, 2, marks=SLOW),
        pytest.param(WGMMA, 8, 1536, 2, marks=SLOW),
        pytest.param(WGMMA, 8, 512, 7, marks=SLOW),
        pytest.param(FORM, 4, 1024, 3, marks=SLOW),
        pytest.param(FORM, 8, 1024, 3, marks=SLOW),
    ],
)
def test_a_row_has_the_same_bits_with_an_activation(
    libraries: Any, form: Form, tiles: int, n: int, blocks: int
) -> None:
    torch.manual_seed(0)
    codes, scale = weight(n, 896)
    x, packed = torch.randn(tiles * 8, 896).bfloat16() * 0.05, marlin(codes, scale)
    whole = run(libraries, x, packed, n, blocks, form=form, tiles=tiles, gelu=True)
    for rows in (1, 5, 8):
        few = run(libraries, x[:rows].contiguous(), packed, n, blocks, gelu=True)
        assert torch.equal(few, whole[:rows]), rows


def test_no_two_parts_of_a_pair_share_memory() -> None:
    """A part lies where its block and its tile, added, say; of a pair they lie behind each other but for one gap."""
    for n, per_tile, blocks in ((512, 3, 1), (512, 3, 5), (1536, 2, 2), (1536, 7, 5), (43008, 42, 132), (2048, 1, 5)):
        tiles = n // 256
        units = tiles * per_tile
        ends = [units * b // blocks for b in range(blocks + 1)]
        at = [
            b + tile
            for b in range(blocks)
            for tile in range(ends[b] // per_tile, -(-ends[b + 1] // per_tile))
            if ends[b + 1] > ends[b]
        ]
        assert len(set(at)) == len(at)
        assert max(at) < stream_gemm.parts(blocks, n, gelu=True)


def branch(n: int, k: int, rank: int = stream_gemm.RANK) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(rank, k) * k**-0.5).bfloat16(), (torch.randn(n, rank) * k**0.5).bfloat16()


@pytest.mark.parametrize(
    ("rows", "n", "k", "blocks", "rank", "form"),
    [
        (3, 256, 384, 2, 32, FORM),
        pytest.param(7, 320, 192, 2, 32, FORM, marks=SLOW),  # the last tile and the last stage are not whole
        pytest.param(1, 256, 4224, 2, 32, FORM, marks=SLOW),  # three times 32 inputs a slice, the last one has fewer
        pytest.param(7, 512, 128, 2, 64, FORM, marks=SLOW),  # no parts
        pytest.param(3, 512, 384, 4, 32, FORM, marks=SLOW),  # two, then three parts
        pytest.param(13, 512, 384, 3, 32, WGMMA, marks=SLOW),
        pytest.param(45, 320, 192, 2, 32, WGMMA, marks=SLOW),
        pytest.param(30, 320, 192, 2, 32, FORM, marks=SLOW),
        pytest.param(77, 256, 384, 3, 32, Form(2, groups=1, wgmma=True), marks=SLOW),
    ],
)
def test_a_low_rank_branch_is_added(
    libraries: Any, rows: int, n: int, k: int, blocks: int, rank: int, form: Form
) -> None:
    torch.manual_seed(rows)
    codes, scale = weight(n, k)
    x, (a, b) = torch.randn(rows, k).bfloat16(), branch(n, k, rank)
    main = x.double() @ dequantized(codes, scale).T * GLOBAL_SCALE
    wanted = main + x.double() @ a.double().T @ b.double().T
    got = run(libraries, x, marlin(codes, scale), n, blocks, form=form, low_rank=(a, b)).double()
    error = (got - wanted).norm() / wanted.norm()
    before = main.bfloat16() + (x @ a.T) @ b.T
    assert error < (before.double() - wanted).norm() / wanted.norm(), f"{error:.1e}"
    assert (main - wanted).norm() > 20 * (got - wanted).norm()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "tiles"), [(FORM, 2), (WGMMA, 1), (WGMMA, 2), (WGMMA, 4), (WGMMA, 8)])
def test_a_row_has_the_same_bits_with_a_branch(libraries: Any, form: Form, tiles: int) -> None:
    torch.manual_seed(0)
    codes, scale = weight(512, 896)
    x, packed, low_rank = torch.randn(16, 896).bfloat16(), marlin(codes, scale), branch(512, 896)
    wanted = run(libraries, x[:3].contiguous(), packed, 512, 3, low_rank=low_rank)
    got = run(libraries, x[: tiles * 8].contiguous(), packed, 512, 3, form=form, tiles=tiles, low_rank=low_rank)
    assert torch.equal(got[:3], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "tiles", "scaled"),
    [
        (FORM, 2, False),
        (FORM, 2, True),
        (FORM, 4, False),
        (FORM, 4, True),
        (Form(6), 1, True),
        (WGMMA, 1, False),
        (WGMMA, 2, False),
        (WGMMA, 6, False),
        (WGMMA, 8, False),
    ],
)
def test_forms_of_64_rows_and_less_have_the_same_bits(libraries: Any, form: Form, tiles: int, scaled: bool) -> None:
    torch.manual_seed(0)
    codes, scale = weight(512, 896)
    x, packed = torch.randn(7, 896).bfloat16(), marlin(codes, scale)
    pre = (torch.rand(896) + 0.5).bfloat16() if scaled else None
    wanted = run(libraries, x if pre is None else x * pre, packed, 512, 3)
    assert torch.equal(run(libraries, x, packed, 512, 3, pre, form=form, tiles=tiles), wanted)


def test_what_wgmma_reads_is_multiplied_before_it(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernel for the CPU with")
    kernel = resources.files("vllm_gemma4_spec.kernels").joinpath("scaled_rows.cu")
    host = tmp_path / "scaled.cpp"
    host.write_text(
        f"""
        #include <cstring>
        #define __device__
        #define __global__
        #define __launch_bounds__(...)
        #define SCALED_ROWS_ON_HOST
        struct uint4 {{ unsigned x, y, z, w; }};
        static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {{ return {{x, y, z, w}}; }}
        static struct {{ int x; }} threadIdx, blockIdx;
        static float wide(unsigned bits) {{ float v; bits <<= 16; std::memcpy(&v, &bits, 4); return v; }}
        static unsigned product(unsigned a, unsigned b) {{
            float v = wide(a & 0xFFFF) * wide(b & 0xFFFF);
            unsigned bits;
            std::memcpy(&bits, &v, 4);
            return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        }}
        static unsigned times(unsigned a, unsigned b) {{ return product(a, b) | product(a >> 16, b >> 16) << 16; }}
        static void let_next_grid_start() {{}}
        static void wait_for_previous_grid() {{}}
        #include "{kernel}"
        extern "C" void run(const void* x, const void* by, void* y, int pieces, int per_row, int blocks) {{
            for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
                for (threadIdx.x = 0; threadIdx.x < 256; threadIdx.x++)
                    scaled_rows((const uint4*)x, (const uint4*)by, (uint4*)y, pieces, per_row);
        }}"""
    )
    library = tmp_path / "scaled.so"
    subprocess.run([compiler, "-O1", "-w", "-shared", "-fPIC", str(host), "-o", str(library)], check=True)
    x, by = torch.randn(3, 1088).bfloat16(), (torch.rand(1088) + 0.5).bfloat16()
    y = torch.full((4, 1088), torch.nan).bfloat16()
    run = ctypes.CDLL(str(library)).run
    run(*(ctypes.c_void_p(t.data_ptr()) for t in (x, by, y)), x.numel() // 8, 1088 // 8, 2)
    assert torch.equal(y[:3], x * by)
    assert y[3].isnan().all()


@pytest.mark.parametrize(("rows", "form", "inside"), [(8, 1, True), (9, 2, False), (80, 10, False)])
def test_the_gemm_multiplies_up_to_8_rows(monkeypatch: pytest.MonkeyPatch, rows: int, form: int, inside: bool) -> None:
    called: list[Any] = []
    x, pre = torch.ones(rows, 64).bfloat16(), torch.full((64,), 2.0).bfloat16()

    def kernel(*how: Any) -> Any:
        return lambda **given: called.append((*how, given["args"]))

    monkeypatch.setattr(stream_gemm, "forms", lambda: stream_gemm.WGMMA_FORMS)
    monkeypatch.setattr(cuda, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(stream_gemm, "kernel", kernel)
    monkeypatch.setattr(stream_gemm, "scaled_rows", lambda x, by: x * by)
    monkeypatch.setattr(stream_gemm.SCRATCH, "on", lambda _: (x, x))
    monkeypatch.setattr(stream_gemm.cuda, "weight_map", lambda *_: None)
    monkeypatch.setattr(stream_gemm.cuda, "recent_map", lambda address, *_: address)
    stream_gemm.stream_gemm(x, pre, pre, pre, pre, 256)
    ((tiles, scaled, _, _, _, args),) = called
    assert tiles == form
    assert scaled is (args[2] is x) is inside


@pytest.mark.parametrize(("invariant", "parts"), [(False, [[128], [65], [64]]), (True, [[64, 64], [64, 1], [64]])])
def test_batch_invariant_is_every_batch_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, invariant: bool, parts: list[list[int]]
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(invariant)))
    monkeypatch.setattr(stream_gemm, "forms", lambda: stream_gemm.WGMMA_FORMS)
    monkeypatch.setattr(stream_gemm.chosen_rows, "chosen", lambda *_: 0b1000)
    monkeypatch.setattr(stream_gemm, "_maker", lambda _: "")
    layer: Any = SimpleNamespace(output_size_per_partition=4, input_size_per_partition=4)
    assert stream_gemm.faster(layer) == (stream_gemm.ALL if invariant else 0b1000)
    for rows, expected in zip((128, 65, 64), parts, strict=True):
        seen: list[int] = []
        monkeypatch.setattr(stream_gemm, "stream_gemm", lambda x, *_, seen=seen: seen.append(len(x)) or x * 2)
        x = torch.randn(rows, 4)
        nothing = torch.ones(1)
        assert torch.equal(stream_gemm.linear(x, None, nothing, nothing, nothing, nothing, 4, stream_gemm.ALL), x * 2)
        assert seen == expected


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A daemon of CUDA MPS seems to run."""
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    cuda.beside_others.cache_clear()
    yield
    cuda.beside_others.cache_clear()


@pytest.mark.usefixtures("mps")
def test_blocks_do_not_wait_for_each_other_beside_others(monkeypatch: pytest.MonkeyPatch, libraries: Any) -> None:
    """Two engines' grids, each on half of the card, would wait for ever. The sums' bits are the same."""
    assert {stream_gemm.macros(t, False, form)["SPREAD"] for t, form in stream_gemm.WGMMA_FORMS.items()} == {0}
    said: list[str] = []
    monkeypatch.setattr(stream_gemm, "compile_forms", lambda *_: None)
    monkeypatch.setattr(stream_gemm.logger, "info", lambda text, *values: said.append(text % values))
    stream_gemm.branch_available.cache_clear()
    try:
        assert not stream_gemm.branch_available(stream_gemm.RANK, torch.bfloat16)
    finally:
        stream_gemm.branch_available.cache_clear()
    assert "MPS" in said[0]
    torch.manual_seed(0)
    codes, scale = weight(512, 384)
    x, packed = torch.randn(43, 384).bfloat16(), marlin(codes, scale)
    deep = Form(4, wgmma=True)  # another ring than elsewhere: a library of its own
    for gelu in (False, True):
        found = run(libraries, x, packed, 512, 3, form=deep, gelu=gelu)
        assert torch.equal(found[:7], run(libraries, x[:7].contiguous(), packed, 512, 3, gelu=gelu))


def test_without_mps_they_do() -> None:
    assert [t for t, form in stream_gemm.WGMMA_FORMS.items() if stream_gemm.spreads(t, form)] == [6, 8, 10, 16]
    assert not any(stream_gemm.spreads(t, form) for t, form in stream_gemm.MMA_FORMS.items())


@pytest.mark.parametrize(
    ("rank", "dtype", "says"),
    [(16, torch.bfloat16, "rank 32"), (32, torch.float16, "bfloat16"), (32, torch.bfloat16, "no card")],
)
def test_a_branch_that_the_kernel_does_not_take_stays_outside(
    monkeypatch: pytest.MonkeyPatch, rank: int, dtype: torch.dtype, says: str
) -> None:
    said: list[str] = []

    def refuses(*_: Any) -> None:
        raise RuntimeError("no card\nand more")

    monkeypatch.setattr(stream_gemm, "compile_forms", refuses)
    monkeypatch.setattr(stream_gemm.logger, "info", lambda text, *values: said.append(text % values))
    stream_gemm.branch_available.cache_clear()
    try:
        assert not stream_gemm.branch_available(rank, dtype)
        assert not stream_gemm.branch_available(rank, dtype)
    finally:
        stream_gemm.branch_available.cache_clear()
    assert len(said) == 1
    assert says in said[0]
    assert "\n" not in said[0]


def test_an_activation_that_does_not_compile_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refuses(*_: Any, gelu: bool) -> None:
        raise RuntimeError("no card\nand more")

    monkeypatch.setattr(stream_gemm, "compile_forms", refuses)
    monkeypatch.setattr(stream_gemm.logger, "info", lambda text, *values: said.append(text % values))
    stream_gemm.gelu_available.cache_clear()
    try:
        assert not stream_gemm.gelu_available()
        assert not stream_gemm.gelu_available()
    finally:
        stream_gemm.gelu_available.cache_clear()
    assert said == ["Activations stay out of the NVFP4 GEMM: no card"]


def test_every_batch_of_a_fused_layer_has_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

    torch.manual_seed(0)
    x, w = torch.randn(2, 40, 64), torch.randn(1024, 64)
    gate, up = (x @ w.T).chunk(2, -1)
    streamed: list[bool] = []

    def activation(out: torch.Tensor, y: torch.Tensor) -> None:
        out.copy_(torch.nn.functional.gelu(y[:, :512], approximate="tanh") * y[:, 512:])

    def streams(part: torch.Tensor, *how: Any) -> torch.Tensor:
        streamed.append(how[-1])
        out = part.new_empty(len(part), 512)
        activation(out, part @ w.T)
        return out

    monkeypatch.setattr(marlin_utils_fp4, "apply_fp4_marlin_linear", lambda flat, *_: flat @ w.T)
    monkeypatch.setattr(torch.ops._C, "gelu_tanh_and_mul", activation, raising=False)
    monkeypatch.setattr(stream_gemm, "forms", lambda: stream_gemm.WGMMA_FORMS)
    monkeypatch.setattr(stream_gemm, "stream_gemm", streams)
    nothing = torch.ones(1)
    stream_gemm.register_operator()
    operator = torch.ops.vllm.gemma4_spec_stream_linear
    for mask, count in ((0, 0), (stream_gemm.ALL, 1)):
        y = operator(x, None, nothing, nothing, nothing, nothing, 1024, mask, None, None, True)
        torch.testing.assert_close(y, torch.nn.functional.gelu(gate, approximate="tanh") * up)
        assert streamed == [True] * count
    given = (x, None, nothing, nothing, nothing, nothing, 1024, 0)
    assert stream_gemm._linear_shape(*given, None, None, True).shape == y.shape
    assert stream_gemm._linear_shape(*given).shape == (2, 40, 1024)


def test_halves_of_whole_tiles() -> None:
    shapes = {43008: True, 21504: True, 10752: True, 5376: False, 4224: False, 20480: True, 512: True, 256: False}
    assert {n: stream_gemm.halves_are_tiles(n) for n in shapes} == shapes


def test_a_batch_on_marlin_has_its_branch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

    torch.manual_seed(0)
    x, w, (a, b) = torch.randn(2, 200, 64), torch.randn(128, 64), (torch.randn(32, 64), torch.randn(128, 32))
    monkeypatch.setattr(marlin_utils_fp4, "apply_fp4_marlin_linear", lambda flat, *_: flat @ w.T)
    monkeypatch.setattr(stream_gemm, "forms", lambda: stream_gemm.WGMMA_FORMS)
    nothing = torch.ones(1)
    stream_gemm.register_operator()
    for streamed in (0, stream_gemm.ALL):  # 400 rows
        operator = torch.ops.vllm.gemma4_spec_stream_linear
        y = operator(x, None, nothing, nothing, nothing, nothing, 128, streamed, a, b)
        torch.testing.assert_close(y, x @ w.T + x @ a.T @ b.T, atol=1e-3, rtol=1e-4)


def test_every_form_is_measured_against_marlin(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = stream_gemm.WGMMA_FORMS
    monkeypatch.setattr(stream_gemm, "forms", lambda: forms)
    assert all(stream_gemm.ALL >> stream_gemm._form(rows) & 1 for rows in range(1, stream_gemm.MOST_ROWS + 1))
    assert all(stream_gemm.tiles_for(rows) * 8 <= stream_gemm.SAME_BITS for rows in range(1, 65))
