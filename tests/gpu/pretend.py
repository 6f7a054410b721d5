"""An H100 that is not there: PyTorch, Inductor and Triton take its word, and nothing may be run on it.

For ``check.py``, which makes the kernels of a training step on a machine without a GPU. Pinned to torch 2.11 and triton
3.6: what is answered here are questions of their insides.
"""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.device_interface
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.pad_mm as pad_mm
import torch._inductor.runtime.triton_helpers as triton_helpers
import torch._subclasses.fake_tensor as fake_tensor
import triton
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda", 0)
PROPERTIES: dict[str, Any] = {
    "name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32,
    "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024,
    "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472, "total_memory": 80 << 30, "L2_cache_size": 50 << 20,
    "is_integrated": False, "gcnArchName": "",
}  # fmt: skip
TARGET = GPUTarget("cuda", 90, 32)
MODE = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
_KEPT: list[Any] = []  # what C holds pointers to


def pretend() -> None:
    """From here on this process has one H100, for good. Raises where PyTorch does not believe it."""
    _answer_for_cuda()
    _answer_for_contexts()
    _answer_for_triton()
    inductor.compile_threads, inductor.force_disable_caches, inductor.fx_graph_cache = 1, True, False
    pad_mm._should_pad = lambda *_, **__: False  # else measured on the device
    _fold_constants_on_the_cpu()
    with MODE:  # the pretence holds if autograd runs
        x = torch.ones(3, device=CUDA, requires_grad=True)
        (grad,) = torch.autograd.grad((x * x).sum(), [x])
    assert grad.device == CUDA and grad.shape == (3,)


def _nothing(*_: Any, **__: Any) -> None:
    """Done."""


def _zero(*_: Any) -> int:
    """The only device, the only stream."""
    return 0


def _answer_for_cuda() -> None:
    properties, seed = types.SimpleNamespace(**PROPERTIES), torch.zeros(16, dtype=torch.uint8)
    answers = {
        "_lazy_init": _nothing, "is_available": lambda: True, "is_initialized": lambda: False,
        "device_count": lambda: 1, "current_device": lambda: 0, "get_device_properties": lambda *_: properties,
        "synchronize": _nothing, "get_device_capability": lambda *_: (9, 0), "set_rng_state": _nothing,
        "get_device_name": lambda *_: PROPERTIES["name"], "get_rng_state": lambda *_: seed,
        "is_bf16_supported": lambda *_, **__: True, "_exchange_device": _zero, "_maybe_exchange_device": _zero,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    interface = torch._dynamo.device_interface.CudaInterface
    for name in ("current_device", "device_count", "get_device_properties", "synchronize", "is_bf16_supported"):
        setattr(interface, name, staticmethod(answers[name]))
    for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream", "set_device"):
        setattr(interface, name, staticmethod(_zero))
    fake_tensor.init_gpu_context = _nothing  # would make a tensor on the device
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda _: True, _nothing)


def _answer_for_contexts() -> None:
    """Autograd asks the CUDA library which devices have a context; without a driver this raises: answer none.

    The answer goes into a copy of the hooks' table of methods: two destructors, isBuilt, isAvailable,
    hasPrimaryContext, as in ATen/detail/AcceleratorHooksInterface.h.
    """
    torch._C._ensureCUDADeviceGuardSet()
    hooks_of = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))[
        "_ZN2at6detail12getCUDAHooksEv"
    ]
    hooks_of.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(hooks_of())
    never = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda _this, _index: False)
    table = (ctypes.c_void_p * 82)()
    assert hooks.value is not None
    ctypes.memmove(table, hooks.value - 16, ctypes.sizeof(table))
    table[2 + 4] = ctypes.cast(never, ctypes.c_void_p).value
    hooks.value = ctypes.addressof(table) + 16
    _KEPT.extend((never, table))


def _answer_for_triton() -> None:
    limits = {"max_shared_mem": PROPERTIES["shared_memory_per_block_optin"], "multiprocessor_count": 132}
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_current_stream=_zero,
            get_active_torch_device=lambda: CUDA,
            utils=types.SimpleNamespace(get_device_properties=lambda _: limits),
        )
    )  # fmt: skip
    triton_helpers.set_driver_to_gpu = _nothing


class _OnTheCPU(TorchDispatchMode):
    """Constants of a graph are folded by running operations on one element: on the CPU here."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs or {}))
        return func(*args, **kwargs)


def _fold_constants_on_the_cpu() -> None:
    folder = joint_graph.UniformValueConstantFolder
    make, deduce = folder.__init__, folder._deduce_value

    def make_there(self: Any, *args: Any, **kwargs: Any) -> None:
        with _OnTheCPU():
            make(self, *args, **kwargs)

    def deduce_there(self: Any, node: Any) -> Any:
        with _OnTheCPU():
            value = deduce(self, node)
        return self.unknown_value if isinstance(value, fake_tensor.FakeTensor) else value

    folder.__init__, folder._deduce_value = make_there, deduce_there
