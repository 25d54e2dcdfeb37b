"""The one error that people see: it names the place, the value, the cause and the next move."""


class WinnowError(ValueError):
    """Something the user can mend. The command prints `problems`, one a line, and exits with code 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type["WinnowError"], tuple[str, ...]]:
        return type(self), self.problems  # survives the trip from a worker


class WinnowWarning(UserWarning):
    """Something that people should know, and need not mend."""
