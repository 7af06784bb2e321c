"""Checkpoints: one safetensors file each, with JSON in its header, written atomically and never unpickled.

    model.*              weights and buffers            optim.<step|exp_avg|exp_avg_sq>.*   the optimizer's state
    ema.*                averaged weights               rng.*                               generator states, uint8

A file under its final name is whole: it is written in a temporary folder beside it, flushed to the disk, moved to its
name by one rename, and the folder flushed.
"""
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from difuse.models import DiT

FORMAT_VERSION = 1
KEEP = 2
MODELS = {"DiT": DiT}
_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_SAVING = ".saving-"  # prefix of the temporary folders
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what was found, and what to do."""


def checkpoint_path(folder, step):
    """folder/step-000500.safetensors for step 500."""
    return Path(folder) / f"step-{step:06d}.safetensors"


def list_checkpoints(folder):
    """Paths of the folder's checkpoints, oldest first; an empty list where there is no folder."""
    if not Path(folder).is_dir():
        return []
    found = [(int(match[1]), path) for path in Path(folder).iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder):
    """The folder's newest whole checkpoint or None. A damaged one is passed over with a warning."""
    for path in reversed(list_checkpoints(folder)):
        try:
            _read_header(path)
        except CheckpointError as error:
            warnings.warn(f"difuse: {error} Looking for an older checkpoint.", stacklevel=2)
        else:
            return path
    return None


def remove_temporary_files(folder):
    """Delete what a killed save has left behind."""
    for path in Path(folder).glob(f"{_SAVING}*"):
        shutil.rmtree(path)


def save_checkpoint(path, tensors, meta):
    """Write `tensors` (dict of name -> tensor) and `meta` (a dict for JSON) to `path`, atomically.

    Afterwards only the newest two `step-*.safetensors` of the folder are kept. Raises OSError if the disk refuses;
    earlier checkpoints are then untouched and no partial file is left.
    """
    path = Path(path)
    header = {"difuse": json.dumps({"format_version": FORMAT_VERSION} | meta)}
    with tempfile.TemporaryDirectory(prefix=_SAVING, dir=path.parent) as saving:
        written = Path(saving) / path.name
        try:
            save_file(_savable(tensors), written, metadata=header)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written: {error}. Earlier checkpoints are whole; make room on the "
                          "disk and train again to continue from them") from error
        written.chmod(path.parent.stat().st_mode & 0o666)  # as readable as its folder; save_file makes it private
        _flush_to_disk(written)
        os.replace(written, path)
    _flush_to_disk(path.parent)
    for old in list_checkpoints(path.parent)[:-KEEP]:
        old.unlink()


def _savable(tensors):
    """Dense CPU tensors; one that shares memory with another (tied weights) is copied, as the format requires."""
    seen, result = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _flush_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_header(path):
    """The safetensors header as a dict, after checking that the file is as long as the header says."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Expected a checkpoint, such as runs/x/step-001000.safetensors")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(f"{path}: not a checkpoint, or cut off inside its header ({size} bytes). Expected a "
                                  "safetensors file written by difuse; pickled files (.pt, .ckpt) are never opened.")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path}: the header is not that of a safetensors file ({error}). Expected a "
                                  "checkpoint written by difuse.") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{path}: {size} bytes long, expected {expected}: it was cut off or changed. Copy it "
                              "again, or use an older checkpoint.")
    return header


def read_meta(path):
    """The JSON that `save_checkpoint` put into the header, plus "format_version". Raises CheckpointError."""
    text = (_read_header(path).get("__metadata__") or {}).get("difuse")
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not a difuse checkpoint (no 'difuse' entry in its "
                              "header). Expected a file written by `difuse train`.")
    try:
        meta = json.loads(text)
        version = meta["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: the 'difuse' entry of the header is damaged ({error}). Use an older "
                              "checkpoint.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {version}, this version of difuse reads format "
                              f"{FORMAT_VERSION}. Upgrade difuse to read it.")
    return meta


def load_checkpoint(path, *prefixes):
    """(tensors, meta) of a checkpoint: all tensors, or those whose name starts with one of `prefixes`.

    Raises CheckpointError for a missing, truncated, foreign or newer file.
    """
    meta = read_meta(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not prefixes or name.startswith(prefixes)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, meta
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}. Copy it again, or use an older checkpoint.") from error


def check_tensors(path, got, expected):
    """`got` has exactly the names, shapes and dtypes of `expected`; else CheckpointError, nothing has been changed."""
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is not expected" for name in got if name not in expected]
    for name in expected.keys() & got.keys():
        if (got[name].shape, got[name].dtype) != (expected[name].shape, expected[name].dtype):
            problems.append(f"{name} is {tuple(got[name].shape)} {got[name].dtype}, "
                            f"expected {tuple(expected[name].shape)} {expected[name].dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{path}: does not fit the model: {shown}. Build the model with the settings the "
                              "checkpoint was trained with.")


def load_model(path, ema=True):
    """(model, meta): the model the header describes, in eval mode, with averaged (`ema`) or last weights.

    `meta` holds "model", "process", "prediction", "train", "data", "step" and "position". Raises CheckpointError.
    """
    tensors, meta = load_checkpoint(path, *(("model.", "ema.") if ema else ("model.",)))
    if meta.get("model_class") not in MODELS:
        raise CheckpointError(f"{path}: holds a {meta.get('model_class')}; load_model builds {', '.join(MODELS)}. "
                              "Build the module yourself and take its weights from load_checkpoint(path).")
    try:
        model = MODELS[meta["model_class"]](**meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header does not describe a model ({error}). Use another "
                              "checkpoint.") from error
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema:
        expected |= {f"ema.{name}": p.float() for name, p in model.named_parameters()}
    check_tensors(path, tensors, expected)
    state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    state |= {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
    model.load_state_dict(state)
    return model.eval(), meta
