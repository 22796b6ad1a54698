"""What a run is given to make images of."""

from harness.fields import read_text, refuse


def read_prompts(path, key="prompts"):
    """The non-empty lines of a text file."""
    prompts = [line.strip() for line in read_text(key, path).split("\n") if line.strip()]
    if not prompts:
        refuse(key, path, "holds no prompt; it should have one a line")
    return prompts
