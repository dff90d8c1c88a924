"""Files appear whole or not at all, whatever a file system lacks or a kill leaves; files that lie are refused."""

import errno
import json
import logging
import os
import platform
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import petl_ext
import petl_ext.attaching.saved
from petl_ext.models import DVPBert
from petl_ext.saving import CONFIG_FILE, WEIGHTS_FILE, read_files, write_files, written_whole
from petl_ext.search import DepthSearch

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES))


def tensors(value):
    return {"weight": torch.full((3, 4), float(value))}


def read(folder):
    description, found = read_files(folder, dict)
    return description["value"], found["weight"][0, 0].item()


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def no_hard_links(monkeypatch):
    def refuse(source, target, **_):
        raise OSError(errno.ENOSYS, "Function not implemented", source, None, target)

    monkeypatch.setattr(os, "link", refuse)


def test_a_file_system_without_hard_links(no_hard_links, tmp_path):
    for value in (1, 2):
        write_files(tmp_path / "saved", {"value": value}, tensors(value))
        assert read(tmp_path / "saved") == (value, value)
    assert contents(tmp_path) == ["saved"] and contents(tmp_path / "saved") == [CONFIG_FILE, WEIGHTS_FILE]


def test_after_an_error_halfway_the_files_are_as_they_were(no_hard_links, tmp_path, monkeypatch):
    write_files(tmp_path, {"value": 1}, tensors(1))
    replace = os.replace

    def fails(source, target):
        if str(target) == str(tmp_path / CONFIG_FILE) and "complete" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write_files(tmp_path, {"value": 2}, tensors(2))
    assert read(tmp_path) == (1, 1) and contents(tmp_path) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_what_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        for _ in range(2):
            write_files(tmp_path / "saved", {"value": 1}, tensors(1))
        with written_whole(tmp_path / "file.txt") as unfinished:
            unfinished.write_text("text")
    finally:
        os.umask(before)
    files = [tmp_path / "saved" / CONFIG_FILE, tmp_path / "saved" / WEIGHTS_FILE, tmp_path / "file.txt"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o666 & ~umask] * 3
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o777 & ~umask


SAVE_AND_DIE = """
import os, signal, sys, torch
from petl_ext.saving import write_files

folder, renames, done = sys.argv[1], int(sys.argv[2]), []

def hook(event, _):
    if event == "os.rename":
        done.append(event)
        if len(done) == renames:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
write_files(folder, {"value": 2}, {"weight": torch.full((3, 4), 2.0)})
"""


def die(folder, renames):
    """Another process saves there and is killed at that many renames."""
    ended = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, folder, str(renames)])
    assert ended.returncode == -signal.SIGKILL


def test_a_kill_between_the_two_renames(tmp_path):
    write_files(tmp_path, {"value": 1}, tensors(1))
    die(tmp_path, renames=1)
    assert read(tmp_path) == (1, 1)
    die(tmp_path, renames=2)
    with pytest.raises(ValueError, match="a save was interrupted, and its configuration is ") as refused:
        read(tmp_path)
    os.replace(str(refused.value).partition("configuration is ")[2], tmp_path / CONFIG_FILE)
    assert read(tmp_path) == (2, 2)
    write_files(tmp_path, {"value": 3}, tensors(3))
    assert read(tmp_path) == (3, 3) and contents(tmp_path) == [CONFIG_FILE, WEIGHTS_FILE]


def test_what_a_kill_has_left_is_cleared_by_the_next_save_and_nothing_else_is(tmp_path):
    (tmp_path / ".petl-other-1").mkdir()
    die(tmp_path / "saved", renames=1)
    assert len(contents(tmp_path)) == 2
    write_files(tmp_path / "saved", {"value": 2}, tensors(2))
    assert contents(tmp_path) == [".petl-other-1", "saved"]


def test_a_file_is_written_beside_another_process_and_after_a_killed_one(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    names = {pid: f".unfinished-{platform.node()}-{pid}-a.json" for pid in (ended.stdout.strip(), str(os.getppid()))}
    for name in names.values():
        (tmp_path / name).touch()
    with written_whole(tmp_path / "a.json") as unfinished:
        unfinished.write_text("1")
    assert contents(tmp_path) == [names[str(os.getppid())], "a.json"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "data") as unfinished:
        (unfinished / "images").mkdir(parents=True)
        (unfinished / "images" / "1.png").touch()
        raise KeyboardInterrupt
    assert contents(tmp_path) == []
    with written_whole(tmp_path / "data") as unfinished:
        (unfinished / "images").mkdir(parents=True)
        assert not (tmp_path / "data").exists()
    assert contents(tmp_path) == ["data"] and contents(tmp_path / "data") == ["images"]


def test_files_of_before_and_weights_of_others_name_no_save(tmp_path):
    save_file(tensors(5), tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"format": 1, "value": 5}))
    assert read(tmp_path) == (5, 5)
    write_files(tmp_path, {"value": 6}, tensors(6))
    save_file(tensors(7), tmp_path / WEIGHTS_FILE)
    assert read(tmp_path) == (6, 7)


def test_a_full_disk_is_an_os_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    code = (
        "import resource, torch; from petl_ext.saving import write_files;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"write_files({str(tmp_path / 'saved')!r}, {{}}, {{'weight': torch.zeros(10000)}})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError: " in ended.stderr.splitlines()[-1] and WEIGHTS_FILE in ended.stderr.splitlines()[-1]
    assert contents(tmp_path) == []


def test_a_search_and_its_picture_are_whole_or_as_they_were(tmp_path, monkeypatch):
    model = bert()
    petl_ext.attach(model, petl_ext.DASConfig(bottleneck=2))
    search = DepthSearch(model, num_skip=1, interval=1, num_subsets=2)
    for _ in range(3):
        search.sample()
        search.update(lambda: torch.tensor(1.0))
    search.save(tmp_path / "search.json")
    search.plot(tmp_path / "gates.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    for write, name in ((search.save, "search.json"), (search.plot, "gates.png")):
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def saved(method, folder):
    if method == "dvp":
        DVPBert(bert(), num_labels=3, num_heads=2, inner_dim=8, visual_dim=4).save(folder)
    else:
        config = {"apt": petl_ext.APTConfig(num_prompts=2, rank=1), "das": petl_ext.DASConfig(bottleneck=2)}[method]
        petl_ext.attach(bert(), config).save(folder)
    return folder / CONFIG_FILE


def load(method, folder):
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return DVPBert.load(folder, model) if method == "dvp" else petl_ext.load(model, folder)
    except BaseException:
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        raise


LIES = [
    *(("apt", "config", "sites", [pattern], None) for pattern in ("b{99999999999999999999}", "(" * 9000 + ")" * 9000)),
    *(("apt", "config", name, 10**size, "no saved tensor") for name in ("num_prompts", "rank") for size in (5, 12)),
    *(("das", "config", name, 10**9, "no saved tensor") for name in ("bottleneck", "bypass_bottleneck")),
    ("apt", "config", "rank", 10**400, None),
    ("das", "config", "scale", 10**400, None),
    ("das", "config", "dropout", 10**400, None),
    *(
        ("dvp", "options", name, 10**11, "no saved tensor")
        for name in ("num_labels", "inner_dim", "visual_dim", "num_heads")
    ),
    ("dvp", "options", "num_labels", 10**400, "more than 20 digits"),
]


@pytest.mark.parametrize(("method", "part", "name", "value", "message"), LIES)
def test_a_configuration_that_lies_is_refused_before_anything_is_made(method, part, name, value, message, tmp_path):
    path = saved(method, tmp_path)
    content = json.loads(path.read_text())
    content[part][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(method, tmp_path)


@pytest.mark.parametrize("method", ["apt", "dvp"])
@pytest.mark.parametrize("text", ["[" * 300_000, '{"a":' * 100_000, "{", "null", "\ufeff{}", "1" * 5000])
def test_a_file_that_is_no_configuration(method, text, tmp_path):
    saved(method, tmp_path).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=CONFIG_FILE):
        load(method, tmp_path)


def test_a_folder_of_another_class_is_named_as_such(tmp_path):
    saved("dvp", tmp_path / "dvp")
    saved("apt", tmp_path / "apt")
    with pytest.raises(ValueError, match=r"saved by DVPBert\.save, which DVPBert\.load reads"):
        load("apt", tmp_path / "dvp")
    with pytest.raises(ValueError, match=r"saved by Attachment\.save, which petl_ext\.load reads"):
        load("dvp", tmp_path / "apt")


@pytest.mark.parametrize("pattern", [r"(([a-z0-9._]+)+)+!", r"(.*)*attention(.*)*x", r"(\w|\w\w|[a-z.])+\d*!"])
def test_a_regular_expression_that_never_ends(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(petl_ext.attaching.saved, "PATIENCE", 1)
    path = saved("apt", tmp_path)
    content = json.loads(path.read_text())
    content["config"]["sites"] = [pattern]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="takes more than 1 seconds"):
        load("apt", tmp_path)


def test_a_saved_regular_expression_with_repetitions_is_matched(tmp_path):
    config = petl_ext.APTConfig(num_prompts=2, rank=1, sites=[r"(encoder\.)+layer\.\d+\.attention\..*"])
    petl_ext.attach(bert(), config).save(tmp_path)
    assert len(petl_ext.load(bert(), tmp_path).sites) == 2


def test_weights_that_are_no_numbers_are_told(tmp_path, caplog):
    attachment = petl_ext.attach(bert(), petl_ext.APTConfig(num_prompts=2, rank=1))
    next(attachment.parameters()).data[0, 0] = torch.nan
    attachment.save(tmp_path)
    with caplog.at_level(logging.WARNING, logger="petl_ext"):
        petl_ext.load(bert(), tmp_path)
    assert "1 tensors hold NaN or infinity, such as encoder.layer.0" in caplog.text
