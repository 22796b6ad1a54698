"""What a run makes images of: a text file of prompts, or a JSON Lines file (.jsonl) whose objects have more than that.

Of an object ("row"), what the pipeline's call takes goes to the pipeline, keys that end in `image` as pictures by their
path beside the file; all of it goes to rewards that ask for rows. `weight` is how often it is drawn, 1 by default.
"""

import functools
import json
from pathlib import Path

from PIL import Image

from harness.fields import read_text, refuse


def read_rows(path, key="prompts"):
    """[{"prompt": text, ...}] of the non-empty lines of a file; a line ends at a newline alone."""
    rows, is_json = [], Path(path).suffix == ".jsonl"
    for number, line in enumerate(read_text(key, path).split("\n"), 1):
        try:
            if line := line.strip():
                rows.append(_row(json.loads(line) if is_json else {"prompt": line}, Path(path).parent))
        except (ValueError, RecursionError) as error:
            refuse(key, path, f"line {number}: {error}")
    if not rows:
        refuse(key, path, "holds no prompt; it should have one a line")
    return rows


def _row(row, folder):
    """A row as it is, with the whole paths of its pictures; a ValueError where it is none."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError('should be an object with a text under "prompt"')
    weight = row.get("weight", 1)
    if type(weight) not in (int, float) or not 0 <= weight <= 1e9:
        raise ValueError(f"weight = {weight!r:.40} should be a number from 0 to 1e9")
    for key in filter(is_picture, row):
        try:
            Image.open(folder / row[key]).close()  # its header alone
            row[key] = str((folder / row[key]).resolve())
        except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise ValueError(f"{key} = {row[key]!r} should be the path of a picture: {error}") from error
    return row


def is_picture(key):
    """Whether a key of a row names a picture: image, mask_image, control_image, last_image, ..."""
    return key == "image" or key.endswith("_image")


def check_rows(rows, path, key, takes, asked):
    """Refuse rows with keys that neither the pipeline takes nor a reward asks for, or that not all rows have."""
    for number, row in enumerate(rows, 1):
        unused = row.keys() - {"prompt", "weight", *takes}
        if unused and not asked:
            remedy = "the pipeline does not take it, and no reward has a parameter `rows`; leave it out"
            refuse(key, path, f"row {number} has {min(unused)!r}: {remedy}")
        given = row.keys() & {*takes}
        if given != rows[0].keys() & {*takes}:
            refuse(key, path, f"row {number} gives the pipeline {sorted(given)}, unlike row 1; give all rows the same")
    if not any(row.get("weight", 1) for row in rows):
        refuse(key, path, "gives every row the weight 0, so that none would be drawn")


def with_pictures(row):
    """The row with its pictures in the place of their paths."""
    return {key: picture(value) if is_picture(key) else value for key, value in row.items()}


@functools.lru_cache(maxsize=256)
def picture(path):
    """A picture file as an RGB image; read once."""
    return Image.open(path).convert("RGB")


def call_of(rows, takes):
    """What rows (with their pictures) give to a call of a pipeline that takes these arguments, a list of each."""
    alone = len(rows) == 1  # a picture is then handed over bare: to some pipelines a list is one prompt's references
    given = {key: [row[key] for row in rows] for key in rows[0] if key in takes}
    return {key: values[0] if alone and is_picture(key) else values for key, values in given.items()}
