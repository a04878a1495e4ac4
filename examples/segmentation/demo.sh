#!/usr/bin/env bash
# A base, an expert for each task, and two merges: with a head for each task, and with one for both kinds of shapes.
#   bash examples/segmentation/demo.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/segmentation
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p outputs/segmentation

step() { printf '\n== %s (%s s since the start)\n' "$1" "$SECONDS"; }

expert() {
    step "expert for $1"
    com-lightning fit --config $here/expert.yaml --data.task "$1" --model.num_classes "$2" \
        --trainer.callbacks.init_args.filename "$1"
}

step "base model, on a proxy task: ground or thing?"
com-lightning fit --config $here/base.yaml
expert shapes 4
expert shapes-negative 4
expert digits 3

step "merge, a head for each task"
com-lightning merge --config $here/tasks.yaml --config $here/merge.yaml --overwrite

step "merge, one head for shapes and their negatives"
com-lightning merge --config $here/tasks.yaml --config $here/shared.yaml --overwrite

step "done; the reports are in outputs/segmentation/merged and merged_with_head"
