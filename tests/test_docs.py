"""docs/: the tables of what was measured, the runs and pages that name them, and the links."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
KEYS = {
    "gpu.csv": ("run", "seed", "epoch"),
    "cpu.csv": ("run", "seed", "epoch"),
    "steps.csv": ("size", "run", "seed", "epoch", "step"),
    "finals.csv": ("size", "run", "seed", "steps", "guidance"),
    "noise.csv": ("sampler", "steps", "seed"),
}
PAGES = [ROOT / "README.md", ROOT / "shapes" / "README.md", *(ROOT / "docs").glob("**/*.md")]


def read(name):
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", KEYS)
def test_a_table_is_tidy(name):
    rows, texts = read(name), ("size", "run", "sampler")
    assert len({tuple(row[key] for key in KEYS[name]) for row in rows}) == len(rows)
    assert None not in rows[0] and not any(None in row.values() for row in rows)  # all rows as long as the header
    for row in rows:
        assert all(row[key] for key in KEYS[name])
        [float(value) for column, value in row.items() if value and column not in texts]
    assert (RESULTS / name).stat().st_size < 2**20
    assert sorted(path.name for path in RESULTS.glob("*.csv")) == sorted(KEYS)


def test_every_run_of_a_claim_was_made(monkeypatch):
    """In one of the two sizes at least, there by all its seeds but for what fell, evaluated but for what was cut."""
    made, finals = {}, {(row["size"], row["run"], row["seed"]) for row in read("finals.csv")}
    for size in ("gpu", "cpu"):
        monkeypatch.setenv("SCALE", size)
        spec = importlib.util.spec_from_file_location("claims", ROOT / "docs" / "claims.py")
        claims = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(claims)
        kept = {name.rpartition("-s")[::2] for name in claims.kept()}
        for run in {run for runs in claims.CLAIMS.values() for run in runs}:
            seeds = [str(seed) for seed in claims.SEEDS if (run, str(seed)) in kept]
            evaluated = run in claims.CUT or all((size, run, seed) in finals for seed in seeds)
            assert run in claims.FALLEN or len(seeds) in (0, len(claims.SEEDS)) and evaluated, run
            made[run] = made.get(run) or bool(seeds)
    assert all(made.values()), made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    for to, anchor in [link for link in links if "://" not in link[0]]:
        target = page.parent / to if to else page
        assert target.exists(), to
        headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M) if anchor else ()
        assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], anchor
