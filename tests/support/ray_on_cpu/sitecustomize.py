"""What 0.19.1's CPU platform lacks for vLLM's Ray executor; with this folder on PYTHONPATH in every process.

Ray is told of two GPUs that nothing looks for. The executor, its workers and their channels are vLLM's and Ray's own.
"""

from __future__ import annotations

from typing import Any

import wrapt


@wrapt.when_imported("vllm.platforms.cpu")
def _platform(module: Any) -> None:
    platform = module.CpuPlatform
    platform.ray_device_key, platform.device_control_env_var = "GPU", "TESTS_VISIBLE_DEVICES"
    original = platform.check_and_update_config

    def check_and_update_config(cls: type, config: Any) -> None:
        backend = config.parallel_config.distributed_executor_backend
        original(config)
        if backend == "ray":  # the platform has put multiprocessing in its place
            config.parallel_config.distributed_executor_backend = backend

    platform.check_and_update_config = classmethod(check_and_update_config)


@wrapt.when_imported("vllm.v1.executor.ray_utils")
def _workers(module: Any) -> None:
    module.RayWorkerWrapper.setup_device_if_necessary = lambda self: None  # a CPU worker has no device to set
