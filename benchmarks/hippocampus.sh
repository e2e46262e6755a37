#!/usr/bin/env bash
# The whole road on MSD Hippocampus with the published split (21 labelled cases, 52 test cases), three seeds an arm.
# Run it again after a stop: every step goes on where it was.
#   benchmarks/hippocampus.sh TASK04_FOLDER SPLIT_JSON OUT [PRETRAIN_STEPS [FINETUNE_STEPS]]
set -euo pipefail
task=$1 split=$2 out=$3 pretrain_steps=${4:-4000} finetune_steps=${5:-2000}
cache=$out/hippocampus.zarr

# The three seeds of one arm: NAME INIT.
arm() {
  for seed in 0 1 2; do
    run=$out/$1_$seed
    supercl finetune "$cache" "$run" --init "$2" --split "$split" --labelled 21 --set steps="$finetune_steps" \
      --set batch_size=32 --set filters=16 --set seed=$seed --set log_every=100
    [ -e "$run/evaluation.json" ] || supercl evaluate "$run" "$cache"
  done
}

supercl preprocess "$task" "$cache" --slic exact  # the published superpixels, which the figures were measured with
supercl pretrain "$cache" "$out/pretrain" --split "$split" --set steps="$pretrain_steps" --set filters=16 \
  --set log_every=100
# Side by side with a thread each: on two cores that is faster than one after the other with two.
export OMP_NUM_THREADS=1
arm scratch scratch &
arm pretrained "$out/pretrain"
wait $!
supercl report "$out"/scratch_? "$out"/pretrained_? "$out/pretrain" -o "$out/report.html"
