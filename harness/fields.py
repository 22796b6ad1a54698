"""Types and bounds of settings: pydantic checks what is written beside a field, whichever way its value came."""

import dataclasses
import difflib
import json
import operator
import os
import re
import reprlib
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn, Union

import tyro
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch.utils._pytree import tree_leaves

MAY_CHANGE = "may change on --resume"  # beside the type of a field
FINITE = ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True)
Name = Annotated[str, Field(pattern=r"^[^\x00]+$")]  # also no text that is not Unicode, which no file could keep
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=10_000)]
Resolution = Union[Count, tuple[Count, Count]]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]

set_by = {}  # {dotted key: the file that set it, or "you"}, so that a refusal can name it


def refuse(key, value, remedy) -> NoReturn:
    """End the program with one line that names the key, the value and what would do, and exit status 2."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(10)  # the first process of this machine says the same, and torchrun ends this one then
    source = set_by.get(key, "you")
    print(f"error: {key} = {value!r}{'' if source == 'you' else f' (from {source})'}: {remedy}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def refusing(key, value, *errors):
    """Within it a ValueError, or one of these errors, refuses the value of a key."""
    try:
        yield
    except (ValueError, *errors) as error:
        refuse(key, value, " ".join(str(error).split()))


def read_text(key, path):
    """What is in a UTF-8 file, without the mark that some editors begin it with."""
    with refusing(key, str(path), OSError):
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("is a folder or a device; name a file")
        return Path(path).read_text(encoding="utf-8-sig")


for kind in (yaml.SafeLoader, yaml.SafeDumper):  # 1e-4 is a number in YAML 1.2, and a string in 1.1, which PyYAML reads
    exponential = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", exponential, list("-+.0123456789"))


class _Loader(yaml.SafeLoader):
    """YAML without a key that is given twice, which would mislead."""

    def construct_mapping(self, node, deep=False):
        names = [str(name.value) for name, _ in node.value]
        if twice := [*(Counter(names) - Counter({*names}))]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def to_yaml(settings):
    """Nested settings as a YAML text that `from_yaml` reads: tuples as lists, and without aliases."""
    return yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False)


def from_yaml(text):
    """What a YAML text says. Raises ValueError where it is none, or has aliases, of which a few can mean billions."""
    try:
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"found an alias, *{event.anchor}; write the value out")
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError) as error:  # as of !!bool x
        where = str(error).replace(' in "<unicode string>",', " at")
        raise ValueError(f"{reprlib.repr(text)} is not YAML: {where}") from error


def mapping(value):
    """What should be a mapping in a YAML text, {} where there is nothing; a ValueError for anything else."""
    if not isinstance(value, dict | None):
        raise ValueError(f"{reprlib.repr(value)} should be a mapping of keys to values")
    return value or {}


def validated(kinds, settings):
    """Settings {dotted key: value} in the types of their fields; refuses what is unknown, of a wrong type or size."""
    right = {}
    for key, value in settings.items():
        if key not in kinds:
            near = [known for known in kinds if known.endswith(f".{key.rpartition('.')[2]}")]
            near += difflib.get_close_matches(key, kinds, n=1)
            refuse(key, value, f"unknown key; {f'did you mean {near[0]}?' if near else '--help has all'}")
        try:
            right[key] = TypeAdapter(kinds[key], config=FINITE).validate_python(value)
        except ValidationError as error:
            found = max(error.errors(), key=lambda found: len(found["loc"]))  # of a union's, what came nearest
            where = f"{found['loc'][0]} " if found["loc"] and isinstance(value, dict) else ""
            refuse(key, value, found["msg"].replace("Input ", where))
        switches, given = ([leaf for leaf in tree_leaves(v) if type(leaf) is bool] for v in (right[key], value))
        if switches != given:
            refuse(key, value, "true and false are for on-off settings, which take nothing else")
    return right


def fields_of(cls, prefix=""):
    """{dotted key: annotated type} of a dataclass and of the dataclasses in it."""
    kinds = {}
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        kinds |= fields_of(f.type, f"{name}.") if dataclasses.is_dataclass(f.type) else {name: f.type}
    return kinds


def flatten(args):
    """{dotted key: value} of a dataclass and of the dataclasses in it."""
    return {key: operator.attrgetter(key)(args) for key in fields_of(type(args))}


def pairs(value_type):
    """The type of `--flag name=value name=value`: a dict whose values are numbers (float) or any YAML (object)."""
    split = str.rpartition if value_type is float else str.partition  # the path of a reward may have a =

    def parse(tokens):
        found = {}
        for token in tokens:
            name, equals, value = split(token, "=")
            if not equals:
                raise ValueError(f"{token!r} is not of the form NAME=VALUE")
            if name in found:
                raise ValueError(f"{name!r} is given twice")
            found[name] = from_yaml(value)
        return found

    primitive = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda values: [f"{name}={json.dumps(value)}" for name, value in values.items()],
    )
    return Annotated[dict[str, value_type], BeforeValidator(lambda value: {} if value is None else value), primitive]
