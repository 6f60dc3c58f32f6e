"""python -m fast_dllm.doctor and what run.sh does with it, in prepared folders, without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from script_project import NO_WEIGHTS, ROOT, Project, pretend_model

from fast_dllm.doctor import cluster, disks, gpu, model_files, software
from fast_dllm.doctor.data_sets import place_of_data
from fast_dllm.doctor.situation import GIB, DataSet, Situation
from fast_dllm.evaluate.sandbox import Sandbox, limits_only
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.runner import slurm
from fast_dllm.runner.venv import CUDA, requirements_key

MODEL = "Efficient-Large-Model/Fast_dLLM_v2_7B"
DAY = 86400


class Cluster(Project):
    """A project on a pretended cluster, with a hub cache of its own."""

    def __init__(self, folder: Path, slurm: bool = True) -> None:
        super().__init__(folder, slurm)
        self.hub = self.state / "hf"
        self.environment |= {"HF_HOME": str(self.hub), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def quick(self, *words: str, **extra: str) -> tuple[int, list[str]]:
        done = self.doctor("python3", "--quick", *words, **extra)
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    def doctor(self, python: str | Path, *words: str, **extra: str) -> subprocess.CompletedProcess:
        command = f'exec "{python}" -m fast_dllm.doctor "$@"'
        return self.bash("-c", command, "doctor", *words, **extra)

    def script(self, name: str, body: str) -> None:
        file = self.state / "bin" / name
        file.unlink(missing_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)

    def cached_model(self, *absent: str) -> Path:
        """The published model as the hub's cache keeps it, in two shards, less the files `absent`."""
        folder = self.hub / "hub" / f"models--{MODEL.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc123")
        snapshot = pretend_model(folder / "snapshots" / "abc123")
        (snapshot / "model.safetensors").unlink()
        shards = {f"layer{number}": f"model-{number}-of-2.safetensors" for number in (1, 2)}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        for name in shards.values():
            (snapshot / name).write_bytes(NO_WEIGHTS)
        for name in absent:
            (snapshot / name).unlink()
        return snapshot

    def venv(self) -> Path:
        """A complete venv for these requirements, whose packages are this Python's."""
        key = requirements_key(self.root, CUDA)
        build = Path(f"{self.environment['FAST_DLLM_VENV']}.d", f"{key}.0001")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", build], check=True)
        packages = next(build.glob("lib/python3.*/site-packages"))
        (packages / "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (build / "complete").write_text(f"{key}\n")
        return build


def weights_of(size: int) -> bytes:
    """A safetensors file with one tensor."""
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.fixture
def cluster_project(tmp_path):
    return Cluster(tmp_path / "lab's project")


def starting(lines: list[str], start: str) -> str:
    found = [line for line in lines if line.startswith(start)]
    assert len(found) == 1, (start, lines)
    return found[0]


# -- the quick part ----------------------------------------------------------------------------------------------------
def test_the_quick_part_needs_nothing_but_the_standard_library():
    loaded = "import sys, fast_dllm.doctor; print(*(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    outside = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"fast_dllm", "__main__"}
    assert not {name for name in outside if not name.startswith(("_", "sitecustomize"))}


def test_a_model_in_the_cache_and_a_venv_are_ok(cluster_project):
    snapshot, venv = cluster_project.cached_model(), cluster_project.venv()
    code, lines = cluster_project.quick("--task", "toy_math", HF_HUB_OFFLINE="1")
    assert code == 0
    assert starting(lines, "ok   venv: /") == f"ok   venv: {venv}"
    assert starting(lines, "ok   model").endswith(f"whole, 0.00 GB of weights in {snapshot}")


@pytest.mark.parametrize("absent", ["tokenizer.json", "model-2-of-2.safetensors"])
def test_a_part_of_the_model_that_is_not_in_the_cache_fails_only_where_nothing_may_be_fetched(cluster_project, absent):
    cluster_project.cached_model(absent)
    code, lines = cluster_project.quick("--task", "toy_math", HF_HUB_OFFLINE="1")
    assert code == 1
    line = starting(lines, "fail model")
    assert absent in line
    assert f"bash sbatch/prefetch.sh --model {MODEL}" in line
    code, lines = cluster_project.quick("--task", "toy_math")
    assert code == 0
    assert "the first job downloads it" in starting(lines, "warn model")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model-2-of-2.safetensors", NO_WEIGHTS[:5], "is cut off: 5 bytes, its header alone takes"),
        ("model-2-of-2.safetensors", weights_of(100)[:-1], "is cut off: "),
        ("model-2-of-2.safetensors", weights_of(100) + b"0", "is too long: "),
        ("model-2-of-2.safetensors", (4).to_bytes(8, "little") + b"{{}}", "has no readable header"),
        ("config.json", b'{"a":', "is not valid JSON: it ends in the middle"),
        ("tokenizer_config.json", b"", "is not valid JSON: it is empty"),
    ],
)
def test_a_damaged_model_fails_in_one_line(cluster_project, name, content, told):
    snapshot = cluster_project.cached_model()
    (snapshot / name).write_bytes(weights_of(100))
    if name.endswith("safetensors"):
        assert cluster_project.quick("--task", "toy_math")[0] == 0
    (snapshot / name).write_bytes(content)
    code, lines = cluster_project.quick("--task", "toy_math")
    assert code == 1
    assert f"{name} {told}" in starting(lines, "fail model")


def test_a_model_that_has_no_room_fails_and_little_room_is_a_warning(monkeypatch, tmp_path):
    situation = Situation(tmp_path, (), MODEL, tmp_path / "venv", None, {"HF_HOME": str(tmp_path)}, {})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    [finding] = model_files.check_model(situation)
    assert (finding.level, "20 GiB are needed" in finding.text) == ("fail", True)
    assert {finding.level for finding in disks.check_disk(situation)} == {"warn"}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**40))
    assert [finding.level for finding in model_files.check_model(situation)] == ["warn"]
    assert {finding.level for finding in disks.check_disk(situation)} == {"ok"}


def test_cluster_settings_count_and_a_wrong_line_in_them_is_exit_2(cluster_project):
    settings = cluster_project.root / "sbatch" / "cluster.env"
    settings.write_text("HF_HUB_OFFLINE=1\n")
    assert cluster_project.quick("--task", "toy_math")[0] == 1
    settings.write_text("export HF_HUB_OFFLINE=1\n")
    done = cluster_project.doctor("python3", "--quick")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "line 1 is not NAME=value" in done.stderr


def test_gpqa_without_a_token_says_how_to_get_access(cluster_project):
    words = ("--task", "gpqa_main_n_shot", "--model", "tiny")
    code, lines = cluster_project.quick(*words)
    assert code == 1
    assert "accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa" in starting(lines, "fail data")
    assert cluster_project.quick(*words, HF_TOKEN="hf_x")[0] == 0
    (cluster_project.hub).mkdir()
    (cluster_project.hub / "token").write_text("hf_x\n")
    assert cluster_project.quick(*words)[0] == 0
    (cluster_project.hub / "token").write_text("")
    cached = cluster_project.hub / "datasets" / "Idavidrein___gpqa" / "gpqa_main" / "0.0.0" / "abc"
    cached.mkdir(parents=True)
    assert cluster_project.quick(*words)[0] == 1
    (cached / "gpqa-train.arrow").touch()
    assert cluster_project.quick(*words)[0] == 0


def test_results_on_a_scratch_folder_that_was_purged_fail(cluster_project):
    scratch = cluster_project.state / "scratch"
    (cluster_project.root / "results").symlink_to(scratch)
    words = ("--task", "toy_math", "--model", "tiny")
    code, lines = cluster_project.quick(*words)
    assert (code, starting(lines, "fail results").endswith(f"which is gone; mkdir -p {scratch}")) == (1, True)
    scratch.mkdir()
    assert cluster_project.quick(*words)[0] == 0


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="no /proc/sys, the one folder where root cannot write")
def test_a_place_that_cannot_be_written_fails(cluster_project):
    (cluster_project.root / "logs").symlink_to("/proc/sys")
    code, lines = cluster_project.quick("--task", "toy_math", "--model", "tiny")
    assert code == 1
    assert "cannot write to" in starting(lines, "fail logs")


def test_a_venv_that_failed_or_lost_its_interpreter_is_a_warning(cluster_project):
    words = ("--task", "toy_math", "--model", "tiny")
    line = starting(cluster_project.quick(*words)[1], "warn venv: none for these requirements")
    assert line.endswith("or now: FAST_DLLM_TORCH=cuda bash sbatch/venv.sh"), "the one that a job on a GPU needs"
    venv = cluster_project.venv()
    (venv / "bin" / "python").unlink()
    assert f"the interpreter of {venv} is gone" in starting(cluster_project.quick(*words)[1], "warn venv")
    (venv / "failed").touch()
    code, lines = cluster_project.quick(*words)
    assert (code, f"see {venv}/build.log" in starting(lines, "warn venv")) == (0, True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--task", "gsm9k"], "no task named"),
        (["--task", ""], "valid: gsm8k"),
        (["--model", "a b"], "nor a hub id"),
        (["--task", "$(touch pwned)"], "no task named"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_2(cluster_project, words, named):
    done = cluster_project.doctor("python3", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert named in done.stderr
    assert not (cluster_project.root / "pwned").exists()


# -- run.sh ------------------------------------------------------------------------------------------------------------
def test_run_submits_nothing_when_a_job_would_fail_and_goes_on_after_warnings(cluster_project):
    refused = cluster_project.run("k1_first", HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    assert "fail model" in refused.stderr
    assert "run.sh: nothing is submitted" in refused.stderr
    assert "ok " not in refused.stderr
    assert cluster_project.submitted() == []
    assert not (cluster_project.root / ".snapshots").exists()
    accepted = cluster_project.run("k1_first")
    assert accepted.returncode == 0
    assert "warn model" in accepted.stderr
    assert len(cluster_project.submitted()) == 1
    # nothing is left to submit, so nothing has to be checked
    assert cluster_project.run("k1_first", HF_HUB_OFFLINE="1").returncode == 0


def test_a_check_that_breaks_stops_no_submission(cluster_project):
    (cluster_project.root / "fast_dllm" / "doctor" / "situation.py").write_text("1 / 0\n")
    done = cluster_project.run("k1_first")
    assert done.returncode == 0
    assert "the check before the submission failed" in done.stderr
    assert len(cluster_project.submitted()) == 1


# -- all of it ---------------------------------------------------------------------------------------------------------
class Hub(BaseHTTPRequestHandler):
    """Gives out openai/gsm8k; GPQA is gated; it knows nothing else."""

    def do_GET(self):
        code, error = 404, "RepoNotFound"
        if "openai/gsm8k" in self.path:
            code, error = 200, ""
        elif "Idavidrein/gpqa" in self.path:
            code, error = 403, "GatedRepo"
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def hub_address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def whole_project(tmp_path):
    """With everything that the whole doctor reads, on a disk whose name has scratch in it."""
    project = Cluster(tmp_path / "scratch" / "project")
    shutil.copy(ROOT / "eval.py", project.root)
    shutil.rmtree(project.root / "tasks")
    (project.root / "tasks").symlink_to(ROOT / "tasks")
    shutil.rmtree(project.root / "models" / "tiny")
    (project.root / "models" / "tiny").symlink_to(ROOT / "models" / "tiny")
    return project


def test_all_is_well(whole_project):
    whole_project.script("sbatch", 'echo "$@" >>"$FAKE_SLURM/sbatch.log"; echo "sbatch: Job 7 to start at noon" >&2')
    whole_project.script("pace-quota", 'echo "Home  4.2 GB of 10 GB  42.0%"')
    venv = whole_project.venv()
    punkt = whole_project.state / "home" / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("google___if_eval/default", "openai___gsm8k/main"):
        cached = whole_project.hub / "datasets" / name / "0.0.0" / "abc"
        cached.mkdir(parents=True)
        (cached / "x.arrow").touch()
    tasks = ("--task", "toy_choice,ifeval,gsm8k", "--model", "tiny")
    done = whole_project.doctor(venv / "bin" / "python", *tasks, HF_HUB_OFFLINE="1", SBATCH_ACCOUNT="gts-lab")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in lines if not line.startswith("ok ")] == []
    for start in ("Python 3.", "packages: torch 2.", "no GPU: the embedded model", "model tiny: whole", "logs: ",
                  "data of toy_choice: made by the task itself", "data of ifeval: google/IFEval",
                 "nltk's sentence data for ifeval: /",
                  "data of gsm8k: openai/gsm8k", "quota: pace-quota shows nothing above 90%",
                  "Slurm: Job 7 to start at noon", f"venv: {venv}\n", f"venv: {venv} on scratch, a file",
                  f"data: {whole_project.hub}/datasets on scratch, a file"):  # fmt: skip
        starting([f"{line}\n" for line in lines], f"ok   {start}")
    assert (whole_project.state / "sbatch.log").read_text() == f"--test-only {whole_project.root}/sbatch/_job.sh\n"
    # what it learnt about the data sets the quick part knows from now on
    shutil.rmtree(whole_project.hub / "datasets" / "openai___gsm8k")
    code, lines = whole_project.quick("--task", "gsm8k", "--model", "tiny", HF_HUB_OFFLINE="1")
    assert (code, "openai/gsm8k (main): not in" in starting(lines, "fail data of gsm8k")) == (1, True)


@pytest.mark.slow
def test_everything_that_can_be_wrong_is_said(whole_project, hub_address):
    whole_project.script("sbatch", 'echo "sbatch: error: Invalid account $SBATCH_ACCOUNT" >&2; exit 1')
    whole_project.script("pace-quota", 'echo "Home  9.7 GB of 10 GB  97.0%"')
    requirements = whole_project.root / "pyproject.toml"
    requirements.write_text(requirements.read_text().replace("torch>=2.9", "torch>=99").replace("rich", "ritch"))
    venv = whole_project.venv()
    package = next(venv.glob("lib/python3.*/site-packages")) / "made_up-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: made_up\nVersion: 1.0\n")
    (package / "RECORD").write_text("made_up/__init__.py,,\nmade_up/x.pyc,,\nmade_up-1.0.dist-info/METADATA,,\n")
    old = whole_project.folder("k1_first") / "summary.json"
    old.write_text("{}")
    os.utime(old, (time.time() - 50 * DAY, time.time() - 70 * DAY))
    done = whole_project.doctor(
        venv / "bin" / "python", "--task", "gpqa_main_n_shot,gsm8k,ifeval", HF_ENDPOINT=hub_address, HF_TOKEN="hf_x",
        SBATCH_ACCOUNT="gts-nobody",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    packages = starting(lines, "fail packages")
    assert re.search(r"torch 2\.\S+ is not >=99", packages)
    assert "ritch is not installed" in packages
    assert "jobs ask for gpu:rtx_6000:1" in starting(lines, "warn no GPU")
    assert "the hub has none of that name" in starting(lines, f"fail model {MODEL}")
    assert "gated, and this account may not read it; accept its terms at" in starting(lines, "fail data set Idavidrein")
    assert "the hub gives it out" in starting(lines, "warn data set openai/gsm8k")
    assert "the hub has none" in starting(lines, "fail data set google/IFEval")
    assert "run: bash sbatch/prefetch.sh --task ifeval" in starting(lines, "fail ifeval needs nltk's sentence data")
    assert "Home 9.7 GB of 10 GB 97.0%" in starting(lines, "warn quota")
    assert f"1 files of its packages are gone; rm -r {venv}" in starting(lines, "fail venv")
    slurm = starting(lines, "fail Slurm")
    assert "Invalid account gts-nobody" in slurm
    assert "SBATCH_ACCOUNT=gts-nobody" in slurm
    assert "untouched for 50 of 60 days; find -L" in starting(lines, "warn results")


def test_a_python_without_the_packages_says_which_one_has_them(cluster_project):
    venv = cluster_project.venv()
    next(venv.glob("lib/python3.*/site-packages/these.pth")).unlink()
    done = cluster_project.doctor(venv / "bin" / "python", "--task", "toy_math", "--model", "tiny")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert f"source {venv}/bin/activate first" in starting(lines, "fail this Python")
    starting(lines, "ok   model tiny")  # the quick part is done all the same


def test_code_tasks_say_whether_there_is_a_sandbox(monkeypatch):
    situation = Situation(ROOT, ("gsm8k", "mbpp"), "tiny", ROOT, None, {}, {})
    kinds = {"ok": Sandbox("bubblewrap"), "warn": limits_only("bubblewrap: not installed")}
    for level, sandbox in kinds.items():
        monkeypatch.setattr("fast_dllm.evaluate.sandbox.find_sandbox", lambda sandbox=sandbox: sandbox)
        [finding] = software.check_sandbox(situation)
        assert finding.level == level
        assert finding.text.startswith("programs of the model (mbpp): ")
        assert sandbox.missing in finding.text
    assert list(software.check_sandbox(replace(situation, tasks=("gsm8k",)))) == []


@pytest.mark.slow
def test_what_counts_as_cached_is_what_datasets_loads_offline(tmp_path):
    """The layout that the quick part looks for is the library's own: it reads it, and not without the tables."""
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "hf" / "datasets" / "google___if_eval" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    features = Features({"prompt": Value("string")})
    with ArrowWriter(path=str(folder / "if_eval-train.arrow"), features=features) as writer:
        writer.write({"prompt": "made up"})
        count, size = writer.finalize()
    splits = SplitDict({"train": SplitInfo("train", size, count, dataset_name="if_eval")})
    described = {"builder_name": "parquet", "dataset_name": "if_eval", "config_name": "default", "version": "0.0.0"}
    DatasetInfo(features=features, splits=splits, **described).write_to_directory(str(folder))
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    load = "import datasets; print(datasets.load_dataset('google/IFEval')['train'][0]['prompt'])"

    def loads() -> bool:
        done = subprocess.run(
            [sys.executable, "-c", load], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.returncode == 0 and done.stdout == "made up\n"

    data = DataSet("google/IFEval")
    situation = Situation(tmp_path, (), "tiny", tmp_path, None, environment, {})
    assert loads()
    assert place_of_data(situation, data) is not None
    shutil.rmtree(folder)
    assert not loads()
    assert place_of_data(situation, data) is None


# -- GPU ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def seven_billion(tmp_path):
    """The situation of a job with the published model's sizes, of which only config.json is read."""
    folder = pretend_model(tmp_path / "seven")
    FastDLLMConfig().save_pretrained(folder)
    return Situation(ROOT, ("gsm8k",), str(folder), tmp_path, None, {}, {})


def pretend_gpu(monkeypatch, capability, memory, built_for=("sm_75", "sm_80", "sm_90", "compute_90")):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(name="Pretended", total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))


@pytest.mark.parametrize(
    ("capability", "memory", "level", "text"),
    [
        ((7, 5), 24e9, "ok", "14.2 GiB of weights in float16"),
        ((8, 0), 40e9, "ok", "14.2 GiB of weights in bfloat16"),
        ((9, 0), 80e9, "ok", "bfloat16"),
        ((12, 0), 32e9, "ok", "bfloat16"),  # compiled from compute_90
        ((7, 5), 16.9e9, "warn", "leaves little for long questions"),
        ((7, 5), 12e9, "fail", "do not fit"),
        ((6, 1), 24e9, "fail", "has code for sm_75 sm_80 sm_90 compute_90 only"),
        ((7, 0), 34e9, "fail", "has code for sm_75 sm_80 sm_90 compute_90 only"),
    ],
)
def test_a_gpu_is_judged_by_its_capability_and_memory(monkeypatch, seven_billion, capability, memory, level, text):
    pretend_gpu(monkeypatch, capability, memory)
    [finding] = gpu.check_gpu(seven_billion)
    assert (finding.level, text in finding.text) == (level, True), finding


# -- the cluster, where no subprocess is needed ------------------------------------------------------------------------


def test_a_slurm_that_does_not_answer_is_told_apart(monkeypatch, tmp_path):
    for name, line in (("sbatch", "exec sleep 20"), ("squeue", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "SECONDS", 0.2)
    situation = Situation(ROOT, (), "tiny", tmp_path, None, dict(os.environ), {})
    finding = cluster.submission_finding(situation)
    assert (finding.level, "no answer within 0.2 s" in finding.text) == ("fail", True)
    (tmp_path / "squeue").write_text("#!/bin/sh\necho cannot reach the controller >&2\nexit 1\n")
    [finding] = cluster.check_cluster(situation)
    assert finding.level == "fail"
    assert "Slurm does not answer: " in finding.text
    assert "cannot reach the controller" in finding.text
    lines = "squeue: error: fetch_config: DNS SRV lookup failed\nsqueue: fatal: Could not establish a source"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{lines}' >&2\nexit 1\n")
    [finding] = cluster.check_cluster(situation)
    assert finding.text.startswith("Slurm does not answer: Could not establish a source;")  # the last fault alone


def test_the_settings_of_a_surrounding_job_do_not_reach_slurm(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    worked, output = slurm.ask("env", settings={})
    assert worked
    assert "SLURM_CONF=/etc/x" in output
    assert "SLURM_JOB_ID" not in output


def test_a_purge_looks_at_what_links_lead_to_and_only_on_scratch(tmp_path):
    blob = tmp_path / "scratch" / "blobs" / "weights"
    blob.parent.mkdir(parents=True)
    blob.touch()
    snapshot = tmp_path / "scratch" / "snapshot"
    pretend_model(snapshot)
    (snapshot / "linked.safetensors").symlink_to(blob)
    os.utime(blob, (time.time() - 47.5 * DAY,) * 2)
    situation = Situation(tmp_path / "home", (), str(snapshot), tmp_path, None, {"HF_HOME": str(tmp_path / "none")}, {})
    [finding] = disks.check_purge(situation)
    assert (finding.level, "untouched for 47 of 60 days" in finding.text) == ("warn", True)
    os.utime(blob, (time.time(), time.time() - 47.5 * DAY))  # read today
    assert [one.level for one in disks.check_purge(situation)] == ["ok"]
    elsewhere = replace(situation, model=str(tmp_path))
    assert [one.text for one in disks.check_purge(elsewhere)] == [
        "purge: neither model, data, venv nor results are on a scratch disk"
    ]


LAB = "phoenix|gts-lab|||\n"


def slurm_that_answers(project, accounts):
    project.script("sbatch", "echo 'sbatch: Job 7 to start at noon' >&2")
    project.script("squeue", "printf '7|RUNNING|None|1:00|2:00|N/A|gts-lab|embers|x|/x\\n'")
    (project.state / "accounts").write_text(accounts)
    (project.state / "qos").write_text("inferno|3-00:00:00|500\nembers|08:00:00|50\n")
    state = project.state
    project.script("sacctmgr", f'case $* in *assoc*) cat "{state}/accounts" ;; *qos*) cat "{state}/qos" ;; esac')


@pytest.mark.parametrize(
    ("accounts", "extra", "line"),
    [
        ("phoenix|gts-lab|embers,inferno||\n", {"SBATCH_QOS": "embers"},
         "ok   account gts-lab, QOS embers: jobs of at most 8 h, 50 of a user queued and running, you have 1"),
        (f"{LAB}phoenix|gts-two|||\n", {}, "fail account: no account is named; write one of yours as SBATCH_ACCOUNT"),
        (LAB, {"SBATCH_ACCOUNT": "gts-x"}, "fail account: account gts-x is none of yours, which are"),
        (LAB, {}, "ok   GPU of jobs: rtx_6000, dtype=auto gives float16, 24 GB for 0.0 GB of weights"),
        (LAB, {"SBATCH_GRES": "gpu:v100:1"}, "fail GPU of jobs: v100: the pinned torch 2.13.* has no code"),
        (LAB, {"SBATCH_GRES": "gpu:1"}, "warn GPU of jobs: gpu:1 is of no type that is known; --gpu names"),
    ],
)  # fmt: skip
def test_account_limits_and_the_gpu_of_the_jobs_are_a_line_each(monkeypatch, whole_project, accounts, extra, line):
    slurm_that_answers(whole_project, accounts)
    environment = whole_project.environment | extra
    monkeypatch.setenv("PATH", environment["PATH"])
    slurm.all_qos.cache_clear()
    slurm.associations.cache_clear()
    situation = Situation(whole_project.root, (), "tiny", whole_project.state / "x", None, environment, {})
    findings = (cluster.account_finding(situation), cluster.gpu_finding(situation))
    assert starting([f"{one.level:4} {one.text}" for one in findings], line)
    slurm.all_qos.cache_clear()
    slurm.associations.cache_clear()


def test_without_pace_quota_the_disks_of_home_and_scratch_are_looked_at(monkeypatch, tmp_path):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    situation = Situation(tmp_path, (), "tiny", tmp_path, None, {}, {})
    for used, level in ((50, "ok"), (95, "warn")):
        disk = SimpleNamespace(total=100 * GIB, used=used * GIB, free=(100 - used) * GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, disk=disk: disk)
        home, scratch = disks.check_quota(situation)
        assert (home.level, scratch.level) == (level, level)
        assert scratch.text.startswith(f"quota: {tmp_path}/scratch: {100 - used}.0 GiB free, as far as its disk tells")


def test_keep_touches_model_data_and_venv_and_downloads_nothing(cluster_project):
    folder = cluster_project.cached_model().parent.parent
    data = cluster_project.hub / "datasets" / "openai___gsm8k" / "x.arrow"
    data.parent.mkdir(parents=True)
    data.touch()
    venv = cluster_project.venv()
    kept = [file for place in (folder, data.parent, venv) for file in place.rglob("*") if file.is_file()]
    assert {data, venv / "complete", folder / "refs" / "main"} < set(kept)
    for file in kept:
        os.utime(file, (time.time() - 50 * DAY,) * 2)
    done = cluster_project.bash("sbatch/prefetch.sh", "--keep")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["ok   model", "ok   data", "ok   venv"]
    assert all(time.time() - file.stat().st_mtime < DAY for file in kept)
    assert not (cluster_project.state / "uv.log").exists()
