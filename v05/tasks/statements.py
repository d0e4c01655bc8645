"""Finds the final answer in a text and normalises its spelling.

A text's answer is the content of its last `<answer>`, else of its last \\boxed{}, else the text after its last `####`, else the
text after its last "the answer is", else the whole text. Text before `</think>` is ignored.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

LONGEST_ANSWER = 4000  # characters; a longer answer is truncated and so never matches
SEARCHED_FOR_STATEMENT = 4000  # characters at the end of a text that are searched
LONGEST_SENTENCE_PART = 400  # characters

_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\S)")
_BETWEEN_BOXES = re.compile(
    r"[\s$.]*(?:,|;|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\})[\s$]*(?:(?:and|or)\b)?[\s$]*", re.IGNORECASE
)
_ANCHOR = re.compile(
    r"\banswers?\b(?:[^\n.:=]{0,60}?\b(?:is|are)\b\s*:?|\s*[:=\uff1a])|\u7b54\u6848\s*[:\u4e3a\u662f\uff1a]+", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?\u3002](?=\s|$)")
_CLAUSE_END = re.compile(r",?\s+(?:because|since|as|so|which|where|by|after|therefore|for)\b|\s+[-\u2013\u2014]\s+", re.IGNORECASE)
_COPULA = re.compile(r"\b(?:is|are|was|were|be|equals?|gives?|gets?|obtain|have|has)\b", re.IGNORECASE)
_END = re.compile(r"[.,;?\s*_`]+$|(?<!\d)[.,;?!\s*_`]+$")
_ADVERBS = re.compile(r"^(?:(?:therefore|thus|then|simply|just|exactly|equal to|hence|indeed)\b[\s,:]*)+", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:or|and|either|maybe|perhaps)\b", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z(}])")
_NEGATED = re.compile(r"(?:\bnot|n't|n\u2019t|\bnever|[-+*/\u00d7])\s*(?:equal\s+(?:to\s+)?)?$", re.IGNORECASE)
_MATH = re.compile(r"\$\$?([^$]+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_LOOSE_NUMBER = re.compile(
    r"(?<![\w.:/,-])[-+]?[$\u20ac\u00a3]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?\s?%?(?![\w:/-])"
)


def statements(text: str, *, prose: bool) -> Iterator[str]:
    """Possible final answers of a text: first the most literal, then narrower ones ("5" for "5 because it is prime").

    With `prose`, the last sentence is also read if the text has no marked answer.
    """
    text = re.split(r"</think>", text, flags=re.IGNORECASE)[-1]
    tags = _TAG.findall(text)
    if tags:
        text = tags[-1]
    boxes = _boxed(text)
    if boxes is not None:
        yield boxes[:LONGEST_ANSWER]
        return
    if "####" in text:
        yield text.rpartition("####")[2].strip().partition("\n")[0][:LONGEST_ANSWER]
        return
    tail = text[-SEARCHED_FOR_STATEMENT:]
    anchors = list(_ANCHOR.finditer(tail))
    if anchors:
        yield from _narrowed(tail[anchors[-1].end() :])
        return
    yield text.strip()[:LONGEST_ANSWER]
    if prose and _PROSE.search(tail):
        yield from _last_words(tail.strip())


def is_marked(text: str) -> bool:
    """Whether a text marks its final answer in one of the ways that the module lists."""
    return bool(_TAG.search(text) or _BOX.search(text) or "####" in text or _ANCHOR.search(text[-SEARCHED_FOR_STATEMENT:]))


def _last_words(tail: str) -> Iterator[str]:
    """Possible answers in the last sentence: "It is $5/2$.", "She has 41 apples."."""
    last_line = tail.rpartition("\n")[2].strip()
    sentences = [sentence for sentence in _sentences(last_line) if sentence.strip()]
    if sentences:
        copulas = list(_COPULA.finditer(sentences[-1])) or list(re.finditer(r"=|:\s", sentences[-1]))
        if copulas:
            statement = sentences[-1][copulas[-1].end() :]
            if not re.match(r"\s*(?:n't|n\u2019t|not\b|never\b)", statement):
                yield from _narrowed(statement)
    marked = list(_MATH.finditer(tail))
    numbers = [number for number in _LOOSE_NUMBER.finditer(tail) if not _NEGATED.search(tail[: number.start()][-20:])]
    if marked and (not numbers or marked[-1].end() >= numbers[-1].end()):
        yield next(group for group in marked[-1].groups() if group is not None)
    elif numbers:
        yield numbers[-1][0]


def _sentences(line: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(line):
        yield line[start : end.start()]
        start = end.end()
    yield line[start:]


def _narrowed(tail: str) -> Iterator[str]:
    """Possible answers at the start of `tail`: its first line, sentence and clause, then the formula or number it begins with."""
    line = _ADVERBS.sub("", tail.strip("*_` \n\t").partition("\n")[0].strip()[:LONGEST_SENTENCE_PART])
    sentence = next(_sentences(line))
    clause = _CLAUSE_END.split(sentence, maxsplit=1)[0]
    parts = [_END.sub("", part).strip("*_` ") for part in (line, sentence, clause)]
    if marked := _MATH.match(line):
        parts += [group for group in marked.groups() if group is not None]
    elif (number := _LOOSE_NUMBER.match(line)) and not _HEDGE.search(line):
        parts.append(number[0])
    yield from dict.fromkeys(part for part in parts if part)


def _boxed(text: str) -> str | None:
    """The content of the last box, or of several last boxes joined by "and", "or" or a comma. None without a box."""
    found: list[tuple[int, int, str]] = []
    starts = list(_BOX.finditer(text))
    for match in reversed(starts[-64:]):
        box = _box_at(text, match.end())
        if box is None:
            if not found:
                return ""  # the last box was cut off: there is no final answer
            break
        end, content = box
        if found and found[-1][0] < end:  # the last box lies within this one
            found = [(match.start(), end, content)]
            continue
        if found and not _BETWEEN_BOXES.fullmatch(text[end : found[-1][0]][:100]):
            break
        found.append((match.start(), end, content))
    return "; ".join(content for _, _, content in reversed(found)) if starts else None


def _box_at(text: str, start: int) -> tuple[int, str] | None:
    """End and content of the group or single symbol at `start`; None if its brace is never closed."""
    if text[start] != "{":
        symbol = re.compile(r"\\[a-zA-Z]+|\S").match(text, start)
        assert symbol is not None
        return symbol.end(), symbol[0]
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end(), text[start + 1 : brace.start()]
    return None


_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a\u207f", "0123456789-+n")
_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\u00d7": "\\times ", "\u22c5": "\\cdot ",
    "\u00b7": "\\cdot ", "\u00f7": "/", "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ",
    "\u2260": "\\ne ", "\u2248": "\\approx ", "\u00b1": "\\pm ", "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ",
    "\u2220": "\\angle ", "\u00b0": "^{\\circ}", "\u2032": "'", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2044": "/", "\u3001": ",", "\u03b1": "\\alpha ", "\u03b2": "\\beta ", "\u03b3": "\\gamma ", "\u03b8": "\\theta ",
    "\u03bb": "\\lambda ", "\u03bc": "\\mu ", "\u03c3": "\\sigma ", "\u03c6": "\\phi ", "\u03c9": "\\omega ",
    "\u0394": "\\Delta ", "\u03a9": "\\Omega ",
}  # fmt: skip
_SAME_COMMANDS = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "leq": "\\le", "geq": "\\ge", "leqslant": "\\le",
    "geqslant": "\\ge", "neq": "\\ne", "lt": "<", "gt": ">", "thinspace": " ", "quad": " ", "qquad": " ", "left": "",
    "right": "", "big": "", "Big": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "displaystyle": "", "limits": "",
    "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "degree": "^{\\circ}", "varnothing": "\\emptyset",
}  # fmt: skip
_TEXT_COMMAND = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|textrm|textnormal|texttt|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|rm|bf|operatorname\*?|emph|boldsymbol|"
    r"underline|textup)\s*\{([^{}]*)\}"
)


def one_spelling(text: str) -> str:
    """A text in a normal form, without differences that do not change its meaning.

    These are kinds of dashes and quotes, commands for layout and fonts, dollar signs around formulas, bold, and a final full stop.
    """
    text = re.sub("[\u00bc-\u00be\u2150-\u215e]", lambda vulgar: " " + unicodedata.normalize("NFKC", vulgar[0]), text)
    text = re.sub(
        "[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f]+",
        lambda power: "^{" + power[0].translate(_SUPERSCRIPTS) + "}",
        text,
    )
    text = re.sub("\u221a\\s*(\\d+|[a-zA-Z]|\\([^()]*\\))", lambda root: "\\sqrt{" + root[1].strip("()") + "}", text)
    # The circled number \u2460 must not become 1.
    text = re.sub("[^\u2460-\u2473]+", lambda plain: unicodedata.normalize("NFKC", plain[0]), text)
    text = text.replace("\u6216", " or ").replace("\u548c", " and ")
    text = text.translate({ord(symbol): written for symbol, written in _SYMBOLS.items()})
    text = re.sub(r"\\\[|\\\]|\\\(|\\\)", " ", text)
    text = re.sub(r"(?<!\\)\\[,;:!> ]|~", " ", re.sub(r"(?<=\d),?\\[,!](?=\d{3})|(?<=\d)\{,\}(?=\d{3})", ",", text))
    text = re.sub(r"(?<!\\)\$\$?(?=\S)([^$]*?)(?<=\S)\$\$?(?!\d)", r"\1", text)
    for _ in range(4):  # fonts within fonts
        text, found = _TEXT_COMMAND.subn(r" \1 ", text)
        if not found:
            break
    text = re.sub(r"\\([a-zA-Z]+)\*?", lambda command: _same_command(command), text)
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\\#", "#").replace("\\&", "&").replace("\\_", "_")
    text = re.sub(r"(?<!\S)(\*\*|__|`)(?=\S)(.+?)(?<=\S)\1(?=[\s.,;:!?)]|$)", r"\2", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\circ\b", " \u00b0", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    # MW must not become milliwatt when case is folded.
    text = re.sub(r"(?<=[\d\s])M(?=(?:W|Hz|eV|B|b|J|V|Pa|N|g|m|L)(?![A-Za-z]))", "mega", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"[\s.,;:!?]+$", "", text) if not re.search(r"\d[!]$", text) else text
    return text.strip("\"'` ").strip()


def _same_command(command: re.Match[str]) -> str:
    name = command[1]
    return _SAME_COMMANDS[name] if name in _SAME_COMMANDS else command[0]


def folded(text: str) -> str:
    """A text in normal form with case folded and spaces removed, for comparison. Spaces between words or between numbers stay."""
    text = one_spelling(text)
    words = re.search(r"[^\W\d_]{2}", re.sub(r"\\[a-zA-Z]+", " ", text))
    kept = r"(?<=\d) (?=\d)|(?<=[^\W\d_]) (?=[^\W\d_])" if words else r"(?<=\d) (?=\d)"
    return re.sub(f"({kept})| ", r"\1", text).casefold()
