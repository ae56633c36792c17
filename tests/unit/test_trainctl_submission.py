"""``trainctl submit`` before anything is sent: the job that flags make, the code that goes with it, what is refused."""

from __future__ import annotations

import base64
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.errors import RequestError, SpecError
from trainctl.packing import FOLDER, LIMIT, MOST_FILES, CodeFile, Packed, pack_folder, pack_script, with_code
from trainctl.submission import Flags, Submission, job_tree, prepare

JOB = """
apiVersion: outlast.dev/v1alpha1
kind: TrainingJob
metadata: {name: small}
spec:
  entrypoint: [python, train.py]
  recovery: {window: 90s}
"""


def script_job(folder: Path, **given: Any) -> Submission:
    (folder / "train.py").write_text("pass\n")
    return Submission(**{"source": folder / "train.py", "name": "x", **given})


def test_flags_make_a_job_of_what_was_given_and_nothing_else() -> None:
    assert job_tree("x", "train.py", (), Flags()) == {
        "apiVersion": "outlast.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "x"},
        "spec": {"entrypoint": ["python", "train.py"]},
    }
    flags = Flags(4, 1, 2, None, 8, "4", "16Gi", "img:1", ("A=1", "B=x=y"), ("bucket",), "s3://bucket/p", "10", "5m")
    assert job_tree("x", "train.py", ("--steps", "100"), flags)["spec"] == {
        "entrypoint": ["python", "train.py", "--steps", "100"],
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "x=y"}],
        "workers": {
            "replicas": 4,
            "minReplicas": 2,
            "spares": 1,
            "procsPerWorker": 8,
            "template": {
                "spec": {
                    "containers": [
                        {
                            "name": "outlast",
                            "image": "img:1",
                            "envFrom": [{"secretRef": {"name": "bucket"}}],
                            "resources": {
                                "requests": {"cpu": "4", "memory": "16Gi"},
                                "limits": {"memory": "16Gi", "nvidia.com/gpu": "8"},
                            },
                        }
                    ]
                }
            },
        },
        "snapshot": {"everySteps": 10},
        "checkpoint": {"url": "s3://bucket/p", "interval": "5m"},
    }


@pytest.mark.parametrize(
    ("flags", "ranks"), [(Flags(gpus=8), 8), (Flags(gpus=8, procs_per_node=4), 4), (Flags(procs_per_node=2), 2)]
)
def test_there_is_a_rank_for_each_gpu_unless_told_otherwise(flags: Flags, ranks: int) -> None:
    assert job_tree("x", "t.py", (), flags)["spec"]["workers"]["procsPerWorker"] == ranks


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": None}, "--name: a job from a script needs a name, such as --name train"),
        ({"flags": Flags(env=("A",))}, "--env A: write NAME=VALUE"),
        ({"flags": Flags(env=("RANK=1",))}, '"RANK" is set by Outlast'),
        ({"flags": Flags(checkpoint_every="5m")}, "--checkpoint-every: there is no store"),
        ({"flags": Flags(nodes=2, min_nodes=3)}, "spec.workers.minReplicas: 3 was given"),
        ({"flags": Flags(store="bucket")}, 'spec.checkpoint.url: "bucket" is no store'),
        ({"flags": Flags(snapshot_every="often")}, "spec.snapshot.everySteps"),
        (
            {"name": "Train"},
            'metadata.name: "Train" is no DNS label: write at most 50 of a-z, 0-9 and -, with a letter',
        ),
        ({"name": "x" * 64}, 'xxx" is no DNS label: write at most 50 of a-z'),
        ({"name": "x" * 51}, "metadata.name: it has 51 letters; Pods are named after it: 50 at most"),
        ({"overrides": ("workers.replica=2",)}, 'did you mean "replicas"?'),
        ({"source": Path("nowhere.py")}, "nowhere.py: there is no such file; if it is in the image"),
        ({"code": Path("nowhere")}, "--code nowhere: there is no such folder"),
        ({"overrides": ("workers.template={spec: 5}",)}, "spec.workers.template.spec: must be a mapping"),
        (
            {"overrides": ("workers.template.spec.containers=[{name: outlast, command: [sh]}]",)},
            "spec.workers.template.spec.containers[0].command: ",
        ),
        ({"flags": Flags(gpus=0)}, "--gpus 0: write 1 or more, or leave it out for nodes without GPUs"),
        ({"source": Path("run.sh")}, "run.sh: a script is run by python: name the one that trains, or write a Train"),
        ({"source": Path("run.SH"), "no_code": True}, "entrypoint: [sh, run.SH] and send the folder with --code"),
        ({"name": "\udce9"}, "'\\udce9': it is no UTF-8 text, so that it cannot be sent"),
        ({"arguments": ("--a", 'q"\udce9')}, "\\udce9': it is no UTF-8 text"),
        ({"overrides": ("workers.replicas=\udce9",)}, "'workers.replicas=\\udce9': it is no UTF-8 text"),
        ({"flags": Flags(env=("A=\udce9",))}, "'A=\\udce9': it is no UTF-8 text"),
        ({"name": "1abc"}, 'metadata.name: "1abc" must begin with a letter, as the name of its Service does'),
        ({"flags": Flags(secret=("my bucket",))}, '--secret "my bucket": it is no name of a Secret'),
        ({"flags": Flags(cpu="abc")}, "--cpu abc: it is no number of processors: write 4, 0.5 or 500m"),
        ({"flags": Flags(cpu="0")}, "--cpu 0: it is no number of processors"),
        ({"flags": Flags(image="bad image")}, '--image "bad image": it is no image: write registry/name:tag'),
        ({"flags": Flags(image="Registry/UPPER:1")}, '--image "Registry/UPPER:1": it is no image'),
        ({"flags": Flags(image="x:")}, '--image "x:": it is no image'),
        ({"flags": Flags(memory="1Gi")}, "spec.workers.template.spec.containers[0].resources.limits.memory: "),
        ({"code": Path("x"), "no_code": True}, "--code and --no-code: give one of them"),
    ],
)
def test_what_a_script_lacks_is_told(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        prepare(script_job(tmp_path, **given), "default")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "image",
    [
        "img",
        "docker.io/library/img:1.2-rc_3",
        "localhost:5000/a/b__c",
        f"ghcr.io/a/b:1@sha256:{'0f' * 32}",
        "[::1]:5/x",
    ],
)
def test_images_are_taken_as_a_registry_takes_them(tmp_path: Path, image: str) -> None:
    prepare(script_job(tmp_path, flags=Flags(image=image, cpu="500m")), "default")


def test_a_folder_is_no_script(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"{tmp_path}: it is a folder: .* --code {tmp_path}$"):
        prepare(Submission(tmp_path), "default")


@pytest.mark.parametrize(
    ("script", "name"), [("7b-sft", "job-7b-sft"), ("Train_It", "train-it"), ("_", "job"), ("x" * 80, "x" * 50)]
)
def test_a_name_is_suggested_that_is_taken(tmp_path: Path, script: str, name: str) -> None:
    (tmp_path / f"{script}.py").write_text("pass\n")
    with pytest.raises(RequestError, match=rf"such as --name {name}$"):
        prepare(Submission(tmp_path / f"{script}.py"), "default")
    prepare(Submission(tmp_path / f"{script}.py", name=name), "default")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "job.yaml: the file is empty"),
        ("42", "job.yaml: the file holds 42"),
        ("a: [", "job.yaml: this is no YAML at line 1"),
        ("a: 1\na: 2\n", "a: is given twice"),
    ],
)
def test_what_is_wrong_with_a_file_as_a_whole_names_it(text: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        prepare(Submission(Path("job.yaml"), text), "default")
    assert str(refused.value).startswith(said)
    with pytest.raises(SpecError, match="standard input: the file is empty"):
        prepare(Submission(Path("-"), ""), "default")


def test_a_file_is_sent_as_it_is_written_in_the_namespace_in_force(tmp_path: Path) -> None:
    asked = Submission(Path("job.yaml"), JOB, name="other", overrides=("workers.replicas=3",))
    found = prepare(asked, "team")
    assert found.job == {
        "apiVersion": "outlast.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "other", "namespace": "team"},
        "spec": {
            "entrypoint": ["python", "train.py"],
            "workers": {"replicas": 3},
            "recovery": {"window": "1m30s"},
        },
    }, "no default is sent: those are the server's"
    assert found.packed is None


def test_json_may_be_indented_with_tabs() -> None:
    text = json.dumps(yaml.safe_load(JOB), indent="\t")
    assert "\t" in text
    assert prepare(Submission(Path("job.json"), text), "team").name == "small"


def test_what_the_server_wrote_into_an_earlier_job_is_not_sent() -> None:
    tree = yaml.safe_load(JOB)
    tree["metadata"] |= {"uid": "u", "resourceVersion": "7", "generation": 2, "managedFields": [{"manager": "x"}]}
    tree["metadata"] |= {"creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"team": "a"}}
    sent = prepare(Submission(Path("job.yaml"), yaml.safe_dump(tree)), "team").job["metadata"]
    assert sent == {"name": "small", "namespace": "team", "labels": {"team": "a"}}


def test_a_namespace_in_the_file_wins_over_the_contexts_and_not_over_the_persons() -> None:
    text = JOB.replace("{name: small}", "{name: small, namespace: here}")
    assert prepare(Submission(Path("job.yaml"), text), "there").namespace == "here"
    assert prepare(Submission(Path("job.yaml"), text, namespace="here"), "here").namespace == "here"
    with pytest.raises(RequestError, match='-n there: the job is written for namespace "here"'):
        prepare(Submission(Path("job.yaml"), text, namespace="there"), "there")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"flags": Flags(nodes=2, image="x")}, "--nodes, --image: goes with a script"),
        ({"arguments": ("--steps", "5")}, "arguments after --: goes with a script"),
        ({"no_code": True}, "--no-code: goes with a script"),
    ],
)
def test_flags_do_not_go_with_a_file(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        prepare(Submission(Path("job.yaml"), JOB, **given), "default")


def test_a_file_is_known_by_its_ending_in_either_case() -> None:
    assert prepare(Submission(Path("JOB.YAML"), JOB), "default").name == "small"


PAIRS = tuple(zip("bcdefghij", "abcdefghi", strict=True))
LEVELS = "".join(f"\n  {name}: &{name} [{', '.join([f'*{below}'] * 9)}]" for name, below in PAIRS)
MERGES = "".join(f"\n  {name}: &{name} {{<<: [{', '.join([f'*{below}'] * 9)}]}}" for name, below in PAIRS)


@pytest.mark.parametrize("bomb", [f"\n  a: &a [lol]{LEVELS}\n", f"\n  a: &a {{x: y}}{MERGES}\n"])
def test_aliases_that_repeat_each_other_without_measure_are_refused(bomb: str) -> None:
    began = time.monotonic()
    with pytest.raises(SpecError, match=r"^job.yaml: it holds more than 50000 values, those that aliases repeat"):
        prepare(Submission(Path("job.yaml"), f"{JOB}{bomb}"), "default")
    assert time.monotonic() - began < 5


def test_aliases_are_read_as_yaml_has_them() -> None:
    text = JOB.replace("[python, train.py]", "&words [python, &script train.py, *script]")
    assert prepare(Submission(Path("job.yaml"), text), "default").job["spec"]["entrypoint"][1:] == ["train.py"] * 2
    with pytest.raises(SpecError, match="holds itself, by an alias"):
        prepare(Submission(Path("job.yaml"), JOB.replace("[python", "&words [*words")), "default")


def test_wrong_yaml_is_told_with_its_fields() -> None:
    with pytest.raises(SpecError) as refused:
        prepare(Submission(Path("job.yaml"), JOB.replace("recovery", "recoverry")), "default")
    assert str(refused.value) == 'spec.recoverry: there is no such field; did you mean "recovery"?'


def test_a_script_beside_the_file_that_is_not_sent_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (note,) = prepare(Submission(tmp_path / "job.yaml", JOB), "default").notes
    assert f"add --code {tmp_path}" in note
    assert prepare(Submission(tmp_path / "job.yaml", JOB, code=tmp_path), "default").notes == ()
    assert prepare(Submission(Path("-"), JOB), "default").notes == ()


# --- code -----------------------------------------------------------------------------------------------------------


def test_a_script_that_is_not_in_the_folder_of_a_files_code_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("pass\n")
    asked = Submission(Path("job.yaml"), JOB, code=tmp_path)
    assert any("train.py is not in --code" in note for note in prepare(asked, "default").notes)
    (tmp_path / "train.py").write_text("pass\n")
    assert prepare(asked, "default").notes == ()
    dotted = replace(asked, text=JOB.replace("train.py", "./train.py"))
    assert prepare(dotted, "default").notes == ()


def test_a_script_is_mounted_where_ranks_start(tmp_path: Path) -> None:
    found = prepare(script_job(tmp_path), "default")
    assert found.packed is not None
    name = found.packed.name("x")
    assert found.job["metadata"]["annotations"] == {"outlast.dev/code": name}
    pod = found.job["spec"]["workers"]["template"]["spec"]
    assert pod["containers"] == [
        {
            "name": "outlast",
            "workingDir": FOLDER,
            "volumeMounts": [{"name": "outlast-code", "mountPath": FOLDER, "readOnly": True}],
        }
    ]
    assert pod["volumes"] == [
        {"name": "outlast-code", "configMap": {"name": name, "items": [{"key": "train.py", "path": "train.py"}]}}
    ]
    config = found.packed.config_map("x", "default")
    assert config["data"] == {"train.py": "pass\n"}
    assert config["immutable"] is True


def test_a_folder_keeps_its_paths_and_modes_and_leaves_out_what_nobody_wants(tmp_path: Path) -> None:
    for path in (
        "train.py",
        "lib/model.py",
        "lib_model.py",
        ".git/config",
        "lib/__pycache__/model.pyc",
        ".env",
        "x.pyc",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(path)
    (tmp_path / "lib/weights.bin").write_bytes(b"\xff\x00")
    (tmp_path / "run.sh").write_text("")
    (tmp_path / "run.sh").chmod(0o755)
    packed = pack_folder(tmp_path)
    assert packed.volume("x")["configMap"]["items"] == [
        {"key": "lib_model.py", "path": "lib/model.py"},
        {"key": "lib_weights.bin", "path": "lib/weights.bin"},
        {"key": "lib_model.py.2", "path": "lib_model.py"},
        {"key": "run.sh", "path": "run.sh", "mode": 0o755},
        {"key": "train.py", "path": "train.py"},
    ]
    config = packed.config_map("x", "team")
    assert config["data"]["lib_model.py"] == "lib/model.py"
    assert config["data"]["lib_model.py.2"] == "lib_model.py"
    assert base64.b64decode(config["binaryData"]["lib_weights.bin"]) == b"\xff\x00"
    assert config["metadata"]["namespace"] == "team"


def test_what_holds_control_characters_is_sent_as_binary() -> None:
    files = (CodeFile("text", b"\ta\r\n\xc3\xa9"), CodeFile("zeros", b"\0" * 1000), CodeFile("latin", b"\xe9"))
    config = Packed(files).config_map("x", "default")
    assert config["data"] == {"text": "\ta\r\n\xe9"}
    assert base64.b64decode(config["binaryData"]["zeros"]) == b"\0" * 1000
    assert set(config["binaryData"]) == {"zeros", "latin"}


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "lib").mkdir()
    read = os.scandir

    def scan(path: str) -> Any:
        if path.endswith("lib"):
            raise PermissionError(13, "Permission denied", path)
        return read(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(RequestError, match=f"^{tmp_path}/lib: Permission denied$"):
        pack_folder(tmp_path)


def test_a_file_whose_name_is_no_text_is_told(tmp_path: Path) -> None:
    script = tmp_path / os.fsdecode(b"caf\xe9.py")
    script.write_text("")
    said = r"the name 'caf\\udce9.py' is no UTF-8 text: give the file another one"
    for pack in (lambda: pack_script(script), lambda: pack_folder(tmp_path)):
        with pytest.raises(RequestError, match=said):
            pack()


def test_other_code_has_another_name() -> None:
    files = [CodeFile("a", b"1"), CodeFile("a", b"2"), CodeFile("b", b"1"), CodeFile("a", b"1", True)]
    names = {Packed((file,)).name("x") for file in files}
    assert len(names) == len(files)
    assert Packed((files[0],)).name("x") == Packed((CodeFile("a", b"1"),)).name("x")
    assert Packed((CodeFile("ab", b""),)).digest != Packed((CodeFile("a", b"b"),)).digest


@pytest.mark.parametrize("script", ["sub/train.py", "FOLDER/sub/train.py"])
def test_a_script_in_a_folder_is_found_from_here_and_from_there(tmp_path: Path, script: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/train.py").write_text("")
    source = Path(script.replace("FOLDER", str(tmp_path)))
    found = prepare(Submission(source, name="x", code=tmp_path, arguments=("--a",)), "default")
    assert found.job["spec"]["entrypoint"] == ["python", "sub/train.py", "--a"]


def test_a_script_that_is_not_in_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    with pytest.raises(RequestError, match=r"other.py: it is not among the files of --code .*: train.py"):
        prepare(Submission(Path("other.py"), name="x", code=tmp_path), "default")


def test_code_that_is_in_the_image_is_not_sent() -> None:
    found = prepare(Submission(Path("bytelm/train.py"), name="x", no_code=True), "default")
    assert found.packed is None
    assert found.job["spec"] == {"entrypoint": ["python", "bytelm/train.py"]}


def test_too_much_code_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with (tmp_path / "data.bin").open("wb") as file:
        file.truncate(LIMIT)
    assert pack_script(tmp_path / "data.bin").size == LIMIT
    (tmp_path / "train.py").write_text("pass")
    with pytest.raises(RequestError) as refused:
        pack_folder(tmp_path)
    assert "the code takes 901 KiB, and 900 KiB can be sent: put the code into the image" in str(refused.value)
    assert "data.bin (900 KiB), train.py (1 KiB)" in str(refused.value)


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    for number in range(MOST_FILES + 1):
        (tmp_path / f"{number}.py").touch()
    with pytest.raises(RequestError, match=f"it has {MOST_FILES + 1} files, and {MOST_FILES} can be sent"):
        pack_folder(tmp_path)


def test_an_empty_folder_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no file in it"):
        pack_folder(tmp_path)
    (tmp_path / "gone.py").symlink_to("nowhere")
    with pytest.raises(RequestError, match="it is no file"):
        pack_folder(tmp_path)


@pytest.mark.parametrize("target", ["/etc/passwd", "../beside"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "code"
    (folder / "lib").mkdir(parents=True)
    (folder / "train.py").write_text("")
    (tmp_path / "beside").write_text("secret")
    link = folder / ("lib" if target.startswith("/") else "") / "link"
    link.symlink_to(target)
    with pytest.raises(RequestError) as refused:
        pack_folder(folder)
    assert f"{link.relative_to(folder)} is a link to {target}, which is not in the folder: put a copy" in str(
        refused.value
    )


def test_what_is_left_out_of_a_folder_is_a_note(tmp_path: Path) -> None:
    for name in ("train.py", "lib/model.py", "lib/.key", ".git/config", ".env", "__pycache__/train.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "again").symlink_to("lib")
    (tmp_path / "data").symlink_to("/etc")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "other.py").symlink_to("train.py")
    (tmp_path / ".venv").symlink_to("/usr")
    found = prepare(Submission(tmp_path / "train.py", name="x", code=tmp_path), "default")
    assert found.packed is not None
    assert [file.path for file in found.packed.files] == ["lib/model.py", "other.py", "train.py"]
    assert found.notes == ("not sent (hidden, or links to folders): .env, .git/, .venv, again, data, self, lib/.key",)


def test_code_joins_a_template_that_is_there(tmp_path: Path) -> None:
    packed = Packed((CodeFile("train.py", b""),))
    template = {
        "metadata": {"labels": {"a": "b"}},
        "spec": {
            "containers": [
                {"name": "sidecar", "image": "s"},
                {"name": "outlast", "image": "i", "volumeMounts": [{"name": "d", "mountPath": "/d"}]},
            ],
            "volumes": [{"name": "d", "emptyDir": {}}],
        },
    }
    tree = {"metadata": {"name": "x"}, "spec": {"workers": {"template": template}, "head": {"template": template}}}
    found = with_code(tree, packed)
    for role in ("workers", "head"):
        pod = found["spec"][role]["template"]["spec"]
        assert found["spec"][role]["template"]["metadata"] == {"labels": {"a": "b"}}
        assert pod["containers"][0] == {"name": "sidecar", "image": "s"}
        assert [mount["name"] for mount in pod["containers"][1]["volumeMounts"]] == ["d", "outlast-code"]
        assert [volume["name"] for volume in pod["volumes"]] == ["d", "outlast-code"]
    assert "workingDir" not in template["spec"]["containers"][1], "what was given is left alone"
    template["spec"]["containers"][1]["workingDir"] = "/w"
    with pytest.raises(RequestError, match=r"spec.workers.template has workingDir /w already"):
        with_code(tree, packed)
