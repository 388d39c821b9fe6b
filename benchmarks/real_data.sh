#!/usr/bin/env bash
# Trains the recipes on real data, two chains side by side with one thread each, and leaves a report in each run folder.
# Usage: UNCLIPPED_DATA=FOLDER benchmarks/real_data.sh [RUNS_FOLDER] [SUFFIX]   (SUFFIX "-gpu": the larger set, in turn)
# Interrupted? Run the same line again: finished runs are kept, the interrupted one goes on.
set -euo pipefail
: "${UNCLIPPED_DATA:?set UNCLIPPED_DATA to the folder of the real data sets}"
runs=${1:-runs}
size=${2:-}
unclipped=${UNCLIPPED:-unclipped}
threads=()
[ -n "$size" ] || { threads=(training.threads=1); export OMP_NUM_THREADS=1; }
mkdir -p "$runs"

step() { # COMMAND RECIPE [OVERRIDE...]
  local command=$1 recipe=$2 from=$SECONDS
  shift 2
  "$unclipped" "$command" "$recipe$size" "$@" "${threads[@]}" --output "$runs/$recipe$size" --resume
  echo "-- $recipe$size: $((SECONDS - from)) s, $((SECONDS)) s since the start" | tee -a "$runs/times$size.txt"
}

from_lm() { echo "model.text=$runs/$1$size/model model.vision.llm=$runs/$1$size/model"; }

scenes_and_clothes() {
  step pretrain real-lm
  step train nlvr $(from_lm real-lm)
  step pretrain clothing-mae
  step pretrain clip-free-lm
  step train clip-free "model.vision=$runs/clothing-mae$size/model" "model.text=$runs/clip-free-lm$size/model"
}

lines_and_tables() {
  step pretrain real-lm-characters
  step train sroie-lines $(from_lm real-lm-characters)
  step train table-lookups $(from_lm real-lm-characters)
}

if [ -n "$size" ]; then
  scenes_and_clothes
  lines_and_tables
else
  scenes_and_clothes > "$runs/scenes-and-clothes.log" 2>&1 & first=$!
  lines_and_tables > "$runs/lines-and-tables.log" 2>&1 & second=$!
  echo "two chains are running; watch $runs/scenes-and-clothes.log and $runs/lines-and-tables.log"
  failed=0
  wait "$first" || failed=1
  wait "$second" || failed=1
  [ "$failed" = 0 ] || { echo "a chain failed: see the end of its log" >&2; exit 1; }
fi
echo "all done after $SECONDS s"
