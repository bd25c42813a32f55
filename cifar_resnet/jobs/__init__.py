"""A file for each job, with a function of its name. `common`, `convolutions`, `interrupt` and `space` are parts of others."""
