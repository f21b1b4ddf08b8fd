# Sourced by the other scripts: what Google calls the slice that `hovle plan` calls v5e:4x4.
# Names: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, .../tpu/docs/runtimes and
# docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (read in 2026).
# shellcheck shell=bash disable=SC2034

slice() { # TOPOLOGY -> CHIP SHAPE CHIPS CHIPS_PER_HOST HOSTS ACCELERATOR_TYPE RUNTIME GKE MACHINE
  [[ $1 =~ ^[a-z0-9]+:[0-9]+(x[0-9]+){1,2}$ ]] || fail "topology $1 is not of the form v5e:4x4"
  CHIP=${1%%:*} SHAPE=${1#*:}
  CHIPS=$((${SHAPE//x/*}))
  CHIPS_PER_HOST=4
  case $CHIP:$SHAPE in v5e:1x1 | v6e:1x1) CHIPS_PER_HOST=1 ;; v5e:2x4 | v6e:2x4) CHIPS_PER_HOST=8 ;; esac
  HOSTS=$((CHIPS / CHIPS_PER_HOST))
  [ $((HOSTS * CHIPS_PER_HOST)) = "$CHIPS" ] || fail "topology $1 is no whole number of hosts"
  local size=$CHIPS_PER_HOST
  case $CHIP in # of v4 and v5p the accelerator type counts cores, two a chip
    v4) ACCELERATOR_TYPE=v4-$((2 * CHIPS)) RUNTIME=tpu-ubuntu2204-base GKE=tpu-v4-podslice MACHINE=ct4p-hightpu-${size}t ;;
    v5e) ACCELERATOR_TYPE=v5litepod-$CHIPS RUNTIME=v2-alpha-tpuv5-lite GKE=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-${size}t ;;
    v5p) ACCELERATOR_TYPE=v5p-$((2 * CHIPS)) RUNTIME=v2-alpha-tpuv5 GKE=tpu-v5p-slice MACHINE=ct5p-hightpu-${size}t ;;
    v6e) ACCELERATOR_TYPE=v6e-$CHIPS RUNTIME=v2-alpha-tpuv6e GKE=tpu-v6e-slice MACHINE=ct6e-standard-${size}t ;;
    tpu7x) ACCELERATOR_TYPE=tpu7x-$SHAPE RUNTIME='' GKE=tpu7x MACHINE=tpu7x-standard-${size}t ;; # GKE alone
    *) fail "no chip $CHIP; v4, v5e, v5p, v6e or tpu7x" ;;
  esac
}
