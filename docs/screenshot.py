"""The picture of a report for the README, taken by a headless Chromium.

python docs/screenshot.py runs/digits/report.html       # writes docs/images/report.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT, DENSITY, COLORS = 1000, 780, 1.5, 64  # pixels of CSS; 64 colours keep the file below 200 kB


def main(report: Path, target: Path = TARGET) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("No Chromium on PATH. Install it with: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "taken.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
        options += [f"--force-device-scale-factor={DENSITY}", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run(
            [browser, *options, f"--screenshot={taken}", report.resolve().as_uri()],
            check=True,
            capture_output=True,
            timeout=120,
        )
        with Image.open(taken) as picture:
            picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
