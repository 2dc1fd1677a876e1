"""Looks at built pages in a headless Chromium: one start for all pages and widths."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Frames have exact widths; a window cannot be narrower than some 500 px.
_PAGE = """<!doctype html><body><script>
const pages = %s, widths = %s, seen = [];
function look(page, width) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `border: 0; width: ${width}px; height: 900px`;
    frame.onload = () => setTimeout(() => {
      const inside = frame.contentDocument, root = inside.documentElement;
      const content = inside.querySelector("article") || inside.body;
      const text = content.cloneNode(true);
      text.querySelectorAll("pre, code, script, style").forEach(node => node.remove());
      const beyond = [...content.querySelectorAll("*")].filter(node => {
        if (node.getBoundingClientRect().right <= width + 1) return false;
        for (let up = node.parentElement; up && up !== inside.body; up = up.parentElement)
          if (["auto", "scroll", "hidden"].includes(frame.contentWindow.getComputedStyle(up).overflowX)) return false;
        return true;
      }).map(node => `${node.tagName} ${node.textContent.slice(0, 60)}`);
      seen.push({page, width, wide: root.scrollWidth, beyond: beyond.slice(0, 3),
        figures: [...content.querySelectorAll("img, svg.figure")].map(image => ({source: image.getAttribute("src"),
          drawn: image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().width > 50,
          named: Boolean(image.alt)})),
        // A block between items ends the list unless it is indented far enough; the numbers then begin anew.
        broken: [...content.querySelectorAll("ol + div + ol, ol + pre + ol")].map(list => list.textContent.trim()),
        text: text.textContent, code: [...content.querySelectorAll("code")].map(node => node.textContent)});
      frame.remove();
      done();
    }, 50);
    frame.src = page;
    document.body.append(frame);
  });
}
(async () => {
  // One frame at a time: figures of a frame below the window are not loaded.
  for (const page of pages) for (const width of widths) await look(page, width);
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
})();
</script></body>"""


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def look(site: Path, pages: list[str], widths: tuple[int, ...], scratch: Path) -> list[dict[str, Any]]:
    """What each page shows at each width."""
    program = chromium()
    assert program
    looking = site / "looking.html"
    looking.write_text(_PAGE % (json.dumps(pages), json.dumps(widths)))
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--window-size=1400,1000",
        f"--user-data-dir={scratch}",
        "--virtual-time-budget=600000",
        "--dump-dom",
        looking.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    looking.unlink()
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    seen: list[dict[str, Any]] = json.loads(html.unescape(found.group(1)))
    return seen
