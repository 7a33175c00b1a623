"""Makes docs/images/report.png: the top of the report of a real run, in a Chromium without a window (`make picture`).

The run is `quickbloom run` with the defaults, the one that README.md shows; or a finished one that is named. Needs the
extras `simulation`, `dev`, `datasets` and `report`, and a Chromium (`sh tests/programs.sh`).
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

_PICTURE = Path(__file__).with_name("report.png")
_SIZE = {"width": 1000, "height": 2000}
_LAST = "#clients"
"""The heading above which the picture ends."""
_COLOURS = 64


def main() -> None:
    program = os.environ.get("QUICKBLOOM_CHROMIUM") or shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if program is None:
        raise SystemExit("no Chromium: `sh tests/programs.sh` installs Debian's, or name one in QUICKBLOOM_CHROMIUM")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]).resolve() if sys.argv[1:] else Path(folder) / "run"
        if not run.exists():
            subprocess.run([sys.executable, "-m", "quickbloom.server_app.cli.main", "run", "--output", str(run)], check=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
            page = browser.new_page(viewport={"width": _SIZE["width"], "height": _SIZE["height"]}, color_scheme="light")
            page.goto((run / "report.html").as_uri())
            box = page.locator(_LAST).bounding_box()
            assert box is not None
            shot = page.screenshot(clip={"x": 0, "y": 0, "width": _SIZE["width"], "height": box["y"] - 12})
            browser.close()
    # Few colours are enough for text and lines, and the file is a third as large.
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(_COLOURS).save(_PICTURE, optimize=True)
    print(f"{_PICTURE}: {_PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
