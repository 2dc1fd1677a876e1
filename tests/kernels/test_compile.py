"""The CUDA kernel compiles with the NVRTC that PyTorch brings, for every generation it is meant for; no GPU needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vllm_gemma4_spec.kernels import all_reduce_norm, cuda, gated_input, small_batch_gemm, stream_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import Form


@pytest.fixture(scope="module", autouse=True)
def nvrtc() -> None:
    try:
        cuda.architecture(90)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"this PyTorch brings no NVRTC: {error}")


@pytest.mark.parametrize(
    ("capability", "form", "gelu", "scaled"),
    [
        (80, Form(1), False, False),
        (90, Form(1), True, False),
        (90, Form(2), False, True),
        (90, Form(5, 2, roll=True, fit=3), True, False),
        (90, Form(1), 2, False),
        (120, Form(8), False, False),
    ],
)
def test_the_kernel_compiles(capability: int, form: Form, gelu: int, scaled: bool) -> None:
    code = cuda.compiled(small_batch_gemm.source(form, gelu, scaled), cuda.architecture(capability))
    assert code.startswith(b"\x7fELF")
    assert b"nvfp4_rows" in code


@pytest.mark.parametrize(
    ("architecture", "form", "scaled"),
    [("sm_90a", stream_gemm.WGMMA_FORMS[2], False), ("sm_120", stream_gemm.MMA_FORMS[2], True)],
    ids=["hopper", "later"],
)
def test_the_streaming_kernel_compiles(architecture: str, form: stream_gemm.Form, scaled: bool) -> None:
    code = cuda.compiled(stream_gemm.source(2, scaled, form), architecture)
    assert b"nvfp4_stream" in code


def _instructions(code: bytes, kernel: str, tmp_path: Path) -> list[str]:
    """A kernel's, by the disassembler that Triton brings."""
    triton = pytest.importorskip("triton", reason="its nvdisasm reads machine code")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(code)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    said = subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True).stdout
    text = said.partition(f".text.{kernel}:\n")[2].partition("\n.text.")[0]
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE)


def _loads(source: str, kernel: str, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Loads from memory in front of griddepcontrol.wait and behind it, on Hopper."""
    instructions = _instructions(cuda.compiled(source, "sm_90"), kernel, tmp_path)
    (wait,) = (i for i, text in enumerate(instructions) if "ACQBULK" in text)
    early, late = (re.findall(r"LDG\S*", "\n".join(part)) for part in (instructions[:wait], instructions[wait:]))
    return early, late


@pytest.mark.parametrize(("form", "gelu"), [*small_batch_gemm.all_forms(), (gated_input._FORM, 2)], ids=str)
def test_weights_are_asked_for_before_the_kernel_ahead_has_ended(form: Form, gelu: int, tmp_path: Path) -> None:
    """The compiler may move a load behind griddepcontrol.wait, as it did: 4 us of each layer of a drafter."""
    early, _ = _loads(small_batch_gemm.source(form, gelu, False), "nvfp4_rows", tmp_path)
    of_a_block = 5 * form.pair  # four of codes, one of scales
    assert sum(".NA" in load for load in early) == of_a_block
    assert len(early) == of_a_block + 1  # and the global scale, or each GEMM would end by waiting for it


def test_norm_weights_are_asked_for_before_the_sums_are_there(tmp_path: Path) -> None:
    early, _ = _loads(all_reduce_norm.source(2560, 1e-6, True, True, True), "all_reduce_norm", tmp_path)
    assert len(early) == 3  # of both norms and the layer's scale


def test_of_a_per_layer_input_all_weights_are_asked_for_before_the_kernel_ahead_has_ended(tmp_path: Path) -> None:
    early, late = _loads(gated_input.source(Form(1)), "nvfp4_gated", tmp_path)
    assert len(early) == 2 * (5 + 1)  # codes, scales and global scale of gate and projection
    assert not any(".NA" in load for load in late)


def _compiler_says(source: str) -> str:
    """NVRTC's log for Hopper, with what the assembler in it says about registers."""
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, 2, [b"--gpu-architecture=sm_90a", b"--ptxas-options=-v"])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    said = log.decode().rstrip("\0")
    assert not status.value, said
    return said


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("tiles", stream_gemm.WGMMA_FORMS)
def test_registers_suffice_on_hopper(tiles: int, gelu: bool) -> None:
    """Else the kernel compiles all the same, but waits for each wgmma before the next one, or spills.

    Without a low-rank branch: with one, the form of 8 tiles is known to do both.
    """
    said = _compiler_says(stream_gemm.source(tiles, False, stream_gemm.WGMMA_FORMS[tiles], gelu=gelu))
    assert "serialized" not in said
    assert ", 0 bytes spill stores, 0 bytes spill loads" in said


@pytest.mark.parametrize(("n", "k"), [(20480, 2560), (10240, 2560), (2560, 10240), (2560, 2048)])
@pytest.mark.parametrize("rows", [8, 16])
def test_a_form_of_few_rows_keeps_what_it_works_with_in_registers(n: int, k: int, rows: int) -> None:
    """A few bytes that each warp writes once are not worth a form of their own."""
    for gelu in (False, True):
        said = _compiler_says(small_batch_gemm.source(small_batch_gemm.few_rows(n, k, gelu, rows), gelu, False))
        spilt = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
        assert max(spilt) <= 32, said


@pytest.mark.parametrize("architecture", ["sm_90", "sm_120"])
def test_the_kernel_of_a_cluster_compiles(architecture: str) -> None:
    assert b"nvfp4_gated" in cuda.compiled(gated_input.source(Form(1)), architecture)


def test_the_kernel_that_multiplies_before_a_gemm_compiles() -> None:
    assert b"scaled_rows" in cuda.compiled(stream_gemm.scaled_rows_source(), "sm_90")


def test_a_card_newer_than_nvrtc_gets_its_generation() -> None:
    assert cuda.architecture(121) in ("sm_120", "sm_121")
    with pytest.raises(RuntimeError, match=r"compute capability 3\.0"):
        cuda.architecture(30)


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)sm_90.*nonsense"):
        cuda.compiled("nonsense", "sm_90")


@pytest.mark.parametrize("error", [RuntimeError("Failed to dlopen libnvrtc.so.12"), ImportError("no cuda.bindings")])
def test_without_a_compiler_marlin_stays_and_the_log_says_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise error

    said: list[str] = []
    monkeypatch.setattr(cuda, "Kernel", refuses)
    monkeypatch.setattr(small_batch_gemm.logger, "warning", lambda text, *values: said.append(text % values))
    small_batch_gemm.available.cache_clear()
    small_batch_gemm._kernel.cache_clear()
    try:
        assert not small_batch_gemm.available()
        assert not small_batch_gemm.available()
    finally:
        small_batch_gemm.available.cache_clear()
    assert said == [f"Small-batch NVFP4 GEMMs stay on Marlin: {error}"]
