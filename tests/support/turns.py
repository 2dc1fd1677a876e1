"""One engine, with patches and without them in turn, and what its steps do."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_gemma4_spec
from vllm_gemma4_spec.patching.patch import Patch
from vllm_gemma4_spec.registry import PATCHER

Step = Callable[[], Any]


class Turns:
    """An engine of this process with ``patches`` and without them, in turn; begins and ends (``with``) with them.

    The processors of a sampler, which are built with an engine, are built anew at each change.
    """

    def __init__(self, llm: Any, patches: Sequence[Patch]) -> None:
        core = llm.llm_engine.engine_core.engine_core
        # In a thread of their own, grammars are ready in whichever step: batches would differ from run to run.
        core.structured_output_manager._use_async_grammar_compilation = False
        self._llm, self._patches, self._patched = llm, patches, True
        self._runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        self.change(True)

    def change(self, patched: bool) -> None:
        from vllm.v1.worker import gpu_model_runner

        if patched == self._patched:
            return
        self._patched = patched
        if patched:
            vllm_gemma4_spec.apply()
        else:
            PATCHER.undo(self._patches)
        runner = self._runner
        runner.input_batch.logitsprocs = gpu_model_runner.build_logitsprocs(
            runner.vllm_config, runner.device, runner.pin_memory, False, ()
        )
        runner.input_batch.refresh_metadata()

    def answers(
        self, prompts: Sequence[list[int]], fields: dict[str, Any], around: Callable[[Step], Any] | None = None
    ) -> list[list[int]]:
        """Greedy answers to requests with ``fields``; ``around`` is given each step of the engine, and calls it."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        values = {"temperature": 0.0} | fields
        if "structured_outputs" in values:
            values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
        params = [SamplingParams(**values) for _ in prompts]
        engine = self._llm.llm_engine
        if around is not None:
            step = engine.step
            engine.step = lambda: around(step)
        try:
            outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        finally:
            vars(engine).pop("step", None)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def calls(self, prompts: Sequence[list[int]], fields: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
        """How many Python functions each step calls, and the answers."""
        counts: list[int] = []

        def count(frame: FrameType, event: str, argument: Any) -> None:
            counts[-1] += event == "call"

        def around(step: Step) -> Any:
            counts.append(0)
            sys.setprofile(count)
            try:
                return step()
            finally:
                sys.setprofile(None)

        answers = self.answers(prompts, fields, around)
        return counts, answers

    def operations(self, prompts: Sequence[list[int]], fields: dict[str, Any]) -> Counter[Any]:
        """How many tensor operations all steps do, by name and shape of the result."""
        operations = _Operations()

        def around(step: Step) -> Any:
            with operations:
                return step()

        self.answers(prompts, fields, around)
        return operations.seen


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.seen[str(func), tuple(out.shape) if isinstance(out, torch.Tensor) else None] += 1
        return out
