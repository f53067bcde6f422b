"""A device without hardware: tensors in host memory that behave as if they were elsewhere.

Within a `FakeDevice` the device ``"meta:0"`` computes, and fails where CUDA fails or would give
wrong numbers now and then:

- an operation on tensors of the host and of the device together raises;
- a copy to the host in the background holds NaN until an event after it was waited for;
- a copy to the device in the background raises at its first use if its source was changed;
- a tensor made on one stream and used on another raises, unless that has waited for the first
  and the tensor was recorded for it.
"""

import contextlib
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sktransfer.embedding import _batches
from sktransfer.networks._inference import clear_networks

# "meta" without a number stays what it is: shapes alone.
HERE = torch.device("meta", 0)
ATEN = torch.ops.aten
# What takes indices from the host, too.
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default}

CONVOLUTIONS = {ATEN.convolution.default, ATEN.conv2d.default}


class Stream:
    """Work in order; `seen` says up to where the work of others is waited for."""

    def __init__(self, device=None):
        self.n_done, self.seen, self.copies = 0, {}, []

    def __deepcopy__(self, memo):
        return self  # tensors are copied with what they hold

    def wait_stream(self, other):
        self.seen |= {**other.seen, other: other.n_done}

    def record_event(self):
        return types.SimpleNamespace(synchronize=self.synchronize)

    @torch.inference_mode()
    def synchronize(self):
        for on_host, value in self.copies:
            on_host.copy_(value)
        self.copies = []


class DeviceTensor(torch.Tensor):
    """A tensor of the device, with its values in `held`."""

    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, source=None):
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=HERE,
            )
        self.held, self.source, self.recorded = held, source, set()
        FakeDevice.now.note_work(self)
        return self

    def record_stream(self, stream):
        self.recorded.add(stream)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return FakeDevice.now.run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """A context in which the device ``"meta:0"`` computes.

    `n_uploads` and `n_downloads` count the copies to it and from it.

    Parameters
    ----------
    is_streaming : bool
        Whether memory is copied in the background, as on CUDA; else as on MPS.
    most_images : int or None
        A convolution of more images is out of memory.
    """

    now = None

    def __init__(self, monkeypatch, is_streaming=True, most_images=None):
        super().__init__()
        self.stream, self.most_images = Stream(), most_images
        self.n_uploads = self.n_downloads = 0
        self._pinned = set()
        FakeDevice.now = self
        if is_streaming:
            _batches.STREAMING.add("meta")
        monkeypatch.setitem(_batches._COUNTS, "meta", lambda: 1)
        _batches._upload_stream.cache_clear()
        clear_networks()  # those of an earlier device have its streams
        self._replace(monkeypatch)

    def _replace(self, monkeypatch):
        """Put the device where torch looks for it."""
        module_of, empty, autocast = torch.get_device_module, torch.empty, torch.autocast
        module = types.SimpleNamespace(
            Stream=Stream,
            stream=self._on_stream,
            current_stream=lambda device: self.stream,
            empty_cache=lambda: None,
        )

        def empty_pinned(*size, pin_memory=False, **kwargs):
            made = empty(*size, **kwargs)
            if pin_memory:
                self._pinned.add(made.untyped_storage().data_ptr())
            return made

        def pin_memory(tensor):
            pinned = tensor.clone()
            self._pinned.add(pinned.untyped_storage().data_ptr())
            return pinned

        def autocast_elsewhere(kind, *args, **kwargs):
            return contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

        monkeypatch.setattr(
            torch,
            "get_device_module",
            lambda device: module if torch.device(device).type == "meta" else module_of(device),
        )
        monkeypatch.setattr(torch, "empty", empty_pinned)
        monkeypatch.setattr(torch, "autocast", autocast_elsewhere)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: self._is_pinned(tensor))

    @contextlib.contextmanager
    def _on_stream(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def __exit__(self, *error):
        _batches.STREAMING.discard("meta")
        super().__exit__(*error)

    def note_work(self, tensor):
        self.stream.n_done += 1
        tensor.made = self.stream, self.stream.n_done

    # -- operations -------------------------------------------------------------------------
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, DeviceTensor)]
        target = kwargs.get("device")
        goes_here = target is not None and torch.device(target) == HERE
        if not ours and not goes_here:
            return func(*args, **kwargs)
        for tensor in ours:
            self._check_use(tensor)
        if func is ATEN._to_copy.default:
            return self._copied(args[0], kwargs)
        if func is not ATEN.copy_.default and func not in INDEXING:
            strangers = [x for x in tensors if x.ndim and not isinstance(x, DeviceTensor)]
            if ours and strangers:
                raise RuntimeError(f"{func}: tensors of the host and of the device together")
        if func in CONVOLUTIONS and len(args[0]) > (self.most_images or 1e9):
            raise torch.OutOfMemoryError("out of memory")
        self.n_downloads += func is ATEN._local_scalar_dense.default  # a number is read
        if target is not None:
            kwargs = {**kwargs, "device": "cpu", "pin_memory": False}
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if target is not None and not goes_here:
            return out
        same = {id(x.held): x for x in ours}
        return tree_map(lambda x: self._ours(x, same), out)

    def _ours(self, out, same):
        if not isinstance(out, torch.Tensor):
            return out
        if id(out) in same:  # an operation in place
            self.note_work(same[id(out)])
            return same[id(out)]
        return DeviceTensor(out)

    def _copied(self, tensor, kwargs):
        target, in_background = kwargs.get("device"), kwargs.get("non_blocking", False)
        was_here = isinstance(tensor, DeviceTensor)
        stays_here = was_here and (target is None or torch.device(target) == HERE)
        host = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        value = ATEN._to_copy.default(_held(tensor), **host)
        if stays_here:
            return DeviceTensor(value)
        if not was_here:
            self.n_uploads += 1
            is_read_later = in_background and self._is_pinned(tensor)
            return DeviceTensor(value, tensor if is_read_later else None)
        self.n_downloads += 1
        if not in_background:
            return value
        on_host = torch.full_like(value, torch.nan if value.is_floating_point() else 77)
        self.stream.copies.append((on_host, value))
        return on_host

    def _check_use(self, tensor):
        stream, n = tensor.made
        if stream is not self.stream:
            if self.stream.seen.get(stream, 0) < n:
                raise RuntimeError("used on a stream that has not waited for it")
            if self.stream not in tensor.recorded:
                raise RuntimeError("used on a stream that it is not recorded for")
        source, tensor.source = tensor.source, None
        if source is not None and not torch.equal(source, tensor.held):
            raise RuntimeError("the memory that it is copied from was changed")

    def _is_pinned(self, tensor):
        is_here = isinstance(tensor, DeviceTensor)
        return not is_here and tensor.untyped_storage().data_ptr() in self._pinned


def _held(x):
    return x.held if isinstance(x, DeviceTensor) else x
