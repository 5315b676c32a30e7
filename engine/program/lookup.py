"""Objects that options name by their place, MODULE.NAME."""

import importlib
import sys
from pathlib import Path

from engine.program.settings import UserError

ROOT = Path(__file__).parents[2]


def look_up(option, name, table, kind):
    """The object of a name: that of `table`, or for MODULE.NAME the one of class `kind` in that module.

    The module is imported; it may lie in the current folder. Raises UserError, which begins with `option` and the name.
    """
    if name in table:
        return table[name]
    wanted = f"a rewards.{kind.__name__}"
    module, _, attribute = name.rpartition(".")
    if not module or not all(word.isidentifier() for word in name.split(".")):
        raise UserError(f"{option} {name}: is not among {', '.join(table)}; give one of these, or MODULE.NAME of "
                        f"{wanted}.")
    if "" not in sys.path:
        sys.path.append("")  # the current folder: last, so that no file in it takes the place of another module
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{option} {name}: there is no module {module}; put {module.replace('.', '/')}.py into the "
                            "current folder, or correct the name.") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{option} {name}: the module {module} cannot be imported ({reason}); mend it.") from error
    if not hasattr(imported, attribute):
        place = getattr(imported, "__file__", None) or module
        raise UserError(f"{option} {name}: {place} has no {attribute}; define {wanted} of this name there, or correct "
                        "the name.")
    value = getattr(imported, attribute)
    if not isinstance(value, kind):
        raise UserError(f"{option} {name}: is of the class {type(value).__name__}; name {wanted}.")
    return value


def is_ours(name, record):
    """Whether MODULE.NAME is in a file of this repository, in its top folder or in one with an __init__.py.

    A folder that holds the `record` itself does not count: a checkpoint may lie here, with modules of its own.
    """
    *folders, file, _ = name.split(".")
    place = ROOT
    for folder in folders:
        place /= folder
        if not (place / "__init__.py").is_file() or Path(record).resolve().is_relative_to(place.resolve()):
            return False
    return (place / f"{file}.py").is_file()
