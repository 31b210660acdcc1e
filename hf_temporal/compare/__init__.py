"""Comparisons of several p over several seeds: the grid, its runs, the statistics, the report."""
