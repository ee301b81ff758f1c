"""What goes wrong at the command line through no fault of the program."""

from pathlib import Path


class CommandError(Exception):
    """An error for the user: one line on stderr, exit code 2, no traceback."""


def make_output_folder(folder: Path) -> None:
    """Create `folder` and its parents, or say why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {folder}: {error.strerror}") from error
