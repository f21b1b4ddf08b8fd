#!/usr/bin/env bash
#SBATCH --job-name=hovle
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
# A run under Slurm, from the repository's root, where .venv is (bash launch/test.sh makes one).
#   sbatch --nodes=N --export=ALL,SETTINGS=run.env launch/slurm.sh
#   SETTINGS=run.env bash launch/slurm.sh --dry-run
# Ten minutes before the time limit the tasks get SIGTERM, save, end with 75, and the job is
# queued again. Hosts find each other through Slurm. On GPU nodes: --ntasks-per-node as many as a
# node has GPUs, for jax gives a Slurm task one. VENV: the environment's folder (.venv).
# Not yet run on a live cluster.
set -euo pipefail
# sbatch runs a copy of this file, so it cannot say where the others are.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source launch/run.sh
case ${1:-} in
  --dry-run) DRY_RUN=1 ;;
  --help) sed -n '9,16s/^# \{0,1\}//p' launch/slurm.sh && exit ;;
esac
need SETTINGS
export PATH=$PWD/${VENV:-.venv}/bin:$PATH
status=0
# One task's end is the run's: none may wait for it.
run srun --kill-on-bad-exit=1 bash launch/stages.sh --retries 0 || status=$?
if [ "$status" = 75 ]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
