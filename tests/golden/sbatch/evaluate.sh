#!/bin/bash
#SBATCH --job-name=oc-00112233aabbccdd-evaluate
#SBATCH --comment=dims/00112233aabbccdd/evaluate
#SBATCH --dependency=singleton
#SBATCH --chdir=/home/ada/checkout
#SBATCH --output=/shared/runs/trials/00112233aabbccdd/evaluation/logs/slurm-%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=1
#SBATCH --mem=30720M
#SBATCH --time=60
#SBATCH --partition=t4
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

export OMP_NUM_THREADS=4
export ORCHESTRATE_DEVICE=cuda
export ORCHESTRATE_STAGE=evaluate
export PYTHONPATH=/shared/runs/code/abc:/home/ada/checkout
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=4

exec /shared/venv/bin/python -m orchestrate.launchers.slurm_job \
  --run-dir /shared/runs/trials/00112233aabbccdd/evaluation --script /shared/runs/trials/00112233aabbccdd/evaluation/jobs/submit.sh \
  --lead-seconds 120 -- \
  srun --kill-on-bad-exit=1 --wait=60 --unbuffered --distribution=block --open-mode=append \
  '--output=/shared/runs/trials/00112233aabbccdd/evaluation/logs/attempt-{attempt}/rank-%t.log' \
  /shared/venv/bin/python -m orchestrate.launchers.slurm_rank -- \
  /shared/venv/bin/python -m orchestrate.worker /shared/runs/trials/00112233aabbccdd
