"""name=value arguments of the small commands, those that Hydra does not compose."""

from collections.abc import Sequence

from runners.errors import InputError


def named_values(arguments: Sequence[str], defaults: dict[str, str]) -> dict[str, str]:
    """What a command line sets, over the defaults.

    Raises:
        InputError: there is no setting of that name.
    """
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    if unknown := sorted(set(given) - set(defaults)):
        raise InputError(f"{unknown[0]} is not a setting: there are {', '.join(defaults)}, written as name=value")
    return defaults | given
