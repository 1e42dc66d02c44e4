"""The pair style refuses packages that were altered, before anything in them runs, and answers as the calculator does."""

import json
import subprocess
import sys

import numpy as np
import pytest
from alterations import SET_STATE, alterations, edit_code, edit_json, insert_code, pack, records_of

from moecalc import testing, tolerances
from moecalc.package import package_checkpoint
from moecalc.package.importers import save_checkpoint

ELEMENTS = ["Nb", "Mo", "Ta", "W"]
# one process for all files: an error of LAMMPS is an exception in Python
RUNNER = """
import json, sys
from moecalc.lammps import lammps
engine = lammps(cmdargs=["-log", "none", "-screen", "none"])
engine.commands_string('''
units metal
region b block 0 9 0 9 0 9
create_box 4 b
create_atoms 1 single 1 1 1
create_atoms 2 single 3 1 1
create_atoms 3 single 1 3.5 1
create_atoms 4 single 2 2 3.2
mass * 100.0
pair_style moe device cpu dtype float64
''')
for path in sys.argv[1:]:
    try:
        engine.command(f"pair_coeff * * {path} Nb Mo Ta W")
        engine.command("run 0 post no")
        result = {"energy": engine.get_thermo("pe")}
    except Exception as error:
        result = {"message": str(error)}
    sys.stdout.write(json.dumps({"file": path, **result}) + "\\n")
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genuine")
    config = testing.random_config(ELEMENTS, n_routed=4)
    save_checkpoint(folder / "x.pt", testing.random_potential(config), config)
    package_checkpoint(folder / "x.pt", folder / "x.moe.pt")
    return folder / "x.moe.pt"


def outcomes(paths, folder):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, paths)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {r["file"]: r for r in map(json.loads, done.stdout.splitlines())}
    missing = [str(path) for path in paths if str(path) not in found]
    assert not missing, f"{missing[0]} ended the process with {done.returncode}: {done.stderr[-500:]}"
    return [found[str(path)] for path in paths]


def test_altered_packages_are_refused(genuine, tmp_path):
    """Code that runs at load, changed weights, cutoffs, elements and frames, each with a message of one line."""

    def loop(path):
        records = records_of(path)
        records["model/code/__torch__/moecalc/nn/descriptor.py"] += SET_STATE.encode()
        return pack(records)

    def shifted(frames):
        for frame in frames:
            frame["energy"] += 1e-3
        return frames

    def scaled(path):
        records = records_of(path)
        name = max((n for n in records if "/data/" in n), key=lambda n: len(records[n]))
        records[name] = (np.frombuffer(records[name]) * 1.001).tobytes()
        return pack(records, digest=False)

    target = tmp_path / "touched"
    cases = {
        "edited file (digest ": scaled,
        "a statement of that size": lambda p: insert_code(p, "x0 = " + "(" * 100_000 + "1" + ")" * 100_000),
        "__setstate__": loop,
        "torch.save": lambda p: insert_code(p, f'torch.save(edge_vec, "{target}")'),
        "torch.from_file": lambda p: insert_code(p, f'x0 = torch.from_file("{target}", True, 10)'),
        "expected `cutoff` to be that of the switch": lambda p: edit_json(
            p, "architecture.json", lambda a: {**a, "cutoff": 4.6}
        ),
        "of the stored reference frame deviates": lambda p: edit_json(p, "reference.json", shifted),
        "expected the same elements in model and metadata": lambda p: edit_json(
            p, "metadata.json", lambda m: {**m, "elements": ELEMENTS[::-1]}
        ),
        "metadata without control characters": lambda p: edit_json(
            p, "metadata.json", lambda m: {**m, "name": "a\x1b[2J"}
        ),
    }
    paths = []
    for k, alter in enumerate(cases.values()):
        paths.append(tmp_path / f"a{k}.moe.pt")
        paths[-1].write_bytes(alter(genuine))
    results = outcomes([genuine, *paths], tmp_path)
    assert "energy" in results[0], results[0]
    for text, result in zip(cases, results[1:], strict=True):
        assert text in result["message"]
        assert "\x1b" not in result["message"]
    assert not target.exists()


def test_code_of_a_package_is_not_run(genuine, tmp_path):
    """What passes the check of the code changes nothing: the kernels read numbers and the architecture."""
    path = tmp_path / "edited.moe.pt"
    path.write_bytes(
        edit_code(genuine, lambda t: t.replace("e_stop : Final[float] = 4.5", "e_stop : Final[float] = 4.6"))
    )
    unaltered, edited = outcomes([genuine, path], tmp_path)
    assert edited["energy"] == unaltered["energy"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_altered_packages_are_refused_or_answer_the_same(genuine, tmp_path, request):
    n, seed = request.config.getoption("--altered"), request.config.getoption("--altered-seed")
    names = {}
    for k, alteration in enumerate(alterations(genuine, seed, tmp_path)[: n // 2]):
        path = tmp_path / f"b{k}.moe.pt"
        path.write_bytes(alteration.make(genuine))
        names[path] = alteration.name
    unaltered, *results = outcomes([genuine, *names], tmp_path)
    for name, result in zip(names.values(), results, strict=True):
        if "energy" in result:
            assert abs(result["energy"] - unaltered["energy"]) / 4 <= tolerances.REFERENCE["float64"], name
        else:
            assert "Pair style moe: " in result["message"], f"seed {seed}: {name}: {result['message']}"
