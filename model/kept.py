"""What a layer's forward keeps for its backward: on its device, or in pinned host memory.

Offloading copies on two CUDA streams, one each way, beside the compute stream: the one that is
current where `put` and `get` are called (autograd runs a backward on its forward's stream). The
host never waits. Three rules make that safe:

- a copy starts behind all work that the compute stream was given before it;
- the compute stream waits for a copy before its tensor on the device is given or let go;
- tensors on the device are allocated and freed in the order of the compute stream alone.

So no freed memory is read or written by a copy, and a host buffer's next content is written behind
the copy that brought its last one back.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

# Tensors on the device beside those in use: the newest ones in forward, the next ones in backward.
# Two are one layer's: its input and its attention's output.
NEAR = 2


@dataclass
class _Entry:
    """One tensor: on its device, in a host buffer, or in both."""

    tensor: torch.Tensor | None
    host: torch.Tensor | None = None
    # End of the last copy, until the compute stream has waited for it.
    copied: torch.cuda.Event | None = None
    takers: int = 1


class KeptTensors:
    """What the layers' forwards keep for their backwards, on one device.

    With `offload` tensors lie in host memory, pinned where they come from a GPU, but for the newest
    two in forward and the next two in backward. Host buffers are reused by size in bytes and never
    given back, since pinning is slow. Without `offload` the tensors themselves are kept (a view
    then keeps all of its base). CPU tensors are copied at once, to ordinary memory.

    A tensor may have any shape, strides and dtype. Nobody may write to it after `put`, nor to what
    `get` gives. With `offload` one that is not contiguous takes its size once more on the device
    while it is copied.
    """

    def __init__(self, offload: bool) -> None:
        self.offload = offload
        self._device: torch.device | None = None
        self._to_host: torch.cuda.Stream | None = None
        self._to_device: torch.cuda.Stream | None = None
        # By ticket, in rising order. Tickets are never given twice: a stale one finds nothing.
        self._entries: dict[int, _Entry] = {}
        self._next_ticket = 0
        # Tickets of the last puts, oldest first, whose tensors have not left the device.
        self._newest: list[int] = []
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._host_bytes = 0

    @property
    def host_bytes(self) -> int:
        """Bytes of all host buffers, in use or free.

        PyTorch pins more where a buffer's size is no power of two: the next one.
        """
        return self._host_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of the tensors that are held on the device now."""
        return sum(e.tensor.nbytes for e in self._entries.values() if e.tensor is not None)

    def put(self, tensor: torch.Tensor) -> int:
        """Keep a tensor; return the ticket by which `get` finds it.

        One of the last two that were kept, kept again (the same memory, shape and strides), gets
        the same ticket, which can then be taken once more. ValueError for another device's tensor.
        """
        if self._device is None:
            self._device = tensor.device
            if self.offload and tensor.is_cuda:
                self._to_host = torch.cuda.Stream(tensor.device)
                self._to_device = torch.cuda.Stream(tensor.device)
        if tensor.device != self._device:
            raise ValueError(
                f"a tensor on {tensor.device} among tensors on {self._device}: legal is one device;"
                " make a KeptTensors for each"
            )
        for ticket in self._newest:
            entry = self._entries.get(ticket)
            if entry and entry.tensor.dtype == tensor.dtype and entry.tensor.is_set_to(tensor):
                entry.takers += 1
                return ticket
        # Detached: a kept tensor must not keep the graph that made it.
        entry = _Entry(tensor.detach())
        if self.offload:
            entry.host = self._buffer(entry.tensor)
            entry.copied = self._copy(entry.host, entry.tensor, self._to_host)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._entries[ticket] = entry
        self._newest.append(ticket)
        if len(self._newest) > NEAR:
            oldest = self._entries.get(self._newest.pop(0))
            if self.offload and oldest:
                self._wait(oldest)
                oldest.tensor = None
        return ticket

    def get(self, ticket: int) -> torch.Tensor:
        """The kept tensor on its device, with its shape and dtype, without gradient.

        Strides are kept only where it never left the device. Starts to bring back those kept just
        before it. After as many calls as `put` gave the ticket the tensor is forgotten and its host
        buffer free. ValueError if the ticket holds nothing.
        """
        if ticket not in self._entries:
            raise ValueError(
                f"ticket {ticket} holds no tensor; legal now: {list(self._entries)}. A ticket is"
                " taken once for each put that gave it, and not after clear(): put the tensor once"
                " for each get"
            )
        entry = self._entries[ticket]
        coming = [t for t in self._entries if t <= ticket][-1 - NEAR :]
        for earlier in reversed(coming):
            self._bring_back(self._entries[earlier])
        self._wait(entry)
        entry.takers -= 1
        if not entry.takers:
            self._forget(ticket)
        return entry.tensor

    def clear(self) -> None:
        """Forget every tensor, as at the start of a step: the one before may have died half way.

        Also to be called before an object is let go in the middle of a backward.
        """
        for stream in (self._to_host, self._to_device):
            if stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(stream)
        for ticket in list(self._entries):
            self._forget(ticket)
        self._newest.clear()

    def _bring_back(self, entry: _Entry) -> None:
        """Start the copy to the device of a tensor that has left it."""
        if entry.tensor is None:
            entry.tensor = torch.empty(
                entry.host.shape, dtype=entry.host.dtype, device=self._device
            )
            entry.copied = self._copy(entry.tensor, entry.host, self._to_device)

    def _copy(
        self, into: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream | None
    ) -> torch.cuda.Event | None:
        """Copy at once, or start to on a stream, and return the event at the copy's end."""
        if stream is None:
            into.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
        return stream.record_event()

    def _wait(self, entry: _Entry) -> None:
        """Let the compute stream wait for the entry's last copy."""
        if entry.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(entry.copied)
            entry.copied = None

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host buffer of the tensor's shape and dtype, reused if one of as many bytes is free."""
        if self._free[tensor.nbytes]:
            buffer = self._free[tensor.nbytes].pop()
        else:
            buffer = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)
            self._host_bytes += tensor.nbytes
        return buffer.view(tensor.dtype).view(tensor.shape)

    def _forget(self, ticket: int) -> None:
        """Take the entry out; its host buffer is free."""
        host = self._entries.pop(ticket).host
        if host is not None:
            self._free[host.nbytes].append(host.view(-1).view(torch.uint8))
