"""A colour for each method, the same in every picture: on light ground, and on dark."""

COLOURS = {
    "v05": ("#2563eb", "#60a5fa"),
    "calibrated": ("#0d9488", "#2dd4bf"),
    "grpo": ("#ea580c", "#fb923c"),
    "dr_grpo": ("#be185d", "#f472b6"),
    "rloo": ("#7c3aed", "#a78bfa"),
    "dapo": ("#a16207", "#eab308"),
    "prior": ("#64748b", "#94a3b8"),
}
