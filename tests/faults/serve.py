"""``vllm serve`` in which a fault is set off by a file.

``FAULT=kill`` kills the process that runs the model, ``FAULT=raise`` raises there, as soon as ``FAULT_FILE`` exists:
with a drafter between two tokens of a draft, without one before the model's next step.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import wrapt

from vllm_gemma4_spec.demo import vllm_command


def fault() -> None:
    if os.environ["FAULT"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("a fault that was asked for")


def _arm(module: Any) -> None:
    original = module.Worker.execute_model

    def execute_model(self: Any, scheduled: Any) -> Any:
        if scheduled.total_num_scheduled_tokens and os.path.exists(os.environ["FAULT_FILE"]):
            drafter = getattr(self.model_runner, "drafter", None)
            if drafter is None:
                fault()
            else:
                _in_the_middle_of_a_draft(drafter)
        return original(self, scheduled)

    module.Worker.execute_model = execute_model


def _in_the_middle_of_a_draft(drafter: Any) -> None:
    sample, drafted = type(drafter)._greedy_sample, []

    def greedy_sample(hidden: Any) -> Any:
        drafted.append(hidden)
        if len(drafted) == 2:
            fault()
        return sample(drafter, hidden)

    drafter._greedy_sample = greedy_sample


# Not guarded: the engine core and the workers import this module again when they are spawned.
if os.environ.get("FAULT"):
    wrapt.register_post_import_hook(_arm, "vllm.v1.worker.gpu_worker")

if __name__ == "__main__":
    vllm_command.main()
