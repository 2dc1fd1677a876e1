#!/usr/bin/env bash
# One would guess: regex's partial matching (partial=True), with which streamed tool calls are told from text, says yes only
# to what can still become a match; and a lazy quantifier (*?) says the same as the greedy one.
# What happens: where a lazy quantifier stands before a literal of two characters or more, only the literal is looked
# for at the end of the text. What lies between is not held against the quantifier's own set: "<tool>NO" is called the
# beginning of <tool>[a-z]*?</tool>. Once the literal is whole the answer is no. The greedy form is right throughout.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet regex==2026.11.19
env/bin/python - <<'PY'
from importlib.metadata import version
import regex

print("regex", version("regex"))

def answer(pattern, text):
    match = regex.fullmatch(pattern, text, partial=True)
    return "no" if match is None else "partial" if match.partial else "whole"

cases = (
    ("<tool>[a-z]*%s</tool>", ("<tool>no", "<tool>NO", "<tool>NO</too", "<tool>NO</tool>", "<tool>no</tool>")),
    (r"x\d*%sab", ("x12a", "x?!a", "x?!ab")),
    ("a.*%sbc", ("a-\n-", "a-\n-b", "a-\n-bc")),
    (r"x\d*%sa", ("x12", "x?!", "x?!a")),
)
seen = {}
for pattern, texts in cases:
    for kind in ("", "?"):
        seen[pattern, kind] = [answer(pattern % kind, text) for text in texts]
        print(f"{pattern % kind:22}", dict(zip(texts, seen[pattern, kind])))
greedy = [seen[pattern, ""] for pattern, _ in cases]
lazy = [seen[pattern, "?"] for pattern, _ in cases]
assert greedy == [["partial", "no", "no", "no", "whole"], ["partial", "no", "no"], ["no"] * 3, ["partial", "no", "no"]]
assert lazy == [["partial"] * 3 + ["no", "whole"], ["partial", "partial", "no"], ["partial", "partial", "no"],
                ["partial", "no", "no"]]
PY
