#!/usr/bin/env bash
# The whole road on MSD Hippocampus with the published split (21 labelled cases, 52 test cases), three seeds an arm.
# Run it again after a stop: every step goes on where it was.
#   benchmarks/hippocampus.sh TASK04_FOLDER SPLIT_JSON OUT [PRETRAIN_STEPS [FINETUNE_STEPS]]
set -euo pipefail
task=$1 split=$2 out=$3
pretrain_steps=${4:-4000} finetune_steps=${5:-2000}

supercl preprocess "$task" "$out/hippocampus.zarr"
supercl pretrain "$out/hippocampus.zarr" "$out/pretrain" --split "$split" \
  --set steps=$pretrain_steps --set filters=16 --set log_every=100
runs=()
for arm in scratch pretrained; do
  init=scratch
  [ "$arm" = scratch ] || init=$out/pretrain
  for seed in 0 1 2; do
    run=$out/${arm}_$seed
    supercl finetune "$out/hippocampus.zarr" "$run" --init "$init" --split "$split" --labelled 21 \
      --set steps=$finetune_steps --set batch_size=32 --set filters=16 --set seed=$seed --set log_every=100
    [ -e "$run/evaluation.json" ] || supercl evaluate "$run" "$out/hippocampus.zarr"
    runs+=("$run")
  done
done
supercl report "${runs[@]}" "$out/pretrain" -o "$out/report.html"
