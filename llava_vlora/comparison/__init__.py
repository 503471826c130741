"""Several models on the same benchmarks, side by side: everything is read from the files of a run folder."""
