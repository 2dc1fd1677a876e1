"""Run vLLM's own Triton kernels in Triton's interpreter: ``python triton_reference.py CASES RESULTS``.

A process of its own, because TRITON_INTERPRET must be set before triton is imported. CUDA_VISIBLE_DEVICES=""
makes vLLM keep triton without a driver, and VLLM_PLUGINS="" keeps this package out of it.
"""

from __future__ import annotations

import importlib
import os
import sys


def main(cases_path: str, results_path: str) -> None:
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    cases = torch.load(cases_path, weights_only=False)
    parameters = {}
    for case in cases:
        module, _, name = case["kernel"].partition(":")
        kernel = getattr(importlib.import_module(module), name)
        assert isinstance(kernel, InterpretedFunction), f"{name} is not Triton's: {kernel!r}"
        parameters[case["kernel"]] = list(kernel.arg_names)
        # The interpreter refuses a bool where the kernel has a runtime argument.
        args = [int(a) if isinstance(a, bool) else a for a in case["args"].values()]
        kernel[case["grid"]](*args)
    torch.save({"cases": cases, "parameters": parameters}, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
