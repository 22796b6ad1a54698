"""Types and bounds of settings: what is written beside a field is what is checked, whichever way its value came.

A field is annotated with its type and bounds, and with MAY_CHANGE if --resume accepts another value; pydantic checks
them. `refuse` ends a script with one line that names the key, the value and what would do, and exit status 2.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn, Union

import tyro
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch.utils._pytree import tree_leaves

MAY_CHANGE = "may change on --resume"
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
Resolution = Union[int, tuple[int, int]]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]

set_by = {}  # {dotted key: the file that set it}, so that a refusal can name it


def refuse(key, value, remedy) -> NoReturn:
    """End the program with one readable message and exit status 2."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(10)  # the first process of this machine says the same, and torchrun ends this one then
    file = f" (from {set_by[key]})" if key in set_by else ""
    print(f"error: {key} = {value!r}{file}: {remedy}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def refusing(key, value):
    """Within it a ValueError refuses the value of a key."""
    try:
        yield
    except ValueError as error:
        refuse(key, value, error)


def read_text(key, path):
    """What is in a UTF-8 file, without the mark that some editors begin it with."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            refuse(key, str(path), "is a folder; name a file in it" if Path(path).is_dir() else "is no file")
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        refuse(key, str(path), error.strerror.lower())
    except ValueError as error:
        refuse(key, str(path), f"not a UTF-8 text file: {error}")


for kind in (yaml.SafeLoader, yaml.SafeDumper):  # 1e-4 is a number in YAML 1.2, and a string in 1.1, which PyYAML reads
    exponential = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", exponential, list("-+.0123456789"))


class _Loader(yaml.SafeLoader):
    """YAML without what can mislead: a key given twice, and aliases, by which a few lines can stand for billions."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"found an alias, *{event.anchor}; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for name, _ in node.value:
            if str(name.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name.value!r} is given twice", node.start_mark)
            seen.add(str(name.value))
        return super().construct_mapping(node, deep)


def to_yaml(settings):
    """Nested settings as a YAML text that `from_yaml` reads: tuples as lists, and without aliases."""
    return yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False)


def from_yaml(text):
    """What a YAML text says. Raises ValueError where it is none."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, UnicodeError, LookupError, AttributeError) as error:  # as of !!bool x
        raise ValueError(str(error).replace(' in "<unicode string>",', " at")) from error


BOUNDS = {"ge": "must be at least {}", "gt": "must be above {}", "le": "must be at most {}", "lt": "must be below {}"}


def validated(cls, settings):
    """An instance of a dataclass from nested settings; refuses the first that is unknown, of a wrong type or size."""
    try:
        args = TypeAdapter(cls).validate_python(settings)
        for key, value in flatten(args).items():
            given = functools.reduce(dict.get, key.split("."), settings)
            given_switches, switches = ([type(leaf) is bool for leaf in tree_leaves(v)] for v in (given, value))
            if given_switches != switches:
                refuse(key, given, "true and false are for on-off settings, which take nothing else")
        return args
    except ValidationError as error:
        found = error.errors()[0]
    path, kinds = [], fields_of(cls)
    for name in found["loc"]:  # what follows a field's name is the part of its type that did not fit
        if ".".join(path) not in kinds:
            path.append(str(name))
    key = ".".join(path)
    value = functools.reduce(dict.get, path, settings) if key in kinds else found["input"]
    if "unexpected" in found["type"]:
        *section, name = path
        here = [f for f in kinds if f.split(".")[:-1] == section]
        near = [f for f in kinds if f.endswith(f".{name}")] or difflib.get_close_matches(key, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(here)}"
        hint = "write a section as a mapping of its own, not with a dot" if "." in name else hint
        refuse(key, value, f"unknown key; {hint}")
    bounds = [words.format(found["ctx"][name]) for name, words in BOUNDS.items() if name in found.get("ctx", ())]
    if found["input"] is None:
        bounds = ["cannot be null; leave it out, or give it a value"]
    words = found["msg"].replace("Input should", "should").replace("a dictionary or an instance of", "a mapping, as of")
    refuse(key, value, (*bounds, words)[0])


def fields_of(cls, prefix=""):
    """{dotted key: annotated type} of a dataclass and of the dataclasses in it."""
    kinds = {}
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        kinds |= fields_of(f.type, f"{name}.") if dataclasses.is_dataclass(f.type) else {name: f.type}
    return kinds


def flatten(args, prefix=""):
    """{dotted key: value} of a dataclass and of the dataclasses in it."""
    flat = {}
    for f in dataclasses.fields(args):
        value = getattr(args, f.name)
        flat |= flatten(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return flat


def pairs(value_type):
    """The type of `--flag name=value name=value`: a dict whose values are numbers (float) or any YAML (object)."""
    read, kind = (float, "a number") if value_type is float else (from_yaml, "YAML")

    def parse(tokens):
        found = {}
        for token in tokens:
            name, equals, value = token.rpartition("=") if value_type is float else token.partition("=")
            if not equals:
                raise ValueError(f"{token!r} is not of the form NAME=VALUE")
            if name in found:
                raise ValueError(f"{name!r} is given twice")
            try:
                found[name] = read(value)
            except ValueError as error:
                raise ValueError(f"the value of {token!r} is not {kind}: {error}") from error
        return found

    primitive = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda values: [f"{name}={json.dumps(value)}" for name, value in values.items()],
    )
    return Annotated[dict[str, value_type], primitive]
