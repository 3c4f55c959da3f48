"""Image decoding in processes of its own, which are killed at their deadline.

A decoder in a thread cannot be stopped: an image made to be slow would keep its thread, and a few of them would end
images for everybody. Here a job that takes too long costs one process, which is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from pipelines.serving.decoder_process import READY, DecodeError, DecodeJob, receive_result
from pipelines.serving.line import Line
from tinygptv.data.conversation import ChatImage

START_S = 30.0
"""Longest start of a decoder process, in seconds."""


class DecoderBusy(Exception):
    """No decoder became free in time."""


class ImageDecoders:
    """A few decoder processes, each driven by a thread of its own; started with the first job."""

    def __init__(self, num_processes: int = 2) -> None:
        """Set the number of processes: the pixel bound times it bounds the memory."""
        self._local = threading.local()
        self._processes: set[_DecoderProcess] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="decoder")
        self._line = Line(num_processes)

    async def decode(
        self, job: DecodeJob, *, wait_s: float, timeout_s: float, client: str = ""
    ) -> ChatImage | DecodeError:
        """Decode an image.

        Args:
            job: the image and its bounds.
            wait_s: longest wait for a free decoder, in seconds.
            timeout_s: longest decoding, in seconds.
            client: whose it is; clients that wait are served in turn.

        Raises:
            DecoderBusy: no decoder became free.
            TimeoutError: decoding took too long.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._line.enter(client)
        except TimeoutError:
            raise DecoderBusy from None
        # A process may still be at the image of a caller that has left.
        future = self._threads.submit(self._decode, job, timeout_s)
        waiting = asyncio.wrap_future(future)
        try:
            await asyncio.wait({waiting}, timeout=max(0, deadline - clock()))
            if future.cancel():  # which a job that has begun refuses
                raise DecoderBusy
            return await waiting
        finally:
            waiting.cancel()  # of a caller that leaves: a job that has not begun is left out
            self._line.leave()

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._processes:
                process.kill()

    def _decode(self, job: DecodeJob, timeout_s: float) -> ChatImage | DecodeError:
        process: _DecoderProcess | None = getattr(self._local, "process", None)
        if process is None or not process.is_alive:
            process = self._local.process = _DecoderProcess()
            with self._lock:
                self._processes = {known for known in self._processes if known.is_alive} | {process}
        return process.decode(job, timeout_s)


class _DecoderProcess:
    """One process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
        paths = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.serving.decoder_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        try:
            if not self._connection.poll(START_S) or self._connection.recv_bytes() != READY:
                raise RuntimeError(f"a decoder process did not start within {START_S:g} s.")
        except (OSError, EOFError, RuntimeError):
            self.kill()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def decode(self, job: DecodeJob, timeout_s: float) -> ChatImage | DecodeError:
        try:
            self._connection.send(job)
            if not self._connection.poll(timeout_s):
                raise TimeoutError
            return receive_result(self._connection, job.image_size)
        except TimeoutError:
            self.kill()
            raise
        except (OSError, EOFError, ValueError):
            self.kill()
            return DecodeError("invalid_image", "the image ended its decoder: it is damaged, or needs too much memory.")

    def kill(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(OSError):
            self._connection.close()
        self._process.kill()
        self._process.wait()
