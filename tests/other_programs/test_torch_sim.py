"""moecalc.torch_sim: the model passes torch-sim's own validator, and its batches are ASE's numbers."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from moecalc import MoECalculator, testing
from moecalc.conditions import ConditionError
from moecalc.errors import ElementError, MoecalcError, StructureError

torch = pytest.importorskip("torch")


def test_without_torch_sim_the_remedy_is_told():
    code = (
        "import sys; sys.modules['torch_sim'] = None\n"
        "from moecalc.errors import MoecalcError\n"
        "try:\n    import moecalc.torch_sim\n"
        "except MoecalcError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moecalc.torch_sim needs torch-sim, which does not import (")
    assert done.stdout.endswith("`pip install torch-sim-atomistic`\n")


@pytest.fixture(scope="module")
def ts():
    return pytest.importorskip(
        "torch_sim", reason="torch-sim is not installed: pip install torch-sim-atomistic"
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A model of the elements of torch-sim's validator."""
    path = tmp_path_factory.mktemp("torch_sim") / "model.moe.pt"
    testing.write_random_package(path, testing.random_config(["Si", "Fe"], nlayers=2))
    return path


@pytest.fixture
def model(ts, package):
    from moecalc.torch_sim import MoEModel

    return MoEModel(package, device="cpu", network="float64")


def batch():
    small = bulk("Si", cubic=True)
    small.rattle(0.05, seed=1)
    large = bulk("Fe", cubic=True) * (2, 1, 1)
    large.rattle(0.05, seed=2)
    large.set_cell(large.cell.array @ [[1, 0.1, 0], [0, 1, 0.05], [0, 0, 1]], scale_atoms=True)
    return [small, large]


def expected(package, structures):
    calculator = MoECalculator(package, device="cpu", dtype="float64")
    return calculator.calculate_batch(structures, ["energy", "forces", "stress"])


def assert_agrees(found, reference):
    assert np.abs(found["energy"].numpy() - [r["energy"] for r in reference]).max() < 1e-9
    assert np.abs(found["forces"].numpy() - np.concatenate([r["forces"] for r in reference])).max() < 1e-9
    rows, columns = [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]
    stress = found["stress"].numpy()[:, rows, columns]
    assert np.abs(stress - [r["stress"] for r in reference]).max() < 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_passes_the_validator_of_torch_sim(ts, package, dtype):
    from torch_sim.models.interface import validate_model_outputs

    from moecalc.torch_sim import MoEModel

    model = MoEModel(package, device="cpu", dtype=getattr(torch, dtype))
    validate_model_outputs(model, torch.device("cpu"), getattr(torch, dtype))


def test_a_batch_has_the_numbers_of_ase(ts, model, package):
    state = ts.io.atoms_to_state(batch(), torch.device("cpu"), torch.float64)
    assert_agrees(model(state), expected(package, batch()))


def test_lists_are_kept_and_searched_anew(ts, model, package):
    structures = batch()
    for shift in (0.0, 0.01, 0.02, 1.5):
        for atoms in structures:
            atoms.positions[0, 0] += shift
        state = ts.io.atoms_to_state(structures, torch.device("cpu"), torch.float64)
        assert_agrees(model(state), expected(package, structures))
    assert [one.n_rebuilds for one in model._lists] == [2, 2]


def test_another_batch_follows(ts, model, package):
    for structures in (batch(), batch()[:1], batch()[::-1]):
        state = ts.io.atoms_to_state(structures, torch.device("cpu"), torch.float64)
        assert_agrees(model(state), expected(package, structures))


def test_molecules_have_no_stress(ts, package):
    from moecalc.torch_sim import MoEModel

    atoms = Atoms("Si2", [[0, 0, 0], [2.3, 0, 0]])
    state = ts.io.atoms_to_state([atoms], torch.device("cpu"), torch.float64)
    with pytest.raises(StructureError, match=r"stress is undefined, .*: use compute_stress=False"):
        MoEModel(package, device="cpu")(state)
    found = MoEModel(package, device="cpu", network="float64", compute_stress=False)(state)
    atoms.calc = MoECalculator(package, device="cpu", dtype="float64")
    assert found["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    assert "stress" not in found


def test_charges_that_a_state_carries_are_taken_or_refused(ts, model):
    """Newer versions of torch-sim have them in the state; zero is theirs for none."""
    state = ts.io.atoms_to_state([bulk("Si"), bulk("Si")], torch.device("cpu"), torch.float64)
    carrying = SimpleNamespace(
        **{name: getattr(state, name) for name in ("positions", "row_vector_cell", "atomic_numbers", "pbc")},
        system_idx=state.system_idx,
        charge=torch.tensor([0.0, 1.0]),
        spin=torch.zeros(2),
    )
    assert [atoms.info for atoms in model._structures(carrying)] == [{}, {"charge": 1.0}]
    with pytest.raises(ConditionError, match="charge"):
        model(carrying)


def test_unknown_elements_and_types_are_refused(ts, model, package):
    from moecalc.torch_sim import MoEModel

    state = ts.io.atoms_to_state([bulk("Cu")], torch.device("cpu"), torch.float64)
    with pytest.raises(ElementError, match="the structure contains Cu"):
        model(state)
    with pytest.raises(MoecalcError, match=r"expected dtype torch.float32 or torch.float64, got torch.int8"):
        MoEModel(package, dtype=torch.int8)


@pytest.mark.cuda
def test_batches_on_a_gpu(ts, package):
    from moecalc.torch_sim import MoEModel

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = MoEModel(package, device="cuda", network="float64")
    state = ts.io.atoms_to_state(batch(), torch.device("cuda"), torch.float64)
    found = {name: values.cpu() for name, values in model(state).items()}
    assert_agrees(found, expected(package, batch()))
