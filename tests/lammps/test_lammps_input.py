"""What input scripts may say, and what they are told when it is wrong."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from alterations import edit_json
from broken_package import broken_package
from lammps_runs import EV_PER_KCAL, LMP, MPIRUN, alloy, lmp, succeed, write_data

from moecalc import _lib

METALS = ["Nb", "Mo", "Ta", "W"]

SETUP = """
units metal
{before}
region box block 0 12 0 12 0 12
create_box 2 box
create_atoms 1 single 3 3 3
create_atoms 2 single 5.2 3 3
mass * 50
"""


def error_of(lines: str, folder: Path, before: str = "", **options) -> str:
    """Message of a script that must stop with an error."""
    run = lmp(SETUP.format(before=before) + lines, folder, **options)
    assert run.code not in {0, -9, -11}, run.output[-2000:]
    return run.error()


@pytest.fixture(scope="module")
def files(tmp_path_factory, metals, packages):
    """Package files that are not as they should be."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "foreign.moe.pt").write_text("this is no package")
    (folder / "short.moe.pt").write_bytes(metals.read_bytes()[:-1000])
    damaged = bytearray(metals.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "damaged.moe.pt").write_bytes(damaged)
    return folder


STYLE = "pair_style moe dtype float64 device cpu\n"
MISTAKES = {
    "missing": (STYLE + "pair_coeff * * nowhere.moe.pt Nb Mo", "nowhere.moe.pt: no such file"),
    "foreign": (STYLE + "pair_coeff * * {files}/foreign.moe.pt Nb Mo", "not a moecalc package"),
    "short": (STYLE + "pair_coeff * * {files}/short.moe.pt Nb Mo", "incomplete file"),
    "damaged": (STYLE + "pair_coeff * * {files}/damaged.moe.pt Nb Mo", "damaged file"),
    "element": (
        STYLE + "pair_coeff * * default Nb Fe",
        "expected elements of the model metals10 (Li N Si Ni Cu Ge Nb Mo Ta W), got Fe for atom type 2",
    ),
    "untrained": (
        STYLE + "pair_coeff * * {small} O Na",
        "expected elements that the model E1_moe_all was trained on (O H), got Na for atom type 2",
    ),
    "too_few": (STYLE + "pair_coeff * * default Nb", "expected 2 elements in pair_coeff, one per atom type, got 1 (Nb)"),
    "too_many": (STYLE + "pair_coeff * * default Nb Mo W", "got 3 (Nb Mo W)"),
    "none": (STYLE + "pair_coeff * * default", "got 0 (none)"),
    "pairwise": (STYLE + "pair_coeff 1 2 default Nb Mo", "must start with * *"),
    "null": (STYLE + "pair_coeff * * default Nb NULL", "NULL is for pair_style hybrid"),
    "cuda": ("pair_style moe device cuda\npair_coeff * * default Nb Mo", "Pair style moe: device 'cuda'"),
    "keyword": ("pair_style moe accuracy float64", "expected keyword device, dtype, precision, untrained, charge, spin, fparam, out_file, out_freq, relative, relative_v or atomic, got accuracy"),
    "precision": ("pair_style moe precision fp8", "expected precision fp32, fp32-ffma, bf16x3, tf32 or fp16, got fp8"),
    "precision_cpu": (
        "pair_style moe device cpu dtype float32 precision tf32\npair_coeff * * default Nb Mo",
        "precision 'tf32' is for GPUs, got device 'cpu': use precision fp32",
    ),
    "dtype": ("pair_style moe dtype float16", "expected dtype float32 or float64, got float16"),
    "device": ("pair_style moe device gpu", "expected device auto, cpu, cuda or cuda:N, got gpu"),
    "value": ("pair_style moe dtype", "expected a value after keyword dtype"),
    "coefficients": (STYLE + "run 0", "All pair coeffs are not set"),
    "include": (
        STYLE + "pair_coeff * * default Nb Mo\natom_modify first one\nneigh_modify include one\nrun 0",
        "expected all atoms in the neighbor list, got neigh_modify include",
    ),
    "respa": (
        STYLE + "pair_coeff * * default Nb Mo\nrun_style respa 2 2 inner 1 3.0 4.0 outer 2\nrun 0",
        "Pair style does not support rRESPA",
    ),
    "same_place": (
        STYLE + "pair_coeff * * default Nb Mo\ncreate_atoms 1 single 3 3 3\nrun 0",
        "expected distinct positions, got atoms",
    ),
    "lost": (
        STYLE + "pair_coeff * * default Nb Mo\nfix 1 all nve\nvelocity all set 8000 0 0\n"
        "change_box all boundary f f f\nthermo 1\nrun 10",
        "Lost atoms",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, files, packages, metals, tmp_path):
    lines, message = MISTAKES[mistake]
    small = packages("E1_moe_all") if "{small}" in lines else ""
    before = "atom_modify map yes\ngroup one empty\n" if mistake == "include" else ""
    if mistake == "include":
        before, lines = "", "group one type 1\n" + lines
    error = error_of(lines.format(files=files, small=small), tmp_path, before)
    assert message in error
    assert "/lammps_plugin/" not in error  # no folder of the machine that compiled it


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("newton off", "expected newton on, got newton pair off"),
        ("atom_modify id no", "expected atom IDs, got atom_modify id no"),
        ("units lj", "expected units metal or real, got lj"),
    ],
)
def test_settings_that_do_not_fit(before, message, tmp_path):
    assert message in error_of(STYLE + "pair_coeff * * default Nb Mo\nrun 0", tmp_path, before)


def test_newer_format(tmp_path, metals):
    """A package of a later moecalc is refused before anything else of it is read."""
    import zlib

    path = tmp_path / "new.moe.pt"
    with zipfile.ZipFile(metals) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = b"99" if item.filename.endswith("format_version") else old.read(item)
            new.writestr(item.filename, data)
    content = path.read_bytes()
    end = content.rfind(b"PK\5\6")
    comment = f"moecalc crc32={zlib.crc32(content[:end]):08x} size={end}".encode()
    path.write_bytes(content[: end + 20] + len(comment).to_bytes(2, "little") + comment)
    assert "package format 99 is newer" in error_of(STYLE + "pair_coeff * * new.moe.pt Nb Mo", tmp_path)


def test_bonded_neighbours_must_be_listed(tmp_path):
    script = """
    units metal
    atom_style full
    region box block 0 12 0 12 0 12
    create_box 2 box bond/types 1 extra/bond/per/atom 2 extra/special/per/atom 4
    create_atoms 1 single 3 3 3
    create_atoms 2 single 5.2 3 3
    mass * 50
    bond_style zero
    bond_coeff *
    create_bonds single/bond 1 1 2
    pair_style moe dtype float64 device cpu
    pair_coeff * * default Nb Mo
    special_bonds {bonds}
    run 0
    print "result $(pe:%.17g)"
    """
    run = lmp(script.format(bonds="lj/coul 0 0 0"), tmp_path)
    assert run.code != 0
    assert "special_bonds lj/coul 1.0 1.0 1.0" in run.error()
    bonded = [
        succeed(script.format(bonds=bonds), tmp_path).values("result")[0][0]
        for bonds in ("lj/coul 1 1 1", "lj 0 0 0 coul 1e-9 1e-9 1e-9")
    ]
    free = succeed(
        SETUP.format(before="") + STYLE + 'pair_coeff * * default Nb Mo\nrun 0\nprint "result $(pe:%.17g)"',
        tmp_path,
    )
    assert bonded == pytest.approx([free.values("result")[0][0]] * 2, abs=1e-10)


# --- errors that only some ranks meet -----------------------------------------------------------------


def test_package_missing_on_one_rank(tmp_path, metals):
    """All ranks stop, and the message says which rank has no file."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    (tmp_path / "with" / "model.moe.pt").write_bytes(metals.read_bytes())
    (tmp_path / "with" / "in.test").write_text(
        SETUP.format(before="") + STYLE + "pair_coeff * * model.moe.pt Nb Mo"
    )
    line = [str(LMP), "-in", "in.test", "-log", "none"]
    command = [str(MPIRUN), "-np", "1", "-wdir", str(tmp_path / "with"), *line]
    command += [":", "-np", "1", "-wdir", str(tmp_path / "without"), *line]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode != 0
    assert "model.moe.pt: no such file" in done.stdout
    assert "(on rank 1)" in done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_energies_that_are_not_finite(ranks, tmp_path):
    """A model whose energies overflow for one element: rank 1, which owns it, names the atom, and no rank waits for it."""
    broken = broken_package(tmp_path)
    script = f"""
    units metal
    processors {ranks} 1 1
    region box block 0 40 0 12 0 12
    create_box 2 box
    create_atoms 1 single 3 3 3
    create_atoms 1 single 5.2 3 3
    create_atoms 2 single 33.5 4 5
    create_atoms 2 single 35.1 4 5
    mass * 50
    pair_style moe device cpu
    pair_coeff * * {broken} O H
    run 0
    """
    run = lmp(script, tmp_path, ranks=ranks)
    assert run.code not in {0, -9, -11}
    error = run.error()
    assert "not finite" in error
    assert f"on rank {ranks - 1}: the closest atoms are 3 at 33.5 4 5 and 4, 1.6 A apart" in error


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_out_of_memory_stops_all_ranks(ranks, tmp_path):
    script = f"""
    units metal
    lattice bcc 3.24
    region box block 0 {20 * ranks} 0 20 0 20
    create_box 1 box
    create_atoms 1 box
    mass * 50
    pair_style moe dtype float64 device cpu
    pair_coeff * * default W
    run 0
    """
    (tmp_path / "in.test").write_text(script)
    command = [str(LMP), "-in", "in.test", "-log", "none"]
    if ranks > 1:
        command = [str(MPIRUN), "-np", str(ranks), *command]
    limit = 2 * 2**30
    for _ in range(3):  # MPICH's launcher may lose the last output of a run that aborts
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip
        assert done.returncode not in {0, -9, -11}
        text = " ".join(done.stdout.split())
        if "ERROR" in text:
            break
    assert "16000 atoms on rank" in text
    assert f"({16000 * ranks} in all on {ranks} ranks): out of memory" in text
    assert "use fewer atoms per process, dtype float32" in text


# --- hybrid -------------------------------------------------------------------------------------------


def test_hybrid(tmp_path, shared_calculator):
    """Overlays add up; atoms of NULL types are invisible to the model."""
    atoms = alloy(METALS, (2, 2, 2))
    write_data(tmp_path / "data.alloy", atoms, METALS)
    parts = {
        "moe": "pair_style moe dtype float64 device cpu\npair_coeff * * default Nb Mo Ta W",
        "zbl": "pair_style zbl 2.5 3.0\npair_coeff 1 1 41 41\npair_coeff 2 2 42 42\npair_coeff 3 3 73 73\npair_coeff 4 4 74 74",
        "overlay": (
            "pair_style hybrid/overlay moe dtype float64 device cpu zbl 2.5 3.0\npair_coeff * * moe default Nb Mo Ta W\n"
            "pair_coeff 1 1 zbl 41 41\npair_coeff 2 2 zbl 42 42\npair_coeff 3 3 zbl 73 73\npair_coeff 4 4 zbl 74 74\n"
            "pair_coeff 1 2 zbl 41 42\npair_coeff 1 3 zbl 41 73\npair_coeff 1 4 zbl 41 74\npair_coeff 2 3 zbl 42 73\n"
            "pair_coeff 2 4 zbl 42 74\npair_coeff 3 4 zbl 73 74"
        ),
        "lj": (
            "pair_style lj/cut 4.0\npair_coeff * * 0 2.0\npair_coeff 1*3 4 0.1 2.4\npair_coeff 4 4 0.2 2.5"
        ),
        "hybrid": (
            "pair_style hybrid moe dtype float64 device cpu lj/cut 4.0\npair_coeff * * moe default Nb Mo Ta NULL\n"
            "pair_coeff 1*3 4 lj/cut 0.1 2.4\npair_coeff 4 4 lj/cut 0.2 2.5"
        ),
        "twice": (
            "pair_style hybrid/scaled 0.25 moe dtype float64 device cpu 0.75 moe dtype float64 device cpu\n"
            "pair_coeff * * moe 1 default Nb Mo Ta W\npair_coeff * * moe 2 default Nb Mo Ta W"
        ),
    }
    script = ""
    for name, style in parts.items():
        script += f"""
        clear
        units metal
        read_data data.alloy
        {style}
        compute s all stress/atom NULL virial
        compute sum all reduce sum c_s[*]
        thermo_style custom step pe pxx c_sum[1] vol
        thermo_modify norm no
        run 0
        write_dump all custom dump.{name} id type x y z fx fy fz modify format float %.17g
        print "result $(pe:%.17g) $(pxx:%.17g) $(pyz:%.17g) $(c_sum[1]:%.17g) $(vol:%.17g)"
        """
    for ranks in (1, 2):
        run = succeed(script, tmp_path, ranks=ranks)
        result = dict(zip(parts, run.values("result"), strict=True))
        forces = {name: run.dump(f"dump.{name}")[0].array("fx", "fy", "fz") for name in parts}
        for name in parts:
            assert result[name][3] == pytest.approx(-result[name][1] * result[name][4], rel=1e-9), name
        assert result["overlay"][:3] == pytest.approx(result["moe"][:3] + result["zbl"][:3], rel=1e-10)
        assert np.abs(forces["overlay"] - forces["moe"] - forces["zbl"]).max() < 1e-9
        assert result["twice"][:3] == pytest.approx(result["moe"][:3], rel=1e-10)
        assert np.abs(forces["twice"] - forces["moe"]).max() < 1e-9
        seen = np.array([symbol != "W" for symbol in atoms.symbols])
        rest = shared_calculator.calculate_batch([atoms[seen]])[0]
        assert result["hybrid"][0] == pytest.approx(rest["energy"] + result["lj"][0], rel=1e-10)
        expected = forces["lj"].copy()
        expected[seen] += rest["forces"]
        assert np.abs(forces["hybrid"] - expected).max() < 1e-9


def test_hybrid_restart(tmp_path):
    """Options of the style survive in a restart file; LAMMPS wants the coefficients of hybrid styles again."""
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    coefficients = "pair_coeff * * moe default Nb Mo Ta W\npair_coeff * * zero\n"
    script = f"""
    units metal
    read_data data.alloy
    pair_style hybrid/overlay moe dtype float64 device cpu zero 6.0
    {coefficients}
    run 0
    print "result $(pe:%.17g)"
    write_restart file.restart
    clear
    read_restart file.restart
    {coefficients}
    run 0
    print "result $(pe:%.17g)"
    """
    run = succeed(script, tmp_path, ranks=2)
    first, second = run.values("result")
    assert first[0] == pytest.approx(second[0], rel=1e-12)
    assert run.output.count("float64 on cpu") == 2


# --- units, log, threads ------------------------------------------------------------------------------


def test_units_real(tmp_path):
    """kcal/mol and atmospheres instead of eV and bars."""
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    script = ""
    for units in ("metal", "real"):
        script += f"""
        clear
        units {units}
        read_data data.alloy
        {STYLE}
        pair_coeff * * default Nb Mo Ta W
        compute e all pe/atom
        compute c all centroid/stress/atom NULL virial
        compute sum all reduce sum c_e c_c[4]
        thermo_style custom step pe press c_sum[*]
        run 0
        write_dump all custom dump.{units} id type x y z fx fy fz modify format float %.17g
        print "result $(pe:%.17g) $(press:%.17g) $(c_sum[1]:%.17g) $(c_sum[2]:%.17g)"
        """
    run = succeed(script, tmp_path)
    metal, real = run.values("result")
    bar = 1 / 1.01325
    assert real == pytest.approx(metal * [1 / EV_PER_KCAL, bar, 1 / EV_PER_KCAL, bar], rel=1e-5)
    assert real[0] == pytest.approx(metal[0] / EV_PER_KCAL, rel=1e-12)
    forces = [run.dump(f"dump.{u}")[0].array("fx", "fy", "fz") for u in ("metal", "real")]
    assert np.abs(forces[0] / EV_PER_KCAL - forces[1]).max() < 1e-9


def test_log(tmp_path, metals):
    """Rank 0, and only it, says what is used."""
    (tmp_path / "model.moe.pt").write_bytes(metals.read_bytes())
    script = SETUP.format(before="") + "pair_style moe\npair_coeff * * model.moe.pt Nb Mo\nrun 0"
    for env, threads in (({"OMP_NUM_THREADS": "3"}, 3), ({"LAMMPS_POTENTIALS": str(tmp_path)}, 1)):
        output = succeed(script, tmp_path, ranks=2, env=env).output
        assert output.count("model metals10 from model.moe.pt") == 1
        assert re.search(r"elements Li N Si Ni Cu Ge Nb Mo Ta W; cutoff [\d.]+ A; float32 on ", output)
        assert f"{threads} threads per rank" in output
        assert output.count("please cite") == 1
        assert "arXiv:2603.07977" in output


def test_threads_without_the_variable(tmp_path):
    """Without OMP_NUM_THREADS, the ranks of a node share its processors."""
    import os

    cores = len(os.sched_getaffinity(0))
    script = SETUP.format(before="") + STYLE + "pair_coeff * * default Nb Mo\n"
    for ranks in (1, 2):
        output = succeed(script, tmp_path, ranks=ranks, env={"OMP_NUM_THREADS": ""}).output
        assert f"{max(1, cores // ranks)} threads per rank" in output
    assert sys.platform == "linux"


def test_models_without_fused_kernels_say_so(packages, tmp_path):
    script = SETUP.format(before="") + STYLE + f"pair_coeff * * {packages('seq')} O H\n"
    output = succeed(script, tmp_path, ranks=2).output
    assert output.count("evaluated by the plain backend, several times slower than the fused kernels (") == 1
    assert "sequential_update" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_dense_structures_are_told_of_as_in_ase(metals, tmp_path, ranks):
    def change(metadata):
        return {**metadata, "neighbor_limits": {"edge": 1, "angle": 1}}

    path = tmp_path / "limited.moe.pt"
    path.write_bytes(edit_json(metals, "metadata.json", change))
    third = "create_atoms 1 single 3 5.2 3\n"
    script = SETUP.format(before="") + third + STYLE + "pair_coeff * * limited.moe.pt Nb Mo\nrun 0\nrun 0\n"
    output = " ".join(succeed(script, tmp_path, ranks=ranks).output.split())
    sentences = _lib.load().Evaluator(str(path)).structure_warnings(2, 2)
    assert len(sentences) == 2
    for sentence in sentences:
        assert output.count(f"Pair style moe: {sentence}") == 2  # once per run
