#!/usr/bin/env bash
# A run on a GKE cluster with JobSet and Kueue (launch/cluster.yaml makes one).
#   IMAGE=... BUCKET=NAME SETTINGS=run.env bash launch/gke.sh v5e:4x4 [--slices N] [--dry-run]
#   bash launch/gke.sh v5e:4x4 --queue [--slices N] [--dry-run]      # once: Kueue's queue, N slices
# --dry-run prints the manifests. NAME: of the run (hovle), NAMESPACE (default), SERVICE_ACCOUNT:
# a Kubernetes one that may read and write the bucket (default). To stop: kubectl delete jobset NAME.
# Not yet run on a live cluster.
set -euo pipefail
here=$(dirname "$0")
source "$here/run.sh"
source "$here/slice.sh"
slices=1 target='' manifest=jobset.yaml
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --queue) manifest=kueue.yaml ;;
    --slices) slices=${2:?--slices N} && shift ;;
    -*) fail "unknown argument $1" ;;
    *) target=$1 ;;
  esac
  shift
done
slice "${target:-?}"
[ "$manifest" = kueue.yaml ] || need IMAGE BUCKET SETTINGS
namespace=${NAMESPACE:-default} name=${NAME:-hovle}

fill() { # FILE: with every ${name} replaced
  local text key
  declare -A values=(
    [name]=$name [namespace]=$namespace [service_account]=${SERVICE_ACCOUNT:-default}
    [image]=${IMAGE:-} [bucket]=${BUCKET:-} [slices]=$slices [hosts]=$HOSTS
    [chips_per_host]=$CHIPS_PER_HOST [chips]=$((slices * CHIPS)) [accelerator]=$GKE [topology]=$SHAPE
  )
  text=$(<"$1")
  for key in "${!values[@]}"; do text=${text//"\${$key}"/"${values[$key]}"}; done
  printf '%s\n' "$text"
}

settings() { # the run's and the chip's settings as one ConfigMap
  printf 'apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: %s-env\n  namespace: %s\ndata:\n' "$name" "$namespace"
  # In single quotes YAML knows one escape: '' for '.
  sed -n "s/'/''/g; s/^\([A-Za-z_][A-Za-z0-9_]*\)=\(.*\)/  \1: '\2'/p" "$here/env/$CHIP.env" "$SETTINGS"
  echo ---
}

manifests() {
  [ "$manifest" = kueue.yaml ] || settings
  fill "$here/$manifest"
}
if [ -n "$DRY_RUN" ]; then
  manifests
else
  manifests | kubectl apply -f -
fi
