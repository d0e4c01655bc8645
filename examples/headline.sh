#!/usr/bin/env bash
# The headline experiment: every method at its group sizes on three task mixes, learning rates tuned, five seeds.
#
#     examples/headline.sh [DIRECTORY]
#
# Hours: over five hundred runs, most of 15 to 160 s of a core that had other work too. It goes on where it stopped when
# called again. Tables, figures and README's numbers are made of DIRECTORY/runs.csv; bench/results/headline.csv is the copy that README
# shows:
#
#     cp runs/headline/runs.csv bench/results/headline.csv && python bench/headline.py
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
exec v05 compare --suite headline --out "${1:-runs/headline}"
