"""The limits of completions: the tokens that end them, and the number of positions of the model."""

from __future__ import annotations

from typing import Any

SHOWN = 80  # characters of a prompt in a message


def stop_tokens(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """The ids of tokens that end a completion: those of the generation configuration, and the tokenizer's.

    Chat models often have several, such as one for the end of a turn and one for the end of a text. Raises ValueError if there is
    none.
    """
    named = getattr(generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list | tuple) else [named]
    stops = tuple(sorted({int(i) for i in (tokenizer.eos_token_id, *ids) if i is not None}))
    if not stops:
        name = getattr(tokenizer, "name_or_path", "") or "the policy"
        raise ValueError(
            f"the tokenizer of {name} has no end-of-sequence token, and generation_config names none: completions would never end; "
            "set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json"
        )
    return stops


def positions_of(config: Any) -> int | None:
    """Most tokens, prompt and completion together, that a model of this configuration can read; None if it sets no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def refuse_prompt(length: int, max_new_tokens: int, positions: int | None, text: str = "") -> None:
    """Raise ValueError for a prompt of `length` tokens that is empty, or leaves no room for a completion. The message quotes
    `text`."""
    where = f": {text[:SHOWN]!r}" if text else ""
    if length == 0:
        raise ValueError(f"a prompt has no tokens, so no completion can follow it; leave it out, or use a chat template{where}")
    if positions is not None and length + max_new_tokens > positions:
        remedy = f"at most {positions - length} fit" if positions > length else "shorten the prompt, or leave it out"
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {length} tokens does not fit the model's {positions} positions; "
            f"{remedy}{where}"
        )
