"""The error and the warning that users see: where, which value, why, and what to do."""

COMMAND = "winnow"  # as messages name the command that does it


class WinnowError(ValueError):
    """Error that the user can fix. The command line prints `problems`, one per line, and exits with code 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type["WinnowError"], tuple[str, ...]]:
        # A worker process pickles its error; without this, unpickling would pass the joined text as one problem.
        return type(self), self.problems


class MachineError(WinnowError):
    """Error of a worker, a machine or a network, not of data or options: the same command may succeed later."""


class WinnowWarning(UserWarning):
    """Warning that the user should read but need not act on."""
