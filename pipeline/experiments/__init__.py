"""Claims about batch normalization, measured: one file an experiment, run by `pipeline reproduce`."""
