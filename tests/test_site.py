"""The documentation site: built without a warning, whole, and asking no other host for anything."""

import re
import subprocess
import sys

import pytest

from helpers.documents import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--fail-on-warning", "--keep-going", "-d", place / "doctrees"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ROOT / "docs", place / "html"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return place / "html"


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
    assert "v05 compare --preset tiny" in page  # with its hyphens


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
