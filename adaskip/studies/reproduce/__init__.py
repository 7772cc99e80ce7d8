"""`make reproduce`: the paper's tables, plots and observations on the testbed in minutes, from committed profiles."""
