#!/usr/bin/env bash
# Runs a program on all workers of a TPU VM or a TPU pod, with gcloud.
#
#   launch/tpu_vm.sh create  --name=mae --zone=us-east5-b --type=v6e-16 --spot
#   launch/tpu_vm.sh install --name=mae --zone=us-east5-b
#   launch/tpu_vm.sh run     --name=mae --zone=us-east5-b -- \
#       python -m maeast_jax.train --config=configs/pretrain.py --workdir=gs://bucket/runs/paper \
#       --config.data.dir=gs://bucket/data --config.data.train=mine --config.data.eval=mine
#   launch/tpu_vm.sh delete  --name=mae --zone=us-east5-b
#
# create   requests the TPU and waits for it (with --queued it only requests the TPU)
# install  copies the checked-out commit to all workers, and installs the requirements and jax[tpu]
# run      starts the program with --distributed on all workers, in the background
# follow   prints the log of worker 0 while it grows
# stop     sends SIGTERM to all workers, and waits until they have saved and ended
# fetch    copies the folder --from of worker 0 to the folder --to on this machine
# delete   deletes the TPU; gcloud asks first
#
# --project=PROJECT    Google Cloud project; default: the project that gcloud is set to
# --type=TYPE          TPU and number of cores or chips, such as v4-8, v5litepod-16 or v6e-16
# --version=RUNTIME    software of the VM; default: the runtime that Google names for JAX on TYPE
# --spot               cheaper, but the TPU may be preempted at any time
# --queued             create and delete a queued resource of the same name
# --from=DIR --to=DIR  folders of fetch; --from is relative to the clone, --to is runs by default
# --create_flag=FLAG   another flag for gcloud's create, such as --network=NET; repeatable
# --ssh_flag=FLAG      another flag for gcloud's ssh and scp, such as --internal-ip; repeatable
# --dry_run            prints the commands, one per line, and runs none
#
# Nothing restarts the program. launch/sky.yaml does: it recreates a preempted TPU and goes on.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

commands='create install run follow stop fetch delete'
command=${1:---help}
[[ $command != --help ]] || { help "$0" && exit 0; }
[[ " $commands " == *" $command "* ]] || fail "$command is not a command; commands are: $commands"
shift

name='' zone='' project=() type='' version='' spot=() queued='' from='' to=runs dry_run=''
create_flags=() ssh_flags=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=("$1") ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --queued) queued=yes ;;
    --from=*) from=${1#*=} ;;
    --to=*) to=${1#*=} ;;
    --create_flag=*) create_flags+=("${1#*=}") ;;
    --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
    --dry_run) dry_run=yes ;;
    --) shift && break ;;
    *) fail "$1 is not an option; options are --name=value, then -- and the program (see --help)" ;;
  esac
  shift
done
[[ -n $name ]] || fail "--name is missing; it is the name of the TPU"
[[ -n $zone ]] || fail "--zone is missing, such as --zone=us-east5-b"

# The guard in ${array[@]+...} is for bash 3.2 (macOS), which refuses to expand an empty array.
call() { # call WORD...: runs or shows a command
  if [[ -z $dry_run ]]; then printf '+ %s\n' "$(quote "$@")" >&2 && "$@"; else quote "$@"; fi
}
tpus() { # tpus GROUP VERB FLAG...: calls gcloud for this TPU
  call gcloud compute tpus "$1" "$2" "$name" "--zone=$zone" ${project[@]+"${project[@]}"} "${@:3}"
}
copy() { # copy SOURCE TARGET FLAG...: copies files to or from workers
  call gcloud compute tpus tpu-vm scp "$1" "$2" "--zone=$zone" ${project[@]+"${project[@]}"} \
    "${@:3}" ${ssh_flags[@]+"${ssh_flags[@]}"}
}
on() { # on WORKER COMMAND: runs a shell command in the home folder of a worker
  tpus tpu-vm ssh "--worker=$1" ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$2"
}

case $command in
  create)
    case $type in
      '') fail "--type is missing, such as --type=v6e-16" ;;
      v6e-*) default=v2-alpha-tpuv6e ;;
      v5p-*) default=v2-alpha-tpuv5 ;;
      v5litepod-*) default=v2-alpha-tpuv5-lite ;;
      v[234]-*) default=tpu-ubuntu2204-base ;;
      *) default='' ;;
    esac
    version=${version:-$default}
    [[ -n $version ]] || fail "--type=$type has no runtime known here; add --version=RUNTIME"
    kind=(tpu-vm create "--version=$version")
    [[ -z $queued ]] || kind=(queued-resources create "--node-id=$name" "--runtime-version=$version")
    tpus "${kind[@]}" "--accelerator-type=$type" ${spot[@]+"${spot[@]}"} \
      ${create_flags[@]+"${create_flags[@]}"}
    ;;
  install)
    archive=${TMPDIR:-/tmp}/maeast_jax.tar.gz
    call git -C "$(dirname "$0")/.." archive --format=tar.gz "--output=$archive" HEAD
    copy "$archive" "$name:" --worker=all
    on all "mkdir -p maeast_jax && tar -xzf maeast_jax.tar.gz -C maeast_jax && cd maeast_jax && \
curl -LsSf https://astral.sh/uv/install.sh | sh && PATH=\$HOME/.local/bin:\$PATH && \
uv venv --clear --python=3.12 .venv && uv pip install -r requirements.txt 'jax[tpu]' gcsfs"
    ;;
  run)
    (($#)) || fail "no program; write -- PROGRAM ARGUMENTS after the options (see --help)"
    joins "$@"
    on all "cd maeast_jax && . .venv/bin/activate || exit 1; \
if kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null; then echo 'error: a program runs; stop it first' >&2; exit 2; fi; \
setsid $(quote "$@" --distributed) >>run.log 2>&1 </dev/null & echo \$! >run.pid"
    ;;
  follow) on 0 'tail -n 100 -F maeast_jax/run.log' ;;
  stop) on all "pid=\$(cat maeast_jax/run.pid) && kill -TERM \$pid && tail --pid=\$pid -f /dev/null" ;;
  fetch)
    [[ -n $from ]] || fail "--from is missing; it is the folder to fetch, such as --from=runs/paper"
    [[ $from == /* ]] || from=maeast_jax/$from
    call mkdir -p "$to"
    copy "$name:$from" "$to" --recurse --worker=0
    ;;
  delete) if [[ -n $queued ]]; then tpus queued-resources delete --force; else tpus tpu-vm delete; fi ;;
esac
