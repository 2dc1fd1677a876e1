#!/usr/bin/env bash
# One would guess: NumPy treats NaN in an array of ml_dtypes' bfloat16 or float8_e4m3fn as it does in float16: sort puts it
# last, median gives NaN, nanmean leaves it out.
# What happens: max gives NaN and nanmax leaves it out, but sort has no place for NaN. It stays somewhere in the middle with
# unsorted values around it, argsort points elsewhere, unique lists values more than once, and median, which looks for NaN
# at the end of what it sorted, gives an ordinary number, and not even that of the others. nanmean gives NaN.
# So the median of block scales hides the NaN scales of a broken checkpoint. As float32 the same array is treated right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet numpy==2.2.6 ml-dtypes==0.5.4
cat >order.py <<'PY'
import ml_dtypes
import numpy as np

def summary(scales):
    order = np.sort(scales).astype(np.float32)
    unique = np.unique(scales).astype(np.float32)
    return {
        "sorted": bool((np.diff(order[~np.isnan(order)]) >= 0).all()),
        "NaN is last": bool(np.isnan(order[-1])),
        "argsort ends at NaN": bool(np.isnan(np.float32(scales[np.argsort(scales)[-1]]))),
        "unique has each once": len(set(unique.tolist())) == len(unique),
        "max": float(np.max(scales)),
        "nanmax": float(np.nanmax(scales)),
        "median": float(np.median(scales)),
        "nanmedian": float(np.nanmedian(scales)),
        "nanmean": float(np.nanmean(scales)),
    }

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__, "block scales, every fiftieth of them NaN")
scales = (np.arange(1000, dtype=np.float32) * 37 % 101 + 1) / 4
scales[25::50] = np.nan
for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    seen = summary(scales.astype(dtype))
    print(f"{np.dtype(dtype).name}:", seen)
    same = all(seen[name] for name in ("sorted", "NaN is last", "argsort ends at NaN", "unique has each once"))
    missing = [name for name in ("max", "median", "nanmean") if np.isnan(seen[name])]
    assert np.isfinite(seen["nanmax"])
    if dtype in (np.float32, np.float16):
        assert same and missing == ["max", "median"]
    else:
        assert not any(seen[name] for name in ("sorted", "NaN is last", "argsort ends at NaN", "unique has each once"))
        assert missing == ["max", "nanmean"] and seen["median"] != seen["nanmedian"]
    right = summary(scales.astype(dtype).astype(np.float32))
    assert np.isnan(right["median"]) and np.isfinite(right["nanmean"]) and seen["nanmedian"] == right["nanmedian"]
PY
env/bin/python -W ignore order.py
