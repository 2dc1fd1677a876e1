"""What is recorded is what transformers drafts; needs an environment with a transformers that knows assistants."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.mtp import pairs
from tests.mtp.shared import agreement, of_transformers, recorded

FOLDER = os.environ.get("GEMMA4_EXPORTERS", "")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="GEMMA4_EXPORTERS names no folder of exporters' environments")
def test_the_record_is_what_transformers_drafts(tmp_path: Path) -> None:
    for kind in pairs.KINDS:
        pairs.save_pair(kind, tmp_path / "pairs")
    python = Path(FOLDER) / "transformers" / "bin" / "python"
    arguments = ["-m", "tests.mtp.record_with_transformers", str(tmp_path / "pairs"), str(tmp_path / "made")]
    subprocess.run([python, *arguments], check=True, cwd=ROOT)
    for kind in pairs.KINDS:
        made = json.loads((tmp_path / "made" / f"{kind}.json").read_text())
        assert made["weights"] == recorded(kind)["weights"]
        theirs, ours = of_transformers(made), of_transformers(recorded(kind))
        assert theirs.keys() == ours.keys()
        assert agreement([(theirs[context], ours[context]) for context in ours]) > 0.9
