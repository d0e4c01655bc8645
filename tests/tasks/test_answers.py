"""Rewards of completions: right answers count in any spelling, and nothing counts that only looks like the reference."""

import itertools
import threading
import time

import pytest

from v05.tasks import formulas
from v05.tasks.answers import TIME_LIMIT, read_answer, verify_answer
from v05.tasks.numbers import arithmetic, read_number, same_number
from v05.tasks.statements import one_spelling, statements

# Each case is a reference, right completions, and wrong completions.
CASES = [
    (
        "41",
        ["She has 41 apples in total.", "The answer is 41 apples because she got more.", "\\boxed{26+15=41}"],
        ["\\boxed{26+15}"],
    ),
    ("1024", ["\\boxed{2^{10}}"], []),
    ("0.5", ["\\boxed{\\frac12}", "50%"], []),
    ("50%", ["0.5"], []),
    ("50\\%", ["\\boxed{50}"], []),
    ("\\frac{1}{3}", ["0.333333"], ["0.333"]),
    ("1234567", [], ["1234568"]),
    ("0", [], ["1e-9"]),
    ("0.0000001", [], ["0"]),
    ("12345.67", [], ["12345.68"]),
    (0.30000000000000004, ["0.3"], []),
    (7, ["7.0"], ["seven"]),
    ("\\sqrt{8}", ["\\boxed{2\\sqrt{2}}", "2.828427"], ["2.8285"]),
    ("x=1 or x=2", ["\\boxed{x=2, x=1}", "\\boxed{1,2}"], ["\\boxed{1}"]),
    ("1,2", ["\\boxed{1}, \\boxed{2}"], []),
    ("x=1, y=2", ["\\boxed{(1,2)}"], []),
    ("x=1,y=2", [], ["x=2,y=1", "2,1"]),
    ("(1,2)", [], ["(2,1)", "[1,2]"]),
    ("(1,2]", ["(1,2]"], []),
    ("[0, \\infty)", ["\\boxed{[0,\\infty)}"], []),
    ("(-\\infty,1)\\cup(2,\\infty)", ["\\boxed{(-\\infty, 1) \\cup (2, \\infty)}"], []),
    ("\\{1,2\\}", ["{2,1}", "1, 2"], []),
    ("1,234", ["1234", "1{,}234"], []),
    ("1234", ["1,234"], []),
    ("100, 200, 300", ["100,200,300"], []),
    ("Evelyn", ["The answer is Evelyn.", "I think it is Evelyn.", "**Evelyn**", "evelyn"], []),
    ("\\text{Evelyn}", ["Evelyn"], []),
    ("New York City", ["new  york city", "The answer is New York City."], []),
    ("east", ["\\boxed{\\text{East}}"], []),
    (
        "B",
        [
            "(B)",
            "\\boxed{\\text{(B)}}",
            "The answer is (B) Paris",
            "The correct answer is B.",
            "b",
            "The best choice is B",
            "B) foo",
        ],
        ["\\boxed{B, C}", "Answer: C", "\\boxed{C) foo}"],
    ),
    ("(B)", ["B"], []),
    ("A", [], ["The answer is a cat"]),
    ("2024-01-01", ["The answer is 2024-01-01."], ["2024 - 1 - 1"]),
    ("January 1, 2024", ["January 1, 2024"], ["2024"]),
    ("12:30", ["12:30"], ["0.4"]),
    ("3:4", [], ["0.75"]),
    ("5 km/h", ["5 km/h", "\\boxed{5\\text{ km/h}}", "5 kilometers per hour", "The speed is 5 km/h."], ["5 m/s"]),
    ("5", ["5 km/h"], []),
    ("9 (apples)", ["9 apples", "9", "She has 9 apples left."], ["8 (apples)"]),
    ("$5", ["\\$5", "5 dollars", "5"], []),
    ("5 dollars", [], ["€5"]),
    ("90^\\circ", ["90"], []),
    ("90°", ["90 degrees"], []),
    ("45", ["\\boxed{45^\\circ}"], []),
    ("3 1/2", ["3.5"], ["31/2"]),
    ("3\\frac{1}{2}", ["7/2"], []),
    ("-1 1/2", ["-1.5"], []),
    ("3½", ["3.5"], []),
    ("4.5e33", ["4.5 \u00d7 10\u00b3\u00b3"], ["4.5e32"]),
    ("10^{-3}", ["0.001"], []),
    ("1e400", ["1e400"], []),
    ("1.6e-19", ["The charge is $1.6 \\times 10^{-19}$ C."], []),
    ("1.6 \\times 10^{-19} C", ["1.6e-19"], []),
    ("2x+1", ["\\boxed{1+2x}", "y=2x+1", "The answer is $2x+1$."], ["2x+2"]),
    ("y=2x+1", ["2x+1", "2x-y+1=0"], ["x=2y+1"]),
    ("x^2+y^2=1", ["x^2+y^2=1", "y^2+x^2=1"], ["x^2+y^2=2"]),
    ("x<5", ["x < 5", "5>x"], ["x>5"]),
    ("x \\le 1.6\\times10^{-19}", [], ["x \\le 9.9\\times 10^{-30}"]),
    ("\\pm 2", ["2,-2", "\\boxed{\\pm2}"], ["2"]),
    ("1\\pm\\sqrt2", ["1+\\sqrt{2}, 1-\\sqrt{2}"], []),
    (
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
        ["\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}}"],
        ["\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}}"],
    ),
    ("5\\pi", ["15.707963", "5pi"], []),
    ("\\frac{\\pi}{2}", ["pi/2"], []),
    ("2\\sqrt{3} cm", ["2\\sqrt{3}"], []),
    ("5\\pi m", ["5\\pi"], []),
    (
        "4",
        ["\\boxed{4=4}", "<think>5</think>\\boxed{4}"],
        ["2+2", "\\boxed{5=4}", "", "\\boxed{}", "<think>4</think>5", "I get \\boxed{4} then \\boxed{5}"],
    ),
    ("10", ["\\binom{5}{2}=10", "\\boxed{\\binom{5}{2}}"], []),
    ("H2O", [], ["\\boxed{OH2}"]),
    ("ab", [], ["ba"]),
    ("abc", [], ["cab"]),
    ("xy+1", ["yx+1"], []),
    ("True", ["true"], []),
    (True, ["True"], []),
    (["5", "10"], ["5 and 10"], []),
    (1e-05, [], ["0.00002"]),
    ("26+15=41 \n so\n#### 1,041", ["\\boxed{1041}"], []),
    ("no solution", ["No solution."], []),
    ("50", [], ["50 000"]),
    ("50 000", ["50000"], []),
    ("f(x)=x^2", ["x^2", "y=x^2"], []),
    ("12", ["I think 11, no 12"], ["12 or 13"]),
    ("4/9", ["\\frac{4}{9}", "0.444444"], []),
    ("\\frac{x+1}{2}", ["(x+1)/2"], []),
    ("e^{2x}", ["\\boxed{e^{2x}}"], []),
    ("\\ln 2", ["\\ln(2)"], []),
    ("\\ln(2)", ["0.693147"], []),
    ("i", ["\\boxed{i}"], []),
    ("3+4i", ["4i+3"], ["3+4"]),
    ("-5", ["- 5"], []),
    ("+5", ["5"], []),
    ("-\\frac{3}{4}", ["\\frac{-3}{4}"], []),
    ("0.75", [], ["3:4"]),
    (".5", ["0.5"], []),
    ("6", [], ["six"]),
    ("7th", ["7th"], ["7"]),
    ("10!", ["3628800"], []),
    ("3628800", ["10!"], []),
    ("C", ["\\boxed{\\textbf{C}}"], []),
    ("C. 42", ["C"], ["D", "42 C"]),
    ("C) 42", ["C"], []),
    ("1/2", ["2/4"], []),
    ("\\text{5 and 10}", ["10, 5"], []),
    ("a, b", ["b, a"], []),
    ("13 (apples), 5 (pears)", ["13, 5"], []),
    ("ABC", ["\\boxed{ABC}"], []),
    ("triangle", ["\\boxed{\\text{triangle}}"], []),
    ("\\emptyset", ["\\boxed{\\emptyset}"], []),
    ("3.0", ["3"], []),
    ("A", ["The correct answer is **A**.", "<answer>(A) 5</answer>", "\\boxed{\\text{A. Paris}}"], []),
    ("18", ["The answer is **18**."], []),
    (
        "B",
        ["\\boxed{\\textbf{(B)}\\ 42}", "So the correct answer is (B) 42 cm.", "The correct answer is option B.", "**B. Paris**"],
        ["(B) or (C)", "The answer is B, or C."],
    ),
    ("(C) 7", ["\\boxed{C}"], []),
    ("B. Paris", ["B"], []),
    ("\\frac{1}{2} m v^2", ["\\frac{mv^2}{2}"], ["0.5"]),
    ("3 m g", [], ["3"]),
    ("6 s^2", ["6s^2"], []),
    ("v_0 t + \\frac{1}{2} a t^2", ["\\frac{1}{2}at^2+v_0t"], []),
    ("6 - 5i", ["6 - 5 i"], []),
    ("-2 + 2\\sqrt{3} i", ["-2+2i\\sqrt{3}"], []),
    ("F=ma", ["F = m a"], []),
    ("n R T", ["nRT"], []),
    ("5 mW", [], ["5 MW"]),
    ("5 N m", [], ["5 N"]),
    ("5 mol/L", [], ["5 mmol/L"]),
    ("7", [], ["7 million", "The answer isn't 7.", "It's 8, not 7.", "0.\\overline{7}"]),
    ("1.5 million", ["1500000"], []),
    ("41", [], ["It could be 41 or maybe 42."]),
    ("11_2", [], ["11_3"]),
    ("x=1 or x=-2", ["\\{-2,1\\}"], []),
    ("(1,2)", ["(x,y)=(1,2)"], []),
    ("2:15 (pm)", ["2:15 pm"], []),
    ("9.8 m/s^2", ["9.8 \\frac{m}{s^2}"], []),
    ("10 \\mu m", ["10"], []),
    ("2或3", ["2 or 3"], []),
]


@pytest.mark.parametrize(("reference", "right", "wrong"), CASES, ids=[f"{i}-{case[0]}"[:40] for i, case in enumerate(CASES)])
def test_rewards(reference, right, wrong):
    answer = read_answer(reference)
    for completion in right:
        assert verify_answer(answer, completion) == 1.0, completion
    for completion in [*wrong, "", " ", "\\boxed{}", "I do not know.", "\\boxed{\\text{none of these}}", "<answer></answer>"]:
        assert verify_answer(answer, completion) == 0.0, completion


# Answers in the form in which the files of each data set have them.
STYLES = {
    "gsm8k": [
        "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72",
        "He pays 3*5=$15 and gets 2*2.5=$5 back.\n#### 10",
        "5 times 260 is 1300.\n#### 1,300",
        "It loses 7.\n#### -7",
        "0.5 * 3 = 1.5\n#### 1.5",
    ],
    "math": [
        "\\frac{14}{3}",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "p - q",
        "\\text{Evelyn}",
        "90^\\circ",
        "3\\sqrt{13}",
        "6+9i",
        "x=5",
        "1,-2",
        "\\text{east}",
        "y = 2x + 3",
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
        "(0,9) \\cup (9,36)",
        "\\text{(C)}",
        "8\\%",
        "$18.90",
        "[-2,7]",
        "(-\\infty, -3]",
        "x^3 - 2x + 1",
        "7:30",
        "0.\\overline{3}",
        "1 \\pm \\sqrt{19}",
        "\\cot x",
        "52_8",
        "\\log_2 3",
        "12\\text{ cm}^2",
        "17\\frac{1}{2}",
        "\\{1, 3\\}",
        "\\tan^{-1} 2",
        "\\lfloor x \\rfloor",
        "\\$32,348",
        "10\\text{ inches}",
        "x < -4",
    ],
    "aime": ["204", "033", "080", "601", 113, 371],
    "minerva": [
        "Using $E = mc^2$ we find \\boxed{4.5e33} erg s$^{-1}$.",
        "\\boxed{1.6e-19}",
        "\\boxed{\\arcsin{1.3 \\sin{\\theta_w}}}",
        "\\boxed{50 e^{-10 t} \\cos (3 t)}",
        "\\boxed{0.33}",
        "\\boxed{\\frac{2 \\pi c^{2} R^{2}}{\\lambda^{5}}}",
        "\\boxed{270 K}",
        "\\boxed{m_{p}}",
    ],
    "gpqa": ["B", "(A)", "\\text{C}", "D) 4 nm"],
    "gaokao": [
        "$5$;$10$",
        "$\\frac{1}{2}$;$-\\frac{1}{4}$",
        "\u2460\u2462\u2463",
        "$[0,+\\infty)$",
        "$y=\\pm\\sqrt{3}x$",
        "$x+y-3=0$",
        "$-2 \\sqrt{2}$; $1-3\\sqrt{2}$",
        "$(-\\infty,0) \\cup(0,1]$",
        "$\\{x|x>1\\}$",
    ],
    "asdiv": [
        "9 (apples)",
        "13 (cards)",
        "0.5 (hour)",
        "Kevin",
        "7:55 (p.m.)",
        "1/2 (pie)",
        "red; blue",
        "5 km/h",
        "2024-01-01",
        "3 1/2",
    ],
}
FORMS = {
    "box": "\\boxed{%s}",
    "bare": "%s",
    "sentence": "So the answer is %s.",
    "tag": "<think>Perhaps 3.</think> <answer>%s</answer>",
    "prose": "Let me see. It is %s.",
}


@pytest.mark.parametrize("style", STYLES)
def test_a_file_rewards_its_own_answers_and_not_its_neighbours(style):
    references = [read_answer(row) for row in STYLES[style]]
    stated = [next(statements(str(row), prose=False)) for row in STYLES[style]]
    for i, reference in enumerate(references):
        for name, form in FORMS.items():
            assert verify_answer(reference, form.replace("%s", stated[i])) == 1.0, (name, stated[i])
            for neighbour in {stated[i - 1], stated[(i + 1) % len(stated)]} - {stated[i]}:
                assert verify_answer(reference, form.replace("%s", neighbour)) == 0.0, (name, stated[i], neighbour)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("\\boxed{3}, no: \\boxed{4}", ["4"]),
        ("\\boxed{3} and $\\boxed{5}$", ["3; 5"]),
        ("\\boxed{\\frac{\\boxed{1}}{2}}", ["\\frac{\\boxed{1}}{2}"]),
        ("\\boxed 7", ["7"]),
        ("\\boxed{1} \\boxed{2", [""]),
        ("<answer>1</answer><answer>\\boxed{2}</answer>", ["2"]),
        ("a <think> \\boxed{1} </think> #### 2", ["2"]),
        ("The answer to part (a) is 7.", ["7"]),
        ("**Answer:** 42", ["42"]),
        ("7 apples", ["7 apples"]),
    ],
)
def test_the_last_statement_counts(text, stated):
    assert list(statements(text, prose=False)) == stated


@pytest.mark.parametrize("value", ["", " \n", "\\boxed{}", None, {}, [], float("nan"), float("inf"), ["1", None]])
def test_what_is_no_answer_is_refused(value):
    with pytest.raises(ValueError, match=r"^the answer .*; give"):
        read_answer(value)


def test_numbers_compare_relatively():
    def same(left, right):
        return same_number(read_number(left), read_number(right))

    assert same("0.333333", "1/3")
    assert not same("0.33333", "1/3")
    assert same("1e-300", "0.1e-299")
    assert not same("1e-300", "2e-300")
    assert not same("123456789012", "123456789013")
    assert not same("0", "1e-30")
    assert not same("12345.67", "12345.68")


@pytest.mark.parametrize("text", ["9**9**9", "1/0", "(1", "2^-99999", "1+" * 100 + "1", "a+1", "1" * 300, "5!", "__import__('os')"])
def test_arithmetic_is_bounded(text):
    assert arithmetic(text) is None


REFERENCES = ["41", "2x+1", "Evelyn", "(1, 2)", "x = 1 or x = 2", "5 km/h", "\\sqrt{2}"]
HOSTILE = {
    "brackets": "(" * 100_000,
    "nested": "\\boxed{" + "(" * 1500 + "1" + ")" * 1500 + "}",
    "digits": "9" * 1_000_000,
    "boxes": "\\boxed{" * 100_000,
    "spaces": " " * 1_000_000,
    "anchors": "answer is" * 100_000,
    "lists": "a, " * 100_000,
    "dollars": "$x" * 100_000,
    "formulas": "\\(x" * 50_000,
    "thousands": "1," * 100_000,
    "minus": "-" * 1_000_000,
    "fonts": "\\text{" * 100_000,
    "bold": "**" * 100_000,
    "lines": "\n" * 1_000_000,
    "equals": "= " * 100_000,
    "tags": "<answer>" * 100_000,
    "zeros": "\\boxed{1" + " 000" * 900 + "x}",
    "vulgar": "\u00bd" * 100_000,
    "surrogate": "\ud800",
    "nul": "\x00" * 1000,
    "exponent": "9e4999",
    "huge exponent": "\\boxed{10^{999999999}}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_wrong_and_quick(text):
    references = [read_answer(reference) for reference in REFERENCES]
    formulas.readable("x")  # starts the process
    started = time.monotonic()
    assert [verify_answer(reference, text) for reference in references] == [0.0] * len(references)
    assert time.monotonic() - started < TIME_LIMIT * len(references)


@pytest.mark.parametrize("formula", ["9^{9^{9^{9}}}", "(10^8)!", "\\binom{10^9}{5 \\cdot 10^8}"])
def test_a_formula_beyond_computing_ends_at_the_limit_in_any_thread(formula, monkeypatch):
    monkeypatch.setattr("v05.tasks.answers.TIME_LIMIT", 1.0)
    reference = read_answer("41")
    rewards = []

    def verify():
        started = time.monotonic()
        rewards.append((verify_answer(reference, f"\\boxed{{{formula}}}"), time.monotonic() - started))

    formulas.readable("x")
    thread = threading.Thread(target=verify)
    thread.start()
    thread.join()
    ((reward, seconds),) = rewards
    assert reward == 0.0
    assert seconds < 10  # one second, and the delays of a busy machine
    assert verify_answer(read_answer("\\sqrt{8}"), "\\boxed{2\\sqrt{2}}") == 1.0  # a new process has replaced the old one


def test_slow_formulas_keep_no_right_answer_waiting(monkeypatch):
    monkeypatch.setattr("v05.tasks.answers.TIME_LIMIT", 6.0)
    number, root = read_answer("41"), read_answer("\\sqrt{8}")
    slow = [threading.Thread(target=verify_answer, args=(number, "\\boxed{9^{9^{9^{9}}}}")) for _ in range(3)]
    for thread in slow:
        thread.start()
    assert verify_answer(root, "\\boxed{2\\sqrt{2}}") == 1.0
    assert all(thread.is_alive() for thread in slow)  # they are still being computed
    for thread in slow:
        thread.join()


def test_labels_within_labels_end():
    reference = read_answer("x^2+1")
    assert verify_answer(reference, "a: " * 1333 + "7") == 0.0


def test_many_threads_share_the_processes():
    pairs = [(f"\\sqrt{{{4 * n}}}", f"2\\sqrt{{{n}}}") for n in range(2, 12)]
    wrong = [(left, right) for (left, _), (_, right) in itertools.pairwise(pairs)]
    rewards = {}

    def verify(pair):
        rewards[pair] = verify_answer(read_answer(pair[0]), pair[1])

    threads = [threading.Thread(target=verify, args=(pair,)) for pair in pairs + wrong]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rewards[pair] for pair in pairs] == [1.0] * len(pairs)
    assert [rewards[pair] for pair in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("$\\dfrac{1}{2}$", "\\frac{1}{2}"),
        ("1.6\u00d710\u207b\u00b9\u2079", "1.6\\times 10^{-19}"),
        ("$5 and $10", "$5 and $10"),
        ("3\u00bd", "3 1/2"),
        ("**B**.", "B"),
        ("\\mathrm{\\text{east}}", "east"),
    ],
)
def test_one_spelling(text, spelled):
    assert one_spelling(text) == spelled
