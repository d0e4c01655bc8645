"""The page in headless Chromium, opened from a file: no complaint and no request, every chart is drawn, and completions can be
searched.
"""

import pytest

from helpers.chromium import PATIENCE, assert_looks_alike, chromium
from helpers.made_up_runs import HOSTILE, write_run
from v05.report.figures import document
from v05.report.page import write_page
from v05.report.runs import find_runs, read_runs, seeds_of

pytestmark = pytest.mark.browser
TITLE = "runs & <b>more</b>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for spec in ("grpo@8", "grpo@16", "v05@4..16"):
        for seed in (0, 1):
            write_run(place / f"{spec}-seed{seed}", spec, seed, steps=24, of=24)
    write_run(place / "calibrated@4..16-seed0", "calibrated@4..16", 0, steps=9, of=24)
    write_run(place / "old", "dr_grpo@4", 0, steps=24, of=24, new=False)
    write_run(place / "elsewhere", "grpo@8", 0, steps=24, of=24, evaluation={"prompts": 64})
    return drawn(place, TITLE, tmp_path_factory.mktemp("page") / "page.html")


def drawn(place, title, file):
    runs, _ = read_runs(find_runs([place]), lambda items: items)
    write_page(document(seeds_of(runs), runs, None, lambda items, _: items), title, file)
    return file


@pytest.fixture
def open_page(browser):
    """Opens a file. In the end there may be no message in the console, no error, no dialog and no request."""
    complaints, contexts = [], []

    def open_page(file, **context):
        contexts.append(browser.new_context(viewport={"width": 1300, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: complaints.append(request.url) if not ours(request.url, file) else None)
        page.goto(file.as_uri(), timeout=PATIENCE)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ours(url, file):
    return url == file.as_uri() or url.startswith(("data:", "blob:"))


def marks(page):
    """The number of lines, bars and points that each chart has drawn."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) =>
            [chart.id, chart.querySelectorAll(".js-line, .barlayer .point, .scatterlayer .point").length]))"""
    )


def colours(page):
    return page.evaluate("""() => [...document.querySelectorAll("#chart-accuracy .js-line")].map((line) => line.style.stroke)""")


def test_every_chart_is_drawn(file, open_page):
    page = open_page(file)
    drawn = marks(page)
    assert len(drawn) == 15
    assert all(count > 0 for count in drawn.values()), drawn
    assert page.title() == TITLE
    assert page.locator("h1").text_content() == TITLE
    assert page.locator("#summary tbody tr").count() == 5
    assert page.locator("#summary").get_by_text("unfinished").count() == 1
    notices = page.locator("#notices li").all_text_contents()
    assert notices[0].startswith("1 of 9 runs is unfinished")
    assert "completions: not recorded by old" in notices
    sideways = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not sideways


@pytest.mark.parametrize("width", [1300, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_looks_as_it_did(width, scheme, file, open_page):
    page = open_page(file, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 2400})
    page.wait_for_timeout(500)  # charts are drawn anew for the width
    assert_looks_alike(page, f"report-{width}-{scheme}")


def test_methods_axes_and_tasks_are_switched(file, open_page):
    page = open_page(file)
    before = colours(page)
    button = page.locator("#methods button", has_text="v05@4..16").first
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert len(colours(page)) < len(before)
    button.click()
    assert colours(page) == before
    for axis, title in (("tokens", "generated tokens"), ("seconds", "training time (s)"), ("rollouts", "training rollouts")):
        page.locator("#axes button", has_text=axis).click()
        assert page.locator("#chart-gradient .xtitle").text_content() == title
        assert all(count > 0 for count in marks(page).values())
    page.locator("#setting").select_option(index=1)
    assert page.locator("#summary tbody tr").count() == 1
    assert page.locator("#chart-calibration .empty").is_visible()  # GRPO has no prior


def test_completions_are_searched(file, open_page):
    page = open_page(file)
    assert page.locator(".sample").count() == 12
    page.locator("#more").click()
    assert page.locator(".sample").count() == 24
    page.locator("#filter-text").fill("onerror")
    assert page.locator(".sample .completion", has_text="onerror").first.locator(".text").text_content() == HOSTILE
    assert page.title() == TITLE  # the script in the completion has not run
    assert page.locator("#samples img").count() == 0
    page.locator("#filter-text").fill("")
    page.locator("#filter-run").select_option("v05@4..16-seed1")
    page.locator("#filter-step").select_option(index=2)
    step = page.locator("#filter-step").input_value()
    assert page.locator("#found").text_content().startswith("8 of ")
    assert all(f"step {step}" in text for text in page.locator(".sample header").all_text_contents())
    page.locator("#filter-reward").select_option("right")
    assert set(page.locator(".reward").all_text_contents()) == {"1"}
    assert "v05@4..16-seed1" in page.locator(".sample header").first.text_content()


def test_light_dark_and_paper(file, open_page):
    page = open_page(file, color_scheme="light")
    light = colours(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => document.querySelector('#chart-accuracy .js-line').style.stroke !== before", arg=light[0])
    assert not set(colours(page)) & set(light)
    assert len(page.pdf(format="A4")) > 50_000
    assert not set(colours(page)) & set(light)  # still dark after printing


def test_a_page_of_old_runs_alone(tmp_path, open_page):
    write_run(tmp_path / "runs" / "old", "grpo@8", 0, steps=24, of=24, new=False)
    page = open_page(drawn(tmp_path / "runs", "old", tmp_path / "page.html"))
    empty = {name for name, count in marks(page).items() if not count}
    assert empty == {
        f"chart-{name}" for name in ("noise", "group-sizes", "calibration", "prior-auc", "rejected", "weight", "weights")
    }
    assert page.locator(".empty:visible").count() == len(empty)
    assert page.get_by_text("These runs recorded no completions.").is_visible()
    assert page.locator("#axes button").all_text_contents() == ["rollouts", "seconds"]
