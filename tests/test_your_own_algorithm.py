"""docs/your_own_algorithm.md: its diffs apply to grpo.py, the script that they make runs, and its rule is tested."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL, read_csv

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "your_own_algorithm.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def patched(source, diff):
    """The source after a unified diff, whose hunks are found by their lines and not by their numbers."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
        old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert source.count(old) == 1, f"grpo.py has this {source.count(old)} times:\n{old}"
        source = source.replace(old, new)
    return source


@pytest.fixture
def script(tmp_path):
    path, source = tmp_path / "mine.py", (ROOT / "grpo.py").read_text(encoding="utf-8")
    path.write_text(functools.reduce(patched, blocks("diff"), source), encoding="utf-8")
    return path


def test_the_script_runs_with_the_settings_of_the_one_it_was_copied_from(script, prompt_files, monkeypatch):
    command = [sys.executable, str(script), *SMALL, *prompt_files, "--run-name", "mine"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "contract holds" in done.stdout, done.stderr
    rows, args = read_csv(script.parent / "runs/mine/metrics.csv"), (script.parent / "runs/mine/args.yaml").read_text()
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and float(rows[2]["train/grad_norm"]) > 0
    assert yaml.safe_load(args)["train"]["clip_range"] == 2e-3  # that of grpo in the model's defaults.yaml


def test_its_loss_and_its_rule(script, monkeypatch):
    spec = importlib.util.spec_from_file_location("mine", script)
    mine = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", mine)
    spec.loader.exec_module(mine)
    exec(blocks("python")[0], names := {})
    names["test_linear_sde_is_euler_maruyama"]()
    log_prob, advantages = torch.zeros(2, requires_grad=True), torch.tensor([0.0, 1.0])
    mine.awr_loss(log_prob, torch.zeros(2), advantages, 0.5, 1e-3, 5.0)[0].backward()
    torch.testing.assert_close(log_prob.grad, -torch.exp(advantages / 0.5) / 2)
    assert mine.has_gradient(torch.zeros(2))
