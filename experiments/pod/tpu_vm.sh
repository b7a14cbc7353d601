#!/usr/bin/env bash
# A run on all hosts of a TPU VM pod; the processes find each other. From the folder of a fresh clone, with gcloud:
#
#   experiments/pod/tpu_vm.sh install NAME ZONE
#   experiments/pod/tpu_vm.sh run NAME ZONE --mesh=32x8 --out_dir=/mnt/shared/runs/one --resume ...
#
# NAME is the pod's, made with `gcloud compute tpus tpu-vm create`. The folder of the run is one that all hosts
# see (a mounted bucket, NFS); with --checkpoint_every=0 only the first host needs it. The same command again
# goes on with a run that ended.
set -euo pipefail
what=$1 name=$2 zone=$3
shift 3
pod() { gcloud compute tpus tpu-vm "$1" --zone="$zone" --worker=all "${@:2}"; }

case $what in
install)
    pod scp --recurse . "$name:fedgalore_jax"
    pod ssh "$name" --command='cd fedgalore_jax && python3 -m venv .venv &&
        .venv/bin/pip install --quiet -r requirements.txt && .venv/bin/pip install --quiet "jax[tpu]"'
    ;;
run)
    # Quoted twice: once for this shell, once for those of the hosts.
    pod ssh "$name" --command="cd fedgalore_jax && .venv/bin/python run.py --distributed $(printf '%q ' "$@")"
    ;;
*)
    echo "tpu_vm.sh: $what is neither install nor run" >&2
    exit 2
    ;;
esac
