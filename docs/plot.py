"""Draw accuracy against images from metrics.csv files.

python docs/plot.py OUT.png LABEL=FILE[,FILE...] ...      several files of one label, its seeds: mean and range

Seeds that were evaluated at other epochs than one another are joined by straight lines before the mean is taken.
"""

import csv
import sys

import numpy as np

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("docs/plot.py needs matplotlib: pip install matplotlib")


def curve(path):
    """{images: accuracy} of the evaluations in a metrics.csv."""
    with open(path, newline="") as file:
        return {int(row["images"]): float(row["eval/total"]) for row in csv.DictReader(file) if row["eval/total"]}


def main(out, *series):
    figure, axes = plt.subplots(figsize=(7, 4))
    for one in series:
        label, _, paths = one.partition("=")
        curves = [curve(path) for path in paths.split(",")]
        end = min(max(c) for c in curves)
        images = sorted(i for i in set().union(*curves) if i <= end)
        values = np.array([np.interp(images, list(c), list(c.values())) for c in curves])
        (line,) = axes.plot(images, values.mean(0), marker="o", markersize=3, label=label)
        if len(curves) > 1:
            axes.fill_between(images, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="images sampled in training", ylabel="held-out accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in one for one in sys.argv[2:]):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
