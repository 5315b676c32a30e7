"""The README's picture of a page: curves on a desktop in the light, completions and film strips on a phone in the dark.

    python -m report.screenshot runs/demo-0/grpo/report.html docs/report.png

Needs Chromium; CHROMIUM=... is another name of it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from engine.program.settings import command_line

HEIGHT = 1300
VIEWS = (("curves", 1100, 1), ("rollouts", 500, 0), ("strips", 500, 0))  # section of the page, width, light or dark


def shoot(page, section, width, light, file):
    """A picture of the page with one of its sections; the heading stands above the curves alone."""
    others = f"section:not(#{section})" + ("" if section == "curves" else ", h1, progress, h1 ~ p, nav")
    shown = file.with_suffix(".html")
    text = page.read_text(encoding="utf-8")
    shown.write_text(text.replace("</style>", f"{others} {{ display: none }}</style>", 1), encoding="utf-8")
    command = [os.environ.get("CHROMIUM", "chromium"), "--headless=new", "--no-sandbox", "--disable-gpu",
               "--hide-scrollbars", f"--window-size={width},{HEIGHT}", f"--screenshot={file}",
               f"--blink-settings=preferredColorScheme={light}", shown.resolve().as_uri()]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def main(page, picture):
    wide = Image.new("RGB", (sum(width for _, width, _ in VIEWS), HEIGHT))
    at = 0
    with tempfile.TemporaryDirectory() as folder:
        for section, width, light in VIEWS:
            file = Path(folder, f"{section}.png")
            shoot(page, section, width, light, file)
            wide.paste(Image.open(file), (at, 0))
            at += width
    wide.quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    parser = command_line("report.screenshot", __doc__)
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    given = parser.parse_args()
    try:
        main(given.page, given.picture)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"report.screenshot: {error}")
