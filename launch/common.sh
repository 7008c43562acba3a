# Functions for the launch scripts, which source this file.
# shellcheck shell=bash

# Prints a mistake on the command line and ends with exit code 2, as the Python programs do.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

note() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
}

# restartable CODE: succeeds if starting the program again can help (docs/running.md lists the codes).
# 70 is an error that the program does not know, 75 the loss of another process. Codes above 128 are
# signals. 130 is Ctrl-C: a person stopped the run.
restartable() {
  (($1 == 70 || $1 == 75 || ($1 > 128 && $1 != 130)))
}

# quote WORD...: prints the words as a shell expects them. Plain words stay as they are.
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

# whole NAME VALUE LEAST: refuses a value that is not a whole number of at least LEAST.
whole() {
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then
    fail "$1=$2 must be a whole number of at least $3"
  fi
}

# help SCRIPT: prints the comment at the head of a script.
help() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
}

# joins PROGRAM...: refuses the programs of this package that run in one process only.
joins() {
  local before='' word
  for word; do
    if [[ $before == -m && $word == maeast_jax.* && $word != maeast_jax.train ]]; then
      fail "$word runs in one process: start it without a launcher; launchers are for maeast_jax.train"
    fi
    before=$word
  done
}
