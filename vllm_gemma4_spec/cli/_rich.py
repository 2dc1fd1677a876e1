"""What the commands take from rich, imported when it is used: help and refusals print plain lines and do without."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as Console
    from rich.console import Group as Group
    from rich.console import RenderableType as RenderableType
    from rich.live import Live as Live
    from rich.markdown import Markdown as Markdown
    from rich.panel import Panel as Panel
    from rich.progress import BarColumn as BarColumn
    from rich.progress import MofNCompleteColumn as MofNCompleteColumn
    from rich.progress import Progress as Progress
    from rich.progress import TaskID as TaskID
    from rich.progress import TextColumn as TextColumn
    from rich.progress import TimeElapsedColumn as TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeRemainingColumn
    from rich.progress_bar import ProgressBar as ProgressBar
    from rich.table import Column as Column
    from rich.table import Table as Table
    from rich.text import Text as Text

_MODULES = {
    "rich.console": ("Console", "Group", "RenderableType"),
    "rich.live": ("Live",),
    "rich.markdown": ("Markdown",),
    "rich.panel": ("Panel",),
    "rich.progress": (
        *("BarColumn", "MofNCompleteColumn", "Progress", "TaskID"),
        *("TextColumn", "TimeElapsedColumn", "TimeRemainingColumn"),
    ),
    "rich.progress_bar": ("ProgressBar",),
    "rich.table": ("Column", "Table"),
    "rich.text": ("Text",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(name)
    return getattr(importlib.import_module(_HOME[name]), name)
