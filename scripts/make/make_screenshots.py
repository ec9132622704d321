"""Photograph pages of ``mopt verify --report`` in a real browser, on a phone and on a desk, light and dark.

python scripts/make/make_screenshots.py FOLDER PAGE.html [PAGE.html ...] [--browser /usr/bin/chromium]

Needs ``pip install playwright``, and its browser (``playwright install chromium``) or one that is named. The exit code
is 1 where a page is wider than its window, says something on the console or asks for anything beside itself.
``docs/report-light.png`` is the light picture, 1400 wide, with ``--height 1400``, of a small FLUX.1 built from one
of the tests' exports.
"""

import argparse
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

_WIDTHS = (400, 1400)
_SCHEMES = ("light", "dark")


def photograph(browser: Browser, page_file: Path, folder: Path, height: int | None) -> list[str]:
    """Write one picture for each width and scheme.

    Args:
        browser: What opens the page.
        page_file: The page.
        folder: Where pictures are written.
        height: How much of the page is on them; None for all.

    Returns:
        What is wrong with the page.
    """
    wrong = []
    for width in _WIDTHS:
        for scheme in _SCHEMES:
            page = browser.new_page(viewport={"width": width, "height": height or 900}, color_scheme=scheme)
            asked: list[str] = []
            said: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, said=said: said.append(message.text))
            page.goto(page_file.resolve().as_uri())
            name = f"{page_file.stem}-{width}-{scheme}"
            page.screenshot(path=folder / f"{name}.png", full_page=height is None)
            wide = page.evaluate("document.documentElement.scrollWidth")
            wrong += [f"{name}: {wide} pixels wide"] if wide > width else []
            wrong += [f"{name}: asked for {url}" for url in asked[1:]] + [f"{name}: {words}" for words in said]
            page.close()
    return wrong


def main() -> int:
    """Photograph all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--browser", help="the program to run, where playwright has none of its own")
    parser.add_argument("--height", type=int, help="how many pixels of a page; default all")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.browser, args=["--no-sandbox"])
        wrong = [words for page in given.pages for words in photograph(browser, page, given.folder, given.height)]
        browser.close()
    print("\n".join(wrong) or f"{len(given.pages) * len(_WIDTHS) * len(_SCHEMES)} pictures in {given.folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
