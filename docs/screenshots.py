"""Pictures of the built site and of pages of results in headless Chromium, on a desk and a telephone.

python docs/screenshots.py [FOLDER]

Pages of results, of `moecalc md` and `moecalc report`, are made with the default model, and shown in whole,
in light and dark. Ends with an error if a page is wider than its window. Needs `chromium` on the PATH.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
PAGES = {"home": "", "quickstart": "quickstart/", "options": "fit_options/", "api": "api/package/"}
RESULTS = {"md": "results/md/md.html", "report": "results/report.html"}
WIDTHS = (1280, 390)
HEIGHT = 1400
NARROWEST = 500  # window of Chromium
DARK = "--blink-settings=preferredColorScheme=0"
# The page in a frame, because a window cannot be as narrow as a telephone; its true size becomes the title.
FRAME = """<body style="margin:0"><iframe id="page" src="/{page}"
style="border:0;width:{width}px;height:{height}px"></iframe><script>
const page = document.getElementById("page");
page.onload = () => {{
  const root = page.contentDocument.documentElement;
  document.title = root.scrollWidth + " " + root.scrollHeight;
}};
</script></body>"""


class View(NamedTuple):
    """A page, as one looks at it."""

    name: str
    page: str
    width: int
    whole: bool = False
    dark: bool = False

    @property
    def picture(self) -> str:
        """Name of its file."""
        return f"{self.name}-{'dark-' if self.dark else ''}{self.width}.png"


VIEWS = [View(name, page, width) for name, page in PAGES.items() for width in WIDTHS]
VIEWS += [
    View(name, page, width, whole=True, dark=dark)
    for name, page in RESULTS.items()
    for dark in (False, True)
    for width in WIDTHS
]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and writes no log."""

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def chromium(*arguments: str) -> str:
    """Output of a headless Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("no Chromium on the PATH, expected one: apt-get install chromium")
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    )
    command = [program, *options, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def write_results(folder: Path) -> None:
    """Write a page of each kind: a short run of an alloy, and errors of the default model that we made up."""
    import numpy as np
    from ase.build import bulk
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    from moecalc import MoECalculator
    from moecalc.dynamics import MDSettings, run_md
    from moecalc.report import evaluate, write_report

    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    alloy = bulk("W", "bcc", a=3.24, cubic=True) * 3
    alloy.symbols = random.permutation(["Nb", "Mo", "Ta", "W"] * 13 + ["Nb", "W"])
    write(folder / "alloy.extxyz", alloy)
    settings = MDSettings(temperature=900, steps=200, every=2, log_every=2)
    run_md(None, folder / "alloy.extxyz", folder / "md", settings, device="cpu")

    calculator = MoECalculator(device="cpu", dtype="float64")
    frames = []
    for k in range(60):
        atoms = bulk("W", "bcc", a=3.24, cubic=True) * 2
        atoms.symbols = random.choice([["Nb", "Mo", "Ta", "W"], ["Mo", "W"], ["Ta"]][k % 3], 16)
        atoms.rattle(0.02 + 0.05 * random.random(), seed=k)
        atoms.info["dataset"] = ["four elements", "two elements", "tantalum"][k % 3]
        frames.append(atoms)
    for strain in np.linspace(-0.04, 0.04, 9):
        for i, j in ((0, 0), (1, 2)):
            atoms = bulk("W", "bcc", a=3.19, cubic=True)
            deformation = np.eye(3)
            deformation[i, j] = deformation[j, i] = (i == j) + strain / (1 + (i != j))
            atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
            atoms.info["dataset"] = "strained tungsten"
            frames.append(atoms)
    for atoms in frames:
        results = calculator.calculate_batch([atoms], ["energy", "forces", "stress"])[0]
        results["energy"] += 0.005 * len(atoms) * random.standard_normal()
        results["forces"] = results["forces"] * random.normal(1, 0.03, (len(atoms), 3))
        results["stress"] = results["stress"] * random.normal(1, 0.03)
        atoms.calc = SinglePointCalculator(atoms, **results)
    write_report(evaluate(calculator, frames), folder / "report.html")


def take(site: Path, output: Path) -> list[str]:
    """Write the pictures, and tell which pages are wider than their window."""
    handler = functools.partial(Quiet, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/frame.html"
    wide = []
    for view in VIEWS:

        def show(argument: str, height: int, view: View = view) -> str:
            (site / "frame.html").write_text(FRAME.format(page=view.page, width=view.width, height=height))
            window = f"--window-size={max(view.width, NARROWEST)},{height}"
            return chromium(*([DARK] if view.dark else []), window, argument, address)

        size = re.search(r"<title>(\d+) (\d+)", show("--dump-dom", HEIGHT))
        if size is None or int(size[1]) > view.width:
            wide.append(f"{view.picture}: {size and size[1]} pixels in a window of {view.width}")
        height = int(size[2]) if size and view.whole else HEIGHT
        show(f"--screenshot={output / view.picture}", height)
        print(output / view.picture)
    server.shutdown()
    return wide


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(SITE, copy, dirs_exist_ok=True)
        write_results(Path(copy) / "results")
        if problems := take(Path(copy), folder.resolve()):
            sys.exit("too wide: " + "; ".join(problems))
