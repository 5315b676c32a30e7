"""A dataclass as the command line of a program: every field is an option with its default, limits and explanation."""

import argparse
import dataclasses
import functools
import math
import os
import shlex
import sys
from dataclasses import field

LARGEST = 1e30  # of any option: float32, in which tensors are computed, ends at 3.4e38


class UserError(Exception):
    """Something the user can mend; its one sentence is all that `run` prints."""


def flag(default, help, choices=None, above=None, least=None, most=None, needs=None, unless=None, find=None,
         free=False):
    """A dataclass field that becomes the command-line option of its name.

    A number must be above `above`, at least `least`, at most `most`. The option has no meaning without the option
    `needs` or beside the option `unless`. `find(value, option)` raises UserError for a name of nothing. A `free` option
    may change when a run or an evaluation goes on.
    """
    metadata = {"help": help, "choices": choices, "above": above, "least": least, "most": most, "needs": needs,
                "unless": unless, "find": find, "free": free}
    return field(default=default, metadata=metadata)


def option(name):
    return "--" + name.replace("_", "-")


def check_limits(settings):
    """Raise UserError for a setting that its `flag` rules out."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        limits = f.metadata
        if isinstance(value, float | int):
            stated = f"{option(f.name)} is {value}"
            if not math.isfinite(value):
                raise UserError(f"{stated}; it must be a finite number.")
            if abs(value) > LARGEST:
                raise UserError(f"{stated}; it must be at most {LARGEST:g}.")
            if limits["above"] is not None and value <= limits["above"]:
                raise UserError(f"{stated}; it must be above {limits['above']}.")
            if limits["least"] is not None and value < limits["least"]:
                raise UserError(f"{stated}; it must be at least {limits['least']}.")
            if limits["most"] is not None and value > limits["most"]:
                raise UserError(f"{stated}; it must be at most {limits['most']}.")
        if value != f.default and limits["needs"] and not getattr(settings, limits["needs"]):
            raise UserError(f"{option(f.name)} has no meaning without {option(limits['needs'])}; give both or neither.")
        if value != f.default and limits["unless"] and getattr(settings, limits["unless"]):
            raise UserError(f"{option(f.name)} has no meaning with {option(limits['unless'])}; leave one of them out.")
        if limits["find"]:
            for name in value if isinstance(value, tuple) else (value,):
                limits["find"](name, option(f.name))


def parse_settings(cls, description, argv=None, inherit=None):
    """Build the command line from a dataclass of `flag`s and parse it; a mistake prints one sentence and exits 2.

    Options may also stand in a file, given as @FILE; # begins a comment there. `inherit(settings, given)` returns
    values for options whose names are not among the `given` ones.
    """
    print_any_name()
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options]", allow_abbrev=False,
                                     fromfile_prefix_chars="@", argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.convert_arg_line_to_args = functools.partial(shlex.split, comments=True)
    parser.error = functools.partial(_stop, parser)
    for f in dataclasses.fields(cls):
        _add_option(parser, f)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = cls(**given)
    try:
        if inherit:
            check_limits(settings)  # a mistake should not wait for the download of a model
            settings = dataclasses.replace(settings, **inherit(settings, given))
        settings.check()
    except UserError as error:
        parser.error(str(error))
    return settings


def print_any_name():
    """A file's name may hold what the console cannot show: print question marks there."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def command_line(program, description) -> argparse.ArgumentParser:
    """The parser of `python -m PROGRAM`, whose few options are added to it; it stops as `parse_settings` does."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = functools.partial(_stop, parser)
    return parser


def _stop(parser, message):
    """Of the processes that torchrun starts, one says it."""
    first = os.environ.get("RANK", "0") == "0"
    message = message.rstrip(".")
    parser.exit(2, f"{parser.prog}: {message}; --help lists every option.\n" if first else None)


def _add_option(parser, f):
    """One option, its type and default taken from the dataclass field `f`."""
    choices = f.metadata["choices"]
    if f.type is bool:
        arguments = {"action": argparse.BooleanOptionalAction}
        default = str(f.default)
    elif f.type is tuple:
        kind = type(f.default[0]) if f.default else str
        arguments = {"nargs": "+", "type": kind, "choices": choices}
        arguments["metavar"] = None if choices else kind.__name__.upper()
        default = " ".join(map(str, f.default))
    else:
        arguments = {"type": f.type, "choices": choices}
        arguments["metavar"] = None if choices else f.type.__name__.upper()
        default = "" if f.default is None else str(f.default)
    text = f.metadata["help"] + (f" [{default}]" if default else "")
    parser.add_argument(option(f.name), help=text, **arguments)
