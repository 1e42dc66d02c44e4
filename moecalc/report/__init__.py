"""Fitness report of a package: errors by group and element, elastic constants, pictures.

from moecalc.report import evaluate, write_report

evaluation = evaluate("my.moe.pt", "test.extxyz")
write_report(evaluation, "report.html")
"""

from moecalc.report.evaluation import Evaluation, evaluate
from moecalc.report.numbers import Report, summarise
from moecalc.report.render import check_output, write_report
from moecalc.report.routing_figure import plot_routing, save_routing

__all__ = [
    "Evaluation",
    "Report",
    "check_output",
    "evaluate",
    "plot_routing",
    "save_routing",
    "summarise",
    "write_report",
]
