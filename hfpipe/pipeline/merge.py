"""Merges an adapter of a finished run into its base: `hfpipe merge RUN`."""

from __future__ import annotations

from pathlib import Path

from hfpipe.core.errors import RecipeError
from hfpipe.core.run_layout import ADAPTER_CONFIG, model_of, require_whole
from hfpipe.model.load import ModelRef
from hfpipe.pipeline.context import is_parent, merged_model, open_run, quiet_libraries
from hfpipe.pipeline.finished import finished_adapter
from hfpipe.recipe import Merge, load_recipe


def merge_run(folder: Path, stage: str | None, dtype: str | None = None) -> str:
    """Merges an adapter of a run into its base and verifies the result.

    Args:
        folder: The run folder.
        stage: Which stage's adapter; None for the last one.
        dtype: Precision of the merged weights; that of the recipe's `merge:` or of the base's files when None.

    Returns:
        Where the merged model lies.

    Raises:
        RecipeError: There is no such adapter, or a later stage starts from its merged weights as they are.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    name = finished_adapter(folder, recipe, stage)
    if dtype is not None and is_parent(recipe, name):
        raise RecipeError(
            f"--dtype {dtype}: a later stage of {folder} starts from the merged weights of {name}, which stay as "
            "they are. Leave it out."
        )
    require_whole(model_of(folder / "stages" / name))
    _require_base(folder, ModelRef(str(model_of(folder / "stages" / name)), recipe.model))
    quiet_libraries()
    block = recipe.merge if isinstance(recipe.merge, Merge) else Merge.model_validate({})
    if dtype is not None:
        block = block.model_copy(update={"dtype": dtype})
    with_place = recipe.model_copy(update={"output_dir": str(folder), "merge": block})
    return merged_model(open_run(with_place, folder), name).path


def _require_base(folder: Path, adapter: ModelRef) -> None:
    """Refuses to merge an adapter whose base was a folder that is not there now."""
    base = adapter.base.path
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1):
        raise RecipeError(
            f"the adapter in {adapter.path} was trained on the base {base}, and there is no such folder now. Put it "
            f"back; or, if it was moved, write its new place into {ADAPTER_CONFIG} of the adapter "
            f"(base_model_name_or_path) and, if it is the model that the run began with, into "
            f"{folder / 'recipe.yaml'} (model.id)."
        )
