'''Commands from typed functions: `python -m runners.sync study=tiny dry_run=true` calls `main(study="tiny", dry_run=True)`.

A command is a function whose annotations say what each parameter means, in a module that ends with `start`:

    def main(
        run: Annotated[Path, "folder of the run"],
        /,
        to: Annotated[Path, "folder to write into"],
        check: Annotated[bool, "load the result again and compare"] = True,
    ) -> None:
        """Write the weights of a run for other tools."""

    if __name__ == "__main__":
        start(main)

Parameters before the slash are words, in their order. The others are settings, name=value as for run.py or --name value.
What has no default must be given. Types: str, int, float, bool, Path, Literal, `tuple[T, ...]` for several values (a,b),
each of them also `| None`. `**conditions: Annotated[str, "..."]` takes settings of any other name. `--help` shows all of
it. argparse does the parsing; this module only turns signatures into its arguments, and its errors into ours.
'''

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from runners.errors import INTERRUPTED, WRONG_INPUT, InputError, known_names

Command = Callable[..., None]


def start(*commands: Command, words: Sequence[str] | None = None, wrong: tuple[type[Exception], ...] = ()) -> None:
    """Call the command that the command line asks for; where it cannot, say why in a sentence and exit with a code.

    Args:
        commands: the first is the default; the others are called by their name as the first word.
        words: the command line; by default that of this process.
        wrong: exceptions that mean wrong input, in addition to InputError.

    Raises:
        SystemExit: 2 for wrong input, 130 if it was interrupted.
    """
    try:
        invoke(sys.argv[1:] if words is None else words, *commands)
    except (InputError, *wrong) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def invoke(words: Sequence[str], *commands: Command) -> None:
    """Call the command that the words ask for.

    Raises:
        InputError: a word or a setting is wrong or missing. Whatever the command raises passes through.
    """
    default, *others = commands
    program = _program(default)
    chosen = {command.__name__: command for command in others}.get(words[0] if words else "")
    if chosen is not None:
        _call(chosen, words[1:], f"{program} {words[0]}")
    else:
        _call(default, words, program, [f"{program} {command.__name__} --help" for command in others])


def _call(command: Command, words: Sequence[str], program: str, see_also: Sequence[str] = ()) -> None:
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    parser = _parser(command, parameters, program, see_also)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    several = {each.name: _kind(each)[1] for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    options, free = _options(words, several, takes_any)
    # Intermixed: otherwise argparse gives a word that may be left out its default as soon as it meets a setting.
    known, left = parser.parse_known_intermixed_args(options)
    for word in left:
        if word.startswith("-"):
            raise _unknown(word.lstrip("-"), several)
    if left:
        raise InputError(f"{left[0]} is not understood: {' '.join(parser.format_usage().split())}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(known).items()}
    positional = [
        given.pop(each.name) for each in parameters if each.kind is each.POSITIONAL_ONLY and each.name in given
    ]
    command(*positional, **given, **free)


def _options(words: Sequence[str], several: dict[str, bool], takes_any: bool) -> tuple[list[str], dict[str, str]]:
    """The words with name=value as --name=value, and the settings that no parameter is named after.

    Args:
        several: the settings by name, and whether they take several values.
    """
    options: list[str] = []
    settings: list[str] = []  # at the end: several values must not swallow a word that follows
    free: dict[str, str] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals or _is_path(word, name):
            options.append(word)
        elif name in several:
            settings += [f"--{name}", *filter(None, value.split(","))] if several[name] else [f"--{name}={value}"]
        elif takes_any:
            free[name] = value
        else:
            raise _unknown(name, several)
    return options + settings, free


def _is_path(word: str, name: str) -> bool:
    """Whether a word with an equals sign, such as `results/a (b), c=d`, is a path or a name, and not a setting."""
    return re.fullmatch(r"[\w./-]+", name) is None or (os.sep in name and Path(word).exists())


def _parser(
    command: Command, parameters: Collection[inspect.Parameter], program: str, see_also: Sequence[str]
) -> argparse.ArgumentParser:
    """argparse's parser of a command."""
    epilog = [f"NAME=VALUE: {get_args(each.annotation)[1]}" for each in parameters if each.kind is each.VAR_KEYWORD]
    epilog += [f"see also: {program}" for program in see_also]
    parser = _Parser(
        prog=program,
        description=inspect.getdoc(command),
        epilog="\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given gets the function's own default
        allow_abbrev=False,
    )
    settings = parser.add_argument_group("settings, written --name value or name=value (several: name=a,b)")
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            parser.add_argument(parameter.name, **_described(parameter))
        elif parameter.kind is not parameter.VAR_KEYWORD:
            settings.add_argument(f"--{parameter.name}", **_described(parameter))
    return parser


def _described(parameter: inspect.Parameter) -> dict[str, Any]:
    """A parameter in the words of argparse's `add_argument`."""
    kind, is_several = _kind(parameter)
    is_needed = parameter.default is parameter.empty
    sentence = get_args(parameter.annotation)[1]
    shown = "" if is_needed or parameter.default in (None, "", ()) else f" (default: {_written(parameter.default)})"
    options: dict[str, Any] = {"help": (sentence + shown).replace("%", "%%"), "type": kind}
    if parameter.kind is parameter.POSITIONAL_ONLY:
        options |= {} if is_needed else {"nargs": "?"}
    else:
        options |= {"required": is_needed}
    if get_origin(kind) is Literal:
        options |= {"type": str, "choices": get_args(kind)}
    elif kind is bool:
        options |= {"type": _truth, "metavar": "true|false", "nargs": "?", "const": True}
    return options | ({"nargs": "*"} if is_several else {})


def _kind(parameter: inspect.Parameter) -> tuple[Any, bool]:
    """The type of one value, and whether there are several."""
    kind = get_args(parameter.annotation)[0]
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    return (get_args(kind)[0], True) if get_origin(kind) is tuple else (kind, False)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text == "true"


def _written(value: Any) -> str:
    """A default as it is written on the command line."""
    return (
        str(value).lower() if isinstance(value, bool) else ",".join(value) if isinstance(value, tuple) else str(value)
    )


def _program(command: Command) -> str:
    """How the command is started: `python -m runners.sync`."""
    spec = sys.modules["__main__"].__spec__ if command.__module__ == "__main__" else None
    return "python -m " + (spec.name if spec else command.__module__).removesuffix(".__main__")


def _unknown(name: str, known: Collection[str]) -> InputError:
    return InputError(f"{name} is not a setting: {known_names(name, known)}, written as name=value")


class _Parser(argparse.ArgumentParser):
    """Raises its errors, in our words."""

    def error(self, message: str) -> NoReturn:
        for theirs, ours in (("the following arguments are required:", "missing:"), ("argument ", ""), ("--", "")):
            message = message.replace(theirs, ours)
        raise InputError(f"{message}; see {self.prog} --help")
