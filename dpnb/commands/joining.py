"""Joins the processes of one run, started once on every host by Slurm, on a TPU pod, or with JAX's variables.

The process that trains is a child of one that touches nothing: JAX ends all processes as soon as one has died, in the middle of
whatever they compute, and what remains says so in a sentence.
"""

import contextlib
import ctypes
import glob
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Mapping
from typing import Any

JOINS = "DPNB_JOINS"  # set in the process that trains
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
SHUTDOWN = 30  # seconds that one that has ended waits for the others


def find_terms(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns what `jax.distributed.initialize` has to be told here, or None if this process is the only one.

    JAX's variables come first, then a step of Slurm with several tasks, then a TPU slice of several hosts. JAX_NUM_PROCESSES=1
    means that it is alone, whatever else is set.

    Raises:
      ValueError: some of JAX's variables are missing, or are no numbers of processes.
    """
    given = {name: environment[name] for name in NAMES if environment.get(name)}
    if given.get(NAMES[1]) == "1":
        return None
    tasks, nodes = (int(environment.get(f"SLURM_STEP_NUM_{what}", 1)) for what in ("TASKS", "NODES"))
    if given and not (tasks > 1 and len(given) < len(NAMES)):
        return _of_variables(given)
    if tasks > 1:
        terms: dict[str, Any] = {"cluster_detection_method": "slurm"}
        # JAX gives each task one GPU; a task that has a host to itself gets all of them.
        if tasks == nodes and (count := environment.get("SLURM_GPUS_ON_NODE", "")).isdigit():
            terms["local_device_ids"] = list(range(int(count)))
        return terms
    return {} if len(tpu_hosts(environment)) > 1 else None


def _of_variables(given: dict[str, str]) -> dict[str, Any]:
    if missing := [name for name in NAMES if name not in given]:
        raise ValueError(f"{', '.join(NAMES)} must be set together, but {', '.join(missing)} is missing")
    address, *numbers = (given[name] for name in NAMES)
    if not all(number.isdigit() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise ValueError(
            f"JAX_PROCESS_ID must be one of 0 ... JAX_NUM_PROCESSES - 1, got {numbers[1]!r} of {numbers[0]!r}"
        )
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT of the first process, got {address!r}")
    count, rank = map(int, numbers)
    terms = dict(coordinator_address=address, num_processes=count, process_id=rank)
    return terms | {"cluster_detection_method": "deactivate"}


def tpu_hosts(environment: Mapping[str, str]) -> list[str]:
    """Returns the hosts of the TPU slice that this machine belongs to, as variables or Google Cloud say; [] elsewhere."""
    if named := environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES"):
        return named.split(",")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if not chips or "TPU_SKIP_MDS_QUERY" in environment:
        return []
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    asked = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=5) as answer:
        return answer.read().decode().split(",")
    return []


def join(terms: dict[str, Any], command: str) -> None:
    """Joins the other processes, before anything touches a device; all but process 0 are silent from then on.

    They go on to write warnings and errors, with their number before them.

    Args:
      terms: from `find_terms`.
      command: what was asked for, which must be the same everywhere.
    Raises:
      OSError: they do not find each other.
      ValueError: they were asked for different things; raised on all.
    """
    import jax

    from dpnb.training.hosts import check_same

    _end_with_its_watcher()
    sys.stdout.flush()
    said, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # libraries print as well
    # Its handler would swallow SIGTERM, by which schedulers end a process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **terms, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN
        )
    except RuntimeError as error:
        raise OSError(f"the processes must find each other, but: {str(error).splitlines()[0]}") from None
    check_same(
        "command", command, "give one command to all, or set JAX_NUM_PROCESSES=1 for runs of their own"
    )
    if rank := jax.process_index():
        os.environ["DPNB_PROGRESS"] = "plain"
        plain = warnings.formatwarning
        warnings.formatwarning = lambda *args, **more: f"process {rank}: {plain(*args, **more)}"
        return
    os.dup2(said, 1)
    kind = jax.devices()[0].device_kind
    print(f"joined: {jax.process_count()} processes, {jax.device_count()} x {kind}", flush=True)


def _end_with_its_watcher() -> None:
    """Has Linux end this process when the one that watches it is killed, so that it does not go on unseen."""
    with contextlib.suppress(OSError, AttributeError):  # not on other systems
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.environ[JOINS] != str(os.getppid()):
        raise OSError("the process that watches this one has ended")


def watch(command: list[str]) -> int:
    """Runs a command of dpnb in a child process that joins the others, and returns its exit status.

    If it did not end by itself, because it or another one died, a sentence says so, and the status is 1.
    """
    child = subprocess.Popen(command, env={**os.environ, JOINS: str(os.getpid())})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    for number in FORWARDED:
        signal.signal(number, lambda number, _: child.send_signal(number))
    status = child.wait()
    if status >= 0:
        return status
    print(
        f"dpnb: the process on {socket.gethostname()} was ended by {signal.Signals(-status).name}: it died, or another one did or "
        "never came, which ends all (above, or on the other hosts, stands why); the same command on every host goes on from the last checkpoint",
        file=sys.stderr,
    )
    return 1
