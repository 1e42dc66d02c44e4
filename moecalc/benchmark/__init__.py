"""Time and memory of energy, forces and virial, and how far they are from what the arithmetic allows.

`moecalc bench` and the scripts in `benchmarks` use what is exported here.
"""

from moecalc.benchmark.costs import evaluation_costs, total_cost
from moecalc.benchmark.docs_page import replace_section, with_section
from moecalc.benchmark.figure import check_plot_path, save_plot
from moecalc.benchmark.hardware import Ceilings, Machine, ceilings, machine
from moecalc.benchmark.isolated import (
    ProcessError,
    Worker,
    answer_of,
    isolated_ceilings,
    last_line,
    run_isolated,
)
from moecalc.benchmark.process_memory import memory, reset_peak
from moecalc.benchmark.results import Case, Failure, PartCost, Report, Result, Size, breakdown, part_costs
from moecalc.benchmark.scaling import benchmark
from moecalc.benchmark.structures import alloy, default_structure, repeated, water

__all__ = [
    "Case",
    "Ceilings",
    "Failure",
    "Machine",
    "PartCost",
    "ProcessError",
    "Report",
    "Result",
    "Size",
    "Worker",
    "alloy",
    "answer_of",
    "benchmark",
    "breakdown",
    "ceilings",
    "check_plot_path",
    "default_structure",
    "evaluation_costs",
    "isolated_ceilings",
    "last_line",
    "machine",
    "memory",
    "part_costs",
    "repeated",
    "replace_section",
    "reset_peak",
    "run_isolated",
    "save_plot",
    "total_cost",
    "water",
    "with_section",
]
