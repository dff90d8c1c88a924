"""The search for the layer of MiniLM at which the visual prompt enters best."""

import math

from petl_ext.demo.dvp.models import freeze_below, share_prompt_layers
from petl_ext.demo.dvp.training import LAYERS, DVPRun, Method
from petl_ext.demo.resumable_search import ResumableSearch, train_with_search
from petl_ext.search import PlacementSearch

# The authors' values are 1, no warm-up and, for accuracies over thousands of updates, 0.005. Earlier, losses hardly
# differ.
INTERVAL, WARMUP_SHARE, STEP_SIZE = 4, 0.4, 1.0


class DigitsPlacementSearch(ResumableSearch):
    """`petl-ext search placement`: a `PlacementSearch` on digits VQA; there is no goal, {}."""

    run_class, name, picture, interval = DVPRun, "placement", "placement.png", INTERVAL

    def result(self):
        """What was found, ready for JSON: `DVPBert(..., insert_layer=result["insert_layer"])`."""
        return {"insert_layer": self.search.selection()}

    @staticmethod
    def new_search(run, goal):
        model = run.make_model(Method("search", "prompt", 0), "VQA", candidates="all")
        # Layers below the last make the candidates' queries; without the last, the head learns little of the prompt.
        freeze_below(model.language_model, LAYERS - 1)
        share_prompt_layers(model)
        steps = run.size.search_steps
        constants = {"warmup_steps": int(steps * WARMUP_SHARE), "search_steps": steps, "interval": INTERVAL}
        return PlacementSearch(model, run.seed, **goal, **constants, step_size=STEP_SIZE)

    @staticmethod
    def train_search(search, run, checkpoint=None, **arguments):
        trainer = run.for_search().trainer(search.model, "VQA", **arguments)
        train_with_search(trainer, search, run.tasks["VQA"].datasets["val"], checkpoint, _likelihood)


def find_insert_layer(run):
    """The `PlacementSearch` that has chosen a layer, on a model of its own."""
    search = DigitsPlacementSearch.new_search(run, {})
    DigitsPlacementSearch.train_search(search, run)
    return search


def _likelihood(model, batch):
    """100 * exp(-loss), the authors' score for ScienceQA: so early, the accuracy on 16 questions is mostly chance."""
    return 100 * math.exp(-model(**batch).loss.item())
