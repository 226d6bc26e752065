#!/usr/bin/env bash
# Submit the way from captions to tasks as jobs that each wait for the one before:
#   conversion of a language model -> stage 1 on real captions -> stage 1 on synthetic ones -> theta_mix -> stage 2
# From the repository's root; options after the three configurations are sbatch's, for each of the training jobs:
#   CONVERT=Llama-2-7b-hf BETA=0.6 slurm/chain.sh REAL.yaml SYNTHETIC.yaml STAGE2.yaml --nodes=4 --ntasks-per-node=8
# The real run begins with the converted model, which is kept in its run folder; without CONVERT there is no such job,
# and model.weights of REAL.yaml says what it begins with. The synthetic run begins with the weights of the real one,
# stage 2 with the mix of both, which is kept in its run folder. When a job fails, Slurm cancels those that wait for it;
# a job that is requeued keeps them waiting.
# Prints the id of each job.
set -euo pipefail
if [ $# -lt 3 ] || [ -z "${BETA:-}" ]; then
    echo "usage: BETA=<share of the real captions> $0 REAL.yaml SYNTHETIC.yaml STAGE2.yaml [sbatch options]" >&2
    exit 2
fi
real=$1 synthetic=$2 stage2=$3
shift 3
# shellcheck source=slurm/env.sh
. "${SPHINX_ROOT:-$PWD}/slurm/env.sh"

folder_of() { # a configuration: where its run lives
    "${python[@]}" -m megatron_sphinx config --get run.folder "$1"
}
last=''
submit() { # name, then sbatch's arguments: a job that runs when the one before it is done
    local name=$1
    shift
    last=$(sbatch --parsable --job-name="sphinx-$name" --kill-on-invalid-dep=yes \
        ${last:+--dependency=afterok:"$last"} "$@")
    last=${last%%;*} # a job of another cluster is <id>;<cluster>
    echo "$last $name"
}

of_real=$(folder_of "$real") of_synthetic=$(folder_of "$synthetic")
mix=$(folder_of "$stage2")/theta_mix
base=()
if [ -n "${CONVERT:-}" ]; then
    submit convert "$SPHINX_ROOT/slurm/convert.sbatch" "$CONVERT" "$of_real/converted" --to megatron
    base=(model.weights="$of_real/converted")
fi
submit real "$@" "$SPHINX_ROOT/slurm/train.sbatch" "$real" "${base[@]}"
submit synthetic "$@" "$SPHINX_ROOT/slurm/train.sbatch" "$synthetic" model.weights="$of_real"
submit theta_mix "$SPHINX_ROOT/slurm/interpolate.sbatch" \
    --real "$of_real" --synthetic "$of_synthetic" --beta "$BETA" --output "$mix"
submit stage2 "$@" "$SPHINX_ROOT/slurm/train.sbatch" "$stage2" model.weights="$mix"
