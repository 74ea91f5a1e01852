#!/bin/bash
#SBATCH --job-name=oc-00112233aabbccdd
#SBATCH --comment=dims/00112233aabbccdd/pretrain
#SBATCH --dependency=singleton
#SBATCH --chdir=/home/ada/checkout
#SBATCH --output="/shared/my runs' $HOME/100%%/\"a\\b\"/trials/00112233aabbccdd/logs/slurm-%j.log"
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

module load cuda/12.4
export CACHE="$TMPDIR/my cache"

export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=8
export ORCHESTRATE_DEVICE=cuda
export ORCHESTRATE_STAGE=all
export PYTHONPATH=/shared/runs/code/abc:/home/ada/checkout
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=8
export TITLE='it'"'"'s $HOME'

exec /shared/venv/bin/python -m orchestrate.launchers.slurm_job \
  --run-dir '/shared/my runs'"'"' $HOME/100%/"a\b"/trials/00112233aabbccdd' --script '/shared/my runs'"'"' $HOME/100%/"a\b"/trials/00112233aabbccdd/jobs/submit.sh' \
  --lead-seconds 120 -- \
  srun --kill-on-bad-exit=1 --wait=60 --unbuffered --distribution=block --open-mode=append --mpi=none --container-writable \
  '--output=/shared/my runs'"'"' $HOME/100%%/"a\b"/trials/00112233aabbccdd/logs/attempt-{attempt}/rank-%t.log' \
  apptainer exec --nv --bind '/data sets:/data' '/images/it'"'"'s $1.sif' /opt/conda/bin/python -m orchestrate.launchers.slurm_rank -- \
  /opt/conda/bin/python -m orchestrate.worker '/shared/my runs'"'"' $HOME/100%/"a\b"/trials/00112233aabbccdd'
