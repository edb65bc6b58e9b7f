"""Hosts for tests: network namespaces on one machine, each with an address of its own, joined by a switch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = 29531


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def reason_against() -> str | None:
    """The reason why no hosts can be made here; None where they can."""
    try:
        with network(1):
            return None
    except FileNotFoundError:
        return "no `ip` command"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {error.stderr.strip()}"


class Network:
    """Hosts by number, from 0."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started: list[subprocess.Popen] = []

    def start(self, host: int, *command: str, **environment: str) -> subprocess.Popen:
        """Starts `python -m COMMAND` on a host."""
        shared = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"{self.name}{host}", sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | shared | environment,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def cut(self, host: int) -> None:
        """Takes a host's cable out."""
        ip("-n", f"{self.name}switch", "link", "set", f"port{host}", "down")

    def join(self, host: int) -> None:
        ip("-n", f"{self.name}switch", "link", "set", f"port{host}", "up")

    def kill(self, host: int) -> None:
        """Takes a host's power: all its processes end, and nobody closes a connection."""
        self.cut(host)
        found = subprocess.run(
            ["ip", "netns", "pids", f"{self.name}{host}"], capture_output=True, text=True, check=True
        )
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def network(count: int) -> Iterator[Network]:
    """Hosts that reach each other until the block ends."""
    made = Network(f"hfpipe{os.getpid() % 10000}x")
    switch = f"{made.name}switch"
    names = [switch, *(f"{made.name}{host}" for host in range(count))]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in range(count):
            own = f"{made.name}{host}"
            ip("-n", switch, "link", "add", f"port{host}", "type", "veth", "peer", "name", "eth0", "netns", own)
            ip("-n", switch, "link", "set", f"port{host}", "master", "switch", "up")
            ip("-n", own, "address", "add", f"{address(host)}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")
        yield made
    finally:
        for process in made.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def wait_for(condition: object, process: subprocess.Popen, seconds: float = 200) -> None:
    """Waits until a condition holds, while a process runs."""
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def exit_code(run: Path) -> int:
    return int((run / "exit_code").read_text())
