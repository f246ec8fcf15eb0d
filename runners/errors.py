"""The error for what the user can put right."""


class InputError(Exception):
    """Something given is wrong. The message is a sentence: what, where (the key, the file, the layer), what to do."""
