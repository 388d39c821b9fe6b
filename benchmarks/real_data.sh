#!/usr/bin/env bash
# Trains the recipes on real data one after the other and leaves a report in each run folder.
# Usage: UNCLIPPED_DATA=FOLDER benchmarks/real_data.sh [RUNS_FOLDER] [SUFFIX]   (SUFFIX "-gpu": the larger set)
# Interrupted? Run the same line again: finished runs are kept, the interrupted one goes on.
set -euo pipefail
: "${UNCLIPPED_DATA:?set UNCLIPPED_DATA to the folder of the real data sets}"
runs=${1:-runs}
size=${2:-}
unclipped=${UNCLIPPED:-unclipped}
began=$SECONDS

step() { # COMMAND RECIPE [OVERRIDE...]
  local command=$1 recipe=$2
  shift 2
  local from=$SECONDS
  "$unclipped" "$command" "$recipe$size" "$@" --output "$runs/$recipe$size" --resume
  echo "-- $recipe$size: $((SECONDS - from)) s, $((SECONDS - began)) s in all"
}

lm() { echo "model.text=$runs/$1$size/model model.vision=llm:$runs/$1$size/model"; }

step pretrain real-lm
step train nlvr $(lm real-lm)
step pretrain real-lm-characters
step train sroie-lines $(lm real-lm-characters)
step train table-lookups $(lm real-lm-characters)
step pretrain clothing-mae
step pretrain clip-free-lm
step train clip-free "model.vision=$runs/clothing-mae$size/model" "model.text=$runs/clip-free-lm$size/model"
