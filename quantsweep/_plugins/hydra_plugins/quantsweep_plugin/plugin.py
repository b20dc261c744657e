"""What Hydra 1.3 finds: it looks for plugins in the `hydra_plugins` namespace and nowhere else.

The code is in `quantsweep.hydra_plugin`; this module only shows it to Hydra.  Hydra imports it at
every start, so nothing heavy may be imported here.
"""

from __future__ import annotations

from hydra._internal.core_plugins import file_config_source
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin

from quantsweep.composing.command_line import STUDIES
from quantsweep.hydra_plugin import launcher, sweeper
from quantsweep.storage.paths import product_root


class QuantsweepSweeper(sweeper.QuantsweepSweeper):
    """hydra/sweeper=quantsweep."""


class QuantsweepLauncher(launcher.QuantsweepLauncher):
    """hydra/launcher=quantsweep."""


# Plain mappings: Hydra runs this module before it can be found in sys.modules, where dataclasses look.
_SWEEPER = {"_target_": f"{__name__}.QuantsweepSweeper"}
_LAUNCHER = {"_target_": f"{__name__}.QuantsweepLauncher", "wait": False}
ConfigStore.instance().store(group="hydra/sweeper", name="quantsweep", node=_SWEEPER, provider="quantsweep")
ConfigStore.instance().store(group="hydra/launcher", name="quantsweep", node=_LAUNCHER, provider="quantsweep")


class StudiesSource(file_config_source.FileConfigSource):
    """`studies://FOLDER`: of a folder the studies in `sweeps/` alone; Hydra's help and completion walk all that a source shows."""

    @staticmethod
    def scheme() -> str:
        """What its addresses begin with."""
        return STUDIES

    def is_group(self, config_path: str) -> bool:
        """True for the folder itself and for `sweeps/`."""
        return config_path.split("/")[0] in ("", "sweeps") and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """True for a study."""
        return config_path.startswith("sweeps/") and super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The studies; of the folder itself nothing but `sweeps`."""
        if config_path:
            return super().list(config_path, results_filter)
        return ["sweeps"] if results_filter in (None, ObjectType.GROUP) and super().is_group("sweeps") else []


class QuantsweepSearchPath(SearchPathPlugin):
    """Makes `+sweeps=<name>` work from any folder: the product's root holds `sweeps/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the studies of the product."""
        search_path.append(provider="quantsweep", path=f"{STUDIES}://{product_root()}")
