"""What Hydra 1.3 finds: it looks for plugins in the `hydra_plugins` namespace and nowhere else.

The code is in `quantsweep.hydra_plugin`; this module only shows it to Hydra.  Hydra imports it at
every start, so nothing heavy may be imported here.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from quantsweep.hydra_plugin import launcher, sweeper
from quantsweep.paths import product_root


class QuantsweepSweeper(sweeper.QuantsweepSweeper):
    """hydra/sweeper=quantsweep."""


class QuantsweepLauncher(launcher.QuantsweepLauncher):
    """hydra/launcher=quantsweep."""


# Plain mappings: Hydra runs this module before it can be found in sys.modules, where dataclasses look.
_SWEEPER = {"_target_": f"{__name__}.QuantsweepSweeper"}
_LAUNCHER = {"_target_": f"{__name__}.QuantsweepLauncher", "wait": False}
ConfigStore.instance().store(group="hydra/sweeper", name="quantsweep", node=_SWEEPER, provider="quantsweep")
ConfigStore.instance().store(group="hydra/launcher", name="quantsweep", node=_LAUNCHER, provider="quantsweep")


class QuantsweepSearchPath(SearchPathPlugin):
    """Makes `+sweeps=<name>` work from any folder: the product's root holds `sweeps/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder that holds `sweeps/`."""
        search_path.append(provider="quantsweep", path=f"file://{product_root()}")
