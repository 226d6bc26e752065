# shellcheck shell=bash
# Settings of every job in this folder. Each value comes from the environment (sbatch passes yours on), or else from the
# default here. What sbatch asks the cluster for has variables of its own: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS …
# Any other variable that torch, NCCL or gloo know, such as NCCL_IB_HCA, passes through as it is. How long a collective
# may take is no setting of the machine but a key of the run: run.timeout.

# Where sbatch was called, or where this shell is: paths in configurations are relative to it.
submitted_in=${SLURM_SUBMIT_DIR:-$PWD}

# The code that jobs run: this repository. A training job copies it into its run folder, and runs the copy.
: "${SPHINX_ROOT:=$submitted_in}"

# Environment modules to load, e.g. "gcc/13 cuda/12.8". Default: none.
: "${SPHINX_MODULES:=}"

# The virtual environment. Default: .venv where sbatch was called; where there is none, the PATH decides on python3.
: "${SPHINX_VENV:=$submitted_in/.venv}"

# What to put before every python3, e.g. "apptainer exec --nv --bind /data sphinx.sif". Default: nothing.
: "${SPHINX_CONTAINER:=}"

# Who starts the ranks: srun, each one itself; or torchrun, one on each node, which starts that node's ranks.
: "${LAUNCHER:=srun}"

# Restarts after which a training job gives up, whatever it was stopped by: time limit, preemption or lost nodes.
: "${SPHINX_MAX_REQUEUES:=100}"

# Seconds that ranks may take to end after the first of them has ended.
: "${SPHINX_END_SECONDS:=300}"

# The network interface that ranks talk over, e.g. ib0 or eth0: NCCL's bootstrap and all of gloo. Default: what they
# choose. Set it where a node's own name stands for 127.0.1.1, which no other node can reach.
: "${SPHINX_INTERFACE:=}"
if [ -n "$SPHINX_INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$SPHINX_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$SPHINX_INTERFACE}
fi

# What NCCL prints: WARN, INFO … CPU ranks have no use for it.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Threads of a CPU operation. Another number may change the last bits of a sum.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Where the ranks meet: the first node of the allocation, at a port that follows from the job's id, because jobs may
# share a node. Both can be given. A task of the job is a rank.
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    mapfile -t job_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    : "${MASTER_ADDR:=${job_nodes[0]}}"
    : "${MASTER_PORT:=$((10000 + SLURM_JOB_ID % 20000))}"
    # shellcheck disable=SC2034  # for those that source this, as container and python are
    ranks=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}
fi

if [ -n "$SPHINX_MODULES" ]; then
    # shellcheck disable=SC2086  # a list of modules
    module load $SPHINX_MODULES
fi
if [ -d "$SPHINX_VENV/bin" ]; then
    export PATH=$SPHINX_VENV/bin:$PATH
fi
# The package of SPHINX_ROOT, and not that of the current folder or an installed one.
export PYTHONPATH=$SPHINX_ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
read -ra container <<<"$SPHINX_CONTAINER"
# shellcheck disable=SC2034
python=("${container[@]}" python3)
