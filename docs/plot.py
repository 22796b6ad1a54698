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


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(rows, column):
    """{images: value} of a column of a metrics.csv, where it has one."""
    return {int(row["images"]): float(row[column]) for row in rows if row[column]}


def draw(out, series, columns):
    """series: {label: [rows of a metrics.csv]}. columns: {one of it: what to call it}; each has its panel."""
    figure, panels = plt.subplots(1, len(columns), figsize=(7 * len(columns), 4), squeeze=False)
    for axes, (column, name) in zip(panels[0], columns.items(), strict=True):
        for label, seeds in series.items():
            curves = [curve(rows, column) for rows in seeds]
            end = min(max(c) for c in curves)
            images = sorted(i for i in set().union(*curves) if i <= end)
            values = np.array([np.interp(images, list(c), list(c.values())) for c in curves])
            (line,) = axes.plot(images, values.mean(0), marker="o", markersize=3, label=label)
            if len(curves) > 1:
                axes.fill_between(images, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
        axes.set(xlabel="images sampled in training", ylabel=name, ylim=(0, 1 if column == "eval/total" else None))
        axes.grid(alpha=0.3)
    panels[0, -1].legend()
    figure.savefig(out, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main(out, *series):
    pairs = [one.partition("=") for one in series]
    series = {label: [read(path) for path in paths.split(",")] for label, _, paths in pairs}
    draw(out, series, {"eval/total": "held-out accuracy"})


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in one for one in sys.argv[2:]):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
