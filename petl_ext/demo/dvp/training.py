"""How the DVP demo trains: all rows of a task see the same data in the same order."""

from dataclasses import dataclass, replace

from transformers import set_seed

from petl_ext.demo.dvp.data import NAMES, initial_texts, read_tasks
from petl_ext.demo.dvp.models import MeanPromptLayer, PromptedBert, freeze_below, make_dvp, read_language_model
from petl_ext.demo.training import Run, Size, groups_by_rate

LAYERS = 6  # of MiniLM


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        visual_input: "text only", "all tokens", "mean" or "prompt".
        insert_layer: where the prompt enters and the lowest layer of which something is trained; None stands for the
            search's choice.
    """

    name: str
    visual_input: str
    insert_layer: int | None = None
    use_adapters: bool = False


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the language model, of its adapters and norms, of new layers and of the head."""

    language_model: float = 1e-4
    adapters: float = 1e-3
    new: float = 2e-3
    head: float = 2e-3


RATES = Rates()


@dataclass(frozen=True)
class DVPRun(Run):
    """What all trainings of one command have in common, with {name: task}; on VQA they have `size.steps` steps, on GQA
    and SNLI-VE half as many."""

    tasks: dict

    full = Size(
        steps=320,
        search_steps=120,
        batch=32,
        search_batch=16,
        questions_per_scene=3,
        scenes={"train": 2500, "val": 300, "test": 500},
    )
    quick = Size(
        steps=8,
        search_steps=8,
        batch=16,
        search_batch=16,
        questions_per_scene=3,
        scenes={"train": 60, "val": 20, "test": 30},
    )
    data_name, formats = "digits-dvp", ("vqa", "gqa", "snli_ve")

    @staticmethod
    def read(folder, tasks=NAMES):
        """The tasks of these names in `folder`."""
        return read_tasks(folder, tasks)

    def make_model(self, method, task, **options):
        """A new model of a method, on CPU and in training mode."""
        set_seed(self.seed)
        num_labels, width = len(self.tasks[task].vocabulary), self.visual_dim
        if method.visual_input in ("text only", "all tokens"):
            prompt_width = width if method.visual_input == "all tokens" else None
            model = PromptedBert(read_language_model(), num_labels, prompt_width)
            freeze_below(model.language_model, method.insert_layer)
            return model.train()
        options = {"insert_layer": method.insert_layer, "use_adapters": method.use_adapters, **options}
        model = make_dvp(num_labels, width, initial_texts(self.tasks[task]), **options)
        freeze_below(model.language_model, method.insert_layer)
        if method.visual_input == "mean":
            model.visual_prompts[0] = MeanPromptLayer.like(model.visual_prompts[0])
        return model

    @property
    def visual_dim(self):
        """Dv."""
        task = next(iter(self.tasks.values()))
        return task.datasets["train"][0]["visual_features"].size(1)

    def trainer(self, model, task, **arguments):
        """The Trainer of a model of `make_model`."""
        run = self if task == "VQA" else replace(self, size=replace(self.size, steps=self.size.steps // 2))
        return run.quiet_trainer(model, self.tasks[task], _groups(model), **arguments)


def _groups(model):
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted = any(".adapter." in name for name, _ in model.named_parameters())
    of_language_model = RATES.adapters if adapted else RATES.language_model
    rates = {"language_model": of_language_model, "classifier": RATES.head}
    return groups_by_rate(trained, lambda name: rates.get(name.partition(".")[0], RATES.new))
