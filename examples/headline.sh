#!/usr/bin/env bash
# The headline experiment: every method at its group sizes on three task mixes, with tuned learning rates and five seeds.
#
#     examples/headline.sh [DIRECTORY]
#
# It takes hours: there are over five hundred runs, and most took 15 to 160 s on a core that was also busy with other work. After an
# interruption, the same command resumes. DIRECTORY/runs.csv holds the results. The tables, figures and numbers of the documentation
# come from a copy of it, bench/results/headline.csv:
#
#     cp runs/headline/runs.csv bench/results/headline.csv && python bench/headline.py
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
exec v05 compare --suite headline --out "${1:-runs/headline}"
