#!/usr/bin/env bash
# Run a command as every rank of the allocation, and wait for it:
#   slurm/launch.sh python3 -m megatron_sphinx train CONFIG [key=value …]
# Ranks are dealt to the nodes in blocks: the first ranks, which are the language model's, fill the first nodes, so that
# tensor ranks are neighbours, and the encoder ranks, which come last, are on the last ones. torchrun gives ranks to
# nodes in the alphabetical order of their names, and as many to each; it is one task on each, so ask for GPUs with
# --gpus-per-node then, not with --gpus-per-task.
set -euo pipefail
trap '' USR1 # srun passes it on once it runs
: "${SPHINX_ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/env.sh
. "$SPHINX_ROOT/slurm/env.sh"
export MASTER_ADDR MASTER_PORT

nodes=$SLURM_NNODES
cpus=${SLURM_CPUS_PER_TASK:-1}
# Ranks that fail end the others themselves, with the status that counts, so srun must not kill them first.
step=(srun --nodes="$nodes" --distribution=block --kill-on-bad-exit=0 --wait="$SPHINX_END_SECONDS")
# A rank that has only just begun, and torchrun itself, must not die of the signal that asks the ranks to save.
deaf=(bash -c 'trap "" USR1; exec "$@"' rank)
case $LAUNCHER in
srun)
    exec "${step[@]}" --ntasks="$ranks" --cpus-per-task="$cpus" "${deaf[@]}" "${container[@]}" "$@"
    ;;
torchrun)
    if [ $((ranks % nodes)) != 0 ]; then
        echo "LAUNCHER=torchrun: $ranks ranks do not divide into $nodes nodes; use LAUNCHER=srun" >&2
        exit 2
    fi
    per_node=$((ranks / nodes))
    exec "${step[@]}" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task=$((cpus * per_node)) \
        "${deaf[@]}" "${python[@]}" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$per_node" \
        --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID" \
        --no-python "$@"
    ;;
*)
    echo "LAUNCHER=$LAUNCHER: unknown; use srun or torchrun" >&2
    exit 2
    ;;
esac
