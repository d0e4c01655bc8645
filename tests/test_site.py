"""The documentation site: built without a warning, complete, and without requests to other hosts."""

import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.chromium import PATIENCE, assert_looks_alike, chromium
from helpers.documents import ROOT, build_site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("site"))


def test_every_page_is_there_and_can_be_reached(site):
    reached, waiting = set(), [site / "index.html"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            links = re.findall(r'href="([^":#]+\.html)', page.read_text())
            waiting += [(page.parent / link).resolve() for link in links]
    pages = {site / source.relative_to(ROOT / "docs").with_suffix(".html") for source in (ROOT / "docs").rglob("*.md")}
    assert pages <= reached


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("api/ops.html", "v05.ops.fused_advantage"),
        ("api/ops.html", "v05.ops.AdvantageStats"),
        ("api/ops.html", "v05.ops.token_statistics"),
        ("api/ops.html", "v05.ops.policy_loss"),
        ("api/ops.html", "v05.ops.LossFigures"),
        ("api/budget.html", "v05.budget.RolloutAllocator.lease"),
        ("api/methods.html", "v05.methods.Calibration"),
        ("api/path_counting.html", "v05.path_counting.path_counting_advantages"),
        ("api/prior.html", "v05.prior.calibration.Calibrator.fit"),
        ("api/integrations.html", "v05.integrations.trl.V05Trainer"),
        ("api/reference.html", "v05.reference.calibrated"),
        ("api/reference.html", "v05.reference.losses.policy_loss"),
        ("api/reference.html", "v05.reference.tokens.token_statistics"),
    ],
)
def test_the_reference_has_what_is_public(page, name, site):
    assert f'id="{name}"' in (site / page).read_text()


def test_arguments_are_a_list(site):
    page = (site / "api/ops.html").read_text()
    assert re.search(r"Parameters<.*?<li><p><strong>rewards</strong>", page, flags=re.DOTALL)
    assert "Raises" in page
    assert "Alias for field" not in page


def test_the_command_line_is_that_of_the_package(site):
    from typer.main import get_command

    from v05.cli import app

    page = re.sub(r"<.*?>", "", (site / "command-line.html").read_text())
    for name in get_command(app).commands:
        assert f"v05 {name}" in page
    assert "v05 compare --preset tiny" in page  # the hyphens are kept


def test_nothing_is_asked_of_another_host(site):
    asked = re.compile(
        r"<(?:script|img|iframe|source|video|audio)[^>]*\bsrc=[\"'](?:https?:)?//|<link[^>]*\bhref=[\"'](?:https?:)?//"
    )
    imported = re.compile(r"url\(\s*[\"']?(?:https?:)?//|@import\s+[\"'](?:https?:)?//")
    for file in site.rglob("*"):
        if file.suffix == ".html":
            assert not asked.search(file.read_text()), file
        if file.suffix in (".html", ".css"):
            assert not imported.search(file.read_text()), file
        if file.suffix == ".js":
            assert not re.search(r"(?:fetch|importScripts|src\s*=)\s*\(?\s*[\"'`]https?://", file.read_text()), file


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(site):
    """The address of the site on a local server. From a file, the search may not read the pages that it finds."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def open_page(browser, address):
    """Opens a page of the site in a window of a given width. In the end no script may have failed, and no other host been asked."""
    complaints, contexts = [], []

    def open_page(name, width, **context):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith((address, "data:")) or complaints.append(request.url))
        page.goto(f"{address}/{name}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


# The elements that reach beyond the window, except those in a box that scrolls.
BEYOND = """() => [...document.querySelectorAll("article *")]
    .filter(each => !each.closest(".table-wrapper, pre, .highlight") && each.getBoundingClientRect().right > innerWidth + 1)
    .map(each => each.outerHTML.slice(0, 100))"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1300])
def test_no_page_is_wider_than_the_window(width, site, address, open_page):
    page, too_wide = open_page("index.html", width), {}
    for file in sorted(site.rglob("*.html")):
        page.goto(f"{address}/{file.relative_to(site)}")
        scrolled, beyond = page.evaluate("document.documentElement.scrollWidth"), page.evaluate(BEYOND)
        if scrolled > width or beyond:
            too_wide[file.name] = (scrolled, beyond[:3])
    assert too_wide == {}


@pytest.mark.browser
def test_the_first_screen_leads_on(open_page):
    """In a wide window every page is one click away, beside the text. In a narrow window the links are behind one button. In both
    the text begins at the top.
    """
    wide, narrow = open_page("index.html", 1300), open_page("index.html", 390)
    assert wide.locator(".sidebar-tree a", has_text="In your trainer").is_visible()
    sidebar = narrow.locator(".sidebar-drawer")
    assert sidebar.bounding_box()["x"] < 0
    narrow.locator(".nav-overlay-icon").first.click()
    narrow.wait_for_function("document.querySelector('.sidebar-drawer').getBoundingClientRect().x >= 0")
    for page in (wide, narrow):
        assert page.locator("article h1").bounding_box()["y"] < 200


@pytest.mark.browser
def test_dark_where_the_system_is(open_page):
    def brightness(page):
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    assert brightness(open_page("index.html", 1300, color_scheme="light")) > 700
    dark = open_page("optimal.html", 1300, color_scheme="dark")
    assert brightness(dark) < 100
    assert dark.evaluate("getComputedStyle(document.querySelector('article img')).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.browser
@pytest.mark.parametrize(("page", "width"), [("index", 1300), ("index", 390), ("methods", 1300), ("hosts/verl", 390)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_look_as_they_did(page, width, scheme, open_page):
    shown = open_page(f"{page}.html", width, color_scheme=scheme)
    assert_looks_alike(shown, f"{page.replace('/', '-')}-{width}-{scheme}")


@pytest.mark.browser
def test_search_finds_a_function(open_page):
    page = open_page("search.html?q=fused_advantage", 1300)
    page.locator("#search-results a", has_text="v05.ops").first.wait_for()


@pytest.mark.browser
def test_code_is_copied_as_it_stands(open_page):
    page = open_page("hosts/verl.html", 1300)
    block = page.locator("div.highlight", has_text="main_ppo").first
    block.hover()
    block.locator("button.copybtn").wait_for()
    target = block.locator("button.copybtn").get_attribute("data-clipboard-target")
    assert page.locator(target).text_content() == block.locator("pre").text_content()
    assert page.locator("div.highlight").count() == page.locator("button.copybtn").count() > 1
