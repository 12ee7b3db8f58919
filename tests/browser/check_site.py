"""Opens the built site in headless Chromium: `python tests/browser/check_site.py`.

Not part of the test suite. Needs Chromium (Debian: `apt-get install chromium`), playwright
(`pip install playwright`) and the extra `docs`; where one is absent it says so and exits 0.
Checks navigation, search, formulas, pictures and code copy at the widths of a desktop and a phone,
and that nothing is fetched from the network. Screenshots go to the folder given as argument.
"""

import contextlib
import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
PAGES = {
    "": "bilevel",
    "start/": "First steps",
    "math/": "mathematics",
    "choose/": "Which method",
    "failures/": "When it goes wrong",
    "networks/": "Neural networks",
    "tutorials/labels/": "Cleaning wrong labels",
    "plots/": "Pictures",
    "gallery/": "Gallery",
    "objectives/": "outer problem",
    "whole_runs/": "training runs",
    "papers/digits/": "digits",
    "api/solvers/": "Linear solvers",
    "glossary/": "Glossary",
}


def missing() -> str | None:
    """What is not installed, or None."""
    for module in ("mkdocs", "material", "mkdocstrings", "playwright"):
        if importlib.util.find_spec(module) is None:
            return f"the Python package {module}"
    return None if chromium() else "Chromium"


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a local server for the folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def check_page(page, address: str, path: str, heading: str, phone: bool) -> list[str]:
    """The defects of one page: heading, formulas, pictures, width."""
    page.goto(address + path)
    page.wait_for_load_state("networkidle")
    defects = []
    if heading.lower() not in page.locator("h1").first.inner_text().lower():
        defects.append(f"the heading has no {heading!r}")
    marked, drawn = page.locator(".arithmatex").count(), page.locator(".arithmatex .katex").count()
    if page.locator(".katex-error").count():
        defects.append(
            f"formulas with errors: {page.locator('.katex-error').all_inner_texts()[:3]}"
        )
    if drawn < marked:
        defects.append(f"{marked - drawn} of {marked} formulas are not drawn")
    bare = page.locator(".md-content").inner_text()
    if "$$" in bare or ":math:" in bare:
        defects.append("raw formulas in the text")
    # Pictures below the fold load when they are scrolled to.
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_load_state("networkidle")
    broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    if broken:
        defects.append(f"pictures that do not load: {broken}")
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    if wide > 1:
        defects.append(f"{wide} px wider than the {'phone' if phone else 'window'}")
    return defects


def check_search(page, address: str, phone: bool) -> list[str]:
    page.goto(address)
    if phone:
        page.locator(".md-header__button[for=__search]").click()
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").fill("gauss newton")
    results = page.locator(".md-search-result__item a")
    with contextlib.suppress(Exception):  # on a busy machine the index takes seconds to load
        results.first.wait_for(timeout=20_000)
    found = results.all_inner_texts()
    if not any("networks" in text.lower() or "newton" in text.lower() for text in found):
        return [f"the search for 'gauss newton' finds {found[:3]}"]
    return []


def check_navigation(page, address: str, phone: bool) -> list[str]:
    page.goto(address)
    if phone:
        page.locator(".md-header__button[for=__drawer]").click()
        page.wait_for_timeout(500)
        links = page.locator(".md-nav--primary").first.inner_text()
    else:
        links = page.locator(".md-tabs").inner_text()
        page.locator(".md-tabs a", has_text="API").click()
        page.wait_for_load_state("networkidle")
        page.locator(".md-nav--primary a", has_text="Linear solvers").first.click()
        page.wait_for_load_state("networkidle")
        if "api/solvers" not in page.url:
            return [f"API, Linear solvers leads to {page.url}"]
    wanted = ("The mathematics", "Which method?", "When it goes wrong", "Gallery", "API")
    return [f"the navigation has no {name!r}" for name in wanted if name not in links]


def check_copy(page, address: str) -> list[str]:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(address + "start/")
    page.wait_for_load_state("networkidle")
    block = page.locator(".highlight", has_text="import bilevel").first
    block.hover()
    block.locator("button[data-md-type=copy], button.md-clipboard, .md-code__button").first.click()
    page.wait_for_timeout(300)
    copied = page.evaluate("navigator.clipboard.readText()")
    return [] if "import bilevel" in copied else [f"copied {copied[:60]!r} instead of the code"]


def main(pictures: Path) -> int:
    absent = missing()
    if absent:
        print(f"skipped: {absent} is not installed")
        return 0
    from playwright.sync_api import sync_playwright

    defects: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
            cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        )  # fmt: skip
        with served(Path(folder)) as address, sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            for name, (width, height) in WIDTHS.items():
                phone = name == "phone"
                page = browser.new_context(viewport={"width": width, "height": height}).new_page()
                page.set_default_timeout(10_000)
                outside: set[str] = set()
                page.on(
                    "request",
                    lambda request, outside=outside: (
                        None
                        if request.url.startswith((address, "data:", "blob:"))
                        else outside.add(request.url)
                    ),
                )
                errors: list[str] = []
                page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
                for path, heading in PAGES.items():
                    for line in check_page(page, address, path, heading, phone):
                        defects.append(f"{name} /{path}: {line}")
                    shot = pictures / f"{name}_{path.strip('/').replace('/', '_') or 'index'}.png"
                    page.screenshot(path=shot)
                checks = [
                    check_navigation(page, address, phone),
                    check_search(page, address, phone),
                ]
                page.screenshot(path=pictures / f"{name}_search.png")
                if not phone:
                    checks.append(check_copy(page, address))
                defects += [f"{name}: {line}" for lines in checks for line in lines]
                defects += [f"{name}: fetched from outside: {url}" for url in sorted(outside)]
                defects += [f"{name}: script error: {error}" for error in errors]
            browser.close()
    print(
        "\n".join([*defects, f"{len(PAGES)} pages at {len(WIDTHS)} widths, {len(defects)} defects"])
    )
    print(f"screenshots are in {pictures}")
    return 1 if defects else 0


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="site-"))
    where.mkdir(parents=True, exist_ok=True)
    sys.exit(main(where))
