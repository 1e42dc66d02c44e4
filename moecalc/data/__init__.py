"""Frames with energies, forces and stresses: reading them from any format, checking and splitting them.

frames = read_frames("train.extxyz.gz")  # or a folder of DeePMD-kit systems
"""

from moecalc.data.frames import check_frames, group_of, read_frames, read_structure, split_frames
from moecalc.data.virials import with_virials
from moecalc.errors import DatasetError

__all__ = [
    "DatasetError",
    "check_frames",
    "group_of",
    "read_frames",
    "read_structure",
    "split_frames",
    "with_virials",
]
