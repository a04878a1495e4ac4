#!/usr/bin/env bash
# A merge by several processes that torchrun starts. The arguments are those of `com-lightning merge`:
#   GPUS=4 bash examples/ddp_merge/torchrun.sh --config tasks.yaml --config merge.yaml
# On several machines, this is run on each, with its number, from 0, and the name of machine 0:
#   MACHINES=2 MACHINE=1 HEAD=machine0 GPUS=4 bash examples/ddp_merge/torchrun.sh ...
set -euo pipefail
gpus=${GPUS:-2}
machines=${MACHINES:-1}
exec torchrun --nnodes="$machines" --node_rank="${MACHINE:-0}" --nproc_per_node="$gpus" \
    --master_addr="${HEAD:-127.0.0.1}" --master_port="${PORT:-29500}" \
    -m com_lightning merge "$@" \
    --trainer.strategy=ddp --trainer.num_nodes="$machines" --trainer.devices="$gpus"
