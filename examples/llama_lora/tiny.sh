#!/usr/bin/env bash
# The whole job with a tiny base and tiny texts, offline: base, three adapters, the merge, and what the result writes.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=outputs/llama_lora
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the model is too small to gain from more

python -m examples.llama_lora.tiny --output $out
for task in dates plurals sums; do
    python -m examples.llama_lora.train --base $out/base --data $out/texts/$task --output $out/adapters/$task \
        --rank 16 --steps 200 --learning_rate 3e-3
done
com-lightning merge --config examples/llama_lora/merge.yaml --overwrite
python -m examples.llama_lora.generate $out/merged/transformers "3 July 1998 =" "one wug, two" "one dax, two" "7 + 5 ="
