follow() (
  # This job's variables would be taken for options of the next.
  for name in "${!SLURM_@}"; do [[ $name == SLURM_CONF ]] || unset "$name"; done
  sbatch --parsable --dependency="afterany:$job" --export="ALL,PIPELINE_ORIGIN=$origin" "$@" "$script"
)
next=$(follow ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"}) || {
  say "sbatch took no job that follows; go on with the command that launched it" >&2
  exit "$code"
}
next=${next%%;*}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
echo "$next" >>"$run/jobs"
say "goes on as job $next: $run/logs/job-$next.log"
