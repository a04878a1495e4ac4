#!/usr/bin/env bash
# The whole job on real images, by the command line: a base, an expert for each task, three merges. `make demo` runs it.
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

merge() { com-lightning merge --config $configs/tasks.yaml --config $configs/merge.yaml --overwrite "$@"; }

step "merge, without retraining: the default"
merge

step "the same, with what makes it more accurate: configs/accurate.yaml"
merge --config configs/accurate.yaml --output_dir outputs/digits/accurate

step "the same, with a small adapter for each task: configs/adapters.yaml"
merge --config configs/adapters.yaml --output_dir outputs/digits/adapters

step "all of them: accuracy on images that no merge was calibrated on"
python -m examples.digits.side_by_side outputs/digits/merged outputs/digits/accurate outputs/digits/adapters

step "done; each folder has a report and a picture: outputs/digits/merged/report.html"
