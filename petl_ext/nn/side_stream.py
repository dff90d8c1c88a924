"""Work of a layer that runs beside the module which it joins, on a CUDA stream of its own."""

import torch


def side_stream_on(device):
    """A `SideStream`, or None where the device is no GPU."""
    return SideStream(device) if device.type == "cuda" else None


class SideStream:
    """A stream that leaves the current one to queue work beside it, and is waited for where that work is needed."""

    def __init__(self, device):
        self._stream = torch.cuda.Stream(device)

    def queue(self, work):
        """Calls `work`, which queues into this stream what may begin as soon as the current stream is here.

        Tensors that it reads must be kept until `wait`, which must follow, since no capture may end with a stream that
        has not come back; where `work` returns None, it has followed.

        Returns:
            What it returns; None, without a call, where no CUDA graph is being captured: the host would take longer to
            queue into two streams than the device saves.
        """
        if not torch.cuda.is_current_stream_capturing():
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            found = work()
        if found is None:
            self.wait()
        return found

    def wait(self):
        """What the current stream does next comes behind all that was queued here."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
