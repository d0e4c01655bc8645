"""Selects the verifiers of reasoning-gym that are used, and replaces those that a completion could run code in, stall or deceive.

reasoning-gym 0.1.25 passes completions of nine data sets to Python's `eval`, or to sympy's `parse_expr`, which calls `eval`.
`SCORERS` replaces these and other unreliable verifiers. A scorer takes an item and an answer, and returns whether the answer is
right; for honest answers this is when reasoning-gym gives its full score. A scorer may also raise, which counts as wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from v05.tasks.expressions import arithmetic, is_antiderivative, polynomial

Item = dict[str, Any]


def _is_answer(item: Item, answer: str) -> bool:
    return answer.strip() == str(item["answer"]).strip()


def _solves_queens(item: Item, answer: str) -> bool:
    return answer in item["metadata"]["valid_answers"]


def _makes_24(item: Item, answer: str) -> bool:
    value, numbers = arithmetic(answer)
    return value == 24 and sorted(numbers) == sorted(item["metadata"]["numbers"])


def _makes_target(item: Item, answer: str) -> bool:
    value, numbers = arithmetic(answer)
    return value == item["metadata"]["target"] and sorted(numbers) == sorted(item["metadata"]["numbers"])


def _is_product(item: Item, answer: str) -> bool:
    return polynomial(answer) == polynomial(item["answer"])


def _integrates(item: Item, answer: str) -> bool:
    return is_antiderivative(answer, item["metadata"]["integrand"], item["metadata"]["variable"])


def _is_probability(item: Item, answer: str) -> bool:
    """Compares a decimal number or a fraction. reasoning-gym's verifier accepts every prefix of the right digits, such as "0"."""
    numerator, slash, denominator = answer.replace(",", "").partition("/")
    probability = int(numerator) / int(denominator) if slash else float(numerator)
    return abs(probability - float(item["answer"])) <= 1e-4


def _is_number(item: Item, answer: str) -> bool:
    """Compares the whole answer as a number. reasoning-gym's own verifier takes the first number of a text and ignores its sign."""
    return float(answer.replace(",", "")) == float(item["answer"])


def _is_truth(item: Item, answer: str) -> bool:
    """Compares True or False. reasoning-gym's own verifier only compares whether the texts are empty."""
    return answer.strip().lower() == str(item["answer"]).lower()


SCORERS: dict[str, Callable[[Item, str], bool]] = {
    "binary_matrix": _is_answer,
    "coin_flip": _is_probability,
    "countdown": _makes_target,
    "game_of_life_halting": _is_truth,
    "gsm_symbolic": _is_number,
    "intermediate_integration": _integrates,
    "n_queens": _solves_queens,
    "polynomial_multiplication": _is_product,
    "puzzle24": _makes_24,
    "simple_integration": _integrates,
    "spiral_matrix": _is_answer,
    "string_insertion": _is_answer,
}

# Data sets whose verifiers compare texts or single numbers. Their time depends only on the answer's length.
_COMPARED = """
ab aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher chain_sum circuit_logic color_cube_rotation
count_bits count_primes course_schedule decimal_chain_sum dice emoji_mystery family_relationships figlet_font gcd
isomorphic_strings largest_island lcm leg_counting letter_counting mahjong_puzzle maze modulo_grid needle_haystack
number_filtering number_format number_sequence palindrome_generation path_star products ransom_note rotate_matrix
rotten_oranges self_reference sentence_reordering simple_equations simple_geometry spell_backward string_manipulation
string_splitting string_synthesis syllogism word_sequence_reversal zebra_puzzles
"""
COMPARED = SCORERS.keys() | _COMPARED.split()
# Data sets whose verifiers parse, simulate or search. None executes a completion, but some may take long.
_EXAMINED = """
advanced_geometry arc_agi bitwise_arithmetic boxnet calendar_arithmetic codeio complex_arithmetic cryptarithm
decimal_arithmetic fraction_simplification futoshiki game_of_life graph_color group_anagrams jugs kakurasu knight_swap
knights_knaves letter_jumble manipulate_matrix mini_sudoku number_sorting palindrome_partitioning polynomial_equations
pool_matrix power_function prime_factorization propositional_logic quantum_lock rearc rectangle_count rubiks_cube rush_hour
shortest_path sokoban sudoku survo time_intervals tower_of_hanoi tsumego word_sorting
"""
EXAMINED = set(_EXAMINED.split())
EAGER = "generates all of its items at the start, but a run needs an endless stream of prompts"
REFUSED = {
    "acre": EAGER,
    "composite": "passes completions on to other data sets; name those in task.mix",
    "list_functions": EAGER,
    "word_ladder": "cannot generate as many items as a run may need",
}
# Data sets whose items have a single number or word as answer, which prose can state.
_STATED = """
basic_arithmetic calendar_arithmetic chain_sum coin_flip count_bits count_primes decimal_chain_sum dice family_relationships
gcd gsm_symbolic lcm leg_counting letter_counting needle_haystack number_sequence products simple_equations simple_geometry
spell_backward
"""
STATED = frozenset(_STATED.split())
# Their verifiers accept NaN, because comparisons with it find no error.
DECEIVED_BY_NAN = frozenset({"complex_arithmetic", "number_sorting"})


def refuse_unread(name: str) -> None:
    """Raise ValueError for a data set that cannot be used, or whose verifier was not reviewed and may execute completions."""
    if name in REFUSED:
        raise ValueError(f"task.mix: dataset={name!r} {REFUSED[name]}")
    if name not in COMPARED | EXAMINED:
        raise ValueError(
            f"task.mix: dataset={name!r} is not among those whose verifiers are known not to execute completions; "
            f"use one of {', '.join(sorted(COMPARED | EXAMINED))}"
        )


def scorer_of(name: str, dataset: Any) -> Callable[[Item, str], bool]:
    """The function that verifies answers to the items of a reasoning-gym data set."""
    if name in SCORERS:
        return SCORERS[name]

    def has_full_score(item: Item, answer: str) -> bool:
        if name in DECEIVED_BY_NAN and "nan" in answer.lower():
            return False
        # Some verifiers modify the item, which would affect later completions.
        own = item if name in COMPARED else copy.deepcopy(item)
        return bool(dataset.score_answer(answer, own) == 1.0)  # partial credit does not count as a success

    return has_full_score
