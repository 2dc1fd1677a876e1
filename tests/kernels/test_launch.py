"""What the CUDA driver is given of a launch, seen by a driver of the test's own that prints it; no GPU needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # has cuda.h
COMPILER = shutil.which("cc") or shutil.which("gcc")

LAUNCHES = """
import torch
from cuda.bindings.driver import CUdeviceptr
from vllm_gemma4_spec.kernels.cuda import Kernel

elsewhere = torch.tensor([2.5])  # by its address, as memory that no tensor has

for overlaps in (True, False):
    kernel = Kernel.__new__(Kernel)  # __init__ compiles for the card that is here
    kernel._load(b"code", "name", overlaps)
    kernel.allow_shared(50_000)
    last = torch.tensor([2.5]) if overlaps else CUdeviceptr(elsewhere.data_ptr())
    for more in range(2):  # what does not change is made once
        args = [torch.tensor([1.5 + more]), 7 + more, last]
        kernel._launch(0x33, (4, 5, 6), 128, args, 1000, *([3] if overlaps else []))
    assert len(kernel._configs) == 1
try:
    Kernel.__new__(Kernel)._load(b"refuse", "name", True)
except RuntimeError as error:
    print(error)
"""

LOADED = ["load code", "function name of 0x11", "attribute 1 of 0x22: 50000"]
LAUNCHED = "launch 0x22 grid 4 5 6 block 128 1 1 shared 1000 stream 0x33 extra (nil)"
VALUES = "values 1.5 7 2.5"
AGAIN = "values 2.5 8 2.5"


@pytest.mark.skipif(not (COMPILER and (HEADERS / "cuda.h").exists()), reason="needs a C compiler and Triton's cuda.h")
def test_the_driver_is_given_the_launch(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings", reason="this PyTorch brings no cuda-bindings")
    source, library = Path(__file__).with_name("driver.c"), tmp_path / "libcuda.so.1"
    build = [str(COMPILER), "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-I", str(HEADERS), str(source)]
    subprocess.run([*build, "-o", str(library), "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *LOADED,
        LAUNCHED,
        "overlap 1 1",
        "cluster 1 1 3",
        VALUES,
        LAUNCHED,
        "overlap 1 1",
        "cluster 1 1 3",
        AGAIN,
        *LOADED,
        LAUNCHED,
        VALUES,
        LAUNCHED,
        AGAIN,
        "load refuse",
        "cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE",
    ]
