#!/usr/bin/env bash
# One TPU VM's part of a run; launch/tpu_vm.sh (or launch/sky.yaml) copies this to every worker.
#   bash host.sh [--dry-run] setup IMAGE BUCKET     # huge pages, bucket at /bucket, image
#   bash host.sh [--dry-run] start IMAGE ENV ENV [COMMAND ...]   # unless it runs already
#   bash host.sh [--dry-run] watch                  # log; ends with the container's status
#   bash host.sh [--dry-run] stop                   # SIGTERM, ten minutes for a checkpoint
# A container, because these VMs' own Python is older than 3.11. Not yet run on a live cluster.
set -euo pipefail
run() { if [ -n "${dry:-}" ]; then echo "$*"; else "$@"; fi; }
case ${1:-} in
  --help) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit ;;
  --dry-run) dry=1 && shift ;;
esac
huge=/sys/kernel/mm/transparent_hugepage/enabled
apt=https://packages.cloud.google.com/apt
keys=/usr/share/keyrings/cloud.google.asc

case ${1:-} in
  setup)
    # The runtime of v5e and later starts faster with huge pages; jax warns without them.
    run sudo sh -c "echo always >$huge"
    if ! mountpoint -q /bucket; then
      # docs.cloud.google.com/storage/docs/cloud-storage-fuse/install
      if ! command -v gcsfuse >/dev/null; then
        run sudo sh -c "curl -fsS $apt/doc/apt-key.gpg >$keys"
        run sudo sh -c "echo deb [signed-by=$keys] $apt gcsfuse-$(lsb_release -cs) main \
>/etc/apt/sources.list.d/gcsfuse.list"
        run sudo apt-get update -q
        run sudo apt-get install -qy gcsfuse
      fi
      run sudo mkdir -p /bucket
      run sudo gcsfuse -o allow_other --implicit-dirs "$3" /bucket
    fi
    run sudo gcloud auth configure-docker "${2%%/*}" --quiet
    run sudo docker pull -q "$2"
    ;;
  start)
    if [ -n "${dry:-}" ] || [ -z "$(sudo docker ps -q --filter 'name=^hovle$')" ]; then
      run sudo docker rm -f hovle || true # what ended before; there may be none
      # privileged and host network: the TPU's device files, the metadata server, other hosts;
      # shared memory: two batches of each data worker, and the index
      run sudo docker run --detach --name hovle --privileged --net=host --shm-size=64g \
        --env-file="$3" --env-file="$4" -v /bucket:/bucket "$2" "${@:5}"
    fi
    ;;
  watch)
    run sudo docker logs --follow --tail=20 hovle
    status=$(run sudo docker wait hovle)
    if [ -n "${dry:-}" ]; then echo "$status"; else exit "$status"; fi
    ;;
  stop)
    run sudo docker stop -t 600 hovle
    run sudo docker rm -f hovle
    ;;
  *) echo "host.sh: setup, start, watch or stop; --help says how" >&2 && exit 2 ;;
esac
