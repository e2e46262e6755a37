#!/usr/bin/env bash
# The whole road in minutes on a CPU: data -> cache -> pre-training -> fine-tuning, from scratch and pre-trained, on
# 2 labelled cases -> evaluation -> report. Without DATA the data are synthetic anatomy. Called by `make demo`.
#   benchmarks/demo.sh OUT [DATA]
# Run it again after a stop: every step goes on where it was. Delete OUT to begin anew.
set -euo pipefail
out=$1 data=${2:-$1/phantom} start=$SECONDS
mkdir -p "$out"
# These networks are so small that a second thread gains nothing, and costs much where other work shares the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ ! -e "$data" ] && [ $# -lt 2 ]; then
  supercl phantom "$data" --cases 24
fi
echo "demo: superpixels, ASP maps and weak labels" >&2
supercl preprocess "$data" "$out/cache.zarr"
[ -e "$out/split.json" ] || supercl split "$out/cache.zarr" "$out/split.json"
echo "demo: pre-training without labels" >&2
supercl pretrain "$out/cache.zarr" "$out/pretrain" --split "$out/split.json" --preset demo
for arm in scratch pretrained; do
  init=scratch
  [ "$arm" = scratch ] || init=$out/pretrain
  echo "demo: fine-tuning on 2 labelled cases, $arm" >&2
  supercl finetune "$out/cache.zarr" "$out/$arm" --init "$init" --split "$out/split.json" --labelled 2 --preset demo
  [ -e "$out/$arm/evaluation.json" ] || supercl evaluate "$out/$arm" "$out/cache.zarr" > "$out/$arm/table.txt"
done
supercl report "$out/scratch" "$out/pretrained" "$out/pretrain" -o "$out/report.html"
echo "demo: $((SECONDS - start)) s, open $out/report.html in a browser"
