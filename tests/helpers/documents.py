"""Runs the fenced blocks of a Markdown page, top to bottom and in one namespace, in the current directory.

Python blocks are executed, and so is Python in an `invisible-code-block` comment, where a page checks its claims. In shell blocks,
`v05 ...` is executed on the smallest runs (`SMALLEST`). JSON and YAML are parsed. Above any other block the page must say why it
does not run:

    <!-- skip: next "needs a GPU" -->
    <!-- skip: next if(not installed("trl"), reason="needs trl: make test-integrations") -->
"""

import glob
import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

from sybil import Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.example import NotEvaluated
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from helpers.tiny_policy import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Options that are added after the page's own, and so override them.
SMALLEST = {
    "train": ["--preset", "smoke", "--rollouts", "64"],
    "compare": ["--preset", "smoke", "--rollouts", "64", "--seeds", "1", "--jobs", "1"],
    "simulate": ["--maximum", "5"],
}


def run_commands(example):
    from typer.testing import CliRunner

    from v05.cli import app

    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "v05", f"{line!r} is no command of v05; say above the block why it does not run"
        arguments = [found for word in words[1:] for found in (sorted(glob.glob(word)) or [word])]
        length = ["--max-new-tokens", "4"] if "--policy" in arguments else []
        result = CliRunner().invoke(app, arguments + SMALLEST.get(arguments[0], []) + length, env={"COLUMNS": "200"})
        assert result.exit_code == 0, f"{line!r} ended with {result.exit_code}:\n{result.output}\n{result.exception!r}"


def parse_yaml(example):
    import yaml

    yaml.safe_load(example.parsed)


EVALUATORS = {
    "python": PythonEvaluator(),
    "sh": run_commands,
    "json": lambda example: json.loads(example.parsed) and None,
    "yaml": parse_yaml,
}


def fences(document):
    # A fence marked {...} is a directive of MyST, not a block.
    for lexer in (FencedCodeBlockLexer("[^{\n]*"), DirectiveInHTMLCommentLexer("invisible-code-block", "python")):
        for region in lexer(document):
            language = region.lexemes.get("language") or region.lexemes.get("arguments") or ""
            evaluator = EVALUATORS.get(language)
            if evaluator is None:
                raise ValueError(f"{document.path}: a block is marked {language!r}; mark it as one of {', '.join(EVALUATORS)}")
            yield Region(region.start, region.end, region.lexemes["source"], evaluator)


PARSER = Sybil(parsers=[fences, SkipParser()])


def build_site(place):
    """The folder with the pages of `make docs`, built without a warning."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-d", place / "doctrees"]
    built = subprocess.run([*command, ROOT / "docs", place / "html"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return place / "html"


def make_inputs(directory):
    """Write the inputs that pages assume: a tiny model in path/to/model, and a few sums in tasks.jsonl."""
    tiny_model().save_pretrained(directory / "path" / "to" / "model")
    tiny_tokenizer().save_pretrained(directory / "path" / "to" / "model")
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in range(5) for b in range(5)]
    (directory / "tasks.jsonl").write_text("".join(lines))


def run_page(path):
    """Run a page. Returns its namespace, and a dictionary from the line of each block that did not run to the reason."""
    document = PARSER.parse(path)
    document.namespace["installed"] = lambda package: find_spec(package) is not None
    left_out = {}
    for example in document.examples():
        try:
            example.evaluate()
        except NotEvaluated:
            pass
        except SkipTest as reason:
            left_out[example.line] = str(reason)
        except Exception as error:
            raise AssertionError(f"{path}:{example.line}: {error}") from error
    return document.namespace, left_out


def blocks(path, language):
    """The sources of a page's blocks in one language, for tests that read them as a host would."""
    document = PARSER.parse(path)
    return [str(example.parsed) for example in document.examples() if example.region.evaluator is EVALUATORS[language]]


def table(path, name):
    """The cells of a table's rows, without its head, between the comments `NAME begins` and `NAME ends`."""
    _, _, lines = path.read_text().partition(f"<!-- {name} begins -->\n")
    lines = lines.partition(f"\n<!-- {name} ends -->")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
