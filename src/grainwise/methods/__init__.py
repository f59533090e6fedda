"""The layer problem and its solvers: one method a file, granularity and precision by composition."""
