scontrol requeue "$job" || {
  say "scontrol could not requeue it; go on with the command that launched it" >&2
  exit "$code"
}
