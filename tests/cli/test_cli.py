"""The command line, and the routing figure."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.data import chemical_symbols
from command_line import error_of, run

import moecalc
from moecalc._jit import jit_load
from moecalc.errors import PackageError
from moecalc.package.archive import read_metadata, read_record, write_archive
from moecalc.package.metadata import Metadata, PackageReport, PositionRouting, Routing, VerificationReport
from moecalc.page import routing as plots

ROOT = Path(__file__).parents[2]
ORACLE = Path(__file__).parent.parent / "data" / "oracle" / "models"
MIXTURE = ORACLE / "E1_moe_all.pt"
KEPT = "Na,Cl"


@pytest.fixture(scope="session")
def packaged(tmp_path_factory):
    """Package of two elements of a mixture of experts, and what the command printed."""
    path = tmp_path_factory.mktemp("cli") / "mixture.moe.pt"
    result = run("package", MIXTURE, "-o", path, "--elements", KEPT, "--note", "a test", "--license", "MIT")
    assert result.exit_code == 0, result.output
    return path, result


@pytest.fixture(scope="session")
def altered(packaged, tmp_path_factory):
    """Makes a whole package whose records differ from the model in it."""
    path, _ = packaged
    scripted = jit_load(path)
    names = ("format_version", "metadata.json", "reference.json", "verification.json")
    folder = tmp_path_factory.mktemp("altered")

    def make(name, **records):
        out = folder / f"{name}.moe.pt"
        write_archive(out, scripted, {n: read_record(path, n) for n in names} | records)
        return out

    return make


@pytest.fixture(scope="session")
def dense(altered, packaged):
    """A package that says it has no experts."""
    metadata = read_metadata(packaged[0]).model_copy(update={"routing": Routing(layers=[{}, {}])})
    return altered("dense", **{"metadata.json": metadata.model_dump_json()})


class TestGeneral:
    def test_version(self):
        assert run("--version").stdout == f"moecalc {moecalc.__version__}\n"

    def test_help_names_the_commands(self):
        text = run("--help").stdout
        commands = ("package", "inspect", "verify", "upgrade", "bench", "report", "zbl", "lammps", "doctor")
        assert all(command in text for command in commands)

    def test_help_imports_nothing_that_computes(self):
        code = (
            "import sys; from moecalc.cli import app; app(['--help'], standalone_mode=False); "
            "print(sorted({'torch', 'matplotlib', 'numpy', 'ase', 'pydantic'} & sys.modules.keys()))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_debug_shows_the_error_itself(self):
        assert isinstance(run("--debug", "inspect", "absent.moe.pt").exception, PackageError)

    def test_console_script(self):
        done = subprocess.run(
            [sys.executable, "-m", "moecalc.cli", "inspect", "absent.moe.pt"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: absent.moe.pt: no such file\n"


class TestPackage:
    def test_writes_the_package(self, packaged):
        assert read_metadata(packaged[0]).elements == KEPT.split(",")

    def test_reports_kept_and_dropped_elements(self, packaged):
        text = packaged[1].stdout
        assert "2: Na Cl" in text
        assert "dropped      2: O H" in text

    def test_reports_how_much_smaller_it_is(self, packaged):
        rows = {line.split("  ")[0]: line for line in packaged[1].stdout.splitlines()}
        for name in ("file", "parameters", "expert matrices"):
            assert "% smaller" in rows[name], name

    def test_reports_routing(self, packaged):
        # at layer 1, node_self_mlp, chlorine's weights
        position = read_metadata(packaged[0]).routing.layers[0]["node_self_mlp"]
        expected = f"{position.experts[1][0]}:{100 * position.weights[1][0]:.0f}"
        row = next(line for line in packaged[1].stdout.splitlines() if line.startswith("Cl "))
        assert expected in row

    def test_reports_verification(self, packaged):
        text = packaged[1].stdout
        assert "pruned vs full model" in text
        assert "checks passed" in text
        assert "FAIL" not in text

    def test_keeps_free_text(self, packaged):
        metadata = read_metadata(packaged[0])
        assert (metadata.note, metadata.license) == ("a test", "MIT")

    def test_shows_progress_apart_from_the_report(self, packaged):
        _, result = packaged
        assert "packaging: compiling to TorchScript" in result.stderr
        assert "packaging:" not in result.stdout

    def test_refuses_to_overwrite(self, packaged):
        message = error_of(run("package", MIXTURE, "-o", packaged[0]))
        assert message == f"{packaged[0]} exists: choose another name with -o, or overwrite it with --force"

    def test_passes_options_on(self, packaged, tmp_path, monkeypatch):
        seen = {}

        def fake(checkpoint, out, **options):
            seen.update(options, checkpoint=checkpoint, out=out)
            raise PackageError("enough")

        monkeypatch.setattr("moecalc.package.package_checkpoint", fake)
        out = tmp_path / "x.moe.pt"
        out.touch()
        options = (
            "--head",
            "h",
            "--elements",
            "Nb, Mo",
            "--dtype",
            "float32",
            "--name",
            "n",
            "--citation",
            "c",
        )
        assert error_of(run("package", MIXTURE, "-o", out, "--force", *options)) == "enough"
        del seen["progress"]
        assert seen == {
            "checkpoint": MIXTURE, "out": out, "head": "h", "elements": ["Nb", "Mo"], "dtype": "float32",
            "name": "n", "note": "", "license": "", "citation": "c",
        }  # fmt: skip

    def test_multi_task_checkpoint_lists_its_heads(self, tmp_path):
        message = error_of(run("package", ORACLE / "D1_multitask.pt", "-o", tmp_path / "x.moe.pt"))
        assert "water_a, water_b" in message

    def test_unknown_element(self, tmp_path):
        message = error_of(run("package", MIXTURE, "-o", tmp_path / "x.moe.pt", "--elements", "Na,Nb"))
        assert "element 'Nb' is not in this model" in message
        assert not list(tmp_path.iterdir())

    def test_file_name(self, tmp_path):
        message = error_of(run("package", MIXTURE, "-o", tmp_path / "x.pt"))
        assert "expected a file name that ends in .moe.pt" in message

    def test_missing_checkpoint(self, tmp_path):
        message = error_of(run("package", tmp_path / "x.pt", "-o", tmp_path / "x.moe.pt"))
        assert "x.pt: no such file" in message

    def test_unknown_dtype(self, tmp_path):
        result = run("package", MIXTURE, "-o", tmp_path / "x.moe.pt", "--dtype", "float16")
        assert result.exit_code == 2
        assert "float16" in result.stderr


class TestInspect:
    def test_shows_metadata(self, packaged):
        text = run("inspect", packaged[0]).stdout
        metadata = read_metadata(packaged[0])
        for expected in (
            f"edges {metadata.cutoff:g} A, angles {metadata.angle_cutoff:g} A",
            f"active per atom {metadata.parameters.active:,}",
            metadata.source.sha256,
            "checks passed when it was made",
            "layer 1",
        ):
            assert expected in text

    def test_names_untrained_elements(self, packaged, altered):
        metadata = read_metadata(packaged[0]).model_copy(update={"trained_elements": ["Na"]})
        path = altered("untrained", **{"metadata.json": metadata.model_dump_json()})
        assert "1: Cl (using them needs allow_untrained=True)" in run("inspect", path).stdout

    def test_the_default_model_has_a_name(self):
        assert json.loads(run("inspect", "default", "--json").stdout)["name"] == "metals10"

    def test_dense_model(self, dense):
        text = run("inspect", dense).stdout
        assert "none, a dense model" in text
        assert "Routing" not in text

    def test_many_elements_are_cut(self, packaged, altered):
        metadata = read_metadata(packaged[0])
        n = 40
        position = PositionRouting(
            kind="mlp",
            gate="topk_softmax",
            n_routed=2,
            n_shared=0,
            top_k=1,
            experts=[[1]] * n,
            weights=[[1.0]] * n,
        )
        symbols = chemical_symbols[1 : n + 1]
        routing = Routing(layers=[{"node_self_mlp": position, "node_sym_linear": position}])
        metadata = metadata.model_copy(
            update={"elements": symbols, "trained_elements": symbols, "routing": routing}
        )
        text = run("inspect", altered("many", **{"metadata.json": metadata.model_dump_json()})).stdout
        assert "10 more elements: see `moecalc inspect PACKAGE --json`" in text

    def test_json_is_the_metadata(self, packaged):
        result = run("inspect", packaged[0], "--json")
        assert Metadata.model_validate_json(result.stdout) == read_metadata(packaged[0])
        assert result.stderr == ""

    def test_plot(self, packaged, tmp_path):
        picture = tmp_path / "routing.png"
        result = run("inspect", packaged[0], "--json", "--plot", picture)
        assert json.loads(result.stdout)["elements"] == KEPT.split(",")
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_plot_of_a_dense_model(self, dense, tmp_path):
        message = error_of(run("inspect", dense, "--plot", tmp_path / "routing.png"))
        assert "has no routing to plot: it is a dense model" in message

    def test_plot_format(self, packaged, tmp_path):
        message = error_of(run("inspect", packaged[0], "--plot", tmp_path / "routing.doc"))
        assert "expected a picture file that ends in .png, .pdf or .svg" in message

    def test_plot_folder(self, packaged, tmp_path):
        message = error_of(run("inspect", packaged[0], "--plot", tmp_path / "absent" / "routing.png"))
        assert "absent: no such folder" in message

    def test_foreign_file(self):
        assert "not a moecalc package" in error_of(run("inspect", ROOT / "pyproject.toml"))

    def test_does_not_load_torch(self, packaged):
        code = (
            "import sys; from moecalc.cli import app; app(sys.argv[1:], standalone_mode=False); "
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(packaged[0])], capture_output=True, check=False
        )
        assert done.returncode == 0


class TestUpgrade:
    def test_passes_on(self, packaged, tmp_path, monkeypatch):
        seen = []

        def fake(old, new, progress):
            progress("reading the package")
            seen.append((old, new))
            metadata = read_metadata(packaged[0])
            return PackageReport(
                path=str(new),
                metadata=metadata,
                verification=VerificationReport(checks=[]),
                size_bytes=1_000_000,
            )

        monkeypatch.setattr("moecalc.package.upgrade_package", fake)
        result = run("upgrade", packaged[0], "-o", tmp_path / "new.moe.pt")
        assert result.exit_code == 0, result.output
        assert seen == [(packaged[0], tmp_path / "new.moe.pt")]
        assert "1.00 MB, format 2" in result.stdout
        assert f"wrote {tmp_path / 'new.moe.pt'}" in result.stdout
        assert "upgrading: reading the package" in result.stderr

    def test_refuses_to_overwrite(self, packaged, tmp_path):
        (tmp_path / "new.moe.pt").touch()
        message = error_of(run("upgrade", packaged[0], "-o", tmp_path / "new.moe.pt"))
        assert message.endswith("exists: choose another name with -o, or overwrite it with --force")

    def test_refuses_what_is_no_older_package(self, packaged, tmp_path):
        message = error_of(run("upgrade", packaged[0], "-o", tmp_path / "new.moe.pt"))
        assert "expected a package of an older format" in message


class TestVerify:
    def test_passes(self, packaged):
        result = run("verify", packaged[0])
        assert result.exit_code == 0
        assert "evaluator float64 on cpu" in result.stdout
        assert "checks passed" in result.stdout

    def test_exit_code_of_a_failure(self, packaged, altered):
        frames = json.loads(read_record(packaged[0], "reference.json"))
        # one small frame is enough, and quick
        frame = next(f for f in frames if f["label"] == "dimer")
        frame["energy"] += 1e-3
        result = run("verify", altered("deviating", **{"reference.json": json.dumps([frame])}))
        assert result.exit_code == 1
        assert "FAIL" in result.stdout
        assert "checks failed" in result.stdout

    def test_device(self, packaged):
        assert "got 'tpu'" in error_of(run("verify", packaged[0], "--device", "tpu"))


def routed(n_elements, layers):
    """Metadata of a model: per layer a dictionary of groups of positions -> (experts, weights, n_routed)."""
    symbols = chemical_symbols[1 : n_elements + 1]
    routing = Routing(
        layers=[
            {
                p: PositionRouting(
                    kind="mlp",
                    gate="topk_softmax",
                    n_routed=n,
                    n_shared=1,
                    top_k=2,
                    experts=experts,
                    weights=weights,
                )
                for positions, (experts, weights, n) in layer.items()
                for p in positions
            }
            for layer in layers
        ]
    )
    return Metadata.model_construct(
        name="model", elements=symbols, trained_elements=symbols[:-1], routing=routing
    )


def random_routing(n_elements, n_experts, n_layers):
    rng = np.random.default_rng(0)

    def one():
        experts = [[*rng.permutation(n_experts)[:2].tolist(), n_experts] for _ in range(n_elements)]
        weight = rng.uniform(0.5, 1.0)
        return experts, [[weight, 1 - weight, 1.0]] * n_elements, n_experts

    groups = (("node_self_mlp", "node_sym_linear"), ("edge_self_linear",))
    return routed(n_elements, [{g: one() for g in groups} for _ in range(n_layers)])


class TestPlots:
    def test_positions_of_one_gate_are_joined(self):
        units = plots.routing_units(random_routing(3, 4, 2))
        assert [[u.positions for u in layer] for layer in units] == [
            [("node_self_mlp", "node_sym_linear"), ("edge_self_linear",)]
        ] * 2

    def test_dominant_expert_and_its_share(self):
        table = ([[2, 0, 4], [0, 3, 4]], [[0.6, 0.2, 1.0], [0.1, 0.3, 1.0]], 4)
        ((unit,),) = plots.routing_units(routed(2, [{("node_self_mlp",): table}]))
        assert unit.dominant.tolist() == [2, 3]
        assert unit.share == pytest.approx([0.75, 0.75])
        assert unit.n_shared == 1

    def test_configuration_routing_has_no_table(self):
        metadata = Metadata.model_construct(
            name="model", elements=["H"], trained_elements=["H"], routing=random_routing(1, 3, 1).routing
        )
        metadata.routing.level = "configuration"
        with pytest.raises(PackageError, match="experts depend on the composition of the structure"):
            plots.routing_units(metadata)

    def test_shared_experts_only(self):
        with pytest.raises(PackageError, match="all of its experts are shared"):
            plots.routing_units(routed(1, [{("node_self_mlp",): ([[0]], [[1.0]], 0)}]))

    def test_unknown_layer(self):
        with pytest.raises(PackageError, match="layer 3, expected 1 to 2"):
            plots.plot_routing(random_routing(2, 3, 2), layer=3)

    def test_unknown_position(self):
        with pytest.raises(
            PackageError, match="position 'angle_self_linear' in layer 1, expected node_self_mlp"
        ):
            plots.plot_routing(random_routing(2, 3, 2), position="angle_self_linear")

    @pytest.mark.parametrize(("n_elements", "n_experts", "n_layers"), [(1, 2, 1), (10, 4, 3), (100, 32, 2)])
    def test_everything_lies_within_the_figure(self, n_elements, n_experts, n_layers):
        figure = plots.plot_routing(random_routing(n_elements, n_experts, n_layers))
        # table, colour bar, and a map for each of two gates per layer
        assert len(figure.axes) == 2 + 2 * n_layers
        boxes = np.array([ax.get_position().extents for ax in figure.axes])
        assert boxes.min() >= 0
        assert boxes.max() <= 1

    def test_periodic_table(self):
        places = {chemical_symbols[z]: plots._place(z) for z in range(1, 119)}
        assert len(set(places.values())) == 118
        assert {e: places[e] for e in ("H", "He", "Al", "Sc", "W", "Og")} == {
            "H": (0, 0), "He": (17, 0), "Al": (12, 2), "Sc": (2, 3), "W": (5, 5), "Og": (17, 6),
        }  # fmt: skip
