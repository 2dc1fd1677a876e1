"""vLLM's groups of ranks, as operators find them: torch.compile hands them a name."""

from __future__ import annotations

from typing import Any


def group(name: str) -> Any:
    """The ``GroupCoordinator`` of this ``unique_name``."""
    from vllm.distributed import parallel_state

    found = parallel_state._groups[name]()
    assert found is not None, name
    return found


def custom_all_reduce(of: Any) -> Any:
    """A group's ``CustomAllreduce``; None where it has none, or where it is off (vLLM's log says why)."""
    custom = getattr(of.device_communicator, "ca_comm", None)
    return None if custom is None or custom.disabled else custom
