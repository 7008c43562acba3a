#!/usr/bin/env bash
# A run on a TPU VM or a pod of them, through gcloud: on demand, spot, or from the queue.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- PROGRAM ARGUMENTS...]
#   launch/tpu_vm.sh resume --name=mae --zone=us-east5-b --type=v6e-16 --spot --queued -- \
#       python -m maeast_jax.train --config=configs/pretrain.py --workdir=gs://bucket/run \
#       --config.data.dir=gs://bucket/data --config.data.train=mine --config.data.eval=mine
#
# create   asks for the TPU                      needs --type
# wait     until it is ready
# install  sends HEAD of this clone to all workers, makes an environment there
# start    PROGRAM (of ours train alone) on all workers with --distributed added, in the
#          background, brought back after a lost process    needs PROGRAM
# follow   shows the log of worker 0
# status   of the TPU and of each worker
# resume   whatever is missing of create, wait, install and start; a TPU that was preempted is
#          deleted and asked for again. Ends with 4, and starts nothing, where PROGRAM has ended
#          by itself on a worker, done or for a mistake    needs --type and PROGRAM
# fetch    copies the folder that --workdir names in PROGRAM to --to
# stop     SIGTERM to all workers: all save, and end
# delete   the TPU, after gcloud's own question
#
# --project=PROJECT    without it, gcloud's own
# --type=TYPE          such as v4-8, v5litepod-16, v5p-8, v6e-16
# --version=RUNTIME    software of the VM; without it, the one for --type
# --spot               cheaper, and may be preempted at any time
# --queued             asks as a queued resource of the same name, and waits its turn
# --to=DIR             where fetch copies to; without it runs
# --create_flag=FLAG   one more flag for gcloud's create (a network, a disk); repeatable
# --ssh_flag=FLAG      one more flag for gcloud's ssh and scp (--internal-ip); repeatable
# --dry_run            prints the commands, one a line, and runs none
set -euo pipefail
# A state that gcloud could not tell must not pass for one.
shopt -s inherit_errexit
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
clone=$(cd "$(dirname "$0")/.." && pwd)

verbs='create wait install start follow status resume fetch stop delete'
verb=${1:---help}
[[ $verb != --help ]] || { help "$0" && exit 0; }
[[ " $verbs " == *" $verb "* ]] || fail "$verb is not a command; there are: $verbs (flags come after it)"
shift

name='' zone='' project='' type='' version='' spot='' queued='' to=runs dry_run=''
create_flags=() ssh_flags=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --to=*) to=${1#*=} ;;
    --create_flag=*) create_flags+=("${1#*=}") ;;
    --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
    --dry_run) dry_run=yes ;;
    --help) help "$0" && exit 0 ;;
    --) shift && break ;;
    *) fail "$1 is not an option; options are --name=value, then -- and the program (see --help)" ;;
  esac
  shift
done
program=("$@")
[[ -n $name ]] || fail "--name is missing: that of the TPU"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--name=$name must be lower-case letters, digits and hyphens, a letter first"
[[ -n $zone ]] || fail "--zone is missing, such as --zone=us-east5-b"
place=("--zone=$zone")
[[ -z $project ]] || place+=("--project=$project")

if [[ $verb == create || $verb == resume ]]; then
  [[ -n $type ]] || fail "--type is missing, such as --type=v6e-16"
  if [[ -z $version ]]; then
    case $type in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      *) fail "--type=$type has no runtime known here; name it with --version=RUNTIME" ;;
    esac
  fi
fi
if [[ $verb == start || $verb == resume ]]; then
  ((${#program[@]})) || fail "no program; write -- PROGRAM ARGUMENTS after the options (see --help)"
  joins "${program[@]}"
fi

run() {
  if [[ -n $dry_run ]]; then
    quote "$@"
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

tpus() { # tpus GROUP VERB FLAGS...: gcloud's command on our TPU
  run gcloud compute tpus "$1" "$2" "$name" "${place[@]}" "${@:3}"
}

on() { # on WORKER COMMAND: a shell's command, in the home folder there
  tpus tpu-vm ssh "--worker=$1" ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$2"
}

# The workers have their source, environment and log in ~/maeast_jax; what to do with them is there,
# in launch/worker.sh.
worker=maeast_jax/launch/worker.sh
installed='test -e maeast_jax/.venv/installed'

create() {
  local flags=("--accelerator-type=$type")
  [[ -z $spot ]] || flags+=(--spot)
  flags+=(${create_flags[@]+"${create_flags[@]}"})
  if [[ -n $queued ]]; then
    tpus queued-resources create "--node-id=$name" "--runtime-version=$version" "${flags[@]}"
  else
    tpus tpu-vm create "--version=$version" "${flags[@]}"
  fi
}

install() {
  # In .git, where nothing else looks, so that the clone stays as it is.
  local archive
  archive=$(git -C "$clone" rev-parse --absolute-git-dir)/maeast_jax.tar.gz
  git -C "$clone" diff --quiet HEAD || note "what is not committed is not sent"
  run git -C "$clone" archive --format=tar.gz "--output=$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all \
    ${ssh_flags[@]+"${ssh_flags[@]}"}
  on all "mkdir -p maeast_jax && tar -xzf maeast_jax.tar.gz -C maeast_jax && $worker install"
}

start() {
  on all "$worker start -- $(quote "${program[@]}" --distributed)"
}

describe() { # describe GROUP FIELD: its value, or ABSENT
  local value errors code=0
  errors=$(mktemp)
  value=$(gcloud compute tpus "$1" describe "$name" "${place[@]}" "--format=value($2)" 2>"$errors") ||
    code=$?
  if ((code)) && grep -qi 'not_found\|was not found' "$errors"; then
    value=ABSENT code=0
  fi
  ((code == 0)) || cat "$errors" >&2
  rm -f "$errors"
  printf '%s\n' "$value"
  return "$code"
}

# The state of the queued resource until it is active, then of the VM.
state() {
  local request vm
  if [[ -n $queued ]]; then
    request=$(describe queued-resources state.state)
    if [[ $request != ACTIVE ]]; then
      printf '%s\n' "$request"
      return
    fi
  fi
  vm=$(describe tpu-vm state)
  # An active request whose VM is not there yet is on its way.
  [[ -z $queued || $vm != ABSENT ]] || vm=ACTIVE
  printf '%s\n' "$vm"
}

show_state() { # what `state` runs
  [[ -z $queued ]] || tpus queued-resources describe '--format=value(state.state)'
  tpus tpu-vm describe '--format=value(state)'
}

is_gone() {
  [[ " ABSENT PREEMPTED TERMINATED SUSPENDING SUSPENDED FAILED DELETING " == *" $1 "* ]]
}

await() {
  local now before=''
  if [[ -n $dry_run ]]; then
    show_state
    return
  fi
  while :; do
    now=$(state)
    [[ $now != "$before" ]] || { sleep 20 && continue; }
    note "$name is $now"
    [[ $now != READY ]] || return 0
    ! is_gone "$now" || refused "$name is $now and will not be ready; resume asks for it again"
    [[ $now != STOPPED ]] || refused "$name is STOPPED; gcloud compute tpus tpu-vm start $name"
    before=$now
  done
}

remove() { # remove FLAGS...
  if [[ -n $queued ]]; then
    tpus queued-resources delete --force "$@"
  else
    tpus tpu-vm delete "$@"
  fi
}

over() { # what workers say on which this program has come to its own end
  on all "$worker over -- $(quote "${program[@]}" --distributed)"
}

resume() {
  local now ended
  if [[ -n $dry_run ]]; then
    show_state
    echo '# where it was preempted (where it is absent, without the first line):'
    remove --quiet
    create
    await
    install
    start
    echo '# where it is on its way, the same without the first two; where it is ready:'
    on all "$installed"
    over
    start
    return
  fi
  now=$(state)
  note "$name is $now"
  if [[ $now == READY ]]; then
    on all "$installed" || install
    ended=$(over)
    if [[ $ended == *'ended with code'* ]]; then
      note "the program has $ended; start starts it all the same, delete ends the TPU"
      exit 4
    fi
    # A worker on which the program still runs is left alone.
    start
    return
  fi
  if is_gone "$now"; then
    [[ $now == ABSENT ]] || remove --quiet
    create
  fi
  await
  install
  start
}

fetch() {
  local word workdir=''
  for word in ${program[@]+"${program[@]}"}; do
    [[ $word != --workdir=* ]] || workdir=${word#*=}
  done
  [[ -n $workdir ]] || fail "no folder to fetch; write -- --workdir=DIR after the options"
  workdir=${workdir%/}
  run mkdir -p "$to/$(basename "$workdir")"
  case $workdir in
    gs://*) run gcloud storage rsync --recursive "$workdir" "$to/$(basename "$workdir")" ;;
    *)
      # A relative one lies in the source, where the program was started.
      [[ $workdir == /* ]] || workdir=maeast_jax/$workdir
      run gcloud compute tpus tpu-vm scp --recurse "$name:$workdir" "$to" "${place[@]}" --worker=0 \
        ${ssh_flags[@]+"${ssh_flags[@]}"}
      ;;
  esac
}

case $verb in
  wait) await ;;
  follow) on 0 'tail -n 100 -F maeast_jax/.worker/log' ;;
  status)
    if [[ -n $dry_run ]]; then
      show_state
    else
      now=$(state)
      printf '%s\n' "$now"
      # There are no workers before, and gcloud's error would be all there is to read.
      [[ $now == READY ]] || exit 0
    fi
    on all "$worker status"
    ;;
  stop) on all "$worker stop" ;;
  delete)
    remove
    # The request of a queued resource outlives its TPU, and counts against the quota.
    [[ -n $queued ]] || note "if it was asked for with --queued, delete it with --queued too"
    ;;
  create | install | start | resume | fetch) "$verb" ;;
esac
