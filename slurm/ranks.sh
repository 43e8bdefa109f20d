mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ephemeral ports
export PIPELINE_HOSTS="${hosts[*]}" PIPELINE_REPORT=$run/logs/nodes-$job.json # of the check
# The code with which ranks end: srun would give the largest of all ranks' codes, torchrun always 1.
export PIPELINE_CODE=$run/logs/.code-$job

code=0
start() { # a command on all ranks
  rm -f "$PIPELINE_CODE"
  "$@" || code=$?
  # A rank that crashed (SIGILL, ABRT, BUS, FPE, SEGV) left none; the others, which lost it, left 75.
  [[ ! -s $PIPELINE_CODE || $code == 13[24569] ]] || code=$(<"$PIPELINE_CODE")
  rm -f "$PIPELINE_CODE"
}
