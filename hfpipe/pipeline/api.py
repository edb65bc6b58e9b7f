"""hfpipe in Python: what the command line does, with results as objects and errors as exceptions.

    from hfpipe import check, evaluate, load_recipe, run

    recipe = load_recipe("recipe.yaml", ["stages.chat.lora.r=8"])
    print(check(recipe))
    result = run(recipe)
    result.scores.value("chat", "exact_match")

Heavy libraries are imported when a function needs them.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe.core.errors import RecipeError, UserError
from hfpipe.core.importing import importing
from hfpipe.core.machine import machine_error
from hfpipe.core.run_lock import alone
from hfpipe.core.run_state import require_whole_state
from hfpipe.recipe import Recipe, Suites
from hfpipe.recipe import load_recipe as _load_recipe
from hfpipe.recipe import load_suites as _load_suites

if TYPE_CHECKING:
    from hfpipe.scores.scorecard import Score

RecipeLike = Recipe | str | Path | Mapping[str, Any]
SuitesLike = Suites | Recipe | str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Scorecard(Sequence["Score"]):
    """Scores, one a metric of a suite and a stage (or model), in the order in which they were measured.

    Args:
        scores: The scores; each has `stage`, `suite`, `metric`, `value`, `stderr`, `low`, `high`, `n`.
    """

    scores: tuple[Score, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, place: Any) -> Any:
        return self.scores[place]

    def of(self, suite: str | None = None, metric: str | None = None, stage: str | None = None) -> Scorecard:
        """The scores of a suite, a metric, a stage (or model); of all where None is said."""
        wanted = {"suite": suite, "metric": metric, "stage": stage}
        return Scorecard(
            tuple(
                score
                for score in self.scores
                if all(value is None or getattr(score, name) == value for name, value in wanted.items())
            )
        )

    def value(self, suite: str, metric: str | None = None, stage: str | None = None) -> float:
        """One number: the last score of a suite, where `metric` and `stage` do not choose another.

        Raises:
            KeyError: There is no such score.
        """
        found = self.of(suite, metric, stage)
        if not found:
            known = ", ".join(f"{one.stage} {one.suite} {one.metric}" for one in self.scores)
            raise KeyError(f"no score of {stage or 'any stage'}, {suite}, {metric or 'any metric'}; there are {known}")
        return found[-1].value

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain rows, for `pandas.DataFrame` and the like."""
        return [asdict(score) for score in self.scores]

    def __str__(self) -> str:
        from hfpipe.scores.wording import describe

        return "\n".join(f"{score.stage}  {score.suite}  {describe(score)}" for score in self.scores)

    def _repr_html_(self) -> str:
        from hfpipe.scores.wording import interval, number

        cells = [
            (
                one.stage,
                one.suite,
                f"{one.metric} {one.arrow}",
                number(one.value, one.metric),
                interval(one),
                f"{one.n:,}",
            )
            for one in self.scores
        ]
        head = "".join(f"<th>{name}</th>" for name in ("stage", "suite", "metric", "score", "95 % interval", "n"))
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


@dataclass(frozen=True)
class Run:
    """A run folder and what lies in it; in a notebook its report is shown.

    Args:
        folder: The run folder.
    """

    folder: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was run, with its defaults and the commits of model and data."""
        return _load_recipe(self.folder / "recipe.yaml")

    @property
    def scores(self) -> Scorecard:
        """All scores so far; empty before the base is scored."""
        from hfpipe.scores.scorecard import read_scorecard

        file = self.folder / "scorecard.json"
        return Scorecard(tuple(read_scorecard(file)) if file.exists() else ())

    @property
    def report(self) -> Path:
        """The report as one page of HTML; `report.md` lies beside it."""
        return self.folder / "report.html"

    def model(self, stage: str | None = None) -> Path:
        """The folder of the model or adapter that a stage left, as `from_pretrained` takes it.

        Args:
            stage: Which stage; the last finished one when None.

        Raises:
            RecipeError: There is no such finished stage.
        """
        from hfpipe.core.run_layout import model_of
        from hfpipe.pipeline.finished import finished_stage

        return model_of(self.folder / "stages" / finished_stage(self.folder, self.recipe, stage).name)

    def _repr_html_(self) -> str:
        if not self.report.exists():
            return f"<p>{html.escape(str(self.folder))} has no report yet.</p>"
        page = html.escape(self.report.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="700" style="border: 0" sandbox></iframe>'


def load_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; imports no heavy library.

    Args:
        recipe: A YAML file, the name of a recipe that comes with hfpipe (`quickstart`), or a mapping.
        overrides: Changes such as `stages.chat.lora.r=8`.

    Raises:
        RecipeError: With every fault of the recipe.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides are given together with the file or the mapping, not with a loaded recipe.")
        return recipe
    if isinstance(recipe, str) and not Path(recipe).exists():
        from hfpipe.recipe.shipped import shipped_recipes

        recipe = shipped_recipes().get(recipe, recipe)
    return _load_recipe(recipe, overrides)


def check(recipe: RecipeLike, overrides: Sequence[str] = ()) -> str:
    """Everything that can be known before training; see `hfpipe check`.

    Returns:
        The page: model, memory, disk, rows and tokens of each source, steps, suites, the Hub.

    Raises:
        UserError: Something would stop the run.
    """
    loaded = load_recipe(recipe, overrides)
    page = io.StringIO()
    with _plainly(), redirect_stdout(page):
        from hfpipe.pipeline.check import check_recipe

        check_recipe(loaded, "hfpipe.run(recipe)")
    return page.getvalue()


def run(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Run:
    """Runs a recipe, or what is left of it; see `hfpipe run`.

    Raises:
        BudgetExceeded: A suite lost more than its budget allows; what was trained stays.
        UserError: Something stopped the run; the same call continues it.
    """
    loaded = load_recipe(recipe, overrides)
    with _plainly(), alone(loaded.run_folder):
        if loaded.seeds or loaded.cross_validation:
            from hfpipe.pipeline.repeats import run_repeats

            return Run(run_repeats(loaded))
        with importing():
            from hfpipe.pipeline.cure import run_with_cures

        return Run(run_with_cures(loaded))


def open_run(folder: str | Path) -> Run:
    """A run that was made before.

    Raises:
        RecipeError: The folder is none of a run.
        DataError: One of its files is damaged.
    """
    place = Path(folder)
    if not (place / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} is not a run folder (it has no recipe.yaml).")
    require_whole_state(place)
    return Run(place)


def evaluate(
    model: str | Path | Run,
    suites: SuitesLike,
    *,
    suite: Sequence[str] | str | None = None,
    limit: int | None = None,
    stage: str | None = None,
    against: str | Path | None = None,
) -> Scorecard:
    """Scores any model on suites, without a training; see `hfpipe evaluate`.

    Args:
        model: A Hub id, a folder of a model or an adapter, or a run.
        suites: A file with an `evaluate:` block, a recipe, or a mapping.
        suite: The names of some of the suites; all when None.
        limit: Rows of each suite, from the beginning; all when None.
        stage: Of a run: which stage; its last finished one when None.
        against: Another model, scored on the same rows first, with which each score is paired.

    Raises:
        UserError: There is no such model or suite, or the model can answer none of them.
    """
    loaded = suites if isinstance(suites, Suites) else None
    if isinstance(suites, Recipe):
        loaded = Suites(seed=suites.seed, model=suites.model, evaluate=suites.evaluate)
    elif not isinstance(suites, Suites):
        loaded = _load_suites(suites)
    assert loaded is not None
    name = model.folder if isinstance(model, Run) else model
    with _plainly():
        from hfpipe.pipeline.evaluate import evaluate_model
        from hfpipe.recipe.choose import chosen_suites

        names = [suite] if isinstance(suite, str) else suite
        other = None if against is None else str(against)
        found = evaluate_model(str(name), chosen_suites(loaded, names, limit), None, other, stage)
    return Scorecard(tuple(found))


@contextmanager
def _plainly() -> Iterator[None]:
    """Raises what the machine cannot do as the `MachineError` that the command line would tell."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if known := machine_error(error):
            raise known from error
        raise
