#!/usr/bin/env bash
# One SLURM job for any experiment, from the root of the repository:
#
#   sbatch experiments/slurm.sh -c experiments/resnet/cifar10_resnet20.yaml -c experiments/machines/gpu.yaml
#   sbatch --array=0-4 experiments/slurm.sh -c ...                    seeds 0 to 4, a job each
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --time=12:00:00 experiments/slurm.sh \
#       -c ... -c experiments/machines/ddp.yaml                       eight processes
#
# Each task is a process of the run. A job that is stopped goes on as the same job in the same run folder, which
# all nodes have to see. SLURM warns five minutes before the time limit, and when it preempts the job; the run saves
# and ends, and this script requeues it. After a failure of a node or `scontrol requeue` SLURM itself requeues the
# job, which goes on from its last checkpoint.
# The run obeys a warning after the step, validation or test that is going on. If that takes longer than five
# minutes, give --signal=SIGUSR1@SECONDS. The time limit itself ends a job for good.
#
#SBATCH --job-name=dynamic-networks
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@300

max_restarts=100  # ends a job that is stopped again and again before it gets anywhere

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    set -- "$@" --seed_everything="$SLURM_ARRAY_TASK_ID"
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # since SLURM 22.05 srun does not inherit it
fi

# The signal only reaches what runs in a step of srun. All tasks end soon after one another, so the first to end
# is no reason to kill the others; if one is lost, the others have ten minutes.
srun --kill-on-bad-exit=0 --wait=600 python "$SLURM_SUBMIT_DIR/main.py" fit "$@" \
    --trainer.num_nodes="$SLURM_NNODES" \
    --trainer.devices="${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node, not --ntasks}"
status=$?

# 75: warned and saved. 143: the same by SIGTERM; it was not `scancel`, which would have ended this script, too.
# 138: warned by SIGUSR1 before Python listened.
case $status in
75 | 138 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt $max_restarts ]; then
        # A task of an array is named by both its numbers: the first alone may mean the whole array.
        scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
        sleep 60  # the requeue ends this script before that
    fi
    ;;
esac
exit $status
