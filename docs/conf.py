"""Configuration of Sphinx, with which `make docs` builds the pages in this folder and the API reference from docstrings."""

import re
import subprocess
import sys

from sphinx.application import Sphinx

import v05

project = "v05"
version = release = v05.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3

default_role = "py:obj"  # a name in single backticks becomes a link if the reference has it, else code
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
# Signatures show the names of these types instead of their definitions.
autodoc_type_aliases = {name: name for name in ("Array", "ArrayLike", "GroupIds")}
# The trainers and their dependencies are not installed where the pages are built.
autodoc_mock_imports = ["accelerate", "ray", "skyrl", "tensordict", "transfer_queue", "trl", "verl"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # docstrings give dtypes, which say more than annotations

PLAIN_SIDEBAR = {"color-sidebar-link-text--top-level": "var(--color-foreground-primary)"}
html_theme = "furo"  # has a search, and is dark if the reader's system is
html_title = "v05"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b91c1c", "color-brand-content": "#b91c1c", **PLAIN_SIDEBAR},
    "dark_css_variables": {"color-brand-primary": "#f87171", "color-brand-content": "#f87171", **PLAIN_SIDEBAR},
    "navigation_with_keys": True,
}
copybutton_exclude = ".linenos, .gp, .go"  # do not copy prompts and output
html_copy_source = False
html_use_index = html_domain_indices = False  # readers use the search, and no page links to an index
html_show_copyright = False


def insert_commands(_: Sphinx, page: str, source: list[str]) -> None:
    """Replace the mark in the page command-line by the help texts of the commands, as Markdown."""
    if page == "command-line":
        command = [sys.executable, "-m", "typer", "v05.cli", "utils", "docs", "--name", "v05"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        text = re.sub(r"^Example: (.*)$", r"Example: `\1`", text[text.index("## ") :], flags=re.MULTILINE)
        text = re.sub(
            r"(?<=[ (])--\w[\w-]*(?=[^`\n]*(`[^`\n]*`[^`\n]*)*$)", r"`\g<0>`", text, flags=re.MULTILINE
        )  # options that are not marked as code yet
        source[0] = source[0].replace("<!-- commands -->", text)


def indented_is_code(_: Sphinx, kind: str, name: str, member: object, options: object, lines: list[str]) -> None:
    """Mark indented paragraphs of docstrings as code, as Markdown does."""
    for i in reversed(range(2, len(lines))):
        if lines[i].startswith("    ") and not lines[i - 1] and lines[i - 2] and not lines[i - 2].startswith(" "):
            lines[i:i] = ["::", ""]


def short_types(_: Sphinx, kind: str, name: str, member: object, options: object, *signature: str | None) -> tuple[str | None, ...]:
    """Write the types of arguments and results as the source does."""

    def short(types: str) -> str:
        types = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", types)
        return re.sub(r"~numpy\.ndarray\[~?tuple\[~typing\.Any, \.\.\.\], ~numpy\.dtype\[~numpy\.(\w+)\]\]", r"NDArray[\1]", types)

    return tuple(types and short(types) for types in signature)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", indented_is_code, priority=400)  # before napoleon rewrites the sections
    app.connect("autodoc-process-signature", short_types)
    app.connect("source-read", insert_commands)
