#!/usr/bin/env bash
# One SLURM job for any experiment, from the root of the repository:
#
#   sbatch experiments/slurm.sh -c experiments/resnet/cifar10_resnet20.yaml -c experiments/machines/gpu.yaml
#   sbatch --array=0-4 experiments/slurm.sh -c ...                    seeds 0 to 4, a job each
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --time=12:00:00 experiments/slurm.sh \
#       -c ... -c experiments/machines/ddp.yaml                       eight processes
#
# A task is a process of the run. Whatever stops the job, the same job goes on in the same run folder: five
# minutes before the time limit, and when it is preempted, SLURM warns, the run saves, ends with status 75, and
# is requeued here; after a failure of its node or `scontrol requeue`, SLURM requeues it by itself.
# The folder has to be one that all nodes see. Give --signal=SIGUSR1@SECONDS if a step and a checkpoint take
# longer; a run that is stopped without a warning goes on from its last checkpoint.
#
#SBATCH --job-name=dynamic-networks
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@300

max_restarts=100  # should a job be stopped before it gets anywhere, again and again

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    set -- "$@" --seed_everything="$SLURM_ARRAY_TASK_ID"
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun has not inherited it since 22.05
fi

# In a step of srun, or the signal would not reach it. Tasks end together, so that the first to end is no
# reason to kill the others; but who lost one of them has a minute.
srun --kill-on-bad-exit=0 --wait=60 python "$SLURM_SUBMIT_DIR/main.py" fit "$@" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE"
status=$?

if [ $status = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt $max_restarts ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # until the requeue ends this script
fi
exit $status
