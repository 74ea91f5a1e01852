#!/bin/bash
#SBATCH --job-name=oc-00112233aabbccdd
#SBATCH --comment=dims/00112233aabbccdd/pretrain
#SBATCH --dependency=singleton
#SBATCH --chdir=/home/ada/checkout
#SBATCH --output=/shared/runs/trials/00112233aabbccdd/logs/slurm-%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=2
#SBATCH --time=120
#SBATCH --partition=spot,low
#SBATCH --qos=scavenger
#SBATCH --exclude=gpu[07-09],gpu12,gpu30
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --mail-type=FAIL
#SBATCH --contiguous
#SBATCH --nice=10

export OMP_NUM_THREADS=1
export ORCHESTRATE_DEVICE=cuda
export ORCHESTRATE_STAGE=all
export PYTHONPATH=/shared/runs/code/abc:/home/ada/checkout
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=1

exec /shared/venv/bin/python -m orchestrate.launchers.slurm_job \
  --run-dir /shared/runs/trials/00112233aabbccdd --script /shared/runs/trials/00112233aabbccdd/jobs/submit.sh \
  --lead-seconds 300 -- \
  srun --kill-on-bad-exit=1 --wait=60 --unbuffered --distribution=block --open-mode=append \
  '--output=/shared/runs/trials/00112233aabbccdd/logs/attempt-{attempt}/rank-%t.log' \
  /shared/venv/bin/python -m orchestrate.launchers.slurm_rank -- \
  /shared/venv/bin/python -m orchestrate.worker /shared/runs/trials/00112233aabbccdd
