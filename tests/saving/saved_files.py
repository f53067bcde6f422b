"""Read and write the files of ``save`` as its format says, without its code."""

import hashlib
import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def read_file(path):
    """Return the header and the tensors."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sktransfer"])
    # Copies: what load_file returns lies in the file, which is written again.
    return header, {name: tensor.clone() for name, tensor in load_file(path).items()}


def digest_of(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def write_file(path, header, tensors):
    """Write a file with the right digest, as an attacker would."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, {"sktransfer": text, "sha256": digest_of(text, tensors)})
