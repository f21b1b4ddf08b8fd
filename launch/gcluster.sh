#!/usr/bin/env bash
# Cluster Toolkit: a GKE cluster for one kind of slice, and runs on it.
#   PROJECT=... REGION=... ZONE=... bash launch/gcluster.sh v6e:4x4 --create [--slices N] [--dry-run]
#   PROJECT=... REGION=... IMAGE=... BUCKET=NAME SETTINGS=/bucket/run.env \
#     bash launch/gcluster.sh v6e:4x4 [--slices N] [--dry-run]
# RESERVATION: of the TPUs. CLIENT: the address range that may reach the cluster (this machine's).
# SETTINGS is a path inside the bucket, for the command has no flag for the environment.
# CLUSTER, NAME: of the cluster and the run (hovle). Flags of Cluster Toolkit 1.95.
# launch/gke.sh works on this cluster, too. Not yet run on a live cluster.
set -euo pipefail
here=$(dirname "$0")
source "$here/run.sh"
source "$here/slice.sh"
slices=1 target='' create=''
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --create) create=1 ;;
    --slices) slices=${2:?--slices N} && shift ;;
    -*) fail "unknown argument $1" ;;
    *) target=$1 ;;
  esac
  shift
done
slice "${target:-?}"
need PROJECT REGION
if [ -n "$create" ]; then
  need ZONE RESERVATION CLIENT
  vars=project_id=$PROJECT,deployment_name=${CLUSTER:-hovle},region=$REGION,zone=$ZONE
  vars+=,num_slices=$slices,machine_type=$MACHINE,tpu_topology=$SHAPE,accelerator=$GKE
  vars+=,chips=$((slices * CHIPS)),reservation=$RESERVATION,authorized_cidr=$CLIENT
  run gcluster deploy "$here/cluster.yaml" --vars="$vars"
  exit
fi
need IMAGE BUCKET SETTINGS
run gcluster job submit --project "$PROJECT" --cluster "${CLUSTER:-hovle}" --location "$REGION" \
  --name "${NAME:-hovle}" --queue hovle --image "$IMAGE" --compute-type "$ACCELERATOR_TYPE" \
  --topology "$SHAPE" --num-slices "$slices" --mount "gs://$BUCKET:/bucket:rw" \
  --restarts 1000 --restart-on-exit-codes 75 --grace-period 10m \
  --service-account "${SERVICE_ACCOUNT:-workload-identity-k8s-sa}" --command \
  "env 'SETTINGS=launch/env/$CHIP.env $SETTINGS' bash launch/stages.sh --retries 0"
