"""README's example as it stands, and those of docs/vqa.md but for the names of files and the number of steps."""

import re
from pathlib import Path

from refusals import needs_auto_image_processor
from transformers import BertConfig, BertModel, BertTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.digits.write import write_digits

ROOT = Path(__file__).parents[2]
README, VQA = ROOT / "README.md", ROOT / "docs" / "vqa.md"


def words_of(text):
    """Without the name of the CPU path, which is another on another machine."""
    return re.sub(r"\(cpu, \w+\)", "(cpu)", text).split()


def test_first_example_prints_what_readme_says(capsys):
    code, printed = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", README.read_text(), flags=re.DOTALL).groups()
    assert len([line for line in code.splitlines() if line]) == 8
    exec(code, {})
    assert words_of(capsys.readouterr().out) == words_of(printed)


def test_readme_fits_one_screen():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 900


def write_models():
    """A BERT and a CLIP without training, as small as they can be."""
    Path("words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "where", "digit"]))
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 32}
    BertTokenizer("words.txt").save_pretrained("bert")
    BertModel(BertConfig(vocab_size=8, **sizes)).save_pretrained("bert")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained("clip")
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained("clip")


def with_ours(example, ours):
    """The page's Python with files that are here, and few steps."""
    for theirs, mine in ours.items():
        assert theirs in example, f"the page no longer has {theirs}"
        example = example.replace(theirs, str(mine))
    return example


@needs_auto_image_processor
def test_example(tmp_path, monkeypatch, capsys):
    files = write_digits(tmp_path / "digits", {"train": 60}, progress=False)["train"]
    example, handle, search, dvp = re.findall(r"```python\n(.*?)```", VQA.read_text(), flags=re.DOTALL)
    ours = {
        "dandelin/vilt-b32-mlm": BACKBONE,
        "v2_OpenEnded_mscoco_train2014_questions.json": files.questions,
        "v2_mscoco_train2014_annotations.json": files.annotations,
        '"train2014"': f'"{files.images}"',
        "vocabulary, annotations)": f"vocabulary, annotations, image_name={files.image_name!r})",
        "AnswerVocabulary.from_annotations([annotations])": "AnswerVocabulary.from_annotations([annotations], 1)",
        "max_steps=1000": "max_steps=2, use_cpu=True, report_to=[]",
    }
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(with_ours(example, ours), names)
    trained = {name: parameter.clone() for name, parameter in names["apt"].named_parameters()}
    assert (tmp_path / "apt-vqa" / "petl_config.json").exists()
    exec(handle, names)
    assert "attention.output" in capsys.readouterr().out  # the report
    assert names["model"].state_dict().keys().isdisjoint(name for name in trained if ".apt." in name)
    ours = {
        "num_skip=4": "num_skip=1, warmup_steps=0, interval=1",
        "vocabulary, annotations)": ours["vocabulary, annotations)"],
    }
    exec(with_ours(search, ours), names)
    assert (tmp_path / "gates.png").stat().st_size > 10_000
    assert len(names["search"].history) == 2
    (skipped,) = names["search"].selection()
    assert f"vilt.encoder.layer.{skipped}.bypass" in capsys.readouterr().out
    layer = names["model"].vilt.encoder.layer[skipped]
    assert [name for name, _ in layer.named_children()] == ["bypass"]
    write_models()
    ours = {
        "google-bert/bert-base-uncased": "bert",
        "openai/clip-vit-base-patch16": "clip",
        "vocabulary, annotations)": ours["vocabulary, annotations)"],
    }
    exec(with_ours(dvp, ours), names)
    assert len(names["search"].history) == 2
    assert names["model"].insert_layer == names["search"].selection()
    fresh = BertModel.from_pretrained("bert"), CLIPVisionModel.from_pretrained("clip")
    assert names["DVPBert"].load("dvp-vqa", *fresh).insert_layer == names["model"].insert_layer
