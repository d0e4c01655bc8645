"""Completions that attack their verifier: with every data set, nothing in them is run, and none of them is right."""

import builtins
import itertools
import json
import time

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from v05.tasks import ReasoningGymConfig, Source
from v05.tasks.expressions import arithmetic, is_antiderivative, polynomial
from v05.tasks.reasoning_gym import ReasoningGymTask
from v05.tasks.scorers import COMPARED, EXAMINED, REFUSED, SCORERS

FRAMES = "[f for f in [__import__('sys')._getframe()] if open('{file}', 'w')]"
ATTACKS = [
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w')",
    "[open('{file}', 'w')]",
    "(open('{file}', 'w'), 24)[1]",
    FRAMES,
    "().__class__.__base__.__subclasses__()[0](open('{file}', 'w'))",
    "sin.__globals__",
    "exit()",
    "quit()",
    "raise SystemExit",
    "[exit()]",
    'sympify(\'open("{file}", "w")\')',
    "S('exit()')",
    "x + exit()",
]
STALLS = ["9**9**9**9", "2**2**40", "1e999999999", "1e999999999/3", "factorial(10**9)", "10**9!", "exp(" * 300 + "x" + ")" * 300]
HUGE = [
    "9" * 4300,
    "9" * 5000,
    "9" * 10_000_000,
    "[" * 100_000,
    "(" * 100_000 + ")" * 100_000,
    "-" * 100_000 + "1",
    "1+" * 100_000 + "1",
]
JUNK = ["nan", "NaN", "inf", "-inf", "[NaN, NaN, NaN, NaN, NaN]", "nan+nanj", "1j", "None", "\x00", "\ud800"]


def task_of(dataset, **settings):
    return ReasoningGymTask(ReasoningGymConfig(mix=(Source(dataset=dataset, settings=settings),)))


def prompts_of(task, count):
    return [prompt for _, prompt in itertools.islice(task.prompts("train"), count)]


def test_every_data_set_was_read():
    """A new release of reasoning-gym may add or change data sets. Read their `score_answer` before you add them."""
    assert COMPARED | EXAMINED | REFUSED.keys() == DATASETS.keys()
    assert not COMPARED & EXAMINED
    assert not (COMPARED | EXAMINED) & REFUSED.keys()


@pytest.mark.parametrize("dataset", REFUSED)
def test_a_data_set_that_cannot_be_used_is_refused_by_name(dataset):
    with pytest.raises(ValueError, match=f"dataset='{dataset}' "):
        task_of(dataset)


def test_a_data_set_that_was_not_read_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(DATASETS, "brand_new", DATASETS["spiral_matrix"])
    with pytest.raises(ValueError, match=r"dataset='brand_new' is not among those .* use one of .*, chain_sum"):
        task_of("brand_new")


@pytest.fixture
def evaluated(monkeypatch):
    """The sources that Python's `eval` was called with."""
    sources = []

    def record(source, *scope):
        sources.append(source)
        return evaluate(source, *scope)

    evaluate = builtins.eval
    monkeypatch.setattr(builtins, "eval", record)
    return sources


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arc_agi leaves a file open
@pytest.mark.parametrize("dataset", sorted(COMPARED | EXAMINED))
def test_attacks_run_nothing_and_are_wrong(dataset, evaluated, tmp_path):
    task = task_of(dataset)
    (prompt,) = prompts_of(task, 1)
    item = repr(prompt.item)
    evaluated.clear()
    # Processes with a time limit verify the other data sets.
    stalls = [*STALLS, *HUGE] if dataset in COMPARED else [text[:3000] for text in HUGE]
    for attack in [*(text.format(file=tmp_path / "written") for text in ATTACKS), *stalls, *JUNK]:
        before = time.monotonic()
        assert task.verify(prompt, attack) == 0.0, attack[:60]
        assert time.monotonic() - before < 2.0, attack[:60]
        assert not any(attack[:20] in str(source) for source in evaluated), attack[:60]
        assert repr(prompt.item) == item, attack[:60]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [SystemExit, MemoryError, RecursionError, GeneratorExit, ZeroDivisionError])
def test_what_a_verifier_raises_is_a_wrong_answer(error, monkeypatch):
    task = task_of("sudoku")
    (prompt,) = prompts_of(task, 1)

    def score_answer(self, answer, entry):
        raise error

    monkeypatch.setattr(DATASETS["sudoku"][0], "score_answer", score_answer)
    assert task.verify(prompt, prompt.answer) == 0.0


@pytest.mark.parametrize("score", [None, float("nan"), "1.0", [], 2.0, 0.99])
def test_what_is_no_full_score_is_a_wrong_answer(score, monkeypatch):
    task = task_of("sudoku")
    (prompt,) = prompts_of(task, 1)
    monkeypatch.setattr(DATASETS["sudoku"][0], "score_answer", lambda self, answer, entry: score)
    assert task.verify(prompt, prompt.answer) == 0.0


def test_a_verifier_that_writes_to_its_item_writes_to_a_copy(monkeypatch):
    def score_answer(self, answer, entry):
        entry["metadata"]["solution"][0][0] = answer
        return 1.0

    task = task_of("sudoku")
    (prompt,) = prompts_of(task, 1)
    before = repr(prompt.item)
    monkeypatch.setattr(DATASETS["sudoku"][0], "score_answer", score_answer)
    assert task.verify(prompt, "x") == 1.0
    assert repr(prompt.item) == before


def spellings(prompt, other):
    """Right and wrong answers in the spellings of honest policies."""
    answer = prompt.answer
    return [
        answer,
        f"({answer})",
        f" {answer}\n",
        answer.replace(" ", ""),
        f"{answer} + 1",
        f"-({answer})",
        f"2*({answer})/2",
        other.answer,
        "x",
        "7",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
@pytest.mark.parametrize("dataset", sorted(SCORERS.keys() - {"coin_flip", "game_of_life_halting", "gsm_symbolic"}))
def test_verdicts_on_honest_answers_are_reasoning_gyms(dataset):
    task = task_of(dataset)
    prompts = prompts_of(task, 11)
    theirs = reasoning_gym.create_dataset(dataset, size=1, seed=0)
    for prompt, other in itertools.pairwise(prompts):
        assert task.verify(prompt, prompt.answer) == 1.0
        for answer in spellings(prompt, other):
            if dataset == "puzzle24" and answer is other.answer:
                continue  # these are not the question's numbers, but reasoning-gym accepts them
            expected = float(theirs.score_answer(answer.strip(), prompt.item[1]) == 1.0)
            assert task.verify(prompt, answer) == expected, (answer, prompt)


def test_a_number_is_right_by_its_value_and_with_its_sign():
    task = task_of("gsm_symbolic")
    for prompt in prompts_of(task, 5):
        for right in (prompt.answer, f" {prompt.answer}.0\n", f"{int(prompt.answer):,}"):
            assert task.verify(prompt, right) == 1.0
        for wrong in (f"-{prompt.answer}", f"{prompt.answer} + 1", f"{prompt.answer} or 7", f"{prompt.answer}1"):
            assert task.verify(prompt, wrong) == 0.0  # reasoning-gym accepts the first three


@pytest.mark.parametrize(
    ("formula", "numbers"), [("(1+2)*3", [1, 2, 3]), (" 6/4*6 ", [6, 4, 6]), ("-1 + 10", [1, 10]), ("+".join("1" * 400), [1] * 400)]
)
def test_arithmetic(formula, numbers):
    value, used = arithmetic(formula)
    assert float(value) == eval(formula.strip())
    assert used == numbers


@pytest.mark.parametrize(
    "formula", ["", "2**3", "1//2", "1%2", "1.5", "x", "f(1)", "1j", "True", "1,2", "1 2", "1<2", "'1'", "1\x00"]
)
def test_what_is_no_arithmetic_is_refused(formula):
    with pytest.raises((ValueError, SyntaxError, KeyError)):
        arithmetic(formula)


@pytest.mark.parametrize(
    "formula",
    [
        "1 + 2*x + x**2",
        "x*x + 2*x + 1",
        "2*(x + 1) + x**2 - 1",
        "(x)**2 - -2*x + 1",
        "(2*x)**2/4 + 4*x/2 + 1",
        "x**3/x + x + x + 1",
    ],
)
def test_spellings_of_a_polynomial(formula):
    assert polynomial(formula) == polynomial("x**2 + 2*x + 1")
    assert polynomial(formula) != polynomial("x**2 + 2*x + 2")
    assert polynomial(formula) != polynomial("y**2 + 2*y + 1")


@pytest.mark.parametrize(
    "formula", ["(x+1)**2", "(x+1)*(x+1)", "x*(x+2) + 1", "1.0 + 2*x + x**2", "f(x)", "x**y", "x**10**9", "7**10**6"]
)
def test_what_is_no_expanded_polynomial_is_refused(formula):
    with pytest.raises(ValueError, match=r"not expanded|whole|number|exponent|variables|coefficient"):
        polynomial(formula)


def test_a_polynomial_of_many_terms_is_read():
    assert len(polynomial("+".join(f"{i}*x**{i}" for i in range(1, 900))).terms) == 899


@pytest.mark.parametrize(
    ("integrand", "right", "wrong"),
    [
        ("2*x", "x**2 + C", "x**2 + C*x"),
        ("2*x", "x*x - 5/2 + c", "x**2 + sin(x)/10**6"),
        ("1/x", "log(x) + C", "log(x**2) + C"),
        ("x*exp(x)", "(x - 1)*exp(x) + C", "(x + 1)*exp(x) + C"),
        ("exp(x)*sin(x)", "exp(x)*sin(x)/2 - exp(x)*cos(x)/2", "exp(x)*sin(x)/2 + exp(x)*cos(x)/2"),
        ("asin(2*x)", "x*asin(2*x) + sqrt(1 - 4*x**2)/2 + C", "x*asin(2*x) - sqrt(1 - 4*x**2)/2 + C"),
        ("sqrt(2*x + 1)", "(2*x + 1)**(3/2)/3", "(2*x + 1)**(3/2)/2"),
        ("tan(x)**2", "tan(x) - x", "tan(x)"),
        ("x**x*(log(x) + 1)", "x**x", "x**(x + 1)"),
        ("1/(1 + x**2)", "atan(x)", "x*atan(x)"),
    ],
)
def test_antiderivatives(integrand, right, wrong):
    assert is_antiderivative(right, integrand, "x")
    assert not is_antiderivative(wrong, integrand, "x")


@pytest.mark.parametrize(
    "formula", ["Integral(2*x, x)", "Pow(x, 2)", "x.diff()", "f(x)", "sin(x, x)", "sin()", "exp(1000)", "0**-1", "[x]"]
)
def test_what_is_no_antiderivative_is_refused(formula):
    with pytest.raises((ValueError, KeyError, ArithmeticError)):
        is_antiderivative(formula, "2*x", "x")


def test_integrals_that_sympy_left_unsolved_are_not_asked():
    task = task_of("intermediate_integration")
    for prompt in prompts_of(task, 30):
        assert "Integral(" not in prompt.answer
        assert task.verify(prompt, prompt.answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("0.3125", 1.0), ("5/16", 1.0), (".3125", 1.0), ("0.31252", 1.0), ("0.3", 0.0), ("0", 0.0), ("5/0", 0.0), ("nan", 0.0)],
)
def test_a_probability_is_compared_as_a_number(answer, reward):
    task = task_of("coin_flip")
    prompt = prompts_of(task, 1)[0]
    prompt.item[1]["answer"] = "0.3125"
    assert task.verify(prompt, answer) == reward


def test_truth_is_what_is_said_and_not_that_something_is():
    for prompt in prompts_of(task := task_of("game_of_life_halting"), 20):
        assert task.verify(prompt, prompt.answer) == 1.0
        assert task.verify(prompt, str(prompt.answer != "True")) == 0.0
        assert task.verify(prompt, "x") == 0.0


@pytest.mark.parametrize("dataset", ["number_sorting", "complex_arithmetic"])
def test_nan_deceives_no_verifier(dataset):
    task = task_of(dataset)
    for prompt in prompts_of(task, 5):
        assert task.verify(prompt, prompt.answer) == 1.0
        for answer in ("nan", "nan+nanj", json.dumps([float("nan")] * (prompt.answer.count(",") + 1))):
            assert task.verify(prompt, answer) == 0.0
