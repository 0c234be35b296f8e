"""README.md, the pages under docs/, and the site made of them, seen in a real browser."""

import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import quotes  # noqa: E402

every_page = pytest.mark.parametrize("page", quotes.pages(), ids=lambda page: page.name)


@every_page
def test_quotes_and_line_numbers_follow_the_scripts(page):
    assert quotes.updated(page.read_text()) == page.read_text(), "run python docs/quotes.py"


def test_a_quote_that_is_behind_is_renewed():
    block = '```python title="ddpl_mpe.py: update_diffusion: 2. Weigh"\nnothing\n```'
    new = quotes.updated(f"See [`update`](../ddpl_mpe.py#L1-L2).\n\n{block}\n")
    first, last = quotes.lines_of("ddpl_mpe.py", "update")
    assert f"(../ddpl_mpe.py#L{first}-L{last})" in new
    assert "# 2. Weigh" in new and "issm_weights(energy" in new and "# 3. Match" not in new
    for gone in (
        "[`nothing`](../ddpl_mpe.py#L1-L2)",
        block.replace("Weigh", "Wait"),
        block.replace("_mpe.py: up", "_mpe.py: un"),
    ):
        with pytest.raises(KeyError):
            quotes.updated(gone)


@every_page
def test_links_and_images(page):
    """Every file that a page links to is there, and every image says what it shows."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for mark, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text):
        assert not mark or len(words) > 10, f"{target} needs words"
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_first_page_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for line in ("pip install -r requirements.txt && python ddpl_mpe.py", "pip install -r requirements.txt && pytest"):
        assert line in text.splitlines()


def test_annotations_are_in_the_order_of_the_script():
    """Each note is keyed to a definition of ddpl_mpe.py, and the whole of the algorithm has notes."""
    headings = re.findall(r"^## \[`([\w.]+)`\]", (ROOT / "docs" / "reading.md").read_text(), re.MULTILINE)
    order = [name for name in quotes.definitions("ddpl_mpe.py") if "." not in name]
    assert headings == [name for name in order if name in headings] and len(headings) > 30
    functions = order[order.index("noise_schedule") : order.index("update_gaussian")]
    helpers = {"affine", "StackedLinear", "make_policy", "each"}  # of the note before them
    assert set(functions) - helpers <= set(headings)


# ---- the site


def browser_path():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly, and its address on a server of this machine."""
    if not os.environ.get("SITE_REQUIRED"):
        pytest.importorskip("mkdocs", reason="needs pip install -r requirements-docs.txt")
        pytest.importorskip("playwright", reason="needs pip install -r requirements-docs.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(site):
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=browser_path(), args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except Error as error:
            if os.environ.get("SITE_REQUIRED"):
                raise
            pytest.skip(f"needs Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 390], ids=["desk", "phone"])
def test_every_page_in_a_browser(site, browser, width):
    """No error on the console, no request that fails or leaves the site, no page wider than the screen; equations."""
    folder, address = site
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    assert {"index.html", "docs/issm.html", "docs/reading.html", "ddpl_mpe.py.html"} <= set(pages)
    problems, equations = [], {}
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda response: response.status < 400 or problems.append(response.url))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or problems.append(request.url))
    for name in pages if width > 1000 else [name for name in pages if name.startswith(("index", "docs/"))]:
        page.goto(f"{address}/{name}", wait_until="load")
        if name.startswith(("index", "docs/")):
            assert page.locator("h1").first.is_visible(), name
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"{name} is wider than the screen"
            )
            broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
            assert not broken, name
            text = page.locator("article").inner_text()
            assert "\\frac" not in text and "\\bar" not in text and "$" not in re.sub(r"\$\w+", "", text), name
            equations[name] = page.locator("math").count()
    assert not problems
    assert equations["docs/issm.html"] > 50 and equations["docs/reading.html"] > 5
    page.goto(f"{address}/docs/issm.html")
    drawn = page.locator("math[display=block]").first.bounding_box()
    assert drawn["width"] > 100 and drawn["height"] > 20
    page.close()


def test_a_link_to_lines_leads_there(site, browser):
    _, address = site
    page = browser.new_page()
    page.goto(f"{address}/docs/reading.html")
    target = page.locator("h2 a", has_text="issm_weights").first.evaluate("a => a.href")
    page.goto(target)
    number = page.locator(f"a[href='#{target.partition('#')[2]}']")
    line = """a => { let text = ""; while ((a = a.nextSibling).tagName != "A") text += a.textContent; return text }"""
    assert number.evaluate(line).strip().startswith("def issm_weights(")
    page.close()


def test_search_finds_without_the_network(site, browser):
    _, address = site
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(f"{address}/index.html")
    page.locator("input[name=query]").click()
    page.keyboard.type("effective sample size", delay=20)
    result = page.locator(".md-search-result__link").first
    result.wait_for(state="visible", timeout=10_000)
    assert "docs/" in result.get_attribute("href")
    page.close()
