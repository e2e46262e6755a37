#!/bin/bash
# The whole road as a chain of Slurm jobs. Set the variables, run it on the login node, and run it again at any time:
# what is finished is not computed again.
set -euo pipefail
cd "$(dirname "$0")"

export INPUT=${INPUT:-$HOME/data/Task02_Heart}     # a data set, under the same path on all nodes
export CACHE=${CACHE:-$HOME/data/heart.zarr}       # its cache, likewise
export RUNS=${RUNS:-$HOME/runs/heart}              # a folder for all runs
export SPLIT=${SPLIT:-$HOME/data/heart_split.json} # labelled cases and test cases; drawn if it is not there
export LABELLED=${LABELLED:-2}                     # how many labelled keys to fine-tune on
export PRETRAIN_OPTIONS=${PRETRAIN_OPTIONS:-}      # such as: --set steps=50000
export FINETUNE_OPTIONS=${FINETUNE_OPTIONS:-}
export ACTIVATE=${ACTIVATE:-$HOME/supercl/.venv/bin/activate} # what to source on the nodes before `supercl`

preprocess=$(sbatch --parsable preprocess.sbatch)
pretrain=$(sbatch --parsable --dependency="afterok:${preprocess}_0" pretrain.sbatch)
finetune=$(sbatch --parsable --dependency="afterok:$pretrain" finetune.sbatch)
echo "preprocess $preprocess, then pretrain $pretrain, then finetune $finetune"
