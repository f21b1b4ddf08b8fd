#!/usr/bin/env bash
# A run on a cluster that xpk made (Google now points from xpk to Cluster Toolkit: gcluster.sh).
#   IMAGE=... CLUSTER=... PROJECT=... ZONE=... SETTINGS=run.env bash launch/xpk.sh v5e:4x4 \
#     [--slices N] [--dry-run]
# Before, once: xpk storage attach BUCKET --type=gcsfuse --mount-point=/bucket --readonly=false
#   --bucket=BUCKET --size=1 --auto-mount=true --cluster=... --project=... --zone=...
# NAME: of the run (hovle). Status 75 counts as a restart, hence so many. Flags of xpk 1.16.
# Not yet run on a live cluster.
set -euo pipefail
here=$(dirname "$0")
source "$here/run.sh"
source "$here/slice.sh"
slices=1 target=''
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --slices) slices=${2:?--slices N} && shift ;;
    -*) fail "unknown argument $1" ;;
    *) target=$1 ;;
  esac
  shift
done
slice "${target:-?}"
need IMAGE CLUSTER PROJECT ZONE SETTINGS
environment=${TMPDIR:-/tmp}/${NAME:-hovle}.env # xpk takes one file
cat "$here/env/$CHIP.env" "$SETTINGS" | grep -v '^#' >"$environment"
run xpk workload create --workload="${NAME:-hovle}" --cluster="$CLUSTER" --project="$PROJECT" \
  --zone="$ZONE" --tpu-type="$ACCELERATOR_TYPE" --num-slices="$slices" --docker-image="$IMAGE" \
  --env-file="$environment" --max-restarts=1000 --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=600 --command="bash launch/stages.sh --retries 0"
