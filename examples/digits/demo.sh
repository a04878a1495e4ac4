#!/usr/bin/env bash
# The whole job on real images, by the command line alone: a base, an expert for each task, the merge. `make demo` runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
configs=configs/digits
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is too small to gain from more
mkdir -p outputs/digits

step() { printf '\n== %s (%s s since the start)\n' "$1" "$SECONDS"; }

step "base model, on a proxy task: how far has a digit been turned?"
com-lightning fit --config $configs/base.yaml

for task in mnist mnist-rotated mnist-rolled digits digits-rotated; do
    step "expert for $task"
    com-lightning fit --config $configs/expert.yaml --data.task "$task" --trainer.callbacks.init_args.filename "$task"
done

step "merge, without retraining"
com-lightning merge --config $configs/tasks.yaml --config $configs/merge.yaml --overwrite

step "done; the report and a picture are in outputs/digits/merged"
