"""The exceptions that mean "the user can mend this"."""


class UserError(Exception):
    """Wrong input from outside: a config value, a path, a file. The commands print its one-line message and exit with code 2.

    The message says what is wrong and what to do; it holds no line breaks.
    """


class DivergedError(UserError):
    """A training run gave up because its loss or gradient was not finite any more."""
