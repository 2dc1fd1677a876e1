"""Where every plot of the commands begins and ends: matplotlib without a display, a file that may not be writable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_gemma4_spec.errors import Gemma4SpecError


class PlotError(Gemma4SpecError):
    """No matplotlib, or a file that cannot be written."""


def pyplot() -> Any:
    """``matplotlib.pyplot`` on a backend that needs no display.

    Raises:
        PlotError: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise PlotError("--plot needs matplotlib; run `pip install 'matplotlib>=3.8'`") from None
    return pyplot


def check(file: Path) -> None:
    """Before a long measurement: is there a folder that can be written to, and an ending that matplotlib knows?

    Raises:
        PlotError: one of them is not so, or matplotlib is missing.
    """
    figure = pyplot().figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    pyplot().close(figure)
    if file.suffix.lstrip(".").lower() not in known:
        raise PlotError(f"--plot {file}: unknown ending; use one of {', '.join(known)}")
    existed = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise PlotError(f"--plot {file}: cannot be written ({error.strerror})") from None
    if not existed:
        file.unlink()


def save(figure: Any, file: Path) -> None:
    """Write and close ``figure``.

    Raises:
        PlotError: the file cannot be written.
    """
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {file}: {str(error).splitlines()[0]}") from None
    finally:
        pyplot().close(figure)
