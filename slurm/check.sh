# Is every node fit for the run? What is found stands in this log, and in $PIPELINE_REPORT.
# shellcheck disable=SC2016,SC2054
check=(
  timeout --kill-after=20 @{seconds}
@{check}
)
if ((code == 0)); then
  began=$SECONDS
  start "${check[@]}"
  if ((SECONDS - began >= @{seconds})); then
    code=1
    say "the check of the nodes did not end within @{seconds} s, and was ended" >&2
  elif [[ $code == [23] ]]; then
    say "not all nodes are fit for this run: see above" >&2
  fi
fi

