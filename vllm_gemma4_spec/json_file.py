"""JSON files that a user named: read, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.errors import Gemma4SpecError


def read_object(path: Path, error: Callable[[str], Gemma4SpecError], advice: str) -> dict[str, Any]:
    """The JSON object that ``path`` holds.

    Args:
        error: makes the error from its text.
        advice: the way out for a file that is missing or holds something else.

    Raises:
        Gemma4SpecError: what ``error`` made; one line that names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file; {advice}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read ({getattr(problem, 'strerror', None) or problem})") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not JSON ({problem}); download it again") from None
    if not isinstance(found, dict):
        raise error(f"{path}: holds no JSON object; {advice}")
    return found
