"""After a patch was added or changed: ``patch_records.py fingerprints``, then ``patch_records.py ledger``."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_gemma4_spec.patching import fingerprint, ledger
from vllm_gemma4_spec.registry import PATCHES

LEDGER = Path(__file__).parents[1] / "docs" / "reference" / "patches.md"

if __name__ == "__main__":
    if sys.argv[1] == "fingerprints":
        fingerprint.write_record([s for patch in PATCHES for s in patch.checked_symbols])
    else:
        LEDGER.write_text(ledger.render(PATCHES))
