"""Comparisons of several p over several seeds: the grid, its runs, the statistics, the report."""

from hf_temporal.installed import require

require("memory")
require("plots")
