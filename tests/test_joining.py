"""Where `dpnb run` finds the other processes of a run; that they train together is in test_imagenet_notebooks.py."""

import contextlib
import http.server
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import shared_runs

from dpnb import cli
from dpnb.commands import joining

JAX = {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}


def test_nothing_is_joined_alone():
    alone = {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    batch = {
        name: value for name, value in SLURM.items() if "STEP" not in name
    }  # of `sbatch`, outside of `srun`
    one = {**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    own = {**SLURM, "JAX_NUM_PROCESSES": "1"}  # a run of its own among others
    for environment in ({}, own, alone, batch, one, {"TPU_WORKER_HOSTNAMES": "localhost"}):
        assert joining.find_terms(environment) is None


def test_jax_variables_say_it_all():
    expected = {"coordinator_address": "host0:1234", "num_processes": 4, "process_id": 2}
    assert joining.find_terms(JAX | SLURM) == expected | {"cluster_detection_method": "deactivate"}


@pytest.mark.parametrize("missing", JAX)
def test_jax_variables_are_set_together(missing):
    given = {name: value for name, value in JAX.items() if name != missing}
    with pytest.raises(ValueError, match=f"must be set together, but {missing} is missing"):
        joining.find_terms(given)


@pytest.mark.parametrize("count, rank", [("4", "4"), ("four", "0"), ("4", "-1"), ("0", "0")])
def test_the_number_of_a_process_is_one_of_them(count, rank):
    with pytest.raises(ValueError, match="must be one of 0"):
        joining.find_terms({**JAX, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": rank})


@pytest.mark.parametrize("address", ["host0", "host0:", "host0:x"])
def test_the_first_process_has_a_port(address):
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        joining.find_terms({**JAX, "JAX_COORDINATOR_ADDRESS": address})


def test_slurm_gives_a_gpu_to_each_task_and_all_to_one_that_has_the_host():
    assert joining.find_terms(SLURM) == {"cluster_detection_method": "slurm"}
    hosts = joining.find_terms({**SLURM, "SLURM_STEP_NUM_TASKS": "2"})
    assert hosts == {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2, 3]}
    without = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_GPUS_ON_NODE": ""}
    assert joining.find_terms(without) == {"cluster_detection_method": "slurm"}
    mixed = {**SLURM, "JAX_COORDINATOR_ADDRESS": "host0:1234"}  # which JAX takes, and the rest from Slurm
    assert joining.find_terms(mixed) == {"cluster_detection_method": "slurm"}


@contextlib.contextmanager
def metadata_server(answer):
    """Says of every attribute what Google Cloud's server would say of the hosts of a TPU slice."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Metadata-Flavor"] == "Google" and answer
            known = known and self.path.endswith("/instance/attributes/worker-network-endpoints")
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answer.encode() if known else b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        finally:
            server.shutdown()


def test_a_tpu_slice_is_known_by_variables_or_by_google_cloud(monkeypatch):
    assert joining.find_terms({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3"}) == {}
    with metadata_server("unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2") as pod:
        assert joining.find_terms(pod) is None  # there are no chips here, so nobody is asked
        monkeypatch.setattr(joining.glob, "glob", lambda pattern: ["/dev/accel0"])
        assert joining.find_terms(pod) == {}
        assert joining.find_terms({**pod, "TPU_SKIP_MDS_QUERY": "1"}) is None
    with metadata_server("unknown:unknown:10.0.0.1") as single:
        assert joining.find_terms(single) is None
    with metadata_server("") as elsewhere:
        assert joining.find_terms(elsewhere) is None
    assert joining.find_terms({"GCE_METADATA_IP": "127.0.0.1:9"}) is None  # nobody answers


def test_a_run_with_others_is_watched_and_a_refusal_comes_at_once(monkeypatch, capsys):
    for name, value in JAX.items():
        monkeypatch.setenv(name, value)
    watched = []
    monkeypatch.setattr(joining, "watch", lambda command: watched.append(command) or 7)
    assert cli.main(["run", "digits/demo/eps1", "--seed", "3"]) == 7
    (command,) = watched
    assert command[:2] == [sys.executable, "-c"] and command[3:] == ["run", "digits/demo/eps1", "--seed", "3"]
    assert f"sys.path[:] = {sys.path!r}; from dpnb.cli import main" in command[2]
    assert cli.main(["list", "digits/*"]) == 0  # which needs no others
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert cli.main(["run", "digits/demo/eps1"]) == 2
    assert "JAX_PROCESS_ID is missing" in capsys.readouterr().err


WATCHED = "import os, signal, time; print(os.getpid(), flush=True); {}"


@pytest.mark.parametrize("does, status, said", [
    ("raise SystemExit(3)", 3, ""),
    ("os.kill(os.getpid(), signal.SIGABRT)", 1, "ended by SIGABRT"),
    ("time.sleep(100)", 1, "ended by SIGUSR1"),  # which is passed on
])  # fmt: skip
def test_the_watcher_has_the_last_word(does, status, said):
    program = f"import sys; from dpnb.commands.joining import watch; sys.exit(watch([sys.executable, '-c', {WATCHED.format(does)!r}]))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    watcher = subprocess.Popen([sys.executable, "-c", program], env=shared_runs.environment(), **pipes)
    watcher.stdout.readline()  # the watched one runs
    if "sleep" in does:
        watcher.send_signal(signal.SIGUSR1)
    _, errors = watcher.communicate(timeout=60)
    assert watcher.returncode == status
    assert (said in errors and "goes on from the last checkpoint" in errors) if said else not errors


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent")
def test_who_is_watched_does_not_outlive_the_watcher():
    alone = "from dpnb.commands import joining; joining._end_with_its_watcher()"
    inner = f"{alone}; {WATCHED.format('time.sleep(100)')}"
    program = f"import sys; from dpnb.commands.joining import watch; watch([sys.executable, '-c', {inner!r}])"
    watcher = subprocess.Popen(
        [sys.executable, "-c", program], env=shared_runs.environment(), stdout=subprocess.PIPE, text=True
    )
    number = int(watcher.stdout.readline())
    watcher.kill()
    watcher.wait()
    late = time.monotonic() + 20
    while pathlib.Path(f"/proc/{number}/stat").exists() and time.monotonic() < late:
        time.sleep(0.05)
    assert (
        not pathlib.Path(f"/proc/{number}").exists()
        or pathlib.Path(f"/proc/{number}/stat").read_text().split()[2] == "Z"
    )
    done = shared_runs.python("-c", alone, **{joining.JOINS: "1"})
    assert done.returncode and "the process that watches this one has ended" in done.stderr
