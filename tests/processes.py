"""Processes of one run, as torchrun would start them, but forked: nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    with log.open("w") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    code = 0
    try:
        work(rank, *arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Processes:
    """`size` processes that each call `work(rank, *arguments)`, with what they print in files of a folder."""

    def __init__(self, size: int, work: Callable[..., Any], *arguments: Any, logs: Path) -> None:
        context, port = multiprocessing.get_context("fork"), _port()
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"process-{rank}.txt" for rank in range(size)]
        self.every = [
            context.Process(target=_child, args=(rank, size, port, work, arguments, self.logs[rank]))
            for rank in range(size)
        ]
        for process in self.every:
            process.start()

    def said(self, rank: int) -> str:
        """What a process printed."""
        return self.logs[rank].read_text()

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; those still running after the time are killed, with code -9."""
        for process in self.every:
            process.join(timeout)
        for process in self.every:
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode or 0 for process in self.every]

    def succeed(self, timeout: float = 120) -> None:
        """Wait for them, and fail with what they printed unless all end well."""
        codes = self.wait(timeout)
        assert not any(codes), f"{codes}\n" + "\n".join(f"-- {k}\n{self.said(k)[-3000:]}" for k in range(len(codes)))
