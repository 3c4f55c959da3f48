"""Machines under a desk, for tests: an SSH server at each of several loopback addresses, with a disk of its own.

Each is a process tree in mount and process namespaces (``tests.private_nodes``), whose only way in is SSH with a key
that the test makes. Needs root, OpenSSH's server and rsync: ``why_not`` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests import private_nodes

_SSHD = "/usr/sbin/sshd"


def why_not() -> str:
    """Why such machines cannot be made here; empty where they can."""
    missing = [name for name in ("ssh", "ssh-keygen", "rsync") if shutil.which(name) is None]
    if missing or not Path(_SSHD).is_file():
        return f"missing: {', '.join([*missing, *([] if Path(_SSHD).is_file() else ['sshd'])])}"
    if os.geteuid() != 0:
        return "an SSH server at port 22 needs root"
    return private_nodes.why_not()


def make_key(path: Path) -> Path:
    """A key pair without a passphrase; the public half is ``path.pub``."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def _write_server_files(folder: Path, address: str, authorized: Path) -> None:
    """The server's files in the machine's own ``/tmp/ssh``: other folders of the test may be hidden from it."""
    folder.mkdir(parents=True)
    make_key(folder / "host_key")
    shutil.copy(authorized, folder / "authorized_keys")
    (folder / "passwd").write_text(
        "root:x:0:0:root:/tmp/home:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    lines = {
        "ListenAddress": f"{address}:22",
        "HostKey": "/tmp/ssh/host_key",
        "AuthorizedKeysFile": "/tmp/ssh/authorized_keys",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "MaxStartups": "50",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))


def _answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


@contextlib.contextmanager
def ssh_machines(folder: Path, addresses: tuple[str, ...], key: Path) -> Iterator[list[Path]]:
    """Machines that accept the key at ``root@ADDRESS``; their home folders. They end with the block."""
    processes: list[subprocess.Popen[bytes]] = []
    homes = []
    try:
        for address in addresses:
            own = folder / address
            (own / "tmp/home").mkdir(parents=True)
            (own / "tmp").chmod(0o1777)
            homes.append(own / "tmp/home")
            _write_server_files(own / "tmp/ssh", address, key.with_suffix(".pub"))
            before = ("mount --bind /tmp/ssh/passwd /etc/passwd", "mkdir -p /run/sshd")
            command = private_nodes.enter(own, [_SSHD, "-D", "-e", "-f", "/tmp/ssh/sshd_config"], before)
            with (own / "sshd.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
                )
            deadline = time.monotonic() + 60
            while not _answers(address):
                assert processes[-1].poll() is None and time.monotonic() < deadline, (own / "sshd.log").read_text()
                time.sleep(0.2)
        yield homes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
