"""Every block of README.md and of the pages in docs/ runs or says why it does not, and the tables show the committed results."""

import math
import runpy

import pytest

from helpers.documents import PAGES, ROOT, make_inputs, run_page, table
from v05.ops import LOSSES


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory with the inputs that the pages assume."""
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_or_says_why(page, place):
    _, left_out = run_page(page)
    assert all(left_out.values())


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```python\n1 / 0\n```\n", "page.md:1: division by zero"),
        ("text\n\n```python\na = 1\n```\n\n<!-- invisible-code-block: python\nassert a == 2\n-->\n", "page.md:7"),
        ("```sh\nmake demo\n```\n", "'make demo' is no command of v05; say above the block why it does not run"),
        ("```sh\nv05 train --no-such-option\n```\n", "ended with 2"),
        ('```json\n{"a": }\n```\n', "page.md:1"),
        ('- a list\n\n  ```python\n  assert "nested" == ""\n  ```\n', "page.md:3"),
        ("```\nno language\n```\n", "marked ''; mark it as one of python, sh, json, yaml"),
        ("```rust\nfn main() {}\n```\n", "marked 'rust'"),
    ],
)
def test_a_block_that_fails_or_cannot_run_is_named(page, complaint, tmp_path):
    (tmp_path / "page.md").write_text(page)
    with pytest.raises((AssertionError, ValueError), match=r"page\.md") as raised:
        run_page(tmp_path / "page.md")
    assert complaint in str(raised.value)


def test_a_block_may_say_why_it_does_not_run(tmp_path):
    (tmp_path / "page.md").write_text(
        '<!-- skip: next "needs a GPU" -->\n```sh\nmake demo\n```\n\n```{toctree}\npage\n```\n\n'
        '<!-- skip: next if(not installed("no_such_host"), reason="needs the host") -->\n```python\n1 / 0\n```\n\n'
        '<!-- skip: next if(not installed("json"), reason="needs json") -->\n```python\na = 1\n```\n'
    )
    namespace, left_out = run_page(tmp_path / "page.md")
    assert left_out == {2: "needs a GPU", 11: "needs the host"}
    assert namespace["a"] == 1


def test_the_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    for script, page, name in (("table", "speed", "bench/table.py"), ("rounds", "budgets", "rounds")):
        bench, text = runpy.run_path(str(ROOT / "bench" / f"{script}.py")), (ROOT / "docs" / f"{page}.md").read_text()
        assert bench["replaced"](text, name, bench["table"]()) == text
    for path, text in runpy.run_path(str(ROOT / "bench" / "headline.py"))["pages"]().items():
        assert path.read_text() == text


def test_the_losses_are_those_of_the_code():
    rows = [
        [
            f"`{loss.name}`",
            loss.surrogate.name.lower(),
            loss.ratio,
            f"{loss.clip_low:g}",
            f"{loss.clip_high:g}",
            "none" if math.isinf(loss.clip_dual) else f"{loss.clip_dual:g}",
            loss.aggregation,
            loss.source,
        ]
        for loss in LOSSES.values()
    ]
    assert table(ROOT / "docs" / "losses.md", "losses") == rows
