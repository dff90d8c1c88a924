"""Subject-driven generation: teaches Stable Diffusion's UNet a subject from a few images, by APT.

    python examples/subject_generation.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --images dog \\
        --prompt "a photo of sks dog" --sample-prompt "sks dog swimming" --mixed-precision fp16

--class-prompt "a photo of a dog" adds prior preservation, on images that the pipeline makes before training where there
are no --class-images. --output gets samples.png, whose rows are made of the same noise before and after, and apt, a
folder that `petl_ext.load(pipeline.unet, folder)` reads and --start-from goes on from.
"""

import argparse
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import petl_ext
from petl_ext.tasks.subject_generation import SubjectDataset, denoising_loss, encode_images, read_images

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(options, accelerator):
    """The frozen pipeline on the accelerator, its weights in the precision of the training."""
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, safety_checker=None)
    for part in (pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device, DTYPES[accelerator.mixed_precision])


def attach_apt(pipeline, options):
    """APT in every attention of the UNet, in float32 whatever the UNet's precision."""
    if options.start_from:
        attachment = petl_ext.load(pipeline.unet, options.start_from)
    else:
        attachment = petl_ext.attach(pipeline.unet, petl_ext.APTConfig(options.num_prompts, options.rank))
    cast_training_params(pipeline.unet, torch.float32)
    if options.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return attachment


def make_data(pipeline, options):
    """The subject's images, and the class's where there is a class prompt, encoded."""
    size = options.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    subject = encode_images(pipeline, read_images(options.images, size), options.prompt)
    if not options.class_prompt:
        return SubjectDataset(subject)
    folder = options.class_images or make_class_images(pipeline, size, options)
    return SubjectDataset(subject, encode_images(pipeline, read_images(folder, size), options.class_prompt))


def make_class_images(pipeline, size, options):
    """The folder of the class's images by the pipeline itself; those of an earlier run are not made again."""
    folder = options.output / re.sub(r"\W+", "-", options.class_prompt)
    folder.mkdir(exist_ok=True)
    for index in tqdm(range(options.num_class_images), desc="class images", disable=options.quiet):
        path, seed = folder / f"{index:04d}.png", torch.Generator().manual_seed(index)
        if not path.exists():
            pipeline(options.class_prompt, size, size, options.sample_steps, generator=seed).images[0].save(path)
    return folder


def train(unet, attachment, scheduler, data, accelerator, options):
    """Trains what is attached; returns the losses, one per update."""
    optimizer = torch.optim.AdamW(attachment.parameters(), options.learning_rate, weight_decay=0.01)
    loader = DataLoader(data, options.batch, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet.train(), optimizer, loader)
    losses, bar = [], tqdm(total=options.steps, disable=options.quiet or not accelerator.is_local_main_process)
    while len(losses) < options.steps:
        for batch in loader:
            with accelerator.accumulate(unet):
                loss = denoising_loss(unet, scheduler, **batch, prior_weight=options.prior_weight)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(attachment.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=losses[-1])
            if len(losses) == options.steps:
                break
    accelerator.unwrap_model(unet, keep_fp32_wrapper=False).eval()
    return losses


def sample(pipeline, size, options):
    """A row of images, the same noise each time."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(options.num_samples)]
    prompts = [options.sample_prompt or options.prompt] * options.num_samples
    return pipeline(prompts, size, size, options.sample_steps, generator=seeds).images


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Stable Diffusion of diffusers: name or folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of the subject's images, three to five")
    parser.add_argument("--prompt", required=True, help='names the subject by a rare word: "a photo of sks dog"')
    parser.add_argument("--class-prompt", help='"a photo of a dog": preserve what the model knows of the class')
    parser.add_argument("--class-images", type=Path, help="folder of the class's images; default: makes them")
    parser.add_argument("--num-class-images", type=int, default=200, help="how many to make")
    parser.add_argument("--prior-weight", type=float, default=1.0)
    parser.add_argument("--resolution", type=int, help="default: the model's own")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--start-from", type=Path, help="folder of an earlier run's apt")
    parser.add_argument("--steps", type=int, default=500, help="updates")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--mixed-precision", choices=[*DTYPES], default="no")
    parser.add_argument("--sample-prompt", help="default: --prompt")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--sample-steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--output", type=Path, default=Path("subject_generation_out"))
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.gradient_accumulation
    )
    set_seed(options.seed, device_specific=True)
    options.output.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(options, accelerator)
    with accelerator.main_process_first():
        data = make_data(pipeline, options)
    size = data.subject.means.shape[-1] * pipeline.vae_scale_factor
    before = sample(pipeline, size, options)
    attachment = attach_apt(pipeline, options)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = train(pipeline.unet, attachment, scheduler, data, accelerator, options)
    if accelerator.is_main_process:
        after = sample(pipeline, size, options)
        make_image_grid(before + after, rows=2, cols=options.num_samples).save(options.output / "samples.png")
        attachment.save(options.output / "apt")
    return losses


if __name__ == "__main__":
    main()
