"""How the demo trains: all rows see the same blocks in the same order for the same number of steps."""

import copy
import math
import time
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from petl_ext import AdapterConfig, APTConfig, DASConfig, attach
from petl_ext.demo.easy_vqa.language_models import read_smollm2
from petl_ext.demo.llama.data import Manual


@dataclass(frozen=True)
class Size:
    """How much is read and trained, in blocks of `length` tokens."""

    steps: int
    batch: int
    length: int
    held_out: int
    compared: int
    search_steps: int
    generated: int
    rounds: int


FULL = Size(steps=24, batch=4, length=64, held_out=24, compared=4, search_steps=12, generated=32, rounds=4)
QUICK = Size(steps=1, batch=1, length=16, held_out=2, compared=1, search_steps=4, generated=4, rounds=1)


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        config: of `attach`; None for the bare model, and "LoRA" for PEFT's.
        num_skip: how many layers a search takes out first.
    """

    name: str
    config: object = None
    rate: float = 1e-3
    num_skip: int = 0


# Zero at the start, as the authors' adapters for LLaMA: a skipped layer begins by passing its input on.
DAS = DASConfig(bottleneck=16, bypass_bottleneck=64, zero_init=True)
LORA = LoraConfig(r=8, lora_alpha=8, target_modules=r".*\.([qkvo]_proj|gate_proj|up_proj|down_proj)")
ROWS = (
    Row("bare"),
    Row("APT, 50 prompts", APTConfig(num_prompts=50)),
    Row("adapter", AdapterConfig(bottleneck=48, zero_init=True)),
    Row("LoRA of rank 8", "LoRA"),
    Row("DAS, 4 of 30 layers skipped", DAS, num_skip=4),
    Row("DAS, 8 of 30 layers skipped", DAS, num_skip=8),
)


@dataclass(frozen=True)
class LlamaRun:
    """What all trainings of one command have in common.

    Attributes:
        whole: SmolLM2 with its head, as it was read.
    """

    size: Size
    seed: int
    progress: bool
    tokenizer: object
    whole: nn.Module = field(repr=False)
    manual: Manual = field(repr=False)

    @classmethod
    def prepare(cls, size, seed, progress):
        """Reads SmolLM2 and the manual."""
        tokenizer, model = read_smollm2()
        return cls(size, seed, progress, tokenizer, model.eval(), Manual.read(tokenizer, size.length, size.held_out))

    def new_model(self, config=None):
        """(a copy of SmolLM2 with what the configuration attaches, the attachment or None)."""
        set_seed(self.seed)
        model = copy.deepcopy(self.whole)
        if config is None:
            return model.requires_grad_(False), None
        if config == "LoRA":
            return inject_adapter_in_model(LORA, model), None
        return model, attach(model, config)

    def batches(self, steps):
        """As many batches of train [batch, length], the same for every model."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.manual.train), generator=generator).repeat(
            steps * self.size.batch // len(self.manual.train) + 1
        )
        for step in range(steps):
            yield self.manual.train[order[step * self.size.batch : (step + 1) * self.size.batch]]

    def train(self, model, rate, description):
        """Trains to the end; returns the seconds that it took."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, schedule = new_optimizer(trained, rate, self.size.steps)
        start = time.perf_counter()
        bar = tqdm(self.batches(self.size.steps), description, self.size.steps, leave=False, disable=not self.progress)
        model.train()
        for blocks in bar:
            loss_of(model, blocks).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        return time.perf_counter() - start

    @torch.no_grad()
    def perplexity(self, model):
        """(of the test part, one standard error of it over the blocks)."""
        losses = torch.stack([loss_of(model, block[None]) for block in self.manual.test]).double()
        mean, error = losses.mean().item(), losses.std().item() / math.sqrt(len(losses))
        return math.exp(mean), math.exp(mean) * error

    @torch.no_grad()
    def continued(self, model, count=None):
        """The prompt's likeliest continuation by as many tokens, with the cache."""
        prompt = self.tokenizer(self.manual.prompt, return_tensors="pt")["input_ids"]
        count = self.size.generated if count is None else count
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return self.tokenizer.decode(tokens[0, prompt.size(1) :])


def new_optimizer(parameters, rate, steps):
    """(AdamW, a schedule that rises for a tenth of the steps and then falls to zero)."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
    rise = max(1, steps // 10)

    def share(step):
        return min((step + 1) / rise, (steps - step) / (steps - rise + 1))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def loss_of(model, blocks):
    """Cross-entropy of each token of the blocks [B, length] but the first."""
    return model(input_ids=blocks, labels=blocks, use_cache=False).loss
