"""vLLM's own Triton kernels in Triton's interpreter: ``python -m tests.cpu.triton_reference CASES RESULTS``."""

from __future__ import annotations

import importlib
import sys


def main(cases_path: str, results_path: str) -> None:
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
