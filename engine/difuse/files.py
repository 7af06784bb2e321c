"""Failing before the work, not after it: optional packages, folders, files written in one step."""
import importlib.util
import os
import pathlib
import tempfile


def require_extras(task, *modules):
    """Raise ImportError unless every module that `task` needs is installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{task} needs {module}, which is not installed: pip install 'difuse[demo]'")


def check_folder(path):
    """Prove that files can be written to the folder, or to the nearest one above it that exists; make nothing yet.

    Returns a Path; raises OSError.
    """
    path = pathlib.Path(path)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {path}: {existing}: {error.strerror}; choose another place") from error
    return path


def write_atomically(path, data):
    """Write bytes to `path` by way of a temporary file beside it: write, fsync, rename. Raises OSError."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
