"""Hosts: how the processes of one run find each other, and how they end together.

    bigflax.start_hosts()                                           the same program on every host, before JAX is first used
    with bigflax.StopSignal() as stop:
        for batch in batches:
            state, metrics = step(state, batch)
            if stop.agreed():                                       after every step, on every host
                checkpoints.save(int(state.step), state, data=batches.state())
                sys.exit(stop.CODE)

Who the others are is found by JAX's own cluster detection: Cloud TPU (metadata server), GKE and JobSet (TPU_WORKER_ID and
TPU_WORKER_HOSTNAMES, MEGASCALE_* for several slices; JOB_COMPLETION_INDEX), Slurm, Open MPI; or it is said. Then all processes meet over a
socket of ours, where waiting in vain is an error that names who is missing; JAX, which waits next, would abort the process.

Preemption arrives as SIGTERM everywhere: Slurm, Kubernetes, and Compute Engine before it takes a machine back or maintains its host. On
several hosts JAX's coordination service passes the notice on and finds a step that none has passed yet; nothing is exchanged until then.

A host that dies outright ends the others too: with exit code 2 and a sentence where a collective fails, else, after `heartbeat` seconds
without a sign of life, with 134 (JAX aborts the process). Left out on purpose: going on with the hosts that are left. They start again.
"""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax


class Place(NamedTuple):
    """A process among the others. `devices` are those of its host that are its own; None: all."""

    coordinator: str  # ADDRESS:PORT of process 0
    processes: int
    index: int
    devices: Sequence[int] | None = None


# -- the start -------------------------------------------------------------------------------------------------------------


def start_hosts(
    *, coordinator: str | None = None, processes: int | None = None, index: int | None = None, timeout: int = 300, heartbeat: int = 100
) -> Place:
    """Joins this process to the others before JAX is first used; what is not said is found by itself on Cloud TPU, GKE and Slurm.

    On a CPU the hosts talk through gloo. Raises RuntimeError, in one sentence that names who is missing, when the others do not appear within
    `timeout` seconds; ValueError where nothing tells who they are. `heartbeat`: seconds after which a silent host counts as dead.
    """
    if jax.config.jax_platforms == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    until = time.monotonic() + timeout
    place = find(coordinator, processes, index, timeout)
    try:
        _meet(place, until)
        jax.distributed.initialize(
            *place[:3],
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(10, int(until - time.monotonic())),
            heartbeat_timeout_seconds=heartbeat,
        )
    except Exception as error:
        raise RuntimeError(
            f"process {place.index} on {socket.gethostname()} could not join {place.processes} processes at {place.coordinator} "
            f"within {timeout} s: {str(error).splitlines()[0][:200]}; start all of them, with one address and distinct indices"
        ) from None
    return place


def find(coordinator: str | None, processes: int | None, index: int | None, timeout: int) -> Place:
    """What is said, and the rest as the cluster tells it. Raises ValueError where it does not, RuntimeError after `timeout` seconds."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks, which does not say what it found

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if index is None and "JOB_COMPLETION_INDEX" in os.environ and "TPU_WORKER_ID" not in os.environ:
        index = int(os.environ["JOB_COMPLETION_INDEX"])  # a Kubernetes job on other machines than TPUs; JAX would ask its API server
    found: list[Any] = []

    def detect() -> None:
        try:
            found.extend(ClusterEnv.auto_detect_unset_distributed_params(coordinator, processes, index, None, None, timeout))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=detect, daemon=True)  # a metadata server that is not there may take minutes to be no one
    thread.start()
    thread.join(timeout)
    if not found or isinstance(found[0], Exception):
        why = " ".join(str(found[0]).split())[:200] if found else "no answer from what knows (a metadata server, or DNS)"
        raise RuntimeError(f"could not find the other hosts within {timeout} s: {why}; say --hosts=N --host=I --coordinator=ADDRESS:PORT")
    place = Place(*found)
    if None in place[:3]:
        unknown = [name for name, value in zip(("coordinator", "processes", "index"), place[:3], strict=True) if value is None]
        raise ValueError(f"nothing here tells the {' and the '.join(unknown)} of this run (no Cloud TPU, GKE, Slurm or Open MPI was found); "
                         "say --hosts=N --host=I --coordinator=ADDRESS:PORT")  # fmt: skip
    return place


def _meet(place: Place, until: float) -> None:
    """Returns when all processes are there. Process 0 keeps the door: it tells each guest who is missing whenever one has come, and "go"."""
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{place.coordinator!r} is not an ADDRESS:PORT")
    if not 0 <= place.index < place.processes:
        raise ValueError(f"there is no process {place.index} among {place.processes}")
    (_keep_door if place.index == 0 else _enter)(place, host.strip("[]"), int(port), until)


def _enter(place: Place, host: str, port: int, until: float) -> None:
    said = "process 0 does not answer"
    with _knock((host, port), until) as door, door.makefile() as lines:
        door.sendall(f"bigflax {place.index} {place.processes}\n".encode())
        with contextlib.suppress(OSError):  # time is up, or process 0 died
            while said != "go":
                door.settimeout(max(0.1, until - time.monotonic()))
                if not (line := lines.readline()):
                    break
                said = line.strip()
    if said != "go":
        raise TimeoutError(said)


def _knock(address: tuple[str, int], until: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, timeout=max(0.1, until - time.monotonic()))
        except OSError as error:
            if time.monotonic() > until:
                raise TimeoutError(f"missing: 0 ({error.strerror or error})") from None
            time.sleep(0.1)


def _keep_door(place: Place, host: str, port: int, until: float) -> None:
    both = socket.has_dualstack_ipv6()
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            with socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both) as server:
                while absent := sorted({*range(1, place.processes)} - {*here}):
                    said = f"missing: {', '.join(map(str, absent[:20]))}{' ...' * (len(absent) > 20)}"
                    _tell(here.values(), said)
                    server.settimeout(max(0.1, until - time.monotonic()))
                    try:
                        guest = stack.enter_context(server.accept()[0])
                    except TimeoutError:
                        raise TimeoutError(said) from None
                    if (index := _greet(guest, place.processes)) is not None:
                        if index in here:
                            raise ValueError(f"two processes say that they are process {index}")
                        here[index] = guest
        except Exception as error:
            _tell(here.values(), str(error))
            raise
        _tell(here.values(), "go")  # only now, when the port is free for JAX


def _greet(guest: socket.socket, processes: int) -> int | None:
    """The index that a guest gives; None for whoever else knocks at a port. Raises ValueError where it expects other hosts."""
    guest.settimeout(5)
    try:
        with guest.makefile() as lines:
            name, index, count = lines.readline(100).split()
        index, count = int(index), int(count)
    except (OSError, ValueError):
        return None
    if name != "bigflax":
        return None
    if count != processes:
        said = f"process {index} counts {count} processes, process 0 {processes}"
        _tell([guest], said)
        raise ValueError(said)
    return index


def _tell(guests: Iterable[socket.socket], said: str) -> None:
    for guest in guests:
        with contextlib.suppress(OSError):  # whoever left will be missed by JAX
            guest.sendall(f"{said}\n".encode())


# -- the end ---------------------------------------------------------------------------------------------------------------


class StopSignal:
    """Between `with` and its end, SIGTERM and SIGINT (Ctrl-C) to any host ask all of them to stop after one and the same step.

    `received` is the name of a signal that came to this process, `stopped` whether the hosts have agreed to stop. One host stops after the
    running step, and a second signal ends it at once. Several stop a second or so later: SIGTERM is JAX's own there, which looks for it
    once a second; one that came after `start_hosts` and before the first step counts. `agreed` must be called equally often everywhere, so
    call it after every step: it costs microseconds and no collective. A handler that Python sets for SIGTERM takes the place of JAX's.
    """

    CODE = 75  # EX_TEMPFAIL: "start me again", for a launcher that restarts
    _calls = itertools.count(1)  # of this process: JAX finds the hosts' common step by comparing them, and they must never fall

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopped = False

    def __enter__(self) -> "StopSignal":
        self._several = jax.process_count() > 1
        mine = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._receive) for number in mine}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if self._several:
            signal.raise_signal(signal.SIGTERM)  # JAX's handler, in C++, tells the others

    def agreed(self) -> bool:
        """True after the step at which all hosts stop, and from then on."""
        if self._several:
            from jax.experimental import multihost_utils

            self.stopped |= multihost_utils.reached_preemption_sync_point(next(self._calls))
        else:
            self.stopped = self.received is not None
        return self.stopped
