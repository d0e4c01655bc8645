"""Replays recorded outcomes under each method and budget, to estimate what they would save before any GPU time is spent.

`outcomes` reads the outcomes from logs: `tables` reads files, `logs` and `runs` interpret their rows, `tally` sums them up.
`item_response` makes a cross-fitted prior. `replay` draws rollouts and measures the error of every baseline. `plot` draws the
errors and `summary` describes them. The command is `v05 simulate`; training imports nothing from here.
"""
