#!/usr/bin/env bash
# The same `bigflax train` on a Slurm cluster of GPUs, one process a GPU; the environment that has `bigflax` on its PATH travels along.
#   sbatch --nodes=4 tpu_scripts/slurm.sh --config=gpt2_124m --config.work=/shared/runs/gpt2
#SBATCH --job-name=bigflax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@300
# Five minutes before the time is up, and on preemption, SIGTERM reaches the steps: bigflax saves and ends with 75, and the job queues again.
set -euo pipefail
case " $* " in
    *" --config.work="*) ;;
    *) echo "slurm.sh: name a work folder that all nodes see: --config.work=/shared/runs/NAME" >&2; exit 2 ;;
esac
code=0
srun --kill-on-bad-exit=0 bigflax train --hosts=0 "$@" || code=$? # the highest exit code of all processes
if [ $code = 75 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
