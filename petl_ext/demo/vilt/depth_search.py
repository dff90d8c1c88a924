"""The search for the layers of the small ViLT that the digits task does not need."""

from petl_ext import DASConfig, attach
from petl_ext.demo.resumable_search import ResumableSearch, train_with_search
from petl_ext.demo.vilt.training import BOTTLENECK, Method, ViltRun, any_inputs, make_model
from petl_ext.search import DepthSearch

DAS = Method("DAS, 1 of 4 layers skipped", DASConfig(bottleneck=BOTTLENECK), 1e-2, 1e-2, num_skip=1)
WARMUP_SHARE = 5  # the first update comes after one part in so many of the steps
# DAS has 10 and 1. Here, steps are few, and rewards exp(-loss) of 0.01 to 0.07: with a step size of 1 no preference
# goes beyond 0.04, and draws stay uniform.
INTERVAL, STEP_SIZE = 5, 100.0


class DigitsDepthSearch(ResumableSearch):
    """`petl-ext search das`: a `DepthSearch`; its goal is {"num_skip": n} or {"max_macs": share}."""

    run_class, name, picture, interval = ViltRun, "das", "gates.png", INTERVAL

    def result(self):
        """What was found, ready for JSON: `DASConfig(skip=result["skip"])`."""
        return {"skip": list(self.search.selection()), "macs": round(self.search.macs(), 4)}

    @staticmethod
    def check_goal(size, goal):
        model = make_model(DAS, num_labels=2)
        _new_search(attach(model, DAS.config), size, goal, any_inputs(model.config))

    @staticmethod
    def new_search(run, goal, method=DAS):
        inputs = run.task.inputs("val", run.size.batch)
        return _new_search(run.attach(method), run.size, goal, inputs, run.seed)

    @staticmethod
    def train_search(search, run, checkpoint=None, method=DAS, **arguments):
        trainer = run.for_search().trainer(search.attachment, method, **arguments)
        train_with_search(trainer, search, run.task.datasets["val"], checkpoint)


def find_layers(method, run):
    """The `DepthSearch` that has chosen `method.num_skip` layers, on a model of its own."""
    search = DigitsDepthSearch.new_search(run, {"num_skip": method.num_skip}, method)
    DigitsDepthSearch.train_search(search, run, method=method)
    return search


def _new_search(attachment, size, goal, inputs, seed=0):
    steps = size.search_steps
    return DepthSearch(
        attachment.model,
        **goal,
        inputs=inputs,
        seed=seed,
        warmup_steps=steps // WARMUP_SHARE,
        search_steps=steps,
        interval=INTERVAL,
        step_size=STEP_SIZE,
    )
