"""The countries whose electricity codecarbon knows, read from its data without importing it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hfpipe.recipe.faults import Fault, found
from hfpipe.recipe.raw import mapping

GRAMS = "carbon_intensity"  # of CO2 a kWh; a country without it has a name and no more


def check_country(data: dict[str, Any]) -> Iterator[Fault]:
    """Yields a fault where `energy.country_iso_code` is no country that codecarbon knows."""
    code, known = mapping(data.get("energy")).get("country_iso_code"), countries()
    if not isinstance(code, str) or not known or code in known:
        return
    named = (known_code for known_code, name in known.items() if name.casefold().startswith(code.casefold()))
    meant = code.upper() if code.upper() in known else next(named, None)
    hint = f" Did you mean {meant}?" if meant else ""
    text = f"found {found(code)}; allowed is a country's code in three letters (ISO 3166), such as DEU, FRA or USA."
    yield Fault(("energy", "country_iso_code"), text + hint)


@cache
def countries() -> dict[str, str]:
    """Names by code; empty where codecarbon is not installed."""
    package = importlib.util.find_spec("codecarbon")
    folder = next(iter(package.submodule_search_locations or ()), None) if package else None
    path = Path(folder or "", "data", "private_infra", "global_energy_mix.json")
    if not folder or not path.is_file():
        return {}
    mixes = json.loads(path.read_text(encoding="utf-8"))
    return {code: mix["country_name"] for code, mix in mixes.items() if mix.get(GRAMS) is not None}
