"""A LAMMPS run of the default model in many stages, each ending with forces of its current positions."""

METALS = ["Nb", "Mo", "Ta", "W"]

ENERGY = 1e-8  # eV/atom

FORCES = 1e-8  # eV/A

START = """
clear
units metal
{before}
read_data data.alloy
pair_style moe dtype float64 device cpu
pair_coeff * * default Nb Mo Ta W
{inputs}
velocity all create {temperature} 4928459 loop geom
timestep 0.002
thermo_style custom step atoms pe ke press
thermo_modify format float %.17g
"""

FRAME = """
write_dump all custom dump.{stage} id type x y z fx fy fz modify format float %.17g
print "frame {stage} $(pe:%.17g) $(atoms)"
"""

# Each stage ends with forces that belong to the current positions.
STAGES = {
    "npt": "fix 1 all npt temp 1500 1500 0.1 iso 0 0 0.5\nrun 5\nunfix 1",
    "npt_triclinic": "change_box all triclinic\nfix 1 all npt temp 900 900 0.1 tri 0 0 0.5\nrun 4\nunfix 1",
    "nvt": "fix 1 all nvt temp 3000 3000 0.1\nrun 4\nunfix 1",
    "swap": (
        "fix 1 all atom/swap 1 4 7733 3000 ke no types 1 2\nfix 2 all atom/swap 1 4 9931 3000 ke no types 3 4\n"
        "fix 3 all nve\nrun 4\nunfix 1\nunfix 2\nunfix 3\nrun 0"
    ),
    "minimize": "minimize 0 0.02 25 60",
    "box_relax": "fix 1 all box/relax iso 0 vmax 0.005\nminimize 0 0.02 4 8\nunfix 1\nrun 0",
    "change_box": "change_box all x scale 1.03 y scale 0.99 remap\nrun 0",
    "delete": "group gone id 3 7\ndelete_atoms group gone compress no\nrun 0",
    "create": "create_atoms 4 single 1.0 1.2 0.9\nrun 0",
    "displace": "displace_atoms all random 0.1 0.1 0.1 991\nrun 0",
    "no_skin": "neighbor 0.0 bin\nneigh_modify every 1 delay 0 check no\nfix 1 all nve\nrun 2\nunfix 1",
    "rare_neighbors": (
        "neighbor 1.5 nsq\nneigh_modify every 5 delay 10 check yes\nfix 1 all nve\nrun 8\nrun 2 pre no\nunfix 1"
    ),
    "wide_ghosts": "comm_modify cutoff 11.0\nneighbor 1.0 bin\nrun 0",
    "multi": "neighbor 1.0 multi\ncomm_modify mode multi\nrun 0\ncomm_modify mode single\nneighbor 1.0 bin",
    "balance": "fix 1 all balance 1 0.9 shift xyz 5 1.0\nfix 2 all nve\nrun 2\nunfix 1\nunfix 2",
    # its cutoff has to be shorter than the box
    "tiled": "neighbor 0.3 bin\ncomm_style tiled\nbalance 0.9 rcb\nfix 1 all nve\nrun 2\nunfix 1",
    "respa": "run_style respa 2 2 pair 2\nfix 1 all nve\nrun 2\nunfix 1\nrun_style verlet",
}
