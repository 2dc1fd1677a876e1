"""The CUDA kernel of small-batch NVFP4 GEMMs, run on the CPU as it stands, against W = E2M1 * scale * scale_2."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vllm_gemma4_spec.kernels import chosen_rows, packing, small_batch_gemm, stream_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import Form, Launch

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
    sources = resources.files("vllm_gemma4_spec.kernels")
    built: dict[tuple[Form, int, bool], ctypes.CDLL] = {}

    def get(form: Form, gelu: int, scaled: bool = False) -> ctypes.CDLL:
        if (form, gelu, scaled) not in built:
            out = folder / f"rows-{form}-{int(form.roll)}-{int(gelu)}-{int(scaled)}.so"
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
            macros = [f"-D{name}={value}" for name, value in small_batch_gemm.macros(form, gelu, scaled).items()]
            macros += [f'-D{name.upper()}_SOURCE="{sources / name}.cu"' for name in ("rows_device", "nvfp4_rows")]
            subprocess.run([compiler, *flags, *macros, str(HERE / "on_host.cpp"), "-o", str(out)], check=True)
            built[form, gelu, scaled] = ctypes.CDLL(str(out))
        return built[form, gelu, scaled]

    return get


def run(
    libraries: Any,
    form: Form,
    x: torch.Tensor,
    n: int,
    packed: Any,
    how: Launch,
    gelu: bool = False,
    pre: torch.Tensor | None = None,
    by: torch.Tensor | None = None,
) -> torch.Tensor:
    y = torch.full((len(x), n // 2 if gelu else n), torch.nan, dtype=torch.bfloat16)
    scale, chunks = torch.tensor([GLOBAL_SCALE]), form.chunks(len(x))
    partial = torch.full((how.parts * n * form.rows * chunks,), torch.nan)
    arrivals = torch.zeros(n // 16 * chunks, dtype=torch.int32)
    pointers = [
        ctypes.c_void_p(t.data_ptr()) for t in (*packed, x, x if pre is None else pre, y, scale, partial, arrivals)
    ]
    library = libraries(form, int(gelu) if by is None else 2, pre is not None)
    factor = x if by is None else by
    shape = (len(x), n, x.shape[1], how.warps, how.split, how.parts)
    library.run(*pointers, *shape, ctypes.c_void_p(factor.data_ptr()), factor.stride(0))
    assert not arrivals.any()  # ready for the next GEMM
    return y


@pytest.mark.parametrize(
    ("tokens", "form", "n", "k", "how", "gelu"),
    [
        (1, Form(1), 64, 512, Launch(4, 1, 1), False),
        (5, Form(1), 32, 768, Launch(2, 2, 1), False),
        (3, Form(1), 32, 1024, Launch(2, 2, 2), False),
        (8, Form(1), 32, 1280, Launch(2, 1, 4), False),  # parts of unequal length
        (1, Form(1), 64, 512, Launch(4, 2, 1), True),
        (6, Form(1), 64, 512, Launch(2, 1, 2), True),
        (11, Form(2), 32, 256, Launch(2, 1, 1), False),
        (17, Form(3), 64, 256, Launch(4, 1, 1), True),
        (61, Form(8), 32, 256, Launch(2, 1, 1), False),
        # Chunks of rows, the last one whole or not.
        (16, Form(1), 64, 256, Launch(2, 1, 1), False),
        (33, Form(2), 32, 512, Launch(2, 2, 1), False),
        (27, Form(2), 64, 512, Launch(2, 1, 2), True),
        (80, Form(2), 32, 512, Launch(2, 1, 2), False),
        (128, Form(8), 32, 256, Launch(2, 1, 1), False),
        # Two tiles of outputs a warp.
        (5, Form(1, 2, roll=True), 64, 1024, Launch(2, 1, 1), False),
        (20, Form(3, 2), 64, 768, Launch(2, 2, 1), True),
        (77, Form(5, 2, roll=True, fit=3), 64, 512, Launch(2, 1, 2), True),
        (50, Form(4, 2), 64, 1024, Launch(4, 2, 2), False),
        # x of 64 inputs at once.
        (5, Form(1, whole=True), 64, 768, Launch(4, 2, 1), True),
    ],
)
def test_the_kernel_gives_the_gemm(
    libraries: Any, tokens: int, form: Form, n: int, k: int, how: Launch, gelu: bool
) -> None:
    torch.manual_seed(tokens)
    codes, scale = weight(n, k)
    x = torch.randn(tokens, k).bfloat16()
    wanted = x.double() @ dequantized(codes, scale).T * GLOBAL_SCALE
    if gelu:
        gate, up = wanted.bfloat16().float().chunk(2, dim=-1)
        wanted = (F.gelu(gate, approximate="tanh") * up).double()
    got = run(libraries, form, x, n, packing.pack(codes, scale), how, gelu).double()
    error = (got - wanted).norm() / wanted.norm()
    assert error < 4e-3, f"{error:.1e}"  # bfloat16's own rounding of the result


@pytest.mark.parametrize(("tokens", "form"), [(5, Form(1)), (19, Form(2))])
def test_the_kernel_multiplies_the_activation(libraries: Any, tokens: int, form: Form) -> None:
    torch.manual_seed(tokens)
    codes, scale = weight(64, 512)
    x, by = torch.randn(tokens, 512).bfloat16(), torch.randn(tokens, 3, 64).bfloat16()[:, 1]
    wanted = (x.double() @ dequantized(codes, scale).T * GLOBAL_SCALE).bfloat16().float()
    wanted = F.gelu(wanted, approximate="tanh") * by.float()
    got = run(libraries, form, x, 64, packing.pack(codes, scale), Launch(4, 2, 1), by=by)
    error = (got.float() - wanted).norm() / wanted.norm()
    assert error < 4e-3, f"{error:.1e}"


@pytest.mark.parametrize(("tokens", "how"), [(3, Launch(2, 2, 2)), (17, Launch(2, 1, 1))])
def test_the_input_is_multiplied_by_its_scale_as_a_tensor_would_be(libraries: Any, tokens: int, how: Launch) -> None:
    torch.manual_seed(tokens)
    codes, scale = weight(32, 1024)
    x, pre = torch.randn(tokens, 1024).bfloat16(), (torch.rand(1024) * 4 + 0.1).bfloat16()
    packed, form = packing.pack(codes, scale), small_batch_gemm.candidates(32, 1024, False, True, tokens)[0]
    got = run(libraries, form, x, 32, packed, how, pre=pre)
    assert torch.equal(got, run(libraries, form, x * pre, 32, packed, how))
    assert not torch.equal(got, run(libraries, form, x, 32, packed, how))


def test_wrong_scales_and_codes_are_noticed(libraries: Any) -> None:
    codes, scale = weight(32, 256)
    x = torch.randn(2, 256).bfloat16()
    wanted = x.double() @ dequantized(codes, scale).T * GLOBAL_SCALE
    swapped = (codes << 4) | (codes >> 4)

    def turned(axis: int) -> torch.Tensor:
        return scale.view(torch.uint8).flip(axis).view(torch.float8_e4m3fn)

    for bad in (packing.pack(swapped, scale), packing.pack(codes, turned(1)), packing.pack(codes, turned(0))):
        got = run(libraries, Form(1), x, 32, bad, Launch(2, 1, 1)).double()
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
            got = run(libraries, Form(8), x.bfloat16(), 32, packing.pack(codes, scale), Launch(2, 1, 1))
            wanted = (x.double() @ w.T).float() * (torch.tensor(GLOBAL_SCALE) * 256) / 256
            torch.testing.assert_close(got.float(), wanted.bfloat16().float(), rtol=2**-8, atol=0)


FORMS = sorted({form for form, _ in small_batch_gemm.all_forms()}, key=str)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_a_plan_covers_every_output_and_input_once(form: Form, gelu: bool) -> None:
    for n, k in [(20480, 2560), (2560, 10240), (3072, 2560), (6144, 2560), (2560, 2048), (256, 2560), (2560, 256)]:
        for multiprocessors in (48, 132, 188):
            for chunks in {form.chunks(rows) for rows in (1, 80, 128)}:
                how = small_batch_gemm.plan(n, k, form, chunks, gelu, multiprocessors)
                assert how.warps % how.split == 0
                slots = how.warps // how.split
                assert (n // 16 // form.pair) % slots == 0
                assert slots % 2 == 0 or not gelu or form.pair == 2
                assert how.split * how.parts <= k // 256
                assert how.warps <= form.most_warps
                assert how.warps * form.pair * form.tiles * 512 <= 48 << 10  # shared memory without asking for it


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card whose times are given, by form and rows; and what was compiled and reserved for it."""
    found: dict[str, Any] = {"us": {}, "compiled": set(), "room": []}
    clock = found["us"]

    def fastest(shape: str, maker: str, measure: Any) -> dict[int, str]:
        found["maker"] = maker
        return {rows: chosen_rows._fastest(us) for rows, us in measure().items()}

    monkeypatch.setattr(small_batch_gemm, "_chosen", {})
    monkeypatch.setattr(small_batch_gemm, "_maker", lambda *of: str(of))
    monkeypatch.setattr(small_batch_gemm, "_compile", lambda wanted: found["compiled"].update(wanted))
    monkeypatch.setattr(small_batch_gemm, "_launch", lambda *what: small_batch_gemm.plan(*what[:-1], 132))
    monkeypatch.setattr(small_batch_gemm.SCRATCH, "reserve", lambda _, *sizes: found["room"].append(sizes))
    monkeypatch.setattr(small_batch_gemm, "gemm", lambda x, *how: clock.get((how[-1], len(x)), 99.0))
    monkeypatch.setattr(small_batch_gemm, "_other", lambda x, *_: 20.0)
    monkeypatch.setattr(chosen_rows, "clock", lambda _: lambda call: call())
    monkeypatch.setattr(chosen_rows, "fastest", fastest)
    return found


def layer(n: int, k: int) -> Any:
    names = ("weight_scale", "weight_global_scale", "workspace", "rows_codes", "rows_scales", "rows_global_scale")
    return SimpleNamespace(
        output_size_per_partition=n,
        input_size_per_partition=k,
        weight=torch.ones(1),
        streamed=0,
        stream_gelu=False,
        rows_scaled=False,
        **dict.fromkeys(names),
    )


def test_each_batch_gets_the_form_that_was_fastest(card: dict[str, Any]) -> None:
    small = small_batch_gemm.CANDIDATES[8][0]
    first, other = small_batch_gemm.CANDIDATES[80][:2]
    card["us"] |= {(small, 8): 5.0, (first, 80): 12.0, (other, 80): 11.0, (first, 64): 19.9}
    small_batch_gemm.choose(layer(3072, 2560))
    got = {
        rows: small_batch_gemm.form_for(3072, 2560, False, False, rows) for rows in (1, 8, 9, 64, 65, 80, 81, 128, 129)
    }
    assert got == dict.fromkeys(got) | {1: small, 8: small, 65: other, 80: other}  # 0.5 % faster is not worth it
    assert {(small, False, False), (other, False, False)} <= card["compiled"]
    assert small_batch_gemm.form_for(3072, 2560, True, False, 80) is None  # another kernel: as measured on an H200
    assert small_batch_gemm.form_for(3072, 2560, True, False, 20) == small_batch_gemm.CANDIDATES[24][0]


def test_times_count_for_layers_whose_other_batches_run_on_the_same_kernel(card: dict[str, Any]) -> None:
    """With streaming switched off once, what Marlin took must not be what streaming is compared with later."""
    made = layer(3072, 2560)
    small_batch_gemm.choose(made)
    without = card["maker"]
    made.streamed = 0b1100001
    small_batch_gemm.choose(made)
    streaming = card["maker"]
    assert streaming != without
    made.stream_gelu = True
    small_batch_gemm.choose(made)
    assert card["maker"] not in (without, streaming)


def test_times_are_kept_apart_by_what_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_gemm, "_maker", lambda gelu: "")
    of = functools.partial(small_batch_gemm._maker.__wrapped__, 2560, 2048, False, False)
    assert len({of(streamed) for streamed in (0, 1, 0b1100001)}) == 3
    before = of(0)
    monkeypatch.setitem(small_batch_gemm.CANDIDATES, 24, (Form(3),))
    assert of(0) != before  # other forms were tried


def test_of_forms_as_fast_alone_the_one_that_reads_the_weights_least(card: dict[str, Any]) -> None:
    chunked, whole = small_batch_gemm.CANDIDATES[24][-2:]
    assert chunked.chunks(24) == 3 > whole.chunks(24)
    card["us"] |= {(chunked, 24): 10.0, (whole, 24): 10.2}
    small_batch_gemm.choose(layer(3072, 2560))
    assert small_batch_gemm.form_for(3072, 2560, False, False, 24) == whole


def test_room_for_the_sums_of_every_batch(card: dict[str, Any]) -> None:
    """Also of those that are cut into parts as they have fewer chunks than the largest of their kind."""
    n, k, wide = 1088, 10240, small_batch_gemm.CANDIDATES[64][2]
    card["us"] |= {(wide, 64): 5.0}
    small_batch_gemm.choose(layer(n, k))
    plans = [small_batch_gemm.plan(n, k, wide, chunks, False, 132) for chunks in (7, 8)]
    assert plans[0].parts > 1 == plans[1].parts
    floats, counters = card["room"][-1]
    assert floats >= plans[0].parts * 7 * n * wide.rows
    assert counters >= 7 * n // 16


def test_few_rows_on_hopper_take_the_forms_that_draft_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """E4B's GEMMs, whole and each of two ranks'; elsewhere, and multiplied by a scale, what is fastest alone."""
    monkeypatch.setattr(small_batch_gemm, "_hopper", lambda: True)
    wanted = {  # N, K, gelu: up to 8 and up to 16 rows
        (3072, 2560, False): ("8x16wr72", "16x16r88"),
        (2560, 2048, False): ("8x16wr72", "16x16r88"),
        (20480, 2560, True): ("8x16wr88", "16x16r96"),
        (2560, 10240, False): ("8x16wr72", "16x16r72"),
        (1536, 2560, False): ("8x16wr72", "16x16r72"),
        (2560, 1024, False): ("8x16wr72", "16x16r88"),
        (10240, 2560, True): ("8x16wr88", "16x32"),
        (2560, 5120, False): ("8x16wr72", "16x16r72"),
    }
    got = {
        shape: tuple(str(form) for rows in (5, 9) for form in small_batch_gemm.candidates(*shape, False, rows))
        for shape in wanted
    }
    assert got == wanted
    for shape in wanted:
        assert small_batch_gemm.candidates(*shape, True, 5) == small_batch_gemm.CANDIDATES[8]
        assert small_batch_gemm.candidates(*shape, False, 17) == small_batch_gemm.CANDIDATES[24]
    monkeypatch.setattr(small_batch_gemm, "_hopper", lambda: False)
    assert small_batch_gemm.candidates(3072, 2560, False, False, 16) == small_batch_gemm.CANDIDATES[16]


def test_a_layer_that_multiplies_by_a_scale_and_one_that_does_not_are_two(card: dict[str, Any]) -> None:
    scaled, small = layer(3072, 2560), small_batch_gemm.CANDIDATES[8][0]
    scaled.rows_scaled = True
    card["us"] |= {(small, 8): 5.0}
    small_batch_gemm.choose(scaled)
    assert (small, False, True) in card["compiled"]
    card["us"] |= {(small, 8): 99.0}
    small_batch_gemm.choose(layer(3072, 2560))
    assert small_batch_gemm.form_for(3072, 2560, False, True, 8) == small
    assert small_batch_gemm.form_for(3072, 2560, False, False, 8) is None


def test_forms_have_names_of_their_own() -> None:
    assert len({str(form) for form in FORMS}) == len(FORMS)
    assert list(small_batch_gemm.CANDIDATES) == sorted(small_batch_gemm.CANDIDATES)
    assert max(small_batch_gemm.CANDIDATES) == small_batch_gemm.MOST_ROWS


@pytest.mark.parametrize("fails", ["fastest", "_compile"])
def test_a_measurement_or_a_form_that_fails_leaves_the_start_alone(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    said: list[str] = []
    monkeypatch.setattr(chosen_rows if fails == "fastest" else small_batch_gemm, fails, failing)
    monkeypatch.setattr(small_batch_gemm.logger, "info", lambda text, *values: said.append(text % values))
    small_batch_gemm.choose(layer(3072, 2560))
    assert said[0] == "NVFP4 GEMM 3072x2560, few rows was not measured: CUDA out of memory."
    if fails == "fastest":  # what was measured on an H200
        assert small_batch_gemm.form_for(3072, 2560, False, False, 20) == small_batch_gemm.CANDIDATES[24][0]
        assert small_batch_gemm.form_for(3072, 2560, False, False, 33) is None
    else:
        assert said[1] == "NVFP4 GEMM 3072x2560, few rows stays on Marlin: CUDA out of memory."
        assert small_batch_gemm.form_for(3072, 2560, False, False, 1) is None
