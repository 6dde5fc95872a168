"""Torch files in the format of PyTorch 0.1.9, written byte by byte without torch."""

import io
import pickle
import struct
import tarfile

import torch


class Torch01Pickler(pickle._Pickler):
    """Pickles like PyTorch 0.1.9 in Python 2: byte strings, and tensors as the text of their numbers, maybe in a Parameter."""

    def __init__(self, file, numbers):
        super().__init__(file, protocol=2)
        self.numbers = numbers

    def save(self, value, *args, **options):
        if isinstance(value, str):
            self.write(b"U" + bytes([len(value)]) + value.encode())
        elif isinstance(value, Class):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Parameter):
            self.write(b"ctorch.nn.parameter\nParameter\n")
            if value.how == "argument":  # REDUCE with the data, BUILD with the flags
                self.write(b"(")
                super().save(value.data)
                self.write(b"tR(\x88\x89Ntb")
            else:  # __newobj__ without arguments, BUILD with a state of five
                self.write(b")\x81(")
                super().save(value.data)
                self.write(b"NN\x88\x89tb")
        else:
            super().save(value, *args, **options)

    def persistent_id(self, value):
        return str(self.numbers[id(value)]) if isinstance(value, torch.Tensor) else None


class Class:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Parameter:
    def __init__(self, data, how):
        self.data, self.how = data, how


NAMES = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.int64: "Long"}


def tar_torch(content, wrap=None, module="torch", view=(), **members):
    """The bytes of a torch file of 0.1.9.

    Args:
        content: key -> tensor.
        wrap: make each tensor a Parameter with its data as an ``"argument"`` or in its ``"state"``.
        view: keys of float tensors that are parts of one storage.
        members: replacements for members of the archive.
    """
    numbers = {id(tensor): 1000 + n for n, tensor in enumerate(content.values())}

    def pickled(value):
        out = io.BytesIO()
        Torch01Pickler(out, numbers).dump(value)
        return out.getvalue()

    def storage(key, tensor):
        kind = Class(module, f"{NAMES[tensor.dtype]}Storage")
        return pickled((key, "cpu", kind)) + struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes()

    storages, views, tensors = [], [], []
    if view:
        storages.append(storage(9999, torch.cat([content[key].flatten() for key in view])))
    for name, tensor in content.items():
        number, key = numbers[id(tensor)], numbers[id(tensor)] + 5000
        if name in view:
            views.append((key, 9999, sum(content[other].numel() for other in view[: view.index(name)]), tensor.numel()))
        else:
            storages.append(storage(key, tensor))
        tensors.append(pickled((number, key, Class(module, f"{NAMES[tensor.dtype]}Tensor"))))
        shape, strides = tensor.shape, torch.empty(tensor.shape).stride()
        tensors.append(struct.pack(f"<ixxxx{2 * tensor.ndim + 1}q", tensor.ndim, *shape, *strides, 0))
    saved = {key: Parameter(value, wrap) if wrap else value for key, value in content.items()}
    files = {
        "sys_info": pickled({"protocol_version": 1000, "little_endian": True, "type_sizes": {"int": 4}}),
        "pickle": pickled(saved),
        "tensors": pickled(len(content)) + b"".join(tensors),
        "storages": pickled(len(storages)) + b"".join(storages) + pickled(views),
    } | members
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()
