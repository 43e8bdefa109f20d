"""Things that watch a run; removing one changes no number of the training."""
