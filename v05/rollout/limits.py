"""Where completions end: the positions that a policy has for them."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """Tokens that a model of this configuration can read, prompt and completion together; None where it sets no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None
