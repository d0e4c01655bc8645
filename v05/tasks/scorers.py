"""Which verifiers of reasoning-gym are used, and our own in place of those that a completion can run code in, stall or deceive.

reasoning-gym 0.1.25 passes completions of nine data sets to Python's `eval`, or to `parse_expr` of sympy, which calls `eval`. Each
of `SCORERS` takes an item and an answer instead, and says whether the answer is right: where reasoning-gym gives an honest answer
its full score. A scorer may also raise, which means wrong.
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
    """A decimal number or a fraction. reasoning-gym's own takes every beginning of the right digits, "0" for instance."""
    numerator, slash, denominator = answer.replace(",", "").partition("/")
    probability = int(numerator) / int(denominator) if slash else float(numerator)
    return abs(probability - float(item["answer"])) <= 1e-4


def _is_number(item: Item, answer: str) -> bool:
    """reasoning-gym's own takes the first number of a text, without the sign that it begins with."""
    return float(answer.replace(",", "")) == float(item["answer"])


def _is_truth(item: Item, answer: str) -> bool:
    """True or False. reasoning-gym's own compares whether the texts are empty."""
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

# Data sets whose verifiers compare texts, or single numbers, in a time that grows with the answer's length alone.
_COMPARED = """
ab aiw arc_1d base_conversion basic_arithmetic bf binary_alternation caesar_cipher chain_sum circuit_logic color_cube_rotation
count_bits count_primes course_schedule decimal_chain_sum dice emoji_mystery family_relationships figlet_font gcd
isomorphic_strings largest_island lcm leg_counting letter_counting mahjong_puzzle maze modulo_grid needle_haystack
number_filtering number_format number_sequence palindrome_generation path_star products ransom_note rotate_matrix
rotten_oranges self_reference sentence_reordering simple_equations simple_geometry spell_backward string_manipulation
string_splitting string_synthesis syllogism word_sequence_reversal zebra_puzzles
"""
COMPARED = SCORERS.keys() | _COMPARED.split()
# Those whose verifiers read, simulate or search more than that. None evaluates a completion, but some may take long.
_EXAMINED = """
advanced_geometry arc_agi bitwise_arithmetic boxnet calendar_arithmetic codeio complex_arithmetic cryptarithm
decimal_arithmetic fraction_simplification futoshiki game_of_life graph_color group_anagrams jugs kakurasu knight_swap
knights_knaves letter_jumble manipulate_matrix mini_sudoku number_sorting palindrome_partitioning polynomial_equations
pool_matrix power_function prime_factorization propositional_logic quantum_lock rearc rectangle_count rubiks_cube rush_hour
shortest_path sokoban sudoku survo time_intervals tower_of_hanoi tsumego word_sorting
"""
EXAMINED = set(_EXAMINED.split())
EAGER = "makes all of its items before the first, but the prompts of a run have no end"
REFUSED = {
    "acre": EAGER,
    "composite": "hands completions on to other data sets; name those in task.mix",
    "list_functions": EAGER,
    "word_ladder": "cannot make as many items as a run may ask for",
}
# Data sets whose items have one answer, a number or a word, which a text in prose can state.
_STATED = """
basic_arithmetic calendar_arithmetic chain_sum coin_flip count_bits count_primes decimal_chain_sum dice family_relationships
gcd gsm_symbolic lcm leg_counting letter_counting needle_haystack number_sequence products simple_equations simple_geometry
spell_backward
"""
STATED = frozenset(_STATED.split())
DECEIVED_BY_NAN = frozenset({"complex_arithmetic", "number_sorting"})  # they take what is in no comparison wrong


def refuse_unread(name: str) -> None:
    """ValueError for a data set that cannot be used, or whose verifier was not read: it may run what a completion says."""
    if name in REFUSED:
        raise ValueError(f"task.mix: dataset={name!r} {REFUSED[name]}")
    if name not in COMPARED | EXAMINED:
        raise ValueError(
            f"task.mix: dataset={name!r} is not among those whose verifiers are known not to run what a completion says; "
            f"use one of {', '.join(sorted(COMPARED | EXAMINED))}"
        )


def scorer_of(name: str, dataset: Any) -> Callable[[Item, str], bool]:
    """What verifies the answers to the items of a data set of reasoning-gym."""
    if name in SCORERS:
        return SCORERS[name]

    def has_full_score(item: Item, answer: str) -> bool:
        if name in DECEIVED_BY_NAN and "nan" in answer.lower():
            return False
        # Some verifiers write to the item, which would tell on the completions after this one.
        own = item if name in COMPARED else copy.deepcopy(item)
        return bool(dataset.score_answer(answer, own) == 1.0)  # partial credit is no success

    return has_full_score
