"""Kept tensors: their values, their memory, and their copies in any order that streams allow.

Streams are simulated where there is no GPU: what each one was told is run later, in a random order
that the waits allow, over memory that is reused as soon as it is freed.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import model.kept
from model.kept import KeptTensors
from tests.closeness import assert_close_by_norm

LAYERS = 5
SHAPE = (6, 2, 4)
BYTES = 6 * 2 * 4 * 4
MEGABYTES_64 = (2**24,)


def forward(kept, values):
    """Each layer keeps its input and its attention's output, for two functions each."""
    tickets = []
    for hidden, out in values:
        layer = [kept.put(hidden), kept.put(out)]
        assert [kept.put(hidden), kept.put(out)] == layer
        tickets.append(layer)
    return tickets


def backward(kept, tickets, check, layers=LAYERS):
    """Layers from the last one down, in each its two functions; `check(layer, which, tensor)`."""
    for layer in list(reversed(range(LAYERS)))[:layers]:
        for _ in range(2):
            for which, ticket in enumerate(tickets[layer]):
                check(layer, which, kept.get(ticket))


def random_values():
    return [[torch.randn(SHAPE) for _ in range(2)] for _ in range(LAYERS)]


@pytest.mark.parametrize("offload", [False, True])
def test_values_over_forward_and_backward(offload):
    kept, values = KeptTensors(offload), random_values()
    wanted = [[x.clone() for x in layer] for layer in values]
    tickets = forward(kept, values)
    assert kept.device_bytes == (2 if offload else 2 * LAYERS) * BYTES
    assert kept.host_bytes == (2 * LAYERS * BYTES if offload else 0)
    seen = {(layer, which): [] for layer in range(LAYERS) for which in range(2)}

    def check(layer, which, tensor):
        assert torch.equal(tensor, wanted[layer][which])
        # The ones in use and the two that come next.
        assert not offload or kept.device_bytes <= 4 * BYTES
        seen[layer, which].append(tensor)

    backward(kept, tickets, check)
    for (layer, which), (first, second) in seen.items():
        assert first is second
        # The newest two never left the device.
        assert first.is_set_to(values[layer][which]) == (not offload or layer == LAYERS - 1)
    assert kept.device_bytes == 0


class Attention(torch.autograd.Function):
    """Stands for a layer's first part: out = sin(h)."""

    @staticmethod
    def forward(ctx, hidden, kept):
        out = hidden.sin()
        ctx.kept, ctx.tickets = kept, (kept.put(hidden), kept.put(out))
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, out = map(ctx.kept.get, ctx.tickets)
        assert torch.equal(hidden.sin(), out) and not hidden.requires_grad
        return grad * hidden.cos(), None


class Rest(torch.autograd.Function):
    """Stands for a layer's second part: h + h * out."""

    @staticmethod
    def forward(ctx, hidden, out, kept):
        ctx.kept, ctx.tickets = kept, (kept.put(hidden), kept.put(out))
        return hidden + hidden * out

    @staticmethod
    def backward(ctx, grad):
        hidden, out = map(ctx.kept.get, ctx.tickets)
        return grad + grad * out, grad * hidden, None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_autograds(offload, device):
    kept = KeptTensors(offload)
    start = torch.randn(4096, device=device, requires_grad=True)
    for _ in range(2):
        hidden = plain = start
        for _ in range(LAYERS):
            hidden = Rest.apply(hidden, Attention.apply(hidden, kept), kept)
            plain = plain + plain * plain.sin()
        assert kept.host_bytes == (2 * LAYERS * start.nbytes if offload else 0)
        ours, wanted = (torch.autograd.grad(x.sum(), start)[0] for x in (hidden, plain))
        assert_close_by_norm(ours, wanted, 1e-5)
        assert kept.device_bytes == 0


def test_a_tensor_that_was_offloaded_is_let_go():
    kept, storages = KeptTensors(True), []
    for _ in range(4):
        tensor = torch.randn(SHAPE)
        kept.put(tensor)
        storages.append(StorageWeakRef(tensor.untyped_storage()))
        del tensor
    assert [storage.expired() for storage in storages] == [True, True, False, False]


def test_host_buffers_are_reused_from_step_to_step():
    kept, values = KeptTensors(True), random_values()
    for _ in range(3):
        backward(kept, forward(kept, values), lambda *_: None)
        assert kept.host_bytes == 2 * LAYERS * BYTES


@pytest.mark.parametrize("offload", [False, True])
def test_a_broken_step_leaves_nothing(offload):
    kept = KeptTensors(offload)
    broken = forward(kept, random_values())
    backward(kept, broken, lambda *_: None, layers=2)
    kept.clear()
    assert kept.device_bytes == 0
    with pytest.raises(ValueError, match="ticket 0 holds no tensor"):
        kept.get(broken[0][0])
    values = random_values()
    tickets = forward(kept, values)
    # A ticket of the broken step finds nothing of this one either.
    assert not set(sum(broken, [])) & set(sum(tickets, []))
    assert kept.host_bytes == (2 * LAYERS * BYTES if offload else 0)
    found = []
    backward(kept, tickets, lambda i, j, x: found.append(torch.equal(x, values[i][j])))
    assert found and all(found)


def test_tickets_that_hold_nothing_are_refused():
    kept = KeptTensors(True)
    ticket, other = kept.put(torch.ones(3)), kept.put(torch.zeros(3))
    assert kept.get(ticket).tolist() == [1, 1, 1]
    for wrong in (ticket, 7, -1):
        with pytest.raises(ValueError, match=rf"ticket {wrong} .* legal now: \[{other}\]"):
            kept.get(wrong)


def test_a_second_device_is_refused():
    kept = KeptTensors(True)
    kept.put(torch.ones(3))
    with pytest.raises(ValueError, match="on meta among tensors on cpu"):
        kept.put(torch.ones(3, device="meta"))


def test_only_the_same_memory_of_late_is_shared():
    kept, tensor = KeptTensors(True), torch.randn(4, 4)
    others = [tensor.clone(), tensor.t(), tensor[1:], tensor.view(torch.int32), tensor.view(16)]
    for other in others:
        first, second = kept.put(tensor), kept.put(other)
        assert first != second
        assert kept.put(tensor[:]) == first and kept.put(other.detach()) == second
        kept.put(torch.zeros(1))
        # Two are newer by now.
        assert kept.put(tensor) != first


TENSORS = {
    "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 5),
    "half": torch.randn(3, 5).bfloat16(),
    "transposed": torch.randn(3, 4, 5).transpose(0, 2),
    "slice": torch.randn(7, 6)[1::2, ::3],
    "expanded": torch.randn(4, 1).expand(4, 6),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.arange(12).view(3, 4),
    "of_as_many_bytes": torch.randn(4, 6),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("offload", [False, True])
def test_shapes_strides_and_dtypes(offload, device):
    kept = KeptTensors(offload)
    for order in (list(TENSORS), list(reversed(TENSORS))):
        given = {name: TENSORS[name].to(device) for name in order}
        tickets = {name: kept.put(tensor) for name, tensor in given.items()}
        for name in reversed(order):
            tensor = kept.get(tickets[name])
            assert tensor.shape == given[name].shape and tensor.dtype == given[name].dtype
            assert tensor.device == given[name].device and torch.equal(tensor, given[name])


class Gpu:
    """A GPU whose streams run late and in any order, and whose freed memory is reused at once."""

    def __init__(self):
        self.memory, self.freed = {}, []
        self.compute = self.current = Stream(self)
        self.streams = [self.compute]
        cuda = SimpleNamespace(Stream=self.new_stream, stream=self, current_stream=self.is_current)
        self.torch = SimpleNamespace(cuda=cuda, empty=self.empty, uint8=None)

    def new_stream(self, device):
        self.streams.append(Stream(self))
        return self.streams[-1]

    def is_current(self, device):
        return self.current

    def __call__(self, stream):
        self.entered = stream
        return self

    def __enter__(self):
        self.current = self.entered

    def __exit__(self, *_):
        self.current = self.compute

    def empty(self, *_, dtype=None, device=None, pin_memory=False):
        return Tensor(self, Block(self.freed, pin_memory))

    def run(self, seed):
        """Do what the streams were told; each job waits for its stream's last and its events."""
        draw = random.Random(seed)
        # Some streams are far slower than others, so that what may come late does.
        speed = {stream: 10 ** draw.uniform(-2, 2) for stream in self.streams}
        while busy := [stream for stream in self.streams if stream.done < len(stream.jobs)]:
            ready = [stream for stream in busy if stream.jobs[stream.done].is_ready()]
            stream = draw.choices(ready, [speed[stream] for stream in ready])[0]
            stream.jobs[stream.done].work()
            stream.done += 1


class Stream:
    def __init__(self, gpu):
        self.gpu, self.jobs, self.done = gpu, [], 0

    def tell(self, work, is_ready=lambda: True):
        self.jobs.append(SimpleNamespace(work=work, is_ready=is_ready))

    def record_event(self):
        count = len(self.jobs)
        return lambda: self.done >= count

    def wait_event(self, event):
        self.tell(lambda: None, event)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Block:
    """Memory by its address; that on the device goes back to the allocator with its last tensor."""

    def __init__(self, freed, host):
        self.freed = [] if host else freed
        self.address = self.freed.pop() if self.freed else object()

    def __del__(self):
        self.freed.append(self.address)


class Tensor:
    device, dtype, shape, nbytes, is_cuda = "cuda:0", None, (1,), 1, True

    def __init__(self, gpu, block):
        self.gpu, self.block = gpu, block

    def detach(self):
        return Tensor(self.gpu, self.block)

    def view(self, _):
        return self.detach()

    def is_set_to(self, other):
        return self.block is other.block

    def fill_(self, value):
        memory, address = self.gpu.memory, self.block.address
        self.gpu.current.tell(lambda: memory.update({address: value}))
        return self

    def copy_(self, source, non_blocking=False):
        assert non_blocking, "the host would wait"
        memory, to, address = self.gpu.memory, self.block.address, source.block.address
        self.gpu.current.tell(lambda: memory.update({to: memory.get(address)}))

    def seen_into(self, values):
        memory, address = self.gpu.memory, self.block.address
        self.gpu.current.tell(lambda: values.append(memory.get(address)))


def misread(monkeypatch, seed):
    """Runs three steps, the second of which dies half way; says how many reads were wrong."""
    gpu = Gpu()
    monkeypatch.setattr(model.kept, "torch", gpu.torch)
    kept, wanted, seen = KeptTensors(True), [], []

    def check(layer, which, tensor):
        wanted.append((step, layer, which))
        tensor.seen_into(seen)
        # Work of the layer that reuses whatever memory is free.
        for _ in range(3):
            gpu.empty().fill_("garbage")

    for step in range(3):
        kept.clear()
        tickets = []
        for layer in range(LAYERS):
            values = [gpu.empty().fill_((step, layer, which)) for which in range(2)]
            tickets += forward(kept, [values])
            del values
            garbage = [gpu.empty().fill_("garbage") for _ in range(3)]
            del garbage
        backward(kept, tickets, check, layers=2 if step == 1 else LAYERS)
    gpu.run(seed)
    assert len(seen) == len(wanted) == 4 * (2 * LAYERS + 2)
    assert kept.host_bytes == 2 * LAYERS
    return sum(a != b for a, b in zip(seen, wanted, strict=True))


def test_copies_in_any_order_of_the_streams(monkeypatch):
    assert [misread(monkeypatch, seed) for seed in range(50)] == [0] * 50


@pytest.mark.parametrize("plant", ["copy_too_early", "given_too_early", "cleared_too_early"])
def test_a_missing_wait_is_seen(monkeypatch, plant):
    """Each of the waits that make the copies safe: without it some order gives wrong values."""
    if plant == "given_too_early":
        monkeypatch.setattr(KeptTensors, "_wait", lambda self, entry: None)
    else:
        wait_stream = Stream.wait_stream

        def forgetful(self, other):
            clears = self is self.gpu.compute
            if clears != (plant == "cleared_too_early"):
                wait_stream(self, other)

        monkeypatch.setattr(Stream, "wait_stream", forgetful)
    assert any(misread(monkeypatch, seed) for seed in range(50))


def garbage_in_freed_memory():
    for _ in range(4):
        torch.full(MEGABYTES_64, torch.nan, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["compute", "copies", "nothing"])
def test_gpu_values_whoever_is_late(late):
    """12 layers of 64 MB, three steps, the second dies half way; freed memory is overwritten."""
    kept, wrong = KeptTensors(True), torch.zeros((), device="cuda", dtype=torch.int64)

    def delay():
        streams = [kept._to_host, kept._to_device] if late == "copies" else []
        if late == "compute":
            streams.append(torch.cuda.current_stream())
        for stream in filter(None, streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)

    def value(step, layer):
        return torch.arange(2**24, device="cuda", dtype=torch.float32) + 100 * step + layer

    try:
        for step in range(3):
            kept.clear()
            tickets = []
            for layer in range(12):
                delay()
                tickets.append(kept.put(value(step, layer)))
                garbage_in_freed_memory()
            # Buffers are there: from here on nothing may make the host wait.
            torch.cuda.set_sync_debug_mode("error")
            for layer in list(reversed(range(12)))[: 6 if step == 1 else 12]:
                delay()
                tensor = kept.get(tickets[layer])
                delay()
                wrong += (tensor != value(step, layer)).sum()
                del tensor
                garbage_in_freed_memory()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wrong.item() == 0
    assert kept.host_bytes == 12 * 2**26
    assert kept.device_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_gpu_memory(offload):
    """Four tensors at once: the one made or read, the one before it, and two near ones."""
    kept, layers = KeptTensors(offload), 12
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tickets = [kept.put(torch.ones(MEGABYTES_64, device="cuda")) for _ in range(layers)]
    for ticket in reversed(tickets):
        tensor = kept.get(ticket)
    assert tensor.sum().item() == 2**24
    tensors = (torch.cuda.max_memory_allocated() - before) / 2**26
    assert tensors < 4.1 if offload else tensors >= layers
