"""Recognises units and other words next to a number ("5 km/h", "9 (apples)", "$5") and normalises their spelling."""

from __future__ import annotations

import re

_NAMES = {
    "km": "kilometer kilometers kilometre kilometres kms", "m": "meter meters metre metres",
    "mm": "millimeter millimeters millimetre millimetres", "cm": "centimeter centimeters centimetre centimetres",
    "nm": "nanometer nanometers nanometre nanometres", "in": "inch inches", "ft": "foot feet", "yd": "yard yards",
    "mi": "mile miles", "s": "second seconds sec secs", "min": "minute minutes mins", "h": "hour hours hr hrs",
    "ms": "millisecond milliseconds", "day": "days", "week": "weeks", "month": "months", "year": "years yr yrs",
    "g": "gram grams", "kg": "kilogram kilograms kilo kilos kgs", "mg": "milligram milligrams", "t": "ton tons tonne tonnes",
    "lb": "pound pounds lbs", "oz": "ounce ounces", "l": "liter liters litre litres",
    "ml": "milliliter milliliters millilitre millilitres", "n": "newton newtons", "j": "joule joules",
    "kj": "kilojoule kilojoules", "w": "watt watts", "kw": "kilowatt kilowatts", "v": "volt volts",
    "a": "ampere amperes amp amps", "k": "kelvin kelvins", "c": "celsius", "f": "fahrenheit", "pa": "pascal pascals",
    "hz": "hertz", "ev": "electronvolt electronvolts", "mol": "mole moles", "ohm": "ohms \u03c9", "rad": "radian radians",
    "erg": "ergs", "\u00b0": "degree degrees deg", "%": "percent percentage pct", "$": "dollar dollars usd us$ bucks",
    "\u20ac": "euro euros eur", "\u00a3": "pounds-sterling gbp", "cent": "cents \u00a2", "mph": "", "kph": "kmh kmph",
    "rpm": "", "gev": "", "mev": "", "kev": "", "au": "", "pc": "parsec parsecs", "ly": "lightyear lightyears", "ghz": "",
    "mhz": "", "khz": "", "angstrom": "angstroms \u00e5", "bit": "bits", "byte": "bytes", "gb": "", "mb": "", "kb": "",
    "kcal": "", "mmol": "", "kpa": "",
    "um": "micrometer micrometers micron microns", "sq": "", "cal": "calorie calories", "bar": "bars", "atm": "",
}  # fmt: skip
_UNIT_OF = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}
_SAME_AS = {"mph": "mi/h", "kph": "km/h"}
_NO_UNIT = {"unit", "units"}
_SINGLE_LETTERS = set("msghlLNJWVAKCFt")
_CURRENCIES = "$\u20ac\u00a3\u00a5\u20b9"
_FORMULA_WORDS = {
    "pi", "sqrt", "sin", "cos", "tan", "cot", "csc", "log", "ln", "exp", "lim", "max", "mod", "gcd", "lcm", "infty", "theta",
    "alpha", "beta", "cdot", "times", "frac", "le", "ge", "ne", "pm", "cup", "cap", "infinity", "i", "e", "x", "y", "z",
}  # fmt: skip
_NEVER_UNITS = {
    "and", "or", "because", "since", "so", "which", "that", "when", "if", "to", "by", "from", "minus", "plus", "but", "not",
    "is", "are", "than", "th", "st", "nd", "rd", "choose", "over", "divided", "multiplied", "with", "as", "then", "has", "have",
    "was", "were", "remainder",
}  # fmt: skip
MOST_WORDS = 5


def read_unit(text: str) -> str | None:
    """The normalised unit in the text after a number. Empty if there is no text, None if the text is something else.

    A unit is a remark in brackets, words, or symbols: "(apples)", "square meters", "m/s^2". A single letter, or letters that touch
    the number ("5x", "2ab"), count as a unit only if they are a well-known one.
    """
    body = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*(?:\{[^{}]*\})?)\}", r"\1/\2", text.strip())
    body = body.replace("\\mu ", "u").replace("\\Omega", "ohm")
    if not body:
        return ""
    if remark := re.fullmatch(r"\(([^()\d=+*^]*)\)", body):
        return _spelled(remark[1])
    tokens = re.findall(r"[^\W\d_]+|[%\u00b0$\u20ac\u00a3\u00a5\u00a2]", body)
    powers = r"\^\s*\{?\s*-?\d\s*\}?|(?<=[a-z])-?\d(?!\d)"
    rest = re.sub(rf"[^\W\d_]+|[%\u00b0$\u20ac\u00a3\u00a5\u00a2]|{powers}|[/. \-()]|\\", "", body)
    if rest or not tokens or len(tokens) > MOST_WORDS or "\\" in body.replace("\\cdot", ""):
        return None
    words = [token.casefold() for token in tokens if token != "cdot"]
    if any(word in _FORMULA_WORDS or word in _NEVER_UNITS for word in words):
        return None
    known = all(word in _UNIT_OF or word in _NO_UNIT or word in ("per", "square", "cubic", "squared", "cubed") for word in words)
    single = [token for token in tokens if len(token) == 1 and token.isalpha()]
    touching = not text[0].isspace()
    if any(token not in _SINGLE_LETTERS for token in single) or (touching and single and len(tokens) == 1):
        return None
    if len(single) > 1 and not re.search(r"/|\^\s*\{?\s*-|\bper\b|cdot", body):
        return None  # "m v^2" is a product of variables
    ratio = all(word in _UNIT_OF or len(word) > 2 for word in words) and "/" in body
    if not known and not ratio and (touching or single or re.search(r"[/^\\]|\d", body)):
        return None
    return _spelled(body)


def leading_currency(text: str) -> tuple[str, str]:
    """The currency sign at the beginning of a text, or "", and the text without it. A minus sign before it is kept."""
    match = re.match(rf"(-?)\s*(?:US)?([{re.escape(_CURRENCIES)}])\s*(?=[\d.])", text)
    return (match[2], match[1] + text[match.end() :]) if match else ("", text)


def trailing_unit(text: str) -> tuple[str, str]:
    """A formula without the well-known unit or the remark in brackets at its end ("2\\sqrt{3} cm"), and that unit or ""."""
    match = re.search(
        r"\s*\(([A-Za-z][A-Za-z ,'-]{2,})\)$|(?<=[\s})])((?:square |cubic )?[A-Za-z\u00b0%$][A-Za-z/ ]*(?:\^\{?\d\}?)?)$", text
    )
    if match is None or match.start() == 0:
        return text, ""
    unit, body = _spelled(match[0]), text[: match.start()].rstrip()
    if match[2] and read_unit(f" {match[2]}") is None:
        return text, ""
    words = re.findall(r"[a-z\u00b0%$]+", unit)
    variables = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|pi|sqrt", "", body))
    if variables or any(word in _FORMULA_WORDS for word in words) or not (match[1] or all(word in _UNIT_OF for word in words)):
        return text, ""
    return body, unit


def same_unit(unit: str, other: str) -> bool:
    """Whether two units are equal, one is missing, or one is the other with more words ("apples", "apples in all")."""
    if not unit or not other or unit == other:
        return True
    if unit.split()[0] in _UNIT_OF or other.split()[0] in _UNIT_OF:
        return False
    return f"{unit} ".startswith(f"{other} ") or f"{other} ".startswith(f"{unit} ")


def is_unit(text: str) -> bool:
    """Whether a text consists only of well-known units ("km/h")."""
    words = re.findall(r"[^\W\d_]+", text)
    return bool(words) and all(word.casefold() in _UNIT_OF for word in words) and not re.search(r"[=+*()\\]|(?<!\^)\d", text)


def _spelled(text: str) -> str:
    text = re.sub(r"\\cdot|[{}()]", " ", text).casefold()
    text = re.sub(r"\bsquare\s+(\S+)|(\S+)\s+squared\b", lambda unit: (unit[1] or unit[2]) + "^2", text)
    text = re.sub(r"\bcubic\s+(\S+)|(\S+)\s+cubed\b", lambda unit: (unit[1] or unit[2]) + "^3", text)
    text = re.sub(r"\s*\bper\b\s*", "/", text)
    text = re.sub(r"[^\W\d_]+", lambda word: _one_name(word[0]), text)
    text = re.sub(r"(?<=[a-z])(?=-?\d)", "^", text)
    return re.sub(r"\s*([/^])\s*", r"\1", re.sub(r"\s+", " ", text.replace(".", " "))).strip()


def _one_name(word: str) -> str:
    if word in _NO_UNIT:
        return ""
    unit = _UNIT_OF.get(word)
    if unit is not None:
        return _SAME_AS.get(unit, unit)
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
