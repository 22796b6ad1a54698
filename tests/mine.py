"""Rewards of the tests, each as a user would write it."""

import os
import random
import time
from pathlib import Path

import numpy
import torch

calls = []


def smooth(images, prompts):
    return images.mean(dim=(1, 2, 3))


def other(images, prompts):
    return (images[:, 0] - images[:, 1] ** 2).mean(dim=(1, 2))


def noisy(images, prompts):
    """Draws from every generator that there is."""
    return smooth(images, prompts) + 0.01 * (torch.rand(len(images)) + float(numpy.random.rand()) + random.random())


def gated(images, prompts):
    """Waits for a file named go after saying that it is here, but not for ever."""
    Path("here").touch()
    for _ in range(3000):
        if not Path("go").exists():
            time.sleep(0.01)
    return smooth(images, prompts)


def fails_in_the_second(images, prompts):
    """Of several processes the second one fails, in the first epoch; alone it never does."""
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) > 6:
        raise KeyError("mine")
    return smooth(images, prompts)
