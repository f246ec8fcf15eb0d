"""The errors for what the user can put right."""


class InputError(Exception):
    """Something given is wrong. The message is a sentence: what, where (the key, the file, the layer), what to do."""


class MissingData(InputError):
    """A data set cannot be had, neither from the data root nor from the hub. What does not need it can go on."""
