"""README's example, run as it stands but for the names of files and the number of steps."""

import re
from pathlib import Path

from petl_ext.tasks.digits import BACKBONE, write_digits

README = Path(__file__).parent.parent / "README.md"


def test_example(tmp_path, monkeypatch, capsys):
    files = write_digits(tmp_path / "digits", {"train": 60}, progress=False)["train"]
    example, handle, search = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    ours = {
        "dandelin/vilt-b32-mlm": BACKBONE,
        "v2_OpenEnded_mscoco_train2014_questions.json": files.questions,
        "v2_mscoco_train2014_annotations.json": files.annotations,
        '"train2014"': f'"{files.images}"',
        "vocabulary, annotations)": f"vocabulary, annotations, image_name={files.image_name!r})",
        "AnswerVocabulary.from_annotations([annotations])": "AnswerVocabulary.from_annotations([annotations], 1)",
        "max_steps=1000": "max_steps=2, use_cpu=True, report_to=[]",
    }
    for theirs, mine in ours.items():
        assert theirs in example, f"README no longer has {theirs}"
        example = example.replace(theirs, str(mine))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    trained = {name: parameter.clone() for name, parameter in names["apt"].named_parameters()}
    assert (tmp_path / "apt-vqa" / "petl_config.json").exists()
    exec(handle, names)
    assert "attention.output" in capsys.readouterr().out  # the report
    assert names["model"].state_dict().keys().isdisjoint(name for name in trained if ".apt." in name)
    ours = {
        "num_skip=4": "num_skip=1, warmup_steps=0, interval=1",
        "vocabulary, annotations)": ours["vocabulary, annotations)"],
    }
    for theirs, mine in ours.items():
        assert theirs in search, f"README no longer has {theirs}"
        search = search.replace(theirs, mine)
    exec(search, names)
    assert (tmp_path / "gates.png").stat().st_size > 10_000
    assert len(names["search"].history) == 2
    (skipped,) = names["search"].selection()
    assert f"vilt.encoder.layer.{skipped}.bypass" in capsys.readouterr().out
    layer = names["model"].vilt.encoder.layer[skipped]
    assert [name for name, _ in layer.named_children()] == ["bypass"]
