"""Bottlenecks in an autocast of their own."""

import pytest
import torch
import torch.nn.functional as F
from plain_bottlenecks import DIM, Plain, checked, rows
from torch import nn

import petl_ext
from petl_ext.patching import dispatch

pytestmark = pytest.mark.usefixtures("no_floors")


class Within(Plain):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Without(Plain):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Decorated(Plain):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return self.widen(F.relu(self.narrow(x)))


class Usual(Plain):
    def forward(self, x):
        with torch.autocast("cpu"):
            return self.widen(F.relu(self.narrow(x)))


class OnGpus(Plain):
    def forward(self, x):
        with torch.autocast("cuda"):
            return super().forward(x)


class Casting(Plain):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.widen(F.relu(self.narrow(x))).to(x.dtype)


AUTOCASTS = {
    Within: (("cpu", True, torch.bfloat16),),
    Without: (("cpu", False, None),),
    Decorated: (("cpu", True, torch.bfloat16),),
    Usual: (("cpu", True, None),),
}


@pytest.mark.parametrize("make", AUTOCASTS)
def test_an_autocast_of_its_own_is_entered_again(make):
    model = make()
    assert petl_ext.patch(model).report().fused == 1
    assert model.petl_settings.autocast == AUTOCASTS[make]
    checked(model, rows(2, 5, DIM))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            checked(model, rows(2, 5, DIM))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of an autocast for a device that is not there")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_an_autocast_for_a_device_that_is_not_there_is_not_guessed():
    model = OnGpus()
    assert petl_ext.patch(model).report().fused == 1
    checked(model, rows(2, 5, DIM))
    assert dispatch.own_forward_for_now(model, "cuda", torch.float32).startswith("an autocast of its own on cuda")


def test_an_autocast_whose_output_is_cast_is_left_alone():
    with pytest.raises(ValueError, match=r"its forward returns torch.float32 of torch.float32 .*, not torch.bfloat16"):
        petl_ext.patch(nn.ModuleList([Casting()]))
