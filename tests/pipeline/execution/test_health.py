"""A cluster whose GCS or raylet has died is noticed; one that is only slow, or stopped for a while, is not given up."""

import socket

import pytest

from pipeline.execution.health import ClusterHealth
from schemas import MachineError


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch):
    """A socket that listens and never answers, as that of a stopped process does."""
    monkeypatch.setattr("pipeline.execution.health.CHECK_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_process_that_listens_is_alive_though_it_is_stopped(port: socket.socket):
    health = ClusterHealth({"raylet": port.getsockname()}, patience=0.0)
    for _ in range(3):
        health.check()


def test_a_process_whose_port_is_closed_has_ended(port: socket.socket):
    """The message names it, and is an error of a machine: the command that resumes is printed with it."""
    health = ClusterHealth({"raylet": port.getsockname()}, patience=0.0)
    port.close()
    with pytest.raises(MachineError, match=r"raylet has ended: nothing answers at 127\.0\.0\.1:\d+"):
        health.check()


def test_a_network_that_comes_back_in_time_is_forgiven(port: socket.socket):
    address = port.getsockname()
    health = ClusterHealth({"GCS": address}, patience=60.0)
    port.close()
    for _ in range(3):
        health.check()
    with socket.create_server(address):
        health.check()
        assert health.lost == {}
