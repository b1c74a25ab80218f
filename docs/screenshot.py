"""Make docs/report.html, the report of a run, and docs/report.png, what it looks like.

    python train_grpo.py --preset tiny --output_dir runs/seed0
    python docs/screenshot.py runs/seed0

Needs requirements-dev.txt and a browser: apt-get install chromium chromium-driver.
"""

import shutil
import sys
from pathlib import Path

from selenium import webdriver

REPORT = "grpo_report.html"  # as in engine/report.py
DOCS = Path(__file__).resolve().parent


def start_browser() -> webdriver.Chrome:
    """Debian's Chromium without a window; it logs its console and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    # Root has no sandbox, a container little shared memory.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def set_size(browser, width: int, height: int = 900, scale: float = 1) -> None:
    """Of the page in CSS pixels, and device pixels for each of them."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def main(folder: Path) -> None:
    shutil.copy(folder / REPORT, DOCS / "report.html")
    browser = start_browser()
    set_size(browser, 1100, 680)
    browser.get((DOCS / "report.html").as_uri())
    # The third logged group, with the focus on the token that makes its worst completion wrong.
    browser.execute_script(
        """show(2);
        window.scrollTo(0, document.getElementById("replay").offsetTop);
        document.querySelectorAll("#list li:last-child .token")[1].focus({preventScroll: true});"""
    )
    browser.save_screenshot(str(DOCS / "report.png"))
    browser.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
