#!/usr/bin/env bash
# The paper's experiment: Qwen3-4B-Instruct-2507 on DAPO-Math-17k. V_0.5 with 4 to 16 rollouts per prompt and V0 as its prior is
# compared with GRPO and DAPO at 16 rollouts, in verl on 4 nodes of 8 GPUs.
#
#   examples/paper_qwen3_4b.sh [--dry-run] prepare                            data, the start's outcomes on 512 problems, V0's fit
#   examples/paper_qwen3_4b.sh [--dry-run] train v05|grpo|dapo [OVERRIDE...]  verl's overrides; resumes from the last checkpoint
#   examples/paper_qwen3_4b.sh [--dry-run] eval start|v05|grpo|dapo           mean@16 on the benchmarks
#   examples/paper_qwen3_4b.sh [--dry-run] report                             a table that compares the arms
#
# --dry-run prints every command and runs none. Settings come from environment variables, see below. All nodes must see OUT and the
# model. THIS RECIPE AS A WHOLE HAS NOT BEEN RUN, because no GPU was available. docs/paper.md says which parts were run, and how to
# set it up.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-models/Qwen3-4B-Instruct-2507}
DAPO=${DAPO:-data/dapo-math-17k.parquet}
BENCHMARKS=${BENCHMARKS:-data/benchmarks}        # aime24.jsonl, aime25.jsonl, ...
NAMES=${NAMES:-aime24,aime25,amc23,math500,minerva,olympiad}
OUT=$(realpath -m "${OUT:-runs/paper_qwen3_4b}")
SEED=${SEED:-0}
STEPS=${STEPS:-300}
STEP=${STEP:-$STEPS}                             # step of the checkpoint to evaluate
NODES=${NODES:-4}
GPUS=${GPUS:-8}                                  # GPUs per node
ENGINE=${ENGINE:-vllm}                           # engine of v05 eval; transformers needs no vLLM
LENGTH=${LENGTH:-8192}                           # most tokens of a response
SAMPLES=${SAMPLES:-16}                           # samples per problem of a benchmark
CONTEXT=${CONTEXT:-512}                          # problems of V0's first context, with 8 samples each
BACKBONE=${BACKBONE:-}                           # model folder that reads prompts for V0; empty: the sentence model of v05[value]
ADAPTER=${ADAPTER:-}                             # adapter that v05 fit-prior trained for that backbone; empty: none

DRY=
words=()
for word in "$@"; do
  if [[ $word == --dry-run ]]; then DRY=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}

run() {
  printf '%q ' "$@"; echo
  if [[ -z $DRY ]]; then "$@"; fi
}

usage() { sed -n '5,8s/^# *//p' "$0" >&2; exit 2; }

evaluate() {  # model folder, output folder
  run v05 eval "$1" --benchmarks "$NAMES" --data "$BENCHMARKS" --samples "$SAMPLES" --engine "$ENGINE" \
    --max-new-tokens "$LENGTH" --seed "$SEED" --out "$2"
}

known() { case ${1:-} in v05 | grpo | dapo) ;; *) usage ;; esac }

case ${1:-} in
prepare)
  run python examples/paper_qwen3_4b.py data "$DAPO" "$BENCHMARKS" "$OUT/data" --context "$CONTEXT"
  # V0 has to predict outcomes at temperature 1, at which training samples.
  run v05 eval "$MODEL" --benchmarks context --data "$OUT/data" --samples 8 --temperature 1 --top-p 1 --engine "$ENGINE" \
    --max-new-tokens "$LENGTH" --seed "$SEED" --out "$OUT/context"
  run v05 fit-prior "$OUT/context/outcomes.jsonl" ${BACKBONE:+--backbone "$BACKBONE"} --json "$OUT/prior.json"
  ;;
train)
  known "${2:-}"
  method=$2
  shift 2
  prior=()
  if [[ $method == v05 ]]; then
    prior=("+algorithm.v05.outcomes=$OUT/context/outcomes.jsonl" "+algorithm.v05.learnt=$OUT/$method/prior.safetensors")
    if [[ $BACKBONE ]]; then prior+=("+algorithm.v05.backbone=$(realpath -m "$BACKBONE")"); fi
    if [[ $ADAPTER ]]; then prior+=("+algorithm.v05.adapter=$(realpath -m "$ADAPTER")"); fi
  fi
  run mkdir -p "$OUT/$method"
  run env VERL_FILE_LOGGER_PATH="$OUT/$method/metrics-$(date -u +%Y%m%dT%H%M%S).jsonl" \
    python -m verl.trainer.main_ppo --config-dir "$PWD/examples/paper_qwen3_4b" --config-name verl "method=$method" \
    "data.train_files=$OUT/data/train.jsonl" "data.val_files=$OUT/data/validation.jsonl" \
    "data.seed=$SEED" "data.max_response_length=$LENGTH" \
    "actor_rollout_ref.model.path=$(realpath -m "$MODEL")" "actor_rollout_ref.rollout.seed=$SEED" \
    "trainer.total_training_steps=$STEPS" "trainer.nnodes=$NODES" "trainer.n_gpus_per_node=$GPUS" \
    "trainer.experiment_name=$method" "trainer.default_local_dir=$OUT/$method" ${prior[@]+"${prior[@]}"} "$@"
  ;;
eval)
  if [[ ${2:-} == start ]]; then
    evaluate "$MODEL" "$OUT/start/eval"
  else
    known "${2:-}"
    run python -m verl.model_merger merge --backend fsdp --local_dir "$OUT/$2/global_step_$STEP/actor" \
      --target_dir "$OUT/$2/model-$STEP"
    evaluate "$OUT/$2/model-$STEP" "$OUT/$2/eval-$STEP"
  fi
  ;;
report)
  run python examples/paper_qwen3_4b.py report "grpo=$OUT/grpo/eval-$STEP" "dapo=$OUT/dapo/eval-$STEP" "v05=$OUT/v05/eval-$STEP" \
    "start=$OUT/start/eval" --json "$OUT/report.json"
  ;;
*) usage ;;
esac
