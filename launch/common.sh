# Sourced by the launchers: which exit codes bring a run back, and how commands are shown.
# shellcheck shell=bash

# A mistake on the command line, as in the Python programs: one line and exit code 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# What the system or the cloud refused: exit code 1.
refused() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

note() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
}

# 70: an error unknown to the program, such as of a device. 75: another process of the run was lost.
# Above 128: ended by a signal, 143 after saving.
# 130 is Ctrl-C: a person wanted it to stop. 253 is what srun says when memory ran out.
restartable() {
  (($1 == 70 || $1 == 75 || ($1 > 128 && $1 != 130)))
}

# The words as a shell would need them typed; plain words stay as they are.
quote() {
  local word out=() tick="'\\''"
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      out+=("$word")
    else
      out+=("'${word//"'"/"$tick"}'")
    fi
  done
  printf '%s\n' "${out[*]}"
}

whole() { # whole NAME VALUE LEAST: refuses what is not a whole number of at least LEAST
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then
    fail "$1=$2 must be a whole number of at least $3"
  fi
}

# help SCRIPT: the comment at its head.
help() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
}

# joins PROGRAM...: refuses those of our programs that run in one process.
joins() {
  local before='' word
  for word; do
    if [[ $before == -m && $word == maeast_jax.* && $word != maeast_jax.train ]]; then
      fail "$word runs in one process: start it by itself; launchers are for maeast_jax.train"
    fi
    before=$word
  done
}
