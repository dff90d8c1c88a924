"""CLIP image classification: draws, zero-shot head, training with APT, metrics, the example."""

import copy
import json

import pytest
import torch
from empty_folders import empty_folder
from example_scripts import load_example
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from refusals import needs_add_adapter, needs_auto_image_processor
from safetensors.torch import load_file
from transformers import CLIPModel, Trainer, TrainingArguments

import petl_ext
from petl_ext.demo.digits.images import CLASSES, write_digit_images
from petl_ext.demo.digits.pretrain_clip import (
    Schedule,
    clip_config,
    contrastive_loss,
    make_image_processor,
    make_tokenizer,
    pretrain,
)
from petl_ext.models import CLIPClassifier
from petl_ext.tasks import image_classification as ic

PROMPTS = ic.class_prompts(CLASSES)
BASE, NEW = ic.base_and_new(CLASSES)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on several threads, much slower where other processes use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digit_images(tmp_path_factory.mktemp("digits") / "val", "val", "ground", progress=False)


@pytest.fixture(scope="module")
def images(folder):
    return ic.read_image_folder(folder)


def make_clip():
    """With weights far larger than CLIP's first ones, on which few steps would change little."""
    torch.manual_seed(0)
    clip = CLIPModel(clip_config()).eval()
    for weight in clip.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return clip


def make_classifier(clip):
    return CLIPClassifier(clip, make_tokenizer(), PROMPTS)


def dataset(images, classes=tuple(PROMPTS), **changes):
    return ic.ImageClassificationDataset(images, classes, make_image_processor(), **changes)


def pixels(images, count=4):
    data = dataset(images[:: len(images) // count][:count])
    return torch.stack([data[index]["pixel_values"] for index in range(count)])


def test_digits_are_written_as_a_folder(folder, images, tmp_path):
    assert {image.class_name for image in images} == set(CLASSES) and len(images) == 300
    with Image.open(images[0].path) as image:
        assert image.size == (16, 16)
    again = write_digit_images(tmp_path / "again", "val", "ground", progress=False)
    assert all((again / image.path.relative_to(folder)).read_bytes() == image.path.read_bytes() for image in images)
    plain = write_digit_images(tmp_path / "plain", "val", copies=2, progress=False)
    assert len(ic.read_image_folder(plain)) == 600
    with pytest.raises(FileExistsError, match="plain"):
        write_digit_images(plain, "val")
    with pytest.raises(ValueError, match=r"must be one of \['ground', 'plain'\], got 'negative'"):
        write_digit_images(tmp_path / "new", "val", "negative")


def test_shots_are_seeded_nested_and_apart_from_the_rest(images):
    draws = {shots: ic.draw_shots(images, shots, seed=1) for shots in (1, 2, 16)}
    for shots, draw in draws.items():
        assert [image.class_name for image in draw.shots] == [name for name in sorted(CLASSES) for _ in range(shots)]
        assert len(draw.rest) == len(images) - 10 * shots
        assert set(draw.shots) | set(draw.rest) == set(images)
    assert set(draws[1].shots) < set(draws[2].shots) < set(draws[16].shots)
    assert ic.draw_shots(reversed(images), 2, seed=1) == draws[2]
    assert ic.draw_shots(images, 2, seed=2) != draws[2]
    of_base = ic.draw_shots(ic.images_of(images, BASE), 2, seed=1)
    assert of_base.shots == ic.images_of(draws[2].shots, BASE)


def test_base_and_new_are_the_halves_of_the_sorted_classes():
    assert BASE == ("eight", "five", "four", "nine", "one") and NEW == ("seven", "six", "three", "two", "zero")
    assert ic.base_and_new("edcbaa") == (("a", "b", "c"), ("d", "e"))
    with pytest.raises(ValueError, match=r"must be at least 4, .* got \['a', 'b', 'c'\]"):
        ic.base_and_new("abc")


def test_prompts_name_the_classes():
    assert ic.class_prompts(["tree_frog", "cat"]) == {
        "cat": "a photo of a cat.",
        "tree_frog": "a photo of a tree frog.",
    }
    assert ic.class_prompts(["n01"], "{}, a fish", {"n01": "tench", "n02": "goldfish"}) == {"n01": "tench, a fish"}
    with pytest.raises(ValueError, match=r"names must have one for each of 2 classes, got none for \['n02'\]"):
        ic.class_prompts(["n01", "n02"], names={"n01": "tench"})
    with pytest.raises(ValueError, match=r"template must be a text with one \{\}"):
        ic.class_prompts(["cat"], "a photo")
    with pytest.raises(TypeError, match="classes must be several names, got the text 'cat'"):
        ic.class_prompts("cat")


def test_zero_shot_logits_are_those_of_clip(images):
    clip, shown = make_clip(), pixels(images)
    tokens = make_tokenizer()(list(PROMPTS.values()), padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = clip(**tokens, pixel_values=shown).logits_per_image
        torch.testing.assert_close(make_classifier(clip)(shown).logits, expected, rtol=1e-5, atol=1e-5)
        some = make_classifier(clip)
        some.set_classes(NEW)
        columns = [list(PROMPTS).index(name) for name in NEW]
        torch.testing.assert_close(some(shown).logits, expected[:, columns], rtol=1e-5, atol=1e-5)


def count_text_passes(clip):
    passes = []
    clip.text_model.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_frozen_features_are_computed_no_more_often_than_they_change(images):
    clip, shown = make_clip(), pixels(images)
    apt = petl_ext.attach(clip, petl_ext.APTConfig(num_prompts=3, sites=[r"vision_model\..*self_attn"]))
    classifier, passes = make_classifier(clip), count_text_passes(clip)
    classifier(shown)
    classifier.train()(shown)
    assert len(passes) == 2
    with torch.inference_mode():
        classifier.freeze()
        classifier(shown)
    classifier(shown, torch.zeros(4, dtype=torch.long)).loss.backward()
    assert len(passes) == 3  # and the backward found no tensor of inference mode
    classifier.to("cpu").eval()(shown)
    with apt.disable():
        classifier(shown)
    assert len(passes) == 3  # nothing in the text encoder was disabled
    classifier.set_classes(NEW)
    assert not classifier.is_frozen
    classifier.freeze()
    with torch.no_grad():
        clip.text_projection.weight.mul_(2)
    classifier(shown)
    classifier(shown)
    assert len(passes) == 6 and not classifier.is_frozen
    classifier.freeze()
    classifier.load_state_dict(classifier.state_dict())
    assert not classifier.is_frozen


def test_features_of_prompts_with_apt_follow_it(images):
    clip, shown = make_clip(), pixels(images)
    classifier = make_classifier(clip)
    with torch.no_grad():
        backbone = classifier(shown).logits
    apt = petl_ext.attach(clip, petl_ext.APTConfig(num_prompts=3, sites=[r"text_model\..*self_attn"]))
    passes = count_text_passes(clip)
    classifier(shown, torch.zeros(4, dtype=torch.long)).loss.backward()
    assert all(weight.grad is not None for weight in apt.parameters())
    classifier.freeze()
    with pytest.raises(RuntimeError, match="frozen features pass no gradient on"):
        classifier(shown)
    with torch.no_grad():
        attached = [classifier(shown).logits for _ in range(2)]
        assert len(passes) == 2 and not torch.equal(attached[0], backbone)
        with apt.disable():
            assert torch.equal(classifier(shown).logits, backbone)
        assert torch.equal(classifier(shown).logits, attached[1])
        next(apt.parameters()).add_(1)
        assert not torch.equal(classifier(shown).logits, attached[1])
        changed = classifier(shown).logits
    optimizer = torch.optim.AdamW(apt.parameters(), 1.0, fused=True)  # which does not count up the weights' versions
    classifier(shown, torch.zeros(4, dtype=torch.long)).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(classifier(shown).logits, changed)
        classifier.freeze()
        twin = copy.deepcopy(classifier)
        assert not twin.is_frozen and torch.equal(twin(shown).logits, classifier(shown).logits)


@needs_add_adapter
def test_frozen_features_follow_what_is_set_in_layers():
    clip = make_clip()
    clip.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    classifier = make_classifier(clip).eval()
    passes = count_text_passes(clip)
    with torch.no_grad():
        classifier.freeze()
        adapted = [classifier.text_features() for _ in range(2)][1]
        clip.disable_adapters()  # changes neither classes of modules nor weights
        backbone = classifier.text_features()
        assert not torch.equal(backbone, adapted)
        clip.enable_adapters()
        assert torch.equal(classifier.text_features(), adapted) and len(passes) == 2
        for module in clip.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", 0.0)
        torch.testing.assert_close(classifier.text_features(), backbone)
    assert len(passes) == 3


def train(classifier, images, output, steps):
    arguments = TrainingArguments(
        output,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(images),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = dataset(images, classifier.classes, cache_images=True)
    trainer = Trainer(classifier, arguments, train_dataset=data, eval_dataset=data, compute_metrics=ic.compute_metrics)
    before = trainer.evaluate()
    trainer.train()
    return before, trainer.evaluate()


def test_training_on_base_classes_leaves_the_new_ones_to_the_prompts(images, tmp_path):
    clip = make_clip()
    weights = {name: weight.clone() for name, weight in clip.state_dict().items()}
    apt = petl_ext.attach(clip, petl_ext.APTConfig(num_prompts=8))
    classifier = make_classifier(clip)
    classifier.set_classes(BASE)
    shots = ic.draw_shots(ic.images_of(images, BASE), 2, seed=0).shots
    before, after = train(classifier, shots, tmp_path / "trainer", steps=40)
    assert after["eval_loss"] < before["eval_loss"] / 2 and after["eval_accuracy"] > before["eval_accuracy"]
    assert all(torch.equal(clip.state_dict()[name], weight) for name, weight in weights.items())
    shown, classifier = pixels(images), classifier.eval()
    classifier.set_classes(NEW)
    with torch.no_grad():
        trained = classifier(shown).logits
        with apt.disable():
            assert not torch.equal(classifier(shown).logits, trained)
        apt.save(tmp_path / "apt")
        fresh = make_clip()
        petl_ext.load(fresh, tmp_path / "apt")
        classifier = make_classifier(fresh)
        classifier.set_classes(NEW)
        assert torch.equal(classifier(shown).logits, trained)


def test_accuracy_by_class_and_harmonic_mean():
    logits, labels = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 0, 2])
    assert ic.accuracy_by_class(logits, labels, ("a", "b", "c")) == {"a": 0.5, "b": 1.0, "c": 1.0}
    assert ic.accuracy_by_class(logits[:2], labels[:2], ("a", "b", "c")) == {"a": 1.0, "b": 1.0}
    assert ic.harmonic_mean(0.8247, 0.7407) == pytest.approx(2 / (1 / 0.8247 + 1 / 0.7407))
    assert ic.harmonic_mean(0.0, 0.0) == ic.harmonic_mean(0.5, 0.0) == 0
    with pytest.raises(ValueError, match=r"logits must have shape \[n, 2\], got \[4, 3\]"):
        ic.accuracy_by_class(logits, labels, ("a", "b"))
    with pytest.raises(ValueError, match="labels must be 4, one per row of logits, got 2"):
        ic.accuracy_by_class(logits, labels[:2], ("a", "b", "c"))


def test_images_that_do_not_fit_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="class 'eight' must have at least 31 images for 31 shots, got 30"):
        ic.draw_shots(images, 31, seed=0)
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        ic.draw_shots(images, 0, seed=0)
    with pytest.raises(ValueError, match=r"must have images each, got none of \['ten'\]"):
        ic.images_of(images, ["one", "ten"])
    with pytest.raises(ValueError, match=r"must be of one of the 2 classes one, two, got 'eight'"):
        dataset(images, ["one", "two"])
    with pytest.raises(ValueError, match="images must be at least one"):
        dataset([])
    unreadable = ic.read_image_folder(empty_folder(tmp_path, "one/broken.png"))
    with pytest.raises(ValueError, match=r"broken.png must be an image \(class 'one'\)"):
        dataset(unreadable)[0]


def test_images_of_16_bits_are_refused_rather_than_white(tmp_path):
    empty_folder(tmp_path, "one/a.png")
    Image.new("I;16", (16, 16), 20000).save(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError, match=r"a.png must be an image .* more than 8 bits per channel \(mode I"):
        dataset(ic.read_image_folder(tmp_path), ["one"])[0]


def test_classes_that_cannot_be_told_apart_are_refused():
    classifier = make_classifier(make_clip())
    with pytest.raises(ValueError, match=r"must be some of .*, which have prompts, got \['ten'\]"):
        classifier.set_classes(["one", "ten"])
    for classes in (["one"], ["one", "one"]):
        with pytest.raises(ValueError, match="must be at least two different ones, got"):
            classifier.set_classes(classes)
    assert classifier.classes == tuple(PROMPTS)
    with pytest.raises(ValueError, match="prompts must have at most 16 tokens, got 19 in 'photo"):
        CLIPClassifier(make_clip(), make_tokenizer(), {"a": "a", "b": "photo " * 17})
    with pytest.raises(TypeError, match=r"prompts must be one text per class, got \['a red one', 'a one'\]"):
        CLIPClassifier(make_clip(), make_tokenizer(), {"one": ["a red one", "a one"], "two": ["a red two", "a two"]})


def test_a_caption_may_be_true_of_several_images():
    logits, true = torch.randn(2, 3, dtype=torch.double), torch.tensor([[True, True, False], [False, True, True]])
    per_image = -(logits.log_softmax(1) * true / 2).sum(1)
    per_caption = -(logits.log_softmax(0) * true / true.sum(0)).sum(0)
    torch.testing.assert_close(contrastive_loss(logits, true), (per_image.mean() + per_caption.mean()) / 2)


def test_a_pretrained_folder_loads(tmp_path):
    pretrain(tmp_path / "clip", schedule=Schedule(steps=2, batch=8), progress=False)
    assert CLIPModel.from_pretrained(tmp_path / "clip").logit_scale < 4.7


@needs_auto_image_processor
def test_the_example_measures_every_protocol(folder, tmp_path, capsys):
    example, fast = load_example("clip_few_shot"), ["--steps", "2", "--num-prompts", "4", "--seeds", "1"]
    example.main(
        ["--digits", "--pretraining-steps", "2", "--shots", "1", "2", *fast, "--output", str(tmp_path / "out")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == ["zero-shot", "1", "2"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results) == 3 + 2 + 2
    clip = CLIPModel.from_pretrained(tmp_path / "out" / "digits" / "clip")
    apt = petl_ext.load(clip, tmp_path / "out" / "2-shots-of-5-classes-seed-1")
    assert apt.config.num_prompts == 4

    own = ["--model", str(tmp_path / "out" / "digits" / "clip"), "--images", str(folder), "--train", "projections"]
    example.main([*own, "--shots", "20", *fast, "--output", str(tmp_path / "own")])
    assert "| 20 |" in capsys.readouterr().out
    tested = empty_folder(tmp_path / "tested", "ten/a.png")
    with pytest.raises(ValueError, match=r"tested must hold the classes of .*, got \['ten'\]"):
        example.main([*own, "--test-images", str(tested)])
    with pytest.raises(SystemExit):
        example.main([*own, "--test-images", str(folder)])
    assert "--test-images is the folder of --images" in capsys.readouterr().err


@needs_auto_image_processor
def test_the_example_trains_a_checkpoint_of_half_precision_in_float32(folder, tmp_path):
    clip = tmp_path / "clip"
    pretrain(clip, schedule=Schedule(steps=2, batch=8), progress=False)
    CLIPModel.from_pretrained(clip).half().save_pretrained(clip)
    files = ["--model", str(clip), "--images", str(folder), "--output", str(tmp_path / "out")]
    example = load_example("clip_few_shot")
    example.main([*files, "--shots", "1", "--steps", "2", "--num-prompts", "4", "--seeds", "1"])
    weights = load_file(tmp_path / "out/1-shots-of-10-classes-seed-1/petl_weights.safetensors").values()
    assert all(weight.dtype is torch.float32 and weight.isfinite().all() for weight in weights)


def test_the_table_of_the_example():
    example = load_example("clip_few_shot")
    accuracies = {(0, "all"): (0.5, 0.5), (4, "all"): (0.6, 0.8), (4, "base"): (0.5, 0.5), (4, "new"): (0.25, 0.5)}
    results = [
        {"shots": shots, "seed": seed, "classes": of, "accuracy": accuracy}
        for (shots, of), both in accuracies.items()
        for seed, accuracy in enumerate(both)
    ]
    assert example.table(results).splitlines()[2:] == [
        "| zero-shot | 50.0% |  |  |  |",
        "| 4 | 70.0% ± 14.1% | 50.0% | 37.5% ± 17.7% | 41.7% ± 11.8% |",
    ]
