"""Subject-driven generation with Stable Diffusion: a few images, a prompt for them, and the loss to train the UNet by.

As DreamBooth does it (arXiv 2208.12242): the prompt names the subject by a rare word, "a photo of sks dog". With prior
preservation, images that the model itself made of the class, "a photo of a dog", are trained on beside them, so that
not every dog becomes the subject.

The image encoder (VAE) and the text encoder are frozen, and a subject has few images: all are encoded once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_ext.tasks.inputs import IMAGE_SUFFIXES, is_image_file, read_image

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["EncodedImages", "SubjectDataset", "denoising_loss", "encode_images", "read_images"]


def read_images(folder: str | Path, size: int) -> Tensor:
    """The images in a folder but hidden ones, in the order of their names: [n, 3, size, size], values from -1 to 1.

    An image is turned as its EXIF orientation says, as photographs of phones need it; the shorter side is scaled to
    `size`, and of the longer one the middle is taken.

    Raises FileNotFoundError if there is no such folder, ValueError if it holds no image or one that cannot be decoded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be the folder of the images, got no such folder")
    paths = sorted(path for path in folder.iterdir() if is_image_file(path))
    if not paths:
        raise ValueError(f"{folder} must hold images ({', '.join(IMAGE_SUFFIXES)}), got none")
    return torch.stack([_pixels(read_image(path, path.stem), size) for path in paths])


def _pixels(image: "PIL.Image.Image", size: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    square = ImageOps.fit(ImageOps.exif_transpose(image), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class EncodedImages:
    """What a UNet is trained on: images as the VAE has them, and one prompt's states.

    Attributes:
        means, stds: of the latents' distribution, scaled as the UNet sees them: [n, channels, height, width].
        prompt: the text encoder's states: [tokens, dim].
    """

    means: Tensor
    stds: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.means)

    def draw(self, index: int) -> Tensor:
        """Latents of one image, drawn anew: [channels, height, width]."""
        return self.means[index] + self.stds[index] * torch.randn_like(self.means[index])


@torch.no_grad()
def encode_images(pipeline: Any, images: Tensor, prompt: str) -> EncodedImages:
    """`images` [n, 3, height, width], from -1 to 1, and their prompt as a StableDiffusionPipeline's encoders see them.

    Args:
        pipeline: has `vae` and `encode_prompt`; its text encoder's states are the UNet's only condition.

    Raises ValueError for images that the VAE cannot halve as often as it has to.
    """
    vae, factor = pipeline.vae, pipeline.vae_scale_factor
    if images.shape[-1] % factor or images.shape[-2] % factor:
        raise ValueError(f"images must have sides that {factor} divides, got {list(images.shape[-2:])}")
    latents = [vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist for image in images]
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    means, stds = (torch.cat([getattr(latent, name) for latent in latents]).float() for name in ("mean", "std"))
    states, _ = pipeline.encode_prompt(prompt, vae.device, 1, do_classifier_free_guidance=False)
    return EncodedImages((means - shift) * scale, stds * scale, states[0].float())


class SubjectDataset(torch.utils.data.Dataset):
    """The subject's images and, for prior preservation, beside each one of its class; torch's default collator batches
    them.

    An item is a dict of float32 tensors, first the subject's and then the class's: `latents` [1 or 2, channels, height,
    width], drawn anew, and `prompts` [1 or 2, tokens, dim].

    Args:
        subject: of `encode_images`.
        prior: likewise, of the class; all are seen in turn, however few images the subject has.

    Raises ValueError if `prior` is of another size than `subject`.
    """

    def __init__(self, subject: EncodedImages, prior: EncodedImages | None = None):
        if prior is not None and prior.means.shape[1:] != subject.means.shape[1:]:
            raise ValueError(
                f"prior must have latents of shape {list(subject.means.shape[1:])}, got {list(prior.means.shape[1:])}"
            )
        self.subject, self.prior = subject, prior

    def __len__(self) -> int:
        return len(self.subject) if self.prior is None else max(len(self.subject), len(self.prior))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sources = [self.subject] if self.prior is None else [self.subject, self.prior]
        return {
            "latents": torch.stack([source.draw(index % len(source)) for source in sources]),
            "prompts": torch.stack([source.prompt for source in sources]),
        }


def denoising_loss(
    unet: nn.Module, scheduler: Any, latents: Tensor, prompts: Tensor, prior_weight: float = 1.0
) -> Tensor:
    """Mean squared error of what the UNet predicts of noised latents, each at a random time.

    The target is what the UNet was trained to predict: the noise ("epsilon"), or the velocity ("v_prediction", arXiv
    2202.00512).

    Args:
        scheduler: of diffusers, whichever the pipeline samples by: only its `alphas_cumprod`, and `num_train_timesteps`
            and `prediction_type` of its config, are asked for.
        latents: [batch, 1 or 2, channels, height, width], as `SubjectDataset` makes them.
        prompts: [batch, 1 or 2, tokens, dim].
        prior_weight: the loss is the subject's plus so many times the class's.

    Raises ValueError for another prediction type, or another number of images than 1 or 2.
    """
    images = latents.shape[1]
    if images not in (1, 2):
        raise ValueError(f"latents must have 1 or 2 images per item, the subject's and its class's, got {images}")
    latents, prompts = latents.flatten(0, 1), prompts.flatten(0, 1)
    noise = torch.randn_like(latents)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    # Not by add_noise, with which samplers such as Euler's scale their latents as no UNet has seen them.
    kept = scheduler.alphas_cumprod.to(latents.device)[times].to(latents.dtype).view(-1, 1, 1, 1)
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    target = _target(scheduler.config.prediction_type, latents, noise, signal, spread)
    prediction = unet(signal * latents + spread * noise, times, prompts).sample
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    losses = errors.view(-1, images).mean(dim=0)
    return losses[0] if images == 1 else losses[0] + prior_weight * losses[1]


def _target(prediction_type: str, latents: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return signal * noise - spread * latents
    raise ValueError(f'scheduler must have the prediction type "epsilon" or "v_prediction", got {prediction_type!r}')
