"""Subject-driven generation: images, their encoding, the loss, and the example from images to a grid."""

import pytest
import tiny_stable_diffusion as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from example_scripts import load_example
from PIL import ExifTags, Image

import petl_ext
from petl_ext.tasks import subject_generation as sg

LATENT = tiny.SIZE // tiny.FACTOR


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on several threads, much slower where other processes use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "clip")


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    return tiny.make_pipeline(tokenizer)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "subject").mkdir()
    for name, color, size in (("b.PNG", (255, 0, 0), (16, 32)), ("a.png", (0, 0, 255), (40, 20))):
        Image.new("RGB", size, color).save(tmp_path / "subject" / name)
    for name in ("notes.txt", "._a.png"):
        (tmp_path / "subject" / name).touch()
    return tmp_path / "subject"


def encoded(count, fill=0.0, spread=0.0):
    shape = (count, 4, LATENT, LATENT)
    return sg.EncodedImages(torch.full(shape, fill), torch.full(shape, spread), torch.full((tiny.WORDS, 20), fill))


def test_images_are_cropped_to_squares(tmp_path):
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 20, 10))  # the middle
    image.save(tmp_path / "a.png")
    read = sg.read_images(tmp_path, 8)
    assert read.shape == (1, 3, 8, 8)
    torch.testing.assert_close(read[0, :, 4, 4], torch.tensor([-1.0, -1.0, 1.0]))
    assert read[0, 2].min() > 0.9


def test_photographs_are_turned_upright(tmp_path):
    upright = Image.new("RGB", (16, 16), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 8, 16, 16))  # the lower half
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn clockwise to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif)
    red, blue = sg.read_images(tmp_path, 16)[0][[0, 2]]
    assert red[:6].min() > 0.9 and blue[-6:].min() > 0.9


def test_images_come_in_the_order_of_their_names(images):
    assert sg.read_images(images, 8)[:, 0, 0, 0].tolist() == [-1, 1]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere must be the folder of the images"):
        sg.read_images(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match=r"must hold images .*, got none"):
        sg.read_images(tmp_path, 8)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.png must be an image"):
        sg.read_images(tmp_path, 8)


def test_images_are_encoded_as_the_pipeline_would(pipeline, images):
    pixels = sg.read_images(images, tiny.SIZE)
    subject = sg.encode_images(pipeline, pixels, "a dog")
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist
        tokens = pipeline.tokenizer("a dog", padding="max_length", return_tensors="pt")
        states = pipeline.text_encoder(tokens.input_ids).last_hidden_state[0]
    scale = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(subject.means, latents.mean * scale)
    torch.testing.assert_close(subject.stds, latents.std * scale)
    torch.testing.assert_close(subject.prompt, states)
    assert not torch.equal(subject.draw(0), subject.draw(0))
    with pytest.raises(ValueError, match=r"images must have sides that 2 divides, got \[15, 15\]"):
        sg.encode_images(pipeline, torch.zeros(1, 3, 15, 15), "a dog")


def test_the_class_is_seen_beside_the_subject():
    data = sg.SubjectDataset(encoded(2, 1.0), encoded(5, 2.0))
    assert len(data) == 5 and len(list(data)) == 5
    assert data[3]["latents"].shape == (2, 4, LATENT, LATENT)
    assert data[3]["latents"].flatten(1).mean(1).tolist() == data[3]["prompts"].flatten(1).mean(1).tolist() == [1, 2]
    assert len(sg.SubjectDataset(encoded(2))) == 2 and sg.SubjectDataset(encoded(2))[1]["latents"].shape[0] == 1
    smaller = sg.EncodedImages(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.zeros(tiny.WORDS, 20))
    with pytest.raises(ValueError, match=r"prior must have latents of shape \[4, 8, 8\], got \[4, 2, 2\]"):
        sg.SubjectDataset(encoded(2), smaller)


def draw(prediction_type, tokenizer, images):
    pipeline = tiny.make_pipeline(tokenizer, prediction_type)
    torch.manual_seed(3)
    latents = torch.randn(3, images, 4, LATENT, LATENT)
    return pipeline.unet, pipeline.scheduler, latents, torch.randn(3, images, tiny.WORDS, 20)


def plain_errors(unet, scheduler, latents, prompts):
    """Mean squared error of every image, from the formulas; the random numbers are drawn in the same order."""
    latents, prompts = latents.flatten(0, 1), prompts.flatten(0, 1)
    noise, times = torch.randn_like(latents), torch.randint(1000, (len(latents),))
    alpha = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    target = {"epsilon": noise, "v_prediction": velocity}[scheduler.config.prediction_type]
    return (unet(noised, times, prompts).sample - target).square().mean((1, 2, 3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_mean_squared_error_of_the_prediction(prediction_type, tokenizer):
    problem = draw(prediction_type, tokenizer, images=1)
    torch.manual_seed(4)
    loss = sg.denoising_loss(*problem)
    torch.manual_seed(4)
    torch.testing.assert_close(loss, plain_errors(*problem).mean())


@pytest.mark.parametrize("sampler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_does_not_depend_on_the_sampler(prediction_type, sampler, tokenizer):
    unet, scheduler, *inputs = draw(prediction_type, tokenizer, images=1)
    torch.manual_seed(4)
    expected = sg.denoising_loss(unet, scheduler, *inputs)
    other = sampler.from_config(scheduler.config)
    other.set_timesteps(8)  # as the pipeline has left it
    torch.manual_seed(4)
    torch.testing.assert_close(sg.denoising_loss(unet, other, *inputs), expected)


def test_the_class_counts_as_much_as_its_weight(tokenizer):
    problem = draw("epsilon", tokenizer, images=2)
    torch.manual_seed(4)
    loss = sg.denoising_loss(*problem, prior_weight=0.25)
    torch.manual_seed(4)
    errors = plain_errors(*problem)
    torch.testing.assert_close(loss, errors[0::2].mean() + 0.25 * errors[1::2].mean())


def test_what_the_loss_cannot_be_made_of_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r'must have the prediction type "epsilon" or "v_prediction", got \'sample\''):
        sg.denoising_loss(*draw("sample", tokenizer, images=1))
    with pytest.raises(ValueError, match=r"latents must have 1 or 2 images per item, .* got 3"):
        sg.denoising_loss(*draw("epsilon", tokenizer, images=3))


@pytest.fixture
def example():
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process, says accelerate
    yield load_example("subject_generation")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def saved_pipeline(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable-diffusion")
    pipeline.save_pretrained(folder)
    return folder


def arguments(saved_pipeline, images, *more):
    fixed = {
        "--model": saved_pipeline,
        "--images": images,
        "--output": images.parent / "out",
        "--prompt": "a sks dog",
        "--num-samples": 2,
        "--sample-steps": 2,
        "--num-prompts": 4,
    }
    return [*(str(part) for pair in fixed.items() for part in pair), "--quiet", *more]


def test_the_example_trains_apt_and_draws_a_grid(example, saved_pipeline, pipeline, images):
    losses = example.main(arguments(saved_pipeline, images, "--steps", "60", "--batch", "2", "--learning-rate", "0.01"))
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    grid = Image.open(images.parent / "out" / "samples.png")
    assert grid.size == (2 * tiny.SIZE, 2 * tiny.SIZE)
    before, after = (grid.crop((0, top, 2 * tiny.SIZE, top + tiny.SIZE)) for top in (0, tiny.SIZE))
    assert before.tobytes() != after.tobytes()
    unet = type(pipeline.unet).from_pretrained(saved_pipeline, subfolder="unet")
    apt = petl_ext.load(unet, images.parent / "out" / "apt")
    assert len(apt.sites) == 8 and all(torch.equal(unet.state_dict()[name], t) for name, t in weights(pipeline))


def weights(pipeline):
    return pipeline.unet.state_dict().items()


def test_the_example_preserves_the_class_and_goes_on(example, saved_pipeline, images):
    steps = ("--steps", "2", "--mixed-precision", "bf16", "--gradient-accumulation", "2", "--gradient-checkpointing")
    prior = ("--class-prompt", "a dog", "--num-class-images", "3")
    assert len(example.main(arguments(saved_pipeline, images, *steps, *prior))) == 2
    assert len(list((images.parent / "out" / "a-dog").iterdir())) == 3
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = images.parent / "out" / "apt"
    assert len(example.main(arguments(saved_pipeline, images, *steps, "--start-from", str(folder)))) == 2
