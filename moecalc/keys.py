"""Names, shapes, units and numerical limits shared by every Python part of moecalc.

List of neighbors: what an engine hands to `Evaluator.set_list` when it changed. In ASE n_node == n_local,
because images are mapped to owned atoms.

| field        | shape       | dtype | meaning                                                        |
|--------------|-------------|-------|----------------------------------------------------------------|
| types        | (n_node,)   | int64 | index into the package's element list; owned atoms first       |
| edge_index   | (2, n_edge) | int64 | row 0 centre i, row 1 neighbor j, in any order                 |
| edge_shift   | (n_edge, 3) | int64 | cells between them: the edge is r_j - r_i + S @ cell           |
| system_index | (n_local,)  | int64 | structure of a batch that an atom belongs to; 0 for one system |
| edge_from    | (n_edge,)   | int64 | row of the centre in the positions, where that is not i        |
| edge_to      | (n_edge,)   | int64 | row of the neighbor in the positions, where that is not j      |

`Evaluator.evaluate` takes positions (n_position, 3) and cells (n_systems, 3, 3) in Angstrom, every step.

Results of `Evaluator.evaluate` (numpy, float64, order of the engine)

| key                 | shape             | unit  | meaning                                              |
|---------------------|-------------------|-------|------------------------------------------------------|
| energy              | (n_systems,)      | eV    | energy of each structure                             |
| energies            | (n_local,)        | eV    | energy of each atom                                  |
| forces              | (n_node, 3)       | eV/A  | -dE/dr                                               |
| virial              | (n_systems, 3, 3) | eV    | -dE/d(strain)                                        |
| atom_virial         | (n_node, 3, 3)    | eV    | centroid share of each atom; sums to the virial      |
| max_neighbors       | int               |       | most edges within the cutoff that one atom has       |
| max_angle_neighbors | int               |       | most edges within the angle cutoff that one atom has |

ASE results: stress = -virial/volume, Voigt order xx, yy, zz, yz, xz, xy, eV/A^3. With several packages also
energy_std, the standard deviation of the energies of the models (eV), and forces_std (n_atoms,), that of the
force vectors: sqrt(mean over models of |F - mean|^2) (eV/A).
"""

from typing import Final

ENERGY: Final = "energy"
ENERGIES: Final = "energies"
FREE_ENERGY: Final = "free_energy"
FORCES: Final = "forces"
VIRIAL: Final = "virial"
ATOM_VIRIAL: Final = "atom_virial"
STRESS: Final = "stress"
STRESSES: Final = "stresses"
ENERGY_STD: Final = "energy_std"
FORCES_STD: Final = "forces_std"
MAX_NEIGHBORS: Final = "max_neighbors"
MAX_ANGLE_NEIGHBORS: Final = "max_angle_neighbors"


DTYPES: Final = ("float32", "float64")
"""Precisions in which a package can be evaluated."""

MIN_DISTANCE: Final = 0.5
"""Two atoms closer than this (Angstrom) are an error: without training data the answer means nothing.

The same number as `min_distance` in cpp/include/moecalc/evaluator.h.
"""

MAX_COORDINATE: Final = 1e7
"""Largest sensible coordinate (Angstrom): beyond it float64 differences lose the accuracy of the forces."""

VOIGT: Final = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))
"""Row and column of the six Voigt components in ASE's order."""

POSITIONS: Final = (
    "node_self_mlp",
    "node_sym_linear",
    "node_edge_linear",
    "edge_self_linear",
    "edge_angle_linear1",
    "edge_angle_linear2",
    "angle_self_linear",
)
"""The seven linear maps of a RepFlow layer; each can be dense or a mixture of experts."""


def short_name(position: str) -> str:
    """`node_self_mlp` -> `node_self`, `edge_angle_linear1` -> `edge_angle1`."""
    return position.replace("_mlp", "").replace("_linear", "")
