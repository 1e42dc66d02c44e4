"""Fitness report of a package: errors by group and element, elastic constants, pictures.

from moecalc.report import evaluate, write_report

evaluation = evaluate("my.moe.pt", "test.extxyz")
write_report(evaluation, "report.html")
"""

from moecalc.page.routing import plot_routing, routing_table, save_routing
from moecalc.report.evaluation import Evaluation, evaluate
from moecalc.report.numbers import Report, summarise
from moecalc.report.render import check_output, write_report

__all__ = [
    "Evaluation",
    "Report",
    "check_output",
    "evaluate",
    "plot_routing",
    "routing_table",
    "save_routing",
    "summarise",
    "write_report",
]
