"""Google Cloud in a folder: what `gcloud`, `kubectl` and the programs on a TPU machine are while tests/test_tpu_scripts.py runs.

As `gcloud` it knows the commands and flags below and refuses others, as the real one does; it records each call in
$STUB_CLOUD/calls.jsonl, keeps its resources in state.json beside it, and buckets and the machines' home folders as folders.
state.json also says what goes wrong: see `FAULTS`. On the machines `uv` and `bigflax` are stubs too. Not a test.
"""

import fcntl
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

COMMANDS = {  # of Google Cloud SDK 528, without those that the scripts have no use for
    "compute tpus queued-resources create": {"accelerator-type", "node-count", "node-id", "node-prefix", "reserved", "runtime-version",
                                             "scopes", "spot", "valid-until-duration", "zone"},
    "compute tpus queued-resources delete": {"force", "zone"},
    "compute tpus queued-resources describe": {"zone"},
    "compute tpus tpu-vm describe": {"zone"},
    "compute tpus tpu-vm ssh": {"command", "worker", "zone"},
    "storage cat": set(),
    "storage cp": set(),
    "storage ls": {"long"},
}  # fmt: skip
WIDE = {"quiet", "project", "format", "flatten"}  # of every command
FAULTS = {
    "lives": [["ACTIVE"]],  # the states of each slice: a look takes one and the last stays; the last slice is every later one's model
    "create": [],  # complaints of the next calls that create
    "describe": [],  # and of those that look; "" is none
    "slow": 0,  # seconds that looking takes
    "silent": [],  # workers that SSH does not reach
    "agent": False,  # the ssh-agent lacks the key, which gcloud asks for where it talks to several workers
    "preempted": False,  # machines are gone, and their slice does not say so yet
    "readonly": False,  # machines cannot write to buckets
    "install": [],  # exit codes of the next calls of `uv pip`, over all machines
    "training": ["0"],  # how each start ends: an exit code, or "run" until SIGTERM; "137|2" is worker 0's and 1's; the last stays
    "workers": 2,
}

HERE = os.environ.get("STUB_CLOUD", "")


class Failure(Exception):
    pass


class State:
    """state.json, locked while it is open."""

    def __init__(self, folder=HERE):
        self.path = f"{folder}/state.json"

    def __enter__(self):
        self.lock = open(f"{self.path}.lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.values = {**FAULTS, "born": 0, "slice": None}
        if os.path.exists(self.path):
            with open(self.path) as file:
                self.values |= json.load(file)
        return self.values

    def __exit__(self, *_):
        with open(self.path, "w") as file:
            json.dump(self.values, file)
        self.lock.close()


def program(path, name):
    """Makes `path` a program that is this file as `name`."""
    with open(path, "w") as file:
        file.write(f'#!/bin/bash\nexec {sys.executable} -IS {os.path.realpath(__file__)} {name} "$@"\n')
    os.chmod(path, 0o755)


def following(states):
    """The next of a list, whose last stays."""
    return states.pop(0) if len(states) > 1 else states[0]


def gcloud(words):
    command = next((c for c in COMMANDS if words[: len(c.split())] == c.split()), None)
    if command is None:
        raise Failure(f"ERROR: (gcloud) Invalid choice: {' '.join(words)!r}.")
    flags, names = {}, []
    for word in words[len(command.split()) :]:
        name, _, value = word[2:].partition("=")
        if not word.startswith("--"):
            names.append(word)
        elif name not in COMMANDS[command] | WIDE:
            raise Failure(f"ERROR: (gcloud.{command.replace(' ', '.')}) unrecognized arguments: {word}")
        else:
            flags[name] = value
    return {
        "compute tpus queued-resources create": create,
        "compute tpus queued-resources delete": delete,
        "compute tpus queued-resources describe": describe,
        "compute tpus tpu-vm describe": describe_node,
        "compute tpus tpu-vm ssh": ssh,
        "storage cat": cat,
        "storage cp": cp,
        "storage ls": ls,
    }[command](*names, flags=flags)


def missing(name):
    return Failure(f"ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found")


def create(name, *, flags):
    with State() as values:
        if values["create"] and (text := values["create"].pop(0)):
            raise Failure(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {text}")
        if values["slice"]:
            raise Failure("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource already exists")
        assert ("node-id" in flags) != ("node-count" in flags)
        nodes = [flags["node-id"]] if "node-id" in flags else [f"{flags['node-prefix']}-{i}" for i in range(int(flags["node-count"]))]
        values["slice"] = {"name": name, "nodes": nodes, "states": following(values["lives"]), "state": "ACCEPTED"}
        values["born"] += 1
        for node in nodes:
            for worker in range(values["workers"]):
                os.makedirs(f"{HERE}/machines/{values['born']}/{node}/{worker}")


def delete(name, *, flags):
    assert "force" in flags
    with State() as values:
        if not values["slice"]:
            raise missing(name)
        shut_down(values)
        values["slice"] = None


def shut_down(values):
    """The machines of the slice stop, their processes by SIGTERM first, as preempted ones do."""
    for pid in trainings(f"{HERE}/machines/{values['born']}"):
        os.kill(pid, signal.SIGTERM)


def trainings(root):
    """The process ids of `bigflax` on all machines below `root`."""
    return [pid for place, _, files in os.walk(root) if "code" in files and (pid := training(place))]


def training(place):
    """The process of the `bigflax` that runs on a machine, or None. One that is about to start is waited for until it heeds SIGTERM: on a busy machine
    a signal would else come before there is a process, or end it before it could save."""
    for _ in range(1000):
        if said(f"{place}/code") != "lost":
            return None
        if pid := said(f"{place}/pid"):
            status = said(f"/proc/{pid}/status")
            if not status:
                return None  # it has ended, and its code is not written yet
            caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
            if os.path.realpath(__file__) in said(f"/proc/{pid}/cmdline") and caught >> (signal.SIGTERM - 1) & 1:
                return int(pid)
        time.sleep(0.02)
    return None


def said(path):
    """What a file holds; nothing where there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def describe(name, *, flags):
    with State() as values:
        if values["describe"] and (text := values["describe"].pop(0)):
            raise Failure(f"ERROR: (gcloud.compute.tpus.queued-resources.describe) {text}")
        if not values["slice"]:
            raise missing(name)
        slice_ = values["slice"]
        if "failedData" in flags["format"]:
            return print("There is no more capacity in the zone")
        slice_["state"] = following(slice_["states"])
        if slice_["state"] in ("SUSPENDING", "SUSPENDED"):
            shut_down(values)
        print(slice_["state"])
    time.sleep(values["slow"])


def living(node, values):
    if not values["slice"] or node not in values["slice"]["nodes"]:
        raise missing(node)
    if values["preempted"]:
        values["slice"]["states"] = ["SUSPENDED"]
    return "PREEMPTED" if values["preempted"] or values["slice"]["state"] != "ACTIVE" else "READY"


def describe_node(node, *, flags):
    assert flags["flatten"] == "networkEndpoints[]"
    with State() as values:
        state = living(node, values)
        for worker in range(values["workers"]):
            print(state, f"10.0.0.{worker}", sep="\t")


def ssh(node, *, flags):
    with State() as values:
        state = living(node, values)
        silent, life, count = values["silent"], values["born"], values["workers"]
        if values["agent"] and flags["worker"] == "all":
            raise Failure(
                'ERROR: (gcloud) SSH Key is not present in the SSH agent. Please run "ssh-add /home/u/.ssh/google_compute_engine" to add it.'
            )
        if state == "PREEMPTED":
            values["preempted"] = False  # from now on the slice says so itself
    if state != "READY":
        raise Failure(f'ERROR: (gcloud.compute.tpus.tpu-vm.ssh) This TPU has terminal state "{state}", so it cannot be used anymore.')
    failed = 0
    for worker in range(count) if flags["worker"] == "all" else [int(flags["worker"])]:
        if worker in silent:
            print(f"SSH: Attempting to connect to worker {worker}...\n[/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
            failed = 255
            continue
        env = {**os.environ, "HOME": f"{HERE}/machines/{life}/{node}/{worker}", "STUB_HOST": f"t1v-n-{life}{node[-1]}-w-{worker}"}
        code = subprocess.run(["bash", "-c", flags["command"]], env=env, cwd=env["HOME"], stdin=subprocess.DEVNULL).returncode
        failed = failed or code
    sys.exit(failed)


def local(url):
    if not url.startswith("gs://"):
        return url
    bucket = url.removeprefix("gs://").partition("/")[0]
    if not os.path.isdir(f"{HERE}/buckets/{bucket}"):
        raise Failure(f"ERROR: (gcloud.storage) gs://{bucket} not found: 404.")
    return f"{HERE}/buckets/{url.removeprefix('gs://')}"


def found(url):
    path = local(url)
    root = path.partition("*")[0].rpartition("/")[0] or "."
    files = [os.path.join(place, name) for place, _, names in os.walk(root) for name in names] if "*" in path else [path]
    files = sorted(file for file in files if fnmatch.fnmatch(file, path) and os.path.isfile(file))
    if not files:
        raise Failure("ERROR: (gcloud.storage) The following URLs matched no objects or files:\n" + url)
    return files


def cp(*urls, flags):
    target = local(urls[-1])
    with State() as values:
        if values["readonly"] and target != urls[-1] and os.environ["STUB_HOST"] != "laptop":
            raise Failure("ERROR: (gcloud.storage.cp) [1-compute@developer.gserviceaccount.com] does not have permission: 403")
    for file in [file for url in urls[:-1] for file in found(url)]:
        into = os.path.join(target, os.path.basename(file)) if urls[-1].endswith("/") or os.path.isdir(target) else target
        os.makedirs(os.path.dirname(into) or ".", exist_ok=True)
        shutil.copyfile(file, into)


def cat(url, *, flags):
    with open(found(url)[0]) as file:
        print(file.read(), end="")


def ls(url, *, flags):
    if url.count("/") == 2:
        local(url)
        return
    for file in found(url):
        name, at = f"gs://{file.removeprefix(HERE + '/buckets/')}", time.strftime("%FT%TZ", time.gmtime(os.path.getmtime(file)))
        print(f"{os.path.getsize(file):>10}  {at}  {name}" if "long" in flags else name)


def uv(words):
    if words[0] == "venv":
        os.makedirs("venv/bin")
        for name in ("python", "bigflax"):
            program(f"venv/bin/{name}", name)
        return
    with State() as values:
        code = values["install"].pop(0) if values["install"] else "0"
    if code != "0":
        print("error: Failed to fetch: `https://pypi.org/simple/jax/`", file=sys.stderr)
    sys.exit(int(code))


def bigflax(words):
    if words == ["--version"]:
        return print("bigflax 0.1.0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    with State() as values:
        starts = values.setdefault("starts", {})
        host = os.environ["STUB_HOST"].rpartition("-")[2]
        starts[host] = starts.get(host, 0) + 1
        how = (values["training"][min(starts[host], len(values["training"])) - 1].split("|") * 9)[int(host) if host.isdigit() else 0]
    print(f"start {starts[host]} of worker {host}", flush=True)
    while how == "run":
        time.sleep(0.05)
    if how == "2":
        print("bigflax: unknown key 'model.hiden_size'; did you mean 'hidden_size'?")
    sys.exit(int(how))


def kubectl(words):
    with open(f"{HERE}/applied", "w") as file:
        file.write(sys.stdin.read())
    with State() as values:
        if values["create"]:
            raise Failure(values["create"].pop(0))


PROGRAMS = {
    "gcloud": gcloud,
    "kubectl": kubectl,
    "uv": uv,
    "bigflax": bigflax,
    "hostname": lambda words: print(os.environ["STUB_HOST"]),
    "xpk": lambda words: None,
    "srun": lambda words: sys.exit(int(os.environ["STUB_CODE"])),
    "scontrol": lambda words: None,
}


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    with open(f"{HERE}/calls.jsonl", "a") as calls:
        calls.write(json.dumps([os.environ["STUB_HOST"], name, *words]) + "\n")
    try:
        PROGRAMS[name](words)
    except Failure as failure:
        print(failure, file=sys.stderr)
        sys.exit(1)
