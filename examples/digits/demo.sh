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

# Two at a time, as one expert keeps one core busy. Each writes what it prints to a file.
train() {
    local log="outputs/digits/$1.log"
    if ! com-lightning fit --config $configs/expert.yaml --data.task "$1" --trainer.callbacks.init_args.filename "$1" \
        > "$log" 2>&1; then
        cat "$log" >&2
        return 1
    fi
    echo "$1: $(tr '\r' '\n' < "$log" | grep -o 'val_acc=[0-9.]*' | tail -1)"
}
export -f train
export configs

step "an expert for each of five tasks, two at a time; outputs/digits/<task>.log has their progress"
printf '%s\n' mnist mnist-rotated mnist-rolled digits digits-rotated | xargs -P 2 -I{} bash -c 'train {}'

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
