"""Looks at built pages in a headless Chromium: one start for all pages and widths."""

from __future__ import annotations

import functools
import json
import queue
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
  await fetch("seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script></body>"""


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class _Site(SimpleHTTPRequestHandler):
    """Serves a folder, and takes what the page has seen."""

    def __init__(self, *args: Any, seen: queue.Queue[list[dict[str, Any]]], **kwargs: Any) -> None:
        self.seen = seen
        super().__init__(*args, **kwargs)

    def do_POST(self) -> None:
        self.seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def look(site: Path, pages: list[str], widths: tuple[int, ...], scratch: Path) -> list[dict[str, Any]]:
    """What each page shows at each width.

    The page posts it to a server of this process: Chromium's own ``--dump-dom`` with virtual time at times never ends.
    """
    program = chromium()
    assert program
    looking = site / "looking.html"
    looking.write_text(_PAGE % (json.dumps(pages), json.dumps(widths)))
    seen: queue.Queue[list[dict[str, Any]]] = queue.Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Site, directory=str(site), seen=seen))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,1000",
        f"--user-data-dir={scratch}",
        f"http://127.0.0.1:{server.server_port}/looking.html",
    ]
    with (scratch.parent / "browser.log").open("w+") as log:
        browser = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            return seen.get(timeout=240)
        except queue.Empty:
            log.seek(0)
            raise AssertionError(f"the browser told nothing: {log.read()[-2000:]}") from None
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
            server.server_close()
            looking.unlink()
