"""What docs/developer/house.md measures stays near what it is: names, statements, files and functions of the C++ sources."""

import pytest
from measure import CPP_SUFFIXES, ROOT, chained_statements, measure_cpp, tracked

LONGEST_FILE = 700
LONGEST_FUNCTION = 80


@pytest.fixture(scope="module")
def cpp():
    return measure_cpp(tracked(ROOT, CPP_SUFFIXES), ROOT)


@pytest.fixture(scope="module")
def kernels(cpp):
    return measure_cpp([ROOT / path for path in cpp.lines if "kernels" in path.parts], ROOT)


def test_names_of_the_kernels_can_be_read(kernels):
    assert kernels.short_share < 0.08


def test_formulas_stand_above_the_kernels(kernels):
    assert kernels.comment_share > 0.13


def test_statements_are_not_chained_by_commas(cpp):
    assert cpp.chained == []


def test_functions_are_short(cpp):
    assert [place for lines, place in cpp.functions if lines > LONGEST_FUNCTION] == []


def test_files_have_one_job(cpp):
    assert {path: lines for path, lines in cpp.lines.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("int first = 1, second = 2;", [1]),
        ("\na.x = b, a.y = c;", [2]),
        ("f(a = 1, b = 2);", []),
        ("std::map<int, int> sizes = {{1, 2}};", []),
        ("for (int i = 0, n = 3; i < n; ++i) {}", []),
        ("void f() { int first = 1; int second = 2; }", []),
        ("auto f = [=](int a) { a = 1, g = 2; };", [1]),
    ],
)
def test_chained_statements_are_found(text, lines):
    assert chained_statements(text) == lines
