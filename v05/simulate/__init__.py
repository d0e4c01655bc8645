"""What a method and a budget would be worth, before a GPU hour is spent: recorded outcomes are replayed through the product.

`outcomes` reads them from logs: `tables` reads files, `logs` and `runs` know what is in them, `tally` adds it up. `item_response`
makes a prior that never saw what it predicts, `replay` draws rollouts and measures the error of every baseline, `plot` draws it,
`summary` says it. `v05 simulate` is the door; nothing here is imported by training.
"""
