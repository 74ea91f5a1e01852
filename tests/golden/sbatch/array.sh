#!/bin/bash
#SBATCH --job-name=oc-array-0123456789abcdef
#SBATCH --comment="3 jobs"
#SBATCH --array=0-2
#SBATCH --chdir=/home/ada/checkout
#SBATCH --output="/shared/runs/arrays/x y/slurm-%A_%a.log"
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=30
#SBATCH --partition=cpu
#SBATCH --exclude=n7
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

folder=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" '/shared/runs/arrays/x y/folders.txt')
log="$folder/logs/slurm-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.log"
exec bash "$folder/jobs/submit.sh" >>"$log" 2>&1
