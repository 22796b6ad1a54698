"""What a script says and leaves unsaid on the console."""

import logging
import os
from contextlib import contextmanager

import diffusers
import transformers
from tqdm import tqdm

from harness.parallel import rank, world_size


@contextmanager
def quiet():
    """No chatter of the libraries about bars, optional packages and components on their way in."""
    libraries = (diffusers.logging, transformers.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def warn_once():
    """From now on diffusers says a thing once, and not again in every call of a pipeline."""
    for handler in logging.getLogger("diffusers").handlers:
        first = {}  # {message: the record that brought it}
        handler.addFilter(lambda record, first=first: first.setdefault(record.getMessage(), record) is record)


def progress(items, what):
    """A progress bar, on a terminal only."""
    return tqdm(items, desc=what, leave=False, disable=True if rank() else None)


def plan(args, policy, trained_steps, networks):
    """What will happen, before it does. networks: policy and copies that see a trained step of an image."""
    train = args.train
    images = train.unique_sample_num_per_epoch * train.group_size
    by = f" by {world_size()} processes" if world_size() > 1 else ""
    most = "at most " if getattr(train, "tail_steps", None) else ""
    forwards = images * train.num_inference_steps
    replays = images * trained_steps * train.num_inner_epochs * networks
    model = os.path.relpath(args.model) if os.path.isdir(args.model) else args.model
    twice = " (twice as many where guidance takes a second pass)" if train.guidance_scale > 1 else ""
    return (
        f"training {sum(p.numel() for p in policy.values()):,} parameters ({args.finetune_type}) of {model}\n"
        f"an epoch: {train.unique_sample_num_per_epoch} x {train.group_size} = {images} images, in calls of "
        f"{train.per_device_batch_size}{by}; updates: {train.gradient_step_per_epoch * train.num_inner_epochs}, "
        f"each over trained steps: {trained_steps};\n"
        f"          {most}{forwards:,} network evaluations to sample, {replays:,} to train{twice}"
    )
