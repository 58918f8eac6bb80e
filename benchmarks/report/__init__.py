"""The results page: every result with its command, machine and table, plots, and numbers in docs that no result has."""
