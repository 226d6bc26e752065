#!/usr/bin/env bash
# Measure how a configuration scales over numbers of nodes, and write one report of it, with both curves. From the
# repository's root; words from the first that begins with a dash on are options of sbatch:
#   NODES="1 2 4 8" slurm/benchmark.sh CONFIG [key=value …] --ntasks-per-node=8 --gpus-per-node=8
# A job for each number of nodes, and one that merges what they measured once all have ended, also where some failed.
# Separate jobs, and not one job array, because all tasks of an array ask for the same nodes: each would wait for the
# most, and hold those that it does not use. Settings: benchmark.sbatch. Prints the id of each job.
set -euo pipefail
if [ $# = 0 ] || [ -z "${NODES:-}" ]; then
    echo "usage: NODES=\"1 2 4\" $0 CONFIG [key=value …] [sbatch options]" >&2
    exit 2
fi
: "${SPHINX_ROOT:=$PWD}"
export SPHINX_OUTPUT=${SPHINX_OUTPUT:-runs/benchmark}
given=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
    given+=("$1")
    shift
done

jobs=()
for nodes in $NODES; do
    job=$(sbatch --parsable --job-name="sphinx-benchmark-$nodes" --nodes="$nodes" "$@" \
        "$SPHINX_ROOT/slurm/benchmark.sbatch" "${given[@]}")
    jobs+=("${job%%;*}")
    echo "${job%%;*} nodes_$nodes"
done
all=${jobs[*]}
job=$(sbatch --parsable --dependency="afterany:${all// /:}" "$SPHINX_ROOT/slurm/benchmark_report.sbatch" "$SPHINX_OUTPUT")
echo "${job%%;*} report"
