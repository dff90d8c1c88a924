"""The sizes at which ops are compared: those that the models they serve have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    model: str
    batch: int
    tokens: int
    dim: int

    @property
    def rows(self):
        return self.batch * self.tokens

    def __str__(self):
        return f"{self.model}-b{self.batch}"


VILT = Shape("vilt", batch=8, tokens=240, dim=768)
VILT_ONE = Shape("vilt", batch=1, tokens=240, dim=768)
VILT_MANY = Shape("vilt", batch=64, tokens=240, dim=768)
METER_TEXT_ONE = Shape("meter-text", batch=1, tokens=40, dim=768)
METER_IMAGE_ONE = Shape("meter-image", batch=1, tokens=577, dim=768)
METER_IMAGE = Shape("meter-image", batch=4, tokens=577, dim=768)
# ViT-B/16 at 224 pixels, with its class token.
CLIP_IMAGE = Shape("clip-image", batch=8, tokens=197, dim=768)
CLIP_IMAGE_ONE = Shape("clip-image", batch=1, tokens=197, dim=768)
CLIP_IMAGE_MANY = Shape("clip-image", batch=64, tokens=197, dim=768)
CLIP_TEXT = Shape("clip-text", batch=32, tokens=77, dim=512)
LLAMA = Shape("llama", batch=1, tokens=512, dim=4096)
