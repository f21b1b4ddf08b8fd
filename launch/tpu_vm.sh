#!/usr/bin/env bash
# TPU VMs by queued resource: create, wait, set up, run on all workers, begin again when preempted.
#   IMAGE=... BUCKET=NAME ZONE=... SETTINGS=run.env bash launch/tpu_vm.sh v5e:4x4 \
#     [--dry-run] [--slices N] [--spot | --reserved] [-- COMMAND ...]
#   ZONE=... bash launch/tpu_vm.sh v5e:4x4 --delete [--slices N]
# Run again it finds what is there and goes on: waits, starts, or watches the run in progress.
# COMMAND: bash launch/stages.sh --retries 0. NAME: of the resource (hovle). POLL: seconds (60).
# tpu7x is on GKE alone. Not yet run on a live cluster.
set -euo pipefail
here=$(dirname "$0")
source "$here/run.sh"
source "$here/slice.sh"
slices=1 tier=() giving_back='' target='' command=(bash launch/stages.sh --retries 0)
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --dry-run) DRY_RUN=1 ;;
    --slices) slices=${2:?--slices N} && shift ;;
    --spot | --reserved) tier=("$1") ;;
    --delete) giving_back=1 ;;
    --) command=("${@:2}") && break ;;
    -*) fail "unknown argument $1" ;;
    *) target=$1 ;;
  esac
  shift
done
slice "${target:-?}"
[ -n "$RUNTIME" ] || fail "queued resources have no $CHIP; use launch/gke.sh"
need ZONE
name=${NAME:-hovle}
nodes=("$name") shape=(--node-id="$name")
if [ "$slices" -gt 1 ]; then
  mapfile -t nodes < <(seq -f "$name-%g" 0 $((slices - 1)))
  shape=(--node-count="$slices" --node-prefix="$name")
fi
qr=(gcloud compute tpus queued-resources) vm=(gcloud compute tpus tpu-vm)

state() {
  "${qr[@]}" describe "$name" --zone="$ZONE" --format='value(state.state)' 2>/dev/null || echo NONE
}
delete() { run "${qr[@]}" delete "$name" --zone="$ZONE" --force --quiet; }
[ -z "$giving_back" ] || { delete && exit; }
need IMAGE BUCKET SETTINGS
[ -f "$SETTINGS" ] || fail "SETTINGS: no file $SETTINGS"

everywhere() { # COMMAND: on all workers of all slices at once; the first status that is not 0
  local node pid status=0 ended pids=()
  for node in "${nodes[@]}"; do
    run "${vm[@]}" ssh "$node" --zone="$ZONE" --worker=all --ssh-flag=-oServerAliveInterval=30 \
      --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    ended=0
    wait "$pid" || ended=$?
    [ "$status" != 0 ] || status=$ended
  done
  return "$status"
}

once() { # the whole run on slices that are there; its status, or that of a broken connection
  local node files=("$here/host.sh" "$here/env/$CHIP.env" "$SETTINGS")
  for node in "${nodes[@]}"; do
    run "${vm[@]}" scp --zone="$ZONE" --worker=all "${files[@]}" "$node:" || return
  done
  everywhere "bash host.sh setup $IMAGE $BUCKET" || return
  everywhere "bash host.sh start $IMAGE $CHIP.env $(basename "$SETTINGS")$(printf ' %q' "${command[@]}")" || return
  everywhere "bash host.sh watch"
}

while :; do
  state=NONE
  [ -n "$DRY_RUN" ] || state=$(state)
  echo "$name: $state" >&2
  case $state in
    ACTIVE) ;;
    NONE)
      run "${qr[@]}" create "$name" --zone="$ZONE" "${shape[@]}" --async \
        --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME" "${tier[@]}"
      [ -n "$DRY_RUN" ] || continue
      ;;
    SUSPENDED) delete && continue ;; # preempted: only a new request brings it back
    FAILED) fail "the request failed: ${qr[*]} describe $name --zone=$ZONE; then --delete" ;;
    *) sleep "${POLL:-60}" && continue ;; # in the queue, or being built or taken away
  esac
  status=0
  once || status=$?
  [ "$status" != 0 ] || break
  everywhere "bash host.sh stop" || true # one worker's end is the run's: none may wait for it
  sleep "${POLL:-60}"                    # a preemption needs a moment to show
  [ "$status" = 75 ] || [ "$(state)" != ACTIVE ] || exit "$status"
done
echo "done; to stop paying: ZONE=$ZONE bash launch/tpu_vm.sh $target --slices $slices --delete" >&2
