"""Fitness report of a package: errors against reference data by group and element, elastic constants, pictures.

from moecalc.report import evaluate, write_report

evaluation = evaluate("my.moe.pt", "test.extxyz")
write_report(evaluation, "report.html")
"""

from moecalc.report.evaluation import Evaluation, evaluate, read_frames
from moecalc.report.numbers import Report, summarise
from moecalc.report.render import check_output, write_report

__all__ = [
    "Evaluation",
    "Report",
    "check_output",
    "evaluate",
    "read_frames",
    "summarise",
    "write_report",
]
