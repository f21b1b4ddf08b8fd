"""launch/: the scripts run against tools that only record what they are asked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hovle_jax.cli import main as cli
from hovle_jax.data.tokenizer import IM_END, IMG_CONTEXT, IMG_END, IMG_START, train_tokenizer
from hovle_jax.tpu.chips import CHIPS, OPTIONS
from tests.conftest import write_meta

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Sourced, or with the arguments of another program.
OTHERS = ("run.sh", "slice.sh", "venv.sh", "demo.sh", "test.sh")
MANIFESTS = ("jobset.yaml", "kueue.yaml", "cluster.yaml", "sky.yaml")
SETTINGS = {
    "RUNS": "/bucket/runs",
    "MODEL": "tiny",
    "TOKENIZER": "/bucket/tokenizer",
    "LLM": "/bucket/llm",
    "TEACHER": "/bucket/teacher",
    "IMAGES": "/bucket/a /bucket/b",
    "ALIGN": "/bucket/align.json",
    "INSTRUCT": "/bucket/instruct.json",
    "ARGS2": "--config.data.rows=64 --config.seed=5",
}

RECORDER = """#!/usr/bin/env bash
# Writes down how it was called, then does what ON_<NAME> says.
{ printf '%s ' "$(basename "$0")"; printf '%q ' "$@"; echo; } >>"$CALLS"
name=ON_$(basename "$0")
eval "${!name:-}"
"""


class Tools:
    """A PATH on which `names` only record their calls, and a way to run scripts with it."""

    def __init__(self, directory: Path, *names: str):
        self.directory, self._calls = directory, directory / "calls"
        (directory / "bin").mkdir()
        for name in names:
            tool = directory / "bin" / name
            tool.write_text(RECORDER)
            tool.chmod(0o755)
        self._calls.touch()
        path = f"{directory / 'bin'}:{os.environ['PATH']}"
        self.env = {"PATH": path, "CALLS": str(self._calls), "HOME": str(directory), "POLL": "0"}

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in self._calls.read_text().splitlines()]

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", f"launch/{command[0]}", *command[1:]],
            cwd=ROOT,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def tools(tmp_path: Path) -> Callable[..., Tools]:
    return lambda *names: Tools(tmp_path, *names)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "run.env"
    path.write_text("# a comment\n\n" + "".join(f"{k}={v}\n" for k, v in SETTINGS.items()))
    return path


def lint(tool: str, *arguments: str) -> None:
    found = shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"no {tool}: pip install '.[test]'")
    done = subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_are_clean():
    lint("shellcheck", "-x", "-P", "SCRIPTDIR", *(f"launch/{p.name}" for p in SCRIPTS))


def test_manifests_are_clean():
    rules = "document-start: disable, line-length: {max: 110}"
    rules += ", comments: {min-spaces-from-content: 1}"
    config = f"{{extends: default, rules: {{{rules}}}}}"
    lint("yamllint", "--strict", "-d", config, *(f"launch/{name}" for name in MANIFESTS))


def test_dockerfile_is_clean():
    lint("hadolint", "launch/Dockerfile")


def test_the_image_has_all_that_configs_name():
    """configs/stage2_late.py's stage is a file of examples/."""
    copied = re.findall(r"^COPY (\w+) \1$", (LAUNCH / "Dockerfile").read_text(), flags=re.M)
    kept = re.findall(r"^!(\w+)$", (LAUNCH / "Dockerfile.dockerignore").read_text(), flags=re.M)
    assert copied == [name for name in kept if name != "LICENSE"]
    for path in (ROOT / "configs").glob("stage*.py"):
        plugins = cli.load_config(str(path)).model.plugins
        assert {Path(p).relative_to(ROOT).parts[0] for p in plugins} <= {*copied}


def test_files_are_short_and_in_the_readme():
    readme = (LAUNCH / "README.md").read_text()
    for path in [p for p in LAUNCH.iterdir() if p.is_file() and p.name != "README.md"]:
        assert len(path.read_text().splitlines()) < 100, path.name
        assert path.name in readme, f"{path.name} is not in launch/README.md"


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.name not in OTHERS], ids=lambda p: p.name)
def test_help_says_how(tools, path):
    done = tools().run(path.name, "--help")
    assert done.returncode == 0 and f"{path.name} " in done.stdout
    assert not done.stdout.startswith("#") and "set -" not in done.stdout


# What Google calls slices. Sources: see slice.sh.
@pytest.mark.parametrize(
    "topology, expected",
    [
        ("v4:2x2x4", "v4-32 tpu-ubuntu2204-base tpu-v4-podslice ct4p-hightpu-4t 4 hosts"),
        (
            "v5e:4x4",
            "v5litepod-16 v2-alpha-tpuv5-lite tpu-v5-lite-podslice ct5lp-hightpu-4t 4 hosts",
        ),
        (
            "v5e:2x4",
            "v5litepod-8 v2-alpha-tpuv5-lite tpu-v5-lite-podslice ct5lp-hightpu-8t 1 hosts",
        ),
        ("v5p:4x4x8", "v5p-256 v2-alpha-tpuv5 tpu-v5p-slice ct5p-hightpu-4t 32 hosts"),
        ("v6e:16x16", "v6e-256 v2-alpha-tpuv6e tpu-v6e-slice ct6e-standard-4t 64 hosts"),
        ("tpu7x:4x4x4", "tpu7x-4x4x4  tpu7x tpu7x-standard-4t 16 hosts"),
    ],
)
def test_slice_names(topology, expected):
    show = 'echo "$ACCELERATOR_TYPE $RUNTIME $GKE $MACHINE $HOSTS hosts"'
    script = f"source launch/run.sh; source launch/slice.sh; slice {topology}; {show}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("topology", ["", "v5e", "v5e:4", "v9:4x4", "v5e:3x3"])
def test_a_wrong_topology_is_named(tools, topology):
    done = tools("kubectl").run("gke.sh", topology, "--queue")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "topology" in done.stderr or "no chip v9" in done.stderr


@pytest.mark.parametrize("chip", CHIPS)
def test_environment_files_agree_with_the_options_of_the_compiler(chip):
    text = (LAUNCH / "env" / f"{chip}.env").read_text()
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    for option in OPTIONS[chip]:
        assert f"{option.name}={option.value} {option.reason}" in re.sub(r"\s+", " ", comments)
    explained = {o.name for o in OPTIONS[chip]}
    assert set(re.findall(r"\bxla_\w+(?==)", comments)) == explained
    values = dict(x.split("=", 1) for x in text.splitlines() if x and not x.startswith("#"))
    assert values["JAX_PLATFORMS"].startswith("tpu")
    flags = re.findall(r"--(\w+)=", values["LIBTPU_INIT_ARGS"])
    assert flags and all(flag in comments for flag in flags)
    assert not explained & set(flags), "chips.py hands these to jit"


# --- stages.sh


def stages_env(settings: Path, tmp_path: Path, **more: str) -> dict[str, str]:
    return {"SETTINGS": str(settings), "RUNS": str(tmp_path / "runs")} | more


def stage_of(call: list[str]) -> str:
    return next(x for x in call if x.startswith("--workdir="))[-1]


def test_stages_go_on_where_they_stopped(tools, settings, tmp_path):
    fake = tools("hovle")
    preempted = "case $(wc -l <$CALLS) in 2 | 3) exit 75 ;; esac"  # both of stage II
    env = stages_env(settings, tmp_path, ON_hovle=preempted)
    done = fake.run("stages.sh", **env)
    assert done.returncode == 0, done.stderr
    assert [stage_of(call) for call in fake.calls] == ["1", "2", "2", "2", "3"]
    assert fake.calls[1] == fake.calls[2] == fake.calls[3]
    assert "--config.data.rows=64" in fake.calls[1]
    assert "--config.data.rows=64" not in fake.calls[4]
    assert f"--config.init.previous={tmp_path}/runs/stage2" in fake.calls[4]

    assert fake.run("stages.sh", **env).returncode == 0
    assert len(fake.calls) == 5, "finished stages are not run again"
    fake.run("stages.sh", **env | {"STAGES": "3", "ARGS3": "--config.steps=9000"})
    assert len(fake.calls) == 6 and "--config.steps=9000" in fake.calls[5]


def test_a_stage_of_ones_own_between_two_others(tools, settings, tmp_path):
    more = {"STAGES": "2 2_late 3", "ARGS2_late": "--config.data.meta=/bucket/late.json"}
    env = stages_env(settings, tmp_path, **more)
    fake = tools("hovle")
    assert fake.run("stages.sh", **env).returncode == 0
    _, late, last = fake.calls
    assert "--config=configs/stage2_late.py:tiny" in late
    assert "--config.data.meta=/bucket/late.json" in late
    assert f"--config.init.previous={tmp_path}/runs/stage2" in late
    assert f"--config.init.previous={tmp_path}/runs/stage2_late" in last
    alone = fake.run("stages.sh", **env | {"STAGES": "2_late"})
    assert alone.returncode != 0 and "name the stage before" in alone.stderr


def test_stages_stop_where_one_fails(tools, settings, tmp_path):
    fake = tools("hovle")
    env = stages_env(settings, tmp_path, ON_hovle="case $(wc -l <$CALLS) in 2) exit 1 ;; esac")
    done = fake.run("stages.sh", **env)
    assert done.returncode == 1 and "stage 2 ended with status 1: hovle train" in done.stderr
    assert fake.run("stages.sh", **env).returncode == 0
    assert [stage_of(call) for call in fake.calls] == ["1", "2", "2", "3"]


def test_stages_leave_restarts_to_who_asks(tools, settings, tmp_path):
    fake = tools("hovle")
    env = stages_env(settings, tmp_path, ON_hovle="exit 75")
    assert fake.run("stages.sh", "--retries", "0", **env).returncode == 75
    assert len(fake.calls) == 1
    assert fake.run("stages.sh", "--retries", "2", **env).returncode == 75
    assert len(fake.calls) == 4


def test_stages_pass_sigterm_on_and_wait_for_the_checkpoint(tools, settings, tmp_path):
    fake = tools("hovle")
    train = 'trap "sleep 0.3; touch $HOME/saved; exit 75" TERM; touch $HOME/ready; '
    train += "while :; do sleep 0.02; done"
    process = subprocess.Popen(
        ["bash", "launch/stages.sh"],
        cwd=ROOT,
        env=fake.env | stages_env(settings, tmp_path, ON_hovle=train),
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists() and len(fake.calls) == 1


def test_stages_are_commands_that_hovle_train_takes(tools, settings):
    done = tools().run("stages.sh", "--dry-run", "--config.seed=3", SETTINGS=str(settings))
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == 3
    for command, stage in zip(commands, ("distill", "align", "instruct"), strict=True):
        args, overrides = cli._parser().parse_known_args(command[1:])
        config = cli.load_config(args.config, overrides)
        assert (config.stage, config.model.name, config.seed) == (stage, "tiny", 3)
        assert config.data.tokenizer == "/bucket/tokenizer"
    first = cli.load_config("configs/stage1_distill.py:tiny", commands[0][4:])
    assert first.data.images == ("/bucket/a", "/bucket/b") and first.init.llm == "/bucket/llm"


def test_stages_read_a_copy_of_the_index_in_memory(tools, settings, tmp_path):
    fake = tools("hovle", "cp")
    env = stages_env(settings, tmp_path, INDEX="/bucket/index")
    assert fake.run("stages.sh", **env).returncode == 0
    copied, *stages = fake.calls
    assert copied == ["cp", "-rT", "/bucket/index", "/dev/shm/hovle-index"] and len(stages) == 3
    for call in stages:
        assert "--config.data.index=/dev/shm/hovle-index" in call


@pytest.mark.parametrize("chips", [16, 256])
def test_the_example_settings_fit_the_slices_they_name(tools, tmp_path, chips):
    """The recipe's rows, one at a time on each chip of v5e:4x4 or, commented out, v5e:16x16."""
    text = (LAUNCH / "example.env").read_text()
    if chips == 256:
        text = re.sub(r"^ARGS.*\n", "", text, flags=re.M).replace("#ARGS", "ARGS")
    (tmp_path / "run.env").write_text(text)
    done = tools().run("stages.sh", "--dry-run", SETTINGS=str(tmp_path / "run.env"))
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        args, overrides = cli._parser().parse_known_args(shlex.split(line)[1:])
        config = cli.load_config(args.config, overrides)
        recipe = cli.load_config(args.config)
        assert config.data.rows == recipe.data.rows == chips * config.optim.accumulate
        assert config.data.workers > 0


# --- TPU VMs


GCLOUD = """case "$*" in
  *describe*) n=$(cat $HOME/n 2>/dev/null || echo 1); echo $((n + 1)) >$HOME/n
    state=$(cut -d' ' -f$n <<<"$STATES"); [ "$state" != NONE ] || exit 1; echo $state ;;
  *watch*) n=$(cat $HOME/w 2>/dev/null || echo 1); echo $((n + 1)) >$HOME/w
    exit $(cut -d' ' -f$n <<<"$ENDS") ;;
esac"""


def tpu_vm(tools, settings, *arguments: str, states: str = "", ends: str = ""):
    """The script's result and what it asked of gcloud, one word each."""
    fake = tools("gcloud")
    env = {"ZONE": "z", "IMAGE": "r.pkg.dev/p/hovle:1", "BUCKET": "b", "SETTINGS": str(settings)}
    env |= {"ON_gcloud": GCLOUD, "STATES": states, "ENDS": ends}
    done = fake.run("tpu_vm.sh", "v5e:4x4", *arguments, **env)
    # gcloud compute tpus queued-resources|tpu-vm WORD ..., or ssh ... "--command=bash host.sh WORD"
    asked = [call[-1].split()[2] if call[4] == "ssh" else call[4] for call in fake.calls]
    return done, asked, fake.calls


RUN = ["scp", "setup", "start", "watch"]


def test_tpu_vm_creates_waits_and_runs(tools, settings):
    states = "NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    done, asked, calls = tpu_vm(tools, settings, "--spot", states=states, ends="0")
    assert done.returncode == 0 and "--delete" in done.stderr
    assert asked == ["describe", "create", "describe", "describe", "describe", *RUN]
    create = calls[1]
    assert create[4:6] == ["create", "hovle"] and "--spot" in create and "--node-id=hovle" in create
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(
        create
    )
    assert all("--worker=all" in call for call in calls[5:])
    assert {"launch/host.sh", "launch/env/v5e.env", str(settings), "hovle:"} <= set(calls[5])
    assert "v5e.env run.env bash launch/stages.sh --retries 0" in calls[7][-1]


def test_tpu_vm_goes_on_after_a_saved_checkpoint(tools, settings):
    done, asked, _ = tpu_vm(tools, settings, states="ACTIVE ACTIVE", ends="75 0")
    assert done.returncode == 0
    assert asked == ["describe", *RUN, "stop", "describe", *RUN]


def test_tpu_vm_makes_a_new_request_after_a_preemption(tools, settings):
    states = "ACTIVE SUSPENDING SUSPENDING SUSPENDED NONE ACTIVE"
    done, asked, _ = tpu_vm(tools, settings, states=states, ends="255 0")
    assert done.returncode == 0
    rest = ["describe", "describe", "describe", "delete", "describe", "create", "describe", *RUN]
    assert asked == ["describe", *RUN, "stop", *rest]


def test_tpu_vm_ends_with_the_status_of_a_failed_run(tools, settings):
    done, asked, _ = tpu_vm(tools, settings, states="ACTIVE ACTIVE", ends="1")
    assert done.returncode == 1 and asked == ["describe", *RUN, "stop", "describe"]


def test_tpu_vm_does_not_repeat_a_request_that_failed(tools, settings):
    done, asked, _ = tpu_vm(tools, settings, states="FAILED")
    assert done.returncode == 2 and asked == ["describe"] and "describe hovle" in done.stderr


def test_tpu_vm_of_several_slices(tools, settings):
    command = ("--slices", "2", "--dry-run", "--", "hovle", "--version")
    done, asked, _ = tpu_vm(tools, settings, *command)
    assert done.returncode == 0 and not asked, "a dry run asks nothing"
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    assert {"--node-count=2", "--node-prefix=hovle"} <= set(printed[0])
    started = {call[5] for call in printed if "start" in call[-1]}
    assert started == {"hovle-0", "hovle-1"}
    assert all(
        call[-1].endswith("run.env hovle --version") for call in printed if "start" in call[-1]
    )


def test_host_starts_one_container_and_gives_its_status(tools):
    fake = tools("docker", "sudo")
    env = {
        "ON_sudo": '"$@"',
        "ON_docker": "case $1 in wait) echo 75 ;; ps) echo $RUNS_ALREADY ;; esac",
    }
    start = ("host.sh", "start", "image", "chip.env", "run.env", "hovle", "train", "--x=('a b',)")

    def started() -> list[list[str]]:
        return [call for call in fake.calls if call[:2] == ["docker", "run"]]

    assert fake.run(*start, RUNS_ALREADY="4f1e", **env).returncode == 0 and not started()
    assert fake.run(*start, **env).returncode == 0
    assert started()[0][-4:] == ["image", "hovle", "train", "--x=('a b',)"]
    assert {"--privileged", "--net=host", "--env-file=run.env"} <= set(started()[0])
    assert fake.run("host.sh", "watch", **env).returncode == 75
    before = len(fake.calls)
    for command in (start, ("host.sh", "watch"), ("host.sh", "stop")):
        done = fake.run("host.sh", "--dry-run", *command[1:], **env)
        assert done.returncode == 0 and "sudo docker" in done.stdout
    assert len(fake.calls) == before, "a dry run asks nothing"


# --- GKE


def manifests(tools, settings, *arguments: str) -> dict[str, dict]:
    env = {"IMAGE": "r.pkg.dev/p/hovle:1", "BUCKET": "my-bucket", "SETTINGS": str(settings)}
    done = tools().run("gke.sh", *arguments, "--dry-run", **env)
    assert done.returncode == 0 and "${" not in done.stdout, done.stderr
    return {body["kind"]: body for body in yaml.safe_load_all(done.stdout)}


def test_a_jobset_restarts_as_a_whole_and_without_limit_when_preempted(tools, settings):
    found = manifests(tools, settings, "v5p:4x4x4", "--slices", "2")
    jobset = found["JobSet"]["spec"]
    (job,) = jobset["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 16, 16)
    assert spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # Pod failure policies need it; a pod that came back by itself would meet no other host.
    assert pod["restartPolicy"] == "Never"
    (rule,) = jobset["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    by_condition, by_status = spec["podFailurePolicy"]["rules"]
    assert by_status["onExitCodes"]["values"] == [cli.EXIT_PREEMPTED]
    assert by_status["onExitCodes"]["containerName"] == container["name"]
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget"}]
    volumes = {v["name"] for v in pod["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == volumes
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    data = found["ConfigMap"]["data"]
    assert SETTINGS.items() <= data.items() and data["JAX_PLATFORMS"] == "tpu,cpu"
    (source,) = container["envFrom"]
    assert source["configMapRef"]["name"] == found["ConfigMap"]["metadata"]["name"]


def test_the_queue_has_the_chips_and_the_name_that_jobs_wait_for(tools, settings):
    found = manifests(tools, settings, "v5e:4x4", "--queue", "--slices", "2")
    (group,) = found["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == found["ResourceFlavor"]["metadata"]["name"]
    assert flavor["resources"] == [{"name": "google.com/tpu", "nominalQuota": 32}]
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    queue = job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert found["LocalQueue"]["metadata"]["name"] == queue


def test_gke_applies_what_the_dry_run_shows(tools, settings, tmp_path):
    fake = tools("kubectl")
    env = {"IMAGE": "i", "BUCKET": "b", "SETTINGS": str(settings), "ON_kubectl": "cat >$HOME/got"}
    assert fake.run("gke.sh", "v6e:4x4", **env).returncode == 0
    assert fake.calls == [["kubectl", "apply", "-f", "-"]]
    assert (tmp_path / "got").read_text() == fake.run(
        "gke.sh", "v6e:4x4", "--dry-run", **env
    ).stdout


def test_the_blueprint_has_the_variables_that_are_given(tools):
    env = dict.fromkeys(("PROJECT", "REGION", "ZONE", "RESERVATION"), "x") | {
        "CLIENT": "1.2.3.4/32"
    }
    done = tools().run("gcluster.sh", "v6e:4x4", "--create", "--slices", "2", "--dry-run", **env)
    given = dict(
        pair.split("=") for pair in shlex.split(done.stdout)[-1][len("--vars=") :].split(",")
    )
    text = (LAUNCH / "cluster.yaml").read_text()
    blueprint = yaml.safe_load(text)
    assert given.keys() == blueprint["vars"].keys()
    assert (given["chips"], given["machine_type"]) == ("32", "ct6e-standard-4t")
    assert set(re.findall(r"vars\.(\w+)", text)) | {"project_id"} == given.keys()
    modules = {m["id"]: m for m in blueprint["deployment_groups"][0]["modules"]}
    assert all(used in modules for m in modules.values() for used in m.get("use", ()))
    kueue = modules["queue"]["settings"]["kueue"]
    names = set(re.findall(r"\$\{(\w+)\}", (LAUNCH / "kueue.yaml").read_text()))
    assert names == kueue["config_template_vars"].keys()


@pytest.mark.parametrize("script", ["xpk.sh", "gcluster.sh"])
def test_other_ways_to_gke_give_slice_image_and_status(tools, settings, script):
    env = dict.fromkeys(("CLUSTER", "PROJECT", "REGION", "ZONE", "BUCKET"), "x")
    env |= {"IMAGE": "image", "SETTINGS": str(settings)}
    done = tools().run(script, "v5e:4x4", "--slices", "2", "--dry-run", **env)
    words = " ".join(shlex.split(done.stdout)).replace("=", " ")
    for pair in ("num-slices 2", "v5litepod-16", "restart-on-exit-codes 75", "image image"):
        assert pair in words, done.stdout + done.stderr
    assert "bash launch/stages.sh --retries 0" in words


def test_sky_names_what_exists():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [cli.EXIT_PREEMPTED]
    assert (LAUNCH / "env" / f"{task['envs']['CHIP']}.env").is_file()
    names = (LAUNCH / "slice.sh").read_text()
    assert f"RUNTIME={task['resources']['accelerator_args']['runtime_version']} " in names
    assert task["resources"]["accelerators"].startswith("tpu-v5litepod-")


def test_slurm_queues_a_preempted_job_again(tools, settings):
    fake = tools("srun", "scontrol")
    env = {"SETTINGS": str(settings), "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    for status, calls in ((0, 1), (1, 2), (75, 4)):
        done = fake.run("slurm.sh", **env, ON_srun=f"exit {status}")
        assert done.returncode == status and len(fake.calls) == calls, done.stderr
    assert fake.calls[0][:3] == ["srun", "--kill-on-bad-exit=1", "bash"]
    assert fake.calls[-1] == ["scontrol", "requeue", "7"]


# --- plans, export, preflight


WRITE_PLAN = """all="$*"; case $all in
  *align*v6e*) echo "error: does not fit" >&2; exit 1 ;;
  *--json=*) echo '{}' >"${all##*--json=}" ;;
esac"""


def test_plans_that_are_there_are_not_made_again(tools, tmp_path):
    fake = tools("hovle")
    out = tmp_path / "plans"
    env = {
        "MODELS": "hovle_2b",
        "TOPOLOGIES": "v5e:4x4 v5e:16x16*2 v6e:4x4",
        "ON_hovle": WRITE_PLAN,
    }
    done = fake.run("plan.sh", str(out), "--fast", **env)
    assert done.returncode == 1 and "error: does not fit" in done.stderr
    assert len(list(out.glob("*.json"))) == 8 and not list(out.glob("*.part"))
    assert [p.name for p in out.glob("*.failed")] == ["hovle_2b-stage2-v6e-4x4x1.failed"]
    assert fake.calls[-1] == ["hovle", "plan", "--tabulate", str(out)]
    args, overrides = cli._parser().parse_known_args(fake.calls[3][1:])
    assert (args.topology, args.slices, args.fast) == ("v5e:16x16", 2, True)
    assert cli.load_config(args.config, overrides).data.rows == 512  # one a device
    before = len(fake.calls)
    assert fake.run("plan.sh", str(out), "--fast", **env).returncode == 1
    assert len(fake.calls) == before + 2, "the one that failed, and the table"
    fake.run("plan.sh", str(out), **env)
    assert len(fake.calls) == before + 12, "without --fast they are other plans"


def test_plans_of_all_that_is_promised(tools, tmp_path):
    done = tools().run("plan.sh", str(tmp_path), "--dry-run")
    commands = [shlex.split(line) for line in done.stdout.splitlines()][:-1]
    topologies = {c[3] + c[4].replace("--slices=", "*") for c in commands}
    assert len(commands) == 6 * len(topologies) == 48
    rows = [x for c in commands if c[3] == "--topology=tpu7x:4x4x4" for x in c if ".rows=" in x]
    assert set(rows) == {"--config.data.rows=128"}, "two devices a chip"


def test_export_verifies_and_says_what_it_could_not(tools, tmp_path):
    fake = tools("hovle", "python3")
    out = str(tmp_path / "out")
    options = ("case.npz", "--", "--assets", "HoVLE")
    assert fake.run("export.sh", "runs/stage3", out, *options).returncode == 0
    hovle = [call for call in fake.calls if call[0] == "hovle"]
    exported, live, cases = hovle
    assert exported == ["hovle", "export", "runs/stage3", out, "--verify", "--assets", "HoVLE"]
    assert live[:5] == ["hovle", "verify", "runs/stage3", "--live", out]
    assert cases[:4] == ["hovle", "verify", out, "case.npz"]
    for call in hovle:
        cli._parser().parse_args(call[1:])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "verification.json").touch()
    env = {"ON_python3": "exit 1", "ON_hovle": "exit 1"}
    done = fake.run("export.sh", "runs/stage3", out, "case.npz", **env)
    assert done.returncode == 1 and "not compared in PyTorch" in done.stderr
    assert "exported before" in done.stderr


@pytest.fixture
def preflight(tmp_path, monkeypatch, capsys):
    """launch/preflight.py on one row of data, in this process: (status, lines)."""
    spec = importlib.util.spec_from_file_location("preflight", LAUNCH / "preflight.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = ROOT / "configs" / "stage3_instruct.py"
    turns = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "white"}]
    meta = write_meta(tmp_path, [{"conversations": turns}])
    tokenizer = train_tokenizer(["Which colour? white user system"] * 8, tmp_path / "words", 60)
    given = {"data.tokenizer": tmp_path / "words", "data.meta": meta}
    given |= {"model.vocab_size": tokenizer.vocab_size}
    tokens = {"im_end": IM_END, "img_start": IMG_START, "img_end": IMG_END}
    for name, token in (tokens | {"img_context": IMG_CONTEXT}).items():
        given[f"model.{name}_id"] = tokenizer.id_of(token)

    def run(*arguments: str, **changes: object) -> tuple[int, list[str]]:
        settings = given | {k.replace("__", "."): v for k, v in changes.items()}
        overrides = [f"--config.{k}={v}" for k, v in settings.items()]
        argv = ["preflight", f"--config={config}:tiny", f"--workdir={tmp_path}", *arguments]
        monkeypatch.setattr(sys, "argv", argv + overrides)
        status = module.main()
        return status, capsys.readouterr().out.splitlines()

    return run


def test_preflight_passes_where_a_run_would_start(preflight):
    status, lines = preflight()
    assert status == 0 and len(lines) == 5 and all("ok: " in line for line in lines), lines
    assert "8 of 'cpu'" in lines[1] and "1 source(s)" in lines[3]


def test_preflight_names_what_is_wrong(preflight, tmp_path):
    status, lines = preflight(
        "--topology=v5e:2x4", data__meta=tmp_path / "no.json", init__llm=tmp_path
    )
    failed = {line.split()[1]: line for line in lines if "FAILED" in line}
    assert status == 1 and failed.keys() == {"devices", "data", "parameters"}
    assert "expected 8 of 'TPU v5 lite'" in failed["devices"] and "no.json" in failed["data"]
    _, lines = preflight(optim__lrr=1)
    assert "did you mean 'lr'?" in lines[3]


def test_preflight_asks_first_whether_the_state_fits(tools):
    fake = tools("hovle", "python3")
    arguments = (
        "--config=c.py",
        "--topology=v5e:4x4",
        "--slices=2",
        "--workdir=w",
        "--config.seed=1",
    )
    assert fake.run("preflight.sh", *arguments).returncode == 0
    plan, *_, last = fake.calls
    assert plan[:3] == ["hovle", "plan", "--fast"] and "--workdir=w" not in plan
    assert last == ["python3", "launch/preflight.py", *arguments]


@pytest.mark.parametrize("share, status", [(0.5, 0), (1.5, 1)])
def test_preflight_fails_where_the_state_does_not_fit(tools, tmp_path, share, status):
    fake = tools("hovle")
    report = json.dumps({"hbm": {"arguments": share, "limit": 1.0}})
    env = {"ON_hovle": f"all=$*; echo '{report}' >${{all##*--json=}}"}
    os.symlink(sys.executable, tmp_path / "bin" / "real-python")
    python = tmp_path / "bin" / "python3"  # the check of hosts is another test's
    python.write_text('#!/bin/sh\n[ "$1" != - ] || exec real-python "$@"\n')
    python.chmod(0o755)
    done = fake.run("preflight.sh", "--config=c.py", "--topology=v5e:4x4", "--workdir=w", **env)
    assert done.returncode == status and f"{share:.0%}" in done.stdout


def test_plans_are_of_the_stages_whole_data(monkeypatch):
    """Whatever their batch: the totals in plan.sh are those of the configs."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "launch/plan.sh").read_text()
    found = re.findall(r"config=(\S+) total=\$\(\((\d+) \* (\d+) \* (\d+)\)\)", text)
    assert len(found) == 3
    for path, *factors in found:
        config = cli.load_config(path, [])
        assert [config.steps, config.data.rows, config.data.tokens] == list(map(int, factors))
