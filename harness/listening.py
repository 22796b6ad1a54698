"""Standing between a pipeline and its parts for a while: a listener to their calls, and a memory of texts."""

import functools
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only


@contextmanager
def routed(component, kind, listener):
    """The component as one whose calls or steps go to a listener, for a while."""
    own = type(component)
    component.__class__, component.listener = kind(own), listener
    try:
        yield
    finally:
        component.__class__ = own
        del component.listener


@functools.cache
def listening(cls):
    """A subclass whose calls go through a listener, outside all hooks: a skipped sharded model gathers nothing."""

    def call(self, *args, **kwargs):
        return self.listener(functools.partial(cls.__call__, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


@functools.cache
def with_known_device(cls):
    """A pipeline that stays on its device: diffusers goes through all modules, in every call, to find out which."""
    device = functools.cached_property(DiffusionPipeline._execution_device.fget)
    known = type(cls.__name__, (cls,), {"_execution_device": device, "__module__": cls.__module__})
    device.__set_name__(known, "_execution_device")
    return known


@contextmanager
def remembering(pipe, texts):
    """Let a text encoder work on each row of tokens once; when a row comes again, the answer is in `texts`."""
    with ExitStack() as stack:
        for name, module in pipe.components.items() if texts is not None else ():
            if name.startswith("text_encoder") and isinstance(module, torch.nn.Module):
                known, texts[name] = texts.get(name, {}), {}  # only what a call needs is kept for the next
                stack.enter_context(routed(module, listening, functools.partial(_recall, known, texts[name])))
        yield


def _recall(known, used, encode, *args, **kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    whole = not any(t.is_floating_point() for t in tensors)
    if not tensors or not whole or len({t.shape[:1] for t in tensors} | {()}) != 2:  # not rows of tokens
        return encode(*args, **kwargs)
    how = repr([leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)])
    keys = [(how, repr(row)) for row in zip(*(t.tolist() for t in tensors), strict=True)]
    used |= {key: known[key] for key in keys if key in known}
    new = {key: row for row, key in enumerate(keys) if key not in used}
    if new:
        rows = list(new.values())
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t[rows], (args, kwargs))
        output = encode(*args, **kwargs)
        for i, key in enumerate(new):
            used[key] = tree_map(lambda t: t[i : i + 1] if isinstance(t, torch.Tensor) else None, output)  # noqa: B023
    answers = [used[key] for key in keys]
    return tree_map(lambda *rows: None if rows[0] is None else torch.cat(rows), *answers)
